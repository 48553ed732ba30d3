"""The floor of a time step: what the exchange of h between blocks takes, and nothing else.

Every step of a recurrence hands h of all units to every block that needs it, however little else
the step does. ``bench.floor`` measures the ways of doing so on the GPU at hand; the floor of a
problem is the fastest of them at the problem's own size. The products over all steps are not in it.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.suites import PASSES, Problem

# Bytes of weights that a block can keep: shared memory, and the registers that its sums leave.
KEPT_BY_A_BLOCK = (227 + 144) << 10
# A barrier is an exchange of nothing where the exchange has it in it.
BARRIER, BARRED = "barrier through L2", "exchange through L2"
CLUSTER = "exchange through a cluster"  # and what follows: how
WORDS = "exchange, words with their step"  # of 4 bytes an element; forward's only

Way = tuple[str, int, int]  # what, blocks, blocks that exchange
Point = tuple[float, float]  # bytes, microseconds


class Floor:
    """What ``bench.floor`` has written.

    Raises:
        ValueError: the file has no exchange in it.
    """

    def __init__(self, path: Path) -> None:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        self.ways: dict[Way, list[Point]] = defaultdict(list)
        self.launch = [e["us"] for e in lines if e.get("what") == "launch in a graph"]
        for entry in lines:
            what = entry.get("what", "")
            if what.startswith("exchange"):
                way = (what, entry["blocks"], entry["per_group"])
                self.ways[way].append((entry["bytes"], entry["us"]))
        for entry in lines:
            if entry.get("what") == BARRIER:
                way = (BARRED, entry["blocks"], entry["per_group"])
                if way in self.ways:
                    self.ways[way].append((0, entry["us"]))
        if not self.ways:
            raise ValueError(f"{path} has no exchange of h: it is not what bench.floor writes")
        for points in self.ways.values():
            points.sort()

    def us_per_step(self, problem: Problem, mode: str, itemsize: int) -> float:
        """Microseconds a step, all layers and directions together, as the reports count them."""
        forward = min(self._exchanges(problem, itemsize, backward=False))
        backward = min(self._exchanges(problem, itemsize, backward=True))
        one = forward if mode == "inference" else (forward + backward) * PASSES[mode] / 2
        return problem.num_layers * one

    def _exchanges(self, problem: Problem, itemsize: int, *, backward: bool) -> Iterator[float]:
        yield from self.launch
        H = problem.hidden_size
        weights = 4 * H * (problem.proj_size or H) * itemsize
        directions = 2 if problem.bidirectional else 1
        for (what, blocks, group), points in self.ways.items():
            if weights > group * KEPT_BY_A_BLOCK or (backward and what == WORDS):
                continue
            groups = max(1, blocks // group // directions)
            sequences = -(-problem.batch // groups)
            of_unit = 4 if what == WORDS else itemsize
            if backward:  # sums in fp32 through a cluster, the gradients of four gates through L2
                of_unit = 4 if what.startswith(CLUSTER) else 4 * itemsize
            yield interpolate(points, sequences * H * of_unit)


def interpolate(points: Sequence[Point], x: float) -> float:
    """Between sorted points, past the last on the line of the last two; before the first: its."""
    if x <= points[0][0] or len(points) == 1:
        return points[0][1]
    end = min(max(bisect.bisect_left([p[0] for p in points], x), 1), len(points) - 1)
    ((x0, y0), (x1, y1)) = next(itertools.islice(itertools.pairwise(points), end - 1, None))
    return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
