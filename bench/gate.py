"""``python -m bench gate``: a short run against this machine's own record; for CI.

Runs the suite "gate" in each dtype and fails where lstm_ext became clearly slower, in two runs one
after the other. Clearly: its speed-up over nn.LSTM, measured within a run, fell by more than a
factor and by more than several times the spread, or by that factor twice, whatever the spread; and
its own time rose likewise, since nn.LSTM may as well have become faster. A time alone never fails.
A row of the record that has no figure now fails. Where the cores are too busy to tell, it says so.
Without a record of a machine of this kind (processor, caches, cores, torch) there is nothing to
hold against, and it says so.

The records are those of `python -m bench --suite gate`, which `python -m bench publish` renews.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine, records
from bench.compare import Change, compare, summary, table, unlike

DTYPES = ("float32", "bfloat16")
FACTOR, SPREADS = 1.4, 4.0
FAILED = ("fails", "wrong", "missing")

Record = dict[str, Any]


def measure(dtype: str, names: Sequence[str] = ()) -> Record:
    """A record of the suite, or of the named problems, by a process of its own.

    Raises:
        RuntimeError: it could not run; says what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "gate.jsonl"
        command = [sys.executable, "-m", "bench", "--suite", "gate", "--dtype", dtype]
        command += ["--no-limits", "--out", str(out)]
        if names:
            command += ["--rows", f"^({'|'.join(map(re.escape, names))})$"]
        done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True)
        if not out.exists() or not (record := records.read(out))["complete"]:
            raise RuntimeError(f"the benchmark did not run:\n{done.stdout}{done.stderr}")
        return record


def regressions(old: Record, new: Record, factor: float) -> list[Change]:
    """Rows that fail, are wrong or missing, or slower by their ratio and by their own time."""

    def is_slower(change: Change) -> bool:
        far = change.change is not None and change.change < factor**-2
        return change.verdict == "slower" or (change.verdict == "unclear" and far)

    pairs = zip(
        compare(old, new, factor=factor, spreads=SPREADS),
        compare(old, new, factor=factor, spreads=SPREADS, times=True),
        strict=True,
    )
    return [
        ratio
        for ratio, time in pairs
        if ratio.verdict in FAILED or (is_slower(ratio) and is_slower(time))
    ]


def check(old: Record, dtype: str, factor: float = FACTOR) -> list[Change]:
    """The rows that regressed in two runs; prints what it finds."""
    new = measure(dtype)
    changes = compare(old, new, factor=factor, spreads=SPREADS)
    print("\n".join(table(changes)))
    print(f"{dtype}: {summary(changes)}", flush=True)
    unclear = sum(c.verdict == "unclear" for c in changes)
    if unclear > len(changes) / 2:
        print(f"{dtype}: {unclear} of {len(changes)} rows are unclear: the cores are busy")
    if not (first := regressions(old, new, factor)):
        if any(c.verdict == "slower" for c in changes):
            print("passes all the same: lstm_ext's own times did not rise as much")
        return []
    names = list(dict.fromkeys(c.name for c in first))
    print(f"once more: {', '.join(names)}", flush=True)
    again = measure(dtype, names)
    keys = {(c.name, c.mode) for c in first}
    twice = [c for c in regressions(old, again, factor) if (c.name, c.mode) in keys]
    print("\n".join(table(twice or compare(old, again, factor=factor, spreads=SPREADS))))
    return twice


def here() -> dict[str, Any]:
    """Of this machine, what a record must have for it to be held against."""
    return {"settings": {}, "environment": machine.environment(torch.device("cpu"))}


def why_not(old: Record, this: dict[str, Any]) -> list[str]:
    """In what the record's machine is another kind than this one."""
    this = {**this, "settings": {**old["settings"], "threads": this["environment"]["threads"]}}
    return unlike(old, this)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where a row regressed twice or the benchmark does not run."""
    parser = argparse.ArgumentParser(
        prog="python -m bench gate",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: both")
    parser.add_argument("--factor", type=float, default=FACTOR, help=f"default: {FACTOR}")
    parser.add_argument(
        "--records", type=Path, metavar="FOLDER", help="default: this machine's results"
    )
    args = parser.parse_args(argv)
    if args.factor < 1:
        parser.error(f"--factor: expected 1 or more, got {args.factor}")
    folder = args.records or machine.results_folder(torch.device("cpu"))
    this, failed = here(), False
    for dtype in args.dtype or DTYPES:
        path = folder / f"gate-{dtype}-cpu.jsonl"
        if not path.exists():
            print(f"{dtype}: skipped, there is no {path.name} of a {folder.name}")
            continue
        try:
            old = records.read(path)
            if reasons := why_not(old, this):
                print(f"{dtype}: skipped, the record's machine differs in {'; '.join(reasons)}")
                continue
            if found := check(old, dtype, args.factor):
                failed = True
                rows = ", ".join(f"{c.name} {c.mode} ({c.verdict})" for c in found)
                print(f"{dtype}: regressed in two runs: {rows}", file=sys.stderr)
        except (RuntimeError, ValueError) as error:
            print(f"{dtype}: {error}", file=sys.stderr)
            failed = True
    return 1 if failed else 0
