"""The CUDA engine on the emulator: the kernels that a GPU runs, compiled for the CPU.

``engine()`` is an engine like the package's own, for tensors on the CPU; ``installed`` makes the
package use it, so that modules, autograd and every test of theirs can run on these kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from emulator.build import KERNELS, build

from lstm_ext import ops
from lstm_ext.cuda.engine import FAMILIES, CudaEngine
from lstm_ext.cuda.lanes import NoLanes

H100 = {"major": 9, "minor": 0, "sm_count": 132, "shared_bytes": 227 << 10, "l2_bytes": 50 << 20}
H100 |= {"clusters": [132, 66, 32, 16, 8], "vendor": True}
#: Chooses among the plans that could run a problem.
Pick = Callable[[list[Any], Any], Any]
SOURCES = [
    *(f"csrc/cuda/{name}.cu" for name in ("arrange", "engine", "plain", "second", "vendor_steps")),
    *(f"csrc/cuda/{name}plan.cpp" for name in ("", "describe_", "resident_", "vendor_")),
    "csrc/cuda/pointwise.cu",
    "csrc/cuda/bindings.cpp",
    "tests/emulator/module.cpp",
    "tests/emulator/vendor.cpp",
]


def build_module(name: str, sources: list[str], kernels: Sequence[Path] = ()) -> Path:
    """Path of an extension module."""
    # torch brings pybind11's headers.
    torch_headers = Path(torch.__file__).parent / "include"
    include = [f"-isystem{torch_headers}", f"-I{sysconfig.get_paths()['include']}"]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    flags = [*include, "-fvisibility=hidden"]
    return build(f"{name}{suffix}", sources, kind="shared", extra_flags=flags, kernels=kernels)


def load_module(name: str, sources: list[str], kernels: Sequence[Path] = ()) -> Any:
    """The module itself."""
    spec = importlib.util.spec_from_file_location(name, build_module(name, sources, kernels))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load() -> Any:
    """The extension module _emulated."""
    return load_module("_emulated", SOURCES, KERNELS)


class EmulatedEngine(CudaEngine):
    """The CUDA engine on tensors of the CPU, as a device with few multiprocessors."""

    device_type = "cpu"

    def __init__(self, core: Any, pick: Pick | None, **properties: Any):
        super().__init__(core)
        self._use_vendor(True)  # the emulator's own, whatever torch has
        self._pick = pick
        self.picked: list[Any] = []
        facts = {"major": 9, "minor": 0, "sm_count": 6, "shared_bytes": 227 << 10}
        facts |= {"l2_bytes": 50 << 20, "clusters": [6, 3, 1, 1, 1], "vendor": True} | properties
        self._properties = core.CudaProperties(**facts)

    def properties(self, device: torch.device) -> Any:
        return self._properties

    def raw_stream(self, index: int) -> int:
        return 0

    def is_current(self, index: int) -> bool:
        return True

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def lanes(self, device: torch.device, count: int) -> NoLanes:
        return NoLanes()

    def choose(self, problem: Any, device: torch.device) -> Any:
        plans = self.core.cuda_plans(problem, self._properties)
        plan = super().choose(problem, device) if self._pick is None else self._pick(plans, problem)
        self.picked.append(plan)
        return plan


def install() -> None:
    """For the rest of the process, layers on the CPU run on the emulated CUDA kernels."""
    ops._engines["cpu"] = EmulatedEngine(load(), None)


@contextlib.contextmanager
def installed(
    pick: Pick | None = None, *, seed: int = 0, **properties: Any
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


def only(
    family: str,
    *,
    forward: tuple[int, int] | None = None,
    backward: tuple[int, int] | None = None,
    stream: bool = False,
) -> Pick:
    """A ``pick``: plans of a family, with these m- and n-tiles; of several, that of most groups.

    stream: nothing of the weights stays on the multiprocessor; not for clusters. A problem that has
    no such plan (a projection has no grid kernels) gets one of another kind, with our own products.
    """

    def pick(plans: list[Any], problem: Any) -> Any:
        tile = backward if problem.backward else forward
        fitting = [
            p
            for p in plans
            if FAMILIES[p.family] == family
            and tile in (None, (p.m_tiles, p.n_tiles))
            and not p.ahead
        ]
        others = [p for p in plans if FAMILIES[p.family] != "vendor"]
        plan = max(fitting or others, key=lambda p: (p.groups, p.m_tiles, p.n_tiles))
        if stream and plan.shared:
            plan.shared_bytes -= plan.shared * 8 * plan.m_tiles * 1024
            plan.shared = 0
        if stream:
            plan.held = 0
        return plan

    return pick


def families_of(engine: EmulatedEngine) -> set[str]:
    """Of the plans that it has picked."""
    return {FAMILIES[plan.family] for plan in engine.picked}


def problem(**facts: Any) -> Any:
    """A CudaProblem: by default forward, bfloat16, T 2, B 64, H 64, one direction."""
    defaults = {"dtype": 2, "tf32": False, "backward": False, "projection": False}
    defaults |= {"variants": False, "normed": False}
    facts = defaults | {"directions": 1, "T": 2, "B": 64, "H": 64} | facts
    return load().CudaProblem(**({"P": facts["H"]} | facts))


def all_tiles(family: str, dtype: int, tf32: bool, backward: bool) -> list[tuple[int, int]]:
    """The tiles of a kind of kernel, as (m, n)."""
    core = load()
    device = core.CudaProperties(**H100)
    plans = core.cuda_plans(problem(dtype=dtype, tf32=tf32, backward=backward), device)
    return sorted({(p.m_tiles, p.n_tiles) for p in plans if FAMILIES[p.family] == family})
