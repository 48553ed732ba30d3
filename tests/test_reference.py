"""reference.py, which everything else is compared with, itself compared with nn.LSTM in fp64."""

import itertools

import pytest
import torch
from device import here, leaf
from tolerances import tol
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from lstm_ext import reference

TOL = tol(torch.float64)


def make(num_layers=1, bidirectional=False, proj_size=0, bias=True, input_size=3, hidden_size=4):
    """An nn.LSTM in fp64 and the reference's arguments that go with it."""
    module = nn.LSTM(
        input_size, hidden_size, num_layers, bias, False, 0.0, bidirectional, proj_size
    ).double()
    return here(module), {"num_layers": num_layers, "bidirectional": bidirectional}


def states(module, batch):
    count = module.num_layers * (1 + module.bidirectional)
    h0 = torch.randn(count, batch, module.proj_size or module.hidden_size).double()
    c0 = torch.randn(count, batch, module.hidden_size).double()
    return leaf(h0), leaf(c0)


def grads(outputs, inputs, seed=1):
    """Gradients of outputs in a fixed random direction, the same for the same shapes."""
    gen = torch.Generator().manual_seed(seed)
    cotangents = [here(torch.randn(o.shape, generator=gen, dtype=o.dtype)) for o in outputs]
    return torch.autograd.grad(outputs, inputs, cotangents)


def layer_args(steps=4, batch=3, inputs=2, hidden=3, proj=0):
    """x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr of one layer, all requiring grad."""
    p = proj or hidden
    shapes = [
        (steps, batch, inputs), (batch, p), (batch, hidden),
        (4 * hidden, inputs), (4 * hidden, p), (4 * hidden,), (4 * hidden,),
    ]  # fmt: skip
    if proj:
        shapes.append((p, hidden))
    return [leaf(torch.randn(shape, dtype=torch.float64)) for shape in shapes]


