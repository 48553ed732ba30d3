"""A step of a ConvLSTMCell, where nothing surrounds the call: the short way.

For few pixels and channels the questions that :mod:`conv_base` asks take longer than the step. A
call of any other kind goes that way, which has the errors. The step is a call of the core, which
asks them itself, or of a library's convolutions, channels first (:mod:`conv_first`); these make the
gradients of large weights, of many steps, at once (:mod:`step_gradients`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, profiler

from lstm_ext import conv_first, ops, step_gradients
from lstm_ext.autograd import must_apply
from lstm_ext.batching import batched_gradients
from lstm_ext.conv_layer import Layer, check_saved, in_torch, save, saved_tensors
from lstm_ext.conv_walk import Walk
from lstm_ext.convolutions import input_window
from lstm_ext.cpu import conv as cpu_conv
from lstm_ext.cpu import engine as cpu_engine
from lstm_ext.cpu import products as cpu_products
from lstm_ext.derivatives import pulled
from lstm_ext.engine import (
    DTYPE_CODE,
    EXCHANGE,
    SURROUNDINGS,
    acc_dtype,
    autocast_is_on,
    in_memory,
    is_surrounded,
)
from lstm_ext.native import _C
from lstm_ext.plain import TYPES
from lstm_ext.profiling import recorded
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
    from lstm_ext.conv_base import Attributes

_TENSORS = 8  # x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh and weight_ch


def core(exchange: Any) -> Any:
    """The core's part. exchange: as :data:`engine.EXCHANGE`."""
    return _C.CpuConvCell(
        types=TYPES,
        codes=DTYPE_CODE,
        half_acc=torch.float32,
        bytes=torch.uint8,
        exchange=exchange,
        surroundings=SURROUNDINGS,
    )


_core = core(EXCHANGE)


class _Step(NamedTuple):
    """What a step is but for its tensors and the way it goes."""

    call: cpu_conv.Call
    core: Any  # the core's
    dtype: torch.dtype  # of the results


@functools.lru_cache(maxsize=256)
def _step(
    attributes: Attributes, shape: torch.Size, dtype: torch.dtype, cast: torch.dtype | None
) -> _Step | None:
    """For x of that shape and dtype; None where there is nothing to do, or an error."""
    dims = len(attributes.kernel_size)
    if len(shape) != dims + 2 or shape[1] != attributes.in_channels or not shape[0]:
        return None
    if cast is not None and is_autocast(dtype):
        dtype = cast
    if dtype not in DTYPE_CODE:
        return None
    N, inputs, *size = shape
    C, bias, peephole = attributes.hidden_channels, attributes.bias, attributes.peephole
    window = input_window(
        attributes.kernel_size, attributes.stride, attributes.padding, attributes.dilation
    )
    try:
        output = window.output(size)
    except RuntimeError:
        return None
    call = cpu_conv.Call(window, False, 1, N, inputs, C, tuple(size), output)
    windows = (
        cpu_conv.core_window(window, call.size, output, inputs),
        cpu_conv.core_window(window.of_states(), output, output, C),
    )
    step = _C.ConvCellStep(*windows, N, dims, bias, peephole, dtype, dtype == cast)
    return _Step(call, step, dtype)


def short_step(
    parameters: Any, x: Any, hx: Any, attributes: Attributes
) -> tuple[Tensor, Tensor] | None:
    """What the forward of a cell with these parameters returns for x (N, in, *size) and hx on the
    CPU; None where they are not for the short way. Not where operations are traced.

    parameters: the cell's dict of them.
    """
    if type(x) not in TYPES or ops._engines["cpu"] is not cpu_engine:
        return None
    if SURROUNDINGS.none():
        return _run(parameters, x, hx, attributes, None)
    if SURROUNDINGS.intercepted() or not autocast_is_on("cpu"):
        return None
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):  # which may not be all that is around
        return None if is_surrounded() else _run(parameters, x, hx, attributes, dtype)


def _run(
    parameters: Any, x: Tensor, hx: Any, attributes: Attributes, cast: torch.dtype | None
) -> tuple[Tensor, Tensor] | None:
    """cast: to which autocast would, None without it."""
    step = None if x.is_nested else _step(attributes, x.shape, x.dtype, cast)
    if step is None:
        return None
    kind = _kind(step.call, step.dtype)
    if not kind.in_core:
        return _by_the_library(step, kind, parameters, x, hx)
    run = recorded(_core.cpu_conv_cell) if profiler._is_profiler_enabled else _core.cpu_conv_cell
    made = run(step.core, parameters, x, hx, cpu_products.workspace)
    if made is None:
        return None
    states, saved = made
    return states if saved is None else _recorded(step, kind, None, states, saved)


