"""The CUDA engine on the emulator: the kernels that a GPU runs, compiled for the CPU.

``engine()`` is an engine like the package's own, for tensors on the CPU; ``installed`` makes the
package use it, so that modules, autograd and every test of theirs can run on these kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lstm_ext import ops
from lstm_ext.cuda_engine import FAMILIES, CudaEngine

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("kernels_*.cu")),
    "csrc/cuda/engine.cu",
    "csrc/cuda/plan.cpp",
    "csrc/cuda/bindings.cpp",
    "tests/emulator/module.cpp",
]


@functools.cache
def build_module(mode: str = "plain") -> Path:
    """Path of the extension module _emulated, compiled for a mode of tests/emulator/build.py."""
    sys.path.insert(0, str(ROOT / "tests" / "emulator"))
    import pybind11

    import build

    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return build.build(
        f"_emulated{suffix}", SOURCES, mode, "shared", [*include, "-fvisibility=hidden"]
    )


@functools.cache
def load(mode: str = "plain") -> Any:
    """The module itself."""
    spec = importlib.util.spec_from_file_location("_emulated", build_module(mode))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class EmulatedEngine(CudaEngine):
    """The CUDA engine on tensors of the CPU, as a device with few multiprocessors."""

    def __init__(self, core: Any, pick: Callable[[list[Any]], Any] | None, **properties: Any):
        super().__init__(core)
        self._pick = pick
        self.picked: list[Any] = []
        facts = {"major": 9, "minor": 0, "sm_count": 6, "shared_bytes": 227 << 10}
        facts |= {"l2_bytes": 50 << 20} | properties
        self._properties = core.CudaProperties(**facts)

    def properties(self, device: torch.device) -> Any:
        return self._properties

    def stream(self, device: torch.device) -> int:
        return 0

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def choose(self, problem: Any, device: torch.device) -> Any:
        plans = self.core.cuda_plans(problem, self._properties)
        plan = super().choose(problem, device) if self._pick is None else self._pick(plans)
        self.picked.append(plan)
        return plan


def install() -> None:
    """For the rest of the process, layers on the CPU run on the emulated CUDA kernels."""
    ops._engines["cpu"] = EmulatedEngine(load(), None)


@contextlib.contextmanager
def installed(
    pick: Callable[[list[Any]], Any] | None = None, *, seed: int = 0, **properties: Any
) -> Iterator[EmulatedEngine]:
    """Layers on the CPU run on the emulated CUDA kernels.

    pick: chooses among the plans that could run; None: the engine's own choice. seed: of the
    emulator's scheduling. properties: of the device.
    """
    core = load()
    core.set_seed(seed)
    engine = EmulatedEngine(core, pick, **properties)
    before = ops._engines["cpu"]
    ops._engines["cpu"] = engine
    try:
        yield engine
    finally:
        ops._engines["cpu"] = before


def family(name: str, *, m: int | None = None, n: int | None = None, resident: int = 1):
    """A ``pick``: plans of a family with these tiles; of several, by how much stays on the SM.

    resident: 0: nothing stays (grid streams all its weights), 1: as much as fits.
    """

    def pick(plans: list[Any]) -> Any:
        fitting = [
            p
            for p in plans
            if FAMILIES[p.family] == name and m in (None, p.m_tiles) and n in (None, p.n_tiles)
        ]
        # A projection has no grid kernels.
        plan = max(fitting or plans, key=lambda p: (p.groups, p.m_tiles, p.n_tiles))
        if resident == 0 and plan.family:
            plan.shared_bytes -= plan.shared * 8 * plan.m_tiles * 1024
            plan.held = plan.shared = 0
        return plan

    return pick


def all_tiles(scalar: bool, backward: bool) -> list[tuple[int, int]]:
    """The tiles of a kind of kernel, as (m, n)."""
    core = load()
    problem = core.CudaProblem(
        dtype=1,
        tf32=not scalar,
        backward=backward,
        projection=False,
        directions=1,
        T=2,
        B=64,
        H=64,
        P=64,
    )
    device = core.CudaProperties(
        major=9, minor=0, sm_count=132, shared_bytes=227 << 10, l2_bytes=50 << 20
    )
    plans = core.cuda_plans(problem, device)
    pairs = [(p.m_tiles, p.n_tiles) for p in plans]
    return [pair for pair, _ in itertools.groupby(sorted(pairs))]
