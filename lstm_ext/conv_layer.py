"""One layer of a ConvLSTM: the convolutions and the loop over the steps.

On the native cells it is one function for autograd, :class:`ConvLayer`, of the passes of
:mod:`conv_passes`. In a graph (torch.compile, torch.export, make_fx) a layer is an operator that
does the same, :mod:`conv_library`. In torch operations it is under whatever must see those: vmap,
jvp, torch's ONNX export; and for second derivatives.

Letters: T steps, N sequences, C hidden channels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lstm_ext import conv_planes, ops, pointwise
from lstm_ext.autograd import must_apply, needs_grad
from lstm_ext.batching import batched_gradients
from lstm_ext.conv_passes import gradients, on_cells
from lstm_ext.conv_walk import Walk
from lstm_ext.convolutions import Convolution, Window, pixels_of
from lstm_ext.cpu import cell as cpu_cell
from lstm_ext.cpu import conv as cpu_conv
from lstm_ext.derivatives import LayerFunction, pulled
from lstm_ext.engine import (
    acc_dtype,
    asked_once_a_graph,
    in_memory,
    is_recorded,
    is_watched,
    transform_names,
)
from lstm_ext.native import _C


class ConvWeights(NamedTuple):
    """Weights of one layer, gates in the order i, f, g, o; k is the kernel's size."""

    w_ih: Tensor  # (4C, in, *k)
    w_hh: Tensor  # (4C, C, *k)
    b_ih: Tensor | None  # (4C)
    b_hh: Tensor | None  # (4C)
    w_ch: Tensor | None  # (3C), rows i, f, o


