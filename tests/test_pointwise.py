"""The core's LSTM cell alone, as the convolutional LSTMs call it."""

import device
import pytest
import torch
from device import here, leaf
from tolerances import tol

import lstm_ext
from lstm_ext import cpu_cell, pointwise
from lstm_ext.steps import Steps


@pytest.mark.parametrize("threads", device.THREADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("peephole", [False, True], ids=["plain", "peephole"])
@pytest.mark.parametrize("lengths", [False, True], ids=["all", "some"])
def test_native_cell_matches_the_formula(isa, lengths, peephole, dtype, threads):
    torch.set_num_threads(threads)
    for rows, width in ((1, 1), (7, 5), (130, 17), (300, 32)):
        mask = (torch.rand(rows) < 0.5).long() if lengths else None
        steps = Steps.padded(1, rows, lengths=mask, device=device.DEVICE)
        a, h, c = (here(torch.randn(rows, n * width, dtype=dtype)) for n in (4, 1, 1))
        inputs = [t.requires_grad_() for t in (a, h, c)]
        w_ch = leaf(torch.randn(3 * width, dtype=dtype)) if peephole else None
        if peephole:
            inputs.append(w_ch)
        cotangents = [here(torch.randn(rows, width, dtype=dtype)) for _ in range(2)]
        native = pointwise.lstm_cell(a, h, c, steps, w_ch)
        formula = pointwise._formula(a, h, c, w_ch, steps)
        assert native[0].grad_fn.name() == "PointwiseCellBackward" != formula[0].grad_fn.name()
        results = []
        for outputs in (native, formula):
            gradients = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
            zero = torch.zeros_like(h)
            results.append([*outputs, *(zero if g is None else g for g in gradients)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, **tol(want.dtype))


def test_the_native_cell_is_what_runs(monkeypatch):
    L = 4
    cells, calls = type(pointwise._cells(device.DEVICE)), []
    if device.NAME == "cpu":
        cells = cpu_cell
    native = cells.cell_forward

    def spy(*args):
        calls.append(args)
        return native(*args)

    monkeypatch.setattr(cells, "cell_forward", spy)
    module = here(lstm_ext.ConvLSTM2d(2, 5, 3, 2))
    module(here(torch.randn(L, 3, 2, 4, 4)))
    assert len(calls) == 2 * L
    with torch.device("meta"):
        y, _ = lstm_ext.ConvLSTM2d(2, 5, 3)(torch.randn(L, 3, 2, 4, 4))
    assert y.is_meta and len(calls) == 2 * L
