"""Registers and spills of the built CUDA kernels, held against tools/cuda_budget.json.

    python tools/cuda_resources.py [MODULE]            exit status 1 and a table if any is over
    python tools/cuda_resources.py [MODULE] --update   writes what was found into the budget

The figures are those of cuobjdump, per kernel family (a kernel's name and its arithmetic) and
architecture: the largest of its instances. STACK is a thread's stack frame in bytes,
which is where spilled registers go; LOCAL is its local memory.

On sm_90a no kernel may use either, whatever the budget's numbers, unless its entry there gives a
"reason". --update keeps reasons and never invents one. Every architecture must have the same
kernels: the host launches them by name.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "tools" / "cuda_budget.json"
NO_SPILLS = ("sm_90a",)
FIGURES = ("registers", "stack", "local")


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel for one architecture."""

    name: str  # as in the binary, or demangled
    arch: str  # "sm_90a"
    registers: int  # a thread
    stack: int  # bytes a thread
    local: int  # bytes a thread


def find_cuobjdump(environ: Mapping[str, str]) -> str:
    """The program, of CUDA_HOME, /usr/local/cuda or the package index's wheel.

    Raises:
        FileNotFoundError: it is in none of these.
    """
    site_folders = runpy.run_path(str(ROOT / "lstm_ext" / "_build.py"))["site_folders"]
    roots = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    roots += [
        Path("/usr/local/cuda"),
        *(path / "nvidia" / "cu13" for path in site_folders(environ)),
    ]
    for root in roots:
        program = root / "bin" / "cuobjdump"
        if os.access(program, os.X_OK):
            return str(program)
    raise FileNotFoundError("no cuobjdump was found: pip install nvidia-cuda-cuobjdump==13.2.51")


