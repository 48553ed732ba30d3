"""Tables, plots and the headline, from records written by hand; nothing is timed."""

import dataclasses
import json
import xml.etree.ElementTree as ET

import pytest

from bench import headline, markdown, plots, publish, records, roofline
from bench.__main__ import main
from bench.run import make_parser
from bench.suites import SUITES, square

pytestmark = pytest.mark.cpu_only(reason="no layer runs")

LIMITS = {
    "threads": 2,
    "vector_bits": 512,
    "cache_bytes": {"L1": 49152},
    "gflops": {"float32": {"1": 100.0, "2": 200.0}},
    "gb_per_s": {"L1": {"1": 400.0, "2": 800.0}, "memory": {"1": 20.0, "2": 30.0}},
}
FACTS = {"cpu": "c", "torch": "2", "lstm_ext_cpu_isa": "avx2", "date": "today", "commit": "abc"}


def module(ms, ratio=None, **more):
    known = {"ms": ms, "us_per_step": ms, "gflops": 10.0, "weights_gb_per_s": 3.0, "peak_mb": 1.5}
    known |= {"ratio": ratio, "ratio_min": ratio and 0.9 * ratio, "ratio_max": ratio and 9 * ratio}
    known |= {"error": None, "differs": False, "off_by": 1e-7, "allowed": 1e-5, "samples_ms": [ms]}
    return known | more


def row(problem, mode, peer, ours, bound=1.0, **others):
    modules = {"nn.LSTM": module(peer, peer / ours), "lstm_ext": module(ours)}
    shape = dataclasses.asdict(problem)
    return {
        **{"name": problem.name, "mode": mode, "problem": shape, "flop": problem.flop(mode)},
        **{"bound_ms": bound, "of_floor": None, "modules": {**modules, **others}, "seconds": 1},
    }


def write(path, *rows, complete=True, device="cpu", limits=LIMITS, **settings):
    known = {"suite": "cpu", "device": device, "dtype": "float32", "threads": 2, "repeats": 9}
    known |= {"modes": ["inference", "training"], "quick": False, "host": False, "peers": []}
    facts = FACTS | ({"gpu": "g"} if device == "cuda" else {})
    head = {"settings": known | settings, "environment": facts, "limits": limits}
    record = records.Writer(path, head, fresh=True)
    for one in rows:
        record.add(one)
    if complete:
        record.finish()
    return records.read(path)


P, Q = square(50, 1, 64), square(100, 16, 256)


@pytest.fixture
def folder(tmp_path):
    write(
        tmp_path / "cpu-float32-cpu.jsonl",
        row(P, "inference", 4.0, 2.0, haste=module(None, error="Unsupported: a GPU only")),
        row(P, "training", 9.0, 3.0, haste=module(None, error="Unsupported: a GPU only")),
        row(Q, "inference", 8.0, 10.0, haste=module(5.0, 0.5, differs=True, off_by=0.1)),
    )
    write(tmp_path / "cpu-bfloat16-cpu.jsonl", row(P, "inference", 3.0, 2.0), dtype="bfloat16")
    return tmp_path


def test_report(folder, capsys):
    assert main(("report", str(folder))) == 0
    text = (folder / "README.md").read_text()
    assert "| T50 B1 H64 | inference | 4.000 | 2.000 | 2.00 | 1.80..18.00 | 2.00 | 10 | 3 |" in text
    # From the limits, not from the row's own figure.
    share = 100e3 * roofline.bound(P, "inference", "float32", LIMITS)
    assert f" | {share / 4:.0f} % | {share / 2:.0f} % | 1.5 / 1.5 | - |" in text
    assert "ratios to nn.LSTM: inference 1.26, all 1.69, training 3.00" in text
    assert "ratios to haste" not in text, "the only ratio is of another function"
    assert "- haste: a GPU only (all in training; T50 B1 H64 inference)" in text
    assert (
        "- haste: not the same within tolerance (*): T100 B16 H256 inference: off by 1.0e-01"
        in text
    )
    assert "| multiply-adds in float32, 512-bit vectors | 100 GFLOP/s | 200 GFLOP/s |" in text
    assert "commit abc" in text
    shown = [line[line.index("(") + 1 : -1] for line in text.splitlines() if line[:2] == "!["]
    assert sorted(shown) == sorted(path.name for path in folder.glob("*.svg"))
    assert len(shown) == 4
    write(folder / "gate-float32-cpu.jsonl", row(P, "inference", 4.0, 2.0), suite="gate")
    assert "gate" not in markdown.report(folder)
    for name in shown:
        assert ET.parse(folder / name).getroot().tag.endswith("svg")


def test_round_trips(folder):
    assert "| round trip ns |" not in markdown.report(folder)
    told = {**row(P, "training", 4.0, 2.0), "round_trip_ns": [57.8, 334.0]}
    write(folder / "one-step-float32-cpu.jsonl", told, row(Q, "training", 4.0, 2.0))
    text = markdown.report(folder)
    assert text.count("| round trip ns |") == 1
    assert " | 1.5 / 1.5 | 58 / 334 |\n" in text and " | 1.5 / 1.5 | - |\n" in text


