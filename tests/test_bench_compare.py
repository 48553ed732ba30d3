"""The comparison of two records and the gate, on records written by hand; nothing is timed."""

import json
import math

import pytest

from bench import compare, gate, machine, records
from bench.__main__ import main

pytestmark = pytest.mark.cpu_only(reason="no layer runs")

ENVIRONMENT = {"cpu": "c", "cores": 2, "torch": "2", "threads": 2}
SETTINGS = {"suite": "gate", "device": "cpu", "dtype": "float32", "threads": 2, "host": False}
SPREAD = (0.98, 0.99, 1.0, 1.01, 1.02)


def row(name="a", mode="inference", *, peer=2.0, ours=1.0, spread=SPREAD, **module):
    samples = [peer * s for s in spread]
    of_peer = {"ratio": peer / ours, "differs": False, "error": None, "samples_ms": samples}
    of_ours = {"ratio": None, "differs": False, "error": None, "samples_ms": [ours] * len(spread)}
    return {
        "name": name,
        "mode": mode,
        "modules": {"nn.LSTM": of_peer, "lstm_ext": of_ours | module},
    }


def record(*rows, **environment):
    return {"settings": SETTINGS, "environment": ENVIRONMENT | environment, "rows": list(rows)}


def verdicts(old, new, **options):
    return [c.verdict for c in compare.compare(record(*old), record(*new), **options)]


@pytest.mark.parametrize(
    "ours, verdict",
    [(1.0, "same"), (1.09, "same"), (1.3, "slower"), (0.7, "faster"), (0.95, "same")],
)
def test_verdict_of_a_row(ours, verdict):
    assert verdicts([row()], [row(ours=ours)]) == [verdict]


def test_a_noisy_row_is_unclear():
    noisy = (0.6, 0.8, 1.0, 1.2, 1.4)
    assert verdicts([row(spread=noisy)], [row(ours=1.3, spread=noisy)]) == ["unclear"]
    assert verdicts([row(spread=noisy)], [row(ours=1.3)]) == ["unclear"]
    assert verdicts([row(spread=noisy)], [row(ours=1.3)], spreads=0.5) == ["slower"]
    # One sample far off is no spread, and samples that lie on each other by chance are no proof.
    outlier = (0.99, 1.0, 1.0, 1.01, 9.0)
    assert verdicts([row(spread=outlier)], [row(ours=1.3, spread=outlier)]) == ["slower"]
    assert compare.noise_of([1, 1, 1], [2, 2, 2], 4) == pytest.approx(
        math.exp(4 * math.sqrt(2) * compare.LEAST_SPREAD)
    )


def test_a_faster_machine_changes_nothing():
    assert verdicts([row(peer=2, ours=1)], [row(peer=1, ours=0.5)]) == ["same"]
    assert verdicts([row(peer=2, ours=1)], [row(peer=1, ours=0.5)], times=True) == ["faster"]
    assert verdicts([row(peer=2, ours=1)], [row(peer=1, ours=1)]) == ["slower"]
    assert verdicts([row(peer=2, ours=1)], [row(peer=1, ours=1)], times=True) == ["same"]


def test_rows_that_cannot_be_compared():
    old = [row("gone"), row("fails"), row("wrong"), row("no peer"), row("never was", differs=True)]
    without_peer = row("no peer")
    without_peer["modules"]["nn.LSTM"]["ratio"] = None
    new = [row("fails", error="x"), row("wrong", differs=True), without_peer, row("never was")]
    assert verdicts(old, new) == ["missing", "fails", "wrong", "missing"]


def write(path, found):
    head = {"schema": records.SCHEMA, "limits": {}, **{k: found[k] for k in found if k != "rows"}}
    lines = (head, *found["rows"], {"complete": True, "seconds": 1})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("ours, status", [(1.0, 0), (0.5, 0), (2.0, 1)])
def test_command(tmp_path, capsys, ours, status):
    old = write(tmp_path / "old.jsonl", record(row(), row("b")))
    new = write(tmp_path / "new.jsonl", record(row(ours=ours), row("b"), cpu="other"))
    assert main(("compare", old, new)) == status
    printed = capsys.readouterr()
    assert {1.0: "2 same", 0.5: "1 faster, 1 same", 2.0: "1 same, 1 slower"}[ours] in printed.out
    assert "the records differ in cpu: c and other" in printed.err


