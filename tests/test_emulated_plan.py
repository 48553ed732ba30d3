"""The plan of the CUDA engine: a pure function, tested with the properties of real devices."""

import itertools

import emulated
import pytest

from bench import suites
from lstm_ext.cuda_engine import FAMILIES

pytestmark = pytest.mark.cpu_only(reason="the plan asks no device")

# Published properties: compute capability, multiprocessors, shared memory of a block (opt-in), L2.
DEVICES = {
    "T4": (7, 5, 40, 64 << 10, 4 << 20),
    "A100": (8, 0, 108, 163 << 10, 40 << 20),
    "RTX 4090": (8, 9, 128, 99 << 10, 72 << 20),
    "H100": (9, 0, 132, 227 << 10, 50 << 20),
    "B200": (10, 0, 148, 227 << 10, 126 << 20),
}
DTYPES = {"float64": (0, False), "float32": (1, False), "tf32": (1, True), "bfloat16": (2, False)}
GPU_SUITES = ("deepbench-train", "deepbench-infer", "flashrnn", "classic", "edges")


def properties(name):
    names = ("major", "minor", "sm_count", "shared_bytes", "l2_bytes")
    facts = dict(zip(names, DEVICES[name], strict=True))
    return emulated.load().CudaProperties(**facts)


def facts_of(plan):
    """All fields of a plan."""
    return {n: getattr(plan, n) for n in dir(plan) if not n.startswith("_")}


def plan_of(device, **facts):
    problem = emulated.problem(**facts)
    return emulated.load().cuda_plan(problem, properties(device)), problem


def check(plan, problem, device, *, directions, B, H, backward):
    """What every plan must keep."""
    core = emulated.load()
    assert core.cuda_refuse_plan(plan, problem) == ""
    _, _, sm_count, shared_bytes, _ = DEVICES[device]
    assert 0 < plan.shared_bytes <= shared_bytes
    units = plan.m_tiles * (16 if backward else 4)
    assert (plan.slices - 1) * units < H <= plan.slices * units
    assert (plan.groups - 1) * plan.group_rows < B <= plan.groups * plan.group_rows
    if FAMILIES[plan.family] == "grid":  # all blocks of a cooperative launch run at once
        assert plan.slices * plan.groups * directions <= sm_count
    assert plan.step_us > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_benchmark_problems(device, dtype):
    code, tf32 = DTYPES[dtype]
    seen = 0
    for suite, backward in itertools.product(GPU_SUITES, (False, True)):
        for p in suites.SUITES[suite]:
            directions = 2 if p.bidirectional else 1
            facts = {"T": p.steps, "B": p.batch, "H": p.hidden_size, "directions": directions}
            facts |= {"dtype": code, "tf32": tf32, "backward": backward}
            facts |= {"projection": bool(p.proj_size), "P": p.proj_size or p.hidden_size}
            plan, problem = plan_of(device, **facts)
            sizes = {"B": p.batch, "H": p.hidden_size, "directions": directions}
            check(plan, problem, device, backward=backward, **sizes)
            assert facts_of(plan_of(device, **facts)[0]) == facts_of(plan)
            seen += 1
    assert seen > 50


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("device", DEVICES)
def test_odd_problems(device, backward):
    for dtype, (code, tf32) in DTYPES.items():
        for H, B in itertools.product((1, 7, 129, 1000, 20_000), (1, 9, 1000, 70_000)):
            facts = {"H": H, "B": B, "dtype": code, "tf32": tf32, "backward": backward}
            plan, problem = plan_of(device, **facts)
            check(plan, problem, device, directions=1, B=B, H=H, backward=backward)
            assert dtype not in ("float64", "float32") or plan.held == 0


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_one_launch_where_the_weights_fit(backward):
    """Long sequences of a middle size: all weights stay on the multiprocessors of an H100."""
    for H in (256, 512, 1024):
        plan, _ = plan_of("H100", T=100, B=32, H=H, backward=backward)
        assert FAMILIES[plan.family] == "grid"
        K = 4 * H if backward else H
        assert 8 * 32 * (plan.held + plan.shared) >= K, "some weights are streamed at every step"


@pytest.mark.parametrize(
    "facts", [{"T": 1}, {"projection": True, "P": 32}], ids=["T1", "projection"]
)
def test_a_launch_a_step_where_one_launch_is_impossible(facts):
    plan, _ = plan_of("H100", **facts)
    assert FAMILIES[plan.family] == "step"


def test_old_devices_keep_no_fragments_in_registers():
    """Turing has no bf16 on its tensor cores: its kernels hold nothing in registers."""
    for dtype, held in ((2, False), (3, True)):
        plans = emulated.load().cuda_plans(
            emulated.problem(dtype=dtype, H=512, B=1, T=9), properties("T4")
        )
        assert any(plan.held for plan in plans) == held


@pytest.mark.parametrize(
    "change, message",
    [
        ({"m_tiles": 3}, "no kernel has these tiles"),
        ({"held": 5}, "no kernel holds so many chunks"),
        ({"slices": 1}, "slices do not cover"),
        ({"groups": 0}, "groups do not cover"),
        ({"group_rows": 1}, "groups do not cover"),
        ({"shared": -1}, "shared_bytes is not"),
        ({"shared_bytes": 1}, "shared_bytes is not"),
        ({"family": 0}, "step kernel keeps no weights"),
    ],
    ids=str,
)
def test_what_is_refused(change, message):
    core = emulated.load()
    plan, problem = plan_of("H100", T=100, B=16, H=1024)
    assert core.cuda_refuse_plan(plan, problem) == ""
    for name, value in change.items():
        setattr(plan, name, value)
    assert message in core.cuda_refuse_plan(plan, problem)


def test_description():
    plan, problem = plan_of("H100", T=100, B=16, H=1024)
    text = emulated.load().cuda_describe_plan(plan, problem)
    for part in ("forward bfloat16 B 16 H 1024", "cooperative launch", "us a step"):
        assert part in text
