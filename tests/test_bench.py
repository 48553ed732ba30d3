"""The benchmark's rows: what they run, check and say; nothing looks at a time."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import lstm_ext
from bench import machine, records, report, timing, work
from bench.suites import MODES, SECOND, Problem
from lstm_ext.cpu import engine as cpu_engine

pytestmark = pytest.mark.cpu_only(reason="the command line on the CPU")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"proj_size": 2},
        {"lengths": (1, 3)},
        {"num_layers": 2, "bidirectional": True, "lengths": (3, 2)},
        {"num_layers": 3, "first_bidirectional": True, "lengths": (2, 3)},
    ],
)
@pytest.mark.parametrize("mode", [*MODES, SECOND])
def test_a_call_does_the_work_it_stands_for(more, mode):
    problem = Problem(3, 2, 5, 7, **more)
    module = work.build(nn.LSTM, problem)
    inputs = work.make_inputs(problem, torch.float32, CPU, cache=0)
    assert all(isinstance(x, PackedSequence) == ("lengths" in more) for x in inputs)
    with torch.inference_mode(mode == "inference"):  # oneDNN's bits may depend on it
        expected = [work.values(module(x)[0]) for x in inputs]
    assert len(inputs) == 2 and not torch.equal(*expected)
    seen = []
    for parameter in module.parameters():
        parameter.register_hook(seen.append)

    call = work.make_call(module, inputs, mode, torch.ones_like(expected[0]))
    outputs = [call() for _ in range(3)]

    assert all(map(torch.equal, outputs, [*expected, expected[0]])), "each input in its turn"
    assert module.training == (mode != "inference")
    assert len(seen) == (0 if mode == "inference" else 3 * len(list(module.parameters())))
    assert all(parameter.grad is None for parameter in module.parameters())


def test_inputs_fill_the_cache_twice():
    problem = Problem(3, 2, 5, 7)  # 120 bytes in float32
    assert len(work.make_inputs(problem, torch.float32, CPU, cache=600)) == 10
    assert len(work.make_inputs(problem, torch.float64, CPU, cache=600)) == 5
    assert len(work.make_inputs(problem, torch.float32, CPU, cache=1 << 30)) == work.MOST_INPUTS


def test_first_bidirectional_is_a_stack():
    problem = Problem(3, 2, 5, 7, num_layers=4, first_bidirectional=True)
    first, rest = work.build(nn.LSTM, problem).lstms
    assert first.bidirectional and first.num_layers == 1
    assert not rest.bidirectional and (rest.num_layers, rest.input_size) == (3, 14)


def run_tiny(peer, ours, mode, **more):
    return timing.run_row(
        Problem(2, 1, 3, 4),
        mode,
        {"nn.LSTM": timing.drop_in(peer), "lstm_ext": timing.drop_in(ours)},
        dtype=torch.float32,
        device=CPU,
        repeats=2,
        min_sample=1e-4,
        **more,
    )


class Refusing(nn.LSTM):
    def forward(self, *_args, **_kwargs):
        raise RuntimeError("no kernel for this\nand a second line")


class TooWide(nn.LSTM):
    def forward(self, *args, **kwargs):
        y, state = super().forward(*args, **kwargs)
        return torch.cat((y, y), -1), state


@pytest.mark.parametrize("peer, ours", [(Refusing, nn.LSTM), (nn.LSTM, Refusing)])
def test_a_row_says_who_could_not_run_it(peer, ours):
    row = run_tiny(peer, ours, "training")
    failed, ran = (row.peer, row.ours) if peer is Refusing else (row.ours, row.peer)
    assert failed.error == "RuntimeError: no kernel for this"
    assert failed.samples == []
    assert ran.error is None and len(ran.samples) == 2
    assert row.ratio() is None and row.ratios() == []
    name = "nn.LSTM" if peer is Refusing else "lstm_ext"
    written = report.row_json(row, "float32")
    assert f"{name} cannot run this: RuntimeError: no kernel for this" in report.table_row(written)
    assert report.table_foot([written]) == "no row was run by both"
    json.dumps(written, allow_nan=False)


def test_an_output_of_another_shape_is_an_error_of_the_row():
    row = run_tiny(nn.LSTM, TooWide, "inference")
    assert row.peer.error is None
    assert "output is (2, 1, 8) float32, expected (2, 1, 4)" in row.ours.error
    assert row.ratio() is None


def test_errors_are_relative_but_of_zeros():
    zeros, fours = torch.zeros(2), torch.full((2,), 4.0)
    assert work.error_of({"a": fours + 1, "b": zeros}, {"a": fours, "b": zeros}) == 0.25
    assert work.error_of({"b": fours}, {"b": zeros}) == 4
    assert work.error_of({"b": zeros / 0}, {"b": zeros}) == float("inf")


class Off(nn.LSTM):
    """Its output is off; only the gradient of one weight is, or its second derivative; or there is
    no number at all."""

    how = "output"

    def forward(self, x, *args):
        y, state = super().forward(x, *args)
        if self.how == "gradient":
            weight = self.weight_hh_l0
            return y + 1e-3 * (weight - weight.detach()).sum(), state
        if self.how == "second":
            weight = self.weight_hh_l0
            return y + 1e-2 * (weight - weight.detach()).sum() * (x - x.detach()).sum(), state
        return y * (1.001 if self.how == "output" else float("nan")), state


@pytest.mark.parametrize(
    "how, mode, wrong",
    [
        ("output", "inference", True),
        ("nan", "inference", True),
        ("gradient", "inference", False),
        ("gradient", "training", True),
        ("second", "training", False),
        ("second", SECOND, True),
    ],
)
def test_a_row_says_who_computes_something_else(how, mode, wrong):
    of = type("Of", (Off,), {"how": how})
    row = run_tiny(nn.LSTM, of, mode)
    assert row.ours.error is None and row.ours.differs == wrong
    written = report.row_json(row, "float32")
    assert (
        "lstm_ext is not the same within tolerance: off by" in report.table_row(written)
    ) == wrong
    assert records.counts(written) != wrong
    json.dumps(written, allow_nan=False)


def test_where_the_device_is_too_small_the_truth_is_from_the_cpu(monkeypatch):
    tried = []

    def outcome(module, x, mode, cotangent):
        tried.append(work.values(x).dtype)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("as a GPU does")
        return work.outcome(module, x, mode, cotangent)

    monkeypatch.setattr(timing, "outcome", outcome)
    row = run_tiny(nn.LSTM, nn.LSTM, "training")
    assert tried == 2 * [torch.float64] + 2 * [torch.float32]
    assert row.ours.error is None and 0 < row.ours.off_by < 1e-5


@pytest.mark.parametrize("mode", [*MODES, SECOND])
def test_the_right_function_passes_the_check(mode):
    row = run_tiny(nn.LSTM, lstm_ext.LSTM, mode)
    assert not row.ours.differs and 0 < row.ours.off_by < 1e-5
    assert row.peer.allowed is None and row.ours.allowed == 2 * row.peer.off_by + 1e-5


def row_of(peer, ours, mode="inference"):
    problem = Problem(10, 2, 5, 7)
    timings = {"nn.LSTM": timing.Timing(peer, 1), "lstm_ext": timing.Timing(ours, 1)}
    return timing.Row(problem, mode, timings)


def test_figures_of_a_row():
    # Medians 4 and 2 ms; pairs 2, 1 and 4. 20 rows of 672 flop in 2 ms. 1 ms is the limit.
    row = row_of([4e-3, 2e-3, 8e-3], [2e-3, 2e-3, 2e-3])
    row.bound = 1e-3
    assert row.ratios() == pytest.approx([2, 1, 4])
    assert row.ratio() == pytest.approx(2)
    written = report.row_json(row, "float32")
    peer, ours = written["modules"]["nn.LSTM"], written["modules"]["lstm_ext"]
    assert peer["ms"] == pytest.approx(4)
    assert (peer["ratio"], peer["ratio_min"], peer["ratio_max"]) == pytest.approx((2, 1, 4))
    assert ours["us_per_step"] == pytest.approx(200)
    assert ours["gflops"] == pytest.approx(20 * 672 / 2e-3 / 1e9)
    assert ours["weights_gb_per_s"] == pytest.approx(10 * 4 * 7 * 7 * 4 / 2e-3 / 1e9)
    assert records.share_of_bound(written) == pytest.approx(0.5)
    assert records.share_of_bound(written, "nn.LSTM") == pytest.approx(0.25)
    assert " 50 %" in report.table_row(written)


def test_geometric_means():
    rows = [row_of([2.0], [1.0]), row_of([8.0], [1.0]), row_of([1.0], [1.0], "training")]
    wrong = row_of([9.0], [1.0])
    wrong.ours.off_by, wrong.ours.allowed = 1e-3, 1e-5
    written = [report.row_json(row, "float32") for row in (*rows, wrong)]
    means = records.geometric_means({"rows": written})
    assert means == pytest.approx({"inference": 4, "training": 1, "all": 16 ** (1 / 3)})


def test_memory_of_a_call():
    """The tensor is in the peak, though it is freed before the call ends."""
    peak = machine.peak_memory(lambda: torch.ones(4 << 20), CPU)
    if peak is None:
        pytest.skip("the system does not tell")
    assert 15 << 20 <= peak < 32 << 20


MAPPED = """
import ctypes, sys, torch
from bench import machine
class Info(ctypes.Structure):
    _fields_ = [(str(n), ctypes.c_size_t) for n in range(10)]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
