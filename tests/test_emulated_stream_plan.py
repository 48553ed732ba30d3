"""Plans whose weights stream from L2 ahead of their use: a pure function of problem and device."""

import emulated
import pytest
from test_emulated_plan import DEVICES, check, properties

from lstm_ext.cuda.engine import FAMILIES

pytestmark = pytest.mark.cpu_only(reason="the plan asks no device")

TF32 = {"dtype": 1, "tf32": True, "T": 50}


def plans_of(device, **facts):
    problem = emulated.problem(**facts)
    plans = emulated.load().cuda_plans(problem, properties(device))
    return problem, [plan for plan in plans if FAMILIES[plan.family] == "grid"]


def tile(plan):
    return plan.m_tiles, plan.n_tiles, plan.groups


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("device", DEVICES)
def test_where_more_is_streamed_than_would_be_on_its_way(device, backward):
    """64 KB a block: some of what stayed on the multiprocessor makes room for them."""
    seen = 0
    for H in (512, 1024, 2048, 4096):
        problem, plans = plans_of(device, **TF32, H=H, B=16, backward=backward)
        of_a_warp = (4 * H if backward else H) * 4 // 64 // 8
        ahead = [plan for plan in plans if plan.ahead]
        others = {tile(plan): plan for plan in plans if not plan.ahead}
        assert len(ahead) + len(others) == len(plans)
        for plan in ahead:
            check(plan, problem, device, directions=1, B=16, H=H, backward=backward)
            other = others.pop(tile(plan))
            on_their_way = max(8 // plan.m_tiles, 1)
            assert of_a_warp - plan.held - other.shared > on_their_way
            assert plan.held == other.held
            assert plan.shared < other.shared or other.shared == 0
            streamed = of_a_warp - plan.held - plan.shared
            text = f"{streamed} from L2 ahead, {plan.in_l2} of them to stay there"
            assert text in emulated.load().cuda_describe_plan(plan, problem)
            # As many as leave L2 some room.
            of_a_chunk = 16 * plan.m_tiles * plan.slices * 64 * 8
            room = 0.7 * DEVICES[device][4]
            assert plan.in_l2 * of_a_chunk <= room
            assert plan.in_l2 == streamed or (plan.in_l2 + 1) * of_a_chunk >= room
            seen += 1
        for plan in others.values():  # those that have no such twin
            fits = of_a_warp - plan.held - plan.shared <= max(8 // plan.m_tiles, 1)
            without_weights = plan.shared_bytes - plan.shared * 8 * plan.m_tiles * 1024
            large = without_weights + (64 << 10) > DEVICES[device][3]
            assert fits or large or DEVICES[device][0] < 8
    assert (seen > 0) == (device != "T4")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("device", ["A100", "RTX 4090", "H100"])
def test_streaming_is_chosen_where_asked_for(device, backward):
    """It is expected to be faster, and was not measured."""
    core = emulated.load()
    chosen = 0
    for H, B in ((1536, 1), (1536, 16), (2048, 1), (2048, 16), (2048, 32), (4096, 1)):
        problem = emulated.problem(**TF32, H=H, B=B, backward=backward)
        every = core.cuda_plans(problem, properties(device))
        for untimed in (False, True):
            plan = core.cuda_plan(problem, properties(device, untimed=untimed))
            allowed = (
                p for p in every if untimed or not (p.ahead or FAMILIES[p.family] == "tagged")
            )
            assert plan.step_us == min(p.step_us for p in allowed)
            assert untimed or not plan.ahead
            chosen += plan.ahead
    assert chosen or device != "H100"


@pytest.mark.parametrize(
    "change",
    [
        {"family": 0, "held": 0, "shared": 0},
        {"held": 0},
        {"shared": 14},
    ],
    ids=str,
)
def test_what_is_refused(change):
    core = emulated.load()
    problem = emulated.problem(**TF32, H=2048, B=16)
    plan = core.cuda_plan(problem, properties("H100", untimed=True))
    assert plan.ahead and core.cuda_refuse_plan(plan, problem) == ""
    for name, value in change.items():
        setattr(plan, name, value)
    assert core.cuda_refuse_plan(plan, problem) == "no kernel streams these weights ahead"


@pytest.mark.parametrize("change", [{"in_l2": -1}, {"in_l2": 99}, {"ahead": False}], ids=str)
def test_what_l2_cannot_keep(change):
    core = emulated.load()
    problem = emulated.problem(**TF32, H=2048, B=16)
    plan = core.cuda_plan(problem, properties("H100", untimed=True))
    assert plan.in_l2 > 0
    for name, value in change.items():
        setattr(plan, name, value)
    assert "L2 is to keep" in core.cuda_refuse_plan(plan, problem)


@pytest.mark.parametrize(
    "facts",
    [{"tf32": False}, {"dtype": 0, "tf32": False}, {"variants": True}],
    ids=["float32", "float64", "variants"],
)
def test_kernels_that_cannot(facts):
    """Outside of tensor cores, and with variants."""
    core = emulated.load()
    problem, plans = plans_of("H100", **(TF32 | facts), H=2048, B=16)
    assert plans and not any(plan.ahead for plan in plans)
    plan = plans[0]
    plan.shared_bytes += (64 << 10) - plan.shared * 8 * plan.m_tiles * 1024
    plan.shared, plan.ahead = 0, True  # chunks enough
    assert core.cuda_refuse_plan(plan, problem) == "no kernel streams these weights ahead"


def test_a_launch_a_step_does_not():
    """With all that one launch would need, and nothing kept."""
    core = emulated.load()
    problem, plans = plans_of("H100", **TF32, H=2048, B=16)
    plan = next(plan for plan in plans if plan.ahead and plan.held == 0)
    plan.shared_bytes -= plan.shared * 8 * plan.m_tiles * 1024
    plan.shared = plan.in_l2 = 0
    assert core.cuda_refuse_plan(plan, problem) == ""
    plan.family = FAMILIES.index("step")
    assert core.cuda_refuse_plan(plan, problem) == "no kernel streams these weights ahead"


@pytest.mark.parametrize("name", ["ahead", "fetches"])
@pytest.mark.parametrize("family", ["cluster", "tagged", "vendor"])
def test_families_that_keep_all_or_nothing_do_not(family, name):
    core = emulated.load()
    problem = emulated.problem(T=100, B=16, H=256)
    plans = core.cuda_plans(problem, properties("H100"))
    plan = next(plan for plan in plans if FAMILIES[plan.family] == family)
    assert core.cuda_refuse_plan(plan, problem) == ""
    setattr(plan, name, True)
    assert core.cuda_refuse_plan(plan, problem)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("variants", [False, True])
@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_whose_cells_fetch_ahead(dtype, variants, backward):
    """Those of tiles that have more cells than the block threads, with fp32 sums."""
    core, seen = emulated.load(), set()
    facts = {"dtype": dtype, "tf32": dtype == 1, "variants": variants, "backward": backward}
    for H, B in ((256, 64), (1024, 64), (2048, 64)):
        problem, plans = plans_of("H100", **facts, H=H, B=B)
        for plan in plans:
            if FAMILIES[plan.family] not in ("step", "grid"):
                continue
            units = (16 if backward else 4) * plan.m_tiles
            rounds = max(8 * plan.n_tiles * units // 256, 1)
            taken = rounds * (6 if backward else 4) * 1024
            can = rounds > 1 and dtype != 0 and not variants
            can = can and (plan.m_tiles > 1 if backward else rounds == 2)
            assert can or not plan.fetches
            seen.add((can, plan.fetches))
            if can and not plan.fetches:
                assert not backward and plan.shared_bytes + taken > 227 << 10
            if can:
                plan.fetches ^= True
                plan.shared_bytes += taken if plan.fetches else -taken
                assert (core.cuda_refuse_plan(plan, problem) == "") == (not backward)
    assert ((True, True) in seen) == (dtype != 0 and not variants)
    # Where weights need the memory: on tensor cores alone do they stay.
    assert ((True, False) in seen) == (dtype != 0 and not variants and not backward)
