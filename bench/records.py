"""Records: JSON lines on disk, one row a line, so that an interrupted run can go on.

The first line has ``schema``, ``settings``, ``environment`` and ``limits``; then one line a row;
the last, once all rows are there, is ``{"complete": true, "seconds": …}``. Everything else (tables,
plots, comparisons) is made from records.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = 2
OURS, PEER = "lstm_ext", "nn.LSTM"
# What may differ between a run and the one it goes on with.
CHANGING = ("date",)


def read(path: Path) -> dict[str, Any]:
    """A record: ``settings``, ``environment``, ``limits``, ``rows``, ``complete``.

    A last line that was cut off in the middle is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a record, or one of another schema.
    """
    lines = path.read_text().splitlines()
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and number > 1:
                break
            raise ValueError(f"{path.name}, line {number}: {error}") from None
    head = entries[0] if entries and isinstance(entries[0], dict) else {}
    if head.get("schema") != SCHEMA:
        got = f"schema {head['schema']}" if "schema" in head else "no schema"
        raise ValueError(f"{path.name} is not a record of schema {SCHEMA}: it has {got}")
    complete = "complete" in entries[-1]
    return {
        **head,
        "rows": entries[1:-1] if complete else entries[1:],
        "complete": complete,
        "seconds": entries[-1].get("seconds") if complete else None,
    }


def same_run(head: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether rows of one may stand beside rows of the other."""

    def fixed(one: Mapping[str, Any]) -> dict[str, Any]:
        facts = {k: v for k, v in one["environment"].items() if k not in CHANGING}
        return {"settings": one["settings"], "environment": facts}

    # Through JSON, which makes lists of tuples.
    return json.loads(json.dumps(fixed(head))) == json.loads(json.dumps(fixed(other)))


class Writer:
    """Writes a record row by row. ``done``: rows of an interrupted run that it goes on with."""

    def __init__(self, path: Path, head: Mapping[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.done: list[dict[str, Any]] = []
        self.seconds = 0.0  # of the rows so far
        head = {"schema": SCHEMA, **head}
        if not fresh and path.exists():
            try:
                old = read(path)
                if not old["complete"] and same_run(old, head):
                    self.done = old["rows"]
                    head = {"schema": SCHEMA, **{k: old[k] for k in head if k != "schema"}}
            except (ValueError, KeyError):
                pass  # not ours to go on with
        self.seconds = sum(row.get("seconds", 0) for row in self.done)
        draft = path.with_name(path.name + ".part")
        draft.write_text("".join(json.dumps(entry) + "\n" for entry in (head, *self.done)))
        draft.replace(path)

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def add(self, row: Mapping[str, Any]) -> None:
        self.seconds += row.get("seconds", 0)
        self._append(row)

    def finish(self) -> None:
        self._append({"complete": True, "seconds": round(self.seconds, 1)})


# --- figures of a row as it stands in a record ------------------------------------------------


def key(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["name"], row["mode"]


def peers(record: Mapping[str, Any]) -> list[str]:
    """Names of the modules that stand beside lstm_ext's, in order."""
    names = dict.fromkeys(name for row in record["rows"] for name in row["modules"])
    return [name for name in names if name != OURS]


def counts(row: Mapping[str, Any], name: str = PEER) -> bool:
    """Whether a row has a ratio to the peer, and both compute nn.LSTM's function."""
    modules = row["modules"]
    return (
        name in modules
        and modules[name]["ratio"] is not None
        and not modules[name]["differs"]
        and not modules[OURS]["differs"]
    )


def geometric_means(record: Mapping[str, Any], name: str = PEER) -> dict[str, float]:
    """Of the ratios of a peer, by mode and for "all"; only of rows that count."""
    groups: dict[str, list[float]] = {}
    for row in record["rows"]:
        if counts(row, name):
            for group in (row["mode"], "all"):
                groups.setdefault(group, []).append(row["modules"][name]["ratio"])
    return {group: statistics.geometric_mean(values) for group, values in groups.items()}


def share_of_bound(row: Mapping[str, Any], name: str = OURS) -> float | None:
    """What a call cannot do without over what it took: 1 is the limit."""
    ms = row["modules"][name]["ms"]
    return None if row["bound_ms"] is None or ms is None else row["bound_ms"] / ms


def log_spread(samples: list[float]) -> float:
    """Standard deviation of the logarithms, from the median deviation: outliers do not count."""
    logs = [math.log(sample) for sample in samples]
    middle = statistics.median(logs)
    return 1.4826 * statistics.median(abs(log - middle) for log in logs)
