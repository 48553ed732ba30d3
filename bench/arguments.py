"""Command lines of the benchmarks: types of arguments, and what the programs of one table share."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.machine import environment, grow_heap

Row = dict[str, Any]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive integer"  # argparse names the type in its error.


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of a program that times modules in turn, for one table."""
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--min-sample", type=float, default=0.02, help="seconds (default: 0.02)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=positive, help="default: torch's own")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the samples as JSON")


def parse_table_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Exits with 2, before anything is timed, on what cannot be; sets the threads."""
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no usable CUDA GPU here")
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        parser.error(f"--out {args.out}: expected a file in a folder that is there")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def write_table(
    args: argparse.Namespace,
    rows: Iterable[Row],
    columns: Mapping[str, Callable[[Row], str]],
    settings: Mapping[str, Any],
) -> None:
    """Prints the rows as they come, as lines of a Markdown table; then writes ``args.out``.

    settings: what the file says of the run besides repeats and threads.
    """
    grow_heap()
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    done = []
    for row in rows:
        done.append(row)
        print(f"| {' | '.join(cell(row) for cell in columns.values())} |", flush=True)
    if args.out is not None:
        settings = {
            **settings,
            "repeats": args.repeats,
            "min_sample": args.min_sample,
            "threads": torch.get_num_threads(),
        }
        facts = {"settings": settings, "environment": environment(torch.device(args.device))}
        args.out.write_text(json.dumps({**facts, "rows": done}, indent=1) + "\n")
