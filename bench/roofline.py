"""What a call cannot do without: its arithmetic, and on a CPU reading its weights at each step.

The products over all steps (of the input, of the weights' gradients) can run at the peak of the
multiply-adds. The recurrence cannot: each step of it needs the last one's result, and reads all of
W_hh. It takes the longer of its arithmetic and of reading the weights from the nearest caches that
hold them, all threads sharing them out. On a GPU the weights may stay where they are used: only
the arithmetic counts here, and ``bench.limits`` has the floor of a step.
"""

from __future__ import annotations

from typing import Any

from bench.suites import PASSES, QUANTIZED, Problem

# The peak that bounds a dtype; half types are computed in float32 where nothing better
# was measured.
PEAK_OF = {
    "float32": ("float32",),
    "float16": ("float16", "float32"),
    "bfloat16": ("bfloat16", "float32"),
}
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


def peak(limits: dict[str, Any], dtype: str) -> float | None:
    """Operations a second of all threads; None if not measured."""
    gflops = limits.get("gflops", {})
    for name in PEAK_OF.get(dtype, ()):
        if name in gflops:
            return 1e9 * gflops[name][str(limits["threads"])]
    return None


def read_seconds(limits: dict[str, Any], size: int) -> float:
    """To read that many bytes with all threads, each part from the nearest level with room left."""
    threads = limits["threads"]
    seconds, left, below = 0.0, float(size), 0
    for level, speeds in limits["gb_per_s"].items():
        room = limits["cache_bytes"].get(level)
        if room is not None:
            room = room if level == "L3" else room * threads  # of all cores
        part = left if room is None else min(left, max(0, room - below))
        seconds += part / (1e9 * speeds[str(threads)])
        left -= part
        below = max(below, room or 0)
    return seconds


def recurrent_bytes(problem: Problem, dtype: str) -> int:
    """Weights that one step of one direction reads."""
    H, P = problem.hidden_size, problem.proj_size
    return (4 * H * (P or H) + H * P) * ITEMSIZE[dtype]


def bound(problem: Problem, mode: str, dtype: str, limits: dict[str, Any]) -> float | None:
    """Seconds of one call; None where the limits or the dtype's peak are not known, as with weights
    of 8 bits."""
    speed = peak(limits, dtype)
    if speed is None or mode == QUANTIZED:
        return None
    H, P = problem.hidden_size, problem.proj_size
    lengths = problem.lengths or (problem.steps,) * problem.batch
    reading = read_seconds(limits, recurrent_bytes(problem, dtype))
    flop_of_row = 2 * (4 * H * (P or H) + H * P)
    running = (sum(length > t for length in lengths) for t in range(problem.steps))
    one_way = sum(max(flop_of_row * rows / speed, reading) for rows in running)

    directions = sum(count for _, count in problem.layer_shapes())
    recurrent_flop = directions * flop_of_row * problem.active_rows
    rest = problem.flop(mode) - PASSES[mode] * recurrent_flop
    return PASSES[mode] * directions * one_way + rest / speed


def weights_gb_per_s(problem: Problem, mode: str, dtype: str, seconds: float) -> float:
    """How fast the recurrence's weights were read, were the whole call spent on reading them."""
    directions = sum(count for _, count in problem.layer_shapes())
    size = recurrent_bytes(problem, dtype) * problem.steps * directions * PASSES[mode]
    return size / seconds / 1e9
