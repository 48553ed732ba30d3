"""The machine a benchmark runs on: its name, what timings on it depend on, its memory."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
ROOT = Path(__file__).resolve().parent.parent
SWITCHES = ("LSTM_EXT_", "OMP_", "GOMP_", "MKL_", "DNNL_", "ONEDNN_")


def _output_of(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpuinfo(field: str) -> str | None:
    """What the system says of the first processor; None where it says nothing."""
    try:
        info = CPUINFO.read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}\s*:\s*(.+)$", info, re.MULTILINE)
    return found[1].strip() if found else None


def cpu_model() -> str:
    """The processor's name as the system gives it, ``unknown-cpu`` if it gives none."""
    return _cpuinfo("model name") or platform.processor() or "unknown-cpu"


def cpu_family() -> str | None:
    """``25.17``: family and model, which tell a Zen 4 from a Zen 3 and a Zen 5 where a virtual
    machine calls all of them ``AMD EPYC``; None if unknown."""
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    return f"{family}.{model}" if family and model else None


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
    """Folder name for a machine's results: its GPU's model, or its CPU's and the vectors it has.

    ``amd-epyc-7b13-2c-avx512``; with ``-as-avx2`` where torch is held to fewer. ``AMD EPYC``
    alone is the name of several generations: ``amd-epyc-family-25-2c-avx512``.
    """
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    from lstm_ext.cpu.engine import cpu_isas

    vectors = cpu_isas()[0].split("_")[0]
    used = slug(torch.backends.cpu.get_cpu_capability())
    held = "" if used == vectors or vectors in ("neon", "portable") else f"-as-{used}"
    model, family = slug(cpu_model()), cpu_family()
    if family and not re.search(r"\d", model):
        # AMD's family and the vectors are a generation; Intel's family is always 6.
        number, its_model = family.split(".")
        model += f"-family-{number}" + (f"-model-{its_model}" if number == "6" else "")
    return f"{model}-{cores()}c-{vectors}{held}"


def results_folder(device: torch.device) -> Path:
    return ROOT / "bench" / "results" / machine(device)


def cache_bytes() -> dict[str, int]:
    """Sizes of the first processor's data caches, ``{"L1": 49152, …}``; empty if unknown."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) << 10
    return sizes


def l2_bytes(device: torch.device) -> int:
    """Of the second-level cache: a GPU's, or one core's; a megabyte if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return cache_bytes().get("L2", 1 << 20)


def git_commit() -> str | None:
    """The checkout's commit, with ``-dirty`` where files differ from it; None without one."""
    commit = _output_of("git", "rev-parse", "HEAD")
    if commit is None:
        return None
    # What a benchmark writes must not make the commit dirty.
    written = (":!bench/results", ":!README.md")
    changed = _output_of("git", "status", "--porcelain", "--", ".", *written)
    return commit + ("-dirty" if changed else "")


def environment(device: torch.device) -> dict[str, object]:
    """Everything that a timing depends on. Holds no path and no host name."""
    import lstm_ext

    facts: dict[str, object] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git_commit(),
        "lstm_ext": lstm_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_family": cpu_family(),
        "cache_bytes": cache_bytes(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
        "lstm_ext_cpu_isa": lstm_ext.ops.cpu_isa(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    # glibc gives freed memory back to the system at each training step of a large problem unless
    # these are set; the page faults that follow can take longer than the arithmetic.
    facts["malloc"] = {
        name: os.environ[name]
        for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
        if name in os.environ
    }
    # Whatever else the libraries were told; of lstm_ext not how it is built.
    facts["switches"] = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(SWITCHES) and not name.startswith("LSTM_EXT_CUDA")
    }
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


def grow_heap() -> None:
    """Makes malloc keep what is freed, as it does in a process that has run for a while.

    glibc maps large blocks and gives them back at once, with a page fault for each page the next
    time, until it has seen one freed: then it keeps blocks up to that size, 32 MB at most. A small
    nn.LSTM takes half the time then, so a benchmark must not depend on what ran before it.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call adds at its height to what was in use before; None if unknown.

    On a GPU those of torch's allocator. On a CPU the process's resident memory, whoever allocated
    it, in steps of some hundred KB: small problems read 0. Linux with glibc only.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else the call reuses what an earlier one has freed
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        return None
    call()
    return max(0, _resident("VmHWM") - before)
