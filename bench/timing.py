"""How a row is timed.

All modules get the same weights, the same inputs and the same cotangent. Each is first checked to
compute what nn.LSTM computes in float64. They are timed in turn (A B A B …) in one process, so that
a change of clock speed or a busy neighbour falls on all. A ratio is taken within each turn before
any median.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

import lstm_ext
from bench.machine import l2_bytes, peak_memory
from bench.records import OURS, PEER
from bench.suites import QUANTIZED, Problem
from bench.work import (
    Input,
    LSTMClass,
    build_on,
    error_of,
    make_call,
    make_inputs,
    outcome,
    rounding,
    values,
)

#: From an nn.LSTM (or work.Chain), on its device and in its dtype, its problem and the mode: a
#: module of the same weights, called with a (T, B, I) tensor or a PackedSequence, that returns
#: nn.LSTM's pair. Whatever it raises is the reason why it cannot run the problem.
Builder = Callable[[nn.Module, Problem, str], nn.Module]


@dataclass
class Timing:
    """Raw samples of one module: seconds a call, ``inner`` calls a sample.

    off_by: largest difference from nn.LSTM in float64, relative to a tensor's largest element.
    allowed: what it may be; None for nn.LSTM, the yardstick.
    peak_bytes, host_us: what one call needs beside its inputs; the time of the thread that calls.
    """

    samples: list[float] = field(default_factory=list)
    inner: int = 0
    error: str | None = None
    off_by: float | None = None
    allowed: float | None = None
    peak_bytes: int | None = None
    host_us: float | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    @property
    def differs(self) -> bool:
        """Whether the module computes something else than nn.LSTM."""
        return self.off_by is not None and self.allowed is not None and self.off_by > self.allowed


@dataclass
class Row:
    """One problem in one mode, with the timing of each module by its name.

    floor_us: microseconds that a step cannot do without (``bench.limits``), if measured.
    bound: seconds that a call cannot do without (``bench.roofline``), if measured.
    round_trips: nanoseconds of ``cpu_limits.round_trip`` before and after, if measured.
    """

    problem: Problem
    mode: str
    timings: dict[str, Timing]
    floor_us: float | None = None
    bound: float | None = None
    round_trips: list[float] | None = None

    @property
    def ours(self) -> Timing:
        return self.timings[OURS]

    @property
    def peer(self) -> Timing:
        return self.timings[PEER]

    def ratios(self, name: str = PEER) -> list[float]:
        """A peer's time over ours, turn by turn; above 1 we are faster. Empty if one failed."""
        peer = self.timings[name]
        if peer.error or self.ours.error:
            return []
        return [a / b for a, b in zip(peer.samples, self.ours.samples, strict=True)]

    def ratio(self, name: str = PEER) -> float | None:
        ratios = self.ratios(name)
        return statistics.median(ratios) if ratios else None


def drop_in(lstm: LSTMClass) -> Builder:
    """The builder of a class with nn.LSTM's constructor and state dict. In the mode quantized: of
    what nn.LSTM becomes by torch's quantization, and lstm_ext.LSTM by its own."""

    def make(reference: nn.Module, problem: Problem, mode: str) -> nn.Module:
        like = next(reference.parameters())
        module = build_on(like.device, like.dtype, lstm, problem)
        module.load_state_dict(reference.state_dict())
        return quantized(module) if mode == QUANTIZED else module

    return make


def quantized(module: nn.Module) -> nn.Module:
    """With weights of 8 bits; of lstm_ext's modules by lstm_ext, else by torch."""
    holder = nn.ModuleList([module])
    if any(isinstance(part, lstm_ext.LSTM) for part in module.modules()):
        return lstm_ext.quantize(holder)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        kinds = {nn.LSTM}
        return torch.ao.quantization.quantize_dynamic(holder.eval(), kinds, dtype=torch.qint8)[0]


# So many calls fit a GPU's queue of launches: past it the thread that launches has to wait.
HOST_CALLS = 50


def seconds(
    call: Callable[[], object], times: int, device: torch.device, host: bool = False
) -> float:
    """Seconds that ``times`` calls take: the wall clock on a CPU, events on a GPU.

    host: what the calling thread takes on a GPU that is idle at first, and is not waited for.
    """
    if device.type != "cuda" or host:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(times):
            call()
        spent = time.perf_counter() - begin
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return spent
    begin_event = torch.cuda.Event(enable_timing=True)
    end_event = torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(device)
    torch.cuda.synchronize(device)
    begin_event.record(stream)
    for _ in range(times):
        call()
    end_event.record(stream)
    torch.cuda.synchronize(device)
    return begin_event.elapsed_time(end_event) / 1e3


