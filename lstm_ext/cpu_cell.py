"""The LSTM cell alone on the native core's CPU kernels: a step without a recurrent product."""

from __future__ import annotations

import torch
from torch import Tensor

from lstm_ext import cpu_products
from lstm_ext.engine import DTYPE_CODE, address, native_steps
from lstm_ext.native import _C
from lstm_ext.steps import Steps


def cell_forward(
    steps: Steps,
    a: Tensor,
    h: Tensor,
    c: Tensor,
    w_ch: Tensor | None,
    gates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :meth:`pointwise.Cells.cell_forward`.

    gates: (rows, 4C); rows that take the step get the activated gates.
    """
    rows, C = c.shape
    code, threads = DTYPE_CODE[a.dtype], torch.get_num_threads()
    variants = _C.Variants(peephole=address(w_ch))
    h_new, c_new = torch.empty_like(h), torch.empty_like(c)
    native = native_steps(_C, steps, False)
    workspace = cpu_products.workspace(
        _C.cpu_forward_workspace(code, threads, native, C, C, 0, False, False, False, variants)
    )
    _C.cpu_forward(
        dtype=code,
        threads=threads,
        steps=native,
        H=C,
        P=C,
        I=0,
        gx=address(a),
        x=0,
        w_ih=0,
        b_ih=0,
        b_hh=0,
        w_hh=0,
        w_hr=0,
        h0=address(h),
        c0=address(c),
        variants=variants,
        gates=address(gates),
        c_seq=address(c_new),
        norm=0,
        norm_r=0,
        # One step: what it puts out is also the last state.
        y=address(h_new),
        y_stride=C,
        h_n=address(h_new),
        c_n=address(c_new),
        workspace=address(workspace),
    )
    return h_new, c_new


def cell_backward(
    steps: Steps,
    grads: tuple[Tensor | None, ...],
    a: Tensor,
    h: Tensor,
    c: Tensor,
    w_ch: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """See :meth:`pointwise.Cells.cell_backward`."""
    rows, C = c.shape
    code, threads = DTYPE_CODE[a.dtype], torch.get_num_threads()
    variants = _C.Variants(peephole=address(w_ch))
    dh, dc = (None if g is None else g.resolve_neg().contiguous() for g in grads)
    gates = torch.empty_like(a)
    _, c_new = cell_forward(steps, a, h, c, w_ch, gates)
    da = torch.empty_like(a) if steps.lengths is None else torch.zeros_like(a)
    dw_ch = None if w_ch is None else a.new_zeros(rows, 3 * C)
    dh0, dc0 = torch.empty_like(h), torch.empty_like(c)
    native = native_steps(_C, steps, False)
    workspace = cpu_products.workspace(
        _C.cpu_backward_workspace(code, threads, native, C, C, False, False, variants)
    )
    _C.cpu_backward(
        dtype=code,
        threads=threads,
        steps=native,
        H=C,
        P=C,
        variants=variants,
        w_hh=0,
        w_hr=0,
        h0=0,
        c0=address(c),
        y=0,
        y_stride=C,
        gates=address(gates),
        c_seq=address(c_new),
        norm=0,
        norm_r=0,
        dy=0,
        dy_stride=0,
        dh_n=address(dh),
        dc_n=address(dc),
        dcells=0,
        dgates=address(da),
        dproduct=0,
        h_prev=0,
        dr=0,
        cell_out=0,
        dpeephole=address(dw_ch),
        dnorm=0,
        dh0=address(dh0),
        dc0=address(dc0),
        workspace=address(workspace),
    )
    return da, dh0, dc0, None if dw_ch is None else dw_ch.sum(0)
