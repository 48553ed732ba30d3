"""The benchmark's command line and its records; nothing looks at a time."""

import subprocess
import sys

import pytest
import torch
from interpreter import run
from test_bench import Off, Refusing, row_of

import lstm_ext
from bench import __main__ as entry
from bench import machine, records
from bench import run as cli
from bench.suites import MODES

pytestmark = pytest.mark.cpu_only(reason="the command line on the CPU")
CPU = torch.device("cpu")


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


KEYS = {"schema", "complete", "settings", "environment", "limits", "rows", "seconds"}
ROW_KEYS = {
    *("name", "mode", "problem", "flop", "modules", "seconds"),
    *("bound_ms", "floor_us_per_step", "of_floor", "round_trip_ns"),
}
MODULE_KEYS = {
    *("ms", "us_per_step", "gflops", "weights_gb_per_s", "peak_mb", "host_us"),
    *("ratio", "ratio_min", "ratio_max", "off_by", "allowed", "differs"),
    *("calls_per_sample", "samples_ms", "error"),
}
TINY = ("--suite", "cpu", "--rows", "^T50 B1 H64$", "--quick", "--repeats", "2")


@pytest.mark.parametrize("threads", [1, 2])
def test_command_writes_the_documented_record(tmp_path, threads):
    out = tmp_path / "new folder" / "r.jsonl"
    command = [sys.executable, "-m", "bench", *TINY, "--threads", str(threads), "--out", str(out)]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "T50 B1 H64" in done.stdout and "geometric mean of the ratios" in done.stdout

    written = records.read(out)
    assert set(written) == KEYS
    assert written["complete"] is True and written["seconds"] > 0
    settings = written["settings"]
    assert (settings["suite"], settings["dtype"], settings["device"]) == ("cpu", "float32", "cpu")
    assert (settings["threads"], settings["repeats"], settings["quick"]) == (threads, 2, True)
    facts = written["environment"]
    assert facts["torch"] == torch.__version__ and facts["lstm_ext"] and facts["cpu"]
    assert facts["lstm_ext_cpu_isa"] and facts["threads"] == threads
    assert str(tmp_path) not in out.read_text() and str(machine.ROOT) not in out.read_text()
    assert [row["mode"] for row in written["rows"]] == list(MODES)
    for row in written["rows"]:
        assert set(row) == ROW_KEYS
        trips = row["round_trip_ns"]
        assert (len(trips) == 2 and min(trips) > 1) if threads == 2 else trips is None
        assert set(row["modules"]) == {"nn.LSTM", "lstm_ext"}
        for module in row["modules"].values():
            assert set(module) == MODULE_KEYS
            assert module["error"] is None and not module["differs"]
            assert len(module["samples_ms"]) == 2 and module["calls_per_sample"] >= 1
        peer = row["modules"]["nn.LSTM"]
        assert peer["ratio_min"] <= peer["ratio"] <= peer["ratio_max"]
    assert not list(out.parent.glob("*.part"))


@pytest.fixture
def no_limits(monkeypatch):
    monkeypatch.setattr(cli.cpu_limits, "measure", lambda *_, **__: {"error": "not in this test"})


def test_a_row_that_lstm_ext_refuses_makes_the_run_fail(monkeypatch, tmp_path, capsys, no_limits):
    monkeypatch.setattr(lstm_ext, "LSTM", Refusing)
    out = tmp_path / "r.jsonl"
    assert cli.main((*TINY, "--out", str(out))) == 1
    written = records.read(out)
    assert written["complete"] is True
    assert [r["modules"]["lstm_ext"]["error"] for r in written["rows"]] == 2 * [
        "RuntimeError: no kernel for this"
    ]
    assert capsys.readouterr().out.count("lstm_ext cannot run this") == 2


@pytest.mark.parametrize("options", [(), ("--compiled",)])
def test_by_torch_compile(options, monkeypatch, tmp_path, no_limits):
    made, out = [], tmp_path / "r.jsonl"
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: made.append(type(self)))
    assert cli.main((*TINY, *options, "--out", str(out))) == 0
    assert made == [torch.nn.LSTM, lstm_ext.LSTM] * 2 * len(options)  # in two modes
    assert records.read(out)["settings"].get("compiled", False) == bool(options)


def test_a_wrong_result_makes_the_run_fail(monkeypatch, tmp_path, no_limits):
    monkeypatch.setattr(lstm_ext, "LSTM", Off)
    assert cli.main((*TINY, "--out", str(tmp_path / "r.jsonl"))) == 1


