"""A step of a ConvLSTMCell, where nothing surrounds the call: the short way.

For few pixels and channels the questions that :mod:`conv_base` asks take longer than the step. A
call of any other kind goes that way, which has the errors. The step is a call of the core, or of a
library's convolutions, channels first (:mod:`conv_first`); these make the gradients of large
weights, of many steps, at once (:mod:`step_gradients`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lstm_ext import conv_first, ops, step_gradients
from lstm_ext.autograd import must_apply
from lstm_ext.batching import batched_gradients
from lstm_ext.conv_layer import Layer, in_torch, save, saved_tensors
from lstm_ext.conv_walk import Walk
from lstm_ext.convolutions import Window, pixels_of
from lstm_ext.cpu import conv as cpu_conv
from lstm_ext.cpu import engine as cpu_engine
from lstm_ext.derivatives import pulled
from lstm_ext.engine import (
    DTYPE_CODE,
    acc_dtype,
    autocast_is_on,
    is_lazy,
    is_recording,
    is_surrounded,
)
from lstm_ext.plain import TYPES
from lstm_ext.step_gradients import (
    CellWeights,
    Kept,
    KeptSteps,
    cell_weights,
    may_keep,
    nothing_kept,
    two_biases,
)
from lstm_ext.steps import Steps
from lstm_ext.tensors import is_autocast

if TYPE_CHECKING:
    from lstm_ext.conv import ConvLSTMCell

_ROLES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_ch")
_TENSORS = 3 + len(_ROLES)  # x and the states before


@functools.lru_cache(maxsize=256)
def _call(window: Window, N: int, inputs: int, C: int, size: tuple[int, ...]) -> Any:
    """None where there is nothing to do, or the input has an error."""
    try:
        output = window.output(size)
    except RuntimeError:
        return None
    return cpu_conv.Call(window, False, 1, N, inputs, C, size, output) if N else None


def short_step(
    cell: ConvLSTMCell, x: Any, hx: Any, window: Window, sizes: dict[str, tuple[int, ...]]
) -> tuple[Tensor, Tensor] | None:
    """What the cell's forward returns for x (N, in, *size) and hx on the CPU; None where they are
    not for the short way. Not where operations are traced.

    window: of the input's convolution; sizes: of the parameters.
    """
    if type(x) not in TYPES or ops._engines["cpu"] is not cpu_engine:
        return None
    if not is_surrounded():
        return _step(cell, x, hx, window, sizes, None)
    if not autocast_is_on("cpu"):
        return None
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):  # which may not be all that is around
        return None if is_surrounded() else _step(cell, x, hx, window, sizes, dtype)


def _step(
    cell: ConvLSTMCell,
    x: Any,
    hx: Any,
    window: Window,
    sizes: dict[str, tuple[int, ...]],
    cast: torch.dtype | None,
) -> tuple[Tensor, Tensor] | None:
    """cast: to which autocast would, None without it."""
    C, dtype = cell.hidden_channels, x.dtype
    if cast is not None and is_autocast(dtype):
        dtype = cast
    kinds = (torch.float32, cast, x.dtype) if dtype == cast else (dtype,)
    if (
        dtype not in DTYPE_CODE
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
            or weight.dtype not in kinds
            or weight.shape != sizes.get(role)
            or weight.device.type != "cpu"
            or not _is_dense(weight)
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
                or state.dtype not in kinds
                or state.shape != size
                or state.device.type != "cpu"
                or state.layout is not torch.strided
                or is_lazy(state)
            ):
                return None
    tensors = (x, h0, c0, *weights)
    recorded = is_recording() and any(t is not None and t.requires_grad for t in tensors)
    many = call.weights >= conv_first.MANY_WEIGHTS
    kind = _kind(call, dtype, many)
    if not kind.in_core and not (weights[0].is_contiguous() and weights[1].is_contiguous()):
        return None  # channels last, as the other way wants them
    if not recorded:
        return _forward(call, kind, tensors, False)[:2]
    own = None
    if many and call.rows < step_gradients.MOST_ROWS:
        own = cell_weights(hx, (*weights[:4], None), 0)  # each step makes that of w_ch itself
    with torch.no_grad():
        h, c, *saved = _forward(call, kind, tensors, True)
    shared = None if own is None else own.shared
    # Function.apply looks for wrappers of transforms before: there is none.
    return super(Function, ConvStep).apply(call, kind, own, shared, (h, c), *tensors, *saved)


class _Kind(NamedTuple):
    """How a step is computed."""

    in_core: bool
    dtype: torch.dtype  # of what comes in, autocast or not, and of the results
    # Of the convolutions: dtype, but float32 for a half type in the core, and where a library's
    # convolutions of it are not for use.
    convolved: torch.dtype

    def computed(self, tensors: Sequence[Any]) -> list[Any]:
        """ConvStep's tensors as they are computed with."""
        acc = acc_dtype(self.dtype)
        if self.dtype == acc:
            return list(tensors)
        x, h0, c0, w_ih, w_hh, *others = (None if t is None else t.to(self.dtype) for t in tensors)
        x, h0, w_ih, w_hh = (t.to(self.convolved) for t in (x, h0, w_ih, w_hh))
        return [x, h0, c0.to(acc), w_ih, w_hh, *(None if t is None else t.to(acc) for t in others)]


