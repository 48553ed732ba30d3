"""A plain layer or cell on the CPU, where nothing surrounds the call: the short way.

For few sequences and steps the questions that :mod:`layer` and :mod:`ops` ask take longer than the
steps. Here the core asks them, and a call of any other kind goes the layer's way, which has its
errors. The bits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lstm_ext import batching, cpu_engine, cpu_products, ops
from lstm_ext.autograd import LSTMLayerBackward, must_apply
from lstm_ext.engine import DTYPE_CODE, Direction, DirectionGrads, LayerWeights, rows_of
from lstm_ext.native import _C
from lstm_ext.profiling import recorded
from lstm_ext.steps import Steps

_CPU = torch.device("cpu")
_plain = _C.CpuPlain(
    types=(Tensor, nn.Parameter),
    codes={t: DTYPE_CODE[t] for t in (torch.float64, torch.float32, torch.bfloat16)},
    half_acc=torch.float32,
    most_rows=cpu_engine.CORE_ONE_STEP_ROWS,
)


def plain_layer(
    x: Any,
    hx: Any,
    weights: Sequence[Tensor | None],
    input_size: int,
    hidden_size: int,
    steps: int,
    batch_first: bool = False,
) -> Any:
    """(y, h_n, c_n), all tensors; None where the call is not one for the short way.

    Only where not :func:`engine.is_surrounded`.

    Args:
        x, hx: whatever the caller got. To be taken, as a module has them: (T, B, in) or (B, T, in),
            a pair of (1, B, H) or None for zeros; or as a layer: (T * B, in) and (B, H).
        weights: weight_ih, weight_hh, bias_ih, bias_hh; the biases may be None.
        steps: T; 0 for a cell's only one, x being (B, in): then there is no y.
    """
    if ops.engine_of(_CPU) is not cpu_engine:
        return None
    made = recorded(_plain.cpu_forward)(
        x,
        hx,
        weights,
        input_size,
        hidden_size,
        steps,
        batch_first,
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        cpu_products.workspace,
    )
    if made is None or len(made) <= 3:
        return made
    *outputs, gates, c_seq, h0, c0 = made
    # Function.apply looks for wrappers of transforms before, which the core found none of.
    return super(Function, PlainLayer).apply(
        steps, batch_first, outputs, gates, c_seq, x, h0, c0, *weights
    )


def plain_cell(
    x: Any, hx: Any, weights: Sequence[Tensor | None], input_size: int, hidden_size: int
) -> tuple[Tensor, Tensor] | None:
    """(h_1, c_1) as LSTMCell.forward returns them, x and hx being what it got; else as
    :func:`plain_layer`."""
    return plain_layer(x, hx, weights, input_size, hidden_size, 0)


class PlainLayer(Function):
    """What was computed already, made differentiable.

    Saved: references to the inputs, the gates and c_t, and y of several steps; not the last states
    and not y of a single step, which the caller may change in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        steps: int,
        batch_first: bool,
        outputs: list[Tensor],
        gates: Tensor,
        c_seq: Tensor,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """outputs: y, unless of a cell (steps 0), h_n and c_n. inputs: x, h_0, c_0 and the weights.

        gates (T * B, 4H), c_seq (T * B, H).
        """
        ctx.steps = steps, batch_first
        ctx.save_for_backward(*inputs, gates, c_seq, outputs[0] if steps > 1 else None)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[5:]
        T, batch_first = ctx.steps
        applied = must_apply()
        if not applied and not torch._C._is_any_autocast_enabled():
            made = recorded(_plain.cpu_backward)(
                gradients,
                saved,
                wanted,
                T,
                batch_first,
                torch.get_num_threads(),
                cpu_engine.FUSED_ROWS - 1,
                cpu_products.workspace,
            )
            if made is not None:
                return (None,) * 5 + made
        x, h0, c0, *weights, gates, c_seq, y = saved
        wanted_x, *wanted = wanted
        *dy, dh, dc = gradients
        I, H, of = x.size(-1), h0.size(-1), (x, h0, c0)
        steps = Steps.padded(T or 1, h0.size(-2), batch_first=batch_first)
        dy = _rows(dy[0], H) if dy else None
        dh, dc = _rows(dh, H), _rows(dc, H)
        x, h0, c0 = _rows(x, I), _rows(h0, H), _rows(c0, H)
        y = h0 if y is None else _rows(y, H)  # the output is read only at a step before another
        if applied:
            layer = (x, h0, c0, *weights, None, y, gates, c_seq)
            flags = (wanted_x, *wanted, False)  # no weight_hr
            dx, *grads = LSTMLayerBackward.apply(
                steps, ((False, None),), flags, dy, None, dh, dc, *layer
            )
        else:
            # As ops and the engine do for a list of directions.
            direction, saved = Direction(h0, c0, LayerWeights(*weights), False), (gates, c_seq)
            ops.check_saved((dy, dh, dc), x, [direction], y, [saved], steps)
            dx, grads = cpu_engine.direction_backward(
                rows_of(dy, 0, H),
                None,
                dh,
                dc,
                x,
                direction,
                rows_of(y, 0, H),
                saved,
                steps,
                wanted_x,
                DirectionGrads(*wanted, False),
            )
            dx = None if dx is None else dx.to(x.dtype)
        dx, dh0, dc0 = (
            g if g is None else g.view(t.shape) for g, t in zip((dx, *grads[:2]), of, strict=True)
        )
        return (None,) * 5 + (dx, dh0, dc0, *grads[2:6])


def _rows(tensor: Tensor | None, width: int) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() == 2 else tensor.reshape(-1, width)
