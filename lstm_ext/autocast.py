"""Weights as autocast casts them: once for as long as it is on."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lstm_ext.engine import is_recording


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight in autocast's dtype, where autocast is on for its device and nothing else is around.

    Of a matrix that is a parameter this is the tensor that autocast keeps until it ends: a loop
    over a cell would cast all of them at every step. torch has no question for that tensor. But
    autocast puts it into a product, which saves it for backward: one with no columns, that costs
    some 5 us.
    """
    if (
        weight.dtype == torch.float32
        and weight.dim() == 2
        and weight.is_leaf
        and weight.requires_grad
        and not weight.is_inference()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    ):
        with torch.inference_mode(False), torch.enable_grad():
            product = torch.mm(weight, _no_columns(weight.size(1), weight.device))
        kept: Any = getattr(product.grad_fn, "_saved_self", None)
        if kept is None or kept is weight:
            return weight.to(dtype)
        if kept.dtype == dtype and (kept.requires_grad or not is_recording()):
            version = getattr(kept, "_version_of_weight", None)
            if version is None:
                kept._version_of_weight = version = weight._version
            if version == weight._version:  # else an optimizer took a step under autocast
                return kept
    return weight.to(dtype)


@functools.lru_cache(maxsize=64)
def _no_columns(rows: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(rows, 0, dtype=torch.float32, device=device).requires_grad_()
