"""The layer of a ConvLSTM as operators of torch, for what records operations; see :mod:`library`.

``lstm_ext::conv_lstm_layer`` and its first derivative, ``lstm_ext::conv_lstm_layer_backward``.
Forward mode and the transforms of torch.func that meet the first when it runs get torch's
operations, and so do second derivatives; those that meet a recorded derivative raise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lstm_ext import batching, ops
from lstm_ext.autograd import has_tangent, needs_grad
from lstm_ext.conv_layer import Layer, in_torch
from lstm_ext.conv_passes import gradients, on_cells
from lstm_ext.conv_walk import Walk
from lstm_ext.convolutions import Window
from lstm_ext.derivatives import LayerFunction, pulled
from lstm_ext.engine import acc_dtype, transform_names
from lstm_ext.library import refuse_transforms, register
from lstm_ext.steps import Steps, check_steps

# What both take: the tensors of a Layer, and what Layer.arguments lists. padding: None is "same".
_LAYER = (
    "Tensor x, Tensor w_ih, Tensor? bias, Tensor w_hh, Tensor h0, Tensor c0, Tensor? w_ch, "
    "Tensor? lengths, Tensor? reset_mask, bool reverse, int[] stride, int[]? padding, "
    "int[] dilation, ScalarType dtype"
)
_TENSORS = 7
_LAYER_COUNT = 14

_library = torch.library.Library("lstm_ext", "FRAGMENT")
# The layer's results; with save, then what backward needs, as on_cells lists both.
_library.define(f"conv_lstm_layer({_LAYER}, bool save) -> Tensor[]")
# dy, dh, dc: of the results. wanted: a flag for each tensor of the layer. Returns the gradients
# that are wanted.
_library.define(
    f"conv_lstm_layer_backward({_LAYER}, Tensor? dy, Tensor? dh, Tensor? dc, Tensor kept, "
    "Tensor h_seq, Tensor c_seq, bool[] wanted) -> Tensor[]"
)


def _decode(*arguments: Any) -> tuple[Layer, list[Any]]:
    """The layer, by the inverse of Layer.arguments, and its tensors."""
    *tensors, lengths, reset_mask, reverse, stride, padding, dilation, dtype = arguments
    x, w_ih, _, _, h0, *_ = tensors
    T, N, size = x.size(0), h0.size(0), tuple(h0.shape[1:-1])
    kernel, padding = tuple(w_ih.shape[2:]), "same" if padding is None else tuple(padding)
    window = Window(kernel, tuple(stride), padding, tuple(dilation))
    steps = Steps(T, N, rows=T * N, lengths=lengths, reset_mask=reset_mask)
    return Layer(Walk(dtype, steps, math.prod(size)), window, size, reverse), tensors


# --- kernels --------------------------------------------------------------------------------------


def _forward(*arguments: Any) -> list[Tensor]:
    *call, save = arguments
    layer, tensors = _checked(*call)
    with ops.without_autocast(tensors[0].device):
        (y, h, c), saved = on_cells(layer, *tensors, save=save)
    y = y.contiguous()  # the one layout that a graph may count on
    return [y, h, c, *saved] if save else [y, h.clone(), c.clone()]  # no views of one memory


def _backward(*arguments: Any) -> list[Tensor]:
    *grads, kept, h_seq, c_seq, wanted = arguments[_LAYER_COUNT:]
    layer, tensors = _checked(*arguments[:_LAYER_COUNT])
    x, _, _, _, h0, *_ = tensors
    if len(wanted) != _TENSORS or any(
        w and t is None for w, t in zip(wanted, tensors, strict=True)
    ):
        given = [t is not None for t in tensors]
        raise RuntimeError(f"Expected wanted to be among the tensors {given}, got {list(wanted)}")
    T, N, C, acc, device = x.size(0), h0.size(0), h0.size(-1), h0.dtype, x.device
    rows = N * layer.walk.pixels
    ops.check_result(kept, (T, rows, 4 * C), acc, device)
    ops.check_result(h_seq, (T + 1, rows, C), x.dtype, device)
    ops.check_result(c_seq, (T + 1, rows, C), acc, device)
    kinds = ((T, *h0.shape), layer.walk.dtype), (h0.shape, acc), (h0.shape, acc)
    for grad, kind in zip(grads, kinds, strict=True):
        if grad is not None and (grad.shape, grad.dtype, grad.device) != (*kind, device):
            got = f"{grad.dtype} of size {tuple(grad.shape)} on {grad.device}"
            raise RuntimeError(
                f"Expected a gradient of size {tuple(kind[0])}, {kind[1]}, got {got}"
            )
    if T == 0:  # the states are the initial ones
        made = [None if t is None else torch.zeros_like(t) for t in tensors]
        for k, grad in zip((4, 5), grads[1:], strict=True):
            made[k] = made[k] if grad is None else grad.clone()
    else:
        with ops.without_autocast(device):
            made = gradients(layer, wanted, grads, tensors, kept, h_seq, c_seq)
    return [_laid(k, g) for k, g in enumerate(made) if wanted[k]]


def _laid(k: int, gradient: Tensor) -> Tensor:
    """The gradient of tensor k in the one layout that a graph may count on: channels last of x,
    which is how a layer below wants it."""
    if k:
        return gradient.contiguous()
    return gradient.movedim(2, -1).contiguous().movedim(-1, 2)


def _checked(*arguments: Any) -> tuple[Layer, list[Any]]:
    """The layer and its tensors: as a graph's inputs, nothing has been checked yet."""
    x, w_ih, _, _, h0, *_ = arguments
    *_, stride, padding, dilation, dtype = arguments
    ops.check_dtype(dtype)
    dims, acc = len(stride), acc_dtype(dtype)
    if dims not in (1, 2, 3) or (x.dim(), w_ih.dim(), h0.dim()) != (dims + 3, dims + 2, dims + 2):
        got = [tuple(t.shape) for t in (x, w_ih, h0)]
        raise RuntimeError(f"Expected x, w_ih and h0 of {dims} dimensions of images, got {got}")
    moves = (stride, 1), (dilation, 1), (stride if padding is None else padding, 0)
    if any(len(numbers) != dims or min(numbers) < least for numbers, least in moves):
        got = f"{list(stride)}, {padding} and {list(dilation)}"
        raise RuntimeError(f"Expected a stride, padding and dilation of {dims} numbers, got {got}")
    layer, tensors = _decode(*arguments)
    (N, C), inputs, kernel = (x.size(1), h0.size(-1)), x.size(2), layer.window.kernel
    state = (N, *layer.window.output(x.shape[3:]), C)
    w_hh, rows = (4 * C, C, *kernel), 4 * C
    sizes = (x.shape, (rows, inputs, *kernel), (rows,), w_hh, state, state, (3 * C,))
    convolved = x.dtype if x.dtype in (dtype, acc) else dtype
    for k, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        expected = convolved if k < 4 else acc
        if tensor is not None and (tensor.shape != size or tensor.dtype != expected):
            got = f"{tensor.dtype} of size {tuple(tensor.shape)}"
            raise RuntimeError(f"Expected {expected} of size {tuple(size)}, got {got}")
    steps = layer.walk.steps
    ops.check_devices(x, [*tensors, steps.lengths, steps.reset_mask])
    check_steps(steps)
    return layer, tensors


