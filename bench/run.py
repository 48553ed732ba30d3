"""``python -m bench``: times one suite of the design on one device and dtype beside its peers."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import cpu_limits, gpu_limits, machine, records, report, roofline
from bench.__main__ import COMMANDS
from bench.arguments import pattern, positive
from bench.limits import Floor
from bench.suites import MODES, QUANTIZED, SECOND, SUITES, Problem, modes_of
from bench.timing import Builder, run_row

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
# Of bench.peers.
PEERS = ("cell-loop", "compiled-loop", "onnxruntime", "flashrnn", "haste", "float", "8-bit-rows")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        usage="%(prog)s [COMMAND] --suite SUITE [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Times torch.nn.LSTM, lstm_ext.LSTM and the peers named in turn on one suite of problems, after
checking that each computes what nn.LSTM computes in float64. A ratio above 1 means that lstm_ext
is faster. Inference is a forward pass in eval mode; training is forward and backward with
gradients for all parameters and the input; second is the gradient for the input, and of that one
the gradients for all parameters and the input; quantized is inference with weights of 8 bits,
torch.ao.quantization.quantize_dynamic beside lstm_ext.quantize. An interrupted run goes on where
it stopped.""",
        epilog="commands (each has its own --help):\n"
        + "".join(f"  {name:10}{what}\n" for name, what in COMMANDS.items())
        + """
On a CPU the training times of large problems hold the page faults of memory that glibc gives back
and takes again at each step. To time without them, set MALLOC_TRIM_THRESHOLD_=2000000000
MALLOC_MMAP_THRESHOLD_=1000000000 in the environment; the record says whether they were set.""",
    )
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--mode",
        choices=(*MODES, SECOND, QUANTIZED, "both"),
        help="default: both, without second and quantized; deepbench-train, deepbench-infer, "
        "second and quantized run the mode of their name",
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
        "--peer",
        action="append",
        default=[],
        choices=(*PEERS, "all"),
        help="beside nn.LSTM, which is always there; may be given more than once",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="do not go on with an interrupted run: begin anew"
    )
    parser.add_argument(
        "--once", action="store_true", help="do nothing where this very run has its record"
    )
    parser.add_argument(
        "--no-limits", action="store_true", help="do not measure what the processor can do at most"
    )
    parser.add_argument(
        "--host",
        action="store_true",
        help="with --device cuda: the time of the calling thread, the GPU's work left out",
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="every module by torch.compile; nn.LSTM breaks the graph, and runs as it is",
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
        help="JSON lines; default: "
        "bench/results/<machine>/<suite>-<dtype>-<device>[-peers][-host][-compiled][-<N>threads].jsonl",
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
    builders: Mapping[str, Builder],
    settings: Mapping[str, Any],
    out: Path,
    *,
    fresh: bool = False,
    with_limits: bool = True,
    floor: Floor | None = None,
) -> list[dict[str, Any]]:
    """Runs the rows that are not there yet, prints each as it ends and adds it to the record."""
    # The design says which problems the peer runs without oneDNN; its warning breaks the table.
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported")
    device, dtype = torch.device(settings["device"]), settings["dtype"]
    machine.grow_heap()
    limits: dict[str, Any] = {}
    if with_limits and device.type == "cpu":
        limits = cpu_limits.measure(settings["threads"], repeats=1 if settings["quick"] else 3)
        print("\n".join(cpu_limits.table(limits)), flush=True)
    elif with_limits:
        limits = gpu_limits.measure(DTYPES[dtype], device)
        print("\n".join(gpu_limits.table(limits)), flush=True)
    known = device.type == "cpu" and bool(limits) and "error" not in limits
    with_trips = known and settings["threads"] > 1
    head = {"settings": settings, "environment": machine.environment(device), "limits": limits}
    record = records.Writer(out, head, fresh)
    rows = list(record.done)
    if rows:
        print(f"goes on with {out.name}: {len(rows)} rows are there", file=sys.stderr)
    there = {records.key(row) for row in rows}
    print(report.table_head(), flush=True)
    start, finish, close = progress(len(work))
    try:
        for row in rows:
            finish(report.table_row(row))
        for problem, mode in work:
            if (problem.name, mode) in there:
                continue
            start(f"{problem.name} {mode}")
            begin = time.perf_counter()
            before = cpu_limits.round_trip() if with_trips else None
            row = run_row(
                problem,
                mode,
                builders,
                dtype=DTYPES[dtype],
                device=device,
                repeats=settings["repeats"],
                min_sample=settings["min_sample_ms"] / 1e3,
                host=settings["host"],
            )
            if floor is not None:
                row.floor_us = floor.us_per_step(problem, mode, DTYPES[dtype].itemsize)
            if limits:
                row.bound = roofline.bound(problem, mode, dtype, limits)
            if before is not None:
                row.round_trips = [before, cpu_limits.round_trip()]
            rows.append(report.row_json(row, dtype, time.perf_counter() - begin))
            record.add(rows[-1])
            finish(report.table_row(rows[-1]))
        record.finish()
    finally:
        close()
    print(report.table_foot(rows))
    return rows


