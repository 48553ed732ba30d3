"""The steps of a ConvLSTM's layer, by a library's convolutions and the core's cell.

Tensors are those of :mod:`conv_layer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lstm_ext import pointwise
from lstm_ext.convolutions import Convolution, pixels_of
from lstm_ext.engine import sum_of

if TYPE_CHECKING:
    from lstm_ext.conv_layer import Layer


def forward(
    layer: Layer,
    gx: Tensor,
    kept: Tensor,
    w_hh: Tensor,
    w_ch: Tensor | None,
    h: Tensor,
    first: Tensor,
    h_out: Tensor,
    c_seq: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The loop of :func:`conv_passes.on_cells`: h_out, c_seq and kept are written. Returns the last
    h and c."""
    walk, cells, convolved, acc = layer.walk, pointwise.cells_of(gx.device), gx.dtype, h.dtype
    # What a step takes, made for all steps at once: of few pixels, views would cost more than sums.
    states = layer.all_states(first, h_out.unbind(0))
    first_image = layer.images(first.unsqueeze(0))[0]
    images = layer.all_states(first_image, layer.images(h_out).unbind(0))
    gates, gate_images = kept.unbind(0), layer.images(kept).unbind(0)
    gx_images, cell_states = layer.images(gx).unbind(0), c_seq.unbind(0)
    recurrent, each = layer.recurrent(w_hh).many(first_image, len(gx)), walk.each()
    resets, memories = walk.steps.reset_mask is not None, len(cell_states)
    c = cell_states[layer.start % memories]
    for t, before, after in layer.turns():
        image = images[before]
        c, c_new = cell_states[before % memories], cell_states[after % memories]
        if resets:  # not in place: h is a step's output, and backward reads c
            state, c = walk.renewed(t, states[before]), walk.renewed(t, c)
            image = image if state is states[before] else layer.images(state.unsqueeze(0))[0]
        a, product = gate_images[t % len(gates)], recurrent(image)
        if convolved == acc:
            a.add_(product)
        else:
            a.copy_(gx_images[t]).add_(product)
        h_new = states[after] if walk.dtype == acc else torch.empty_like(h)
        cells.cell_forward(each[t], gates[t % len(gates)], h, c, w_ch, h_new, c_new, save)
        if walk.dtype != acc:
            states[after].copy_(h_new.to(walk.dtype))
        h, c = h_new, c_new
    return h, c


def backward(
    layer: Layer,
    recurrent: Convolution,
    w_ch: Tensor | None,
    kept: Tensor,
    h_seq: Tensor,
    c_seq: Tensor,
    dy: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    of_h0: bool,
    da_seq: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loop of :func:`conv_passes.gradients`: da_seq is written; the gradients of h0, if it is
    wanted, c0 and w_ch."""
    walk, acc, cells = layer.walk, kept.dtype, pointwise.cells_of(kept.device)
    da_images, h_images = layer.images(da_seq).unbind(0), layer.images(h_seq).unbind(0)
    dw_ch, each = None if w_ch is None else torch.zeros_like(w_ch), walk.each()
    for t, before, after in reversed(layer.turns()):
        dh = sum_of(dh, None if dy is None else dy[t])
        da = da_seq[t] if da_seq.dtype == acc else torch.empty_like(kept[t])
        step = (kept[t], walk.renewed(t, c_seq[before]), c_seq[after], w_ch)
        dh_passed, dc, dw_t = cells.cell_backward(each[t], dh, dc, *step, da)
        if da_seq.dtype != acc:
            da_seq[t] = da
        dw_ch = sum_of(dw_ch, dw_t)
        if before != layer.start or of_h0:
            dh = pixels_of(recurrent.gradients(da_images[t], h_images[before], True, False)[0]).to(
                acc
            )
            if walk.steps.lengths is not None:
                dh += dh_passed
            dh = walk.renewed(t, dh)
        dc = walk.renewed(t, dc)
    return dh, dc, dw_ch
