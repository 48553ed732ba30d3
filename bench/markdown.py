"""``python -m bench report``: tables and plots of a folder of records. Nothing is measured.

Writes README.md and SVG files beside the records; with --readme also the speed section of another
Markdown file, between the lines ``<!-- bench: speed -->`` and ``<!-- bench: end -->``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import cpu_limits, gpu_limits, machine, plots, records, roofline
from bench.records import OURS, PEER
from bench.report import difference, number, percent, ratio_range
from bench.suites import Problem

Record = Mapping[str, Any]
BEGIN, END = "<!-- bench: speed -->", "<!-- bench: end -->"
INTRODUCTION = """\
Written by `python -m bench report` from the records beside it (JSON lines: every sample, the
environment and the settings). Times are medians of samples taken in turn, the ratio is nn.LSTM's
time over lstm_ext's, pair by pair: above 1 lstm_ext is faster; the range is that of all pairs, a
disturbed one too. Inputs are random and change from call to call, beyond the second-level cache;
the heap is that of a process that has run for a while. Where a call needs more than 32 MB, glibc
maps memory anew each time, and its page faults are in the time (training at H 1024).
Rows that say *cell* are loops over nn.LSTMCell and LSTMCell instead, a call a step; with *head* an
nn.Linear of h and a tanh come between two steps, on both sides. In the mode
*quantized* weights have 8 bits: nn.LSTM is what torch.ao.quantization.quantize_dynamic makes of it,
lstm_ext what lstm_ext.quantize does, 8-bit-rows that with activation_bits=8, and float is
lstm_ext.LSTM.
*Of the limit*: what the call cannot do without (its arithmetic at the measured peak; in each step
of the recurrence at least reading W_hh from the nearest caches that hold it) over what it took.
*Weights* is how fast W_hh was read, were the whole call spent on it. *Memory* is what a call adds
at its height, in steps of some hundred KB. *Round trip*: of a cache line between two threads,
before the row and after it; where it is several times as long as in other rows, the cores did not
share an L3."""
TRIPS = "round_trip_ns"
FACTS = {
    "gpu": "GPU",
    "cpu": "processor",
    "cpu_family": "its family and model",
    "cores": "cores",
    "threads": "threads",
    "lstm_ext_cpu_isa": "lstm_ext's vectors",
    "torch_cpu_capability": "torch's vectors",
    "onednn_max_cpu_isa": "oneDNN's vectors at most",
    "torch": "torch",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "driver": "driver",
    "python": "Python",
    "system": "system",
    "commit": "commit",
    "date": "date",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def row_cells(row: Mapping[str, Any], others: Sequence[str], with_trips: bool) -> list[str]:
    ours, peer = row["modules"][OURS], row["modules"][PEER]
    speed = ours["weights_gb_per_s"]
    memory = " / ".join(number(module["peak_mb"], 1) for module in (peer, ours))
    cells = [
        row["name"],
        row["mode"],
        number(peer["ms"], 3),
        number(ours["ms"], 3),
        number(peer["ratio"], 2) if records.counts(row) else "-",
        ratio_range(peer),
        number(ours["us_per_step"], 2),
        number(ours["gflops"], 0),
        number(speed, 0),
        percent(records.share_of_bound(row, PEER)),
        percent(records.share_of_bound(row)),
        memory,
    ]
    if with_trips:
        cells.append(" / ".join(number(trip, 0) for trip in row.get(TRIPS) or ()) or "-")
    for name in others:
        module = row["modules"].get(name)
        shown = module is not None and module["ratio"] is not None
        cells.append(number(module["ratio"], 2) + " *" * module["differs"] if shown else "-")
    return cells


def notes(record: Record) -> Iterator[str]:
    """What could not run, or is not the same: one line a module and reason."""
    modes: dict[str, int] = {}
    failed: dict[tuple[str, str], list[tuple[str, str]]] = {}
    differs: dict[str, list[str]] = {}
    for row in record["rows"]:
        modes[row["mode"]] = modes.get(row["mode"], 0) + 1
        for name, module in row["modules"].items():
            if module["error"]:
                reason = module["error"].removeprefix("Unsupported: ")
                failed.setdefault((name, reason), []).append(records.key(row))
            elif module["differs"]:
                where = f"{row['name']} {row['mode']}: {difference(module)}"
                differs.setdefault(name, []).append(where)
    for (name, reason), keys in failed.items():
        whole = [m for m in modes if sum(mode == m for _, mode in keys) == modes[m]]
        rest = [f"{problem} {mode}" for problem, mode in keys if mode not in whole]
        where = ["all rows"] if len(whole) == len(modes) else [f"all in {m}" for m in whole] + rest
        yield f"- {name}: {reason} ({'; '.join(where)})"
    for name, rows in differs.items():
        yield f"- {name}: not the same within tolerance (*): {'; '.join(rows)}"


def section(record: Record, name: str, folder: Path) -> list[str]:
    settings = record["settings"]
    others = [peer for peer in records.peers(record) if peer != PEER]
    special = ", beside other peers" if others else ""
    special += ", one thread" if settings["threads"] == 1 and settings["device"] == "cpu" else ""
    special += ", by torch.compile" if settings.get("compiled") else ""
    lines = [f"## {settings['suite']}, {settings['dtype']}{special}", ""]
    if not record["complete"]:
        lines += ["**Not complete: the run was interrupted.**", ""]
    if settings["quick"]:
        lines += ["**A quick run: not for publication.**", ""]
    for kind, path in plots.draw(record, folder / name).items():
        lines += [f"![{kind}]({path.name})", ""]
    with_trips = any(row.get(TRIPS) for row in record["rows"])
    head = [
        *("problem", "mode", "nn.LSTM ms", "lstm_ext ms", "ratio", "range", "µs a step"),
        *("GFLOP/s", "weights GB/s", "nn.LSTM of the limit", "of the limit"),
        "memory MB, nn.LSTM / lstm_ext",
        *(["round trip ns"] * with_trips),
        *(f"ratio to {peer}" for peer in others),
    ]
    lines += table(head, [row_cells(row, others, with_trips) for row in record["rows"]])
    for peer in (PEER, *others):
        if means := records.geometric_means(record, peer):
            parts = ", ".join(f"{mode} {mean:.2f}" for mode, mean in means.items())
            lines += ["", f"Geometric mean of the ratios to {peer}: {parts}."]
    if remarks := list(notes(record)):
        lines += ["", *remarks]
    facts = record["environment"]
    known = [f"{label} {facts[key]}" for key, label in FACTS.items() if facts.get(key)]
    malloc = "".join(f", {key}={value}" for key, value in facts.get("malloc", {}).items())
    took = f"; it took {record['seconds']:.0f} s" if record["complete"] else ""
    lines += ["", f"`{name}.jsonl`: {', '.join(known)}{malloc}{took}.", ""]
    return lines


def report(folder: Path) -> str:
    """The text of the folder's README.md; draws the plots beside it.

    Raises:
        ValueError: there is no record in the folder.
    """
    found = {path.stem: records.read(path) for path in sorted(folder.glob("*.jsonl"))}
    measured = [record["limits"] for record in found.values() if record["limits"]]
    found = {
        name: record
        for name, record in found.items()
        if record["rows"] and record["settings"]["suite"] != "gate"
    }
    if not found:
        raise ValueError(f"{folder.name} has no record (*.jsonl) with rows in it")
    lines = [f"# {folder.name}", "", INTRODUCTION, ""]
    if measured:
        limits = best_limits(measured)
        of_gpu = limits.get("device") == "cuda"
        cells = (gpu_limits if of_gpu else cpu_limits).table(limits)
        lines += ["## What the processor can do at most", "", *cells, ""]
        for record in found.values():
            set_bounds(record, limits)
    for name, record in found.items():
        lines += section(record, name, folder)
    return "\n".join(lines).rstrip() + "\n"


def best_limits(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fastest of several measurements: what disturbs one only slows it down."""
    good = [limits for limits in measured if "error" not in limits]
    if not good:
        return dict(measured[0])
    good = [limits for limits in good if limits["threads"] == good[-1]["threads"]]
    best = dict(good[-1])
    for part in ("gflops", "gb_per_s"):
        best[part] = {}
        for limits in good:
            for name, values in limits[part].items():
                known = best[part].setdefault(name, {})
                for count, value in values.items():
                    known[count] = max(value, known.get(count, 0.0))
    return best


