"""The LSTM cell alone on the native core's CPU kernels: a step without a recurrent product."""

from __future__ import annotations

import torch
from torch import Tensor

from lstm_ext.cpu import products as cpu_products
from lstm_ext.engine import DTYPE_CODE, address, native_steps
from lstm_ext.native import _C
from lstm_ext.steps import Steps


def cell_forward(
    steps: Steps,
    a: Tensor,
    h: Tensor,
    c: Tensor,
    w_ch: Tensor | None,
    h_new: Tensor,
    c_new: Tensor,
    keep: bool,
) -> None:
    """See :meth:`pointwise.Cells.cell_forward`: kept are the activated gates."""
    C = c.size(1)
    variants = _C.Variants(peephole=address(w_ch))
    native = native_steps(_C, steps, False)
    # fmt: off
    call = _C.CpuForward(
        DTYPE_CODE[a.dtype], False, torch.get_num_threads(), False, native, C, C, 0,
        a, None, None, None, None, None, None, h, c, variants,
        a if keep else None, c_new, None, None,
        # One step: what it puts out is also the last state.
        h_new, C, h_new, c_new,
    )
    # fmt: on
    _C.cpu_forward(call, None, cpu_products.workspace)


def cell_backward(
    steps: Steps,
    dh: Tensor | None,
    dc: Tensor | None,
    kept: Tensor,
    c: Tensor,
    c_new: Tensor,
    w_ch: Tensor | None,
    da: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :meth:`pointwise.Cells.cell_backward`."""
    rows, C = c.shape
    variants = _C.Variants(peephole=address(w_ch))
    if steps.lengths is not None:
        da.zero_()  # the core leaves rows without a step as they are
    dw_ch = None if w_ch is None else c.new_zeros(rows, 3 * C)
    dh0, dc0 = torch.empty_like(c), torch.empty_like(c)
    native = native_steps(_C, steps, False)
    # fmt: off
    call = _C.CpuBackward(
        DTYPE_CODE[kept.dtype], False, torch.get_num_threads(), native, C, C, variants,
        None, None, None, c, None, C, kept, c_new, None, None,
        None, 0, dh, dc, None,
        da, None, None, None, None, dw_ch, None, dh0, dc0,
    )
    # fmt: on
    _C.cpu_backward(call, None, cpu_products.workspace)
    return dh0, dc0, None if dw_ch is None else dw_ch.sum(0)