class Layer(NamedTuple):
    """What a layer is but for its tensors, which are always these: x (T, N, in, *size), w_ih, bias,
    w_hh, all of the convolutions' dtype; h0 and c0 (N, *output, C) and w_ch, of the cell's. bias
    and w_ch may be None. Its results: output (T, N, *output, C) of walk.dtype, h_n and c_n as h0.
    """

    walk: Walk
    window: Window  # of the input's convolution
    size: tuple[int, ...]  # output
    reverse: bool  # takes the steps from the last to the first

    @property
    def start(self) -> int:
        """Which of T + 1 states, in the order of memory, is the initial one."""
        return self.walk.steps.T if self.reverse else 0

    def turns(self) -> list[tuple[int, int, int]]:
        """The steps in the order in which they are taken: which it is, which of T + 1 states it
        finds, and which it leaves."""
        turns = [(t, t + self.reverse, t + (not self.reverse)) for t in range(self.walk.steps.T)]
        return turns[::-1] if self.reverse else turns

    def outputs(self, states: Tensor) -> Tensor:
        """Those that the steps leave, of T + 1 states."""
        return states[:-1] if self.reverse else states[1:]

    def all_states(self, first: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
        """T + 1 in the order of memory, from the initial one and those that the steps leave."""
        return [*others, first] if self.reverse else [first, *others]

    def arguments(self) -> tuple[Any, ...]:
        """Of the operators, after the tensors: see conv_library."""
        window, steps = self.window, self.walk.steps
        padding = None if window.padding == "same" else list(window.padding)
        moves = list(window.stride), padding, list(window.dilation)
        return steps.lengths, steps.reset_mask, self.reverse, *moves, self.walk.dtype

    def call(self, x: Tensor, C: int, forward: bool) -> cpu_conv.Call | None:
        """What the CPU's core is to know, where it takes less time for all steps than a library's
        convolutions: those of bfloat16, if x is that, which are float32 there."""
        if pointwise.cells_of(x.device) is not cpu_cell or not x.numel():
            return None
        size = tuple(x.shape[3:])
        call = cpu_conv.Call(self.window, self.reverse, *x.shape[:3], C, size, self.size)
        half = x.dtype != acc_dtype(x.dtype)
        if not call.is_few_products(forward, half):
            return None
        # Six steps by the core over by planes, 8 channels, inference and with backward: 16x16
        # pixels 0.98 and 0.77, 32x32 1.32 and 1.06, N 2 1.64 and 1.30; 4 of 32x32 1.85 and 1.27
        # (one thread, Zen 4; two that share no L3 up to 2.9).
        return call if call.are_few_rows or conv_planes.call_of(self, x, C) is None else None

    def recurrent(self, w_hh: Tensor) -> Convolution:
        return self.window.of_states().convolution(w_hh, self.size)

    def is_for_bf16(self, size: Sequence[int]) -> bool:
        """Whether a CPU's convolutions of bfloat16 are as fast as they should be, and right.

        oneDNN's (3.x, with AVX512_BF16) make weights' gradients of images narrower than the kernel
        that are anything, and write past the end; and results, of volumes one deep with one
        channel.
        """
        inputs = zip(size, self.window.reach, strict=True)
        states = zip(self.size, self.window.kernel, strict=True)  # of no dilation
        wide = all(n >= reach for n, reach in (*inputs, *states))
        return len(size) < 3 and wide and _has_bf16_convolutions()

    def frames(self, rows: Tensor) -> Tensor:
        """(T, N * pixels, channels) as (T, N, *output, channels)."""
        return rows.view(rows.size(0), self.walk.steps.B, *self.size, rows.size(-1))

    def images(self, rows: Tensor) -> Tensor:
        """(T, N * pixels, channels) as (T, N, channels, *output)."""
        return self.frames(rows).movedim(-1, 2)


def conv_lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w: ConvWeights,
    window: Window,
    walk: Walk,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one layer.

    Args:
        x: (T, N, in, *size) of walk.dtype.
        h0, c0: (N, C, *output), likewise.
        window: of the input's convolution.
        reverse: take the steps from the last to the first, of a shorter sequence from its end.

    Returns:
        Output (T, N, C, *output), h_n and c_n (N, C, *output), of walk.dtype.
    """
    dtype, acc = walk.dtype, acc_dtype(walk.dtype)
    layer = Layer(walk, window, tuple(h0.shape[2:]), reverse)
    half = x.device.type != "cpu" or (dtype == torch.bfloat16 and layer.is_for_bf16(x.shape[3:]))
    convolved = dtype if half else acc
    w_ih, w_hh, b_ih, b_hh, w_ch = w
    bias = None if b_ih is None else (b_ih.to(acc) + b_hh.to(acc)).to(convolved)
    tensors = [x.to(convolved), w_ih.to(convolved), bias, w_hh.to(convolved)]
    tensors += [h0.movedim(1, -1).to(acc), c0.movedim(1, -1).to(acc)]
    tensors.append(None if w_ch is None else w_ch.to(acc))
    # What follows torch's operations would see none of the core's.
    seen = is_watched() or forward_ad._current_level >= 0
    # A cell has no steps that a graph would count, and torch.compile fuses its operations: they
    # take 0.42 to 0.67 of the operator's time in inference, 0.57 to 0.73 in training (float32, 8,
    # 16 and 64 channels, 8x8 and 16x16 pixels, one thread of a Zen 4).
    if seen and not walk.of_cell and _is_for_operator() and ops.has_native_kernels(x.device):
        y, h, c = torch.ops.lstm_ext.conv_lstm_layer(*tensors, *layer.arguments(), False)
    elif seen or x.size(0) == 0 or not ops.has_native_kernels(x.device):
        y, h, c = in_torch(layer, *tensors)
    else:
        tensors = [None if t is None else in_memory(t) for t in tensors]
        if needs_grad(tensors):
            y, h, c = ConvLayer.run(layer, *tensors)
        else:
            y, h, c = on_cells(layer, *tensors, save=False)[0]
    return y.movedim(-1, 2), h.to(dtype).movedim(-1, 1), c.to(dtype).movedim(-1, 1)


def _is_for_operator() -> bool:
    return (torch.compiler.is_compiling() or is_recorded()) and not _is_for_torch()


@asked_once_a_graph
def _is_for_torch() -> bool:
    """Whether a graph is of torch's operations alone: forward mode or a transform is part of it,
    or what it is for knows no others."""
    transformed = forward_ad._current_level >= 0 or bool(transform_names())
    return transformed or torch.onnx.is_in_onnx_export()


@asked_once_a_graph
def _has_bf16_convolutions() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and _C.cpu_bf16_products()
    )


# --- in torch operations --------------------------------------------------------------------------


def in_torch(
    layer: Layer,
    x: Tensor,
    w_ih: Tensor,
    bias: Tensor | None,
    w_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ch: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's results."""
    (walk, window, *_), T, C = layer, x.size(0), h0.size(-1)
    convolved, acc, h, c = x.dtype, h0.dtype, h0.reshape(-1, C), c0.reshape(-1, C)
    gx = pixels_of(window.convolution(w_ih, x.shape[3:])(_unambiguous(x.flatten(0, 1)), bias))
    gx = gx.view(T, h.size(0), 4 * C)
    if T == 0:  # no numbers, but a place in the graph
        return layer.frames(gx[..., :C].to(walk.dtype)), h0, c0
    recurrent, outputs = layer.recurrent(w_hh), []
    of_steps, each = gx.unbind(0), walk.each()
    for t, *_ in layer.turns():
        h, c = walk.renewed(t, h), walk.renewed(t, c)
        # The recurrence goes on with h as the user sees it: rounded to its dtype.
        image = layer.images(h.to(walk.dtype).to(convolved).unsqueeze(0)).squeeze(0)
        a = of_steps[t].to(acc) + pixels_of(recurrent(_unambiguous(image))).to(acc)
        h, c = pointwise.lstm_cell(a, h, c, each[t], w_ch)
        outputs.append(h.to(walk.dtype))
    if layer.reverse:
        outputs.reverse()
    return walk.mask(layer.frames(torch.stack(outputs))), h.view(h0.shape), c.view(c0.shape)


def _unambiguous(images: Tensor) -> Tensor:
    """Images of one channel with the strides of channels first: which layout others tell is for
    torch's operations to guess, and a graph's, without data, guess otherwise."""
    return images.clone(memory_format=torch.contiguous_format) if images.size(1) == 1 else images


# --- on the native cells --------------------------------------------------------------------------


def save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """For backward, which asks for them by :func:`saved_tensors`."""
    ctx.kinds = [t if t is None else (t.shape, t.dtype, t.device) for t in tensors]
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def saved_tensors(ctx: Any) -> Sequence[Any]:
    """As they were saved: a hook on them may return anything, and .data changes."""
    tensors = ctx.saved_tensors  # once: torch.utils.checkpoint gives them no second time
    check_saved(ctx, tensors)
    return tensors


def check_saved(ctx: Any, tensors: Sequence[Any]) -> None:
    """Whether they are as :func:`save` got them.

    Raises:
        RuntimeError: they are not.
    """
    for tensor, kind in zip(tensors, ctx.kinds, strict=True):
        if kind is not None:
            ops.check_result(tensor, *kind)


class ConvLayer(LayerFunction):
    """The layer on the native cells.

    Saves its inputs, and of every step the gates, h and c.
    """

    @staticmethod
    def forward(ctx: Any, layer: Layer, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        results, saved = on_cells(layer, *tensors, save=True)
        ctx.layer = layer
        save(ctx, (*tensors, *saved))
        return results

    @staticmethod
    @batched_gradients
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        layer, wanted = ctx.layer, ctx.needs_input_grad[1:]
        *tensors, kept, h_seq, c_seq = saved_tensors(ctx)
        with ops.without_autocast(kept.device):
            if must_apply():
                run = functools.partial(in_torch, layer)
                return None, *pulled(run, tensors, grads, wanted)
            return None, *gradients(layer, wanted, grads, tensors, kept, h_seq, c_seq)
