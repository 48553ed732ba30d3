"""``python -m bench compare OLD NEW``: which rows became slower, beyond their noise.

Compared are lstm_ext's speed-ups over nn.LSTM, each measured within one run, so that neither a
faster machine nor a busy one decides. A row is slower (or faster) where its speed-up changed by
more than a factor and by more than several times the spread of its samples, of both runs together.
Beyond the factor but within the spread it is unclear.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import records
from bench.records import OURS, PEER

# What must be the same for two records to be of the same thing on a machine of the same kind.
SAME_SETTINGS = ("suite", "device", "dtype", "threads", "host", "compiled")
SAME_ENVIRONMENT = ("cpu", "cores", "torch", "torch_cpu_capability", "lstm_ext_cpu_isa", "gpu")
LEAST_SPREAD = 0.01  # of logarithms: few samples can lie on each other by chance
BAD = ("slower", "fails", "wrong")


@dataclass(frozen=True)
class Change:
    """A row in both records. ``change``: the new figure over the old one, above 1 is faster."""

    name: str
    mode: str
    verdict: str  # faster, same, unclear, slower; fails, wrong, missing
    old: float | None = None
    new: float | None = None
    noise: float | None = None  # the factor that the spread alone could make

    @property
    def change(self) -> float | None:
        return None if self.old is None or self.new is None else self.new / self.old


def figures(row: Mapping[str, Any], times: bool) -> list[float]:
    """One a turn, larger is faster: the speed-up over nn.LSTM, or with ``times`` calls a second."""
    ours = row["modules"][OURS]["samples_ms"]
    if times:
        return [1e3 / sample for sample in ours]
    peer = row["modules"][PEER]["samples_ms"]
    return [a / b for a, b in zip(peer, ours, strict=True)]


def judge(old: Sequence[float], new: Sequence[float], factor: float, spreads: float) -> str:
    change = math.log(statistics.median(new) / statistics.median(old))
    if abs(change) <= math.log(factor):
        return "same"
    if abs(change) <= math.log(noise_of(old, new, spreads)):
        return "unclear"
    return "faster" if change > 0 else "slower"


def noise_of(old: Sequence[float], new: Sequence[float], spreads: float) -> float:
    """The factor that so many spreads of both runs together make."""
    parts = (max(LEAST_SPREAD, records.log_spread(list(samples))) for samples in (old, new))
    return math.exp(spreads * math.hypot(*parts))


def compare(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    factor: float = 1.1,
    spreads: float = 4,
    times: bool = False,
) -> list[Change]:
    """A change for each row of the old record, in its order; rows that were no good are left out.

    times: compare lstm_ext's own times, which only the same idle machine repeats.
    """
    rows = {records.key(row): row for row in new["rows"]}
    changes = []
    for before in old["rows"]:
        key = records.key(before)
        if not records.counts(before):
            continue
        if (after := rows.get(key)) is None:
            changes.append(Change(*key, "missing"))
        elif after["modules"][OURS]["error"]:
            changes.append(Change(*key, "fails"))
        elif after["modules"][OURS]["differs"]:
            changes.append(Change(*key, "wrong"))
        elif not records.counts(after):
            changes.append(Change(*key, "missing"))  # nn.LSTM failed
        else:
            a, b = figures(before, times), figures(after, times)
            changes.append(
                Change(
                    *key,
                    judge(a, b, factor, spreads),
                    statistics.median(a),
                    statistics.median(b),
                    noise_of(a, b, spreads),
                )
            )
    return changes


def caches(record: Mapping[str, Any]) -> Any:
    """The processor's, in bytes; None where the record does not tell."""
    found = record["environment"].get("cache_bytes")
    return found or record.get("limits", {}).get("cache_bytes")  # older records: there only


def unlike(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In what two records are not of the same thing on the same kind of machine.

    Family and caches are compared where both tell: one name of a processor can be that of several.
    """
    pairs = [
        (name, old[part].get(name), new[part].get(name))
        for part, names in (("settings", SAME_SETTINGS), ("environment", SAME_ENVIRONMENT))
        for name in names
    ]
    families = [record["environment"].get("cpu_family") for record in (old, new)]
    told = [("cpu_family", *families), ("cache_bytes", caches(old), caches(new))]
    pairs += [(name, a, b) for name, a, b in told if a and b]
    return [f"{name}: {a} and {b}" for name, a, b in pairs if a != b]


def table(changes: Sequence[Change], what: str = "speed-up") -> list[str]:
    lines = [f"{'problem':34}  {'mode':9}  {'old':>8}  {'new':>8}  change   noise  verdict"]
    lines[0] += f"  ({what}; above 1 the new one is faster)"
    for c in changes:
        old, new, change, noise = (
            "-" if value is None else f"{value:.2f}" for value in (c.old, c.new, c.change, c.noise)
        )
        lines.append(
            f"{c.name:34}  {c.mode:9}  {old:>8}  {new:>8}  {change:>6}  {noise:>6}  {c.verdict}"
        )
    return lines


def summary(changes: Sequence[Change]) -> str:
    verdicts = dict.fromkeys(("faster", "same", "unclear", "slower", "fails", "wrong", "missing"))
    found = [c.verdict for c in changes]
    parts = [f"{found.count(name)} {name}" for name in verdicts if name in found]
    known = [c.change for c in changes if c.change is not None]
    mean = (
        f"; geometric mean of the changes {statistics.geometric_mean(known):.3f}" if known else ""
    )
    return (", ".join(parts) or "no row is in both") + mean


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description=__doc__.split("\n\n", 1)[1],
        epilog="Exit status 1 where a row is slower, fails or is wrong.",
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="a record")
    parser.add_argument("new", type=Path, metavar="NEW", help="a record")
    parser.add_argument("--factor", type=float, default=1.1, help="default: 1.1")
    parser.add_argument("--spreads", type=float, default=4, help="default: 4")
    parser.add_argument(
        "--times",
        action="store_true",
        help="lstm_ext's own times, in calls a second; only the same idle machine repeats them",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where a row is slower, fails or is wrong; exits with 2 on what is no record."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.factor < 1 or args.spreads < 0:
        parser.error("--factor: expected 1 or more; --spreads: 0 or more")
    try:
        old, new = records.read(args.old), records.read(args.new)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for difference in unlike(old, new):
        print(f"the records differ in {difference}", file=sys.stderr)
    changes = compare(old, new, factor=args.factor, spreads=args.spreads, times=args.times)
    print("\n".join(table(changes, "calls a second" if args.times else "speed-up")))
    print(summary(changes))
    return 1 if any(change.verdict in BAD for change in changes) else 0
