"""A plain layer or cell, where nothing surrounds the call: the short way.

For few sequences and steps the questions that :mod:`layer` and :mod:`ops` ask take longer than the
steps, and so do, on a GPU, allocations and products one by one. Here the core does all that, and a
call of any other kind goes the layer's way, which has its errors. On the CPU the bits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lstm_ext import batching, cpu_engine, cpu_products, ops
from lstm_ext.autograd import LSTMLayerBackward, must_apply
from lstm_ext.engine import DTYPE_CODE
from lstm_ext.native import _C
from lstm_ext.profiling import recorded
from lstm_ext.steps import Steps

_TYPES = (Tensor, nn.Parameter)
_plain = _C.CpuPlain(
    types=_TYPES,
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
    engine = _engine_of(x)
    call = (x, hx, weights, input_size, hidden_size, steps, batch_first)
    if engine is None:
        return None
    if engine is cpu_engine:
        made = recorded(_plain.cpu_forward)(
            *call,
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_grad_enabled(),
            cpu_products.workspace,
        )
    else:
        made = recorded(engine.plain.cuda_forward)(engine, *call, torch.is_grad_enabled())
    if made is None or len(made) <= 3:
        return made
    *outputs, gates, c_seq, h0, c0 = made
    # Function.apply looks for wrappers of transforms before, which the core found none of.
    return super(Function, PlainLayer).apply(
        steps, batch_first, outputs, gates, c_seq, x, h0, c0, *weights
    )


def _engine_of(x: Any) -> Any:
    """The engine that has a short way for x; None where there is none."""
    if type(x) not in _TYPES:
        return None
    engine = ops._engines.get(x.device.type)
    return engine if engine is cpu_engine or getattr(engine, "plain", None) is not None else None


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
            made = _backward(gradients, saved, wanted, T, batch_first)
            if made is not None:
                return (None,) * 5 + made
        x, h0, c0, *weights, gates, c_seq, y = saved
        wanted_x, *wanted = wanted
        *dy, dh, dc = gradients
        I, of = x.size(-1), (x, h0, c0)
        if h0 is None:
            h0 = c0 = x.new_zeros(x.numel() // (I * (T or 1)), weights[1].size(1))
        H = h0.size(-1)
        steps = Steps.padded(T or 1, h0.size(-2), batch_first=batch_first)
        dy = _rows(dy[0], H) if dy else None
        dh, dc = _rows(dh, H), _rows(dc, H)
        x, h0, c0 = _rows(x, I), _rows(h0, H), _rows(c0, H)
        y = h0 if y is None else _rows(y, H)  # the output is read only at a step before another
        layer = (x, h0, c0, *weights, None, y, gates, c_seq)
        flags = (wanted_x, *wanted, False)  # no weight_hr
        run = LSTMLayerBackward.apply if applied else LSTMLayerBackward.forward
        dx, *grads = run(steps, ((False, None),), flags, dy, None, dh, dc, *layer)
        dx, dh0, dc0 = (
            g if g is None else g.view(t.shape) for g, t in zip((dx, *grads[:2]), of, strict=True)
        )
        return (None,) * 5 + (dx, dh0, dc0, *grads[2:6])


def _backward(
    gradients: tuple[Tensor | None, ...],
    saved: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    steps: int,
    batch_first: bool,
) -> tuple[Tensor | None, ...] | None:
    """The gradients of the inputs, None where not wanted; None where the call is not one for the
    short way."""
    engine = _engine_of(saved[0])
    call = (gradients, saved, wanted, steps, batch_first)
    if engine is None:
        return None
    if engine is cpu_engine:
        return recorded(_plain.cpu_backward)(
            *call, torch.get_num_threads(), cpu_engine.FUSED_ROWS - 1, cpu_products.workspace
        )
    return recorded(engine.plain.cuda_backward)(engine, *call)


def _rows(tensor: Tensor | None, width: int) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() == 2 else tensor.reshape(-1, width)