def set_bounds(record: Record, limits: Mapping[str, Any]) -> None:
    """The rows' limit anew, from these measurements: those beside the record may be disturbed."""
    if record["limits"].get("threads") != limits.get("threads"):
        return
    for row in record["rows"]:
        lengths = row["problem"]["lengths"]
        problem = Problem(**{**row["problem"], "lengths": lengths and tuple(lengths)})
        seconds = roofline.bound(problem, row["mode"], record["settings"]["dtype"], dict(limits))
        row["bound_ms"] = None if seconds is None else 1e3 * seconds


# --- the head of it, in another file --------------------------------------------------------------


def speed_table(folder: Path, base: Path) -> str:
    """The ratios of the suite "cpu", a column a dtype and mode, and where they come from.

    Raises:
        ValueError: the folder has no complete record of that suite.
    """
    found = [records.read(path) for path in sorted(folder.glob("cpu-*-cpu.jsonl"), reverse=True)]
    found = [record for record in found if record["complete"] and not record["settings"]["quick"]]
    if not found:
        raise ValueError(f"{folder.name} has no complete record of the suite cpu")
    columns = [(record, mode) for record in found for mode in record["settings"]["modes"]]
    names = list(dict.fromkeys(row["name"] for record in found for row in record["rows"]))
    cells = []
    for name in names:
        line = [name]
        for record, mode in columns:
            rows = [r for r in record["rows"] if records.key(r) == (name, mode)]
            good = rows and records.counts(rows[0])
            line.append(f"{rows[0]['modules'][PEER]['ratio']:.2f}" if good else "-")
        cells.append(line)
    means = [number(records.geometric_means(record).get(mode), 2) for record, mode in columns]
    cells.append(["geometric mean", *means])
    words = {"inference": "inference", "training": "forward + backward"}
    labels = (f"{r['settings']['dtype']}, {words.get(mode, mode)}" for r, mode in columns)
    head = ["problem", *labels]
    facts, settings = found[0]["environment"], found[0]["settings"]
    where = os.path.relpath(folder, base)
    family = f" of family {facts['cpu_family']}" if facts.get("cpu_family") else ""
    text = (
        f"nn.LSTM's time divided by lstm_ext's, in turn in one run, medians of "
        f"{settings['repeats']} samples; {facts['cpu']}{family} ({facts['lstm_ext_cpu_isa']}), "
        f"{settings['threads']} threads, PyTorch {facts['torch']}; steps T, batch B, input = "
        f"hidden H. Everything else, and how near it comes to what the processor can do: "
        f"[{where}]({where}/README.md)."
    )
    lines = textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, "", *table(head, cells)])


