"""The short way of a single plain step: when it is taken, and that it gives the layer's bits."""

import itertools

import pytest
import torch
from device import leaf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import lstm_ext
from lstm_ext import cell_step, layer, lstm_cell, ops

pytestmark = pytest.mark.cpu_only(reason="the CPU engine's own way for one step of a cell")
I, H = 5, 19
CALLERS = (lstm_cell, layer)


@pytest.fixture
def taken(monkeypatch):
    """A list with one entry for each step that went the short way."""
    steps = []

    def spy(*args):
        made = cell_step.cell_step(*args)
        if made is not None:
            steps.append(made)
        return made

    for caller in CALLERS:
        monkeypatch.setattr(caller, "cell_step", spy)
    return steps


def inputs(batch, dtype=torch.float32):
    return [torch.randn(batch, n, dtype=dtype) for n in (I, H, H)]


def by_the_layer(monkeypatch, call):
    with monkeypatch.context() as patch:
        for caller in CALLERS:
            patch.setattr(caller, "cell_step", lambda *args: None)
        return call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("with_hx, bias", [(True, True), (False, True), (True, False)])
def test_the_layer_s_bits(batch, dtype, with_hx, bias, taken, monkeypatch, isa):
    module = lstm_ext.LSTMCell(I, H, bias, dtype=dtype)
    leaves = [leaf(t) for t in inputs(batch, dtype)]
    x, hx = leaves[0], tuple(leaves[1:]) if with_hx else None
    wanted = [*leaves[: 3 if with_hx else 1], *module.parameters()]
    cotangents = [torch.randn(batch, H, dtype=dtype) for _ in range(2)]

    def run():
        states = module(x, hx)
        with torch.no_grad():
            alone = module(x, hx)
        grads = [torch.autograd.grad(states, wanted, cotangents, retain_graph=True)]
        for k in range(2):  # c alone does not depend on all gates
            got = torch.autograd.grad(
                states[k], wanted, cotangents[k], retain_graph=True, allow_unused=True
            )
            grads.append(got)
        return [*states, *alone, *itertools.chain.from_iterable(grads)]

    ours = run()
    assert len(taken) == 2
    theirs = by_the_layer(monkeypatch, run)
    assert len(taken) == 2
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


LAYERS = {
    "plain": {},
    "layers": {"num_layers": 2, "bias": False},
    "batch_first": {"batch_first": True},
    "two directions": {"bidirectional": True},
    "projection": {"proj_size": 3},
    "peephole": {"peephole": True},
    "cells": {"return_cell_sequence": True},
}
ONE_STEP = {"plain": 1, "layers": 2, "batch_first": 1}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_layer_s_single_step(name, batch, taken, monkeypatch):
    module = lstm_ext.LSTM(I, H, **LAYERS[name])
    x = leaf(torch.randn(*((batch, 1) if module.batch_first else (1, batch)), I))

    def run():
        y, states, *cells = module(x)
        outputs = [y, *states, *cells]
        torch.manual_seed(1)
        cotangents = [torch.randn_like(t) for t in outputs]
        grads = torch.autograd.grad(outputs, [x, *module.parameters()], cotangents)
        first = y.clone()
        y.detach().zero_()  # changes no other
        return [first, *outputs[1:], *grads]

    ours = run()
    assert len(taken) == ONE_STEP.get(name, 0)
    theirs = by_the_layer(monkeypatch, run)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_single_step_with_lengths_or_a_reset(taken):
    module, x = lstm_ext.LSTM(I, H), torch.randn(1, 2, I)
    hx = (torch.randn(1, 2, H), torch.randn(1, 2, H))
    h_n = module(x, hx, lengths=torch.tensor([1, 0]))[1][0]
    assert torch.equal(h_n[0, 1], hx[0][0, 1])
    module(x, hx, reset_mask=torch.tensor([[True, False]]))
    assert not taken


def test_unbatched(taken, monkeypatch):
    module = lstm_ext.LSTMCell(I, H)
    x, *hx = (t[0] for t in inputs(1))
    ours = module(x, hx)
    assert len(taken) == 1
    assert all(map(torch.equal, ours, by_the_layer(monkeypatch, lambda: module(x, hx))))


@pytest.mark.parametrize("index", range(7))
def test_any_one_input_may_require_grad(index, taken, monkeypatch):
    module = lstm_ext.LSTMCell(I, H).requires_grad_(False)
    x, h, c = inputs(2)
    tensors = [x, h, c, *module.parameters()]
    tensors[index].requires_grad_()

    def run():
        return torch.autograd.grad(sum(s.sum() for s in module(x, (h, c))), tensors[index])[0]

    ours = run()
    assert len(taken) == 1
    assert torch.equal(ours, by_the_layer(monkeypatch, run))


def test_nothing_is_recorded_without_need(taken):
    module = lstm_ext.LSTMCell(I, H)
    x, *hx = inputs(2)
    with torch.no_grad():
        assert not any(s.requires_grad for s in module(x, hx))
    with torch.inference_mode():
        assert all(s.is_inference() for s in module(x, hx))
    module.requires_grad_(False)
    assert not any(s.requires_grad for s in module(x, hx))
    assert len(taken) == 3


