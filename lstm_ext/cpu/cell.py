"""The LSTM cell alone on the native core's CPU kernels: a step without a recurrent product, of rows
of units, or of planes, as a convolution makes them channels first."""

from __future__ import annotations

import torch
from torch import Tensor

from lstm_ext.cpu import products as cpu_products
from lstm_ext.engine import DTYPE_CODE, address, native_steps
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
    a: Tensor,
    c0: Tensor,
    w_ch: Tensor | None,
    gates: Tensor | None,
    c_kept: Tensor | None,
    h: Tensor,
    c: Tensor,
) -> None:
    """Writes h_1 and c_1 and, unless they are None, what backward needs: the activated gates, which
    may be a, and c_1 as it was computed.

    a (N, 4C, *size): pre-activations without peepholes; c0, h and c (N, C, *size), of the states'
    dtype, a's or a half type; w_ch as :func:`of_units`, gates and c_kept of the dtype computed
    with. All contiguous.
    """
    tensors = a, c0, w_ch, gates, c_kept, h, c
    recorded(_C.cpu_planes_forward)(*_planes(a.dtype, c0), *tensors)


def planes_backward(
    gates: Tensor,
    c: Tensor,
    c0: Tensor,
    w_ch: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    da: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Writes the gradient of a; returns those of c0 and of the peepholes, (3C). gates and c: kept;
    dh and dc: of h_1 and c_1, None for zero."""
    dc0, (N, C, *size) = torch.empty_like(c0), c.shape
    dw_ch = None if w_ch is None else c.new_empty(N, 3 * C, *size)
    tensors = c0, w_ch, gates, c, dh, dc, da, dc0, dw_ch
    recorded(_C.cpu_planes_backward)(*_planes(da.dtype, c0), *tensors)
    return dc0, None if dw_ch is None else dw_ch.flatten(2).sum((0, 2))


def of_units(w_ch: Tensor | None, pixels: int) -> Tensor | None:
    """(3C), a number a channel, as one a unit."""
    return None if w_ch is None else w_ch.repeat_interleave(pixels)


def _planes(given: torch.dtype, c0: Tensor) -> tuple[int, int, int, int, int]:
    N = c0.size(0)
    codes = DTYPE_CODE[given], DTYPE_CODE[c0.dtype]
    return *codes, torch.get_num_threads(), N, c0.numel() // N
