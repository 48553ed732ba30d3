"""Why LSTMs exist: the adding problem over 500 steps, and how far back the gradient reaches."""

import importlib
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import lstm_ext

pytest.importorskip("matplotlib", reason="the example draws with matplotlib")
pytest.importorskip("tqdm", reason="the example shows its progress with tqdm")

pytestmark = pytest.mark.cpu_only(reason="trains; the gradients' values are other tests' matter")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "examples")
    return importlib.import_module("long_memory")


def _train(example, recurrent, most):
    """A course at its end, or after ``most`` training steps."""
    torch.manual_seed(0)
    learner = example.sbs.Learner("it", example.Adder(recurrent), example.RATE)
    course = example.Course(learner, torch.Generator().manual_seed(0))
    for step in example.learn(course, [], most):
        recent = learner.losses[-example.WINDOW :]
        ready = course.steps == example.STEPS and course.since >= example.WINDOW
        if ready and sum(recent) / len(recent) < example.SOLVED:
            return course, step
    return course, most


def test_an_lstm_learns_over_500_steps_and_a_plain_rnn_does_not(example):
    assert example.STEPS == 500
    course, used = _train(example, lstm_ext.LSTM, 1500)
    lstm = course.learner.model
    assert used < 1500, f"not learnt: sequences of {course.steps} steps"
    norms, error = example.gradient_norms(lstm)
    assert error < example.GUESS / 4
    # What is asked for lies anywhere in the sequence: so must what the loss tells.
    first, last = norms[:50], norms[-50:]
    assert min(norms) > 0 and 0.1 < sum(first) / sum(last) < 10

    course, _ = _train(example, nn.RNN, 300)
    norms, error = example.gradient_norms(course.learner.model)
    assert course.steps < 100 and error > 0.9 * example.GUESS
    assert max(norms[:50]) < 1e-12 * max(norms[-50:])


def test_a_forget_bias_of_1_is_what_it_takes(example):
    """Before any training, the gradient of an LSTM fades as its forget gate says."""
    rates = []
    for bias in (0.0, 1.0, 4.0):
        torch.manual_seed(0)
        model = example.Adder(lstm_ext.LSTM)
        with torch.no_grad():
            model.recurrent.bias_ih_l0[example.HIDDEN : 2 * example.HIDDEN] = bias
        norms, _ = example.gradient_norms(model)
        rates.append((norms[-60] / norms[-20]) ** (1 / 40))  # a step
        assert rates[-1] == pytest.approx(1 / (1 + math.exp(-bias)), abs=0.2)
    assert all(a + 0.05 < b for a, b in itertools.pairwise(rates))


def test_norms_are_those_of_torchs_lstm(example):
    torch.manual_seed(0)
    ours, peer = example.Adder(lstm_ext.LSTM), example.Adder(nn.LSTM)
    peer.load_state_dict(ours.state_dict())
    torch.testing.assert_close(
        torch.tensor(example.gradient_norms(ours)[0][-100:]),
        torch.tensor(example.gradient_norms(peer)[0][-100:]),
        rtol=1e-4,
        atol=1e-9,
    )
