"""What tests of the CUDA engine's short way share: see test_cuda_plain.py. The fixture ``short`` is
conftest.py's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import device
import pytest
import torch
from device import here
from emulated import installed
from torch import Tensor

import lstm_ext
from lstm_ext import ops

EMULATOR = pytest.mark.cpu_only(reason="the emulator runs on tensors of the CPU")
I, H = 5, 19
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: Against the layer's way: the largest difference, relative to the largest element.
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Short:
    """Stands before an engine's ``plain``: counts what goes the short way, or refuses it all."""

    def __init__(self, core: Any) -> None:
        self.core, self.refuses = core, False
        self.forwards: list[bool] = []
        self.backwards: list[bool] = []

    def _told(self, made: Any, calls: list[bool]) -> Any:
        calls.append(made is not None)
        return made

    def cuda_forward(self, *args: Any) -> Any:
        return self._told(None if self.refuses else self.core.cuda_forward(*args), self.forwards)

    def cuda_backward(self, *args: Any) -> Any:
        return self._told(None if self.refuses else self.core.cuda_backward(*args), self.backwards)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def engine() -> Iterator[Any]:
    """The device's own engine on a GPU, else an emulated one."""
    if device.NAME == "cuda":
        yield ops._engines[device.DEVICE.type]
    else:
        with installed() as emulated:
            yield emulated


def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return here(torch.randn(*size, dtype=dtype))


def lstm(*args: Any, **kwargs: Any) -> lstm_ext.LSTM:
    return here(lstm_ext.LSTM(*args, **kwargs))


def both_ways(short: Short, run: Callable[[], Any], dtype: torch.dtype) -> Any:
    """What run() returns, after it was found to be nearly the same by the layer's way."""
    short.forwards.clear()
    short.backwards.clear()
    ours = run()
    taken = short.forwards + short.backwards
    assert taken and all(taken)
    short.refuses = True
    theirs = run()
    short.refuses = False
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        scale = b.abs().max().item() if b.numel() else 0
        torch.testing.assert_close(a, b, rtol=0, atol=CLOSE[dtype] * scale)
    return ours


def module_both_ways(
    short: Short,
    module: lstm_ext.LSTM,
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> None:
    """both_ways, with all that a module returns, with and without gradients, and the gradients."""
    inputs = [x, *(hx or ()), *module.parameters()]

    def run() -> list[Tensor]:
        y, last = module(x, hx)
        with torch.no_grad():
            alone = module(x, hx)
        results = [y, *last, alone[0], *alone[1], *gradients([y, *last], inputs)]
        for output in module(x, hx)[1]:  # the other gradients are None then
            results += torch.autograd.grad(output.sum(), inputs, retain_graph=True)
        return results

    both_ways(short, run, dtype)
    assert short.forwards.count(True) == 3 and short.backwards.count(True) == 3


def gradients(outputs: list[Tensor], inputs: list[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    return torch.autograd.grad(outputs, inputs, [torch.randn_like(t) for t in outputs])


def calls_of_torch(run: Callable[[], Any]) -> list[str]:
    """Names of the operations, but those that only look at or wrap a tensor."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    free = ("aten::detach", "detach")
    names = [e.name for e in profile.events() if e.name.startswith("aten::")]
    return sorted(n for n in names if n not in free)
