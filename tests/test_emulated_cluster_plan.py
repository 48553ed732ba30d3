"""Plans whose blocks keep all of the weights, of the families cluster and tagged: a pure function
of problem and device."""

import functools
import itertools

import emulated
import pytest
from test_emulated_plan import DTYPES, check, plan_of, properties

from lstm_ext.cuda.engine import FAMILIES

pytestmark = pytest.mark.cpu_only(reason="the plan asks no device")


def plans_of(family, device="H100", **facts):
    problem = emulated.problem(**({"T": 100} | facts))
    every = emulated.load().cuda_plans(problem, properties(device))
    return [plan for plan in every if FAMILIES[plan.family] == family], problem


cluster_plans = functools.partial(plans_of, "cluster")
tagged_plans = functools.partial(plans_of, "tagged")


# dtype: the most units of a block in either pass, elements of a chunk of k.
OF_CLUSTERS = {"tf32": (32, 16), "bfloat16": (48, 32)}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", OF_CLUSTERS)
@pytest.mark.parametrize("device", ["H100", "B200"])
def test_cluster_plans(device, dtype, backward):
    """Each can run and has a place for all weights; up to what 16 blocks have room for."""
    most_units, chunk = OF_CLUSTERS[dtype]
    code, tf32 = DTYPES[dtype]
    limit = 16 * most_units
    for H, B in itertools.product((1, 33, limit, limit + 1), (1, 5, 8, 100)):
        facts = {"dtype": code, "tf32": tf32, "backward": backward, "H": H, "B": B}
        plans, problem = cluster_plans(device, **facts)
        assert bool(plans) == (H <= limit)
        for plan in plans:
            check(plan, problem, device, directions=1, B=B, H=H, backward=backward)
            of_a_warp = plan.held + plan.shared  # m-tiles of 16 rows, or chunks of k
            of_rows = 2 if plan.m_tiles < 8 else 4  # warps with the same k
            assert of_a_warp * (8 * 16 if backward else 8 // of_rows * chunk) >= H
        if plans and B == 100:
            assert any(plan.group_rows % (8 * plan.n_tiles) for plan in plans), "all groups full"


def test_shared_bytes_of_a_cluster():
    """By hand, for 16 blocks of 32 units: H 512."""

    def of(m_tiles, **facts):
        plans, _ = cluster_plans(H=512, B=8, **facts)
        (plan,) = (p for p in plans if (p.m_tiles, p.n_tiles, p.group_rows) == (m_tiles, 1, 8))
        return plan.shared, plan.shared_bytes

    # Mbarriers; two states of 8 rows of 512, two parts of 8 rows of 32; four words of gx a thread,
    # twice; the sums of 2 warps for 8 m-tiles.
    ahead = 2 * 4 * 256 * 4
    assert of(8) == (0, 128 + 2 * 8 * (1024 + 64) + ahead + 2 * 8 * 128 * 4)
    # The same with fp32 elements, and 8 of a warp's 16 chunks for its 2 m-tiles.
    kept = 8 * 8 * 2 * 1024
    tf32 = of(8, dtype=1, tf32=True)
    assert tf32 == (8, 128 + 2 * 8 * (2048 + 128) + ahead + 2 * 8 * 128 * 4 + kept)
    # Mbarriers; two times 2 m-tiles from 16 blocks, and for them; six words ahead; two times 8 rows
    # of 4 x 32 gradients.
    ahead = 2 * 6 * 256 * 4
    parts = 4 * 16 * 2 * 128 * 4
    assert of(2, backward=True) == (0, 128 + parts + ahead + 2 * 8 * (256 + 64))
    # fp32, and 2 of a warp's 4 m-tiles, each of 4 x 32 elements a row.
    kept = 2 * 8 * 16 * 4 * 32 * 4
    tf32 = of(2, backward=True, dtype=1, tf32=True)
    assert tf32 == (2, 128 + parts + ahead + 2 * 8 * (512 + 64) + kept)


@pytest.mark.parametrize(
    "device, facts",
    [
        *((device, {}) for device in ("T4", "A100", "RTX 4090")),
        ("H100", {"T": 1}),
        ("H100", {"dtype": 0}),
        ("H100", {"dtype": 1}),
        ("H100", {"projection": True, "P": 32}),
        ("H100", {"H": 1024}),
        ("H100", {"H": 2048}),
    ],
    ids=str,
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_where_there_are_no_clusters(device, facts, backward):
    facts = {"H": 64, "B": 4} | facts
    plans, _ = cluster_plans(device, backward=backward, **facts)
    assert not plans
    plan, _ = plan_of(device, backward=backward, **({"T": 100} | facts))
    assert FAMILIES[plan.family] != "cluster"


def test_clusters_that_the_device_cannot_run():
    """A device may have clusters of 8 blocks and no larger ones."""
    facts = dict(emulated.H100, clusters=[132, 66, 32, 16, 0])
    device = emulated.load().CudaProperties(**facts)
    for H, most in ((256, 8), (257, 8), (512, 0)):
        plans = emulated.load().cuda_plans(emulated.problem(T=9, B=2, H=H), device)
        sizes = {plan.cluster for plan in plans}
        assert max(sizes) == most


@pytest.mark.parametrize("B", [1, 2, 4])
@pytest.mark.parametrize("dtype, H", [("tf32", 256), ("bfloat16", 256), ("bfloat16", 512)])
def test_small_batches_run_on_clusters(dtype, H, B):
    """deepbench-infer on an H100."""
    code, tf32 = DTYPES[dtype]
    plan, _ = plan_of("H100", T=25, B=B, H=H, dtype=code, tf32=tf32)
    assert FAMILIES[plan.family] == "cluster"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"m_tiles": 3}, "no kernel has these tiles"),
        ({"n_tiles": 3}, "no kernel has these tiles"),
        ({"slices": 12}, "slices do not cover"),
        ({"groups": 1}, "groups do not cover"),
        ({"group_rows": 7}, "groups do not cover"),
        ({"cluster": 0}, "a cluster has a block for each slice"),
        ({"cluster": 8}, "a cluster has a block for each slice"),
        ({"cluster": 13}, "a power of two"),
        ({"cluster": 32}, "from 2 to 16"),
        ({"slices": 14}, "no slice is without units"),
        ({"groups": 3}, "no group is without sequences"),
        ({"groups": 1, "group_rows": 16}, "a group has one tile of sequences"),
        ({"held": 5}, "no kernel holds so many chunks"),
        ({"shared": 4}, "all of the weights are kept"),
        ({"shared": 6}, "shared_bytes is not"),
        ({"shared_bytes": 1}, "shared_bytes is not"),
        ({"family": 1}, "only the cluster family has clusters"),
    ],
    ids=str,
)
def test_what_is_refused_of_a_cluster(change, message):
    core = emulated.load()
    plans, problem = cluster_plans(H=400, B=16, dtype=1, tf32=True)
    # 13 slices of 32 units in a cluster of 16 blocks, two groups.
    (plan,) = (p for p in plans if (p.m_tiles, p.n_tiles, p.group_rows) == (8, 1, 8))
    assert (plan.slices, plan.cluster, plan.groups, plan.held, plan.shared) == (13, 16, 2, 8, 5)
    assert core.cuda_refuse_plan(plan, problem) == ""
    for name, value in change.items():
        setattr(plan, name, value)
    assert message in core.cuda_refuse_plan(plan, problem)


