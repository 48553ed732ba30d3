"""summary.md of tools/gpu.py, from the state, pytest's XML, the sanitizers' logs, the benches."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from bench import records  # noqa: E402
from bench.markdown import table  # noqa: E402
from bench.records import OURS, PEER  # noqa: E402


def test_counts(xml: Path) -> str:
    """ "1200 passed, 3 failed, 90 skipped" of a JUnit file; empty if there is none."""
    try:
        suites = list(ET.parse(xml).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        return ""
    total, failed, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites)
        for key in ("tests", "failures", "errors", "skipped")
    )
    words = [f"{total - failed - errors - skipped} passed"]
    pairs = ((failed, "failed"), (errors, "errors"), (skipped, "skipped"))
    return ", ".join(words + [f"{count} {word}" for count, word in pairs if count])


def sanitizer_counts(log: Path) -> str:
    """compute-sanitizer's closing lines, one a process: "0 errors"."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.findall(r"={9} (?:ERROR|RACECHECK) SUMMARY: (.+)", text)
    return "; ".join(line.strip() for line in found)


def bench_rows(path: Path) -> list[tuple[str, ...]]:
    """The cells of a benchmark's record (bench/records.py), one row a mode."""
    record = records.read(path)
    settings, facts = record["settings"], record["environment"]
    dtype = settings["dtype"]
    if dtype == "float32" and facts.get("tf32_cudnn"):
        dtype += " (TF32)"
    means, table = records.geometric_means(record), []
    for mode in settings["modes"]:
        rows = [row for row in record["rows"] if row["mode"] == mode]
        timed = {row["name"]: row["modules"][PEER]["ratio"] for row in rows if records.counts(row)}
        lowest = min(timed, key=timed.__getitem__, default=None)
        notes = [
            f"{name} {what} {count}"
            for name in (PEER, OURS)
            for what, key in (("refused", "error"), ("differs in", "differs"))
            if (count := sum(bool(row["modules"][name][key]) for row in rows))
        ]
        notes += [] if record["complete"] else ["not complete"]
        table.append(
            (
                settings["suite"],
                dtype,
                mode,
                str(len(timed)),
                f"{means[mode]:.2f}" if mode in means else "-",
                f"{timed[lowest]:.2f} ({lowest})" if lowest else "-",
                ", ".join(notes),
            )
        )
    return table


def summary(out: Path, parts: Mapping[str, Mapping]) -> str:
    """The whole text; ``parts`` is the state's, in the order in which they were run."""
    lines = ["# GPU", ""]
    try:
        machine = json.loads((out / "report.json").read_text())
        lines += [
            f"{machine['device']}, torch {machine['torch']}, CUDA {machine['cuda']}, cuDNN "
            f"{machine['cudnn']}, driver {machine['gpu'].get('driver_version')}",
            "",
        ]
    except (OSError, json.JSONDecodeError):
        pass
    rows = []
    for name, entry in parts.items():
        notes = [entry.get("note", "")]
        if entry["status"] != "skipped":
            notes += [test_counts(out / f"{name}.xml"), sanitizer_counts(out / f"{name}.log")]
        seconds = f"{entry['seconds']:g}" if "seconds" in entry else ""
        rows.append((name, entry["status"], seconds, "; ".join(filter(None, notes))))
    lines += table(("part", "result", "seconds", "notes"), rows)
    benches = [
        row for path in sorted((out / "bench").glob("*.jsonl")) for row in bench_rows(path)
    ]  # fmt: skip
    if benches:
        lines += ["", "nn.LSTM's time over lstm_ext's; above 1 lstm_ext is faster:", ""]
        head = ("suite", "dtype", "mode", "rows", "geometric mean", "lowest", "notes")
        lines += table(head, benches)
    return "\n".join(lines) + "\n"