def parse(text: str) -> Iterator[Kernel]:
    """The kernels in what `cuobjdump --dump-resource-usage` prints.

    Raises:
        ValueError: a function without its figures, or before any architecture.
    """
    arch = function = None
    for line in text.splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):$", line):
            function = found[1]
        elif function is not None:
            found = re.match(r"\s*REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line)
            if found is None or arch is None:
                raise ValueError(f"cuobjdump: no figures of {function} in {line!r}")
            yield Kernel(function, arch, *map(int, found.groups()))
            function = None


def demangled(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The kernels with readable names, where c++filt or cu++filt is installed."""
    program = shutil.which("c++filt") or shutil.which("cu++filt")
    if program is None or not kernels:
        return list(kernels)
    names = "\n".join(kernel.name for kernel in kernels)
    done = subprocess.run([program], input=names, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    return [
        Kernel(name, k.arch, k.registers, k.stack, k.local)
        for name, k in zip(lines, kernels, strict=True)
    ]


def family(name: str) -> str:
    """ "void lstm_ext::cell<lstm_ext::Tf32, 4>(lstm_ext::Args)" -> "cell<Tf32>", its types only."""
    plain = re.sub(r"\(anonymous namespace\)::|\w+::", "", name).replace("> >", ">>")
    found = re.match(r"(?:void )?(\w+)(?:<([^(]*)>)?\(", plain)
    if found is None:
        return name
    nested = r"<(?:[^<>]|<[^<>]*>)*>"
    arguments = re.findall(rf"((?:[^<>, ]|{nested})+)", found[2] or "")
    types = list(itertools.takewhile(lambda a: not re.match(r"\d|true|false", a), arguments))
    return f"{found[1]}<{', '.join(types)}>" if types else found[1]


def worst(kernels: Sequence[Kernel]) -> dict[tuple[str, str], dict[str, Kernel]]:
    """(family, architecture) -> figure -> the instance with the largest one."""
    table: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        entry = table.setdefault((family(kernel.name), kernel.arch), {})
        for figure in FIGURES:
            if figure not in entry or getattr(kernel, figure) > getattr(entry[figure], figure):
                entry[figure] = kernel
    return table


def offenders(kernels: Sequence[Kernel], budget: Mapping) -> list[tuple[str, str, str, str]]:
    """(family, architecture, what is wrong, instance); nothing if all is within the budget.

    Architectures that the budget names nowhere are judged by NO_SPILLS only.
    """
    judged = {arch for entries in budget.values() for arch in entries}
    found, wrong = worst(kernels), []
    for (name, arch), entry in sorted(found.items()):
        allowed = budget.get(name, {}).get(arch)
        if allowed is None and arch in judged:
            wrong.append((name, arch, "not in the budget", entry["registers"].name))
        for figure, kernel in entry.items():
            value = getattr(kernel, figure)
            if allowed is not None and value > allowed[figure]:
                text = f"{value} {figure}, budget {allowed[figure]}"
                wrong.append((name, arch, text, kernel.name))
            elif figure != "registers" and value and arch in NO_SPILLS:
                if not (allowed or {}).get("reason"):
                    text = f"{value} bytes of {figure}, and no reason in the budget"
                    wrong.append((name, arch, text, kernel.name))
    built = {arch for _, arch in found}
    every = {kernel.name for kernel in kernels}
    for arch in sorted(built):
        for name in sorted(every - {kernel.name for kernel in kernels if kernel.arch == arch}):
            wrong.append((family(name), arch, "has no such kernel, others have", name))
    for name, entries in sorted(budget.items()):
        for arch in entries:
            if arch in built and (name, arch) not in found:
                wrong.append((name, arch, "in the budget, but no longer built", ""))
    return wrong


def updated(kernels: Sequence[Kernel], budget: Mapping) -> dict:
    """The budget with the figures found; architectures that were not built stay as they are."""
    found = worst(kernels)
    built = {arch for _, arch in found}
    new: dict[str, dict[str, dict]] = {}
    for name, entries in budget.items():
        kept = {arch: entry for arch, entry in entries.items() if arch not in built}
        if kept:
            new[name] = kept
    for (name, arch), entry in found.items():
        figures = {figure: getattr(kernel, figure) for figure, kernel in entry.items()}
        reason = budget.get(name, {}).get(arch, {}).get("reason")
        spills = figures["stack"] or figures["local"]
        new.setdefault(name, {})[arch] = figures | ({"reason": reason} if reason and spills else {})
    order = {name: dict(sorted(new[name].items(), key=lambda e: int(re.sub(r"\D", "", e[0]))))
             for name in sorted(new)}  # fmt: skip
    return order


def as_text(budget: Mapping) -> str:
    """JSON with one architecture a line."""
    blocks = []
    for name, entries in budget.items():
        lines = ",\n".join(f"    {json.dumps(a)}: {json.dumps(e)}" for a, e in entries.items())
        blocks.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Registers and spills against a budget.")
    parser.add_argument("module", nargs="?", type=Path, help="default: lstm_ext/_C*.so")
    parser.add_argument("--budget", type=Path, default=BUDGET, metavar="FILE")
    parser.add_argument("--update", action="store_true", help="write the budget anew")
    args = parser.parse_args(argv)
    module = args.module or next((ROOT / "lstm_ext").glob("_C*.so"), None)
    if module is None or not module.exists():
        parser.error(f"there is no {module or 'lstm_ext/_C*.so'}; build it with LSTM_EXT_CUDA=1")
    try:
        program = find_cuobjdump(os.environ)
    except FileNotFoundError as error:
        parser.error(str(error))
    done = subprocess.run(
        [program, "--dump-resource-usage", module], capture_output=True, text=True
    )
    kernels = demangled(list(parse(done.stdout)))
    if done.returncode or not kernels:
        said = done.stderr.strip() or "it holds no kernel"
        parser.error(f"cuobjdump of {module}: {said}")
    budget = json.loads(args.budget.read_text()) if args.budget.exists() else {}
    if args.update:
        budget = updated(kernels, budget)
        args.budget.write_text(as_text(budget))
    wrong = offenders(kernels, budget)
    archs = ", ".join(sorted({kernel.arch for kernel in kernels}))
    print(
        f"{len(kernels)} kernels of {len({family(k.name) for k in kernels})} families for {archs}"
    )
    for name, arch, text, instance in wrong:
        print(f"  {name:24} {arch:8} {text}  {instance}")
    if wrong:
        print(f"{len(wrong)} over {args.budget.name}; --update writes what was found into it")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
