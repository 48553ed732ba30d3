"""What a tensor is asked wherever one comes in: is it dense, does autocast cast it."""

from __future__ import annotations

import torch
from torch import Tensor


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises RuntimeError for a sparse or nested tensor."""
    if tensor.is_nested:
        words = "a nested tensor: use to_padded_tensor() and, of sequences, lengths="
        raise RuntimeError(f"Expected {name} to be dense, got {words}")
    if tensor.layout is not torch.strided:
        raise RuntimeError(f"Expected {name} to be dense, got {tensor.layout}: use to_dense()")


def is_autocast(dtype: torch.dtype) -> bool:
    """Whether autocast casts tensors of a dtype, as its lower-precision list does."""
    return dtype.is_floating_point and dtype != torch.float64
