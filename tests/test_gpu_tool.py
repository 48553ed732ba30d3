"""tools/gpu.py without a GPU: what is run when, what is kept, and what the summary says."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import machine, records, report, timing
from bench.suites import square

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.cpu_only(reason="the tool is tried with other commands")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import gpu

    monkeypatch.setattr(gpu, "GRACE", 2.0)
    return gpu


@pytest.fixture
def call(gpu, monkeypatch, tmp_path, capfd):
    """Runs the tool with parts made of Python code; returns its status and what it printed."""

    def run(code, *arguments, **options):
        def part(name):
            command = (sys.executable, "-c", code[name])
            return gpu.Part(name, (command,), **options.get(name, {}))

        monkeypatch.setattr(gpu, "make_parts", lambda *_: [part(name) for name in code])
        status = gpu.main(["--out", str(tmp_path), "--arch", "90a", *arguments])
        return status, capfd.readouterr().out

    return run


def statuses(folder):
    parts = json.loads((folder / "state.json").read_text())["parts"]
    return {name: entry["status"] for name, entry in parts.items()}


def mark(folder, name):
    """Code that notes that it was run."""
    return f"open({str(folder / 'ran')!r}, 'a').write('{name} ')"


def ran(folder):
    return (folder / "ran").read_text().split()


def test_a_failed_part_does_not_stop_the_others_and_runs_again_only_on_demand(call, tmp_path):
    code = {name: mark(tmp_path, name) for name in "abc"}
    broken = code | {"b": code["b"] + "; print('no luck'); raise SystemExit(3)"}
    status, printed = call(broken)
    assert status == 1 and "failed: b" in printed
    assert statuses(tmp_path) == {"a": "passed", "b": "failed", "c": "passed"}
    assert "no luck" in (tmp_path / "b.log").read_text()
    assert "| b | failed |" in (tmp_path / "summary.md").read_text()
    assert "exit status 3" in (tmp_path / "summary.md").read_text()

    assert call(code)[0] == 1, "the failure is still there"
    assert ran(tmp_path) == ["a", "b", "c"]
    assert call(code, "--retry")[0] == 0
    assert ran(tmp_path) == ["a", "b", "c", "b"]
    assert set(statuses(tmp_path).values()) == {"passed"}


def test_the_commands_of_a_part_run_until_one_fails(gpu, monkeypatch, tmp_path):
    commands = tuple(
        (sys.executable, "-c", f"{mark(tmp_path, n)}; raise SystemExit({n == 1})") for n in range(3)
    )
    monkeypatch.setattr(gpu, "make_parts", lambda *_: [gpu.Part("a", commands)])
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert ran(tmp_path) == ["0", "1"]


def test_a_program_that_is_not_there(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "make_parts", lambda *_: [gpu.Part("a", (("./no-such-program",),))])
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "no-such-program" in (tmp_path / "a.log").read_text()


def test_the_time_of_a_call(call, gpu, monkeypatch, tmp_path):
    code = {name: mark(tmp_path, name) for name in "abc"}
    status, printed = call(code, "--minutes", "0.9")
    assert status == 0 and "goes on with: a, b, c" in printed
    assert not (tmp_path / "ran").exists()

    monkeypatch.setattr(gpu, "SHORTEST", 0.5)
    slow = code | {"b": code["b"] + "; import time; time.sleep(60)"}
    status, printed = call(slow, "--minutes", "0.05")
    assert status == 0 and "goes on with: c" in printed
    assert statuses(tmp_path) == {"a": "passed", "b": "cut"}

    assert call(code)[0] == 0
    assert ran(tmp_path) == ["a", "b", "b", "c"]


def test_a_part_that_is_cut_off_twice_has_failed(call, gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "SHORTEST", 0.1)
    code = {"a": "import time; time.sleep(60)"}
    assert call(code, "--minutes", "0.02")[0] == 0
    assert statuses(tmp_path) == {"a": "cut"}
    assert call(code, "--minutes", "0.02")[0] == 1
    assert statuses(tmp_path) == {"a": "failed"}


def test_a_call_that_was_killed_leaves_a_part_that_runs_again(call, gpu, tmp_path):
    code = {name: mark(tmp_path, name) for name in "ab"}
    gpu.State(tmp_path / "state.json").set("a", "running")
    assert call(code)[0] == 0
    assert ran(tmp_path) == ["a", "b"]
    state = gpu.State(tmp_path / "state.json")
    state.set("b", "cut", note="")
    state.parts["b"]["cuts"] = 1
    state.set("b", "running")
    assert call(code)[0] == 1, "the second time it is not tried again"
    assert ran(tmp_path) == ["a", "b"]


def test_a_part_has_its_own_limit_and_its_children_end_with_it(call, tmp_path):
    child = "import subprocess, sys, time; "
    child += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    child += "print('child', p.pid, flush=True); time.sleep(60)"
    status, _ = call({"a": child}, a={"minutes": 0.03})
    assert status == 1
    assert "took longer than 0.03 minutes" in (tmp_path / "summary.md").read_text()
    number = int((tmp_path / "a.log").read_text().split("child ")[-1].split()[0])
    stat = Path(f"/proc/{number}/stat")
    end = time.monotonic() + 10  # a killed process still has to be scheduled to die
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < end, stat.read_text()
        time.sleep(0.05)


def test_the_build_is_done_in_every_call_that_has_work_and_is_needed(call, tmp_path):
    code = {name: mark(tmp_path, name) for name in ("build", "a", "b")}
    options = {"build": {"every_call": True, "needed": True}}
    assert call(code, "--only", "a", **options)[0] == 0
    assert call(code, **options)[0] == 0
    assert call(code, **options)[0] == 0
    assert ran(tmp_path) == ["build", "a", "build", "b"]
    code |= {"build": "raise SystemExit(1)", "c": mark(tmp_path, "c")}
    status, printed = call(code, **options)
    assert status == 1 and "nothing can go on without build" in printed
    assert "c" not in ran(tmp_path)


def test_skipped_with_a_reason_until_it_can_run(call, tmp_path):
    code = {"a": mark(tmp_path, "a")}
    assert call(code, a={"skip": "no such tool"})[0] == 0
    assert "| a | skipped |  | no such tool |" in (tmp_path / "summary.md").read_text()
    assert call(code)[0] == 0
    assert ran(tmp_path) == ["a"]


def test_lines_for_the_log_only(call, tmp_path):
    _, printed = call({"a": "print('x PASSED'); print('y FAILED')"}, a={"hide": " PASSED"})
    assert "y FAILED" in printed and "x PASSED" not in printed
    assert "x PASSED" in (tmp_path / "a.log").read_text()


def test_unknown_parts_are_refused(gpu, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        gpu.main(["--out", str(tmp_path), "--only", "build,nonsense", "--arch", "90a"])
    assert caught.value.code == 2
    assert "there is no part nonsense" in capsys.readouterr().err


def dry_run(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "gpu.py"), "--out", "o", "--arch", "90a"]
    return subprocess.run(
        [*command, "--dry-run", *arguments], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout


def test_dry_run_lists_every_part_and_its_commands():
    printed = dry_run()
    names = [line.split()[0] for line in printed.splitlines() if not line.startswith(" ")]
    assert names[:5] == ["build", "report", "primitives", "tests", "tests-tf32"]
    assert names[5:11] == [
        tool + end for tool in ("memcheck", "racecheck", "synccheck") for end in ("", "-tf32")
    ]
    suites = (
        "host edges deepbench-infer deepbench-train flashrnn-inference flashrnn-training classic"
    )
    dtypes = ("float32", "bfloat16", "float16")
    assert names[11:15] == ["floor", *(f"plans-{dtype}" for dtype in dtypes)]
    assert names[15:18] == [f"wavefront-{dtype}" for dtype in dtypes]
    assert names[18:] == [f"bench-{suite}-{dtype}" for suite in suites.split() for dtype in dtypes]
    assert "LSTM_EXT_CUDA=1 LSTM_EXT_CUDA_ARCHS=90a" in printed
    assert "--tool racecheck --error-exitcode 86" in printed
    assert not (ROOT / "o").exists()
    names = dry_run("--skip", "build", "--only", "report,tests").splitlines()
    assert [name for name in names if not name.startswith(" ")] == ["report", "tests"]


def bench_commands():
    for line in dry_run().splitlines():
        if " -m bench " in line:
            yield line.split(" -m bench ")[1].split()


def test_bench_takes_the_arguments_of_every_part():
    from bench.run import make_parser

    runs = {
        (args.suite, args.mode, args.dtype, args.out.name)
        for args in map(make_parser().parse_args, bench_commands())
    }
    assert len(runs) == 21


def test_pytest_takes_the_arguments_of_the_small_tests(tmp_path):
    """The sanitizers' selection, collected only, on the CPU."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    command += ["tests/test_cuda_small.py", "-m", "sanitizer", "--tf32=on"]
    command += ["-k", "float32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "30/115 tests collected" in done.stdout, done.stdout + done.stderr


class Refusing(nn.LSTM):
    def forward(self, *_args, **_kwargs):
        raise RuntimeError("no kernel for this")


def test_summary_of_real_benchmark_files(gpu, tmp_path):
    (tmp_path / "bench").mkdir()
    rows = [
        timing.run_row(
            square(2, 1, hidden),
            mode,
            {
                "nn.LSTM": timing.drop_in(nn.LSTM),
                "lstm_ext": timing.drop_in(nn.LSTM if hidden == 4 else Refusing),
            },
            dtype=torch.float32,
            device=torch.device("cpu"),
            repeats=2,
            min_sample=1e-4,
        )
        for hidden in (4, 8)
        for mode in ("inference", "training")
    ]
    rows[0].peer.samples, rows[0].ours.samples = [3.0, 3.0], [2.0, 2.0]
    facts = machine.environment(torch.device("cpu")) | {"tf32_cudnn": True}
    settings = {"suite": "edges", "dtype": "float32", "modes": ["inference", "training"]}
    head = {"settings": settings, "environment": facts, "limits": {}}
    record = records.Writer(tmp_path / "bench" / "edges-float32-cuda.jsonl", head)
    for row in rows:
        record.add(report.row_json(row, "float32"))

    text = gpu.gpu_summary.summary(tmp_path, {})
    line = "| edges | float32 (TF32) | inference | 1 | 1.50 | 1.50 (T2 B1 H4) |"
    assert f"{line} lstm_ext refused 1, not complete |" in text
    assert "| edges | float32 (TF32) | training | 1 | " in text


def test_summary_of_tests_and_sanitizers(gpu, tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n"
        "@pytest.mark.skip\ndef test_c(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    subprocess.run(
        [*command, f"--junitxml={tmp_path / 'tests.xml'}"], cwd=tmp_path, env=environ, timeout=60
    )
    # As compute-sanitizer's manual prints them.
    (tmp_path / "memcheck.log").write_text("========= ERROR SUMMARY: 0 errors\n")
    (tmp_path / "racecheck.log").write_text(
        "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
    )
    parts = {
        "tests": {"status": "failed", "seconds": 2.5, "note": "exit status 1"},
        "memcheck": {"status": "passed", "seconds": 9.0},
        "racecheck": {"status": "failed", "seconds": 9.0},
    }
    text = gpu.gpu_summary.summary(tmp_path, parts)
    assert "| tests | failed | 2.5 | exit status 1; 1 passed, 1 failed, 1 skipped |" in text
    assert "| memcheck | passed | 9 | 0 errors |" in text
    assert "| racecheck | failed | 9 | 2 hazards displayed (1 error, 1 warning) |" in text


def test_check_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import gpu_machine

    there = {"torch", "setuptools", "pytest", "numpy"}
    monkeypatch.setattr(gpu_machine, "has", lambda name: name in there)
    monkeypatch.setattr(gpu_machine, "toolkit", lambda environ: None)
    monkeypatch.setattr(gpu_machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_machine.main(["check"]) == 1
    printed = capsys.readouterr().out
    for text in ("missing: cmake", "missing: ninja", "no CUDA toolkit", "a GPU that torch"):
        assert text in printed
    assert "missing, but the rest can run: allpairspy" in printed
    assert "pybind11" not in printed, "torch has its headers"
