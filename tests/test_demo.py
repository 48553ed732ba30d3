"""The demo, run as a user runs it but for a few seconds. It looks at no time."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
pytest.importorskip("tqdm", reason="the demo shows its progress with tqdm")

pytestmark = pytest.mark.cpu_only(reason="the demo chooses its own device")
SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "char_lm.py"


@pytest.fixture
def char_lm(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("char_lm")


def demo(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_short_demo(tmp_path):
    done = demo(tmp_path, "--short")
    assert done.returncode == 0, done.stdout + done.stderr

    picture = tmp_path / "char_lm.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n") and picture.stat().st_size > 10_000
    assert "loss nn.LSTM" in done.stderr, "the progress bar shows the losses"

    assert "the loss curves lie on each other" in done.stdout
    table = re.findall(r"^ +(\d+) +(\d\.\d+) +(\d\.\d+) +\d\.\de[+-]\d+$", done.stdout, re.M)
    assert [int(step) for step, _, _ in table] == list(range(1, 13))
    for _, peer, ours in table:
        assert float(ours) == pytest.approx(float(peer), abs=1e-4)

    (served,) = re.findall(r"^  with weights of 8 bits +(\d\.\d+)$", done.stdout, re.M)
    bits = re.findall(r"^held-out text: (\S+) +(\d\.\d+) bits a character$", done.stdout, re.M)
    assert [name for name, _ in bits] == ["nn.LSTM", "lstm_ext.LSTM"]
    # log2 of the number of classes is 6.6; a model that has learnt nothing gives that.
    assert all(2 < float(value) < 6.5 for _, value in bits)

    assert len(re.findall(r"whole training step +\d+\.\d\d ", done.stdout)) == 1
    assert len(re.findall(r"LSTM forward and backward +\d+\.\d\d ", done.stdout)) == 1
    sample = done.stdout.split("-" * 60)[1]
    assert len(sample.strip("\n")) > 50 and "def " in sample


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--device", "nonsense"), "--device nonsense: "),
        (("--out", "no/such/folder/a.png"), "--out: there is no folder"),
    ],
)
def test_bad_arguments_exit_with_2(char_lm, arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        char_lm.main(list(arguments))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed, at",
    [
        (1e-3, 0),  # more than rounding before training could magnify it
        (0.2, 40),
        (float("nan"), 40),
        (float("nan"), 0),
    ],
)
def test_curves_that_part_are_told(char_lm, changed, at, capsys):
    losses = [3.0 - 0.01 * step for step in range(60)]
    peer = SimpleNamespace(losses=losses)
    assert char_lm.curves_agree(peer, SimpleNamespace(losses=list(losses)))
    losses = [loss + changed * (step == at) for step, loss in enumerate(losses)]
    assert not char_lm.curves_agree(peer, SimpleNamespace(losses=losses))
    assert "DO NOT LIE on each other" in capsys.readouterr().out