def _forward_fake(*arguments: Any) -> list[Tensor]:
    *call, save = arguments
    layer, (x, *others) = _decode(*call)
    ops.check_devices(x, others)
    h0 = others[3]
    T, C, dtype = x.size(0), h0.size(-1), layer.walk.dtype
    results = [x.new_empty((T, *h0.shape), dtype=dtype), *(h0.new_empty(h0.shape) for _ in "hc")]
    if save:
        rows = h0.size(0) * layer.walk.pixels
        results.append(h0.new_empty(T, rows, 4 * C))
        results += [t.new_empty(T + 1, rows, C) for t in (x, h0)]
    return results


def _backward_fake(*arguments: Any) -> list[Tensor]:
    (x, *others), wanted = arguments[:_TENSORS], arguments[-1]
    ops.check_devices(x, others)
    made = []
    for k, (tensor, want) in enumerate(zip((x, *others), wanted, strict=True)):
        if want:
            made.append(_laid(k, tensor.new_empty(tensor.shape)))
    return made


# --- autograd -------------------------------------------------------------------------------------


class RecordedLayer(LayerFunction):
    """ConvLayer with an operator for each pass."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            results = torch.ops.lstm_ext.conv_lstm_layer(*tensors, *layer.arguments(), True)
        ctx.layer = layer
        ctx.save_for_backward(*tensors, *results[3:])
        ctx.mark_non_differentiable(*results[3:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted, saved = ctx.needs_input_grad[1:], ctx.saved_tensors
        made = torch.ops.lstm_ext.conv_lstm_layer_backward(
            *saved[:_TENSORS], *ctx.layer.arguments(), *grads[:3], *saved[_TENSORS:], list(wanted)
        )
        return None, *(made.pop(0) if want else None for want in wanted)


class RecordedBackward(LayerFunction):
    """The first derivative by the operator; the second, of the results in torch operations."""

    @staticmethod
    def forward(
        ctx: Any, layer: Layer, wanted: Sequence[bool], *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """tensors: gradients of the results, the layer's, what forward has saved."""
        grads, inputs, saved = tensors[:3], tensors[3 : 3 + _TENSORS], tensors[3 + _TENSORS :]
        with torch._C._AutoDispatchBelowAutograd():
            made = torch.ops.lstm_ext.conv_lstm_layer_backward(
                *inputs, *layer.arguments(), *grads, *saved, wanted
            )
        ctx.layer, ctx.wanted = layer, wanted
        ctx.save_for_backward(*grads, *inputs)
        ctx.set_materialize_grads(False)
        return tuple(made.pop(0) if want else None for want in wanted)

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *v: Tensor | None) -> tuple[Tensor | None, ...]:
        layer, wanted, tensors = ctx.layer, ctx.wanted, ctx.saved_tensors

        def first(*at: Tensor | None) -> tuple[Tensor | None, ...]:
            return pulled(functools.partial(in_torch, layer), at[3:], at[:3], wanted)

        with ops.without_autocast(tensors[3].device):
            made = pulled(first, tensors, v, ctx.needs_input_grad[2 : 5 + _TENSORS])
        return None, None, *made, None, None, None