def is_there(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the record of this run, of these very sources, is complete."""
    environment = machine.environment(torch.device(settings["device"]))
    if str(environment["commit"] or "-dirty").endswith("-dirty"):
        return False
    try:
        old = records.read(out)
    except (OSError, ValueError):
        return False
    return old["complete"] and records.same_run(
        old, {"settings": settings, "environment": environment}
    )


def other_than(out: Path, settings: Mapping[str, Any]) -> list[str]:
    """In what a complete record differs from a run that would replace it, as far as that was asked
    for; empty where there is none."""
    try:
        old = records.read(out)
    except (OSError, ValueError):
        return []
    facts = machine.environment(torch.device(settings["device"]))
    pairs = [(name, old["settings"].get(name), settings[name]) for name in settings]
    asked = ("lstm_ext_cpu_isa", "torch_cpu_capability", "onednn_max_cpu_isa", "switches")
    told = old["environment"]
    pairs += [(name, told[name], facts[name]) for name in asked if name in told]
    different = [f"{name}: {a} and {b}" for name, a, b in pairs if a != b]
    return different if old["complete"] else []


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if lstm_ext failed or was wrong on a row, or the run was interrupted.

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

    from bench import peers

    modes = modes_of(args.suite, args.mode)
    names = [name for name in PEERS if name in args.peer or "all" in args.peer]
    settings = {
        "suite": args.suite,
        "device": args.device,
        "dtype": args.dtype,
        "modes": list(modes),
        "rows": args.rows.pattern if args.rows else None,
        "peers": names,
        "threads": torch.get_num_threads(),
        "repeats": args.repeats or (3 if args.quick else 9),
        "min_sample_ms": 5 if args.quick else 20,
        "quick": args.quick,
        "host": args.host,
    } | ({"compiled": True} if args.compiled else {})
    out = args.out
    if out is None:
        ends = ("-peers" if names else "") + ("-host" if args.host else "")
        ends += "-compiled" if args.compiled else ""
        ends += f"-{args.threads}threads" if args.threads else ""
        folder = machine.results_folder(torch.device(args.device))
        out = folder / f"{args.suite}-{args.dtype}-{args.device}{ends}.jsonl"
    if args.once and is_there(out, settings):
        print(f"is there: {out}")
        return 0
    if args.out is None and not args.fresh and (others := other_than(out, settings)):
        parser.error(
            f"{out.name} of {out.parent.name} is another run's record, which differs in "
            f"{'; '.join(others)}: give --out, or --fresh to replace it"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError("it is a folder")
        out.with_name(out.name + ".part").touch()
    except OSError as error:
        parser.error(f"cannot write {out}: {error.strerror or error}")

    work = [(problem, mode) for problem in problems for mode in modes]
    try:
        builders = peers.builders(names, args.compiled)
        rows = run(
            work,
            builders,
            settings,
            out,
            fresh=args.fresh,
            with_limits=not args.no_limits,
            floor=floor,
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 1
    finally:
        out.with_name(out.name + ".part").unlink(missing_ok=True)
    print(f"written: {out}")
    ours = [row["modules"][records.OURS] for row in rows]
    return 1 if any(module["error"] or module["differs"] for module in ours) else 0