def _is_dense(weight: Tensor) -> bool:
    """Channels first or last."""
    if weight.is_contiguous():
        return True
    return weight.dim() > 1 and weight.movedim(1, -1).is_contiguous()


def _kind(call: cpu_conv.Call, dtype: torch.dtype, many: bool) -> _Kind:
    acc = acc_dtype(dtype)
    half = dtype == torch.bfloat16 and _layer(call, dtype).is_for_bf16(call.size)
    in_core = call.is_few_products(forward=True, half=half) and not many
    return _Kind(in_core, dtype, dtype if half and not in_core else acc)


def _forward(
    call: cpu_conv.Call, kind: _Kind, tensors: Sequence[Any], save: bool
) -> tuple[Tensor, ...]:
    """h_1, c_1, neither of which is a view: a caller may change them in place; and what backward
    needs, if ``save``. tensors: as ConvStep's."""
    x, h0, c0, *weights = kind.computed(tensors)
    if not kind.in_core:
        h, c, gates = conv_first.forward(call, x, h0, c0, weights, save)
        saved = (gates, c)
    else:
        size = (call.N, call.C, *call.output)
        h, c = (x.new_empty_strided(size, call.state_strides) for _ in "hc")  # channels last
        saved = ()
        if save:
            gates = x.new_empty(1, call.rows, 4 * call.C)
            h_seq, c_seq = (x.new_empty(2, call.rows, call.C) for _ in "hc")
            saved = gates, c_seq, h_seq
            written = h_seq[0], h_seq[1:], c_seq, gates
        cpu_conv.forward(call, x, h0, c0, weights, h, c, *(written if save else ()))
    if kind.dtype != c.dtype:
        return h.to(kind.dtype), c.to(kind.dtype), *saved
    if save and not kind.in_core:
        saved = gates, c.clone()
    return h, c, *saved


