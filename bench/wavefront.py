"""``python -m bench.wavefront``: stacks of layers as a wavefront, beside the same layers in turn.

The wavefront is off by default, for it has never run on a GPU; this is what decides. In one run,
alternating (A B A B), with the same weights and inputs: the layers in turn ("off"), as a wavefront
in as many parts as the plan chooses ("on"), and in other numbers of parts ("2", "4", ...), whatever
the plan says, to correct its costs by. Modes: inference, training, and captured: inference in a
CUDA graph, where the calling thread's time does not count. Each is first held against nn.LSTM in
float64: it may be off by twice what the layers in turn are, and a rounding. One JSON line a row.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from bench.arguments import pattern
from bench.machine import environment
from bench.plans import DTYPES
from bench.suites import Problem, square
from bench.timing import drop_in, free_memory, one_line, seconds, truth_of, warm_up
from bench.work import build_on, error_of, make_call, make_input, outcome, rounding
from lstm_ext import LSTM, ops
from lstm_ext.cuda.engine import FAMILIES, CudaEngine
from lstm_ext.cuda.wavefront import plan_of

# Where the cost model expects a gain on an H100, and where none, for it may be wrong there too.
PROBLEMS = (
    *(square(1024, b, 768, num_layers=n) for b in (2, 16, 64) for n in (2, 4)),
    *(square(1000, b, h, num_layers=4) for b in (1, 8, 32, 64) for h in (256, 512)),
    *(square(t, 16, 512, num_layers=4) for t in (50, 200)),
    square(100, 64, 512, num_layers=4, label="appleyard"),
    square(100, 8, 128, num_layers=2),
    square(1000, 16, 512, num_layers=8),
)
MODES = ("inference", "training", "captured")
PARTS = (2, 4, 8, 16, 32)


def forced(engine_class: Callable[[Any], CudaEngine]) -> Callable[[Any], Any]:
    """Engines that take so many ``parts`` where there are clusters; None: what the plan says."""

    class Forced(engine_class):  # type: ignore[misc, valid-type]
        parts: int | None = None

        def choose_wavefront(self, problem: Any, device: torch.device, layers: int, T: int) -> Any:
            chosen = super().choose_wavefront(problem, device, layers, T)
            if self.parts is None:
                return chosen
            if chosen.parts > 1:
                return SimpleNamespace(parts=min(self.parts, T), plan=chosen.plan)
            plans = self.core.cuda_plans(problem, self.properties(device))
            clusters = [plan for plan in plans if FAMILIES[plan.family] == "cluster"]
            if not clusters:
                return chosen
            # Few clusters a layer, so that others have room.
            plan = min(clusters, key=lambda plan: (plan.groups, plan.step_us))
            return SimpleNamespace(parts=min(self.parts, T), plan=plan)

    return Forced


@contextlib.contextmanager
def installed(engine: Any, device: torch.device) -> Iterator[None]:
    """The package's layers on a kind of device run on this engine."""
    before = ops._engines[device.type]
    ops._engines[device.type] = engine
    try:
        yield
    finally:
        ops._engines[device.type] = before


