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

from lstm_ext import pointwise
from lstm_ext.conv_first import apart, both_moves, sum_of_pixels, windows_of
from lstm_ext.cpu import cell
from lstm_ext.cpu.conv import Call
from lstm_ext.engine import acc_dtype, sum_of

if TYPE_CHECKING:
    from lstm_ext.conv_layer import Layer

# Numbers in W_ih and W_hh. The time of six steps by conv_steps over that by planes, inference and
# with backward, one thread: 8 channels of 64x64 pixels 1.1 and 1.2, 16 of 32x32, N 4 1.09 and 0.97,
# of 64x64, N 2 1.10 and 1.20, 32 of 32x32, N 4 1.07 and 0.97, 64 of 32x32 0.98 and 0.96 (Zen 4).
_FEW_WEIGHTS = 1 << 18
# Channels that oneDNN's convolutions take at once: of 3 and 16, or 8 and 16, those of x for all
# steps and of h take 0.70 to 0.90 of the time of one of both.
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
    x, w_ch = x.contiguous(), cell.of_units(w_ch, call.rows // N)
    gates = kept.view(T, N, 4 * C, *output).unbind(0)
    h_images, c_images = (s.view(T + 1, N, C, *output) for s in (h_seq, c_seq))
    channels = -1 - len(output)  # which dimension
    dy, dh, dc = (None if g is None else g.movedim(-1, channels).contiguous() for g in grads)
    moves = windows_of(call)
    # One convolution back for both, where both are wanted.
    of_images, of_weights = of_x, of_w_ih and of_w_hh
    joint = both_moves(call).convolution(torch.cat([w_ih, w_hh], 1))
    of_x_alone, of_h_alone = moves.of_x.convolution(w_ih), moves.of_h.convolution(w_hh)
    da = x.new_empty(N, 4 * C, *output)
    dx = torch.empty_like(x) if of_x else None
    sums: list[Tensor | None] = [None] * 5  # of both weights, w_ih, w_hh, bias and w_ch
    for t, before, after in reversed(layer.turns()):
        dh = sum_of(dh, None if dy is None else dy[t])
        cells = c_images[after], c_images[before]
        dc, dw_ch = cell.planes_backward(gates[t], *cells, w_ch, dh, dc, da)
        h = h_images[before]
        dw = dw_ih = dw_hh = None
        if of_images or of_weights:
            d, dw = joint.gradients(da, torch.cat([x[t], h], 1), of_images, of_weights)
        if of_images:
            dx_t, dh = d.split([call.inputs, C], 1)
            dx[t], dh = dx_t, dh.contiguous()
        if not of_weights and of_w_ih:
            dw_ih = of_x_alone.gradients(da, x[t], False, True)[1]
        passes = not of_images and (before != layer.start or of_h0)
        products = not of_weights and of_w_hh
        if passes or products:
            passed, dw_hh = of_h_alone.gradients(da, h, passes, products)
            dh = passed.contiguous() if passes else dh
        db = sum_of_pixels(da) if of_bias else None
        made = dw, dw_ih, dw_hh, db, dw_ch
        sums = [sum_of(total, more) for total, more in zip(sums, made, strict=True)]
    dw, dw_ih, dw_hh, db, dw_ch = sums
    if dw is not None:
        dw_ih, dw_hh = apart(dw, call)
    return (
        dx,
        dw_ih,
        db,
        dw_hh,
        dh.movedim(1, -1) if of_h0 else None,
        dc.movedim(1, -1) if of_c0 else None,
        dw_ch if of_w_ch else None,
    )
