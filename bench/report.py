"""A row as it is written to a record and as it is printed on the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bench import records
from bench.records import OURS, PEER
from bench.roofline import weights_gb_per_s
from bench.timing import Row, Timing


def milliseconds(timing: Timing) -> float | None:
    """Median of one call in milliseconds; None where the module could not run."""
    return None if timing.median is None else timing.median * 1e3


def us_per_step(timing: Timing, row: Row) -> float | None:
    """Microseconds for one time step of the batch, all layers and directions together."""
    return None if timing.median is None else timing.median * 1e6 / row.problem.steps


def gflops(timing: Timing, row: Row) -> float | None:
    """Useful GFLOP/s, by ``Problem.flop``."""
    return None if timing.median is None else row.problem.flop(row.mode) / timing.median / 1e9


def of_floor(row: Row) -> float | None:
    """How many times the floor of a step lstm_ext takes; None where either is not known."""
    us = us_per_step(row.ours, row)
    return None if us is None or row.floor_us is None else us / row.floor_us


def _finite(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return "inf" if value == float("inf") else value


def _module_json(name: str, row: Row, dtype: str) -> dict[str, object]:
    timing, ratios = row.timings[name], row.ratios(name) if name != OURS else []
    known = timing.median is not None and row.bound is not None
    return {
        "ms": milliseconds(timing),
        "us_per_step": us_per_step(timing, row),
        "gflops": gflops(timing, row),
        "weights_gb_per_s": weights_gb_per_s(row.problem, row.mode, dtype, timing.median)
        if known
        else None,
        "ratio": row.ratio(name) if name != OURS else None,
        "ratio_min": min(ratios, default=None),
        "ratio_max": max(ratios, default=None),
        "peak_mb": None if timing.peak_bytes is None else timing.peak_bytes / 1e6,
        "host_us": timing.host_us,
        "off_by": _finite(timing.off_by),
        "allowed": timing.allowed,
        "differs": timing.differs,
        "calls_per_sample": timing.inner,
        "samples_ms": [sample * 1e3 for sample in timing.samples],
        "error": timing.error,
    }


def row_json(row: Row, dtype: str, seconds: float = 0) -> dict[str, object]:
    """A line of a record. seconds: what the row took, checks and warm-up too."""
    return {
        "name": row.problem.name,
        "mode": row.mode,
        "problem": dataclasses.asdict(row.problem),
        "flop": row.problem.flop(row.mode),
        "bound_ms": None if row.bound is None else row.bound * 1e3,
        "floor_us_per_step": row.floor_us,
        "of_floor": of_floor(row),
        "round_trip_ns": row.round_trips,
        "modules": {name: _module_json(name, row, dtype) for name in row.timings},
        "seconds": round(seconds, 2),
    }


_COLUMNS = (
    ("problem", 34, "<"),
    ("mode", 9, "<"),
    ("nn.LSTM ms", 11, ">"),
    ("lstm_ext ms", 11, ">"),
    ("ratio", 6, ">"),
    ("min..max", 12, ">"),
    ("µs/step", 8, ">"),
    ("/floor", 6, ">"),
    ("GFLOP/s", 8, ">"),
    ("of limit", 8, ">"),
)


def _line(cells: tuple[str, ...]) -> str:
    return "  ".join(
        f"{cell:{align}{width}}" for cell, (_, width, align) in zip(cells, _COLUMNS, strict=True)
    ).rstrip()


def table_head() -> str:
    """Names of the columns; those after the ratios are of lstm_ext."""
    head = _line(tuple(name for name, _, _ in _COLUMNS))
    return f"{head}\n{'-' * len(head)}"


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def ratio_range(module: Mapping[str, Any]) -> str:
    if module["ratio"] is None:
        return "-"
    return f"{module['ratio_min']:.2f}..{module['ratio_max']:.2f}"


def difference(module: Mapping[str, Any]) -> str:
    """How far a module is from nn.LSTM in float64, and how far it may be."""
    off = module["off_by"]
    off = off if isinstance(off, str) else f"{off:.1e}"
    return f"off by {off}, {module['allowed']:.1e} is allowed"


def table_row(row: Mapping[str, Any]) -> str:
    """One line of the table, one more for each other peer and each that differs or fails.

    row: of a record, as row_json makes it.
    """
    ours, peer = row["modules"][OURS], row["modules"][PEER]
    lines = [
        _line(
            (
                row["name"],
                row["mode"],
                number(peer["ms"], 3),
                number(ours["ms"], 3),
                number(peer["ratio"], 2),
                ratio_range(peer),
                number(ours["us_per_step"], 2),
                number(row["of_floor"], 2),
                number(ours["gflops"], 1),
                percent(records.share_of_bound(row)),
            )
        )
    ]
    for name, module in row["modules"].items():
        if module["error"]:
            lines.append(f"    {name} cannot run this: {module['error']}")
        elif name not in (OURS, PEER):
            ratio = f"ratio {number(module['ratio'], 2)} ({ratio_range(module)})"
            lines.append(f"    {name} {number(module['ms'], 3)} ms, {ratio}")
        if module["differs"]:
            lines.append(f"    {name} is not the same within tolerance: {difference(module)}")
    return "\n".join(lines)


def table_foot(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for name in records.peers({"rows": rows}):
        if means := records.geometric_means({"rows": rows}, name):
            parts = (f"{mode} {mean:.2f}" for mode, mean in means.items())
            lines.append(f"geometric mean of the ratios to {name}: " + ", ".join(parts))
    return "\n".join(lines) or "no row was run by both"