def captured(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """The call as a CUDA graph, warm already."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_row(
    engine_class: Callable[[Any], CudaEngine],
    core: Any,
    problem: Problem,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    parts: Sequence[int],
    repeats: int,
    min_sample: float,
) -> dict[str, Any]:
    """One entry: medians and raw samples by way, seconds a call; which ways differ."""
    torch.manual_seed(0)
    free_memory(device)
    make, of_work = forced(engine_class), "training" if mode == "training" else "inference"
    reference = build_on(device, dtype, nn.LSTM, problem)
    x = make_input(problem, dtype, device)
    cotangent = torch.randn(problem.steps, problem.batch, problem.hidden_size, device=device)
    cotangent = cotangent.to(x)
    truth = truth_of(reference, x, of_work, cotangent)
    allowed, off_bits = 0.0, None
    ways: dict[str, dict[str, Any]] = {}
    calls: list[tuple[dict[str, Any], Any, Callable[[], object], int]] = []
    for name in ("off", "on", *map(str, parts)):
        engine = make(core)
        engine.wavefront = name != "off"
        engine.parts = int(name) if name.isdigit() else None
        way: dict[str, Any] = {"samples": []}
        ways[name] = way
        module = drop_in(LSTM)(copy.deepcopy(reference), problem, of_work)
        try:
            with installed(engine, device):
                found = outcome(module, x, of_work, cotangent)
                way["off_by"] = error_of(found, truth)
                if name == "off":
                    allowed, off_bits = 2 * way["off_by"] + rounding(dtype, device), found
                way["same_bits"] = all(torch.equal(found[k], off_bits[k]) for k in found)
                way["differs"] = way["off_by"] > allowed
                if engine.wavefront:
                    tf32 = engine.uses_tf32(x)
                    sizes = (problem.batch, problem.hidden_size, problem.num_layers, problem.steps)
                    way["parts"] = [
                        plan_of(engine, device, dtype, tf32, backward, *sizes).parts
                        for backward in (False, True)
                    ]
                call = make_call(module, [x], of_work, cotangent)
                inner = warm_up(call, min_sample, device)
                if mode == "captured":
                    call = captured(call)
                    inner = warm_up(call, min_sample, device)
        except Exception as error:  # what cannot run is a result
            way["error"] = one_line(error)
            continue
        calls.append((way, engine, call, inner))
    del truth, off_bits
    for _ in range(repeats):
        for way, engine, call, inner in calls:
            with installed(engine, device):
                way["samples"].append(seconds(call, inner, device) / inner)
    for way in ways.values():
        if way["samples"]:
            way["median"] = statistics.median(way["samples"])
            pairs = zip(ways["off"]["samples"], way["samples"], strict=bool(ways["off"]["samples"]))
            ratios = [a / b for a, b in pairs]
            way["ratio"] = statistics.median(ratios) if ratios else None
    return {
        "problem": problem.name,
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "ways": ways,
    }


def line_of(entry: dict[str, Any]) -> str:
    """For people: what each way gains over the layers in turn."""
    words = []
    for name, way in entry["ways"].items():
        ratio = way.get("ratio")
        text = way.get("error") or ("-" if ratio is None else f"{ratio:.2f}")
        words.append(f"{name}: {text}{' DIFFERS' if way.get('differs') else ''}")
    return f"{entry['problem']} {entry['dtype']} {entry['mode']}  {', '.join(words)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the lines; exit status 1 if a way computes something else, or fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.wavefront", description=__doc__)
    parser.add_argument("--rows", type=pattern, default=pattern(""), metavar="REGEX")
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPES), default=None)
    parser.add_argument("--mode", action="append", choices=MODES, default=None)
    parser.add_argument("--parts", type=int, nargs="*", default=PARTS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--min-sample", type=float, default=0.02, metavar="SECONDS")
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON lines")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() or "cuda" not in ops._engines:
        print("bench.wavefront needs a GPU and a build of lstm_ext with CUDA", file=sys.stderr)
        return 2
    device = torch.empty(0, device="cuda").device
    core: Any = ops._engines["cuda"].core
    wrong = 0
    with options.out.open("w") as out:
        out.write(json.dumps({"environment": environment(device)}) + "\n")
        for problem in PROBLEMS:
            if not options.rows.search(problem.name):
                continue
            for dtype in options.dtype or sorted(DTYPES):
                for mode in options.mode or MODES:
                    entry = time_row(
                        CudaEngine,
                        core,
                        problem,
                        mode,
                        DTYPES[dtype],
                        device,
                        parts=options.parts,
                        repeats=options.repeats,
                        min_sample=options.min_sample,
                    )
                    ways = entry["ways"].values()
                    wrong += any(way.get("differs") or "error" in way for way in ways)
                    out.write(json.dumps(entry) + "\n")
                    out.flush()
                    print(line_of(entry), flush=True)
    if wrong:
        print(f"{wrong} rows fail, or differ from nn.LSTM", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
