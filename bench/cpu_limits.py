"""``python -m bench limits``: what this processor can do at most, measured.

Billions of multiply-adds (two operations each) in registers, products of bfloat16 pairs where the
instruction set has them, and reads from each level of memory; with one thread and with all. A small
C++ file is compiled for it with the compiler at hand (``CXX`` or ``c++``).
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.machine import ROOT, cache_bytes

SOURCE = Path(__file__).with_name("cpu_peaks.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
MEMORY = 256 << 20  # bytes that no cache holds


def compiled() -> ctypes.CDLL:
    """The C++ file, compiled unless its library is there.

    Raises:
        OSError: there is no compiler, or it failed; says what it said.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    text = SOURCE.read_text() + repr((compiler, FLAGS))
    name = f"cpu_peaks-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    library = ROOT / "build" / "bench" / name
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        draft = library.with_name(f"{name}.{os.getpid()}")
        command = [*compiler, *FLAGS, "-o", str(draft), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{compiler[0]} failed: {done.stderr.strip()[-500:]}")
        draft.replace(library)
    core = ctypes.CDLL(str(library))
    count, seconds, size = ctypes.c_int, ctypes.c_double, ctypes.c_size_t
    core.round_trip.argtypes, core.round_trip.restype = (ctypes.c_int64,), seconds
    core.peak_float32.argtypes = core.peak_bfloat16.argtypes = (count, seconds)
    core.read_bandwidth.argtypes = (count, seconds, size)
    for function in (core.peak_float32, core.peak_bfloat16, core.read_bandwidth):
        function.restype = seconds
    return core


def buffer_sizes(caches: dict[str, int], threads: int) -> dict[str, int]:
    """Bytes that each thread reads for the speed of a level: they fit in it, not in the one below.

    The first and second level are a core's own, the third is shared by all threads.
    """
    sizes = {}
    below = 0
    for level, size in caches.items():
        share = size // threads if level == "L3" else size
        if share > below:
            sizes[level] = below + (share - below) // 2 if below else share // 2
        below = share
    return sizes | {"memory": MEMORY}


def measure(threads: int, seconds: float = 0.05, repeats: int = 3) -> dict[str, Any]:
    """The fastest of the repeats, since what else runs on the machine only slows them down.

    Returns:
        threads: the larger number of threads.
        vector_bits: of the vectors used.
        cache_bytes: {"L1": …, "L2": …, "L3": …}, as far as the system tells.
        gflops: {"float32": {"1": …, "2": …}, "bfloat16": … where the processor has it}, by threads.
        gb_per_s: {"L1": {"1": …, "2": …}, …, "memory": …}: reads, all threads together.
        error: alone, where they cannot be measured.
    """
    try:
        core = compiled()
    except OSError as error:
        return {"error": str(error)}
    counts = sorted({1, threads})

    def best(function: Any, count: int, *more: int) -> float:
        return max(function(count, seconds, *more) for _ in range(repeats)) / 1e9

    gflops = {"float32": {str(n): best(core.peak_float32, n) for n in counts}}
    if core.peak_bfloat16(1, 0.001) > 0:
        gflops["bfloat16"] = {str(n): best(core.peak_bfloat16, n) for n in counts}
    caches = cache_bytes()
    reads: dict[str, dict[str, float]] = {}
    for n in counts:
        for level, size in buffer_sizes(caches, n).items():
            reads.setdefault(level, {})[str(n)] = best(core.read_bandwidth, n, size)
    return {
        "threads": threads,
        "vector_bits": core.bits_of_a_vector(),
        "cache_bytes": caches,
        "gflops": gflops,
        "gb_per_s": reads,
    }


def round_trip() -> float:
    """Nanoseconds that a cache line takes from one thread to another and back, wherever the system
    puts them. In a virtual machine it can change within seconds: cores that share an L3 and cores
    that do not differ several times.

    Raises:
        OSError: as ``compiled``.
    """
    return round(1e9 * float(compiled().round_trip(20000)), 1)


def table(limits: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table."""
    if "error" in limits:
        return [f"The processor's limits were not measured: {limits['error']}"]
    all_threads = str(limits["threads"])
    counts = ["1"] if all_threads == "1" else ["1", all_threads]
    lines = [
        "| limit | " + " | ".join(f"{n} thread{'s' if n != '1' else ''}" for n in counts) + " |",
        "| --- |" + " --- |" * len(counts),
    ]
    what = {
        "float32": f"multiply-adds in float32, {limits['vector_bits']}-bit vectors",
        "bfloat16": "products of bfloat16 pairs, summed in float32",
    }
    for dtype, values in limits["gflops"].items():
        cells = " | ".join(f"{values[n]:.0f} GFLOP/s" for n in counts)
        lines.append(f"| {what[dtype]} | {cells} |")
    for level, values in limits["gb_per_s"].items():
        size = limits["cache_bytes"].get(level)
        name = f"reads from {level}" + (f" ({size >> 10} KiB)" if size else "")
        lines.append(f"| {name} | " + " | ".join(f"{values[n]:.0f} GB/s" for n in counts) + " |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 if nothing could be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench limits", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error(f"--threads: expected 1 or more, got {options.threads}")
    limits = measure(options.threads)
    print("\n".join(table(limits)))
    return 1 if "error" in limits else 0
