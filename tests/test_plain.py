"""The short way of a plain layer or cell: when it is taken, and that it gives the layer's bits."""

import itertools

import pytest
import torch
from device import leaf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import lstm_ext
from lstm_ext import layer, lstm_cell, native, ops, plain
from lstm_ext.engine import EXCHANGE

pytestmark = pytest.mark.cpu_only(reason="the CPU engine's own way for one step of a cell")
I, H = 5, 19
CALLERS = (layer, plain, lstm_cell)  # of plain_layer; for modules the second


@pytest.fixture
def taken(monkeypatch):
    """A list with one entry for each step that went the short way."""
    steps = []

    def spy(function):
        def run(*args, **kwargs):
            made = function(*args, **kwargs)
            if made is not None:
                steps.append(made)
            return made

        return run

    plain_layer = spy(plain.plain_layer)
    for caller in CALLERS:
        monkeypatch.setattr(caller, "plain_layer", plain_layer)
    monkeypatch.setattr(lstm_cell, "plain_cell", spy(plain.plain_cell))
    return steps


@pytest.fixture(params=["by DLPack", "by Python"])
def looked(request, monkeypatch):
    """How the core looks at tensors: the latter where torch has no exchange of DLPack's."""
    if request.param == "by Python":
        monkeypatch.setattr(plain, "_plain", plain.core(None))
    elif EXCHANGE is None:
        pytest.skip("this torch has none")


def inputs(batch, dtype=torch.float32):
    return [torch.randn(batch, n, dtype=dtype) for n in (I, H, H)]


def by_the_layer(monkeypatch, call):
    with monkeypatch.context() as patch:
        for caller in CALLERS:
            patch.setattr(caller, "plain_layer", lambda *args, **kwargs: None)
        patch.setattr(lstm_cell, "plain_cell", lambda *args: None)
        return call()


DROPOUT = {"recurrent_dropout": 0.3, "weight_dropout": 0.2}


@pytest.mark.parametrize("made", [lstm_ext.LSTM, lstm_ext.LSTMCell])
@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_out_of_training_goes_the_short_way(taken, made, name):
    module = made(I, H, **{name: DROPOUT[name]}, zoneout=(0, 0.0))
    x = torch.randn(*[4][: made is lstm_ext.LSTM], 3, I)
    twin = made(I, H)
    twin.load_state_dict(module.state_dict())
    expected, hx = twin(x), None if made is lstm_ext.LSTM else (torch.ones(3, H),) * 2
    taken.clear()
    found = module.eval()(x)
    assert len(taken) == 1
    assert all(map(torch.equal, pytree.tree_leaves(found), pytree.tree_leaves(expected)))
    expected = pytree.tree_leaves(module(x, hx))
    dropped = pytree.tree_leaves(module.train()(x, hx))
    assert not any(map(torch.equal, dropped, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 4, 9, 130])
@pytest.mark.parametrize("with_hx, bias", [(True, True), (False, True), (True, False)])
def test_the_layer_s_bits(batch, dtype, with_hx, bias, taken, looked, monkeypatch, isa):
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
CALLS = {"plain": 1, "layers": 2, "batch_first": 1, "two directions": 1, "projection": 1}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("steps, batch", [(1, 1), (1, 3), (1, 6), (2, 1), (7, 6)])
@pytest.mark.parametrize("given", [False, True])
def test_the_bits_of_a_layer(name, steps, batch, given, taken, monkeypatch):
    module = lstm_ext.LSTM(I, H, **LAYERS[name])
    x = leaf(torch.randn(*((batch, steps) if module.batch_first else (steps, batch)), I))
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or H, H)
    hx = tuple(leaf(torch.randn(count, batch, n)) for n in sizes) if given else None
    inputs = [x, *(hx or ()), *module.parameters()]

    def run():
        y, states, *cells = module(x, hx)
        outputs = [y, *states, *cells]
        torch.manual_seed(1)
        cotangents = [torch.randn_like(t) for t in outputs]
        grads = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)
        for k in range(3):  # the others' gradients are None then
            grads += torch.autograd.grad(outputs[k], inputs, cotangents[k], retain_graph=True)
        first = y.clone()
        y.detach().zero_()  # changes no other
        with torch.no_grad():
            alone, _ = module(x, hx)[:2]
        return [first, *outputs[1:], alone, *grads]

    ours = run()
    expected = 2 * CALLS.get(name, 0)
    assert len(taken) == expected
    theirs = by_the_layer(monkeypatch, run)
    assert len(taken) == expected
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch, width", [(1, 40), (3, 64), (9, 40), (6, 150)])
def test_two_directions_on_any_number_of_threads(batch, width, dtype, taken, monkeypatch, isa):
    """Side by side, each on half of them, or one after the other: the bits are the same."""
    module = lstm_ext.LSTM(6, width, bidirectional=True, dtype=dtype)
    x = torch.randn(90, batch, 6, dtype=dtype)

    def run():
        with torch.no_grad():
            y, last = module(x)
        return [y, *last]

    torch.set_num_threads(1)
    expected = by_the_layer(monkeypatch, run)
    for threads in (1, 2, 3, 4, 6):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    assert len(taken) == 5 or dtype == torch.bfloat16


