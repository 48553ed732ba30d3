"""Backward of one direction of a layer on the native core's CPU kernels.

Letters as in :mod:`ops`.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from lstm_ext.cpu.calls import bf16_products
from lstm_ext.cpu.products import matmul, transposed_matmul
from lstm_ext.engine import (
    DTYPE_CODE,
    Direction,
    DirectionGrads,
    LayerWeights,
    allocate,
    in_memory,
    native_steps,
    native_variants,
    norm_input_backward,
    without_autocast,
)
from lstm_ext.native import _C
from lstm_ext.steps import Steps

# Beside the recurrence the core makes the gradients of x and of the weights from dgates that are
# still in the caches, if there are enough rows to be worth packing W_ih for them, and it stays in a
# cache as well. Backward took 5-8 % less time at H 128, level at H 256, 8 % more at H 512 (float32,
# B 16 to 64, two Zen 5 cores; two Zen 4 cores, products in longer slices: 5 % less at H 128, 2 %
# less at H 256, 1 % more at H 512); dgates of all steps need no memory. Of padded sequences, whose
# rows would have to be gathered first, training takes 4-19 % less at any size (H 64 to 1024).
FUSED_ROWS = 512
_FUSED_WEIGHT_BYTES = 1 << 20  # as products read them


def _fused(w: LayerWeights, steps: Steps, operand: torch.dtype, wanted: DirectionGrads) -> bool:
    """Whether the core makes the gradients of products beside the recurrence."""
    return bool(
        wanted.w_ih
        and wanted.w_hh
        and not w.normed
        and steps.rows >= FUSED_ROWS
        and (steps.has_padding or w.w_ih.numel() * operand.itemsize <= _FUSED_WEIGHT_BYTES)
    )


def _dense(gradient: Tensor | None) -> Tensor | None:
    return gradient if gradient is None else in_memory(gradient).contiguous()


class Kept:
    """Gradients that backward's own derivative needs, of all steps, in the acc dtype."""

    dgates: Tensor  # (rows, 4H)
    dr: Tensor | None  # (rows, P) of the products with W_hr
    dout: Tensor  # (rows, H) of o * tanh(c)
    dc: Tensor  # (rows, H) of c


