"""What one row runs, and how it is timed.

Both modules get the same weights, the same input and the same cotangent, and are timed in
turn (A B A B …) in one process, so that a change of clock speed or a busy neighbour falls on
both. A ratio is taken within each pair of neighbouring samples before any median.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from bench.suites import Problem

LSTMClass = Callable[..., nn.Module]


@dataclass
class Timing:
    """Raw samples of one module: seconds a call, ``inner`` calls a sample."""

    samples: list[float] = field(default_factory=list)
    inner: int = 0
    error: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None


@dataclass
class Row:
    """One problem in one mode. ``peer`` is nn.LSTM, ``ours`` is lstm_ext.LSTM.

    ``floor_us``: microseconds that a step cannot do without (``bench.limits``), if measured.
    """

    problem: Problem
    mode: str
    peer: Timing
    ours: Timing
    floor_us: float | None = None

    @property
    def ratios(self) -> list[float]:
        """nn.LSTM's time over ours, pair by pair; above 1 we are faster. Empty if one failed."""
        if self.peer.error or self.ours.error:
            return []
        return [a / b for a, b in zip(self.peer.samples, self.ours.samples, strict=True)]

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None


class Chain(nn.Module):
    """LSTMs one after the other, for stacks that no single nn.LSTM describes."""

    def __init__(self, *lstms: nn.Module):
        super().__init__()
        self.lstms = nn.ModuleList(lstms)

    def forward(self, x):
        state = None
        for lstm in self.lstms:
            x, state = lstm(x)
        return x, state


def build(lstm: LSTMClass, problem: Problem) -> nn.Module:
    """The problem's module, made of ``lstm`` (nn.LSTM or a drop-in for it)."""
    if not problem.first_bidirectional:
        return lstm(
            problem.input_size,
            problem.hidden_size,
            num_layers=problem.num_layers,
            bidirectional=problem.bidirectional,
            proj_size=problem.proj_size,
        )
    first = lstm(problem.input_size, problem.hidden_size, bidirectional=True)
    rest = lstm(2 * problem.hidden_size, problem.hidden_size, num_layers=problem.num_layers - 1)
    return Chain(first, rest)


def make_input(
    problem: Problem, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | PackedSequence:
    """Standard normal input, (T, B, I) or packed."""
    x = torch.randn(problem.steps, problem.batch, problem.input_size)
    x = x.to(device=device, dtype=dtype)
    if problem.lengths is None:
        return x
    return pack_padded_sequence(x, torch.tensor(problem.lengths), enforce_sorted=False)


def values(sequence: torch.Tensor | PackedSequence) -> torch.Tensor:
    return sequence.data if isinstance(sequence, PackedSequence) else sequence


def make_call(
    module: nn.Module, x: torch.Tensor | PackedSequence, mode: str, cotangent: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """A function without arguments that does one unit of work and returns the output.

    Inference is a forward pass in eval mode. Training is a forward pass and the gradients of
    ``sum(output * cotangent)`` with respect to every parameter and the input; the cotangent is
    handed to backward as such, which keeps the product and the sum out of the timing.
    """
    if mode == "inference":
        module.eval()

        def forward() -> torch.Tensor:
            with torch.inference_mode():
                return values(module(x)[0])

        return forward

    module.train()
    leaf = values(x).detach().clone().requires_grad_()
    x = x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf
    wanted = [leaf, *module.parameters()]

    def step() -> torch.Tensor:
        output = values(module(x)[0])
        output.backward(cotangent)
        # Dropped here and not before the next call: gradients that one module keeps while the
        # other is timed push the other's to the top of the heap, which malloc gives back to the
        # system at each call. nn.LSTM beside itself then read 0.74 (T25 B1 H1024).
        for tensor in wanted:
            tensor.grad = None
        return output

    return step


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


def free_memory(device: torch.device) -> None:
    """Gives back what the last row, or a module that ran out of memory, left in torch's cache."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def run_row(
    problem: Problem,
    mode: str,
    peer: LSTMClass,
    ours: LSTMClass,
    *,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    min_sample: float,
    host: bool = False,
) -> Row:
    """Times one problem; whatever one module cannot run is said in its ``error``.

    host: the time of the calling thread alone (see ``seconds``), in samples of ``HOST_CALLS``.
    """
    torch.manual_seed(0)
    free_memory(device)
    row = Row(problem, mode, Timing(), Timing())
    reference = build(peer, problem)
    x = make_input(problem, dtype, device)
    directions = list(problem.layer_shapes())[-1][1]
    width = directions * (problem.proj_size or problem.hidden_size)
    cotangent = torch.randn(*values(x).shape[:-1], width).to(values(x))

    calls: list[tuple[Timing, Callable[[], torch.Tensor]]] = []
    for timing, lstm in ((row.peer, peer), (row.ours, ours)):
        try:
            module = build(lstm, problem)
            module.load_state_dict(reference.state_dict())
            call = make_call(module.to(device=device, dtype=dtype), x, mode, cotangent)
            output = call()
            if output.shape != cotangent.shape or output.dtype != dtype:
                raise ValueError(
                    f"the output is {tuple(output.shape)} {output.dtype}, "
                    f"expected {tuple(cotangent.shape)} {dtype}"
                )
            del output
            timing.inner = warm_up(call, min_sample, device)
            if host:
                timing.inner = min(timing.inner, HOST_CALLS)
        except Exception as error:  # A row that a module refuses is a result, not a crash.
            timing.error = one_line(error)
            free_memory(device)
        else:
            calls.append((timing, call))

    for _ in range(repeats):
        for timing, call in calls:
            spent = seconds(call, timing.inner, device, host)
            timing.samples.append(spent / timing.inner)
    return row


def geometric_means(rows: list[Row]) -> Mapping[str, float]:
    """Geometric mean of the rows' ratios, for each mode that has any and for all."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.ratio is not None:
            groups.setdefault(row.mode, []).append(row.ratio)
            groups.setdefault("all", []).append(row.ratio)
    return {name: statistics.geometric_mean(group) for name, group in groups.items()}