def test_command_says_what_is_wrong(tmp_path, capsys):
    old = write(tmp_path / "old.jsonl", record(row()))
    (tmp_path / "new.jsonl").write_text("{}\n")
    for arguments, message in (
        ((old, str(tmp_path / "new.jsonl")), "is not a record"),
        ((old, str(tmp_path / "none.jsonl")), "No such file"),
        ((old, old, "--factor", "0.9"), "expected 1 or more"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(("compare", *arguments))
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


# --- the gate -------------------------------------------------------------------------------------


class Runs:
    """Stands in for the measurement: hands out records, and writes down what was asked."""

    def __init__(self, *found):
        self.found, self.asked = list(found), []

    def __call__(self, dtype, names=()):
        self.asked.append(tuple(names))
        return self.found.pop(0)


OLD = record(row("a"), row("a", "training"), row("b"))
SLOW = record(row("a", ours=2), row("a", "training"), row("b"))


@pytest.fixture
def check(monkeypatch):
    """What the gate finds in records handed to it in turn, and what it asked to be run."""

    def found(*runs):
        run = Runs(*runs)
        monkeypatch.setattr(gate, "measure", run)
        return [(c.name, c.mode, c.verdict) for c in gate.check(OLD, "float32")], run.asked

    return found


def test_no_change_passes(check):
    assert check(OLD) == ([], [()])


def test_what_is_slow_twice_fails(check):
    again = record(row("a", ours=2), row("a", "training"))
    assert check(SLOW, again) == ([("a", "inference", "slower")], [(), ("a",)])


def test_what_is_slow_once_passes(check):
    assert check(SLOW, record(row("a"), row("a", "training"))) == ([], [(), ("a",)])
    other = record(row("a"), row("a", "training", ours=2))
    assert check(SLOW, other) == ([], [(), ("a",)]), "another row the second time"


def test_a_faster_peer_is_no_regression(check):
    assert check(record(row("a", peer=1), row("a", "training"), row("b", peer=1))) == ([], [()])


def test_a_slower_machine_is_no_regression(check):
    slow = [row(*names, peer=6, ours=3) for names in (("a",), ("a", "training"), ("b",))]
    assert check(record(*slow)) == ([], [()])


@pytest.mark.parametrize("how", [{"error": "x"}, {"differs": True}])
def test_a_failure_fails(check, how):
    bad = record(row("a", **how), row("a", "training"), row("b"))
    (one,), asked = check(bad, bad)
    assert one[2] in ("fails", "wrong") and asked == [(), ("a",)]


def test_a_row_without_a_figure_fails(check):
    without_peer = row("b")
    without_peer["modules"]["nn.LSTM"]["ratio"] = None
    for left in ((), (without_peer,)):
        new = record(row("a"), row("a", "training"), *left)
        assert check(new, new) == ([("b", "inference", "missing")], [(), ("b",)])


def test_noise_hides_a_slowdown_only_so_far(monkeypatch, capsys):
    noisy = (0.3, 0.6, 1.0, 1.5, 3.0)
    old = record(row(spread=noisy))
    for ours, failed in ((1.9, False), (2.1, True)):
        new = record(row(ours=ours, spread=noisy))
        monkeypatch.setattr(gate, "measure", Runs(new, new))
        assert bool(gate.check(old, "float32")) == failed
        assert "1 of 1 rows are unclear: the cores are busy" in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "environment", lambda device: dict(ENVIRONMENT))
    for dtype in gate.DTYPES:
        write(tmp_path / f"gate-{dtype}-cpu.jsonl", OLD)
    return tmp_path


def run_gate(folder, monkeypatch, *runs):
    monkeypatch.setattr(gate, "measure", Runs(*runs))
    return main(("gate", "--records", str(folder)))


def test_gate_command(folder, monkeypatch, capsys):
    assert run_gate(folder, monkeypatch, OLD, OLD) == 0
    assert "bfloat16: 3 same" in capsys.readouterr().out
    assert run_gate(folder, monkeypatch, OLD, SLOW, SLOW) == 1
    printed = capsys.readouterr()
    assert "once more: a" in printed.out
    assert "bfloat16: regressed in two runs: a inference (slower)" in printed.err


def test_gate_without_a_record_of_this_machine_says_so(folder, monkeypatch, capsys):
    (folder / "gate-float32-cpu.jsonl").unlink()
    write(folder / "gate-bfloat16-cpu.jsonl", record(row(), torch="1"))
    assert run_gate(folder, monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "float32: skipped, there is no gate-float32-cpu.jsonl" in printed
    assert "bfloat16: skipped, the record's machine differs in torch: 1 and 2" in printed


def test_a_processor_of_the_same_name_is_told_by_its_family_and_caches():
    old, new = record(cache_bytes={"L1": 48}), record(cache_bytes={"L1": 32})
    assert compare.unlike(old, new) == ["cache_bytes: {'L1': 48} and {'L1': 32}"]
    before = record() | {"limits": {"cache_bytes": {"L1": 48}}}  # as older records do
    assert compare.unlike(before, new) and not compare.unlike(before, old)
    assert not compare.unlike(record(), new)
    other = record(cpu_family="26.2")
    assert compare.unlike(record(cpu_family="25.1"), other) == ["cpu_family: 25.1 and 26.2"]
    assert not compare.unlike(record(), other) and not compare.unlike(other, other)


def test_gate_where_the_benchmark_does_not_run(folder, monkeypatch, capsys):
    def broken(dtype):
        raise RuntimeError("the benchmark did not run: no module")

    monkeypatch.setattr(gate, "measure", broken)
    assert main(("gate", "--records", str(folder), "--dtype", "float32")) == 1
    assert "no module" in capsys.readouterr().err


def test_a_measurement_that_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(gate.machine, "ROOT", tmp_path)  # there is no bench in it
    with pytest.raises(RuntimeError, match="did not run:(.|\n)*No module named"):
        gate.measure("float32", ["T50 B1 H64"])
