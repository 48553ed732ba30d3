"""Tensors without memory, zeros that forward mode makes and those whose storage was freed: the part
of one has an address that is none."""

import pytest
import torch
from device import here
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp
from torch.utils import _pytree as pytree

import lstm_ext
from lstm_ext import reference

KINDS = {
    "plain": lambda: lstm_ext.LSTM(4, 6),
    "stack": lambda: lstm_ext.LSTM(4, 6, 2),
    "bidirectional": lambda: lstm_ext.LSTM(4, 6, bidirectional=True),
    "projection": lambda: lstm_ext.LSTM(4, 6, proj_size=3),
    "variant": lambda: lstm_ext.LSTM(4, 6, peephole=True, layer_norm=True),
    "cell": lambda: lstm_ext.LSTMCell(4, 6),
    "conv": lambda: lstm_ext.ConvLSTM1d(4, 6, 1),
}


def _made(kind):
    torch.manual_seed(0)
    size = {"cell": (3, 4), "conv": (5, 3, 4, 2)}.get(kind, (5, 3, 4))
    return here(KINDS[kind]()).double(), here(torch.randn(size, dtype=torch.double))


def _zero(like):
    """A part, not the first, of a zero without memory."""
    zero = torch._efficientzerotensor((2, *like.shape), dtype=like.dtype, device=like.device)[1]
    assert zero._is_zerotensor() and (zero.data_ptr() != 0 or like.device.type != "cpu")
    return zero


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_states(kind):
    module, x = _made(kind)
    zeros = torch.zeros_like(x)
    result = module(x)
    states = result if kind == "cell" else result[1]
    none = pytree.tree_map(torch.zeros_like, states)
    for found, expected in (
        (module(_zero(x)), module(zeros)),
        (module(x, pytree.tree_map(_zero, states)), module(x, none)),
    ):
        for one, other in zip(*map(pytree.tree_leaves, (found, expected)), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_outputs(kind):
    """Of all, and of one beside another that is none."""
    module, x = _made(kind)
    inputs = [x.requires_grad_(), *module.parameters()]
    outputs = pytree.tree_leaves(module(x))
    for k in range(len(outputs)):
        made = [torch.randn_like(o) if i == k else _zero(o) for i, o in enumerate(outputs)]
        plain = [torch.zeros_like(d) if d._is_zerotensor() else d for d in made]
        for create_graph in (False, True):
            found, expected = (
                torch.autograd.grad(
                    *(outputs, inputs, d), retain_graph=True, create_graph=create_graph
                )
                for d in (made, plain)
            )
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)
    every = torch.autograd.grad(outputs, inputs, list(map(_zero, outputs)))
    assert not any(g.any() for g in every)


def _scaled(kind, module):
    """What has a tangent, times a number that has none: torch then makes a zero without memory."""
    return lambda x: [t * 2 for t in pytree.tree_leaves(module(x))]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "conv"])
def test_reverse_over_forward_mode(kind):
    module, x = _made(kind)
    module.requires_grad_(False)
    function, ones = _scaled(kind, module), torch.ones_like(x)

    def total(x):
        return sum(t.sum() for t in jvp(function, (x,), (ones,))[1])

    found = grad(total)(x)
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(sum(t.sum() for t in function(x)), x, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        outputs = function(forward_ad.make_dual(x, ones))
        made = sum(forward_ad.unpack_dual(t).tangent.sum() for t in outputs)
        torch.testing.assert_close(torch.autograd.grad(made, x)[0], expected)


@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("tangents", [(0, 2), (1, 2), (0, 1), (0, 1, 2)], ids=str)
def test_reverse_over_forward_mode_in_some_inputs(tangents, argument):
    """What backward keeps may be wrapped for a level of forward mode that has ended."""
    module, x = _made("plain")
    module.requires_grad_(False)
    inputs = [x, *(here(torch.randn(1, 3, 6, dtype=torch.double)) for _ in range(2))]

    def tangent(run, argument):
        def of(t):
            given = [t if k == argument else other for k, other in enumerate(inputs)]

            def function(*moving):
                every = list(given)
                for k, value in zip(tangents, moving, strict=True):
                    every[k] = value
                return run(*every)

            moving = [given[k] for k in tangents]
            return jvp(function, tuple(moving), tuple(map(torch.ones_like, moving)))[1]

        return of

    def plain(x, h, c):
        return reference.lstm(x, (h, c), [list(module.parameters())])[0]

    found = jacrev(tangent(lambda x, h, c: module(x, (h, c))[0], argument))(inputs[argument])
    expected = jacrev(tangent(plain, argument))(inputs[argument])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["plain", "bidirectional", "projection", "variant", "cell"])
@pytest.mark.parametrize("which", ["x", "h", "c", "weight"])
def test_a_part_of_what_was_freed(kind, which):
    """As FSDP's parameters outside of its root's forward."""
    module, x = _made(kind)
    result = module(x)
    given = dict(zip("xhc", (x, *(result if kind == "cell" else result[1])), strict=True))
    name, weight = next(iter(module.named_parameters()))
    given["weight"] = weight
    of = given[which].detach()
    freed = torch.cat([of.new_zeros(8), of.flatten()])[8:].view(of.shape)
    freed.untyped_storage().resize_(0)
    given[which] = torch.nn.Parameter(freed) if which == "weight" else freed
    module.register_parameter(name, given["weight"])
    with pytest.raises(RuntimeError):
        module(given["x"], (given["h"], given["c"]))
