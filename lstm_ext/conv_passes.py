"""Forward and backward of a ConvLSTM's layer on the native cells.

Of few pixels and channels on the CPU each is a call of the core, :mod:`cpu.conv`. Else the steps
are a loop: there as a rule channels first, :mod:`conv_planes`; or channels last, :mod:`conv_steps`,
which makes the input's convolution, and the weights' gradients, for all steps at once, and walks
back by the gradient of the recurrent convolution's input alone.

Tensors are those of :mod:`conv_layer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lstm_ext import conv_planes, conv_steps
from lstm_ext.convolutions import pixels_of
from lstm_ext.cpu import conv as cpu_conv
from lstm_ext.engine import in_memory

if TYPE_CHECKING:
    from lstm_ext.conv_layer import Layer


def on_cells(
    layer: Layer,
    x: Tensor,
    w_ih: Tensor,
    bias: Tensor | None,
    w_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ch: Tensor | None,
    *,
    save: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The layer's results, and what backward needs.

    That is what the cells keep (T, rows, 4C) and c (T + 1, rows, C), of the cell's dtype, and h
    (T + 1, rows, C) as the convolutions see it; without ``save`` they are of fewer steps.
    """
    (walk, window, *_), T, C = layer, x.size(0), h0.size(-1)
    convolved, acc, rows = x.dtype, h0.dtype, h0.numel() // C
    call = layer.call(x, C, forward=True)
    if call is not None:
        return _in_core(call, layer, x, h0, c0, (w_ih, w_hh, bias, None, w_ch), save)
    call = conv_planes.call_of(layer, x, C)
    if call is not None:
        return conv_planes.forward(call, layer, x, w_ih, bias, w_hh, h0, c0, w_ch, save)
    w_ch = None if w_ch is None else w_ch.contiguous()
    gx = pixels_of(window.convolution(w_ih, x.shape[3:])(x.flatten(0, 1), bias))
    gx = gx.view(T, rows, 4 * C)
    kept = gx if convolved == acc else h0.new_empty(T if save else 1, rows, 4 * C)
    h_seq, c_seq = x.new_empty(T + save, rows, C), h0.new_empty(T + 1 if save else 2, rows, C)
    first = h_seq[layer.start] if save else x.new_empty(rows, C)
    h_out = layer.outputs(h_seq) if save else h_seq
    h, c = (s.contiguous().view(-1, C) for s in (h0, c0))
    first.copy_(h)
    c_seq[layer.start % len(c_seq)] = c
    h, c = conv_steps.forward(layer, gx, kept, w_hh, w_ch, h, first, h_out, c_seq, save)
    y, h, c = layer.frames(h_out), h.view(h0.shape), c.view(c0.shape)
    masked = walk.mask(y).to(walk.dtype)
    if save or T == 1:  # whoever changes a result in place must not change what backward reads
        h, c = h.clone(), c.clone()  # and of a cell's there are to be no others in memory
    if save:
        masked = masked.clone() if masked is y else masked
    return (masked, h, c), (kept, h_seq, c_seq)


def _in_core(
    call: cpu_conv.Call,
    layer: Layer,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: tuple[Tensor | None, ...],
    save: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Any, ...]]:
    """on_cells' results, by one call of the CPU's core; without ``save`` nothing for backward."""
    shape, convolved = (call.rows, call.C), x.dtype
    x, *weights = (None if w is None else w.to(h0.dtype) for w in (x, *weights))
    h, c = h0.new_empty(h0.shape), c0.new_empty(c0.shape)
    first = kept = h_seq = c_seq = None
    h_out = None if save else x.new_empty(call.T, *shape)
    if save:
        kept = x.new_empty(call.T, call.rows, 4 * call.C)
        h_seq, c_seq = x.new_empty(call.T + 1, *shape), x.new_empty(call.T + 1, *shape)
        first, h_out = h_seq[layer.start], layer.outputs(h_seq)
    states = h0.movedim(-1, 1), c0.movedim(-1, 1)
    written, walk = (h, c, first, h_out, c_seq, kept), layer.walk
    cpu_conv.forward(call, x, *states, weights, *written, walk.masks(), walk.dtype)
    frames = layer.frames(h_out)
    y = walk.mask(frames).to(walk.dtype)
    if save and y is frames:  # whoever changes it must not change what backward reads
        y = y.clone()
    if save:  # as the library's convolutions would see it
        h_seq = h_seq.to(convolved)
    return (y, h, c), (kept, h_seq, c_seq)