def test_an_interrupted_run_goes_on(monkeypatch, tmp_path, capsys, no_limits):
    out, ran = tmp_path / "r.jsonl", []

    def run_row(problem, mode, *args, **kwargs):
        if len(ran) == 1:
            ran.append("interrupted")
            raise KeyboardInterrupt
        ran.append(mode)
        return row_of([2.0, 2.0], [1.0, 1.0], mode)

    monkeypatch.setattr(cli, "run_row", run_row)
    monkeypatch.setattr(cli.machine, "git_commit", lambda: "c")
    arguments = (*TINY, "--out", str(out))
    assert cli.main(arguments) == 1
    assert not records.read(out)["complete"] and len(records.read(out)["rows"]) == 1
    # row_of's problem has another name: what was run is what the record says it was.
    text = out.read_text().replace("T10 B2 H7 I5", "T50 B1 H64")
    out.write_text(text + '{"name": "T50 B1 H64", "mo')  # cut off while it was written
    assert cli.main(arguments) == 0
    assert ran == ["inference", "interrupted", "training"]
    assert records.read(out)["complete"] and len(records.read(out)["rows"]) == 2
    assert "goes on with r.jsonl: 1 rows are there" in capsys.readouterr().err

    assert cli.main(arguments) == 0, "a complete one is replaced"
    assert ran[3:] == ["inference", "training"]


def test_once(monkeypatch, tmp_path, capsys, no_limits):
    """The record of this very run is kept; another run's, or of changed sources, is not."""
    ran, commits = [], ["c"]

    def run_row(problem, mode, *args, **kwargs):
        ran.append(mode)
        return row_of([2.0, 2.0], [1.0, 1.0], mode)

    monkeypatch.setattr(cli, "run_row", run_row)
    monkeypatch.setattr(machine, "git_commit", lambda: commits[-1])
    arguments = (*TINY, "--once", "--out", str(tmp_path / "r.jsonl"))
    assert cli.main(arguments) == 0 and len(ran) == 2
    text = (tmp_path / "r.jsonl").read_text()
    assert cli.main(arguments) == 0 and len(ran) == 2
    assert "is there: " in capsys.readouterr().out and not list(tmp_path.glob("*.part"))
    assert (tmp_path / "r.jsonl").read_text() == text
    for number, commit in enumerate(("d", "d-dirty", "d-dirty"), 2):
        commits.append(commit)
        assert cli.main(arguments) == 0 and len(ran) == 2 * number
    assert cli.main((*arguments, "--dtype", "bfloat16")) == 0 and len(ran) == 10


def test_only_a_run_alike_goes_on(tmp_path):
    head = {"settings": {"modes": ("a",)}, "environment": {"date": "1", "torch": "2"}, "limits": {}}
    out = tmp_path / "r.jsonl"
    records.Writer(out, head).add({"name": "x"})
    later = {**head, "environment": {"date": "2", "torch": "2"}}
    assert records.Writer(out, later).done == [{"name": "x"}]
    for other in (
        {**head, "settings": {"modes": ["b"]}},
        {**head, "environment": {"date": "1", "torch": "3"}},
    ):
        text = out.read_text()
        assert records.Writer(out, other).done == []
        out.write_text(text)
    assert records.Writer(out, head, fresh=True).done == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no schema"),
        ('{"rows": []}\n', "not a record of schema 2: it has no schema"),
        ('{"schema": 1}\n', "it has schema 1"),
        ('{"schema": 2}\n{\n{}\n', "line 2"),
        ("[]\n", "no schema"),
    ],
)
def test_another_file_is_no_record(tmp_path, text, message):
    (tmp_path / "f").write_text(text)
    with pytest.raises(ValueError, match=message):
        records.read(tmp_path / "f")


def test_default_place_of_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(cli, "run", lambda *_, **__: [])
    assert cli.main(("--suite", "edges", "--dtype", "bfloat16")) == 0
    place = tmp_path / "bench" / "results" / machine.machine(CPU) / "edges-bfloat16-cpu.jsonl"
    assert str(place) in capsys.readouterr().out
    assert place.parent.is_dir()


def test_a_record_is_not_replaced_by_a_run_of_other_settings(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    small = ("--suite", "gate", "--quick", "--rows", "T50 B1 H64", "--no-limits", "--repeats", "1")
    assert cli.main(small) == 0
    (out,) = (tmp_path / "bench" / "results").glob("*/*.jsonl")
    for more, words in (
        ((*small, "--mode", "inference"), "modes: "),
        (small[:3], "rows: T50 B1 H64 and None; repeats: 1 and 3"),
    ):
        with pytest.raises(SystemExit):
            cli.main(more)
        assert words in (printed := capsys.readouterr().err) and "--fresh to replace it" in printed
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    with pytest.raises(SystemExit):
        cli.main(small)
    printed = capsys.readouterr().err.replace("'", "")
    assert "switches: {" in printed and "OMP_WAIT_POLICY: passive" in printed
    before = out.read_text()
    assert cli.main((*small, "--fresh")) == 0
    assert out.read_text() != before


def test_an_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit) as caught:
        entry.main(("nonsense", "--suite", "cpu"))
    assert caught.value.code == 2
    assert "unknown command 'nonsense': expected one of run, publish," in capsys.readouterr().err


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as caught:
        entry.main((name, "--help"))
    assert caught.value.code == 0
    assert "usage: python -m bench" in capsys.readouterr().out


def test_two_processes_measure_nothing_for_a_question():
    done = run("tools/two_processes.py", "--help", cwd=machine.ROOT)
    assert done.returncode == 0 and "--rounds" in done.stdout, done.stderr