def warm_up(call: Callable[[], object], min_sample: float, device: torch.device) -> int:
    """Runs ``call`` until it is warm; returns how many calls last ``min_sample`` seconds."""
    times = 1
    seconds(call, times, device)  # The first call allocates and picks kernels.
    while (spent := seconds(call, times, device)) < min_sample:
        # Aim a little past the target, but never trust one short sample by more than ten times.
        times = min(10 * times, math.ceil(1.2 * times * min_sample / max(spent, 1e-9)))
    if times == 1:
        return 1
    # One sample that a neighbour slowed down would make every later one too short.
    fastest = min(spent, *(seconds(call, times, device) for _ in range(2)))
    return math.ceil(times * min_sample / fastest)


def samples_in_turn(
    modules: Sequence[nn.Module],
    x: torch.Tensor,
    mode: str,
    repeats: int,
    min_sample: float,
    device: torch.device,
) -> list[list[float]]:
    """Seconds of a call of each module, turn by turn, without a check of what they compute."""
    calls = []
    for module in modules:
        call = make_call(module, [x], mode, torch.randn_like(module(x)[0]))
        calls.append((call, warm_up(call, min_sample, device)))
    return [[seconds(call, inner, device) / inner for call, inner in calls] for _ in range(repeats)]


def free_memory(device: torch.device) -> None:
    """Gives back what the last row, or a module that ran out of memory, left in torch's cache."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def truth_of(
    reference: nn.Module, x: Input, mode: str, cotangent: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What nn.LSTM computes in float64, on its device or, where that is too small, on the CPU."""

    def compute(device: torch.device) -> dict[str, torch.Tensor]:
        exact = copy.deepcopy(reference).to(device, torch.float64)
        return outcome(exact, x.to(device, torch.float64), mode, cotangent.to(device))

    device = next(reference.parameters()).device
    try:
        return compute(device)
    except torch.OutOfMemoryError:
        free_memory(device)
    return compute(torch.device("cpu"))


def run_row(
    problem: Problem,
    mode: str,
    builders: Mapping[str, Builder],
    *,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    min_sample: float,
    host: bool = False,
) -> Row:
    """Times one problem; whatever one module cannot run is said in its ``error``.

    builders: by name, in the order of a turn; those of ``PEER`` and ``OURS`` among them.
    host: the time of the calling thread alone (see ``seconds``), in samples of ``HOST_CALLS``.
    """
    torch.manual_seed(0)
    free_memory(device)
    row = Row(problem, mode, {name: Timing() for name in builders})
    reference = build_on(device, dtype, nn.LSTM, problem)
    inputs = make_inputs(problem, dtype, device, l2_bytes(device))
    directions = list(problem.layer_shapes())[-1][1]
    width = directions * (problem.proj_size or problem.hidden_size)
    first = values(inputs[0])
    cotangent = torch.randn(*first.shape[:-1], width, device=first.device).to(first)

    truth = truth_of(reference, inputs[0], mode, cotangent)

    calls: list[tuple[Timing, Callable[[], torch.Tensor]]] = []
    for name, builder in builders.items():
        timing = row.timings[name]
        try:
            module = builder(reference, problem, mode)
            found = outcome(module, inputs[0], mode, cotangent)
            if found["output"].dtype != dtype:
                raise ValueError(f"the output is {found['output'].dtype}, expected {dtype}")
            timing.off_by = error_of(found, truth)
            del found
            if name != PEER:
                yardstick = row.timings[PEER].off_by if PEER in row.timings else None
                timing.allowed = 2 * (yardstick or 0) + rounding(dtype, device)
            call = make_call(module, inputs, mode, cotangent)
            timing.peak_bytes = peak_memory(call, device)
            timing.inner = warm_up(call, min_sample, device)
            if device.type == "cuda":
                timing.host_us = 1e6 * seconds(call, HOST_CALLS, device, True) / HOST_CALLS
            if host:
                timing.inner = min(timing.inner, HOST_CALLS)
        except Exception as error:  # A row that a module refuses is a result, not a crash.
            timing.error = one_line(error)
            free_memory(device)
        else:
            calls.append((timing, call))

    del truth
    for _ in range(repeats):
        for timing, call in calls:
            spent = seconds(call, timing.inner, device, host)
            timing.samples.append(spent / timing.inner)
    return row
