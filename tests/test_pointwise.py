"""The core's LSTM cell alone, as the convolutional LSTMs call it."""

import device
import pytest
import torch
from device import here, leaf
from tolerances import tol

import lstm_ext
from lstm_ext import conv_planes, pointwise
from lstm_ext.cpu import cell as cpu_cell
from lstm_ext.cpu import conv as cpu_conv
from lstm_ext.steps import Steps


@pytest.mark.parametrize("threads", device.THREADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("peephole", [False, True], ids=["plain", "peephole"])
@pytest.mark.parametrize("lengths", [False, True], ids=["all", "some"])
def test_native_cell_matches_the_formula(isa, lengths, peephole, dtype, threads):
    torch.set_num_threads(threads)
    cells = pointwise.cells_of(device.DEVICE)
    for rows, width in ((1, 1), (7, 5), (130, 17), (300, 32)):
        mask = (torch.rand(rows) < 0.5).long() if lengths else None
        steps = Steps.padded(1, rows, lengths=mask, device=device.DEVICE)
        inputs = [leaf(torch.randn(rows, n * width, dtype=dtype)) for n in (4, 1, 1)]
        w_ch = leaf(torch.randn(3 * width, dtype=dtype)) if peephole else None
        if peephole:
            inputs.append(w_ch)
        a, h, c = (t.detach().clone() for t in inputs[:3])
        v = [here(torch.randn(rows, width, dtype=dtype)) for _ in range(2)]
        expected = pointwise.lstm_cell(*inputs[:3], steps, w_ch)
        gradients = torch.autograd.grad(expected, inputs, v, allow_unused=True)
        w = None if w_ch is None else w_ch.detach()
        h_new, c_new, da = torch.empty_like(h), torch.empty_like(c), torch.full_like(a, torch.nan)
        cells.cell_forward(steps, a.clone(), h, c, w, h_new, c_new, False)
        h_kept, c_kept = torch.empty_like(h), torch.empty_like(c)
        cells.cell_forward(steps, a, h, c, w, h_kept, c_kept, True)  # a is kept's from here on
        assert torch.equal(h_kept, h_new) and torch.equal(c_kept, c_new)
        dh, dc, dw_ch = cells.cell_backward(steps, *v, a, c, c_new, w, da)
        wanted = [*expected, *gradients]
        for got, want in zip((h_new, c_new, da, dh, dc, dw_ch), wanted, strict=False):
            if want is not None:  # dh, where no row passes h on
                torch.testing.assert_close(got, want, **tol(want.dtype))
        assert (dw_ch is None) == (w_ch is None) and len(wanted) == 5 + peephole


def test_an_infinite_cell_without_peepholes():
    """Its zero weights would make it NaN."""
    cells, steps = pointwise.cells_of(device.DEVICE), Steps.padded(1, 2, device=device.DEVICE)
    a, h, c = (
        here(torch.full((2, n * 3), value)) for n, value in ((4, 1.0), (1, 0.5), (1, torch.inf))
    )
    h_new, c_new = torch.empty_like(h), torch.empty_like(c)
    cells.cell_forward(steps, a, h, c, None, h_new, c_new, False)
    torch.testing.assert_close(h_new, torch.sigmoid(here(torch.ones(2, 3))))
    assert c_new.isinf().all()


def test_the_native_cell_is_what_runs(monkeypatch):
    L = 4
    cells, calls = type(pointwise.cells_of(device.DEVICE)), []
    if device.NAME == "cpu":
        cells = cpu_cell
    native = cells.cell_forward

    def spy(*args):
        calls.append(args)
        return native(*args)

    monkeypatch.setattr(cells, "cell_forward", spy)
    monkeypatch.setattr(cpu_conv.Call, "is_few_products", lambda *_: False)
    monkeypatch.setattr(conv_planes, "_pays", lambda _: False)
    module = here(lstm_ext.ConvLSTM2d(2, 5, 3, 2))
    module(here(torch.randn(L, 3, 2, 4, 4)))
    assert len(calls) == 2 * L
    with torch.device("meta"):
        y, _ = lstm_ext.ConvLSTM2d(2, 5, 3)(torch.randn(L, 3, 2, 4, 4))
    assert y.is_meta and len(calls) == 2 * L
