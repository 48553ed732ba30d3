"""A step of a ConvLSTM's cell by a library's convolutions, channels first.

To the core's cell, which knows no neighbours, an image is a row of C * pixels units. So it takes
what a convolution gives channels first as it is, and the weights, which lie so, need not be laid
out otherwise: a layer does that once for all its steps, a cell would at every one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lstm_ext.cpu import cell
from lstm_ext.cpu.conv import Call
from lstm_ext.steps import Steps

#: With as many numbers in W_ih and W_hh these convolutions take less time than the core, and all
#: steps' gradients of them at once less than each step's. The time of a loop over nn.Conv2d over
#: that of one over a cell, by the core, by the library, and at once, 6 steps and backward: 64
#: channels of 8x8 pixels 0.95, 0.92 and 0.96, 128 of 4x4 0.75, 0.82 and 1.02 (Zen 4, one thread).
#: And putting them side by side, for one convolution of x and h, takes as long as the second one.
MANY_WEIGHTS = 1 << 19


def _is_one(call: Call) -> bool:
    """Whether one convolution of x and h together is the sum of theirs, and takes less time."""
    of_x, of_h = call.window, call.window.of_states()
    return (
        of_x.stride == of_h.stride
        and of_x.dilation == of_h.dilation
        and of_x.pads(call.size) == of_h.pads(call.output)
        and call.weights < MANY_WEIGHTS
    )


def _rows(images: Tensor) -> Tensor:
    return images.view(len(images), -1)


def _peephole(w_ch: Tensor | None, call: Call) -> Tensor | None:
    """(3C), a number a channel, as one a unit."""
    return None if w_ch is None else w_ch.repeat_interleave(call.rows // call.N)


def forward(
    call: Call,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor | None],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """h_1 and c_1, and the gates as the core's cell keeps them, if ``save``: all (N, channels,
    *output). weights: w_ih, w_hh, b_ih, b_hh and w_ch. x, h0, w_ih and w_hh are of the
    convolutions' dtype, all else, the results too, of the cell's."""
    w_ih, w_hh, b_ih, b_hh, w_ch = weights
    x, h0, c0 = (t.contiguous() for t in (x, h0, c0))
    bias, acc = None if b_ih is None else (b_ih + b_hh).to(x.dtype), c0.dtype
    if _is_one(call):
        both = call.window.convolution(torch.cat([w_ih, w_hh], 1), call.size, last=False)
        a = both(torch.cat([x, h0], 1), bias).to(acc).contiguous()
    else:
        a = call.window.convolution(w_ih, call.size, last=False)(x, bias).to(acc).contiguous()
        a += call.window.of_states().convolution(w_hh, call.output, last=False)(h0)
    h, c = torch.empty_like(c0), torch.empty_like(c0)
    states = (_rows(t) for t in (h0.to(acc), c0))
    results = (_rows(t) for t in (h, c))
    steps = Steps.padded(1, call.N)
    cell.cell_forward(steps, _rows(a), *states, _peephole(w_ch, call), *results, save)
    return h, c, a


def backward(
    call: Call,
    of_x: bool,
    of_h0: bool,
    tensors: Sequence[Any],
    gates: Tensor,
    c: Tensor,
    dh: Tensor | None,
    dc: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """The gradients of the gates before activation, of x and h0, None where not wanted, c0 and
    w_ch; the first three of the convolutions' dtype. tensors: x, h0, c0, w_ih, w_hh and w_ch; c:
    c_1; dh, dc: of h_1 and c_1, None for zero."""
    x, h0, c0, w_ih, w_hh, w_ch = tensors  # x and h0 contiguous
    dh, dc = (None if d is None else _rows(d.contiguous()) for d in (dh, dc))
    da = torch.empty_like(gates)
    given = (_rows(t.contiguous()) for t in (gates, c0, c))
    _, dc0, dw_ch = cell.cell_backward(
        Steps.padded(1, call.N), dh, dc, *given, _peephole(w_ch, call), _rows(da)
    )
    da = da.to(x.dtype)
    dx = dh0 = None
    if of_x:
        of_input = call.window.convolution(w_ih, call.size, last=False)
        dx = of_input.gradients(da, x, True, False)[0]
    if of_h0:
        recurrent = call.window.of_states().convolution(w_hh, call.output, last=False)
        dh0 = recurrent.gradients(da, h0, True, False)[0]
    dw_ch = None if dw_ch is None else dw_ch.view(3 * call.C, -1).sum(1)
    return da, dx, dh0, dc0.view(c0.shape), dw_ch


def weights_gradients(
    call: Call, wanted: Sequence[bool], x: Tensor, h_0: Tensor, da: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of w_ih, w_hh and a bias, None where not wanted, of all steps' images. wanted: those of the
    weights and biases."""
    made = []
    windows = call.window, call.window.of_states()
    for of_weight, window, images in zip(wanted, windows, (x, h_0), strict=False):
        dw = None
        if of_weight:
            w = da.new_empty(call.weight_size(images.size(1)))  # for its size
            convolution = window.convolution(w, images.shape[2:], last=False)
            dw = convolution.gradients(da, images, False, True)[1]
        made.append(dw)
    return made[0], made[1], _sum(da) if any(wanted[2:]) else None


def _sum(da: Tensor) -> Tensor:
    """Of all pixels, of each channel."""
    return da.flatten(2).sum((0, 2), dtype=torch.promote_types(da.dtype, torch.float32))
