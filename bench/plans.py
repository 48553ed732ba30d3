"""``python -m bench.plans``: times every plan of the CUDA engine that could run a problem.

For tuning. The cost model (csrc/cuda/plan.cpp, costs.h) chooses among these plans; this tells what
each of them really takes, in microseconds a step of the recurrence alone (products over all steps
left out), how far its result is from the first plan's, and whether it gives the bits of all plans
that must give the same. One JSON line a plan.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.arguments import pattern
from bench.machine import environment
from bench.suites import SUITES, Problem
from lstm_ext import ops
from lstm_ext.cuda.engine import FAMILIES, CudaEngine
from lstm_ext.ops import Direction, DirectionGrads, LayerWeights
from lstm_ext.steps import Steps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_SUITES = ("deepbench-train", "deepbench-infer", "flashrnn")

Clock = Callable[[Callable[[], None]], float]  # microseconds that the work took on the device


def cuda_clock(work: Callable[[], None]) -> float:
    """Microseconds between two events around the work."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end)


class Stopwatch:
    """A native module whose recurrences are timed, one entry in ``times`` a call."""

    def __init__(self, core: Any, clock: Clock) -> None:
        self._core, self._clock, self.times = core, clock, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def cuda_forward(self, *arguments: Any) -> None:
        self.times.append(self._clock(lambda: self._core.cuda_forward(*arguments)))

    def cuda_backward(self, *arguments: Any) -> None:
        self.times.append(self._clock(lambda: self._core.cuda_backward(*arguments)))


