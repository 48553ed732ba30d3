"""Installs the package index's CUDA toolkit into this Python's environment, where one is of use.

That is: an NVIDIA driver new enough for it is there, no toolkit is, and LSTM_EXT_CUDA is not 0.
`make demo` runs it before the build, so that the demo runs on the GPU.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

RULES = runpy.run_path(str(Path(__file__).resolve().parent.parent / "lstm_ext" / "_build.py"))
OLDEST_DRIVER = 580  # of CUDA 13, which TOOLKIT_WHEELS is
PROC = Path("/proc/driver/nvidia/version")


def nvidia_driver() -> str:
    """The version of the driver that is running, "580.159.04"; empty without one."""
    try:
        text = PROC.read_text()
    except OSError:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        text = done.stdout if done.returncode == 0 else ""
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else ""


def wheels_to_install(environ: Mapping[str, str], driver: str) -> tuple[str, ...]:
    """The wheels that a build with CUDA lacks here; none where it would be of no use."""
    if RULES["cuda_mode"](environ) == "0" or not driver:
        return ()
    if int(driver.split(".")[0]) < OLDEST_DRIVER or RULES["find_toolkit"](environ):
        return ()
    return RULES["TOOLKIT_WHEELS"]


def cpu_torch() -> str:
    """The version of an installed torch that says it is for the CPU; else empty."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return version if version.endswith("+cpu") else ""


def main() -> int:
    driver = nvidia_driver()
    wheels = wheels_to_install(os.environ, driver)
    if driver and (version := cpu_torch()):
        print(
            f"torch {version} cannot use the GPU of this machine (driver {driver}): "
            "`make distclean`, then TORCH= another build for make, does"
        )
        return 0
    if not wheels:
        return 0
    print(f"NVIDIA driver {driver} and no CUDA toolkit: installing the package index's")
    return subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wheels]).returncode


if __name__ == "__main__":
    sys.exit(main())