def backward(
    dy: Tensor | None,
    dcells: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    direction: Direction,
    y: Tensor,
    saved: tuple[Tensor, ...],
    steps: Steps,
    wanted_x: bool,
    wanted: DirectionGrads,
    keep: Kept | None = None,
    tangents: tuple[Tensor | None, ...] | None = None,
) -> Generator[Any, None, None]:
    """One direction: yields the core's call, and when that has run the gradient of x in the acc
    dtype and the direction's own.

    keep: to be filled. tangents: as Tangents of csrc/params.h; then it is the derivative of
    backward in their direction, and what else is given belongs to it as that file says.
    """
    h0, c0, w, reverse = direction
    H, P, dtype = c0.size(1), h0.size(1), x.dtype
    normed = w.normed
    variants, _kept = native_variants(_C, w, dtype)
    # Then dh0 needs one product, without packing.
    one_step = steps.T == 1 and not normed and keep is None and tangents is None
    one_step = one_step and _C.cpu_dh0_is_a_product(w.w_hh.numel(), w.w_hr is not None)
    # Then W_hh was multiplied with h0 itself, and dh0 is that product.
    plain_step = one_step and not w.varied and steps.lengths is None and steps.reset_mask is None
    padding = steps.has_padding
    dh_n, dc_n, dcells = _dense(dh_n), _dense(dc_n), _dense(dcells)
    gates, c_seq, *more = [t.contiguous() for t in saved]
    h0, c0 = h0.contiguous(), c0.contiguous()
    norm, norm_r = more[3:] if normed else (None, None)
    w_hh = None if one_step else w.w_hh.contiguous()
    w_hr = None if w.w_hr is None else w.w_hr.contiguous()
    bf16 = bf16_products(dtype, w)
    operand = dtype if bf16 else gates.dtype  # of the gradients that go into products
    fused = not one_step and keep is None and _fused(w, steps, operand, wanted)
    dgates = h_prev = dx = dw_ih = dw_hh = db = None
    x_read = w_ih = None
    if fused:
        x_read, w_ih = x.contiguous(), w.w_ih.contiguous()
        dx = allocate(gates, *x.shape, zero=padding) if wanted_x else None
        dw_ih = allocate(gates, *w.w_ih.shape, zero=padding)
        dw_hh = allocate(gates, *w.w_hh.shape, zero=padding)
        wanted_b = wanted.b_ih or wanted.b_hh
        db = allocate(gates, 4 * H, zero=padding) if wanted_b else None
    else:
        dgates = allocate(gates, steps.rows, 4 * H, zero=padding, dtype=operand)
        h_prev = y.new_empty(steps.rows, P) if wanted.w_hh and not plain_step else None
    dproduct = gates.new_empty(steps.rows, 4 * H) if normed else None
    dr = None
    if w_hr is not None:
        dr = gates.new_empty(steps.rows, P + P % 2 if bf16 else P, dtype=operand)
    cell_out = None
    if wanted.w_hr and w_hr is not None:
        cell_out = gates.new_empty(steps.rows, H, dtype=operand)
    dpeephole = gates.new_zeros(steps.B, 3 * H) if wanted.w_ch else None
    wanted_norm = wanted.gamma_hh or wanted.gamma_ch or wanted.beta_ch
    dnorm = gates.new_zeros(steps.B, 6 * H) if wanted_norm else None
    dh0, dc0 = h0.new_empty(steps.B, P), c0.new_empty(steps.B, H)
    native = native_steps(_C, steps, reverse)
    threads = torch.get_num_threads()
    code = DTYPE_CODE[dtype]
    # fmt: off
    call = _C.CpuBackward(
        code, bf16, threads, native, H, P, variants,
        w_hh, w_hr, h0, c0, y, y.stride(0), gates, c_seq, norm, norm_r,
        dy, 0 if dy is None else dy.stride(0), dh_n, dc_n, dcells,
        dgates, dproduct, h_prev, dr, cell_out, dpeephole, dnorm, dh0, dc0,
        x_read, w_ih, x.size(1), dx, dw_ih, dw_hh, db,
    )
    # fmt: on
    if keep is not None:
        keep.dgates, keep.dr = dgates, dr
        keep.dout, keep.dc = gates.new_empty(steps.rows, H), gates.new_empty(steps.rows, H)
        call.keep_gradients(keep.dout, keep.dc)
    if tangents is not None:
        call.make_tangents(*tangents)
    yield call
    with without_autocast(x.device):
        if one_step and wanted.h0:
            product = matmul(dgates, w.w_hh)
            if plain_step:
                dh0 = product.to(dtype)
            else:
                if w.masks is not None and w.masks.h_dropout is not None:
                    product *= w.masks.h_dropout
                if steps.reset_mask is not None:
                    product.masked_fill_(steps.reset_mask.T, 0)
                dh0 += product.to(dtype)
        dinput, dgamma_ih = dgates, None  # gradients of x W_ih^T and of its norm
        if normed and (wanted_x or wanted.w_ih or wanted.gamma_ih):
            dinput, dgamma_ih = norm_input_backward(dgates, w, tuple(more[:3]))
        if wanted_x and not fused:
            dx = matmul(dinput, w.w_ih)
        # What lies in the padding of x, and of what the core left untouched there, may be
        # anything, NaN too: its zero gradient must not meet it.
        real = steps.active_rows if padding and not (fused and cell_out is None) else None

        def rows(tensor: Tensor) -> Tensor:
            return tensor if real is None else tensor.index_select(0, real)

        def summed(tensor: Tensor, start: int, size: int) -> Tensor:
            return tensor[:, start : start + size].sum(0).to(dtype)

        wanted_b = wanted.b_ih or wanted.b_hh
        if not fused and (wanted.w_ih or wanted.w_hh or wanted_b):
            dgates = rows(dgates)
        x_rows = rows(x) if wanted.w_ih and not fused else None
        h_rows = None
        if wanted.w_hh and not fused:
            h_rows = h0 if plain_step else rows(h_prev)
        dw_hr = None
        if fused:
            pass  # the core has made them
        elif not normed:
            if wanted_b or wanted.w_ih or wanted.w_hh:
                dw_ih, dw_hh, db = transposed_matmul(dgates, x_rows, h_rows, wanted_b)
        else:
            if wanted.w_ih:
                dw_ih = transposed_matmul(rows(dinput), x_rows, None, False)[0]
            if h_rows is not None:
                dw_hh = transposed_matmul(rows(dproduct), h_rows, None, False)[0]
            db = dgates.sum(0) if wanted_b else None
        if cell_out is not None:
            dw_hr = transposed_matmul(rows(dr[:, :P]), rows(cell_out), None, False)[0]
        if dtype != gates.dtype:
            dw_ih, dw_hh, dw_hr, db = [
                g if g is None else g.to(dtype) for g in (dw_ih, dw_hh, dw_hr, db)
            ]
    grads = DirectionGrads(
        h0=dh0 if wanted.h0 else None,
        c0=dc0 if wanted.c0 else None,
        w_ih=dw_ih,
        w_hh=dw_hh,
        b_ih=db if wanted.b_ih else None,
        # Two tensors, as for two parameters: a caller may change one in place.
        b_hh=db.clone() if wanted.b_hh and db is not None else None,
        w_hr=dw_hr,
        w_ch=summed(dpeephole, 0, 3 * H) if wanted.w_ch else None,
        gamma_ih=dgamma_ih.to(dtype) if wanted.gamma_ih else None,
        gamma_hh=summed(dnorm, 0, 4 * H) if wanted.gamma_hh else None,
        gamma_ch=summed(dnorm, 4 * H, H) if wanted.gamma_ch else None,
        beta_ch=summed(dnorm, 5 * H, H) if wanted.beta_ch else None,
    )
    yield dx, grads
