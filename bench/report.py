"""The machine a benchmark ran on, its table on the terminal and its JSON on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from bench.timing import Row, Timing, geometric_means

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1


def _output_of(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    """The processor's name as the system gives it, ``unknown-cpu`` if it gives none."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or "unknown-cpu"


def cores() -> int:
    """Logical processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def slug(text: str) -> str:
    """``AMD EPYC(TM) 7B13 64-Core Processor`` -> ``amd-epyc-7b13``."""
    text = re.sub(r"\((?:R|TM)\)|@.*|\bCPU\b|\bProcessor\b|\b\d+-Core\b", " ", text, flags=re.I)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def machine(device: torch.device) -> str:
    """Folder name for a machine's results, from the model of its GPU or CPU and nothing else."""
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{slug(cpu_model())}-{cores()}c-{slug(capability)}"


def git_commit() -> str | None:
    """The checkout's commit, with ``-dirty`` where files differ from it; None without one."""
    commit = _output_of("git", "rev-parse", "HEAD")
    if commit is None:
        return None
    # Results of this very run must not make the commit dirty.
    changed = _output_of("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return commit + ("-dirty" if changed else "")


def environment(device: torch.device) -> dict[str, object]:
    """Everything that a timing depends on. Holds no path and no host name."""
    import lstm_ext

    facts: dict[str, object] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git_commit(),
        "lstm_ext": getattr(lstm_ext, "__version__", None),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    # glibc gives freed memory back to the system at each training step of a large problem unless
    # these are set; the page faults that follow can take longer than the arithmetic.
    facts["malloc"] = {
        name: os.environ[name]
        for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
        if name in os.environ
    }
    isa = getattr(getattr(lstm_ext, "ops", None), "cpu_isa", None)
    if isa is not None:
        facts["lstm_ext_cpu_isa"] = isa()
    if device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _output_of(
                "nvidia-smi",
                f"--id={device.index or 0}",
                "--query-gpu=driver_version",
                "--format=csv,noheader",
            ),
            "tf32_cudnn": torch.backends.cudnn.allow_tf32,
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        }
    return facts


def milliseconds(timing: Timing) -> float | None:
    """Median of one call in milliseconds; None where the module could not run."""
    return None if timing.median is None else timing.median * 1e3


def us_per_step(timing: Timing, row: Row) -> float | None:
    """Microseconds for one time step of the batch, all layers and directions together."""
    return None if timing.median is None else timing.median * 1e6 / row.problem.steps


def gflops(timing: Timing, row: Row) -> float | None:
    """Useful GFLOP/s, by ``Problem.flop``."""
    return None if timing.median is None else row.problem.flop(row.mode) / timing.median / 1e9


def _timing_json(timing: Timing, row: Row) -> dict[str, object]:
    return {
        "ms": milliseconds(timing),
        "us_per_step": us_per_step(timing, row),
        "gflops": gflops(timing, row),
        "calls_per_sample": timing.inner,
        "samples_ms": [sample * 1e3 for sample in timing.samples],
        "error": timing.error,
    }


def of_floor(row: Row) -> float | None:
    """How many times the floor of a step lstm_ext takes; None where either is not known."""
    us = us_per_step(row.ours, row)
    return None if us is None or row.floor_us is None else us / row.floor_us


def _row_json(row: Row) -> dict[str, object]:
    ratios = row.ratios
    return {
        "name": row.problem.name,
        "mode": row.mode,
        "problem": dataclasses.asdict(row.problem),
        "flop": row.problem.flop(row.mode),
        "nn_lstm": _timing_json(row.peer, row),
        "lstm_ext": _timing_json(row.ours, row),
        "ratio": row.ratio,
        "ratio_min": min(ratios, default=None),
        "ratio_max": max(ratios, default=None),
        "ratios": ratios,
        "floor_us_per_step": row.floor_us,
        "of_floor": of_floor(row),
    }


def to_json(
    rows: list[Row], settings: Mapping[str, object], facts: Mapping[str, object], complete: bool
) -> dict[str, object]:
    """The whole report; ``complete`` is false in what is written while a run goes on."""
    return {
        "schema": SCHEMA,
        "complete": complete,
        "settings": dict(settings),
        "environment": dict(facts),
        "rows": [_row_json(row) for row in rows],
        "geometric_mean_ratio": dict(geometric_means(rows)),
    }


def write_json(report: Mapping[str, object], path: Path) -> None:
    """Replaces ``path`` in one step, so that an interrupted run leaves whole JSON behind."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(report, indent=1) + "\n")
    draft.replace(path)


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
)


def _line(cells: tuple[str, ...]) -> str:
    return "  ".join(
        f"{cell:{align}{width}}" for cell, (_, width, align) in zip(cells, _COLUMNS, strict=True)
    ).rstrip()


def table_head() -> str:
    """Names of the columns; those after the ratios are of lstm_ext."""
    head = _line(tuple(name for name, _, _ in _COLUMNS))
    return f"{head}\n{'-' * len(head)}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table_row(row: Row) -> str:
    """One line of the table, and one more for each module that could not run the row."""
    ratios = row.ratios
    lines = [
        _line(
            (
                row.problem.name,
                row.mode,
                _number(milliseconds(row.peer), 3),
                _number(milliseconds(row.ours), 3),
                _number(row.ratio, 2),
                f"{min(ratios):.2f}..{max(ratios):.2f}" if ratios else "-",
                _number(us_per_step(row.ours, row), 2),
                _number(of_floor(row), 2),
                _number(gflops(row.ours, row), 1),
            )
        )
    ]
    for name, timing in (("nn.LSTM", row.peer), ("lstm_ext", row.ours)):
        if timing.error:
            lines.append(f"    {name} cannot run this: {timing.error}")
    return "\n".join(lines)


def table_foot(rows: list[Row]) -> str:
    means = geometric_means(rows)
    if not means:
        return "no row was run by both"
    parts = (f"{name} {mean:.2f}" for name, mean in means.items())
    return "geometric mean of the ratios: " + ", ".join(parts)
