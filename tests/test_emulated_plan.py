"""The plan of the CUDA engine: a pure function, tested with the properties of real devices."""

import collections
import csv
import itertools
import statistics
from pathlib import Path

import emulated
import pytest

from bench import suites
from lstm_ext.cuda.engine import FAMILIES

pytestmark = pytest.mark.cpu_only(reason="the plan asks no device")

# Published properties: compute capability, multiprocessors, shared memory of a block (opt-in), L2,
# and how many clusters of 1, 2, 4, 8 and 16 blocks run at once (of a B200 a guess).
NO_CLUSTERS = (0, 0, 0, 0, 0)
DEVICES = {
    "T4": (7, 5, 40, 64 << 10, 4 << 20, NO_CLUSTERS),
    "A100": (8, 0, 108, 163 << 10, 40 << 20, NO_CLUSTERS),
    "RTX 4090": (8, 9, 128, 99 << 10, 72 << 20, NO_CLUSTERS),
    "H100": (9, 0, 132, 227 << 10, 50 << 20, (132, 66, 32, 16, 8)),
    "B200": (10, 0, 148, 227 << 10, 126 << 20, (148, 74, 36, 16, 8)),
}
DTYPES = {"float64": (0, False), "float32": (1, False), "tf32": (1, True), "bfloat16": (2, False)}
# Beside "shared": what cells fetch ahead takes the place of some weights now.
PLAN_COLUMNS = ("m_tiles", "n_tiles", "held", "groups", "group_rows")
GPU_SUITES = ("deepbench-train", "deepbench-infer", "flashrnn", "classic", "edges")


def properties(name, vendor=True, untimed=False, **others):
    names = ("major", "minor", "sm_count", "shared_bytes", "l2_bytes", "clusters")
    facts = dict(zip(names, DEVICES[name], strict=True), vendor=vendor, untimed=untimed)
    return emulated.load().CudaProperties(**facts | others)


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
    _, _, sm_count, shared_bytes, _, clusters = DEVICES[device]
    vendor = FAMILIES[plan.family] == "vendor"
    assert 0 < plan.shared_bytes <= shared_bytes or vendor
    units = 256 if vendor else plan.m_tiles * (16 if backward else 4)
    assert (plan.slices - 1) * units < H <= plan.slices * units
    assert (plan.groups - 1) * plan.group_rows < B <= plan.groups * plan.group_rows
    if FAMILIES[plan.family] in ("grid", "tagged"):  # all blocks of a cooperative launch at once
        assert plan.slices * plan.groups * directions <= sm_count
    if FAMILIES[plan.family] in ("cluster", "tagged"):
        assert plan.group_rows <= 8 * plan.n_tiles
    if FAMILIES[plan.family] == "cluster":
        size = plan.cluster.bit_length() - 1
        assert plan.cluster == 1 << size and 2 <= plan.cluster <= 16
        assert plan.slices <= plan.cluster < max(2 * plan.slices, 3)
        assert clusters[size] > 0, "no such cluster fits the device"
    else:
        assert plan.cluster == 0
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