def test_a_layer_s_second_derivatives(taken, monkeypatch):
    module = lstm_ext.LSTM(2, 3, dtype=torch.float64, batch_first=True)
    x = leaf(torch.randn(2, 4, 2, dtype=torch.float64))
    hx = tuple(leaf(torch.randn(1, 2, 3, dtype=torch.float64)) for _ in range(2))

    def run():
        y, (h, c) = module(x, hx)
        first = torch.autograd.grad((y.sum() * h * c).sum(), [x, *hx], create_graph=True)
        loss = sum(g.pow(2).sum() for g in first)
        batched = torch.autograd.functional.jacobian(lambda x: module(x, hx)[0], x, vectorize=True)
        return [batched, *torch.autograd.grad(loss, [x, *hx, *module.parameters()])]

    ours = run()
    assert len(taken) == 2
    torch.testing.assert_close(ours, by_the_layer(monkeypatch, run))


def test_replaced_weights_are_looked_at_once(taken):
    module = lstm_ext.LSTM(I, H)
    seen = []

    class Counted(nn.Module):
        def forward(self, weight):
            seen.append(1)
            return weight * 2

    nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", Counted())
    seen.clear()
    y, _ = module(torch.randn(3, 2, I))
    assert len(seen) == 1 and len(taken) == 1, "the layer's own short way, weights in hand"
    y.sum().backward()
    module.bias_ih_l0 = None
    with pytest.raises(TypeError, match="bias_ih_l0: expected a Tensor, got NoneType"):
        module(torch.randn(3, 2, I))


def test_a_single_step_with_lengths_or_a_reset(taken):
    module, x = lstm_ext.LSTM(I, H), torch.randn(1, 2, I)
    hx = (torch.randn(1, 2, H), torch.randn(1, 2, H))
    h_n = module(x, hx, lengths=torch.tensor([1, 0]))[1][0]
    assert torch.equal(h_n[0, 1], hx[0][0, 1])
    module(x, hx, reset_mask=torch.tensor([[True, False]]))
    assert not taken


@pytest.mark.parametrize("given", [False, True])
def test_unbatched(given, taken, monkeypatch):
    module = lstm_ext.LSTMCell(I, H)
    x, *hx = (leaf(t[0]) for t in inputs(1))

    def run():
        states = module(x, hx if given else None)
        wanted = [x, *(hx if given else ()), *module.parameters()]
        loss = states[0].sum() + states[1].square().sum()
        grads = torch.autograd.grad(loss, wanted, create_graph=True)
        return [*states, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)]

    ours = run()
    assert len(taken) == 1
    assert [t.shape for t in ours[:3]] == [(H,), (H,), (I,)]
    for a, b in zip(ours, by_the_layer(monkeypatch, run), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, ours[:2], by_the_layer(monkeypatch, run)[:2]))
    for wrong in (x[:-1], x[None, None], torch.randn(2, I), torch.tensor(0.5)):
        with pytest.raises((RuntimeError, ValueError)):
            module(wrong, hx)


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


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_packed_sequences_of_one_length(batch, options, taken):
    """As a padded input, states in the order of the sequences."""
    module, x = lstm_ext.LSTM(I, H, **options), torch.randn(4, batch, I)
    hx = tuple(torch.randn(options.get("num_layers", 1) ** 2, batch, H) for _ in range(2))
    order = torch.arange(batch).flip(0)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((batch,), 4))
    packed = nn.utils.rnn.PackedSequence(packed.data, packed.batch_sizes, order, order)
    y, states = module(packed, hx)
    assert len(taken) == module.num_layers
    assert torch.equal(y.sorted_indices, order) and torch.equal(y.batch_sizes, packed.batch_sizes)
    theirs, last = module(x, tuple(t[:, order] for t in hx))
    assert torch.equal(y.data.view_as(theirs), theirs)
    assert all(torch.equal(a, b[:, order]) for a, b in zip(states, last, strict=True))


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


def test_tensors_that_are_not_contiguous(taken, looked, monkeypatch):
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
def test_tensors_for_the_layer(kind, index, taken, looked):
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


@pytest.mark.parametrize("steps, batch", [(1, 1), (1, 6), (7, 6)])
@pytest.mark.parametrize(
    "width, dtype", [(6, torch.bfloat16), (5, torch.bfloat16), (6, torch.half)]
)
def test_half_types(width, dtype, steps, batch, taken, monkeypatch, isa):
    """bf16 only where the core multiplies it, pair by pair."""
    module = lstm_ext.LSTM(width, H, dtype=dtype)
    x = leaf(torch.randn(steps, batch, width, dtype=dtype))

    def run():
        y, (h, c) = module(x)
        cotangents = [torch.ones_like(t) for t in (y, h, c)]
        return [y, h, c, *torch.autograd.grad((y, h, c), [x, *module.parameters()], cotangents)]

    ours = run()
    short = dtype == torch.bfloat16 and width % 2 == 0 and native._C.cpu_bf16_products()
    assert len(taken) == short
    theirs = by_the_layer(monkeypatch, run)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


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
    with pytest.raises(RuntimeError, match=r"nor compiled by torch\.jit\.script"):
        torch.jit.script(torch.nn.Sequential(module))
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
