"""tools/cuda_resources.py on text in the form of cuobjdump 13.2.51, cut to a few kernels."""

import json
import stat
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = Path(__file__).with_name("cuobjdump_sample.txt")
pytestmark = pytest.mark.cpu_only(reason="a tool of the build")


@pytest.fixture
def resources(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import cuda_resources

    return cuda_resources


@pytest.fixture
def kernels(resources):
    if resources.shutil.which("c++filt") is None:
        pytest.skip("needs c++filt")
    return resources.demangled(list(resources.parse(SAMPLE.read_text())))


def test_parsing(resources, kernels):
    text = SAMPLE.read_text()
    assert len(kernels) == text.count(" Function ")
    found = {(resources.family(k.name), k.arch, k.registers, k.stack, k.local) for k in kernels}
    assert ("backward_cell<Tf32>", "sm_90a", 255, 16, 0) in found
    assert ("backward_cell<Tf32>", "sm_80", 255, 8, 0) in found
    assert ("probe_kernel", "sm_90a", 4, 0, 0) in found
    assert {arch for _, arch, *_ in found} == {"sm_80", "sm_90a"}, "the PTX has no figures"
    with pytest.raises(ValueError, match="no figures of f in '  REG:x'"):
        list(resources.parse("arch = sm_80\n Function f:\n  REG:x"))


@pytest.mark.parametrize(
    "name, family",
    [
        ("void lstm_ext::cell<lstm_ext::Tf32, 1, 4>(lstm_ext::Args)", "cell<Tf32>"),
        ("lstm_ext::(anonymous namespace)::probe_kernel()", "probe_kernel"),
        ("void a::step<b<float>, 4>(a::P<b<float> >, int)", "step<b<float>>"),
        (
            "void lstm_ext::forward_resident<lstm_ext::ThroughL2<lstm_ext::Tensor16<__nv_bfloat16>"
            " >, lstm_ext::Tensor16<__nv_bfloat16>, 2, 4, 1, 8>(lstm_ext::ForwardArgs)",
            "forward_resident<ThroughL2<Tensor16<__nv_bfloat16>>, Tensor16<__nv_bfloat16>>",
        ),
        (
            "void lstm_ext::backward_resident<lstm_ext::PartsThroughL2, lstm_ext::Tf32, 1, 1, 4>"
            "(lstm_ext::BackwardArgs)",
            "backward_resident<PartsThroughL2, Tf32>",
        ),
        ("plain", "plain"),
    ],
)
def test_families(resources, name, family):
    assert resources.family(name) == family


def test_a_spill_on_sm_90a_needs_a_reason(resources, kernels):
    budget = resources.updated(kernels, {})
    assert budget["backward_cell<Tf32>"]["sm_90a"] == {"registers": 255, "stack": 16, "local": 0}
    ((name, arch, text, instance),) = resources.offenders(kernels, budget)
    assert (name, arch) == ("backward_cell<Tf32>", "sm_90a")
    assert text == "16 bytes of stack, and no reason in the budget"
    assert "backward_cell<" in instance
    budget["backward_cell<Tf32>"]["sm_90a"]["reason"] = "two values of the tail"
    assert resources.offenders(kernels, budget) == []
    assert resources.updated(kernels, budget) == budget, "the reason is kept"
    # Without any budget the other architectures are not judged, this rule is.
    assert [wrong[:2] for wrong in resources.offenders(kernels, {})] == [(name, arch)]


def test_offenders(resources, kernels):
    budget = resources.updated(kernels, {})
    budget["backward_cell<Tf32>"]["sm_90a"] |= {"registers": 200, "reason": "known"}
    budget["gone"] = {"sm_80": {"registers": 1, "stack": 0, "local": 0}}
    budget["other_machine"] = {"sm_75": {"registers": 1, "stack": 0, "local": 0}}
    del budget["probe_kernel"]
    texts = {wrong[:3] for wrong in resources.offenders(kernels, budget)}
    assert texts == {
        ("backward_cell<Tf32>", "sm_90a", "255 registers, budget 200"),
        ("probe_kernel", "sm_80", "not in the budget"),
        ("probe_kernel", "sm_90a", "not in the budget"),
        ("gone", "sm_80", "in the budget, but no longer built"),
    }
    again = resources.updated(kernels, budget)
    assert "gone" not in again and "other_machine" in again


def test_every_architecture_has_the_same_kernels(resources, kernels):
    budget = resources.updated(kernels, {})
    budget["backward_cell<Tf32>"]["sm_90a"]["reason"] = "known"
    lost = next(k for k in kernels if k.arch == "sm_80" and "2, 4, 4" in k.name)
    ((name, arch, text, instance),) = resources.offenders(
        [k for k in kernels if k is not lost], budget
    )
    assert (name, arch, instance) == ("backward_cell<Tf32>", "sm_80", lost.name)
    assert text == "has no such kernel, others have"


def test_command(resources, monkeypatch, tmp_path, capsys):
    program = tmp_path / "bin" / "cuobjdump"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat '{SAMPLE}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    budget, module = tmp_path / "budget.json", tmp_path / "_C.so"
    module.touch()
    arguments = [str(module), "--budget", str(budget)]
    assert resources.main([*arguments, "--update"]) == 1, "a reason is missing"
    written = json.loads(budget.read_text())
    written["backward_cell<Tf32>"]["sm_90a"]["reason"] = "known"
    budget.write_text(json.dumps(written))
    assert resources.main(arguments) == 0
    assert "families for sm_80, sm_90a" in capsys.readouterr().out
    program.write_text("#!/bin/sh\n")
    with pytest.raises(SystemExit):
        resources.main(arguments)
    assert "it holds no kernel" in capsys.readouterr().err


def test_the_budget_in_the_checkout_is_as_the_tool_writes_it(resources):
    text = resources.BUDGET.read_text()
    assert resources.as_text(json.loads(text)) == text
    for entries in json.loads(text).values():
        for arch, entry in entries.items():
            assert set(resources.FIGURES) <= set(entry) <= {*resources.FIGURES, "reason"}
            assert arch.startswith("sm_")