def test_the_same_records_give_the_same_bytes(folder):
    assert main(("report", str(folder))) == 0
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(("report", str(folder))) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_one_thread_is_a_section_of_its_own(folder):
    table = markdown.speed_table(folder, folder)
    write(folder / "cpu-float32-cpu-1threads.jsonl", row(P, "inference", 9.0, 3.0), threads=1)
    text = markdown.report(folder)
    assert "## cpu, bfloat16\n" in text and "## cpu, float32, one thread\n" in text
    assert "| T50 B1 H64 | inference | 9.000 | 3.000 | 3.00 |" in text
    assert markdown.speed_table(folder, folder) == table


def test_a_run_that_is_no_good_is_marked(tmp_path):
    write(tmp_path / "a.jsonl", row(P, "inference", 4.0, 2.0), complete=False, quick=True)
    text = markdown.report(tmp_path)
    assert "**Not complete: the run was interrupted.**" in text and "**A quick run" in text
    with pytest.raises(ValueError, match="no complete record"):
        markdown.speed_table(tmp_path, tmp_path)


def test_what_no_row_could_run(tmp_path):
    absent = {"flashrnn": module(None, error="Unsupported: flashrnn is not installed")}
    rows = [row(P, mode, 4.0, 2.0, **absent) for mode in ("inference", "training")]
    write(tmp_path / "a.jsonl", *rows, peers=["flashrnn"])
    assert "- flashrnn: flashrnn is not installed (all rows)" in markdown.report(tmp_path)
    assert not list(tmp_path.glob("*.svg"))


def test_without_limits_nothing_is_claimed(tmp_path):
    record = write(tmp_path / "a.jsonl", row(P, "inference", 4.0, 2.0, bound=None), limits={})
    assert list(plots.draw(record, tmp_path / "a")) == ["speedup"]
    assert "What the processor can do" not in markdown.report(tmp_path)


def test_readme(folder, capsys):
    readme = folder / "project.md"
    readme.write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    assert main(("report", str(folder), "--readme", str(readme))) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{markdown.BEGIN}\nnn.LSTM's time divided by lstm_ext's")
    assert text.endswith(f"{markdown.END}\nafter\n") and "old" not in text
    head = "| problem | float32, inference | float32, forward + backward | bfloat16, inference |"
    assert head in text
    assert "| T50 B1 H64 | 2.00 | 3.00 | 1.50 | - |" in text
    assert "| T100 B16 H256 | 0.80 | - | - | - |" in text
    assert "| geometric mean | 1.26 | 3.00 | 1.50 | - |" in text
    readme.write_text("no marks")
    assert main(("report", str(folder), "--readme", str(readme))) == 1
    assert "it needs one line" in capsys.readouterr().err
    assert readme.read_text() == "no marks"


def test_a_folder_without_records(tmp_path, capsys):
    assert main(("report", str(tmp_path))) == 1
    assert "has no record" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(("report", str(tmp_path / "none")))
    assert caught.value.code == 2


def test_the_best_of_several_measurements():
    slower = json.loads(json.dumps(LIMITS).replace("200.0", "150.0"))
    assert markdown.best_limits([LIMITS, slower, {"error": "x"}]) == LIMITS
    assert markdown.best_limits([{"error": "x"}]) == {"error": "x"}


def test_limits_of_a_gpu(tmp_path):
    limits = {"threads": 1, "device": "cuda", "cache_bytes": {}, "gb_per_s": {}}
    limits |= {"gflops": {"float32": {"1": 100.0}}, "copy_gb_per_s": 5.0}
    write(tmp_path / "a.jsonl", row(P, "inference", 4.0, 2.0), device="cuda", limits=limits)
    text = markdown.report(tmp_path)
    assert "| products of large matrices in float32 | 100 GFLOP/s |" in text
    share = 100e3 * P.flop("inference") / 100e9 / 2.0
    assert f" | {share:.0f} % | 1.5 / 1.5 |" in text and share > 1


@pytest.mark.parametrize(
    "problem, axes",
    [
        (square(25, 16, 256), [("T", 25)]),
        (square(100, 1, 256), [("B", 1)]),
        (square(100, 16, 64), [("H", 64)]),
        (square(100, 16, 256), [("T", 100), ("B", 16), ("H", 256)]),
    ],
)
def test_sizes_along_which_time_is_drawn(problem, axes):
    assert plots.axis_of(row(problem, "inference", 1.0, 1.0)) == axes


def test_scaling(tmp_path):
    """Every problem of the suite lies on one of the axes; the plot names the three."""
    rows = [row(p, "inference", 2.0, p.flop("inference") / 1e9) for p in SUITES["scaling"]]
    assert [len(plots.axis_of(one)) for one in rows].count(3) == 1
    record = write(tmp_path / "s.jsonl", *rows, suite="scaling")
    assert set(plots.draw(record, tmp_path / "s")) == {"scaling"}
    text = (tmp_path / "s-scaling.svg").read_text()
    assert all(f"{axis}  (" in text for axis in "TBH") and "as the work grows" in text
    few = write(tmp_path / "f.jsonl", *rows[:2], suite="scaling", complete=False)
    assert not plots.draw(few, tmp_path / "f")


