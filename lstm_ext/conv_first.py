"""A step of a ConvLSTM's cell by a library's convolutions, channels first.

The core's cell takes planes, what a convolution gives channels first, as they are, and the weights,
which lie so, need not be laid out otherwise: a layer does that once for all its steps, a cell would
at every one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_ext.convolutions import Moves
from lstm_ext.cpu import cell
from lstm_ext.cpu.conv import Call
from lstm_ext.engine import acc_dtype

#: With as many numbers in W_ih and W_hh these convolutions take no more time than the core, and all
#: steps' gradients of them at once no more than each step's. The time of a loop over nn.Conv2d over
#: that of one over a cell, by the core, and by the library at once, 3 steps and backward: 96
#: channels of 8x8 pixels 0.96 and 1.01, 128 of 4x4 0.90 and 0.94, of 8x8 0.99 and 1.02 (Zen 4, one
#: thread). And putting the weights side by side, for one convolution of x and h, takes as long as a
#: second convolution.
MANY_WEIGHTS = 1 << 19


class _Windows(NamedTuple):
    """How the convolutions of a call move."""

    of_x: Moves
    of_h: Moves
    of_both: Moves | None  # of x and h together, where one convolution of them is the sum of two


@functools.lru_cache(maxsize=256)
def windows_of(call: Call) -> _Windows:
    of_x, of_h = call.window, call.window.of_states()
    alike = (
        of_x.stride == of_h.stride
        and of_x.dilation == of_h.dilation
        and of_x.pads(call.size) == of_h.pads(call.output)
    )
    return _Windows(
        of_x.moves(call.size, call.inputs),
        of_h.moves(call.output, call.C),
        of_x.moves(call.size, call.inputs + call.C) if alike else None,
    )


def both_moves(call: Call) -> Moves | None:
    """Of one convolution of x and h, if it takes less time than two."""
    return windows_of(call).of_both if call.weights < MANY_WEIGHTS else None


def _of_units(w_ch: Tensor | None, call: Call) -> Tensor | None:
    return cell.of_units(w_ch, call.rows // call.N)


def forward(
    call: Call,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor | None],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """h_1 and c_1, of c_0's dtype, and if ``save`` what backward needs, the activated gates and c_1
    as it was computed: all (N, channels, *output). weights: w_ih, w_hh, b_ih, b_hh and w_ch. x, h0,
    w_ih and w_hh are of the convolutions' dtype, biases and w_ch of that of sums."""
    w_ih, w_hh, b_ih, b_hh, w_ch = weights
    x, h0, c0 = (t.contiguous() for t in (x, h0, c0))
    bias = None if b_ih is None else (b_ih + b_hh).to(x.dtype)
    both = both_moves(call)
    if both is not None:
        a = both.convolution(torch.cat([w_ih, w_hh], 1))(torch.cat([x, h0], 1), bias).contiguous()
    else:
        of_x, of_h, _ = windows_of(call)
        a = of_x.convolution(w_ih)(x, bias)
        a = a.to(acc_dtype(x.dtype)).contiguous()  # of which the sum is to be
        a += of_h.convolution(w_hh)(h0)
    acc = acc_dtype(c0.dtype)
    h, c = torch.empty_like(c0), torch.empty_like(c0)
    gates = c_kept = None
    if save:
        gates = a if a.dtype == acc else torch.empty_like(a, dtype=acc)
        c_kept = torch.empty_like(c0, dtype=acc)
    cell.planes_forward(a, c0, _of_units(w_ch, call), gates, c_kept, h, c)
    return h, c, gates, c_kept


def backward(
    call: Call,
    wanted: Sequence[bool],
    tensors: Sequence[Any],
    gates: Tensor,
    c: Tensor,
    dh: Tensor | None,
    dc: Tensor | None,
) -> tuple[Tensor, list[Tensor | None], Tensor, Tensor | None]:
    """The gradients of the gates before activation; of x, h0, w_ih, w_hh and a bias, None where not
    wanted; of c0; and of w_ch. All but the last three are of the convolutions' dtype. tensors: x,
    h0, c0, w_ih, w_hh and w_ch, as forward's; gates, c: what it saved; dh, dc: of h_1 and c_1, of
    c_0's dtype, None for zero."""
    x, h0, c0, w_ih, w_hh, w_ch = tensors  # x and h0 contiguous
    of_x, of_h0, of_w_ih, of_w_hh, of_bias = wanted
    w_ch = _of_units(w_ch, call)
    given = [None if t is None else t.contiguous() for t in (gates, c, c0, w_ch, dh, dc)]
    da = torch.empty_like(given[0], dtype=x.dtype)
    dc0, dw_ch = cell.planes_backward(*given, da)
    moves, both = windows_of(call), both_moves(call)
    dx = dh0 = dw_ih = dw_hh = None
    # One convolution back for both, where both are wanted.
    of_images = both is not None and of_x and of_h0
    of_weights = both is not None and of_w_ih and of_w_hh
    if of_images or of_weights:
        convolution, images = both.convolution(torch.cat([w_ih, w_hh], 1)), torch.cat([x, h0], 1)
        d, dw = convolution.gradients(da, images, of_images, of_weights)
        dx, dh0 = _apart(d, call)
        dw_ih, dw_hh = _apart(dw, call)
    flags = of_x and not of_images, of_w_ih and not of_weights
    if any(flags):
        d, dw = moves.of_x.convolution(w_ih).gradients(da, x, *flags)
        dx, dw_ih = d if flags[0] else dx, dw if flags[1] else dw_ih
    flags = of_h0 and not of_images, of_w_hh and not of_weights
    if any(flags):
        d, dw = moves.of_h.convolution(w_hh).gradients(da, h0, *flags)
        dh0, dw_hh = d if flags[0] else dh0, dw if flags[1] else dw_hh
    db = _sum_of_pixels(da) if of_bias else None
    return da, [dx, dh0, dw_ih, dw_hh, db], dc0, dw_ch


def weights_gradients(
    call: Call, wanted: Sequence[bool], x: Tensor, h_0: Tensor, da: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of w_ih, w_hh and a bias, None where not wanted, of all steps' images. wanted: those of the
    weights and biases."""

    def of_weight(moves: Moves, images: Tensor) -> Tensor:
        w = da.new_empty(call.weight_size(images.size(1)))  # for its size
        return moves.convolution(w).gradients(da, images, False, True)[1]

    of_x, of_h, _ = windows_of(call)
    return (
        of_weight(of_x, x) if wanted[0] else None,
        of_weight(of_h, h_0) if wanted[1] else None,
        _sum_of_pixels(da) if any(wanted[2:]) else None,
    )


def _apart(both: Tensor | None, call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Of x and of h, each in memory of its own: as .grad a part of it would keep all of it."""
    if both is None:
        return None, None
    of_x, of_h = both.split([call.inputs, call.C], 1)
    kind = torch.contiguous_format
    return of_x.clone(memory_format=kind), of_h.clone(memory_format=kind)


def _sum_of_pixels(da: Tensor) -> Tensor:
    """Of all pixels, of each channel."""
    return da.flatten(2).sum((0, 2), dtype=torch.promote_types(da.dtype, torch.float32))
