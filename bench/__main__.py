"""Command line: ``python -m bench`` times a suite; its commands measure, compare and report."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

#: Commands by name, with what they do; each a module of this package with a main(argv).
COMMANDS = {
    "run": "time one suite on one device and dtype (the command without a name)",
    "publish": "the CPU's records in float32 and bfloat16, and the report: minutes",
    "report": "tables and plots from records on disk; nothing is measured",
    "headline": "a GPU's record beside a CPU's, problem by problem",
    "compare": "two records: which rows became slower, beyond their noise",
    "gate": "a short run against the machine's own record; fails on a clear regression",
    "limits": "what this processor can do at most",
}
MODULES = {"limits": "cpu_limits", "report": "markdown"}


def main(argv: Sequence[str] | None = None) -> int:
    """What the command returns; the first argument names it, or it is ``run``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = "run" if not argv or argv[0].startswith("-") else argv.pop(0)
    if name not in COMMANDS:
        parser = argparse.ArgumentParser(prog="python -m bench", usage="%(prog)s [COMMAND] ...")
        parser.error(f"unknown command {name!r}: expected one of {', '.join(COMMANDS)}")
    return importlib.import_module(f"bench.{MODULES.get(name, name)}").main(argv)


if __name__ == "__main__":
    sys.exit(main())
