"""The parts of tools/gpu.py: names, commands, time limits, and what stands in the way of one."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 8.0  # of any part

DTYPES = ("float32", "bfloat16", "float16")
# (name, arguments of `python -m bench`), the largest suite in a part a mode.
SUITES = (
    ("host", ("--suite", "host", "--host")),
    ("edges", ("--suite", "edges")),
    ("deepbench-infer", ("--suite", "deepbench-infer")),
    ("deepbench-train", ("--suite", "deepbench-train")),
    ("flashrnn-inference", ("--suite", "flashrnn", "--mode", "inference")),
    ("flashrnn-training", ("--suite", "flashrnn", "--mode", "training")),
    ("classic", ("--suite", "classic")),
)
SANITIZERS = ("memcheck", "racecheck", "synccheck")
QUIET = r" (PASSED|SKIPPED)\b"  # pytest -v
SANITIZER_ERROR = "86"  # compute-sanitizer's exit status for what it found


@dataclass(frozen=True)
class Part:
    """Commands run one after the other, from the root of the checkout, until one fails."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    env: Mapping[str, str] = field(default_factory=dict)
    minutes: float = MINUTES
    every_call: bool = False  # run even if it passed before: its result may be gone
    needed: bool = False  # nothing goes on without it
    hide: str = ""  # lines in which this is found go to the log only
    skip: str = ""  # why it cannot be run here; empty if it can


def toolkit(environ: Mapping[str, str]) -> Path | None:
    """The CUDA toolkit that the build will take, or one whose nvcc is on PATH."""
    if found := runpy.run_path(str(ROOT / "lstm_ext" / "_build.py"))["find_toolkit"](environ):
        return found
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    root = Path(nvcc).resolve().parent.parent if nvcc else None
    # A wrapper script lies in a folder that is no toolkit.
    return root if root and (root / "include" / "cuda_runtime.h").exists() else None


def find_tool(name: str, environ: Mapping[str, str]) -> str | None:
    """A program of the CUDA toolkit: beside the nvcc of the build, on PATH, in /usr/local/cuda."""
    root = toolkit(environ)
    places = [str(root / "bin")] if root else []
    places += [environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which(name, path=os.pathsep.join(places))


def _pytest(out: Path, name: str, *arguments: str) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", "pytest", "-v", "--tb=short", "--continue-on-collection-errors"),
        # Where a kernel hangs, the log shows in which test before the part's time is over.
        *("-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"),
        "--ignore-glob=tests/test_emulat*",  # kernels on the CPU
        *("--device=cuda", f"--junitxml={out / name}.xml", *arguments),
    )


def _sanitizer(out: Path, tool: str, program: str, tf32: bool) -> Part:
    name = f"{tool}-tf32" if tf32 else tool
    chosen = ("--tf32=on", "-k", "float32") if tf32 else ()
    command = (
        *(program, "--tool", tool, "--error-exitcode", SANITIZER_ERROR),
        *("--target-processes", "all", "--kernel-name", "kns=lstm_ext"),
        *_pytest(out, name, "tests/test_cuda_small.py", "-m", "sanitizer", *chosen),
    )
    return Part(
        name,
        (command,),
        # Every tensor in memory of its own, so that a step past its end is seen.
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        hide=QUIET,
        skip="" if os.access(program, os.X_OK) else "compute-sanitizer was not found",
    )


def _primitives(out: Path, arch: str, environ: Mapping[str, str]) -> Part:
    source = ROOT / "tests" / "emulator" / "test_primitives.cu"
    program = out / "test_primitives"
    nvcc = find_tool("nvcc", environ)
    compiled = (
        *(nvcc or "nvcc", "-std=c++17", "-O2", f"-arch=sm_{arch}", "-I", str(ROOT / "csrc")),
        *("--expt-relaxed-constexpr", "-o", str(program), str(source)),
    )
    skip = "" if source.exists() else f"there is no {source.relative_to(ROOT)}"
    if not nvcc:
        skip = "nvcc was not found"
    return Part("primitives", (compiled, (str(program),)), skip=skip)


def _plans(out: Path, dtype: str) -> Part:
    """Every plan near the cost model's best, timed and checked: for tuning."""
    file = str(out / f"plans-{dtype}.jsonl")
    command = (sys.executable, "-m", "bench.plans", "--dtype", dtype, "--within", "1.5")
    return Part(f"plans-{dtype}", ((*command, "--repeats", "3", "--out", file),))


def _wavefront(out: Path, dtype: str) -> Part:
    """Stacks of layers as a wavefront, beside the layers in turn: whether to turn it on."""
    file = str(out / f"wavefront-{dtype}.jsonl")
    command = (sys.executable, "-m", "bench.wavefront", "--dtype", dtype)
    return Part(f"wavefront-{dtype}", ((*command, "--repeats", "5", "--out", file),))


def make_parts(out: Path, arch: str, environ: Mapping[str, str]) -> list[Part]:
    """All parts, in the order in which they are run.

    Args:
        out: folder of the results, absolute.
        arch: of the GPU at hand, as LSTM_EXT_CUDA_ARCHS takes it: "90a".
    """
    python, machine = sys.executable, str(ROOT / "tools" / "gpu_machine.py")
    sanitizer = find_tool("compute-sanitizer", environ) or "compute-sanitizer"
    settings = {"LSTM_EXT_CUDA": "1", "LSTM_EXT_CUDA_ARCHS": arch}
    if root := toolkit(environ):
        settings["CUDA_HOME"] = str(root)
    build = Part(
        "build",
        (
            (python, machine, "check"),
            (python, "setup.py", "build_ext", "--inplace"),
        ),
        env=settings,
        every_call=True,
        needed=True,
    )
    report = Part("report", ((python, machine, "report", str(out / "report.json")),))
    parts = [
        build,
        report,
        _primitives(out, arch, environ),
        Part("tests", (_pytest(out, "tests", "tests"),), hide=QUIET),
        Part("tests-tf32", (_pytest(out, "tests-tf32", "tests", "--tf32=on"),), hide=QUIET),
        *(_sanitizer(out, t, sanitizer, tf32) for t in SANITIZERS for tf32 in (False, True)),
        Part("floor", ((python, "-m", "bench.floor", "--out", str(out / "floor.jsonl")),)),
        *(_plans(out, dtype) for dtype in DTYPES),
        *(_wavefront(out, dtype) for dtype in DTYPES),
    ]
    for name, arguments in SUITES:
        for dtype in DTYPES:
            file = out / "bench" / f"{name}-{dtype}-cuda.jsonl"
            command = (python, "-m", "bench", *arguments, "--device", "cuda", "--dtype", dtype)
            command = (*command, "--floor", str(out / "floor.jsonl"))
            parts.append(Part(f"bench-{name}-{dtype}", ((*command, "--out", str(file)),)))
    return parts
