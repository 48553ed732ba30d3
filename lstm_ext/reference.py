"""The LSTM in plain torch: what every engine is compared with, and what runs where none exists.

Any dtype and device, differentiable to any order. Written to be read: one loop, a shape on every
line. Letters: T steps, B sequences, I inputs of a layer, H hidden units, P size of h (proj_size,
or H), D directions.

Formula (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), as nn.LSTM's::

    a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh          rows i, f, g, o
    i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o);  g = tanh(a_g)
    c_t = f * c_{t-1} + i * g;   h_t = o * tanh(c_t)     or W_hr (o * tanh(c_t)) with a projection

Peepholes (ONNX LSTM, after Gers et al. 2002)::

    a_i += p_i * c_{t-1};   a_f += p_f * c_{t-1};   a_o += p_o * c_t

Layer norm (Haste's LayerNormLSTM; LN over all 4H rows, over H for c)::

    a_t = gamma_ih * LN(W_ih x_t) + gamma_hh * LN(W_hh h_{t-1}) + b_ih + b_hh
    h_t = o * tanh(gamma_ch * LN(c_t) + beta_ch)

Zoneout (Krueger et al. 2017; k = 1 where the old value stays, or its expectation)::

    c'_t = k_c * c_{t-1} + (1 - k_c) * c_t;   h'_t = k_h * h_{t-1} + (1 - k_h) * h_t

where c'_t and h'_t are what the next step and the caller see; h_t is made of c_t, not of c'_t.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lstm_ext.engine import LAYER_NORM_EPSILON, Masks, acc_dtype


def lstm_cell(
    a: Tensor,
    c_prev: Tensor,
    w_ch: Tensor | None = None,
    gamma_ch: Tensor | None = None,
    beta_ch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h and c, both (B, H), from the pre-activations a (B, 4H), rows i, f, g, o, and c_prev.

    The weights are those of lstm_layer; h is before a projection.
    """
    a_i, a_f, a_g, a_o = a.chunk(4, dim=1)  # 4 of (B, H)
    if w_ch is not None:
        p_i, p_f, p_o = w_ch.chunk(3)  # 3 of (H,)
        a_i, a_f = a_i + p_i * c_prev, a_f + p_f * c_prev  # 2 of (B, H)
    i, f, g = a_i.sigmoid(), a_f.sigmoid(), a_g.tanh()  # 3 of (B, H)
    c = f * c_prev + i * g  # (B, H)
    if w_ch is not None:
        a_o = a_o + p_o * c  # (B, H)
    o = a_o.sigmoid()  # (B, H)
    seen = c if gamma_ch is None else _norm(c, gamma_ch, beta_ch)  # (B, H)
    return o * seen.tanh(), c  # (B, H) each


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    w_ch: Tensor | None = None,
    gamma_ih: Tensor | None = None,
    gamma_hh: Tensor | None = None,
    gamma_ch: Tensor | None = None,
    beta_ch: Tensor | None = None,
    *,
    h_dropout: Tensor | None = None,
    keep_h: Tensor | float = 0.0,
    keep_c: Tensor | float = 0.0,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One direction of one layer.

    Args:
        x: (T, B, I) input.
        h0, c0: (B, P) and (B, H) initial states.
        w_ih, w_hh: (4H, I) and (4H, P) weights, rows i, f, g, o.
        b_ih, b_hh: (4H,) biases, or None.
        w_hr: (P, H) projection, or None (then P = H).
        w_ch: (3H,) peephole weights, rows i, f, o, or None.
        gamma_ih, gamma_hh, gamma_ch, beta_ch: (4H,), (4H,), (H,), (H,) of the layer norm, or None.
        h_dropout: (B, P) factors of h_{t-1} in the product with w_hh, or None.
        keep_h, keep_c: bool (T, B, P) and (T, B, H), where the old state stays (zoneout); or
            numbers, what part of it stays everywhere.
        lengths: (B,) integers in 0..T, or None (all T). Steps past a length are not taken: the
            state is held, y and cells are 0 there, and what x holds there reaches nothing.
        reset_mask: (T, B) bool, or None: where true, the state is zero before that step.
        reverse: take the steps T-1 .. 0 (of a shorter sequence: its last step .. 0).

    Returns:
        y (T, B, P), every h_t; h_n (B, P) and c_n (B, H), the states after the last step taken (the
        initial ones for a zero length); cells (T, B, H), every c_t.
    """
    steps = x.size(0)
    if lengths is None:
        active = x.new_ones(x.shape[:2], dtype=torch.bool)  # (T, B)
    else:
        t = torch.arange(steps, device=x.device)  # (T,)
        active = t[:, None] < lengths.to(x.device)  # (T, B)
        x = torch.where(active[:, :, None], x, 0)  # (T, B, I); a NaN in the padding ends here
    # Unbound, since the derivative of an index into the whole would be as large as the whole.
    gx = _linear(x, w_ih, gamma_ih, b_ih).unbind(0)  # T of (B, 4H)
    y = [h0] * steps  # T of (B, P), filled below
    cells = [c0] * steps  # T of (B, H), filled below
    h, c = h0, c0  # (B, P), (B, H)
    for t in reversed(range(steps)) if reverse else range(steps):
        h_prev, c_prev = h, c  # (B, P), (B, H)
        if reset_mask is not None:
            reset = reset_mask[t, :, None]  # (B, 1)
            h_prev = torch.where(reset, 0, h)  # (B, P)
            c_prev = torch.where(reset, 0, c)  # (B, H)
        h_in = h_prev if h_dropout is None else h_prev * h_dropout  # (B, P)
        a = gx[t] + _linear(h_in, w_hh, gamma_hh, b_hh)  # (B, 4H)
        h_t, c_t = lstm_cell(a, c_prev, w_ch, gamma_ch, beta_ch)  # 2 of (B, H)
        if w_hr is not None:
            h_t = F.linear(h_t, w_hr)  # (B, P)
        c_t = _zoneout(keep_c, t, c_prev, c_t)  # (B, H)
        h_t = _zoneout(keep_h, t, h_prev, h_t)  # (B, P)
        on = active[t, :, None]  # (B, 1)
        y[t] = torch.where(on, h_t, 0)  # (B, P)
        cells[t] = torch.where(on, c_t, 0)  # (B, H)
        h = torch.where(on, h_t, h)  # (B, P)
        c = torch.where(on, c_t, c)  # (B, H)
    if steps == 0:
        return x.new_empty(0, *h0.shape), h, c, x.new_empty(0, *c0.shape)
    return torch.stack(y), h, c, torch.stack(cells)  # (T, B, P), (B, P), (B, H), (T, B, H)


def _norm(x: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
    # Not F.layer_norm: its second derivative by jacrev(jacfwd) is wrong in torch 2.13.
    wide = x.to(acc_dtype(x.dtype))
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * (wide.square().mean(-1, keepdim=True) + LAYER_NORM_EPSILON).rsqrt() * gamma
    return (wide if beta is None else wide + beta).to(x.dtype)


def _linear(x: Tensor, w: Tensor, gamma: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.linear(x, w, bias) if gamma is None else _norm(F.linear(x, w), gamma, bias)


def _zoneout(keep: Tensor | float, t: int, old: Tensor, new: Tensor) -> Tensor:
    if isinstance(keep, Tensor):
        return torch.where(keep[t], old, new)
    return keep * old + (1 - keep) * new if keep else new


def lstm(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    layers: Sequence[Sequence[Tensor]],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    peephole: bool = False,
    layer_norm: bool = False,
    merge_mode: str = "concat",
    masks: Sequence[Masks] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """A whole nn.LSTM: layers, directions, dropout between the layers; and its variants.

    Args:
        x: (T, B, I) input.
        hx: (h0, c0) of shapes (num_layers * D, B, P) and (num_layers * D, B, H); None: zeros.
        layers: per layer, then direction: w_ih, w_hh, then b_ih and b_hh if there are biases, then
            w_hr if there is a projection; the order of nn.LSTM's `all_weights`; then w_ch with
            peephole; then gamma_ih, gamma_hh, gamma_ch, beta_ch with layer_norm.
        lengths, reset_mask: as in lstm_layer.
        merge_mode: "concat", "sum", "mul" or "ave" of the two directions, in every layer.
        masks: per layer, then direction: h_dropout, keep_h and keep_c as in lstm_layer.

    Returns:
        output (T, B, D*P), or (T, B, P) if merged otherwise than by concat; (h_n, c_n) shaped as
        hx; and cells (T, B, D*H) of the last layer.
    """
    directions = 2 if bidirectional else 1
    if len(layers) != num_layers * directions:
        raise ValueError(f"layers: got {len(layers)}, expected {num_layers * directions}")
    if hx is None:
        p = layers[0][1].size(1)
        hidden = layers[0][1].size(0) // 4
        h0 = x.new_zeros(len(layers), x.size(1), p)  # (num_layers * D, B, P)
        c0 = x.new_zeros(len(layers), x.size(1), hidden)  # (num_layers * D, B, H)
    else:
        h0, c0 = hx  # (num_layers * D, B, P), (num_layers * D, B, H)
    h_n, c_n, cells = [], [], []
    for layer in range(num_layers):
        outputs, cells = [], []
        for direction in range(directions):
            k = layer * directions + direction
            w_ih, w_hh, *rest = layers[k]  # (4H, in), (4H, P)
            gammas = [rest.pop() for _ in range(4)][::-1] if layer_norm else [None] * 4
            w_ch = rest.pop() if peephole else None  # (3H,)
            b_ih, b_hh = rest[:2] if len(rest) >= 2 else (None, None)  # (4H,) each
            w_hr = rest[-1] if len(rest) % 2 else None  # (P, H)
            y, h, c, cell = lstm_layer(
                x, h0[k], c0[k], w_ih, w_hh, b_ih, b_hh, w_hr, w_ch, *gammas,
                **(masks[k]._asdict() if masks else {}),
                lengths=lengths, reset_mask=reset_mask, reverse=direction == 1,
            )  # (T, B, P), (B, P), (B, H), (T, B, H)  # fmt: skip
            outputs.append(y)
            cells.append(cell)
            h_n.append(h)
            c_n.append(c)
        x = _merged(outputs, merge_mode)  # (T, B, D*P) or (T, B, P)
        if layer < num_layers - 1:
            x = F.dropout(x, dropout, training)  # as x
    return x, (torch.stack(h_n), torch.stack(c_n)), torch.cat(cells, dim=2)


def _merged(outputs: list[Tensor], mode: str) -> Tensor:
    if mode == "concat":
        return torch.cat(outputs, dim=2)
    forward, backward = outputs
    if mode == "mul":
        return forward * backward
    return forward + backward if mode == "sum" else (forward + backward) / 2