def test_tensors_that_are_not_contiguous(taken, monkeypatch):
    module = lstm_ext.LSTMCell(I, H)
    module.weight_ih = nn.Parameter(torch.randn(I, 4 * H).T)
    module.bias_hh = nn.Parameter(torch.randn(8 * H)[::2])
    x = leaf(torch.randn(3, 7, I))
    both = leaf(torch.randn(3, 2 * H))

    def run():
        states = module(x[:, 2], both.chunk(2, 1))
        return [*states, *torch.autograd.grad(sum(states).sum(), [x, both, *module.parameters()])]

    ours = run()
    assert len(taken) == 1
    theirs = by_the_layer(monkeypatch, run)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("index", range(7))
@pytest.mark.parametrize("kind", ["negated", "subclass"])
def test_tensors_for_the_layer(kind, index, taken):
    module = lstm_ext.LSTMCell(I, H)
    tensors = [*inputs(2), *(p.detach() for p in module.parameters())]

    def run(x, h, c, *weights):
        names = dict(module.named_parameters())
        weights = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(module, weights, (x, (h, c)))

    expected = run(*tensors)
    assert len(taken) == 1
    tensor = tensors[index]
    tensors[index] = torch._neg_view(-tensor) if kind == "negated" else tensor.as_subclass(Subclass)
    got = run(*tensors)
    assert len(taken) == 1
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_go_the_layer_s_way(dtype, taken):
    lstm_ext.LSTMCell(I, H, dtype=dtype)(inputs(1, dtype)[0])
    assert not taken


def test_surroundings_that_see_the_layer_s_way(taken):
    module, x = lstm_ext.LSTMCell(I, H), inputs(1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
    with forward_ad.dual_level():
        h, _ = module(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(h).tangent is not None
    torch.func.vmap(module)(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module(x)
    assert make_fx(module)(x).graph.find_nodes(
        op="call_function", target=torch.ops.lstm_ext.lstm_layer.default
    )
    torch.compile(module, fullgraph=True, backend="eager")(x)
    with pytest.raises(RuntimeError, match=r"cannot be traced by torch\.jit\.trace"):
        torch.jit.trace(module, x)
    assert not taken


def test_another_engine_takes_no_short_way(taken, monkeypatch):
    monkeypatch.setitem(ops._engines, "cpu", None)
    with pytest.raises(AttributeError):
        lstm_ext.LSTMCell(I, H)(inputs(1)[0])
    assert not taken


def test_outputs_may_be_changed_in_place():
    """As those of nn.LSTMCell: a loop that zeroes the states of what is over."""
    results = []
    theirs = nn.LSTMCell(I, H, dtype=torch.float64)
    for module in (theirs, lstm_ext.LSTMCell.from_torch(theirs)):
        torch.manual_seed(1)
        hx, over = None, torch.tensor([[1.0], [0.0]], dtype=torch.float64)
        for _ in range(3):
            hx = module(torch.randn(2, I, dtype=torch.float64), hx)
            for state in hx:
                state.mul_(over)
        results.append(torch.autograd.grad(sum(hx).sum(), list(theirs.parameters())))
    torch.testing.assert_close(*results)


def test_inputs_changed_in_place_are_refused():
    module = lstm_ext.LSTMCell(I, H)
    x, *hx = inputs(1)
    h, _ = module(x, hx)
    hx[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@pytest.mark.parametrize("write", ["inplace", "data", "replace", "to"])
def test_no_stale_weights(write, taken):
    module = lstm_ext.LSTMCell(I, H)
    x = inputs(1)[0]
    before = module(x)[0]
    if write == "inplace":
        with torch.no_grad():
            module.weight_ih.mul_(2)
    elif write == "data":
        module.weight_ih.data = module.weight_ih.data * 2
    elif write == "replace":
        module.weight_ih = nn.Parameter(module.weight_ih * 2)
    else:
        with torch.no_grad():
            module.weight_ih.mul_(2)
        module, x = module.double(), x.double()
    after, _ = module(x)
    assert len(taken) == 2
    assert not torch.allclose(after.float(), before)
    twin = module.to_torch()
    torch.testing.assert_close(after, twin(x)[0])


def test_batched_gradients_and_second_derivatives(taken, monkeypatch):
    module = lstm_ext.LSTMCell(2, 3, dtype=torch.float64)
    x = leaf(torch.randn(2, 2, dtype=torch.float64))

    def run():
        batched = torch.autograd.functional.jacobian(lambda x: module(x), x, vectorize=True)
        h, c = module(x)
        (first,) = torch.autograd.grad((h * c).sum(), x, create_graph=True)
        return [*batched, *torch.autograd.grad(first.pow(2).sum(), [x, *module.parameters()])]

    ours = run()
    assert len(taken) == 2
    torch.testing.assert_close(ours, by_the_layer(monkeypatch, run))