def insert(text: str, block: str) -> str:
    """``text`` with the block between the two marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"it needs one line {BEGIN} and after it one line {END}")
    return re.sub(
        f"{re.escape(BEGIN)}.*{re.escape(END)}",
        lambda _: f"{BEGIN}\n{block}\n{END}",
        text,
        flags=re.DOTALL,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where there is no record to report; exits with 2 on a bad argument."""
    parser = argparse.ArgumentParser(
        prog="python -m bench report",
        description=__doc__.split("\n\n", 1)[1],
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        help="of records; default: bench/results/<this machine>",
    )
    parser.add_argument("--readme", type=Path, metavar="FILE", help="renew its speed section")
    args = parser.parse_args(argv)
    folder = (args.folder or machine.results_folder(torch.device("cpu"))).resolve()
    if not folder.is_dir():
        parser.error(f"there is no folder {folder.name}")
    try:
        (folder / "README.md").write_text(report(folder))
        print(f"written: {folder / 'README.md'}")
        if args.readme:
            block = speed_table(folder, args.readme.resolve().parent)
            args.readme.write_text(insert(args.readme.read_text(), block))
            print(f"written: {args.readme}")
    except (OSError, ValueError) as error:
        print(f"bench report: {error}", file=sys.stderr)
        return 1
    return 0