@pytest.mark.parametrize(
    "facts",
    [{"dtype": 0}, {"dtype": 1}, {"projection": True, "P": 32}, {"variants": True}],
    ids=str,
)
@pytest.mark.parametrize("family", ["cluster", "tagged"])
def test_problems_without_such_kernels(facts, family):
    plans, _ = plans_of(family, H=64, B=8)
    refused = emulated.load().cuda_refuse_plan(plans[0], emulated.problem(T=9, B=8, **facts))
    assert "no projection, no variant, no product outside of tensor cores" in refused


def test_description_of_a_cluster():
    core = emulated.load()
    for backward, kept in (
        (False, "6 chunks in registers, 2 in shared memory;"),
        (True, "3 row tiles in registers, 1 in shared memory;"),
    ):
        plans, problem = cluster_plans(H=512, B=8, backward=backward)
        (plan,) = (p for p in plans if (p.m_tiles, p.group_rows) == (3 if backward else 12, 4))
        text = core.cuda_describe_plan(plan, problem)
        for part in ("bfloat16 B 8 H 512", ": clusters, 32 blocks (16 slices of 48 units x", kept):
            assert part in text


# ---- the family tagged


@pytest.mark.parametrize("dtype", OF_CLUSTERS)
@pytest.mark.parametrize("device", ["H100", "B200"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_tagged_plans(device, dtype, backward):
    """Each can run, all blocks at once, and has a place for all weights."""
    _, chunk = OF_CLUSTERS[dtype]
    code, tf32 = DTYPES[dtype]
    most = {"tf32": 1024, "bfloat16": 2048}[dtype]
    for H, B, directions in itertools.product((1, 33, 768, most, 2 * most), (1, 5, 16), (1, 2)):
        facts = {"dtype": code, "tf32": tf32, "H": H, "B": B, "directions": directions}
        facts["backward"] = backward
        plans, problem = tagged_plans(device, **facts)
        assert plans or H > 33
        assert not plans or H < 2 * most
        if (B, directions) == (1, 1):
            assert bool(plans) == (most >= H)
        for plan in plans:
            check(plan, problem, device, directions=directions, B=B, H=H, backward=backward)
            of_rows = 2 if plan.m_tiles < 8 else 4  # warps with the same k
            of_a_warp = plan.held + plan.shared
            assert of_a_warp * (8 * 16 if backward else 8 // of_rows * chunk) >= H


@pytest.mark.parametrize(
    "device, facts",
    [
        *((device, {}) for device in ("T4", "A100", "RTX 4090")),
        *(("H100", facts) for facts in ({"T": 1}, {"dtype": 0}, {"dtype": 1})),
        ("H100", {"projection": True, "P": 32}),
        ("H100", {"variants": True}),
    ],
    ids=str,
)
def test_where_there_are_no_tagged_plans(device, facts):
    plans, _ = tagged_plans(device, **({"H": 64, "B": 4} | facts))
    assert not plans


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("H, B", [(768, 1), (1024, 16)])
def test_what_nobody_has_timed_is_not_chosen_unasked(H, B, backward):
    """The family tagged; streaming ahead has its own rule without the switch."""
    core = emulated.load()
    problem = emulated.problem(T=100, H=H, B=B, backward=backward)
    chosen = core.cuda_plan(problem, properties("H100"))
    fastest = core.cuda_plan(problem, properties("H100", untimed=True))
    assert FAMILIES[chosen.family] != "tagged" and FAMILIES[fastest.family] == "tagged"
    every = core.cuda_plans(problem, properties("H100"))
    assert fastest.step_us == min(plan.step_us for plan in every) < chosen.step_us


@pytest.mark.parametrize("backward, m", [(False, 4), (True, 1)], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"m_tiles": 12}, "no kernel has these tiles"),
        ({"cluster": 16}, "only the cluster family has clusters"),
        ({"slices": 26}, "no slice is without units"),
        ({"groups": 3}, "no group is without sequences"),
        ({"groups": 1, "group_rows": 16}, "a group has one tile of sequences"),
        ({"held": 4}, "no kernel holds so many chunks"),
        ({"shared": -1}, "shared_bytes is not"),
        ({"shared": 1}, "shared_bytes is not"),
        ({"ahead": True}, "no kernel streams these weights ahead"),
    ],
    ids=str,
)
def test_what_is_refused_of_the_family_tagged(change, message, backward, m):
    core = emulated.load()
    plans, problem = tagged_plans(H=400, B=16, backward=backward)
    (plan,) = (p for p in plans if (p.m_tiles, p.group_rows) == (m, 8))
    assert (plan.slices, plan.groups, plan.held, plan.shared) == (25, 2, 8, 0)
    assert core.cuda_refuse_plan(plan, problem) == ""
    for name, value in change.items():
        setattr(plan, name, value)
    assert message in core.cuda_refuse_plan(plan, problem)


