"""Products over all steps on the CPU, and the scratch of the core's calls."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from lstm_ext.engine import DTYPE_CODE
from lstm_ext.native import _C
from lstm_ext.profiling import recorded

# oneDNN's product, which torch.compile's CPU backend calls too. torch's own float32 matmul goes to
# MKL, which on AMD processors ran at 175-200 GFLOP/s beside this one's 430 (two Zen 5 cores,
# 3200 x 512 x 2048).
_onednn_linear = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)
_ONEDNN_MIN_MACS = 1_000_000  # below, its set-up (about 12 us) costs more than it gains


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x (m, k) times the transpose of w (n, k)."""
    if (
        _onednn_linear
        and x.dtype == torch.float32
        and x.size(0) * x.size(1) * w.size(0) >= _ONEDNN_MIN_MACS
        and torch.backends.mkldnn.enabled
        # With fewer threads than it asked for, oneDNN leaves parts of its result unwritten.
        and _C.openmp_grants(torch.get_num_threads())
    ):
        return _onednn_linear(x, w, None, "none", [], "")
    return torch.nn.functional.linear(x, w)


def matmul(a: Tensor, w: Tensor) -> Tensor:
    """a w for a (m, k) and w (k, n); in a's dtype.

    That is w's acc type, or bfloat16 for both.
    """
    if _is_for_torch(a, w, w.size(1), a_transposed=False):
        return torch.mm(a, w.contiguous())  # its sums may depend on how w lies
    out = a.new_empty(a.size(0), w.size(1))
    _product(a, w, None, out, None, None)
    return out


def transposed_matmul(
    a: Tensor, w: Tensor | None, more_w: Tensor | None, sums: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """a^T w and a^T more_w, where given, and the sums over the rows of a, if wanted.

    a (k, m), w (k, n) and more_w (k, n'); a of w's acc type, or bfloat16 like w. Returns
    (m, n) and (m, n') of w's dtype, and (m,) of the acc type: one pass over a for all three.
    """
    acc = torch.promote_types(a.dtype, torch.float32)
    if w is None and more_w is None:
        return None, None, a.sum(0, dtype=acc)
    if w is None:
        more, _, total = transposed_matmul(a, more_w, None, sums)
        return None, more, total
    more_columns = 0 if more_w is None else more_w.size(1)
    if _is_for_torch(a, w, w.size(1) + more_columns, a_transposed=True):
        columns = a.t()
        more_out = None if more_w is None else torch.mm(columns, more_w.contiguous())
        return torch.mm(columns, w.contiguous()), more_out, a.sum(0, dtype=acc) if sums else None
    new = w.new_empty if a.size(0) else w.new_zeros
    out = new(a.size(1), w.size(1))
    more_out = None if more_w is None else new(a.size(1), more_columns)
    total = new(a.size(1), dtype=acc) if sums else None
    if a.size(0):
        _product(a, w, more_w, out, more_out, total, a_transposed=True)
    return out, more_out, total


def _is_for_torch(a: Tensor, w: Tensor, columns: int, a_transposed: bool) -> bool:
    """Whether a library's product is the faster one, which takes operands of one dtype."""
    K, M = a.shape if a_transposed else a.shape[::-1]
    bf16_products = a.dtype == torch.bfloat16
    return a.dtype == w.dtype and not _C.cpu_multiplies(bf16_products, M, columns, K, a_transposed)


def _product(
    a: Tensor,
    w: Tensor,
    more_w: Tensor | None,
    out: Tensor,
    more_out: Tensor | None,
    sums: Tensor | None,
    a_transposed: bool = False,
) -> None:
    """The core's product; see Matmul in csrc/params.h."""
    K, M = a.shape if a_transposed else a.shape[::-1]
    N, more_N = w.size(1), 0 if more_w is None else more_w.size(1)
    a, w = a.contiguous(), w.contiguous()
    more_w = None if more_w is None else more_w.contiguous()
    code, bf16_products = DTYPE_CODE[w.dtype], a.dtype == torch.bfloat16
    threads = torch.get_num_threads()
    # fmt: off
    recorded(_C.cpu_matmul)(
        code, bf16_products, threads, M, N, more_N, K, a_transposed,
        a, w, more_w, out.dtype == w.dtype, out, more_out, sums, workspace,
    )
    # fmt: on


_kept = threading.local()
_KEEP_BYTES = 64 << 20
_KEEP_BYTES_A_THREAD = 2 << 20  # what the products of backward take, and then some


def workspace(size: int) -> Tensor:
    """Scratch for one call of the core, on the CPU, contents arbitrary.

    One buffer is kept per thread, up to a limit: glibc returns large ones to the system, and taking
    their pages anew cost up to a fifth of a call (H 1024 to 2048).
    """
    buffer: Tensor | None = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size <= max(_KEEP_BYTES, torch.get_num_threads() * _KEEP_BYTES_A_THREAD):
            _kept.buffer = buffer
    return buffer
