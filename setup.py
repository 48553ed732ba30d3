"""Builds the native core with CMake and Ninja; everything else is in pyproject.toml.

The build folder, build/<key>, outlives the isolated environments that pip makes, so that a
second build compiles only what changed. LSTM_EXT_CUDA, LSTM_EXT_CUDA_ARCHS, CUDA_HOME, CXX,
CXXFLAGS and CMAKE_BUILD_PARALLEL_LEVEL are respected.
"""

import filecmp
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_build_rules():
    """lstm_ext/_build.py as a module; importing the package itself would need torch."""
    spec = importlib.util.spec_from_file_location("_build", ROOT / "lstm_ext" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


rules = load_build_rules()


def find_tool(name: str) -> Path:
    """cmake or ninja: of the wheel in this (perhaps isolated) environment, else of PATH."""
    try:
        files = importlib.metadata.distribution(name).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    # The cmake wheel has a Python script in bin/ and the program itself in cmake/data/bin/.
    named = sorted((f for f in files if f.name == name), key=lambda f: "data" not in f.parts)
    for file in named:
        path = Path(file.locate()).resolve()
        if path.parent.name == "bin" and os.access(path, os.X_OK):
            return path
    if on_path := shutil.which(name):
        return Path(on_path)
    raise rules.BuildError(f"{name} was not found. This installs it: pip install {name}")


def find_pybind11() -> tuple[Path, str]:
    """The folder that holds pybind11/pybind11.h, and pybind11's version.

    Without the package, torch's copy of those headers serves as well: an environment without
    network that has torch can build.
    """
    for package, folder in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)  # does not import torch
        if spec is None or spec.origin is None:
            continue
        include = Path(spec.origin).parent / folder
        common = include / "pybind11" / "detail" / "common.h"
        if common.exists():
            numbers = re.findall(
                r"^#define PYBIND11_VERSION_(?:MAJOR|MINOR|PATCH|MICRO) (\w+)$",
                common.read_text(encoding="utf-8"),
                flags=re.MULTILINE,
            )
            return include, ".".join(numbers[:3])
    raise rules.BuildError("pybind11 was not found. This installs it: pip install pybind11")


def copy_pybind11(include: Path, target: Path) -> Path:
    """Copies the headers, alone and only those that differ, to a path that stays the same."""
    for header in sorted((include / "pybind11").rglob("*.h")):
        copy = target / header.relative_to(include)
        if not (copy.exists() and filecmp.cmp(header, copy, shallow=False)):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(header, copy)
    return target


def is_stale(folder: Path) -> bool:
    """True if CMake would refuse the folder's cache: moved, or its compiler is gone."""
    cache = folder / "CMakeCache.txt"
    if not cache.exists():
        return False
    entries = dict(
        re.findall(r"^(\w+):\w+=(.*)$", cache.read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    return (
        entries.get("CMAKE_CACHEFILE_DIR") != str(folder)
        or entries.get("CMAKE_HOME_DIRECTORY") != str(ROOT / "csrc")
        or not Path(entries.get("CMAKE_CXX_COMPILER", "")).exists()
    )


def build_folder(plan, python: str, pybind11_version: str) -> Path:
    """build/<key>; the key covers what CMake reads only when it makes its cache."""
    names = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS")
    facts = [python, pybind11_version, repr(plan), *(os.environ.get(name, "") for name in names)]
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:8]
    kind = f"cuda{plan.version}" if plan.toolkit else "cpu"
    tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    return ROOT / "build" / f"{tag}-{kind}-{digest}"


def usable_cores() -> int:
    """Cores this process may run on; fewer than the machine's in a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_native_core(version: str) -> Path:
    """Configures and builds csrc; returns the module's path in the build folder."""
    plan = rules.plan_cuda(os.environ)
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    include, pybind11_version = find_pybind11()
    # The interpreter under a virtual environment: the same headers, and the path stays.
    python = getattr(sys, "_base_executable", None) or sys.executable
    folder = build_folder(plan, python, pybind11_version)
    if is_stale(folder):
        shutil.rmtree(folder)
    include = copy_pybind11(include, folder / f"pybind11-{pybind11_version}")

    settings = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "Python_EXECUTABLE": python,
        "LSTM_EXT_VERSION": version,
        "LSTM_EXT_PYBIND11_INCLUDE": include,
        "LSTM_EXT_CUDA": "ON" if plan.toolkit else "OFF",
        "LSTM_EXT_CUDA_REASON": plan.reason,
    }
    if plan.toolkit:
        settings["CMAKE_CUDA_COMPILER"] = plan.toolkit / "bin" / "nvcc"
        settings["CMAKE_CUDA_ARCHITECTURES"] = ";".join(plan.archs)
    print(rules.plan_line(plan, os.environ))
    environ = dict(os.environ)
    environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(usable_cores()))
    configure = [cmake, "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja", "--log-level=NOTICE"]
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    for command in (configure, [cmake, "--build", folder]):
        sys.stdout.flush()
        if subprocess.run(command, env=environ).returncode != 0:
            hint = " LSTM_EXT_CUDA=0 builds without CUDA." if plan.toolkit else ""
            raise rules.BuildError(f"the native core did not build; see above.{hint}")
    shutil.copyfile(folder / "compile_commands.json", ROOT / "build" / "compile_commands.json")
    return folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


class CMakeBuild(build_ext):
    """Hands the one extension to CMake and puts the result where setuptools wants it."""

    def finalize_options(self):
        super().finalize_options()
        # Copy always: after a change of LSTM_EXT_CUDA the right module may be the older file.
        self.force = True

    def build_extension(self, ext):
        try:
            built = build_native_core(self.distribution.get_version())
        except rules.BuildError as error:
            raise SystemExit(f"lstm_ext: {error}") from None
        target = Path(self.get_ext_fullpath(ext.name))
        self.mkpath(str(target.parent))
        self.copy_file(str(built), str(target))


class CleanBuild(build):
    """Starts from an empty staging folder: a wheel must not pick up files of an older tree."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("lstm_ext._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "build": CleanBuild},
    )
