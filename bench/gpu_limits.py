"""What a GPU can do at most, measured with torch: a product of large matrices, a copy in memory.

The weights of a recurrence are not read from memory at each step where the caches, or the blocks
themselves, keep them: what a step cannot do without is what ``bench.floor`` measures.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.timing import seconds, warm_up


def measure(
    dtype: torch.dtype, device: torch.device, *, size: int = 8192, repeats: int = 5
) -> dict[str, Any]:
    """The fastest of the repeats; as ``cpu_limits.measure`` with one thread and no caches.

    float32 products run in TF32 where nn.LSTM's would (torch.backends.cudnn.allow_tf32).

    Returns:
        gflops: {"float32": {"1": …}} or of another dtype; its products of (size, size) matrices.
        copy_gb_per_s: read and written, of a buffer of 4·size² bytes.
    """
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.zeros(4 * size * size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def best(call: Any) -> float:
        times = warm_up(call, 0.01, device)
        return min(seconds(call, times, device) / times for _ in range(repeats))

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32
    try:
        product = best(lambda: torch.mm(a, b, out=out))
    finally:
        matmul.allow_tf32 = before
    copy = best(lambda: target.copy_(source))
    name = str(dtype).removeprefix("torch.")
    return {
        "threads": 1,
        "device": device.type,
        "cache_bytes": {},
        "gflops": {name: {"1": 2 * size**3 / product / 1e9}},
        "gb_per_s": {},
        "copy_gb_per_s": 2 * source.numel() / copy / 1e9,
    }


def table(limits: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| limit | |", "| --- | --- |"]
    for dtype, values in limits["gflops"].items():
        lines.append(f"| products of large matrices in {dtype} | {values['1']:.0f} GFLOP/s |")
    return [*lines, f"| copies in memory | {limits['copy_gb_per_s']:.0f} GB/s |"]
