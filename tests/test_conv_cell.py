"""A ConvLSTM's cell by the CPU's core: its short way beside the other."""

import pytest
import torch
from device import leaf
from test_conv_core import F64, OPTIONS, SIZES, guard, made
from torch import nn

from lstm_ext import conv, conv_cell
from lstm_ext.cpu import conv as cpu_conv
from lstm_ext.engine import EXCHANGE

pytestmark = pytest.mark.cpu_only(reason="the CPU's core")


@pytest.fixture
def short(monkeypatch):
    """A list with an entry for each step of a cell: whether it went the short way."""
    found = []

    def spy(*args, run=conv.short_step):
        states = None if spy.refuses else run(*args)
        found.append(states is not None)
        return states

    spy.refuses = False
    monkeypatch.setattr(conv, "short_step", spy)
    return found, spy


@pytest.mark.parametrize("exchange", [EXCHANGE, None], ids=["dlpack", "python"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dims", SIZES)
def test_the_bits_of_the_other_way(dims, name, dtype, exchange, short, monkeypatch):
    monkeypatch.setattr(conv_cell, "_core", conv_cell.core(exchange))
    monkeypatch.setattr(cpu_conv.Call, "is_few_products", lambda *_, **__: True)
    monkeypatch.setattr(cpu_conv.Call, "are_few_rows", True)
    found, spy = short
    cell = made(dims, name, dtype, cell=True)
    x = leaf(torch.randn(2, 3, *SIZES[dims], dtype=dtype))
    size = cell(x)[0].shape
    hx = [leaf(torch.randn(size, dtype=dtype)) for _ in "hc"]
    read = [x, *hx, *cell.parameters()]

    def run(states):
        with torch.no_grad():
            outputs = [*cell(x, states)]
        for _ in range(2):  # of states that lie channels last
            states = cell(x, states)
            outputs += states
        loss = states[0].square().sum() + states[1].sin().sum()
        return outputs + list(torch.autograd.grad(loss, read))

    found.clear()
    got = run(tuple(hx))
    assert found == [True] * 3
    spy.refuses = True
    for a, b in zip(got, run(tuple(hx)), strict=True):
        assert torch.equal(a, b)


def test_states_are_alone_in_memory_and_may_be_changed(short):
    cell = made(2, "plain", F64, cell=True)
    x = leaf(torch.randn(2, 3, 6, 5, dtype=F64))
    expected = torch.autograd.grad(cell(x)[0].sum(), cell.weight_ih)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            h, c = cell(x)
        assert h.untyped_storage().nbytes() == c.untyped_storage().nbytes() == 8 * h.numel()
    total = h.sum()
    with torch.no_grad():
        h.zero_()
        c.zero_()
    assert torch.equal(*torch.autograd.grad(total, cell.weight_ih), *expected)
    assert short[0] == [True] * 3


def test_second_derivatives_of_a_cell(short):
    cell = made(2, "peephole", F64, cell=True)
    x, h, c = (leaf(torch.randn(1, n, 3, 2, dtype=F64)) for n in (3, 4, 4))
    assert torch.autograd.gradgradcheck(lambda x, h, c: cell(x, (h, c)), (x, h, c))
    assert all(short[0])


def test_what_a_hook_on_saved_tensors_returns_is_looked_at(short):
    cell = made(2, "plain", F64, cell=True)
    x = leaf(torch.randn(1, 3, 4, 4, dtype=F64))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[..., :1]):
        h, _ = cell(x)
    with pytest.raises(RuntimeError, match="Expected a result saved for backward"):
        h.sum().backward()
    assert short[0] == [True]


class Subclass(torch.Tensor):
    pass


def test_calls_that_go_the_other_way(short):
    found, _ = short
    cell = made(2, "plain", torch.float32, cell=True)
    x = torch.randn(2, 3, 6, 5)
    expected = cell(x)
    found.clear()
    torch.testing.assert_close(
        cell(x.as_subclass(Subclass))[0].as_subclass(torch.Tensor), expected[0]
    )
    torch.testing.assert_close(cell(torch._neg_view(-x))[0], expected[0])
    torch.testing.assert_close(cell(x[0])[0], expected[0][0])
    torch.func.vmap(cell)(x[None])
    cell.weight_ih = nn.Parameter(torch._neg_view(-cell.weight_ih.data))
    torch.testing.assert_close(cell(x)[0], expected[0])
    cell.register_parameter("weight_ih", None)
    cell.__dict__["weight_ih"] = torch.zeros(16, 3, 3, 3)
    cell(x)
    assert len(found) >= 6 and not any(found)


def test_tensors_that_lie_otherwise(short):
    cell = made(2, "plain", torch.float32, cell=True)
    x = torch.randn(2, 3, 6, 5)
    expected = cell(x)
    weight = cell.weight_ih.data
    cell.weight_ih = nn.Parameter(weight.movedim(2, 3).contiguous().movedim(3, 2))
    for name in ("bias_ih", "bias_hh"):
        apart = getattr(cell, name).data.repeat_interleave(2)[::2]
        setattr(cell, name, nn.Parameter(apart))
    read = [leaf(x.movedim(3, 0).contiguous().movedim(0, 3)), *cell.parameters()]
    assert not any(t.is_contiguous() for t in read if t is not cell.weight_hh)
    got = cell(read[0])
    assert short[0] == [True] * 2
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    made_gradients = torch.autograd.grad(got[0].sum(), read)
    assert [g.shape for g in made_gradients] == [t.shape for t in read]


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("name", ["peephole", "plain"])
def test_gradients_of_some(name, dtype, short, monkeypatch):
    """Of each tensor alone, in memory that is large enough."""
    cell = made(2, name, dtype, cell=True)
    x = leaf(torch.randn(2, 3, 6, 5, dtype=dtype))
    hx = [leaf(torch.randn(2, 4, 6, 5, dtype=dtype)) for _ in "hc"]
    every = [x, *hx, *cell.parameters()]

    def loss():
        h, c = cell(x, hx)
        return h.float().square().sum() + c.float().sum()

    expected = torch.autograd.grad(loss(), every)
    given = guard(monkeypatch)
    for tensor, whole in zip(every, expected, strict=True):
        for other in every:
            other.requires_grad_(other is tensor)
        (alone,) = torch.autograd.grad(loss(), [tensor])
        torch.testing.assert_close(alone, whole)
    assert len(given) == 2 * len(every) and all((after == 0xA5).all() for after in given)
    assert all(short[0])


def test_what_backward_gets_from_a_hook_and_cannot_read(short):
    """Goes torch's way: a tensor of another type."""
    cell = made(2, "peephole", F64, cell=True)
    x = leaf(torch.randn(1, 3, 4, 4, dtype=F64))
    expected = torch.autograd.grad(cell(x)[0].sum(), [x, *cell.parameters()])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.as_subclass(Subclass)):
        h, _ = cell(x)
    got = torch.autograd.grad(h.sum(), [x, *cell.parameters()])
    torch.testing.assert_close(got, expected)
    assert short[0] == [True] * 2


def test_many_gradients_at_once(short):
    """torch.autograd's own vmap, and a gradient of one result alone."""
    cell = made(2, "plain", F64, cell=True)
    x = leaf(torch.randn(1, 3, 3, 2, dtype=F64))
    for result in range(2):
        y = cell(x)[result]
        ones = torch.eye(y.numel(), dtype=F64).view(-1, *y.shape)
        (at_once,) = torch.autograd.grad(y, x, ones, is_grads_batched=True, retain_graph=True)
        for one, got in zip(ones, at_once, strict=True):
            torch.testing.assert_close(torch.autograd.grad(y, x, one, retain_graph=True)[0], got)
    assert all(short[0])