def _recorded(
    step: _Step,
    kind: _Kind,
    own: CellWeights | None,
    states: tuple[Tensor, Tensor],
    saved: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """h_1 and c_1, differentiable."""
    shared = None if own is None else own.shared
    # Function.apply looks for wrappers of transforms before: there is none.
    return super(Function, ConvStep).apply(step, kind, own, shared, states, *saved)


def _by_the_library(
    step: _Step, kind: _Kind, parameters: Any, x: Tensor, hx: Any
) -> tuple[Tensor, Tensor] | None:
    """As :func:`short_step`."""
    call, found = step.call, _core.given(step.core, parameters, x, hx)
    if found is None:
        return None
    tensors, records = found
    _, _, _, *weights = tensors
    if not (weights[0].is_contiguous() and weights[1].is_contiguous()):
        return None  # channels last, as the other way wants them
    own = None
    many = call.weights >= conv_first.MANY_WEIGHTS
    if records and many and call.rows < step_gradients.MOST_ROWS:
        own = cell_weights(hx, (*weights[:4], None), 0)  # each step makes that of w_ch itself
    with torch.no_grad():
        x, h0, c0, *weights = kind.computed(tensors)
        h, c, *saved = conv_first.forward(call, x, h0, c0, weights, records)
    return _recorded(step, kind, own, (h, c), (*tensors, *saved)) if records else (h, c)


class _Kind(NamedTuple):
    """How a step is computed."""

    in_core: bool
    dtype: torch.dtype  # of what comes in, autocast or not, and of the results
    # Of a library's convolutions: dtype, but float32 for a half type whose own are not for use.
    convolved: torch.dtype

    def computed(self, tensors: Sequence[Any]) -> list[Any]:
        """ConvStep's tensors as they are computed with by the library; c_0 is of ``dtype``."""
        acc = acc_dtype(self.dtype)
        if self.dtype == acc:
            return list(tensors)
        x, h0, c0, w_ih, w_hh, *others = (_to(t, self.dtype) for t in tensors)
        x, h0, w_ih, w_hh = (_to(t, self.convolved) for t in (x, h0, w_ih, w_hh))
        return [x, h0, c0, w_ih, w_hh, *(_to(t, acc) for t in others)]


def _to(tensor: Any, dtype: torch.dtype) -> Any:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _kind(call: cpu_conv.Call, dtype: torch.dtype) -> _Kind:
    acc = acc_dtype(dtype)
    half = dtype == torch.bfloat16 and _layer(call, dtype).is_for_bf16(call.size)
    few = call.weights < conv_first.MANY_WEIGHTS
    in_core = few and call.is_few_products(forward=True, half=half)
    return _Kind(in_core, dtype, dtype if half and not in_core else acc)


class ConvStep(Function):
    """What was computed already, made differentiable; saved as conv_layer.ConvLayer saves."""

    @staticmethod
    def forward(
        ctx: Any,
        step: _Step,
        kind: _Kind,
        cell_weights: CellWeights | None,
        shared: Tensor | None,
        states: tuple[Tensor, Tensor],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """tensors: x, h0 and c0, weight_ih, weight_hh, bias_ih, bias_hh and weight_ch; then what
        the core or :func:`conv_first.forward` has saved. cell_weights, shared: as
        :mod:`step_gradients` has them."""
        ctx.step, ctx.kind, ctx.cell_weights = step, kind, cell_weights
        save(ctx, tensors)
        return states

    @staticmethod
    @batched_gradients
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch._C._is_any_autocast_enabled():
            return _backward(ctx, grads)
        with ops.without_autocast(torch.device("cpu")):
            return _backward(ctx, grads)


def _backward(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """ConvStep's, where no autocast has a say in the products."""
    step, kind = ctx.step, ctx.kind
    shared, wanted = ctx.needs_input_grad[3], ctx.needs_input_grad[5 : 5 + _TENSORS]
    made = kept = None
    if kind.in_core and not (torch.is_grad_enabled() or is_surrounded()):
        tensors = ctx.saved_tensors
        backward = recorded(_core.cpu_conv_cell_backward)
        made = backward(step.core, grads, tensors, wanted, cpu_products.workspace)
        if made is None:
            check_saved(ctx, tensors)
    else:
        tensors = saved_tensors(ctx)
    if made is None:
        if kind.in_core or must_apply():
            run = functools.partial(_in_torch, step.call, kind)
            made = pulled(run, tensors[:_TENSORS], grads, wanted)
        else:
            grads = [None if g is None else in_memory(g) for g in grads]
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
    """By the library: those of ConvStep's tensors, and instead of those of the weights, if
    ``keep``, that of ``shared``."""
    call, kind = ctx.step.call, ctx.kind
    gates, c = tensors[_TENSORS:]
    x, h0, c0, w_ih, w_hh, _, _, w_ch = kind.computed(tensors[:_TENSORS])
    of_x, of_h0, of_c0, *of_weights, of_w_ch = wanted
    kept = None
    x, h0 = x.contiguous(), h0.contiguous()
    of_step = (False,) * 3 if keep else (*of_weights[:2], any(of_weights[2:]))
    of_cell = x, h0, c0, w_ih, w_hh, w_ch
    da, (dx, dh0, dw_ih, dw_hh, db), dc0, dw_ch = conv_first.backward(
        call, (of_x, of_h0, *of_step), of_cell, gates, c, *grads
    )
    if keep:
        kept = KeptSteps(_Products(call), Kept(da, x, h0), call.rows, ctx.cell_weights.wanted)
    states = dh0 if of_h0 else None, dc0 if of_c0 else None
    biases = (None, None) if db is None else two_biases(db, *of_weights[2:])
    weights = dw_ih, dw_hh, *biases
    all_made = (dx, *states, *weights, dw_ch if of_w_ch else None)
    if kind.dtype != gates.dtype:
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
    states = (s.to(acc_dtype(kind.dtype)).movedim(1, -1) for s in (h0, c0))
    layer = _layer(call, kind.dtype)
    _, h, c = in_torch(layer, x.unsqueeze(0), w_ih, bias, w_hh, *states, w_ch)
    return h.movedim(-1, 1).to(kind.dtype), c.movedim(-1, 1).to(kind.dtype)
