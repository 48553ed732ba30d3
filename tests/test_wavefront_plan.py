"""In how many parts a stack of layers runs as a wavefront, who can, and in which order."""

import itertools

import emulated
import pytest
from test_emulated_plan import DEVICES, properties

from lstm_ext.cuda.engine import FAMILIES
from lstm_ext.cuda.wavefront import cuts, order

pytestmark = pytest.mark.cpu_only(reason="the plan asks no device")


def wave_of(device, layers=4, steps=1000, **facts):
    problem = emulated.problem(**({"T": 2, "B": 8, "H": 512} | facts))
    core = emulated.load()
    return core.cuda_wavefront(problem, properties(device), layers, steps), problem


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("device", DEVICES)
def test_plans(device, backward):
    """Parts only where there are clusters and most of the device is left for other layers."""
    core, has_clusters = emulated.load(), any(DEVICES[device][-1])
    for batch, hidden, layers, steps in itertools.product(
        (1, 16, 128), (64, 512, 1024), (1, 2, 8), (1, 20, 1000)
    ):
        facts = {"B": batch, "H": hidden, "backward": backward}
        wave, problem = wave_of(device, layers, steps, **facts)
        assert core.cuda_refuse_plan(wave.plan, problem) == ""
        assert 1 <= wave.parts <= max(steps, 1)
        if wave.parts > 1:
            assert has_clusters and layers > 1 and FAMILIES[wave.plan.family] == "cluster"
            assert wave.us < 0.9 * wave.us_in_turn
            assert wave.us * layers > 0.9 * wave.us_in_turn, "more than all layers at once"
            size = wave.plan.cluster.bit_length() - 1
            assert 2 * wave.plan.groups <= DEVICES[device][-1][size], "two layers fit"
        else:
            assert wave.us == wave.us_in_turn
            assert wave.plan.step_us == core.cuda_plan(problem, properties(device)).step_us


def test_where_a_wavefront_pays():
    assert wave_of("H100")[0].parts > 4
    assert wave_of("H100", steps=20)[0].parts == 1, "the calls would take longer"
    assert wave_of("H100", layers=1)[0].parts == 1
    assert wave_of("H100", B=128)[0].parts == 1, "one layer fills the device"
    assert wave_of("H100", H=1024)[0].parts == 1, "no clusters"
    assert wave_of("H100", variants=True)[0].parts == 1
    assert wave_of("H100", dtype=0)[0].parts == 1


def test_only_clusters_do_a_part_of_the_steps():
    core = emulated.load()

    def call(family, steps):
        device = core.CudaProperties(**emulated.H100)
        plans = core.cuda_plans(emulated.problem(T=3, B=1, H=16), device)
        plan = next(p for p in plans if FAMILIES[p.family] == family)
        of = {"rows": 3, "stride_t": 1, "stride_b": 1, "offsets": 0, "lengths": 0, "reset": 0}
        layer = core.CudaLayer(
            dtype=2,
            tf32=False,
            device=0,
            directions=1,
            steps=core.Steps(T=3, B=1, reverse=False, **of),
            H=16,
            P=16,
            variants=False,
            normed=False,
            plan=plan,
        )
        nothing = dict.fromkeys("gx b_ih b_hh w_hh w_hr h0 c0 gates c_seq norm norm_r".split(), 0)
        nothing |= dict.fromkeys("y y_stride h_n c_n".split(), 0)
        direction = core.CudaForwardDirection(reverse=False, variants=core.Variants(), **nothing)
        core.cuda_forward(layer, [direction], 0, 0, steps)

    for family, steps in (
        *(("grid", steps) for steps in ((0, 2), (1, 3))),
        *(("cluster", steps) for steps in ((2, 2), (-1, 2), (0, 4), (2, 1))),
        ("tagged", (0, 2)),
    ):
        with pytest.raises(ValueError, match="only clusters do a part of the steps"):
            call(family, steps)


def test_order():
    for layers, parts in itertools.product((1, 2, 5), (1, 2, 7)):
        seen = list(order(layers, parts))
        assert sorted(seen) == sorted(itertools.product(range(layers), range(parts)))
        for layer, part in seen:
            done = seen[: seen.index((layer, part))]
            assert layer == 0 or (layer - 1, part) in done
            assert part == 0 or (layer, part - 1) in done
    assert cuts(7, 3) == [0, 2, 4, 7]
    assert all(a < b for t in range(1, 20) for a, b in itertools.pairwise(cuts(t, min(t, 6))))
