"""The benchmark's problem lists, arithmetic, command line and JSON; nothing looks at a time."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import lstm_ext
from bench import __main__ as cli
from bench import report, timing
from bench.suites import MODES, SUITES, Problem, modes_of, spread, square

pytestmark = pytest.mark.cpu_only(reason="the command line on the CPU")
CPU = torch.device("cpu")

# The design's lists: (T, B, H) of every problem whose input is as wide as its state and which has
# one layer and direction, no projection and a padded batch.
PLAIN = {
    "deepbench-train": {
        *((25, b, h) for h in (512, 1024, 2048, 4096) for b in (16, 32, 64, 128)),
        *((50, b, 1536) for b in (8, 16, 32)),
        *((150, b, 256) for b in (16, 32, 64)),
    },
    "deepbench-infer": {
        *((25, b, h) for h in (512, 1024, 2048) for b in (1, 2, 4)),
        *((50, b, 1536) for b in (1, 2, 4)),
        *((150, b, 256) for b in (1, 2, 4)),
    },
    "flashrnn": {
        *((1024, b, 768) for b in (2, 4, 8, 16, 32, 64, 128, 256)),
        *((t, 16, 768) for t in (256, 512, 1024, 2048)),
    },
    "classic": {(100, 64, 512)},
    "edges": {(100, b, 128) for b in (7, 8, 9, 128, 136)},
    "cpu": {
        (50, 1, 64),
        (50, 1, 128),
        (100, 1, 256),
        (25, 1, 512),
        (25, 4, 512),
        (25, 1, 1024),
        (150, 4, 256),
        (100, 16, 256),
        (50, 64, 128),
        (50, 64, 512),
    },
}


def is_plain(problem):
    return problem == square(problem.steps, problem.batch, problem.hidden_size, label=problem.label)


def others(suite):
    return [problem for problem in SUITES[suite] if not is_plain(problem)]


@pytest.mark.parametrize("suite", PLAIN)
def test_suite_holds_the_plain_problems_of_the_design(suite):
    plain = [p for p in SUITES[suite] if is_plain(p)]
    assert {(p.steps, p.batch, p.hidden_size) for p in plain} == PLAIN[suite]
    assert len(plain) == len(PLAIN[suite])


@pytest.mark.parametrize(
    "suite, count",
    [
        ("deepbench-train", 22),
        ("deepbench-infer", 15),
        ("flashrnn", 11),
        ("classic", 3),
        ("edges", 12),
        ("cpu", 13),
        ("host", 4),
    ],
)
def test_suite_is_complete(suite, count):
    assert len(SUITES[suite]) == count
    assert len({p.name for p in SUITES[suite]}) == count, "names must tell the rows apart"


def test_suites_are_those_of_the_design():
    assert set(SUITES) == {*PLAIN, "host"}
    assert not others("deepbench-train") + others("deepbench-infer") + others("flashrnn")


def test_classic_problems():
    appleyard, gnmt = others("classic")
    assert appleyard == square(100, 64, 512, num_layers=4, label="appleyard")
    assert (gnmt.batch, gnmt.input_size, gnmt.hidden_size, gnmt.num_layers) == (128, 1024, 1024, 4)
    assert gnmt.first_bidirectional and not gnmt.bidirectional
    assert len(gnmt.lengths) == 128


def test_edges_change_one_thing_at_a_time():
    base = Problem(100, 8, 128, 128)
    assert base in SUITES["edges"]
    changes = []
    for problem in SUITES["edges"]:
        fields = dataclasses.asdict(problem).items()
        changes.append([(k, v) for k, v in fields if v != getattr(base, k)])
    assert sorted(map(len, changes)) == [0] + [1] * 11
    (lengths,) = [v for change in changes for k, v in change if k == "lengths"]
    assert max(lengths) == 100 and len(lengths) == 8
    expected = {
        *(("hidden_size", h) for h in (129, 192, 193)),
        *(("batch", b) for b in (7, 9, 128, 136)),
        ("input_size", 100),
        ("num_layers", 2),
        ("bidirectional", True),
        ("lengths", lengths),
    }
    assert {change[0] for change in changes if change} == expected


def test_cpu_problems():
    packed, projected, deep = others("cpu")
    assert packed == square(100, 32, 256, lengths=packed.lengths)
    assert (min(packed.lengths), max(packed.lengths)) == (5, 100)
    assert projected == square(100, 32, 256, proj_size=128)
    assert deep == square(100, 32, 128, num_layers=2, bidirectional=True)


def test_modes():
    assert modes_of("cpu", None) == MODES
    assert modes_of("deepbench-train", None) == ("training",)
    assert modes_of("deepbench-infer", None) == ("inference",)
    assert modes_of("deepbench-infer", "both") == MODES
    assert modes_of("cpu", "training") == ("training",)


def test_spread_of_lengths():
    assert spread(5, 100, 2) == (5, 100)
    assert spread(2, 5, 4) == (2, 3, 4, 5)


def test_lengths_must_fit_the_batch():
    with pytest.raises(ValueError, match="lengths must name 2 sequences, the longest of 3 steps"):
        Problem(3, 2, 4, 4, lengths=(3, 2, 1))
    with pytest.raises(ValueError, match="the longest of 3 steps"):
        Problem(3, 2, 4, 4, lengths=(2, 1))


# By hand, 2 floating-point operations a multiply-add; a row is one step of one sequence.
#   T 3, B 2, I 5, H 7: 6 rows of 2·4·7·(5 + 7) = 672.
#   projection to 2: 6 rows of 2·4·7·(5 + 2) + 2·7·2 = 392 + 28.
#   packed, lengths 1 and 3: 4 rows of 672.
#   2 layers, bidirectional: 6 rows of 2·672 + 2·2·4·7·(14 + 7) = 1344 + 2352.
#   2 layers, the first bidirectional: 6 rows of 2·672 + 2·4·7·(14 + 7) = 1344 + 1176.
@pytest.mark.parametrize(
    "more, flop",
    [
        ({}, 6 * 672),
        ({"proj_size": 2}, 6 * 420),
        ({"lengths": (1, 3)}, 4 * 672),
        ({"num_layers": 2, "bidirectional": True}, 6 * 3696),
        ({"num_layers": 2, "first_bidirectional": True}, 6 * 2520),
    ],
)
def test_flop_by_hand(more, flop):
    problem = Problem(3, 2, 5, 7, **more)
    assert problem.flop("inference") == flop
    assert problem.flop("training") == 3 * flop


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
@pytest.mark.parametrize("mode", MODES)
def test_a_call_does_the_work_it_stands_for(more, mode):
    problem = Problem(3, 2, 5, 7, **more)
    module = timing.build(nn.LSTM, problem)
    x = timing.make_input(problem, torch.float32, CPU)
    assert isinstance(x, PackedSequence) == ("lengths" in more)
    expected = timing.values(module(x)[0])
    seen = []
    for parameter in module.parameters():
        parameter.register_hook(seen.append)

    output = timing.make_call(module, x, mode, torch.ones_like(expected))()

    assert torch.equal(output, expected)
    assert module.training == (mode == "training")
    assert len(seen) == (len(list(module.parameters())) if mode == "training" else 0)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_first_bidirectional_is_a_stack():
    problem = Problem(3, 2, 5, 7, num_layers=4, first_bidirectional=True)
    first, rest = timing.build(nn.LSTM, problem).lstms
    assert first.bidirectional and first.num_layers == 1
    assert not rest.bidirectional and (rest.num_layers, rest.input_size) == (3, 14)


def run_tiny(peer, ours, mode):
    return timing.run_row(
        Problem(2, 1, 3, 4),
        mode,
        peer,
        ours,
        dtype=torch.float32,
        device=CPU,
        repeats=2,
        min_sample=1e-4,
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
    assert row.ratio is None and row.ratios == []
    name = "nn.LSTM" if peer is Refusing else "lstm_ext"
    assert f"{name} cannot run this: RuntimeError: no kernel for this" in report.table_row(row)
    assert report.table_foot([row]) == "no row was run by both"
    json.dumps(report.to_json([row], {}, {}, True), allow_nan=False)


def test_an_output_of_another_shape_is_an_error_of_the_row():
    row = run_tiny(nn.LSTM, TooWide, "inference")
    assert row.peer.error is None
    assert "the output is (2, 1, 8) torch.float32, expected (2, 1, 4)" in row.ours.error
    assert row.ratio is None


def row_of(peer, ours, mode="inference"):
    problem = Problem(10, 2, 5, 7)
    return timing.Row(problem, mode, timing.Timing(peer, 1), timing.Timing(ours, 1))


def test_figures_of_a_row():
    # Medians 4 and 2 ms; pairs 2, 1 and 4. 20 rows of 672 flop in 2 ms.
    row = row_of([4e-3, 2e-3, 8e-3], [2e-3, 2e-3, 2e-3])
    assert row.ratios == pytest.approx([2, 1, 4])
    assert row.ratio == pytest.approx(2)
    assert report.milliseconds(row.peer) == pytest.approx(4)
    assert report.us_per_step(row.ours, row) == pytest.approx(200)
    assert report.gflops(row.ours, row) == pytest.approx(20 * 672 / 2e-3 / 1e9)


def test_geometric_means():
    rows = [row_of([2.0], [1.0]), row_of([8.0], [1.0]), row_of([1.0], [1.0], "training")]
    means = timing.geometric_means(rows)
    assert means == pytest.approx({"inference": 4, "training": 1, "all": 16 ** (1 / 3)})


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
    assert report.slug(model) == folder


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--suite"),
        (("--suite", "all"), "invalid choice: 'all'"),
        (("--suite", "cpu", "--dtype", "int8"), "invalid choice: 'int8'"),
        (("--suite", "cpu", "--threads", "0"), "invalid positive integer value: '0'"),
        (("--suite", "cpu", "--repeats", "x"), "invalid positive integer value: 'x'"),
        (("--suite", "cpu", "--rows", "("), "'(' is not a regular expression"),
        (("--suite", "cpu", "--rows", "B3 "), "matches none of"),
        (("--suite", "cpu", "--out", "."), "cannot write"),
        (("--suite", "host", "--host"), "--host belongs to --device cuda"),
        (("--suite", "cpu", "--floor", "f"), "--floor belongs to --device cuda"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_cuda_without_a_gpu_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        cli.main(("--suite", "cpu", "--device", "cuda"))
    assert caught.value.code == 2
    assert "sees no usable CUDA GPU" in capsys.readouterr().err


KEYS = {"schema", "complete", "settings", "environment", "rows", "geometric_mean_ratio"}
ROW_KEYS = {
    *("name", "mode", "problem", "flop", "nn_lstm", "lstm_ext"),
    *("ratio", "ratio_min", "ratio_max", "ratios", "floor_us_per_step", "of_floor"),
}
TIMING_KEYS = {"ms", "us_per_step", "gflops", "calls_per_sample", "samples_ms", "error"}


def test_command_writes_the_documented_json(tmp_path):
    out = tmp_path / "new folder" / "r.json"
    command = [sys.executable, "-m", "bench", "--suite", "cpu", "--rows", "^T50 B1 H64$"]
    command += ["--quick", "--repeats", "2", "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "T50 B1 H64" in done.stdout and "geometric mean of the ratios" in done.stdout

    written = json.loads(out.read_text())
    assert set(written) == KEYS
    assert written["complete"] is True
    settings = written["settings"]
    assert (settings["suite"], settings["dtype"], settings["device"]) == ("cpu", "float32", "cpu")
    assert (settings["threads"], settings["repeats"], settings["quick"]) == (1, 2, True)
    facts = written["environment"]
    assert facts["torch"] == torch.__version__ and facts["lstm_ext"] and facts["cpu"]
    assert facts["lstm_ext_cpu_isa"] and facts["threads"] == 1
    assert str(tmp_path) not in out.read_text() and str(report.ROOT) not in out.read_text()
    assert [row["mode"] for row in written["rows"]] == list(MODES)
    for row in written["rows"]:
        assert set(row) == ROW_KEYS
        for name in ("nn_lstm", "lstm_ext"):
            assert set(row[name]) == TIMING_KEYS
            assert row[name]["error"] is None
            assert len(row[name]["samples_ms"]) == 2 and row[name]["calls_per_sample"] >= 1
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert not list(out.parent.glob("*.part"))


def test_a_row_that_lstm_ext_refuses_makes_the_run_fail(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lstm_ext, "LSTM", Refusing)
    out = tmp_path / "r.json"
    arguments = ("--suite", "cpu", "--rows", "B1 H64", "--quick", "--repeats", "1")
    assert cli.main((*arguments, "--out", str(out))) == 1
    written = json.loads(out.read_text())
    assert written["complete"] is True
    assert [r["lstm_ext"]["error"] for r in written["rows"]] == 2 * [
        "RuntimeError: no kernel for this"
    ]
    assert capsys.readouterr().out.count("lstm_ext cannot run this") == 2


def test_default_place_of_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(cli, "run", lambda *_: [])
    assert cli.main(("--suite", "edges", "--dtype", "bfloat16")) == 0
    place = tmp_path / "bench" / "results" / report.machine(CPU) / "edges-bfloat16-cpu.json"
    assert str(place) in capsys.readouterr().out
    assert place.parent.is_dir()
