"""A step of a ConvLSTMCell, where nothing surrounds the call: the short way.

For few pixels and channels the questions that :mod:`conv_base` asks take longer than the step. A
call of any other kind goes that way, which has the errors; the bits are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lstm_ext import ops
from lstm_ext.autograd import must_apply
from lstm_ext.batching import batched_gradients
from lstm_ext.conv_layer import Layer, gradients, in_torch, save, saved_tensors
from lstm_ext.conv_walk import Walk
from lstm_ext.convolutions import Window
from lstm_ext.cpu import conv as cpu_conv
from lstm_ext.cpu import engine as cpu_engine
from lstm_ext.derivatives import pulled
from lstm_ext.engine import is_lazy, is_recording, is_surrounded
from lstm_ext.plain import TYPES
from lstm_ext.steps import Steps

if TYPE_CHECKING:
    from lstm_ext.conv import ConvLSTMCell

_ROLES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_ch")


@functools.lru_cache(maxsize=256)
def _call(window: Window, N: int, inputs: int, C: int, size: tuple[int, ...]) -> Any:
    """None where the core is not to take the step, or the input has an error."""
    try:
        output = window.output(size)
    except RuntimeError:
        return None
    call = cpu_conv.Call(window, False, 1, N, inputs, C, size, output)
    return call if N and call.is_few_products(forward=True) else None


def short_step(
    cell: ConvLSTMCell, x: Any, hx: Any, window: Window, sizes: dict[str, tuple[int, ...]]
) -> tuple[Tensor, Tensor] | None:
    """What the cell's forward returns for x (N, in, *size) and hx, in float32 or float64 on the
    CPU; None where they are not for the short way. Not where operations are traced.

    window: of the input's convolution; sizes: of the parameters.
    """
    if type(x) not in TYPES or ops._engines["cpu"] is not cpu_engine or is_surrounded():
        return None
    dtype, C = x.dtype, cell.hidden_channels
    if (
        dtype not in (torch.float32, torch.float64)
        or x.device.type != "cpu"
        or x.is_nested
        or x.dim() != cell._dims + 2
        or x.layout is not torch.strided
        or x.size(1) != cell.in_channels
        or is_lazy(x)
    ):
        return None
    parameters = cell._parameters
    if type(parameters) is not dict:  # which may make what is taken out of it
        return None
    weights = [parameters.get(role) for role in _ROLES]
    for role, weight in zip(_ROLES, weights, strict=True):
        if weight is None and role not in sizes:
            continue
        if (
            type(weight) is not nn.Parameter
            or weight.dtype != dtype
            or weight.shape != sizes.get(role)
            or weight.device.type != "cpu"
            or not weight.is_contiguous()
            or is_lazy(weight)
        ):
            return None
    N = x.size(0)
    call = _call(window, N, x.size(1), C, tuple(x.shape[2:]))
    if call is None:
        return None
    size = (N, C, *call.output)
    if hx is None:
        h0 = c0 = x.new_zeros(size)
    else:
        if type(hx) not in (tuple, list) or len(hx) != 2:
            return None
        h0, c0 = hx
        for state in (h0, c0):
            if (
                type(state) not in TYPES
                or state.is_nested
                or state.dtype != dtype
                or state.shape != size
                or state.device.type != "cpu"
                or state.layout is not torch.strided
                or is_lazy(state)
            ):
                return None
    tensors = (x, h0, c0, *weights)
    recorded = is_recording() and any(t is not None and t.requires_grad for t in tensors)
    # In memory channels last; no views, which a caller could not change in place.
    h, c = (x.new_empty_strided(size, call.state_strides) for _ in "hc")
    if not recorded:
        cpu_conv.forward(call, x, h0, c0, weights, h, c)
        return h, c
    gates = x.new_empty(1, call.rows, 4 * C)
    h_seq, c_seq = (x.new_empty(2, call.rows, C) for _ in "hc")
    with torch.no_grad():
        cpu_conv.forward(call, x, h0, c0, weights, h, c, h_seq[0], h_seq[1:], c_seq, gates)
    return super(Function, ConvStep).apply(call, (h, c), gates, h_seq, c_seq, *tensors)


class ConvStep(Function):
    """What was computed already, made differentiable; saved as conv_layer.ConvLayer saves."""

    @staticmethod
    def forward(
        ctx: Any,
        call: cpu_conv.Call,
        states: tuple[Tensor, Tensor],
        gates: Tensor,
        h_seq: Tensor,
        c_seq: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """tensors: x, h0 and c0, weight_ih, weight_hh, bias_ih, bias_hh and weight_ch."""
        ctx.call = call
        save(ctx, (*tensors, gates, h_seq, c_seq))
        return states

    @staticmethod
    @batched_gradients
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, wanted = ctx.call, ctx.needs_input_grad[5:]
        *tensors, gates, h_seq, c_seq = saved_tensors(ctx)
        with ops.without_autocast(gates.device):
            if must_apply():
                made = pulled(functools.partial(_in_torch, call), tensors, grads, wanted)
            else:
                made = _gradients(call, wanted, grads, tensors, gates, h_seq, c_seq)
        return None, None, None, None, None, *made


def _gradients(
    call: cpu_conv.Call,
    wanted: Sequence[bool],
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    *saved: Tensor,
) -> tuple[Tensor | None, ...]:
    x, h0, c0, w_ih, w_hh, b_ih, _, w_ch = tensors
    of_x, of_h0, of_c0, of_w_ih, of_w_hh, of_b_ih, of_b_hh, of_w_ch = wanted
    states = h0.movedim(1, -1), c0.movedim(1, -1)
    dx, dw_ih, db, dw_hh, dh0, dc0, dw_ch = gradients(
        _layer(call, x.dtype),
        (of_x, of_w_ih, of_b_ih or of_b_hh, of_w_hh, of_h0, of_c0, of_w_ch),
        (None, *(None if g is None else g.movedim(1, -1) for g in grads)),
        (x.unsqueeze(0), w_ih, b_ih, w_hh, *states, w_ch),
        *saved,
    )
    return (
        None if dx is None else dx.squeeze(0),
        None if dh0 is None else dh0.movedim(-1, 1),
        None if dc0 is None else dc0.movedim(-1, 1),
        dw_ih,
        dw_hh,
        db if of_b_ih else None,
        # Two tensors, as for two parameters: a caller may change one in place.
        (db.clone() if of_b_ih else db) if of_b_hh else None,
        dw_ch,
    )


def _layer(call: cpu_conv.Call, dtype: torch.dtype) -> Layer:
    walk = Walk(dtype, Steps.padded(1, call.N), call.rows // call.N, True)
    return Layer(walk, call.window, call.output, False)


def _in_torch(
    call: cpu_conv.Call,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_ch: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The step in torch operations."""
    bias = None if b_ih is None else b_ih + b_hh
    states = h0.movedim(1, -1), c0.movedim(1, -1)
    _, h, c = in_torch(_layer(call, x.dtype), x.unsqueeze(0), w_ih, bias, w_hh, *states, w_ch)
    return h.movedim(-1, 1), c.movedim(-1, 1)