def test_shared_bytes_of_the_family_tagged():
    """Counted by hand. Backward, mbarriers that it does not use; for each of 8 warps 2 m-tiles of 8
    columns; six words ahead; two times 8 rows of 4 x 32 gradients; 4 of a warp's 8 m-tiles, each of
    4 x 32 elements a row."""
    plans, _ = tagged_plans(H=1024, B=8, backward=True)
    (plan,) = (p for p in plans if (p.m_tiles, p.group_rows) == (2, 8))
    sums, ahead, own = 8 * 2 * 128 * 4, 2 * 6 * 256 * 4, 2 * 8 * (256 + 64)
    kept = 4 * 8 * 16 * 4 * 32 * 2
    assert (plan.shared, plan.shared_bytes) == (4, 128 + sums + ahead + own + kept)


@pytest.mark.parametrize(
    "backward, m, kept",
    [
        (False, 4, "8 chunks in registers, 1 in shared memory;"),
        (True, 1, "8 row tiles in registers, 1 in shared memory;"),
    ],
)
def test_description_of_the_family_tagged(backward, m, kept):
    plans, problem = tagged_plans(H=1040, B=8, backward=backward)
    (plan,) = (p for p in plans if (p.m_tiles, p.group_rows) == (m, 8))
    text = emulated.load().cuda_describe_plan(plan, problem)
    for part in (
        "bfloat16 B 8 H 1040",
        ": one cooperative launch, words tagged with their step, 65 blocks (65 slices of 16 units",
        kept,
    ):
        assert part in text
