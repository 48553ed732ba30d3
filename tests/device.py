"""Where the suite runs: `pytest --device=cuda`. Values are drawn on the CPU, then moved here.

`--device=emulated` runs the CUDA kernels too, on tensors of the CPU: see emulated.py.

conftest.py chooses before any test module is imported, so these may be read at import.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstm_ext import ops

NAME = "cpu"  # cpu, cuda or emulated
DEVICE = torch.device("cpu")
PLACES = ["cpu"]  # of lengths and reset masks, which the CPU may hold whatever the device
# CPU kernel sets to run a test with; on another device only its name. But for weights of 8 bits two
# of them are the same as the next.
ISAS = [name for name in ops.cpu_isas() if name not in ("avx512_vnni", "neon_dot")]
THREADS = [1, 2]


def choose(name: str, tf32: bool) -> None:
    """Sets the device of this process.

    Args:
        tf32: whether float32 products on CUDA may round their factors to TF32.

    Raises:
        RuntimeError: torch cannot use the device.
    """
    global NAME, DEVICE, PLACES, ISAS, THREADS
    NAME = name
    if name == "emulated":
        import emulated

        ISAS, THREADS = [name], [1]
        torch.backends.cudnn.allow_tf32 = tf32
        emulated.install()
        return
    if torch.device(name).type == "cpu":
        return
    # cuBLAS asks for this where a test turns on deterministic algorithms.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    DEVICE = torch.empty(0, device=name).device  # with its index, as tensors tell theirs
    PLACES = ["cpu", str(DEVICE)]
    ISAS, THREADS = [DEVICE.type], [1]
    torch.backends.cudnn.allow_tf32 = tf32


def tf32() -> bool:
    """Whether float32 is judged as TF32: its products may have factors of 11 bits."""
    return NAME != "cpu" and torch.backends.cudnn.allow_tf32


def here(value: Any) -> Any:
    """Tensors, modules, and tuples, lists and dicts of them, on the device; all else as it is.

    Meta tensors stay what they are. On the CPU nothing is copied.
    """
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to(DEVICE)
    if isinstance(value, nn.Module | PackedSequence):
        return value.to(DEVICE)
    if isinstance(value, tuple | list):
        return type(value)(here(item) for item in value)
    if isinstance(value, dict):
        return {key: here(item) for key, item in value.items()}
    return value


def leaf(value: Tensor) -> Tensor:
    """The values as a leaf on the device that requires grad."""
    return here(value).detach().requires_grad_()


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """nn.LSTM on CUDA without cuDNN, for what cuDNN refuses: a second derivative, backward in eval
    mode, more than 65535 sequences or steps. Does nothing on the CPU."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = before and DEVICE.type == "cpu"
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
