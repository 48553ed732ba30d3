"""The LSTM cell alone on the native core's CPU kernels: a step without a recurrent product."""

from __future__ import annotations

import torch
from torch import Tensor

from lstm_ext import cpu_products
from lstm_ext.engine import DTYPE_CODE, address, in_memory, native_steps
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
    # fmt: off
    call = _C.CpuForward(
        code, False, threads, False, native, C, C, 0,
        a, None, None, None, None, None, None, h, c, variants,
        gates, c_new, None, None,
        # One step: what it puts out is also the last state.
        h_new, C, h_new, c_new,
    )
    # fmt: on
    _C.cpu_forward(call, None, cpu_products.workspace)
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
    dh, dc = (None if g is None else in_memory(g).contiguous() for g in grads)
    gates = torch.empty_like(a)
    _, c_new = cell_forward(steps, a, h, c, w_ch, gates)
    da = torch.empty_like(a) if steps.lengths is None else torch.zeros_like(a)
    dw_ch = None if w_ch is None else a.new_zeros(rows, 3 * C)
    dh0, dc0 = torch.empty_like(h), torch.empty_like(c)
    native = native_steps(_C, steps, False)
    # fmt: off
    call = _C.CpuBackward(
        code, False, threads, native, C, C, variants,
        None, None, None, c, None, C, gates, c_new, None, None,
        None, 0, dh, dc, None,
        da, None, None, None, None, dw_ch, None, dh0, dc0,
    )
    # fmt: on
    _C.cpu_backward(call, None, cpu_products.workspace)
    return da, dh0, dc0, None if dw_ch is None else dw_ch.sum(0)
