"""bench.wavefront on the emulator: that it runs and compares; the times mean nothing."""

import emulated
import pytest
import torch

from bench import wavefront
from bench.suites import Problem
from lstm_ext.cuda import wavefront as cuda_wavefront

pytestmark = pytest.mark.cpu_only(reason="runs on the emulator")


class Engine(emulated.EmulatedEngine):
    def __init__(self, core):
        super().__init__(core, emulated.only("cluster"))


def row(engine_class=Engine, mode="training"):
    return wavefront.time_row(
        engine_class,
        emulated.load(),
        Problem(5, 3, 6, 20, num_layers=2),
        mode,
        torch.bfloat16,
        torch.device("cpu"),
        parts=(2, 5),
        repeats=2,
        min_sample=1e-4,
    )


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_every_way_is_timed_and_compared(mode):
    entry = row(mode=mode)
    ways = entry["ways"]
    assert list(ways) == ["off", "on", "2", "5"]
    assert not any("error" in way or way["differs"] for way in ways.values())
    assert all(len(way["samples"]) == 2 and way["ratio"] > 0 for way in ways.values())
    assert ways["off"]["ratio"] == 1
    assert [ways[name]["parts"] for name in ("on", "2", "5")] == [[1, 1], [2, 2], [5, 5]]
    assert "T5 B3 H20 I6 L2 bfloat16" in wavefront.line_of(entry)


def test_what_is_wrong_or_fails_is_told(monkeypatch):
    right = cuda_wavefront.forward

    def forward(engine, *arguments, **options):
        if engine.parts == 2:
            raise RuntimeError("no streams")
        result = right(engine, *arguments, **options)
        if engine.parts == 5:
            result.of_layers.y[-1][-1] += 1
        return result

    monkeypatch.setattr(cuda_wavefront, "forward", forward)
    entry = row(mode="inference")
    ways = entry["ways"]
    assert ways["2"]["error"] == "RuntimeError: no streams" and not ways["2"]["samples"]
    assert ways["5"]["differs"] and not ways["5"]["same_bits"]
    assert ways["on"]["same_bits"] and not ways["on"]["differs"]
    line = wavefront.line_of(entry)
    assert "2: RuntimeError: no streams" in line and line.endswith("DIFFERS")


def test_without_a_gpu_it_says_so(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert wavefront.main(["--out", str(tmp_path / "wavefront.jsonl")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
