"""The products over all steps of the CUDA engine."""

from __future__ import annotations

from typing import Any

import torch


def open_vendor(core: Any) -> str:
    """Opens cuBLASLt, the one that torch has loaded, for the core's own calls of it.

    Returns:
        Why it cannot be used; empty if it can.
    """
    version = torch.version.cuda
    if version is None:
        return f"torch {torch.__version__} is built without CUDA"
    return core.cuda_open_vendor(f"libcublasLt.so.{version.split('.')[0]}")
