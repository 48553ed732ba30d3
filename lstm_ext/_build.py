"""What to build: the CUDA switch, the toolkit and the architectures.

Standard library only, and no import from the package: setup.py loads this file by its path in
an environment without torch. At run time ``python -m lstm_ext`` takes its commands from here.
"""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

#: Values of LSTM_EXT_CUDA: off, required, and on where a toolkit is found.
CUDA_MODES = ("0", "1", "auto")

#: A whole toolkit from the package index. Pinned together: nvcc refuses a mix of versions.
TOOLKIT_WHEELS = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)
TOOLKIT_COMMAND = "pip install " + " ".join(TOOLKIT_WHEELS)

#: To be run in a checkout of the sources.
CUDA_BUILD_COMMAND = "LSTM_EXT_CUDA=1 pip install --force-reinstall --no-deps ."

#: Every generation that current PyTorch wheels support, and the two whose own instructions
#: need the "a" suffix or a generation of their own.
DEFAULT_ARCHS = ("75", "80", "86", "89", "90a", "100", "120")

OLDEST_ARCH = 75  # mma.m16n8k8, and what PyTorch's wheels support
OLDEST_TOOLKIT = 12  # sm_90a and C++17 in device code


class BuildError(Exception):
    """A build that cannot be done as asked; the message says what was got and what to do."""


@dataclass(frozen=True)
class CudaPlan:
    """Whether and how the CUDA sources are built."""

    toolkit: Path | None = None  # holds bin/nvcc; None: not built
    version: str = ""  # of the toolkit, "13.0.88"
    archs: tuple[str, ...] = ()  # as CMAKE_CUDA_ARCHITECTURES wants them
    reason: str = ""  # why not built; empty if built


def cuda_mode(environ: Mapping[str, str]) -> str:
    """The value of LSTM_EXT_CUDA: "0", "1" or "auto" (also when unset or empty)."""
    value = environ.get("LSTM_EXT_CUDA", "").strip() or "auto"
    if value not in CUDA_MODES:
        raise BuildError(f"LSTM_EXT_CUDA must be 0, 1 or auto, got {value!r}")
    return value


def site_folders(environ: Mapping[str, str]) -> list[Path]:
    """Folders that packages of this Python are installed to, nearest first.

    An isolated build hides the user's environment from ``sys.path`` but not from these: pip runs
    the environment's own interpreter, other front ends leave VIRTUAL_ENV or CONDA_PREFIX set.
    """
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := environ.get(name):
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            folders.append(os.path.join(prefix, "lib", version, "site-packages"))
    folders += site.getsitepackages() + [site.getusersitepackages()] + sys.path
    return [Path(folder) for folder in dict.fromkeys(folders) if folder]


def toolkit_places(environ: Mapping[str, str]) -> list[tuple[str, Path]]:
    """Where a toolkit may be, best first, each with the name to tell the user.

    An ``nvcc`` on PATH is not asked: it may be a wrapper script whose folder is no toolkit.
    """
    places = [
        (name, Path(environ[name])) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)
    ]
    places += [("package index", folder / "nvidia/cu13") for folder in site_folders(environ)]
    places.append(("system", Path("/usr/local/cuda")))
    return places


def find_toolkit(environ: Mapping[str, str]) -> Path | None:
    """The first place that holds an nvcc, or None."""
    for _, root in toolkit_places(environ):
        if os.access(root / "bin" / "nvcc", os.X_OK):
            return root.absolute()
    return None


def no_toolkit_reason(environ: Mapping[str, str]) -> str:
    """One line: where a toolkit was looked for."""
    named = ", ".join(
        f"{name} ({environ[name]})" if environ.get(name) else f"{name} (not set)"
        for name in ("CUDA_HOME", "CUDA_PATH")
    )
    return (
        "no CUDA toolkit was found: there is no bin/nvcc under "
        f"{named}, nvidia/cu13 of the Python environment, or /usr/local/cuda"
    )


def homes_not_there(environ: Mapping[str, str]) -> str:
    """One line: which of the named folders do not exist; empty if none."""
    return ", ".join(
        f"{name} ({environ[name]}) does not exist"
        for name in ("CUDA_HOME", "CUDA_PATH")
        if environ.get(name) and not os.path.isdir(environ[name])
    )


def plan_line(plan: CudaPlan, environ: Mapping[str, str]) -> str:
    """What is built, as the build prints it."""
    if plan.toolkit is None:
        return f"lstm_ext: CPU only: {plan.reason}"
    line = f"lstm_ext: CUDA {plan.version} at {plan.toolkit} for {', '.join(plan.archs)}"
    missing = homes_not_there(environ)
    return f"{line}; {missing}" if missing else line