def gradients(
    layer: Layer,
    wanted: Sequence[bool],
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    kept: Tensor,
    h_seq: Tensor,
    c_seq: Tensor,
) -> tuple[Tensor | None, ...]:
    """Of the layer's tensors, None where not wanted, from those of its results, None for zero."""
    x, w_ih, bias, w_hh, h0, _, w_ch = tensors
    of_x, of_w_ih, of_bias, of_w_hh, of_h0, *_ = wanted
    (walk, window, *_), (T, rows, _), acc, C = layer, kept.shape, kept.dtype, h0.size(-1)
    kept, h_seq, c_seq = (t.contiguous() for t in (kept, h_seq, c_seq))
    w_ch = None if w_ch is None else w_ch.contiguous()
    grads = [None if g is None else in_memory(g) for g in grads]
    call = layer.call(x, C, forward=False)
    if call is None and layer.call(x, C, forward=True) is None:
        by_planes = conv_planes.call_of(layer, x, C)
        if by_planes is not None:
            saved = kept, h_seq, c_seq
            return conv_planes.gradients(by_planes, layer, wanted, grads, tensors, *saved)
    dy, dh, dc = grads
    dy = None if dy is None else walk.mask(dy).to(acc).contiguous().view(T, rows, C)
    dh, dc = (None if g is None else g.contiguous().view(rows, C) for g in (dh, dc))
    states = kept, h_seq, c_seq, dy, dh, dc
    if call is not None:
        masks, convolved = walk.masks(), x.dtype
        x, w_ih, w_hh, h_seq = (t.to(acc) for t in (x, w_ih, w_hh, h_seq))
        da_seq, dx, dh, dc, dw_ch = cpu_conv.backward(
            call, of_x, of_h0, (x, w_ih, w_hh, w_ch), kept, c_seq, dy, dh, dc, masks
        )
        dw_ih = dw_hh = db = None
        if of_w_ih or of_w_hh or of_bias:
            h_prev = h_seq[1:] if layer.reverse else h_seq[:T]
            dw_ih, dw_hh, db = cpu_conv.weights_gradients(
                call, of_w_ih, of_w_hh, x, h_prev, da_seq, masks
            )
        of_weights = dx, dw_ih, db if of_bias else None, dw_hh
        of_weights = (None if d is None else d.to(convolved) for d in of_weights)
        return *of_weights, *_as_wanted(wanted, h0, dh, dc, dw_ch)
    of_input, recurrent = window.convolution(w_ih, x.shape[3:]), layer.recurrent(w_hh)
    da_seq = x.new_empty(kept.shape)
    dh, dc, dw_ch = conv_steps.backward(layer, recurrent, w_ch, *states, of_h0, da_seq)
    g = layer.images(da_seq).flatten(0, 1)
    dw_hh = None
    if of_w_hh:  # a state that no step takes, or that a reset ends, is no part of any product
        h_prev = h_seq[1:] if layer.reverse else h_seq[:T]
        if walk.steps.reset_mask is not None:
            h_prev = torch.stack([walk.renewed(t, h) for t, h in enumerate(h_prev.unbind(0))])
        h_prev = walk.mask(layer.images(h_prev)).flatten(0, 1)
        dw_hh = recurrent.gradients(g, h_prev, False, True)[1]
    dx = dw_ih = None
    if of_x or of_w_ih:
        dx, dw_ih = of_input.gradients(g, x.flatten(0, 1), of_x, of_w_ih)
    return (
        None if dx is None else dx.view(x.shape),
        _as_it_lies(dw_ih, w_ih),
        da_seq.flatten(0, 1).sum(0, dtype=acc).to(bias.dtype) if of_bias else None,
        _as_it_lies(dw_hh, w_hh),
        *_as_wanted(wanted, h0, dh, dc, dw_ch),
    )


def _as_it_lies(dw: Tensor | None, w: Tensor) -> Tensor | None:
    """The gradient of a contiguous weight contiguous too: it was made channels last."""
    return dw.contiguous() if dw is not None and w.is_contiguous() else dw


def _as_wanted(
    wanted: Sequence[bool], h0: Tensor, dh: Tensor, dc: Tensor, dw_ch: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The last three gradients, of the states (rows, C)."""
    *_, of_h0, of_c0, of_w_ch = wanted
    return (
        dh.view(h0.shape) if of_h0 else None,
        dc.view(h0.shape) if of_c0 else None,
        dw_ch if of_w_ch else None,
    )