def _forward_autograd(*arguments: Any) -> list[Tensor]:
    *call, save = arguments
    tensors = call[:_TENSORS]
    if transform_names() or has_tangent(tensors):
        if save:
            refuse_transforms(tensors)
        layer, tensors = _decode(*call)
        with ops.without_autocast(tensors[0].device):
            return list(in_torch(layer, *tensors))
    if needs_grad(tensors):
        layer, tensors = _decode(*call)
        results = RecordedLayer.apply(layer, *tensors)
        return list(results if save else results[:3])
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.lstm_ext.conv_lstm_layer(*arguments)


def _backward_autograd(*arguments: Any) -> list[Tensor]:
    call, (*given, wanted) = arguments[:_LAYER_COUNT], arguments[_LAYER_COUNT:]
    tensors = [*given[:3], *call[:_TENSORS]]
    refuse_transforms(tensors)
    if not needs_grad(tensors):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.lstm_ext.conv_lstm_layer_backward(*arguments)
    layer, _ = _decode(*call)
    made = RecordedBackward.apply(layer, wanted, *tensors, *given[3:])
    return [g for g, want in zip(made, wanted, strict=True) if want]


# --- vmap -----------------------------------------------------------------------------------------


def _vmap_of(name: str) -> Any:
    """The rule of an operator: a call for each."""

    class Operator:
        apply = staticmethod(lambda *arguments: getattr(torch.ops.lstm_ext, name)(*arguments))

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        results, out_dims = batching.one_by_one(Operator, info.batch_size, in_dims, arguments)
        return list(results), list(out_dims)

    return rule


register(_library, "conv_lstm_layer", _forward, _forward_fake, _forward_autograd)
register(_library, "conv_lstm_layer_backward", _backward, _backward_fake, _backward_autograd)
for _name in ("conv_lstm_layer", "conv_lstm_layer_backward"):
    torch.library.register_vmap(f"lstm_ext::{_name}", _vmap_of(_name), lib=_library)