@pytest.mark.parametrize("with_hx", [True, False])
@pytest.mark.parametrize(
    "num_layers, bidirectional, proj_size, bias",
    list(itertools.product([1, 2], [False, True], [0, 2], [True, False])),
)
def test_equals_nn_lstm(num_layers, bidirectional, proj_size, bias, with_hx):
    module, kw = make(num_layers, bidirectional, proj_size, bias)
    x = leaf(torch.randn(5, 3, 3, dtype=torch.float64))
    hx = states(module, 3) if with_hx else None
    inputs = [x, *module.parameters(), *(hx or ())]
    expected_y, expected_states = module(x, hx)
    y, hn, cells = reference.lstm(x, hx, module.all_weights, **kw)
    assert_close(y, expected_y, **TOL)
    assert_close(hn, expected_states, **TOL)
    assert_close(grads([y, *hn], inputs), grads([expected_y, *expected_states], inputs), **TOL)
    assert cells.shape == (5, 3, 4 * (1 + bidirectional))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths_equal_packed(bidirectional):
    module, kw = make(2, bidirectional, proj_size=2)
    lengths = torch.tensor([2, 5, 1, 4, 5])
    x = leaf(torch.randn(5, 5, 3, dtype=torch.float64))
    hx = states(module, 5)
    inputs = [x, *module.parameters(), *hx]
    packed, expected_states = module(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    expected_y, _ = pad_packed_sequence(packed, total_length=5)
    y, hn, _ = reference.lstm(x, hx, module.all_weights, lengths=lengths, **kw)
    assert_close(y, expected_y, **TOL)
    assert_close(hn, expected_states, **TOL)
    assert_close(grads([y, *hn], inputs), grads([expected_y, *expected_states], inputs), **TOL)


@pytest.mark.parametrize("reverse", [False, True])
def test_zero_length_returns_the_initial_state(reverse):
    args = layer_args()
    lengths = torch.tensor([0, 4, 0])
    y, h_n, c_n, cells = reference.lstm_layer(*args, lengths=lengths, reverse=reverse)
    for b in (0, 2):
        assert torch.equal(h_n[b], args[1][b])
        assert torch.equal(c_n[b], args[2][b])
        assert not y[:, b].any()
        assert not cells[:, b].any()
    full = reference.lstm_layer(*args, reverse=reverse)
    assert_close((y[:, 1], h_n[1]), (full[0][:, 1], full[1][1]), **TOL)


@pytest.mark.parametrize("reverse", [False, True])
def test_cells_are_the_cell_states_of_every_step(reverse):
    """Against nn.LSTM run one step at a time."""
    module, _ = make()
    x = here(torch.randn(5, 2, 3, dtype=torch.float64))
    hx = states(module, 2)
    _, h_n, c_n, cells = reference.lstm_layer(
        x, hx[0][0], hx[1][0], *module.all_weights[0], reverse=reverse
    )
    expected = {}
    for t in reversed(range(5)) if reverse else range(5):
        _, hx = module(x[t : t + 1], hx)
        expected[t] = hx[1][0]
    assert_close(cells, torch.stack([expected[t] for t in range(5)]), **TOL)
    assert_close((h_n, c_n), (hx[0][0], hx[1][0]), **TOL)


@pytest.mark.parametrize("reverse", [False, True])
def test_reset_equals_cutting_the_sequence(reverse):
    """One sequence, cut by hand at its resets, each piece but the first started from zero."""
    args = layer_args(steps=7, batch=1)
    x, h0, c0, *weights = args
    mask = here(torch.tensor([0, 0, 1, 0, 0, 1, 0], dtype=torch.bool)[:, None])
    out = reference.lstm_layer(*args, reset_mask=mask, reverse=reverse)
    # A reset at t starts a piece at t: forward pieces [0,2) [2,5) [5,7); backward, where step t
    # comes after t+1, pieces (2..] (5..2] (..5] i.e. [6,7) [3,6) [0,3).
    bounds = [(6, 7), (3, 6), (0, 3)] if reverse else [(0, 2), (2, 5), (5, 7)]
    h, c, pieces = h0, c0, {}
    for n, (start, stop) in enumerate(bounds):
        if n:
            h, c = torch.zeros_like(h0), torch.zeros_like(c0)
        y, h, c, cells = reference.lstm_layer(x[start:stop], h, c, *weights, reverse=reverse)
        pieces[start] = (y, cells)
    y, cells = (torch.cat([pieces[start][k] for start in sorted(pieces)]) for k in (0, 1))
    expected = (y, h, c, cells)
    assert_close(out, expected, **TOL)
    assert_close(grads(out, args), grads(expected, args), **TOL)


def test_reset_before_the_first_step_forgets_hx():
    args = layer_args()
    mask = here(torch.zeros(4, 3, dtype=torch.bool))
    mask[0] = True
    zeros = [torch.zeros_like(a) for a in args[1:3]]
    out = reference.lstm_layer(*args, reset_mask=mask)
    assert_close(out, reference.lstm_layer(args[0], *zeros, *args[3:]), **TOL)
    assert not any(g.any() for g in grads(out, args[1:3]))


def test_reset_past_a_length_does_nothing():
    args = layer_args()
    lengths = torch.tensor([2, 0, 4])
    mask = here(torch.arange(4)[:, None] >= lengths)
    for reverse in (False, True):
        assert_close(
            reference.lstm_layer(*args, lengths=lengths, reset_mask=mask, reverse=reverse),
            reference.lstm_layer(*args, lengths=lengths, reverse=reverse),
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_reaches_neither_values_nor_gradients(reverse, bad):
    args = layer_args()
    lengths = torch.tensor([2, 0, 4])
    past = here(torch.arange(4)[:, None] >= lengths)
    dirty = torch.where(past[:, :, None], bad, args[0].detach()).requires_grad_()
    results = []
    for x in (args[0], dirty):
        out = reference.lstm_layer(x, *args[1:], lengths=lengths, reverse=reverse)
        results.append((out, grads(out, [x, *args[1:]])))
    assert_close(results[1], results[0], rtol=0, atol=0)
    assert not results[1][1][0][past].any()


@pytest.mark.parametrize("proj_size", [0, 2])
def test_no_steps(proj_size):
    args = layer_args(steps=0, proj=proj_size)
    y, h_n, c_n, cells = reference.lstm_layer(*args)
    assert y.shape == (0, 3, proj_size or 3)
    assert cells.shape == (0, 3, 3)
    assert torch.equal(h_n, args[1])
    assert torch.equal(c_n, args[2])
    module, kw = make(2, True, proj_size)
    hx = states(module, 3)
    y, hn, cells = reference.lstm(here(torch.zeros(0, 3, 3).double()), hx, module.all_weights, **kw)
    assert y.shape == (0, 3, 2 * (proj_size or 4))
    assert cells.shape == (0, 3, 8)
    assert_close(hn, hx, rtol=0, atol=0)


def test_dropout_lies_between_the_layers_only():
    module, kw = make(2)
    x = here(torch.randn(5, 3, 3, dtype=torch.float64))
    first, second = ([w] for w in module.all_weights)
    dropped, _, _ = reference.lstm(x, None, module.all_weights, dropout=1.0, training=True, **kw)
    expected, _, _ = reference.lstm(here(torch.zeros(5, 3, 4).double()), None, second)
    assert_close(dropped, expected, **TOL)
    alone = reference.lstm(x, None, first, dropout=1.0, training=True)
    assert_close(alone, reference.lstm(x, None, first), rtol=0, atol=0)
    for quiet in ({"dropout": 0.5}, {"training": True}):
        out = reference.lstm(x, None, module.all_weights, **quiet, **kw)[0]
        assert_close(out, module(x)[0], **TOL)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("proj", [0, 2])
def test_gradcheck_and_gradgradcheck(proj, reverse):
    args = layer_args(steps=3, batch=2, inputs=2, hidden=3, proj=proj)
    extra = {
        "lengths": torch.tensor([2, 3]),
        "reset_mask": here(torch.tensor([[0, 0], [1, 0], [0, 1]], dtype=torch.bool)),
        "reverse": reverse,
    }

    def run(*tensors):
        return reference.lstm_layer(*tensors, **extra)

    assert torch.autograd.gradcheck(run, args)
    assert torch.autograd.gradgradcheck(run, args)


def test_a_wrong_number_of_layers_is_refused():
    module, _ = make(2)
    with pytest.raises(ValueError, match="got 2, expected 4"):
        reference.lstm(here(torch.zeros(1, 1, 3).double()), None, module.all_weights, num_layers=2,
                       bidirectional=True)  # fmt: skip
