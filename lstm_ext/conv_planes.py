"""A ConvLSTM's layer by a library's convolutions, channels first, as :mod:`conv_first` has a step.

In float32 and float64 on the CPU, where all sequences take every step and W_ih and W_hh are not so
large that more is gained by laying them out once for all steps (:mod:`conv_steps`). A step
is one convolution of x_t and h_{t-1} together, whose result the cell takes as it is: that of x
alone, for all steps at once, would have to be written and read once more, and convolutions of 8
channels take as long as those of 16.

Tensors are those of :mod:`conv_layer`. What is saved for backward has its sizes, (T, rows, 4C) and
(T + 1, rows, C), but holds images channels first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lstm_ext import conv_first, pointwise
from lstm_ext.conv_first import both_moves
from lstm_ext.cpu import cell
from lstm_ext.cpu.conv import Call
from lstm_ext.engine import acc_dtype, sum_of

if TYPE_CHECKING:
    from lstm_ext.conv_layer import Layer

# Numbers in W_ih and W_hh. The time of six steps by conv_steps over that by planes, inference and
# with backward, one thread: 8 channels of 64x64 pixels 1.47 and 1.23, 16 of 32x32, N 4 1.19 and
# 1.04, of 64x64, N 2 1.17 and 1.07, 32 of 32x32, N 4 1.10 and 1.02, 64 of 32x32 1.06 and 0.97
# (Zen 4).
_FEW_WEIGHTS = 1 << 18
# Channels that oneDNN's convolutions take at once: where they are no fuller side by side,
# conv_steps takes less time: of 3 and 16 channels (5x5 kernels, 16x16 pixels, N 8) 0.75 and 0.78 of
# that by planes, of 8 and 16 (64x64) 0.93 and 0.88.
_BLOCK = 16


def call_of(layer: Layer, x: Tensor, C: int) -> Call | None:
    """What a layer is but for its tensors, where it is for this way."""
    steps = layer.walk.steps
    if (
        pointwise.cells_of(x.device) is not cell
        or not x.numel()
        or layer.walk.dtype != acc_dtype(x.dtype)
        or steps.lengths is not None
        or steps.reset_mask is not None
    ):
        return None
    call = Call(layer.window, layer.reverse, *x.shape[:3], C, tuple(x.shape[3:]), layer.size)
    return call if _pays(call) and both_moves(call) is not None else None


def _pays(call: Call) -> bool:
    apart = math.ceil(call.inputs / _BLOCK) + math.ceil(call.C / _BLOCK)
    is_less = math.ceil((call.inputs + call.C) / _BLOCK) < apart
    whole = call.inputs % _BLOCK == call.C % _BLOCK == 0
    return call.kernel_size > 1 and call.weights < _FEW_WEIGHTS and (is_less or whole)


def forward(
    call: Call,
    layer: Layer,
    x: Tensor,
    w_ih: Tensor,
    bias: Tensor | None,
    w_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ch: Tensor | None,
    save: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Any, ...]]:
    """As :func:`conv_passes.on_cells`."""
    T, N, C, rows = call.T, call.N, call.C, call.rows
    x, w_ch = x.contiguous(), cell.of_units(w_ch, rows // N)
    both = both_moves(call).convolution(torch.cat([w_ih, w_hh], 1))
    kept = x.new_empty(T, rows, 4 * C) if save else None
    c_seq = x.new_empty(T + 1 if save else 2, rows, C)
    gates = [None] * T if kept is None else kept.view(T, N, 4 * C, *call.output).unbind(0)
    y = _channels_first(x, (T, N, *call.output, C))
    h_seq, outputs = None, y.movedim(-1, 2)
    if save:  # whoever changes y in place must not change what backward reads
        h_seq = x.new_empty(T + 1, rows, C)
        h_images = h_seq.view(T + 1, N, C, *call.output)
        first, outputs = h_images[layer.start], layer.outputs(h_images)
    else:
        first = x.new_empty(N, C, *call.output)
    first.copy_(h0.movedim(-1, 1))
    states = layer.all_states(first, outputs.unbind(0))
    cells = c_seq.view(len(c_seq), N, C, *call.output).unbind(0)
    memories, after = len(cells), layer.start
    cells[after % memories].copy_(c0.movedim(-1, 1))
    for t, before, after in layer.turns():
        a = both(torch.cat([x[t], states[before]], 1), bias).contiguous()
        c, c_new = cells[before % memories], cells[after % memories]
        cell.planes_forward(a, c, w_ch, gates[t], None, states[after], c_new)
    if save:
        y.copy_(outputs.movedim(2, -1))
    h, c = (_channels_last(s) for s in (states[after], cells[after % memories]))
    return (y, h, c), (kept, h_seq, c_seq)


def _channels_first(like: Tensor, size: tuple[int, ...]) -> Tensor:
    """Memory for (T, N, *size, C) that lies so. No view, which autograd would not let a user change
    in place."""
    T, N, *pixels, C = size
    strides = [1]
    for n in (*pixels[::-1], C, N):
        strides.append(strides[-1] * n)
    of_t, of_n, of_c, *of_pixels = strides[::-1]
    return like.new_empty_strided(size, (of_t, of_n, *of_pixels, of_c))


def _channels_last(images: Tensor) -> Tensor:
    """(N, C, *size) as a copy (N, *size, C)."""
    return images.movedim(1, -1).clone(memory_format=torch.contiguous_format)


def gradients(
    call: Call,
    layer: Layer,
    wanted: Sequence[bool],
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    kept: Tensor,
    h_seq: Tensor,
    c_seq: Tensor,
) -> tuple[Tensor | None, ...]:
    """As :func:`conv_passes.gradients`."""
    x, w_ih, _, w_hh, h0, _, w_ch = tensors
    of_x, of_w_ih, of_bias, of_w_hh, of_h0, of_c0, of_w_ch = wanted
    T, N, C, output = call.T, call.N, call.C, call.output
    x, of_weights = x.contiguous(), (of_w_ih, of_w_hh, of_bias)
    gates = kept.view(T, N, 4 * C, *output).unbind(0)
    h_images, c_images = (s.view(T + 1, N, C, *output) for s in (h_seq, c_seq))
    channels = -1 - len(output)  # which dimension
    dy, dh, dc = (None if g is None else g.movedim(-1, channels).contiguous() for g in grads)
    dx = torch.empty_like(x) if of_x else None
    sums: list[Tensor | None] = [None] * 4  # of w_ih, w_hh, bias and w_ch
    for t, before, after in reversed(layer.turns()):
        dh = sum_of(dh, None if dy is None else dy[t])
        h, passes = h_images[before], before != layer.start or of_h0
        step = x[t], h, c_images[before], w_ih, w_hh, w_ch
        _, (dx_t, dh, *made), dc, dw_ch = conv_first.backward(
            call, (of_x, passes, *of_weights), step, gates[t], c_images[after], dh, dc
        )
        if of_x:
            dx[t] = dx_t
        made.append(dw_ch)
        sums = [sum_of(total, more) for total, more in zip(sums, made, strict=True)]
    dw_ih, dw_hh, db, dw_ch = sums
    return (
        dx,
        dw_ih,
        db,
        dw_hh,
        dh.movedim(1, -1) if of_h0 else None,
        dc.movedim(1, -1) if of_c0 else None,
        dw_ch if of_w_ch else None,
    )
