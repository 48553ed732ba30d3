"""The benchmark's clock on a GPU, with CUDA events that only write down what is asked of them."""

import pytest
import torch
from torch import nn

import lstm_ext
from bench import run as cli
from bench import timing, work
from bench.suites import Problem

pytestmark = pytest.mark.cpu_only(reason="with stand-ins for CUDA's clock")
CUDA = torch.device("cuda")


@pytest.fixture
def log(monkeypatch):
    """What was asked of CUDA, in order; the clock goes on by 2 ms at each "call"."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = 2.0 * asked.count("call")
            asked.append("record")

        def elapsed_time(self, end):
            assert asked[-1] == "synchronize", "both events must have happened"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("empty_cache"))
    return asked


def test_a_sample_lies_between_two_events_and_starts_idle(log):
    spent = timing.seconds(lambda: log.append("call"), 3, CUDA)
    assert spent == pytest.approx(6e-3)
    calls = ["call"] * 3
    assert log == ["synchronize", "record", *calls, "record", "synchronize"]


def test_the_time_of_the_calling_thread(log, monkeypatch):
    """Until the last call returns; the device is idle before and is waited for after."""
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 5e-3 * log.count("call"))
    assert timing.seconds(lambda: log.append("call"), 3, CUDA, host=True) == pytest.approx(15e-3)
    assert log == ["synchronize", *["call"] * 3, "synchronize"]


def test_a_sample_is_long_enough(log):
    assert timing.warm_up(lambda: log.append("call"), 20e-3, CUDA) == 10


def test_samples_are_taken_in_turn(log, monkeypatch):
    names = []

    def of(name):
        class Named(nn.LSTM):
            def forward(self, *args):
                log.append("call")
                names.append(name)
                return super().forward(*args)

        return Named

    # The modules stay on the CPU: only the clock is CUDA's.
    monkeypatch.setattr(timing, "build_on", lambda _device, _dtype, *args: work.build(*args))
    monkeypatch.setattr(timing, "make_inputs", lambda *_: [torch.randn(2, 1, 3)])
    monkeypatch.setattr(timing, "truth_of", lambda *_: {})
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 0)
    monkeypatch.setattr(timing, "peak_memory", lambda call, device: None)
    row = timing.run_row(
        Problem(2, 1, 3, 4),
        "training",
        {"nn.LSTM": timing.drop_in(of("peer")), "lstm_ext": timing.drop_in(of("ours"))},
        dtype=torch.float32,
        device=CUDA,
        repeats=3,
        min_sample=4e-3,
    )
    assert row.peer.error is None and row.ours.error is None
    assert (row.peer.inner, row.ours.inner) == (2, 2)
    assert names[-12:] == ["peer", "peer", "ours", "ours"] * 3
    assert row.ratios() == pytest.approx([1.0] * 3)
    assert row.peer.host_us > 0 and row.ours.host_us > 0
    assert log[0] == "empty_cache"


@pytest.mark.parametrize(
    "build, message",
    [
        (RuntimeError("this lstm_ext was built for the CPU only"), "CPU only"),
        (False, "plain torch"),
    ],
)
def test_a_build_without_kernels_is_not_timed(monkeypatch, capsys, build, message):
    def has_native_kernels(_device):
        if isinstance(build, Exception):
            raise build
        return build

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lstm_ext.ops, "has_native_kernels", has_native_kernels)
    with pytest.raises(SystemExit) as caught:
        cli.main(("--suite", "edges", "--device", "cuda"))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