# --- a GPU beside a CPU ---------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    cpu = (row(P, "inference", 8.0, 4.0), row(P, "training", 9.0, 6.0), row(Q, "training", 1, 1))
    gpu = (row(P, "inference", 0.2, 0.1), row(P, "training", 1.0, 2.0))
    write(tmp_path / "cpu.jsonl", *cpu)
    write(tmp_path / "gpu.jsonl", *gpu, device="cuda", limits={})
    return tmp_path


def test_headline(pair, capsys):
    arguments = (str(pair / "cpu.jsonl"), str(pair / "gpu.jsonl"), "--out", str(pair / "h.md"))
    assert main(("headline", *arguments)) == 0
    text = capsys.readouterr().out
    assert (pair / "h.md").read_text() == text
    assert "g beside c with 2 threads, float32" in text
    assert "| T50 B1 H64 | inference | 8.000 | 0.200 | 40.0 | 4.000 | 0.100 | 40.0 |" in text
    assert "| T50 B1 H64 | training | 9.000 | 1.000 | 9.0 | 6.000 | 2.000 | 3.0 |" in text
    assert Q.name not in text, "one machine alone has it"
    assert "Training: lstm_ext on the GPU is 3.0 to 3.0 times as fast as on the CPU" in text
    assert "geometric mean 40.0 (140 is what is often said)" in text


@pytest.mark.parametrize(
    "cpu, gpu, message",
    [
        ({}, {"device": "cpu"}, "got cpu and cpu"),
        ({}, {"device": "cuda", "dtype": "bfloat16"}, "one dtype, got float32 and bfloat16"),
    ],
)
def test_records_that_cannot_stand_beside_each_other(tmp_path, cpu, gpu, message):
    one = row(P, "inference", 1.0, 1.0)
    pair = write(tmp_path / "a.jsonl", one, **cpu), write(tmp_path / "b.jsonl", one, **gpu)
    with pytest.raises(ValueError, match=message):
        headline.headline(*pair)
    other = write(tmp_path / "c.jsonl", row(Q, "inference", 1.0, 1.0), device="cuda")
    with pytest.raises(ValueError, match="no problem and mode in common"):
        headline.headline(pair[0], other)


def test_a_wrong_row_has_no_gain(tmp_path):
    wrong = row(P, "inference", 1.0, 0.5)
    wrong["modules"]["lstm_ext"]["differs"] = True
    gpu = write(tmp_path / "gpu.jsonl", wrong, device="cuda")
    lines = headline.headline(write(tmp_path / "c.jsonl", row(P, "inference", 8.0, 4.0)), gpu)
    assert "| T50 B1 H64 | inference | 8.000 | 1.000 | 8.0 | 4.000 | - | - |" in lines
    assert not any("lstm_ext on the GPU is" in line for line in lines)


# --- all of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "peers"])
def test_steps_of_publish(kind):
    *runs, last = publish.steps(kind, ["--once"])
    parsed = [make_parser().parse_args(run) for _, run in runs]
    asked = {(args.suite, args.dtype, bool(args.peer)) for args in parsed}
    suites = (
        ("cpu",)
        if kind
        else ("cpu", "random", "one-step", "cell", "decoder", "second", "scaling", "gate")
    )
    expected = {(s, d, bool(kind)) for s in suites for d in ("float32", "bfloat16")}
    assert asked == expected | (set() if kind else {("quantized", "float32", True)})
    assert all(args.once and args.out is None for args in parsed)
    assert not any(env for env, _ in (*runs, last))
    assert last[1] == ["report", "--readme", "README.md"]


def test_steps_of_publish_on_less_of_the_processor():
    steps = publish.steps("limited", ["--once"])
    assert [args[0] for _, args in steps] == [*["--suite"] * 2, "report"] * 2
    runs = [(env, make_parser().parse_args(args)) for env, args in steps if args[0] != "report"]
    assert [(args.dtype, args.threads, bool(env)) for env, args in runs] == [
        *(("float32", 1, False), ("bfloat16", 1, False)),
        *(("float32", None, True), ("bfloat16", None, True)),
    ]
    assert not runs[2][1].rows
    names = [p.name for p in SUITES["cpu"] if runs[3][1].rows.search(p.name)]
    assert len(names) == 7 and all(p.batch <= 4 for p in SUITES["cpu"] if p.name in names)
    # README.md's own table is of the whole processor.
    assert steps[-1] == (publish.AVX2, ["report"])


def test_publish_stops_at_what_fails(monkeypatch, capsys):
    ran = []

    class Done:
        returncode = 0

    def run(command, cwd, env):
        ran.append(command[3:])
        done = Done()
        done.returncode = 3 if len(ran) == 2 else 0
        return done

    monkeypatch.setattr(publish.subprocess, "run", run)
    assert main(("publish",)) == 3
    assert len(ran) == 2
    ran.append(None)
    assert main(("publish", "--dry-run")) == 0 and len(ran) == 3
    assert "== python -m bench report --readme README.md" in capsys.readouterr().out