class ConvStep(Function):
    """What was computed already, made differentiable; saved as conv_layer.ConvLayer saves."""

    @staticmethod
    def forward(
        ctx: Any,
        call: cpu_conv.Call,
        kind: _Kind,
        cell_weights: CellWeights | None,
        shared: Tensor | None,
        states: tuple[Tensor, Tensor],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """tensors: x, h0 and c0, weight_ih, weight_hh, bias_ih, bias_hh and weight_ch; then what
        :func:`_forward` has saved. cell_weights, shared: as :mod:`step_gradients` has them."""
        ctx.call, ctx.kind, ctx.cell_weights = call, kind, cell_weights
        save(ctx, tensors)
        return states

    @staticmethod
    @batched_gradients
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = saved_tensors(ctx)
        shared, wanted = ctx.needs_input_grad[3], ctx.needs_input_grad[5 : 5 + _TENSORS]
        kept = None
        with ops.without_autocast(tensors[0].device):
            if must_apply():
                run = functools.partial(_in_torch, ctx.call, ctx.kind)
                made = pulled(run, tensors[:_TENSORS], grads, wanted)
            else:
                made, kept = _gradients(ctx, wanted, grads, tensors, shared and may_keep(ctx))
        if shared and kept is None:
            kept = nothing_kept()
        return None, None, None, kept, None, *made, *[None] * (len(tensors) - _TENSORS)


class _Products(NamedTuple):
    """As :data:`step_gradients.Products`, of steps by a library's convolutions."""

    call: cpu_conv.Call

    def __call__(self, steps: Sequence[Kept], wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        da, x, h = (t[0] if len(t) == 1 else torch.cat(t) for t in zip(*steps, strict=True))
        return conv_first.weights_gradients(self.call, wanted, x, h, da)


def _gradients(
    ctx: ConvStep,
    wanted: Sequence[bool],
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    keep: bool,
) -> tuple[tuple[Tensor | None, ...], KeptSteps | None]:
    """Those of ConvStep's tensors, and instead of those of the weights, if ``keep``, that of
    ``shared``."""
    call, kind = ctx.call, ctx.kind
    gates, c_seq, *h_seq = tensors[_TENSORS:]
    x, h0, c0, w_ih, w_hh, _, _, w_ch = kind.computed(tensors[:_TENSORS])
    grads = [None if g is None else g.to(c0.dtype) for g in grads]
    of_x, of_h0, of_c0, *of_weights, of_w_ch = wanted
    kept = made = None
    if kind.in_core:
        dh, dc = (None if g is None else pixels_of(g) for g in grads)
        da, dx, dh0, dc0, dw_ch = cpu_conv.backward(
            call, of_x, of_h0, (x, w_ih, w_hh, w_ch), gates, c_seq, None, dh, dc
        )
        dx = None if dx is None else dx[0]
        dh0, dc0 = (d.view(call.N, *call.output, call.C).movedim(-1, 1) for d in (dh0, dc0))
        if any(of_weights):
            made = cpu_conv.weights_gradients(call, *of_weights[:2], x, h_seq[0], da)
    else:
        x, h0 = x.contiguous(), h0.contiguous()
        da, dx, dh0, dc0, dw_ch = conv_first.backward(
            call, of_x, of_h0, (x, h0, c0, w_ih, w_hh, w_ch), gates, c_seq, *grads
        )
        if keep:
            kept = KeptSteps(_Products(call), Kept(da, x, h0), call.rows, ctx.cell_weights.wanted)
        elif any(of_weights):
            made = conv_first.weights_gradients(call, of_weights, x, h0, da)
    states = dh0 if of_h0 else None, dc0 if of_c0 else None
    weights = (None,) * 4 if made is None else (*made[:2], *two_biases(made[2], *of_weights[2:]))
    all_made = (dx, *states, *weights, dw_ch if of_w_ch else None)
    if kind.dtype != c0.dtype:
        pairs = zip(all_made, tensors, strict=False)
        all_made = tuple(None if g is None else g.to(t.dtype) for g, t in pairs)
    return all_made, kept


def _layer(call: cpu_conv.Call, dtype: torch.dtype) -> Layer:
    walk = Walk(dtype, Steps.padded(1, call.N), call.rows // call.N, True)
    return Layer(walk, call.window, call.output, False)


def _in_torch(call: cpu_conv.Call, kind: _Kind, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """The step in torch operations."""
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_ch = kind.computed(tensors)
    bias = None if b_ih is None else (b_ih + b_hh).to(x.dtype)
    states = (s.to(c0.dtype).movedim(1, -1) for s in (h0, c0))
    layer = _layer(call, kind.dtype)
    _, h, c = in_torch(layer, x.unsqueeze(0), w_ih, bias, w_hh, *states, w_ch)
    return h.movedim(-1, 1).to(kind.dtype), c.movedim(-1, 1).to(kind.dtype)
