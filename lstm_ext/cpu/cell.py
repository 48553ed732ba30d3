"""The LSTM cell alone on the native core's CPU kernels: a step without a recurrent product, of rows
of units, or of planes, as a convolution makes them channels first."""

from __future__ import annotations

import torch
from torch import Tensor

from lstm_ext.cpu import products as cpu_products
from lstm_ext.engine import DTYPE_CODE, acc_dtype, address, native_steps
from lstm_ext.native import _C
from lstm_ext.profiling import recorded
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


def planes_forward(
    a: Tensor, c0: Tensor, w_ch: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """h_1, c_1 and, if ``keep``, what backward needs: the activated gates and c_1 as it was
    computed.

    a (N, 4C, *size): pre-activations without peepholes; c0 (N, C, *size), of the states' dtype,
    w_ch (3C) or None, of the dtype computed with. All contiguous.
    """
    acc = acc_dtype(c0.dtype)
    h, c = torch.empty_like(c0), torch.empty_like(c0)
    gates = c_kept = None
    if keep:
        gates = a if a.dtype == acc else torch.empty_like(a, dtype=acc)
        c_kept = torch.empty_like(c0, dtype=acc)
    tensors = a, c0, _of_units(w_ch, c0), gates, c_kept, h, c
    recorded(_C.cpu_planes_forward)(*_planes(a.dtype, c0), *tensors)
    return h, c, gates, c_kept


def planes_backward(
    gates: Tensor,
    c: Tensor,
    c0: Tensor,
    w_ch: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of a, of that dtype, of c0 and of w_ch. gates and c: kept; dh and dc: of h_1
    and c_1, None for zero."""
    da, dc0 = torch.empty_like(gates, dtype=dtype), torch.empty_like(c0)
    N, C, *size = c.shape
    dw_ch = None if w_ch is None else c.new_empty(N, 3 * C, *size)
    tensors = c0, _of_units(w_ch, c0), gates, c, dh, dc, da, dc0, dw_ch
    recorded(_C.cpu_planes_backward)(*_planes(dtype, c0), *tensors)
    return da, dc0, None if dw_ch is None else dw_ch.flatten(2).sum((0, 2))


def _planes(given: torch.dtype, c0: Tensor) -> tuple[int, int, int, int, int]:
    N = c0.size(0)
    codes = DTYPE_CODE[given], DTYPE_CODE[c0.dtype]
    return *codes, torch.get_num_threads(), N, c0.numel() // N


def _of_units(w_ch: Tensor | None, c0: Tensor) -> Tensor | None:
    """(3C), a number a channel, as one a unit."""
    return None if w_ch is None else w_ch.repeat_interleave(c0[0, 0].numel())
