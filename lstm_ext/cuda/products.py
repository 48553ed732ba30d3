"""The products over all steps of the CUDA engine: cuBLASLt's, called from the core, or torch's."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lstm_ext.cuda.precision import products_in
from lstm_ext.engine import DTYPE_CODE, acc_dtype, address


class Products(Protocol):
    """What multiplies."""

    def into(self, out: Tensor, a: Tensor, b: Tensor, tf32: bool, add: bool = False) -> None:
        """out (M, N) = a (M, K) b (K, N), or out += that, with a single rounding to out's dtype.

        a, b: of one dtype; out of the same, or wider. tf32: float32 factors rounded to TF32.
        """


def open_vendor(core: Any) -> str:
    """Opens cuBLASLt, the one that torch has loaded, for the core.

    Returns:
        Why it cannot be used; empty if it can.
    """
    version = torch.version.cuda
    if version is None:
        return f"torch {torch.__version__} is built without CUDA"
    return core.cuda_open_vendor(f"libcublasLt.so.{version.split('.')[0]}")


class VendorProducts:
    """By cuBLASLt: torch's settings are neither asked nor changed. See :class:`Products`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def into(self, out: Tensor, a: Tensor, b: Tensor, tf32: bool, add: bool = False) -> None:
        (M, K), N = a.shape, b.size(1)
        if not (M and N and K):
            if not add:
                out.zero_()
            return
        a, lda, a_transposed = _stored(a)
        b, ldb, b_transposed = _stored(b)
        addresses = [address(t) for t in (a, b, out)]
        bits = addresses[0] | addresses[1] | addresses[2] | 256
        product = self._engine.core.CudaProduct(
            dtype=DTYPE_CODE[a.dtype],
            tf32=tf32,
            wide=out.dtype != a.dtype,
            accumulate=add,
            a_transposed=a_transposed,
            b_transposed=b_transposed,
            device=out.device.index or 0,
            M=M,
            N=N,
            K=K,
            lda=lda,
            ldb=ldb,
            ldout=max(out.stride(0), N),
            alignment=bits & -bits,
        )
        size = product.workspace
        workspace = out.new_empty(size, dtype=torch.uint8) if size else None
        product.run(*addresses, address(workspace), self._engine.stream(out.device))


class TorchProducts:
    """By torch, with its own settings put aside meanwhile. See :class:`Products`."""

    def into(self, out: Tensor, a: Tensor, b: Tensor, tf32: bool, add: bool = False) -> None:
        acc = acc_dtype(a.dtype)
        with products_in(a.dtype, tf32):
            if a.dtype == acc and not add:
                torch.mm(a, b, out=out)
                return
            if a.dtype == acc:
                product = a @ b
            elif a.is_cuda:
                product = torch.mm(a, b, out_dtype=acc)
            else:
                product = a.to(acc) @ b.to(acc)
        out.add_(product) if add else out.copy_(product)


def _stored(matrix: Tensor) -> tuple[Tensor, int, bool]:
    """The matrix, or a copy, as the core takes it: elements from one row to the next as it is
    stored, and whether it is stored transposed."""
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    if across == 1 and (down >= columns or rows == 1):
        return matrix, max(down, columns), False
    if down == 1 and (across >= rows or columns == 1):
        return matrix, max(across, rows), True
    return matrix.contiguous(), columns, False
