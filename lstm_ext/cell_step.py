"""One step of the plain cell on the CPU, where nothing surrounds the call: the short way.

For a few sequences the questions that :mod:`layer` and :mod:`ops` ask take longer than the step.
Here the core asks them, and a call of any other kind goes the layer's way, which has its errors.
The bits are the same.
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
from lstm_ext.ops import Direction, DirectionGrads, LayerWeights
from lstm_ext.profiling import recorded
from lstm_ext.steps import Steps

_CPU = torch.device("cpu")
_cell = _C.CpuCell(
    types=(Tensor, nn.Parameter),
    codes={dtype: DTYPE_CODE[dtype] for dtype in (torch.float64, torch.float32)},
    most_rows=cpu_engine.CORE_ONE_STEP_ROWS,
)


def cell_step(
    x: Any, hx: Any, weights: Sequence[Tensor | None], input_size: int, hidden_size: int
) -> tuple[Tensor, Tensor] | None:
    """(h_1, c_1) as LSTMCell.forward returns them; None where the call is one for the layer.

    Only where not :func:`engine.is_surrounded`.

    Args:
        x, hx: whatever LSTMCell.forward got.
        weights: weight_ih, weight_hh, bias_ih, bias_hh; the biases may be None.
    """
    if ops.engine_of(_CPU) is not cpu_engine:
        return None
    made = recorded(_cell.cpu_forward)(
        x,
        hx,
        weights,
        input_size,
        hidden_size,
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        cpu_products.workspace,
    )
    if made is None or len(made) == 2:
        return made
    # Function.apply looks for wrappers of transforms before, which the core found none of.
    return super(Function, CellStep).apply(made[:4], x, *made[4:], *weights)


class CellStep(Function):
    """A step that was taken already, made differentiable.

    Saved: references to the inputs, the gates and c_1; not the outputs, which the caller may change
    in place.
    """

    @staticmethod
    def forward(
        ctx: Any, made: tuple[Tensor, ...], *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """made: h_1, c_1, the gates and c_1 again. inputs: x, h_0, c_0 and the weights."""
        h, c, gates, c_seq = made
        ctx.save_for_backward(*inputs, gates, c_seq)
        ctx.set_materialize_grads(False)
        return h, c

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None) -> tuple[Any, ...]:
        x, h0, c0, *weights, gates, c_seq = ctx.saved_tensors
        _, wanted_x, *wanted = ctx.needs_input_grad
        wanted.append(False)  # no weight_hr
        steps = Steps.padded(1, x.size(0))
        y = h0  # the output is read only at a step before another
        if must_apply():
            layer = (x, h0, c0, *weights, None, y, gates, c_seq)
            kinds = ((False, None),)
            dx, *grads = LSTMLayerBackward.apply(
                steps, kinds, (wanted_x, *wanted), None, None, dh, dc, *layer
            )
        else:
            direction = Direction(h0, c0, LayerWeights(*weights), False)
            flags, saved = DirectionGrads(*wanted), (gates, c_seq)
            dx, grads = cpu_engine.direction_backward(
                None, None, dh, dc, x, direction, y, saved, steps, wanted_x, flags
            )
        return (None, dx, *grads[:6])
