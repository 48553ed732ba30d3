"""``python -m bench publish``: the CPU's records, and the report made from them.

About ten minutes on two cores. The suite cpu in float32 and bfloat16, problems drawn at random,
single steps, LSTMCell, second derivatives, how time grows (scaling), the gate's records, weights of
8 bits, all beside torch's; then README.md and plots, and the speed section of the project's
README.md. A step whose record is there, of the same commit and machine, is not run again: an
interrupted call goes on.
With --peers the suite cpu beside all peers instead, about as long. With --limited the suite cpu on
one thread, and, in a folder of its own, with AVX2 as the most that lstm_ext, torch and oneDNN use;
in bfloat16 up to 4 sequences, since nn.LSTM then takes minutes for a call of more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from bench.machine import ROOT

DTYPES = ("float32", "bfloat16")
AVX2 = {"LSTM_EXT_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
Step = tuple[dict[str, str], list[str]]


def steps(kind: str | None = None, more: Sequence[str] = ()) -> list[Step]:
    """What ``python -m bench`` runs, in order: what is set in the environment, and its arguments.

    kind: None, "peers" or "limited".
    """

    def run(suite: str, dtype: str, *options: str, **env: str) -> Step:
        return env, ["--suite", suite, "--dtype", dtype, *options, *more]

    def runs(*suites: str, options: Sequence[str] = ()) -> list[Step]:
        return [run(suite, dtype, *options) for suite in suites for dtype in DTYPES]

    report: Step = ({}, ["report", "--readme", "README.md"])
    if kind == "peers":
        return [*runs("cpu", options=("--peer", "all")), report]
    if kind == "limited":
        few = run("cpu", "bfloat16", "--rows", " B[14] ", **AVX2)
        on_avx2 = [run("cpu", "float32", **AVX2), few, (AVX2, ["report"])]
        return [*runs("cpu", options=("--threads", "1")), report, *on_avx2]
    beside = ("--peer", "float", "--peer", "8-bit-rows")
    published = runs("cpu", "random", "one-step", "cell", "decoder", "second", "scaling", "gate")
    return [*published, run("quantized", "float32", *beside), report]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of the first step that fails, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench publish",
        description=__doc__.split("\n\n", 1)[1],
    )
    kinds = parser.add_mutually_exclusive_group()
    for kind, text in (
        ("peers", "beside all peers of this machine"),
        ("limited", "on one thread, and with AVX2 at most"),
    ):
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=text)
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--dry-run", action="store_true", help="only print the steps")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    for env, step in steps(args.kind, ["--fresh"] if args.fresh else ["--once"]):
        settings = "".join(f"{name}={value} " for name, value in env.items())
        print(f"== {settings}python -m bench {' '.join(step)}", flush=True)
        if args.dry_run:
            continue
        command = [sys.executable, "-m", "bench", *step]
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}).returncode
        if status:
            print(f"stopped: exit status {status}; the same command goes on", file=sys.stderr)
            return status
    print(f"{time.monotonic() - begin:.0f} s in all")
    return 0
