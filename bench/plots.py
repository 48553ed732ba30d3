"""Plots of records, drawn again at any time without the machine they come from. SVG.

Needs matplotlib (the package's ``bench`` extra).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import records
from bench.records import OURS, PEER
from bench.suites import SCALING_BASE

Record = Mapping[str, Any]
COLOURS = {OURS: "#c0392b", PEER: "#34495e"}
MODE_COLOURS = {
    "inference": "#2980b9",
    "training": "#e67e22",
    "second": "#27ae60",
    "quantized": "#8e44ad",
}
MODE_LINES = {"inference": "-", "training": "--", "second": ":", "quantized": "-."}


def _figure(*size: float, **options: Any) -> tuple[Any, Any, Callable[[Path], None]]:
    """A figure, its axes and what saves it: the same bytes from the same record."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(figsize=size, layout="constrained", **options)

    def save(path: Path) -> None:
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)

    return figure, axes, save


def title(record: Record) -> str:
    settings, facts = record["settings"], record["environment"]
    where = facts.get("gpu") or f"{facts['cpu']}, {settings['threads']} threads"
    how = ", by torch.compile" if settings.get("compiled") else ""
    return f"{settings['dtype']} on {where}, torch {facts['torch']}{how}"


def speedup(record: Record, path: Path) -> bool:
    """nn.LSTM's time over lstm_ext's, a bar a problem and mode, with the smallest and largest.

    False, and no file, where no row has a speed-up.
    """
    rows = [row for row in record["rows"] if records.counts(row)]
    if not rows:
        return False
    names = list(dict.fromkeys(row["name"] for row in rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure, axes, save = _figure(7, 1.2 + 0.36 * len(names))
    height = 0.8 / len(modes)
    for row in rows:
        place = names.index(row["name"]) + (modes.index(row["mode"]) + 0.5) * height - 0.4
        peer = row["modules"][PEER]
        spread = [
            [max(0.0, peer["ratio"] - peer["ratio_min"])],
            [max(0.0, peer["ratio_max"] - peer["ratio"])],
        ]
        axes.barh(place, peer["ratio"], height, color=MODE_COLOURS[row["mode"]])
        axes.errorbar(peer["ratio"], place, xerr=spread, color="black", linewidth=0.7, capsize=1.5)
    longest = max(row["modules"][PEER]["ratio"] for row in rows)
    axes.set_xlim(0, 1.35 * longest)  # a sample that was disturbed may lie outside
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("nn.LSTM's time over lstm_ext's: above 1 lstm_ext is faster")
    axes.set_title(title(record), fontsize=9)
    for mode in modes:
        axes.barh([0], [0], color=MODE_COLOURS[mode], label=mode)
    axes.legend(loc="lower right")
    save(path)
    return True


def limit(record: Record, path: Path) -> bool:
    """How much of the measured limit each row reaches; False where no limit was measured."""
    rows = [row for row in record["rows"] if records.share_of_bound(row) is not None]
    if not rows:
        return False
    figure, axes, save = _figure(7, 1.2 + 0.24 * len(rows))
    names = [f"{row['name']} {row['mode']}" for row in rows]
    for name, offset in ((PEER, 0.2), (OURS, -0.2)):
        shares = [100 * (records.share_of_bound(row, name) or 0) for row in rows]
        places = [place + offset for place in range(len(rows))]
        axes.barh(places, shares, 0.4, color=COLOURS[name], label=name)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel("% of what this processor could do")
    axes.set_title(title(record), fontsize=9)
    axes.legend(loc="lower right")
    save(path)
    return True


def axis_of(row: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Along which sizes a row of the suite "scaling" lies, with its value: the base on all."""
    problem = row["problem"]
    sizes = (problem["steps"], problem["batch"], problem["hidden_size"])
    changed = [
        (name, size)
        for name, size, base in zip("TBH", sizes, SCALING_BASE, strict=True)
        if size != base
    ]
    return changed if len(changed) == 1 else list(zip("TBH", sizes, strict=True))


def scaling(record: Record, path: Path) -> bool:
    """Time over T, B and H, with what it would be if it grew as the work does; logarithmic.

    Of the suite "scaling". False where a size has no row.
    """
    found = {axis for row in record["rows"] for axis, _ in axis_of(row)}
    if found != set("TBH"):
        return False
    figure, panels, save = _figure(9, 3.4, ncols=3, sharey=True)
    T, B, H = SCALING_BASE
    fixed = {"T": f"B {B}, H {H}", "B": f"T {T}, H {H}", "H": f"T {T}, B {B}"}
    for axis, axes in zip("TBH", panels, strict=True):
        ticks: set[int] = set()
        for mode in dict.fromkeys(row["mode"] for row in record["rows"]):
            rows = [r for r in record["rows"] if r["mode"] == mode and axis in dict(axis_of(r))]
            rows.sort(key=lambda row: dict(axis_of(row))[axis])
            sizes = [dict(axis_of(row))[axis] for row in rows]
            ticks.update(sizes)
            for name in (PEER, OURS):
                times = [row["modules"][name]["ms"] for row in rows]
                label = f"{name}, {mode}"
                axes.plot(
                    sizes, times, MODE_LINES[mode], marker=".", color=COLOURS[name], label=label
                )
            # Through lstm_ext's last point: the work of a problem over that of the last one.
            if last := rows[-1]["modules"][OURS]["ms"]:
                work = [last * row["flop"] / rows[-1]["flop"] for row in rows]
                label = "as the work grows" if mode == "inference" else None
                axes.plot(sizes, work, ":", color="grey", label=label, zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted(ticks), [str(size) for size in sorted(ticks)])
        axes.minorticks_off()
        axes.set_xlabel(f"{axis}  ({fixed[axis]})")
    panels[0].set_ylabel("ms a call")
    panels[0].legend(fontsize=7)
    figure.suptitle(title(record), fontsize=9)
    save(path)
    return True


PLOTS: Mapping[str, Callable[[Record, Path], bool]] = {
    "speedup": speedup,
    "limit": limit,
    "scaling": scaling,
}


def draw(record: Record, stem: Path) -> dict[str, Path]:
    """The plots that a record is good for, as ``<stem>-<kind>.svg``; by kind.

    None of a record with more peers than nn.LSTM: it has a record of its own without them.
    """
    if record["settings"]["peers"]:
        return {}
    kinds = ("scaling",) if record["settings"]["suite"] == "scaling" else ("speedup", "limit")
    paths = {kind: stem.with_name(f"{stem.name}-{kind}.svg") for kind in kinds}
    return {kind: path for kind, path in paths.items() if PLOTS[kind](record, path)}