def test_the_plan_is_near_the_fastest_that_was_measured():
    """Every plan of 96 shapes, forward and backward, was timed on an H100: of those that stand in
    the table and are compiled still, the model's choice."""
    table = Path(__file__).parents[1] / "bench/results/nvidia-h100-80gb-hbm3/plans.csv"
    measured = collections.defaultdict(dict)
    with table.open() as lines:
        next(lines)  # the machine
        for row in csv.DictReader(lines):
            key = row["family"], *(int(row[n]) for n in PLAN_COLUMNS)
            shape = row["dtype"], row["pass"], int(row["T"]), int(row["B"]), int(row["H"])
            measured[shape][key] = float(row["us"]), int(row["shared"])
    device = properties("H100", clusters=(132, 66, 30, 15, 7))  # measured, too
    slower = []
    for (dtype, direction, T, B, H), plans in measured.items():
        code, tf32 = DTYPES["tf32" if dtype == "float32" else dtype]
        facts = {"T": T, "B": B, "H": H, "dtype": code, "tf32": tf32}
        problem = emulated.problem(**facts, backward=direction == "backward")
        core = emulated.load()
        found = []
        for plan in core.cuda_plans(problem, device):
            key = FAMILIES[plan.family], *(getattr(plan, n) for n in PLAN_COLUMNS)
            if plan.ahead or key not in plans:
                continue
            us, shared = plans[key]
            found.append((plan.step_us, us))
            fewer = shared - plan.shared
            # Of a warp's chunks, what its block's cells fetch takes 48 KB at most.
            assert 0 <= fewer * 8 * plan.m_tiles * 1024 < (64 << 10 if plan.fetches else 1)
        assert len(found) >= 6
        slower.append(min(found)[1] / min(us for us, _ in plans.values()))
    assert len(slower) == 192
    assert statistics.mean(slower) < 1.015 and max(slower) < 1.25


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_one_launch_where_the_weights_fit(backward):
    """Long sequences of a middle size: all weights stay on the multiprocessors of an H100."""
    plans = emulated.load().cuda_plans
    for H in (256, 512, 1024):
        every = plans(emulated.problem(T=100, B=32, H=H, backward=backward), properties("H100"))
        of_grid = [plan for plan in every if FAMILIES[plan.family] == "grid"]
        plan = min(of_grid, key=lambda plan: plan.step_us)
        assert plan.step_us < min(p.step_us for p in every if FAMILIES[p.family] == "step")
        K = 4 * H if backward else H
        assert 8 * 32 * (plan.held + plan.shared) >= K, "some weights are streamed at every step"


@pytest.mark.parametrize(
    "facts",
    [{"T": 1}, {"projection": True, "P": 32}, {"T": 100, "variants": True, "normed": True}],
    ids=["T1", "projection", "norm"],
)
def test_a_launch_a_step_where_one_launch_is_impossible(facts):
    plan, _ = plan_of("H100", **facts)
    assert FAMILIES[plan.family] == "step"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_variants_have_few_tiles(dtype, backward):
    """Those of float64, whatever the arithmetic; no cluster; with a layer norm no grid."""
    code, tf32 = DTYPES[dtype]
    few = set(emulated.all_tiles("step", 0, False, backward))
    for normed in (False, True):
        facts = {"dtype": code, "tf32": tf32, "backward": backward}
        facts |= {"variants": True, "normed": normed, "T": 9, "B": 16, "H": 128}
        problem = emulated.problem(**facts)
        plans = emulated.load().cuda_plans(problem, properties("H100"))
        families = {"step", "vendor"} if normed else {"step", "grid", "vendor"}
        assert {FAMILIES[plan.family] for plan in plans} == families
        tiles = {(p.m_tiles, p.n_tiles) for p in plans if FAMILIES[p.family] != "vendor"}
        assert tiles == few
        for plan in plans:
            check(plan, problem, "H100", directions=1, B=16, H=128, backward=backward)
            assert plan.held == 0


def test_a_plan_without_variants_is_refused_with_them():
    plan, problem = plan_of("H100", T=100, B=16, H=1024)
    refuse = emulated.load().cuda_refuse_plan
    assert refuse(plan, problem) == ""
    facts = {"T": 100, "B": 16, "H": 1024, "variants": True}
    assert refuse(plan, emulated.problem(**facts)) == "no kernel has these tiles"
    with_variants, _ = plan_of("H100", **facts)
    assert FAMILIES[with_variants.family] == "grid"
    message = refuse(with_variants, emulated.problem(**facts, normed=True))
    assert message == "a projection or a layer norm has no grid kernels"


def test_a_cluster_is_refused_without_steps():
    facts = {"dtype": 2, "B": 4, "H": 256}
    plan, problem = plan_of("H100", T=100, **facts)
    assert FAMILIES[plan.family] == "cluster"
    refuse = emulated.load().cuda_refuse_plan
    assert refuse(plan, problem) == ""
    assert (
        refuse(plan, emulated.problem(T=0, **facts)) == "what keeps all weights has a step at least"
    )


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
        ({"cluster": 8}, "only the cluster family has clusters"),
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
    for facts, what in (({}, "with variants"), ({"normed": True}, "with layer norm")):
        plan, problem = plan_of("H100", T=100, B=16, H=1024, variants=True, **facts)
        text = emulated.load().cuda_describe_plan(plan, problem)
        assert f"forward bfloat16 {what} B 16 H 1024" in text


