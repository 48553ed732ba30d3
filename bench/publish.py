"""``python -m bench publish``: the CPU's records, and the report made from them.

About four minutes on two cores. The suite cpu in float32 and bfloat16, how time grows (scaling),
the gate's records, all beside nn.LSTM; then README.md and plots, and the speed section of the
project's README.md. A step whose record is there, of the same commit and machine, is not run
again: an interrupted call goes on.
With --peers the suite cpu beside all peers instead, about as long.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

from bench.machine import ROOT

DTYPES = ("float32", "bfloat16")


def steps(peers: bool, more: Sequence[str] = ()) -> list[list[str]]:
    """Arguments of ``python -m bench``, in order."""
    if peers:
        runs = [["--suite", "cpu", "--dtype", dtype, "--peer", "all"] for dtype in DTYPES]
    else:
        runs = [
            ["--suite", suite, "--dtype", dtype]
            for suite in ("cpu", "scaling", "gate")
            for dtype in DTYPES
        ]
    return [*([*run, *more] for run in runs), ["report", "--readme", "README.md"]]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of the first step that fails, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench publish",
        description=__doc__.split("\n\n", 1)[1],
    )
    parser.add_argument("--peers", action="store_true", help="beside all peers of this machine")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--dry-run", action="store_true", help="only print the steps")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    for step in steps(args.peers, ["--fresh"] if args.fresh else ["--once"]):
        print(f"== python -m bench {' '.join(step)}", flush=True)
        if args.dry_run:
            continue
        status = subprocess.run([sys.executable, "-m", "bench", *step], cwd=ROOT).returncode
        if status:
            print(f"stopped: exit status {status}; the same command goes on", file=sys.stderr)
            return status
    print(f"{time.monotonic() - begin:.0f} s in all")
    return 0
