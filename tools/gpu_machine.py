"""What tools/gpu.py needs of a machine, and a report of it.

python tools/gpu_machine.py check          names what is missing; exit status 1 if anything is
python tools/gpu_machine.py report FILE    versions, clocks and the package's own report, JSON
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_parts import ROOT, find_tool, toolkit

CLOCKS = "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def has_pybind11() -> bool:
    """The package, or the copy among torch's headers, which serves as well (setup.py)."""
    if has("pybind11"):
        return True
    spec = importlib.util.find_spec("torch")  # does not import it
    return (
        bool(spec and spec.origin)
        and (Path(spec.origin).parent / "include" / "pybind11" / "pybind11.h").exists()
    )


def missing() -> tuple[list[str], list[str]]:
    """(what the build cannot do without, what only some tests need), a line each."""
    needed = [
        f"{name}: pip install {name}" for name in ("torch", "setuptools", "pytest") if not has(name)
    ]
    needed += [
        f"{name}: pip install {name}"
        for name in ("cmake", "ninja")
        if not has(name) and shutil.which(name) is None
    ]
    if not has_pybind11():
        needed.append("pybind11 (or a torch with its headers): pip install pybind11")
    if toolkit(os.environ) is None:
        rules = runpy.run_path(str(ROOT / "lstm_ext" / "_build.py"))
        reason, command = rules["no_toolkit_reason"](os.environ), rules["TOOLKIT_COMMAND"]
        needed.append(f"{reason}; set CUDA_HOME, or: {command}")
    if has("torch"):
        import torch

        if not torch.cuda.is_available():
            needed.append(f"a GPU that torch {torch.__version__} can use (torch.cuda.is_available)")
    wanted = [
        f"{name}, for some of the tests: pip install {name}"
        for name in ("numpy", "allpairspy")
        if not has(name)
    ]
    return needed, wanted


def check() -> int:
    needed, wanted = missing()
    for line in needed:
        print(f"missing: {line}")
    for line in wanted:
        print(f"missing, but the rest can run: {line}")
    return 1 if needed else 0


def output_of(*command: str) -> str:
    """What a command prints, or why it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not run: {error}"
    return done.stdout.strip() if done.returncode == 0 else f"failed: {done.stderr.strip()[-2000:]}"


def report() -> dict[str, object]:
    import torch

    own = output_of(sys.executable, "-m", "lstm_ext", "--json")
    try:
        own = json.loads(own)
    except json.JSONDecodeError:
        pass
    gpu = torch.cuda.is_available()
    query = output_of("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "device": torch.cuda.get_device_name() if gpu else None,
        "capability": list(torch.cuda.get_device_capability()) if gpu else None,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "nvcc": output_of(find_tool("nvcc", os.environ) or "nvcc", "--version"),
        "gpu": dict(zip(CLOCKS.split(","), query.split(", "), strict=False)),
        "nvidia_smi": output_of("nvidia-smi", "-q", "-d", "CLOCK,POWER,TEMPERATURE,PERFORMANCE"),
        "lstm_ext": own,
    }


def main(arguments: list[str]) -> int:
    if arguments == ["check"]:
        return check()
    if len(arguments) == 2 and arguments[0] == "report":
        found = report()
        Path(arguments[1]).write_text(json.dumps(found, indent=1) + "\n")
        shown = {k: v for k, v in found.items() if k not in ("lstm_ext", "nvidia_smi")}
        print(json.dumps(shown, indent=1))
        built = isinstance(found["lstm_ext"], dict) and found["lstm_ext"]["cuda"]["built"]
        return 0 if built and found["device"] else 1
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
