"""``python -m bench headline CPU GPU``: a GPU's record beside a CPU's, problem by problem.

What is often said of LSTMs, that a GPU trains them 6 times and infers 140 times as fast as a CPU,
for lstm_ext's own kernels: the CPU's time over the GPU's, of the problems that both records have.
Both are to be measured, in the same dtype: ``python -m bench --suite cpu`` on the one machine, the
same with ``--device cuda`` on the other.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import records
from bench.markdown import table
from bench.records import OURS, PEER
from bench.report import number

CLAIM = {"training": 6, "inference": 140}  # times as fast as a CPU, as it is often said


def good(row: Mapping[str, Any], name: str) -> bool:
    return row["modules"][name]["ms"] is not None and not row["modules"][name]["differs"]


def headline(cpu: Mapping[str, Any], gpu: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown.

    Raises:
        ValueError: the records are not of a CPU and a GPU, not of one dtype, or share no problem.
    """
    devices = [record["settings"]["device"] for record in (cpu, gpu)]
    if devices != ["cpu", "cuda"]:
        raise ValueError(
            f"expected a record of a cpu, then one of cuda; got {' and '.join(devices)}"
        )
    dtypes = [record["settings"]["dtype"] for record in (cpu, gpu)]
    if dtypes[0] != dtypes[1]:
        raise ValueError(f"expected one dtype, got {' and '.join(dtypes)}")
    on_gpu = {records.key(row): row for row in gpu["rows"]}
    pairs = [
        (row, on_gpu[records.key(row)])
        for row in cpu["rows"]
        if records.key(row) in on_gpu and row["mode"] in CLAIM
    ]
    if not pairs:
        raise ValueError("the records have no problem and mode in common")
    rows, gains = [], {name: {mode: [] for mode in CLAIM} for name in (PEER, OURS)}
    for slow, fast in pairs:
        cells = [slow["name"], slow["mode"]]
        for name in (PEER, OURS):
            times = [
                row["modules"][name]["ms"] if good(row, name) else None for row in (slow, fast)
            ]
            gain = times[0] / times[1] if None not in times else None
            if gain is not None:
                gains[name][slow["mode"]].append(gain)
            cells += [number(times[0], 3), number(times[1], 3), number(gain, 1)]
        rows.append(cells)
    facts = [record["environment"] for record in (cpu, gpu)]
    threads = cpu["settings"]["threads"]
    lines = [
        f"{facts[1]['gpu']} beside {facts[0]['cpu']} with {threads} threads, {dtypes[0]}, "
        f"torch {facts[1]['torch']} and {facts[0]['torch']}; *gain* is the CPU's time over the "
        "GPU's.",
        "",
    ]
    columns = (f"{name}, {what}" for name in (PEER, OURS) for what in ("CPU ms", "GPU ms", "gain"))
    lines += table(["problem", "mode", *columns], rows)
    for mode, claim in CLAIM.items():
        ours = gains[OURS][mode]
        if ours:
            lines += [
                "",
                f"{mode.capitalize()}: lstm_ext on the GPU is {min(ours):.1f} to {max(ours):.1f} "
                f"times as fast as on the CPU, geometric mean {statistics.geometric_mean(ours):.1f}"
                f" ({claim} is what is often said).",
            ]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """0; exits with 2 where the records cannot stand beside each other."""
    parser = argparse.ArgumentParser(
        prog="python -m bench headline",
        description=__doc__.split("\n\n", 1)[1],
    )
    parser.add_argument("cpu", type=Path, metavar="CPU", help="a record of --device cpu")
    parser.add_argument("gpu", type=Path, metavar="GPU", help="a record of --device cuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write it there")
    args = parser.parse_args(argv)
    try:
        lines = headline(records.read(args.cpu), records.read(args.gpu))
        text = "\n".join(lines) + "\n"
        if args.out:
            args.out.write_text(text)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(text, end="")
    return 0