if "grow" in sys.argv:
    machine.grow_heap()
before = getattr(mallinfo(), "3")
kept = torch.empty(8 << 20, dtype=torch.uint8)
print(getattr(mallinfo(), "3") - before)
"""


@pytest.mark.parametrize("argument, mapped", [("grow", "0"), ("", "1")])
def test_a_grown_heap_maps_no_block(argument, mapped):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", MAPPED, argument]
    done = subprocess.run(
        command, cwd=machine.ROOT, env=environ, capture_output=True, text=True, timeout=120
    )
    if "undefined symbol" in done.stderr:
        pytest.skip("not glibc, or an old one")
    assert done.stdout.strip() == mapped, done.stderr


def test_what_a_benchmark_writes_does_not_make_the_commit_dirty(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    git("init")
    for name in ("README.md", "bench/results/r", "bench/code"):
        (tmp_path / name).write_text("old")
    git("add", ".")
    git("commit", "-m", "m", "--no-verify")
    clean = machine.git_commit()
    assert len(clean) == 40
    for name in ("README.md", "bench/results/r", "bench/results/new"):
        (tmp_path / name).write_text("new")
    assert machine.git_commit() == clean
    (tmp_path / "bench" / "code").write_text("new")
    assert machine.git_commit() == f"{clean}-dirty"


@pytest.mark.parametrize(
    "model, folder",
    [
        ("AMD EPYC", "amd-epyc"),
        ("AMD EPYC 7B13 64-Core Processor", "amd-epyc-7b13"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_machine_names(model, folder):
    assert machine.slug(model) == folder


@pytest.mark.parametrize(
    "text, name, family",
    [
        ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n", "AMD EPYC", "25.17"),
        ("model name : A\nmodel : 1\ncpu family : 6\nmodel : 2\n", "A", "6.1"),
        ("CPU implementer\t: 0x41\n", None, None),
        (None, None, None),
    ],
    ids=["x86", "another order", "arm", "no file"],
)
def test_what_the_system_says_of_the_processor(monkeypatch, tmp_path, text, name, family):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    if text is not None:
        machine.CPUINFO.write_text(text)
    assert machine.cpu_model() == (name or "unknown-cpu")
    assert machine.cpu_family() == family


@pytest.mark.parametrize(
    "model, family, isas, used, folder",
    [
        ("AMD EPYC", "26.2", ["avx512_bf16", "avx2"], "AVX512", "amd-epyc-family-26-2c-avx512"),
        ("AMD EPYC", "26.2", ["avx512", "avx2"], "AVX2", "amd-epyc-family-26-2c-avx512-as-avx2"),
        ("Intel Xeon", "6.85", ["avx2"], "AVX2", "intel-xeon-family-6-model-85-2c-avx2"),
        ("AMD EPYC 7B13", "25.1", ["avx2", "portable"], "AVX2", "amd-epyc-7b13-2c-avx2"),
        ("AMD EPYC 7B13", "25.1", ["portable"], "DEFAULT", "amd-epyc-7b13-2c-portable"),
        ("unknown-cpu", None, ["portable"], "DEFAULT", "unknown-2c-portable"),
    ],
)
def test_folders_of_processors(monkeypatch, model, family, isas, used, folder):
    """What torch is held to does not pass for what another processor has; nor does a generation
    for another that has the same name."""
    monkeypatch.setattr(machine, "cpu_model", lambda: model)
    monkeypatch.setattr(machine, "cpu_family", lambda: family)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(cpu_engine, "cpu_isas", lambda: isas)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    assert machine.machine(torch.device("cpu")) == folder
