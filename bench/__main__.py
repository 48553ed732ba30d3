"""Command line: times one suite of the design on one device and dtype beside nn.LSTM."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from bench import report
from bench.limits import Floor
from bench.suites import SUITES, Problem, modes_of
from bench.timing import Row, run_row

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


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


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times torch.nn.LSTM and lstm_ext.LSTM in turn on one suite of problems. "
        "A ratio above 1 means that lstm_ext is faster. Inference is a forward pass in eval "
        "mode; training is forward and backward with gradients for all parameters and the input.",
        epilog="On a CPU the training times of large problems hold the page faults of memory that "
        "glibc gives back and takes again at each step. To time without them, set "
        "MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=1000000000 in the environment; "
        "the JSON says whether they were set.",
    )
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--mode",
        choices=("inference", "training", "both"),
        help="default: both; deepbench-train and deepbench-infer run the mode of their name",
    )
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's own)")
    parser.add_argument(
        "--repeats", type=positive, help="samples of each module a row (default: 9; 3 if quick)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="samples of 5 ms instead of 20; not for publication"
    )
    parser.add_argument("--rows", type=pattern, metavar="REGEX", help="only rows it is found in")
    parser.add_argument(
        "--host",
        action="store_true",
        help="with --device cuda: the time of the calling thread, the GPU's work left out",
    )
    parser.add_argument(
        "--floor",
        type=Path,
        metavar="FILE",
        help="what bench.floor measured on this GPU: rows are held against their floor",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: bench/results/<machine>/<suite>-<dtype>-<device>[-host].json",
    )
    return parser


def progress(total: int) -> tuple[Callable[[str], None], Callable[[str], None], Callable]:
    """(start a row, print a finished row, close): a tqdm bar, or plain lines without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        started = 0

        def start(name: str) -> None:
            nonlocal started
            started += 1
            print(f"[{started}/{total}] {name}", file=sys.stderr, flush=True)

        return start, lambda text: print(text, flush=True), lambda: None

    # The bar stands on the row being run; it advances when that row is printed.
    bar = tqdm(total=total, unit="row", dynamic_ncols=True, leave=False)

    def finish(text: str) -> None:
        bar.write(text)
        bar.update()

    return bar.set_description, finish, bar.close


def run(
    work: Sequence[tuple[Problem, str]],
    args: argparse.Namespace,
    settings: dict,
    out: Path,
    floor: Floor | None,
) -> list[Row]:
    """Runs the rows, prints each as it ends, and keeps the JSON on disk up to date."""
    import lstm_ext

    # The design says which problems the peer runs without oneDNN; its warning breaks the table.
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported")
    device = torch.device(args.device)
    facts = report.environment(device)
    rows: list[Row] = []
    print(report.table_head(), flush=True)
    start, finish, close = progress(len(work))
    try:
        for problem, mode in work:
            start(f"{problem.name} {mode}")
            row = run_row(
                problem,
                mode,
                nn.LSTM,
                lstm_ext.LSTM,
                dtype=DTYPES[args.dtype],
                device=device,
                repeats=settings["repeats"],
                min_sample=settings["min_sample_ms"] / 1e3,
                host=args.host,
            )
            if floor is not None:
                row.floor_us = floor.us_per_step(problem, mode, DTYPES[args.dtype].itemsize)
            rows.append(row)
            finish(report.table_row(row))
            whole = len(rows) == len(work)
            report.write_json(report.to_json(rows, settings, facts, whole), out)
    finally:
        close()
    print(report.table_foot(rows))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if lstm_ext failed on a row or the run was interrupted.

    Exits with 2 on a bad argument, on ``--device cuda`` without a usable GPU and where
    lstm_ext is not installed.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.host and args.device != "cuda":
        parser.error("--host belongs to --device cuda: on a CPU the calling thread does it all")
    if args.floor and args.device != "cuda":
        parser.error("--floor belongs to --device cuda: it is what a GPU's blocks exchange")
    try:
        floor = Floor(args.floor) if args.floor else None
    except FileNotFoundError:  # a part of `make gpu` that has not run
        print(f"without floors: there is no {args.floor}", file=sys.stderr)
        floor = None
    except (OSError, ValueError) as error:
        parser.error(f"--floor {args.floor}: {error}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"--device cuda: torch {torch.__version__} sees no usable CUDA GPU here "
            "(torch.cuda.is_available() is False); use --device cpu"
        )
    try:
        import lstm_ext
    except ImportError as error:
        parser.error(f"cannot import lstm_ext ({error}); install it first: pip install .")

    try:
        native = lstm_ext.ops.has_native_kernels(torch.device(args.device))
    except RuntimeError as error:
        parser.error(str(error))
    if not native:
        parser.error(
            f"--device {args.device}: this lstm_ext has no kernels for it and would time its plain "
            "torch loop; `python -m lstm_ext` tells why"
        )

    problems = [p for p in SUITES[args.suite] if args.rows is None or args.rows.search(p.name)]
    if not problems:
        names = "\n  ".join(p.name for p in SUITES[args.suite])
        parser.error(f"--rows {args.rows.pattern!r} matches none of\n  {names}")
    if args.threads:
        torch.set_num_threads(args.threads)

    modes = modes_of(args.suite, args.mode)
    settings = {
        "suite": args.suite,
        "device": args.device,
        "dtype": args.dtype,
        "modes": list(modes),
        "rows": args.rows.pattern if args.rows else None,
        "threads": torch.get_num_threads(),
        "repeats": args.repeats or (3 if args.quick else 9),
        "min_sample_ms": 5 if args.quick else 20,
        "quick": args.quick,
        "host": args.host,
    }
    out = args.out
    if out is None:
        folder = report.ROOT / "bench" / "results" / report.machine(torch.device(args.device))
        clock = "-host" if args.host else ""
        out = folder / f"{args.suite}-{args.dtype}-{args.device}{clock}.json"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError("it is a folder")
        out.with_name(out.name + ".part").touch()
    except OSError as error:
        parser.error(f"cannot write {out}: {error.strerror or error}")

    work = [(problem, mode) for problem in problems for mode in modes]
    try:
        rows = run(work, args, settings, out, floor)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    finally:
        out.with_name(out.name + ".part").unlink(missing_ok=True)
    print(f"written: {out}")
    return 1 if any(row.ours.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