# ---- products of the vendor's library


def vendor_plans(device="H100", is_open=True, **facts):
    problem = emulated.problem(**({"T": 100} | facts))
    every = emulated.load().cuda_plans(problem, properties(device, is_open))
    return [plan for plan in every if FAMILIES[plan.family] == "vendor"], problem


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", ["tf32", "bfloat16"])
def test_large_layers_run_on_the_vendors_products(dtype, backward):
    """deepbench-train on an H100."""
    code, tf32 = DTYPES[dtype]
    facts = {"T": 25, "dtype": code, "tf32": tf32, "backward": backward}
    plan, _ = plan_of("H100", H=4096, B=128, **facts)
    assert FAMILIES[plan.family] == "vendor"
    for small in ({"H": 512, "B": 16}, {"H": 4096, "B": 128, "T": 1}):
        plan, _ = plan_of("H100", **(facts | small))
        assert FAMILIES[plan.family] != "vendor"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("device", DEVICES)
def test_vendor_plans(device, backward):
    """One a problem, whatever the arithmetic; blocks for all units and sequences."""
    for dtype, (code, tf32) in DTYPES.items():
        for H, B, directions in itertools.product((1, 257, 4096), (1, 33, 70_000), (1, 2)):
            facts = {"dtype": code, "tf32": tf32, "backward": backward, "directions": directions}
            plans, problem = vendor_plans(device, H=H, B=B, **facts)
            assert len(plans) == (device != "T4" or dtype != "bfloat16")
            for plan in plans:
                check(plan, problem, device, directions=directions, B=B, H=H, backward=backward)
                most = 4 * DEVICES[device][2]
                assert plan.group_rows == 1 or plan.slices * plan.groups * directions <= most


@pytest.mark.parametrize(
    "facts",
    [{"is_open": False}, {"T": 1}, {"T": 0}, {"projection": True, "P": 32}],
    ids=str,
)
def test_where_there_is_no_vendor_plan(facts):
    assert vendor_plans(H=4096, B=128)[0]
    assert not vendor_plans(H=4096, B=128, **facts)[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"m_tiles": 2}, "the vendor family has no tiles"),
        ({"n_tiles": 1}, "the vendor family has no tiles"),
        ({"cluster": 2}, "no clusters and keeps no weights"),
        ({"held": 1}, "no clusters and keeps no weights"),
        ({"shared": 1}, "no clusters and keeps no weights"),
        ({"shared_bytes": 1024}, "no clusters and keeps no weights"),
        ({"slices": 3}, "slices do not cover"),
        ({"slices": 5}, "slices do not cover"),
        ({"groups": 32}, "groups do not cover"),
        ({"group_rows": 0}, "groups do not cover"),
        ({"family": 0}, "no kernel has these tiles"),
    ],
    ids=str,
)
def test_what_is_refused_of_the_vendor_family(change, message):
    core = emulated.load()
    (plan,), problem = vendor_plans(H=1000, B=33)
    assert (plan.slices, plan.groups, plan.group_rows) == (4, 33, 1)
    assert core.cuda_refuse_plan(plan, problem) == ""
    for name, value in change.items():
        setattr(plan, name, value)
    assert message in core.cuda_refuse_plan(plan, problem)


def test_no_vendor_family_for_a_projection():
    (plan,), _ = vendor_plans(H=64, B=8)
    refused = emulated.load().cuda_refuse_plan(
        plan, emulated.problem(H=64, B=8, projection=True, P=32)
    )
    assert refused == "the vendor family has no projection"


def test_description_of_the_vendor_family():
    (plan,), problem = vendor_plans(H=4096, B=128)
    text = emulated.load().cuda_describe_plan(plan, problem)
    expected = (
        "forward bfloat16 B 128 H 4096 P 4096, 1 direction: the vendor's product and a launch a "
        "step, 512 blocks (16 slices of 256 units x 32 groups of 4 sequences); expected "
    )
    assert text.startswith(expected) and text.endswith(" us a step")
