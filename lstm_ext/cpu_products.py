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


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (m, k) times the transpose of w (n, k), plus bias (n)."""
    if (
        _onednn_linear
        and x.dtype == torch.float32
        and x.size(0) * x.size(1) * w.size(0) >= _ONEDNN_MIN_MACS
        and torch.backends.mkldnn.enabled
        # With fewer threads than it asked for, oneDNN leaves parts of its result unwritten.
        and _C.openmp_grants(torch.get_num_threads())
    ):
        # It reads the bias as if it were contiguous.
        bias = None if bias is None else bias.contiguous()
        return _onednn_linear(x, w, bias, "none", [], "")
    return torch.nn.functional.linear(x, w, bias)


def matmul(a: Tensor, w: Tensor, *, a_transposed: bool = False) -> Tensor:
    """a w for a (m, k), or transposed (k, m), and w (k, n); in a's dtype.

    That is w's acc type, or bfloat16 for both: then it is a product by torch, which runs near the
    processor's peak (700 to 880 GFLOP/s of 960, 600 or more rows, on two Zen 5 cores).
    """
    if a.dtype == torch.bfloat16:
        return torch.mm(a.t() if a_transposed else a, w)
    K, M = a.shape if a_transposed else a.shape[::-1]
    N = w.size(1)
    out = a.new_empty(M, N) if K else a.new_zeros(M, N)
    if not out.numel() or not K:
        return out
    if a.dtype == w.dtype and (K if a_transposed else M) == 1:
        # Packing w for a single row costs more than the product: torch took about half the time
        # (H 32 to 256, on the same machine).
        return torch.mm(a.t() if a_transposed else a, w, out=out)
    a, w = a.contiguous(), w.contiguous()
    code, threads = DTYPE_CODE[w.dtype], torch.get_num_threads()
    recorded(_C.cpu_matmul)(code, threads, M, N, K, a_transposed, a, w, out, workspace)
    return out


_kept = threading.local()
_KEEP_BYTES = 64 << 20


def workspace(size: int) -> Tensor:
    """Scratch for one call of the core, on the CPU, contents arbitrary.

    One buffer is kept per thread, up to a limit: glibc returns large ones to the system, and taking
    their pages anew cost up to a fifth of a call (H 1024 to 2048).
    """
    buffer: Tensor | None = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size <= _KEEP_BYTES:
            _kept.buffer = buffer
    return buffer
