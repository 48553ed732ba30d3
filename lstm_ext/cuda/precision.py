"""The precision of float32 products on CUDA: nn.LSTM's, whatever that of other products is."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch

# torch 2.9 and later have a setting for each kind of operation; before, one flag for each library.
_get_precision = getattr(torch._C, "_get_fp32_precision_getter", None)
_set_precision = getattr(torch._C, "_set_fp32_precision_setter", None)


def lstm_uses_tf32() -> bool:
    """Whether float32 LSTMs may round the operands of their products to TF32.

    The setting that nn.LSTM obeys on cuDNN: torch.backends.cudnn.allow_tf32 (on by default), or
    torch.backends.cudnn.rnn.fp32_precision.
    """
    if _get_precision is not None:
        return _get_precision("cuda", "rnn") == "tf32"
    return torch._C._get_cudnn_allow_tf32()


def _own_precision() -> str:
    """The setting of float32 products on CUDA itself: "none" where it follows a wider one."""
    effective = _get_precision("cuda", "matmul")
    if effective != "none":
        _set_precision("cuda", "matmul", "none")
        if _get_precision("cuda", "matmul") == effective:
            return "none"
    return effective


class _Products:
    """``with _Products(tf32):`` torch's float32 products on CUDA run at the LSTM's precision.

    cuBLAS has a setting of its own (exact by default, where cuDNN's is TF32), and it is the
    process's: autograd has a thread for each device, so the first who needs another setting makes
    it, the last one puts the user's back. A float32 product of another thread meanwhile may see it.
    """

    _lock = threading.Lock()
    _inside = 0
    _before: Any = None  # the user's own setting, if it had to be changed

    def __init__(self, tf32: bool) -> None:
        self._tf32 = tf32

    def __enter__(self) -> None:
        kind = type(self)
        with kind._lock:
            if kind._inside == 0 and self._differs():
                kind._before = self._read()
                self._write("tf32" if self._tf32 else "ieee")
            kind._inside += 1

    def __exit__(self, *_: object) -> None:
        kind = type(self)
        with kind._lock:
            kind._inside -= 1
            if kind._inside == 0 and kind._before is not None:
                self._write(kind._before)
                kind._before = None

    def _differs(self) -> bool:
        if _get_precision is None:
            return torch._C._get_cublas_allow_tf32() != self._tf32
        return (_get_precision("cuda", "matmul") == "tf32") != self._tf32

    @staticmethod
    def _read() -> str:
        if _get_precision is None:
            return "tf32" if torch._C._get_cublas_allow_tf32() else "ieee"
        return _own_precision()

    @staticmethod
    def _write(value: str) -> None:
        if _set_precision is None:
            torch._C._set_cublas_allow_tf32(value == "tf32")
        else:
            _set_precision("cuda", "matmul", value)


def products_in(dtype: torch.dtype, tf32: bool) -> contextlib.AbstractContextManager[None]:
    """Products of layers in ``dtype``; only float32 has a choice."""
    return _Products(tf32) if dtype == torch.float32 else contextlib.nullcontext()