def nvcc_facts(toolkit: Path) -> tuple[str, frozenset[int]]:
    """The version of a toolkit's nvcc and the architectures it knows, ("13.0.88", {75, 80, …})."""
    nvcc = toolkit / "bin" / "nvcc"

    def ask(option: str) -> str:
        try:
            done = subprocess.run([nvcc, option], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
            raise BuildError(f"{nvcc} {option} failed: {said}") from error
        return done.stdout

    version = re.search(r"\bV(\d+(?:\.\d+)+)", ask("--version"))
    if version is None:
        raise BuildError(f"{nvcc} --version names no version")
    if int(version[1].split(".")[0]) < OLDEST_TOOLKIT:
        raise BuildError(
            f"the CUDA toolkit at {toolkit} is {version[1]}; {OLDEST_TOOLKIT}.0 or newer is "
            f"needed. Set CUDA_HOME to another, or install one: {TOOLKIT_COMMAND}"
        )
    known = re.findall(r"compute_(\d+)\b", ask("--list-gpu-arch"))
    return version[1], frozenset(map(int, known))


def architectures(asked: str, known: Collection[int]) -> tuple[str, ...]:
    """CMAKE_CUDA_ARCHITECTURES for a user's list, which may be empty.

    Args:
        asked: LSTM_EXT_CUDA_ARCHS, such as "80;90a", "8.0, 9.0a" or "80 90a".
        known: what the nvcc at hand compiles for.

    Returns:
        Sorted, each as "90a-real" (machine code only), but the newest one without a suffix
        letter as "120": machine code and PTX, which later devices compile for themselves.
    """
    parsed = []
    for word in re.split(r"[;,\s]+", asked.strip()) if asked.strip() else DEFAULT_ARCHS:
        match = re.fullmatch(r"(\d+)\.?(\d)(a?)", word)
        if match is None:
            raise BuildError(
                f"LSTM_EXT_CUDA_ARCHS: {word!r} is no architecture; give a list such as "
                '"80;90a;120", separated by semicolons, commas or spaces'
            )
        number, suffix = int(match[1] + match[2]), match[3]
        if number < OLDEST_ARCH:
            raise BuildError(
                f"LSTM_EXT_CUDA_ARCHS: the kernels need {OLDEST_ARCH} or newer, got {word}"
            )
        if number in known and not (suffix and number < 90):
            parsed.append((number, suffix))
        elif asked.strip():
            names = ", ".join(map(str, sorted(known)))
            raise BuildError(
                f"LSTM_EXT_CUDA_ARCHS: this nvcc does not compile for {word}; it knows {names}, "
                "and from 90 on each with the suffix a"
            )
    baseline = max((number for number, suffix in parsed if not suffix), default=None)
    return tuple(
        str(number) if number == baseline and not suffix else f"{number}{suffix}-real"
        for number, suffix in sorted(set(parsed))
    )


def describe_archs(cmake_archs: str) -> str:
    """ "80-real;90a-real;120" as a person reads it: "80, 90a, 120 and PTX of 120"."""
    entries = [entry for entry in cmake_archs.split(";") if entry]
    names = ", ".join(entry.removesuffix("-real") for entry in entries)
    ptx = [entry for entry in entries if not entry.endswith("-real")]
    return f"{names} and PTX of {', '.join(ptx)}" if ptx else names


def plan_cuda(environ: Mapping[str, str]) -> CudaPlan:
    """What LSTM_EXT_CUDA, LSTM_EXT_CUDA_ARCHS and the toolkits at hand come to.

    Raises:
        BuildError: a value is not allowed; CUDA is required and there is no toolkit, or none where
            CUDA_HOME or CUDA_PATH says.
    """
    mode = cuda_mode(environ)
    if mode == "0":
        return CudaPlan(reason="LSTM_EXT_CUDA=0 was set")
    toolkit = find_toolkit(environ)
    if toolkit is None:
        reason = no_toolkit_reason(environ)
        if mode == "1":
            raise BuildError(f"LSTM_EXT_CUDA=1, but {reason}. This installs one: {TOOLKIT_COMMAND}")
        return CudaPlan(reason=reason)
    if mode == "1" and (missing := homes_not_there(environ)):
        raise BuildError(
            f"LSTM_EXT_CUDA=1, but {missing}: name another folder, or unset it to build with the "
            f"toolkit at {toolkit}"
        )
    version, known = nvcc_facts(toolkit)
    archs = architectures(environ.get("LSTM_EXT_CUDA_ARCHS", ""), known)
    return CudaPlan(toolkit=toolkit, version=version, archs=archs)
