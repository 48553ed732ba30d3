"""bench.plans on the emulator, with a clock that counts."""

import emulated
import pytest
import torch

from bench import plans
from bench.suites import Problem
from lstm_ext.cuda.engine import FAMILIES

pytestmark = pytest.mark.cpu_only(reason="runs on the emulator")


def counting_clock(work):
    work()
    counting_clock.calls += 1
    return 60.0


@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_plan_is_timed_and_checked(bidirectional):
    class Engine(emulated.EmulatedEngine):
        def __init__(self, core):
            super().__init__(core, None, sm_count=12)

    counting_clock.calls = 0
    problem = Problem(3, 20, 5, 40, bidirectional=bidirectional)
    arguments = (Engine, emulated.load(), counting_clock, problem, torch.bfloat16)
    entries = list(plans.time_plans(*arguments, torch.device("cpu"), within=1e9, repeats=2))
    assert counting_clock.calls == 3 * len(entries)
    assert {entry["pass"] for entry in entries} == {"forward", "backward"}
    assert {entry["family"] for entry in entries} == set(FAMILIES)
    assert all(entry["same_bits"] for entry in entries)
    assert all(entry["difference"] < 2e-2 for entry in entries), "bfloat16"
    assert all(entry["measured_us"] == 60 / 3 for entry in entries)
    for name in ("forward", "backward"):
        of_pass = [entry for entry in entries if entry["pass"] == name]
        assert len(of_pass) > 5
        assert [entry["chosen"] for entry in of_pass].count(True) >= 1
        expected = [entry["expected_us"] for entry in of_pass]
        assert expected == sorted(expected)
        chosen = next(entry for entry in of_pass if entry["chosen"])
        others = [entry for entry in of_pass if entry["family"] != "tagged" and not entry["ahead"]]
        assert chosen["expected_us"] == others[0]["expected_us"] and chosen["difference"] == 0


def test_a_plan_of_other_bits_is_told():
    """Each is held against the first of its kind; here one tile is wrong that is not the first."""
    core = emulated.load()

    class Wrong(emulated.EmulatedEngine):
        def __init__(self, core):
            super().__init__(core, None, sm_count=12)

        def layer_forward(self, *arguments, **options):
            result = super().layer_forward(*arguments, **options)
            plan = self.picked[-1] if self.picked else self.plan_to_run
            if FAMILIES[plan.family] == "cluster" and plan.n_tiles == 2:
                result.y[-1, -1] += 1
            return result

    problem = Problem(2, 9, 5, 40)
    arguments = (Wrong, core, counting_clock, problem, torch.bfloat16, torch.device("cpu"))
    counting_clock.calls = 0
    told = 0
    for entry in plans.time_plans(*arguments, within=1e9, repeats=1):
        if entry["pass"] == "backward":
            break
        wrong = entry["family"] == "cluster" and entry["tile"][1] == 2
        assert entry["same_bits"] != wrong
        assert (entry["difference"] > 0.1) == wrong
        told += wrong
    assert told


def test_only_plans_near_the_best():
    core = emulated.load()
    device = core.CudaProperties(**emulated.H100)
    every = core.cuda_plans(emulated.problem(T=25, B=64, H=1024), device)
    best = min(plan.step_us for plan in every)
    near = list(plans.variants(every, best, 1.5))
    assert 1 < len(near) < len(every)
    assert all(plan.step_us <= 1.5 * best for plan in near)


def test_without_a_gpu_it_says_so(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert plans.main(["--out", str(tmp_path / "plans.jsonl")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