class Layer:
    """One direction or two of a problem's first layer: inputs, and the calls of an engine."""

    def __init__(self, problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
        T, B, I, H = problem.steps, problem.batch, problem.input_size, problem.hidden_size
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

        count = 2 if problem.bidirectional else 1
        self.steps = Steps.padded(T, B, device=device)
        self.x, self.dy = draw(T * B, I), draw(T * B, count * H)
        self.directions = [
            Direction(
                draw(B, H),
                draw(B, H),
                LayerWeights(draw(4 * H, I, scale=I**-0.5), draw(4 * H, H, scale=H**-0.5)),
                k == 1,
            )
            for k in range(count)
        ]

    def forward(self, engine: CudaEngine) -> Any:
        return engine.layer_forward(self.x, self.directions, self.steps, save=True, cells=False)

    def backward(self, engine: CudaEngine, result: Any) -> tuple[torch.Tensor, ...]:
        """dh0 of each direction: what the whole recurrence flows into."""
        count, nothing = len(self.directions), [False] * 5
        _, grads = engine.layer_backward(
            self.dy,
            None,
            [None] * count,
            [None] * count,
            self.x,
            self.directions,
            result.y,
            list(zip(result.gates, result.c_seq, strict=True)),
            self.steps,
            wanted_x=False,
            wanted=[DirectionGrads(True, True, *nothing)] * count,
        )
        return tuple(grad.h0 for grad in grads)


def variants(plans: Sequence[Any], best: float, within: float) -> Iterator[Any]:
    """The plans that the model expects within a factor of ``best``, each grouping once."""
    seen = set()
    for plan in sorted(plans, key=lambda plan: plan.step_us):
        key = (plan.family, plan.m_tiles, plan.n_tiles, plan.group_rows, plan.held, plan.ahead)
        if plan.step_us <= within * best and key not in seen:
            seen.add(key)
            yield plan


def order_of_sums(plan: Any, backward: bool) -> tuple[Any, ...]:
    """Plans of which this is the same add up in the same order, and so give the same bits."""
    if FAMILIES[plan.family] == "vendor":
        return ("vendor",)
    if FAMILIES[plan.family] in ("step", "grid"):
        return ("step or grid",)
    if backward:
        return FAMILIES[plan.family], plan.m_tiles  # the units of a block
    # Or tagged, which differs in how h travels.
    # How many warps have the same k (warps_of_rows of csrc/cuda/tiles.h), and whether each makes
    # its sums as two (kSplit of product.cuh).
    warps = 2 if plan.m_tiles < 8 else 4
    return "cluster", warps, plan.m_tiles // warps * plan.n_tiles < 3


def difference(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest, relative to the largest element of a tensor."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, expected, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def chooser_of(engine_class: Callable[[Any], CudaEngine]) -> Callable[[Any], Any]:
    """Engines that run the plan they are told to, and list what there is."""

    class Chooser(engine_class):  # type: ignore[misc, valid-type]
        plan_to_run: Any = None

        def choose(self, problem: Any, device: torch.device) -> Any:
            self.problem = problem
            self.plans = self.core.cuda_plans(problem, self.properties(device))
            if self.plan_to_run is None:
                self.chosen = super().choose(problem, device)
                return self.chosen
            return self.plan_to_run

    return Chooser


def time_plans(
    engine_class: Callable[[Any], CudaEngine],
    core: Any,
    clock: Clock,
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
    *,
    within: float,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """One entry a pass and plan: its description, the model's figure and the measured one."""
    chooser = chooser_of(engine_class)
    layer = Layer(problem, dtype, device)
    result = layer.forward(chooser(core))

    def run(engine: CudaEngine, backward: bool) -> tuple[torch.Tensor, ...]:
        return layer.backward(engine, result) if backward else (layer.forward(engine).y,)

    for backward in (False, True):
        first = chooser(core)
        expected = run(first, backward)
        alike = {order_of_sums(first.chosen, backward): expected}
        for plan in variants(first.plans, first.chosen.step_us, within):
            stopwatch = Stopwatch(core, clock)
            engine = chooser(stopwatch)
            engine.plan_to_run = plan
            got = run(engine, backward)  # the first call is the warm-up
            same = alike.setdefault(order_of_sums(plan, backward), got)
            for _ in range(repeats):
                run(engine, backward)
            took = statistics.median(stopwatch.times[1:]) / problem.steps
            yield {
                "problem": problem.name,
                "dtype": str(dtype).removeprefix("torch."),
                "pass": "backward" if backward else "forward",
                "family": FAMILIES[plan.family],
                "plan": core.cuda_describe_plan(plan, engine.problem),
                "tile": [plan.m_tiles, plan.n_tiles],
                "grid": [plan.slices, plan.groups],
                "held": plan.held,
                "shared": plan.shared,
                "ahead": plan.ahead,
                "in_l2": plan.in_l2,
                "fetches": plan.fetches,
                "expected_us": plan.step_us,
                "measured_us": took,
                "chosen": plan.step_us == first.chosen.step_us,
                "same_bits": all(map(torch.equal, got, same)),
                "difference": difference(got, expected),
            }


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the lines; exit status 1 if plans that add up in the same order disagree in a bit."""
    parser = argparse.ArgumentParser(prog="python -m bench.plans", description=__doc__)
    parser.add_argument("--suite", action="append", choices=sorted(SUITES), default=None)
    parser.add_argument("--rows", type=pattern, default=pattern(""), metavar="REGEX")
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPES), default=None)
    parser.add_argument("--within", type=float, default=2.0, metavar="FACTOR")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON lines")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() or "cuda" not in ops._engines:
        print("bench.plans needs a GPU and a build of lstm_ext with CUDA", file=sys.stderr)
        return 2
    device = torch.empty(0, device="cuda").device
    problems = dict.fromkeys(
        problem
        for suite in options.suite or DEFAULT_SUITES
        for problem in SUITES[suite]
        if options.rows.search(problem.name) and not problem.proj_size
    )
    disagree = 0
    with options.out.open("w") as out:
        out.write(json.dumps({"environment": environment(device)}) + "\n")
        for problem in problems:
            for dtype in options.dtype or sorted(DTYPES):
                for entry in time_plans(
                    CudaEngine,
                    ops._engines["cuda"].core,
                    cuda_clock,
                    problem,
                    DTYPES[dtype],
                    device,
                    within=options.within,
                    repeats=options.repeats,
                ):
                    disagree += not entry["same_bits"]
                    out.write(json.dumps(entry) + "\n")
                    out.flush()
                    mark = "*" if entry["chosen"] else " "
                    took = f"{entry['measured_us']:8.2f} us a step"
                    print(f"{mark} {took}, off by {entry['difference']:.0e}  {entry['plan']}")
    if disagree:
        print(f"{disagree} plans disagree with those that must be the same", file=sys.stderr)
    return 1 if disagree else 0


if __name__ == "__main__":
    sys.exit(main())
