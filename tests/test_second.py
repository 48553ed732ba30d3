"""Second derivatives on the native core, beside the reference differentiated twice by autograd."""

from __future__ import annotations

import copy
import functools
import itertools

import device
import pytest
import torch
from device import here
from second_order import (
    F32,
    F64,
    KINDS,
    Problem,
    assert_near,
    by_layer,
    by_reference,
    gradient_penalty,
    make_steps,
)
from tolerances import assert_as_good, tol
from torch import nn
from torch.func import jvp, vmap
from torch.utils.checkpoint import checkpoint

import lstm_ext

SIZES = [(6, 3, 4, 7), (5, 1, 9, 33), (1, 4, 3, 5), (9, 8, 20, 16), (23, 17, 24, 19)]


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("proj", [False, True], ids=["plain", "proj"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids="T{0[0]}-B{0[1]}-I{0[2]}-H{0[3]}".format)
def test_as_the_reference(size, kind, proj, directions, isa):
    problem, truth = _problem_and_truth(size, kind, proj, directions)
    names = [*problem.names, "dy", "dcells", *["dh_n"] * directions, *["dc_n"] * directions]
    assert_near(problem.second(by_layer), truth, names)


@functools.cache
def _problem_and_truth(size, kind, proj, directions):
    T, B, I, H = size
    problem = Problem(make_steps(kind, T, B), I, H, proj and H // 2, directions)
    return problem, problem.second(by_reference)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["whole", "lengths"])
@pytest.mark.parametrize("proj", [0, 20])
def test_threads_and_groups(threads, kind, proj, isa):
    """Gradients beside the recurrence, threads that share units, groups, directions at once."""
    torch.set_num_threads(threads)
    problem = Problem(make_steps(kind, 60, 32), 24, 48, proj, 2)
    assert_near(problem.second(by_layer), problem.second(by_reference))


@pytest.mark.parametrize("kind", ["lengths", "both", "packed"])
@pytest.mark.parametrize("proj", [0, 5], ids=["plain", "proj"])
def test_poisoned_memory(kind, proj, poisoned, isa):
    """What scratch and results hold before they are written does not matter."""
    problem = Problem(make_steps(kind, 6, 5), 4, 11, proj, 2)
    assert_near(problem.second(by_layer), problem.second(by_reference))


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["whole", "packed"])
@pytest.mark.parametrize("proj", [0, 6])
def test_other_dtypes(dtype, kind, proj, isa):
    """Half types as good as autograd on the reference in the same dtype, beside float64."""
    problem = Problem(make_steps(kind, 12, 5), 8, 13, proj, 2, dtype=dtype)
    ours, truth = problem.second(by_layer), problem.second(by_reference, dtype=F64)
    if dtype == F32:
        assert_near(ours, [t.to(F32) for t in truth])
        return
    for one, peer, true in zip(ours, problem.second(by_reference), truth, strict=True):
        assert_as_good(one, peer, true)


@pytest.mark.parametrize("bias", [True, False])
def test_every_subset_of_one(bias):
    """g of one input, differentiated by one input or cotangent; one output in the loss."""
    problem = Problem(make_steps("lengths", 5, 3), 3, 6, 4, 1, bias)
    count = len(problem.inputs)

    def check(name, **options):
        ours, truth = (problem.second(run, **options) for run in (by_layer, by_reference))
        assert_near(ours, truth, [name] * len(ours))

    for k, j in itertools.product(range(count), range(count + 4)):
        check(f"{k} by {j}", given=[k], wanted=[j])
    for used in range(4):
        check(f"output {used}", used=[used])


MEMORY = {
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t.t().contiguous().t(),
    "negated": lambda t: torch._neg_view(-t),  # lazily: its memory is that of the opposite
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("proj", [0, 4])
def test_of_tensors_that_lie_otherwise(memory, proj, isa):
    problem = Problem(make_steps("lengths", 5, 3), 3, 6, proj, 2)
    assert (MEMORY[memory](problem.v[0]) == problem.v[0]).all()
    found = problem.second(by_layer, memory=MEMORY[memory])
    assert_near(found, problem.second(by_reference))


@pytest.mark.parametrize("proj", [0, 3])
def test_autocast_around_the_second_backward_alone(proj):
    """The layer keeps its dtype, as in a first backward."""
    module = here(lstm_ext.LSTM(4, 6, proj_size=proj, num_layers=2))
    leaves = [here(torch.randn(5, 3, 4)).requires_grad_(), *module.parameters()]

    def penalty():
        first = torch.autograd.grad(module(leaves[0])[0].sum(), leaves, create_graph=True)
        return sum(g.square().sum() for g in first)

    expected, loss = torch.autograd.grad(penalty(), leaves), penalty()
    with torch.autocast(device.DEVICE.type, torch.bfloat16):
        found = torch.autograd.grad(loss, leaves)
    assert_near(found, expected)


@pytest.mark.parametrize(
    "options, way",
    [
        ({}, "core"),
        ({"num_layers": 2, "bidirectional": True}, "core"),
        ({"proj_size": 3}, "core"),
        ({"dtype": torch.float16}, "core"),
        ({"peephole": True}, "torch"),
        ({"layer_norm": True}, "torch"),
        ({"zoneout": 0.1}, "torch"),
    ],
    ids=str,
)
def test_which_way(options, way, ways):
    module = here(lstm_ext.LSTM(4, 6, **options))
    x = here(torch.randn(5, 3, 4, dtype=options.get("dtype"))).requires_grad_()
    gradient_penalty(module, x).backward()
    assert set(ways) == {way} and len(ways) == options.get("num_layers", 1)
    assert all(p.grad is not None for p in module.parameters())


def test_a_cell_goes_the_core_s_way(ways):
    cell = here(lstm_ext.LSTMCell(4, 6))
    x = here(torch.randn(3, 4)).requires_grad_()
    h, c = cell(x, cell(x))
    (g,) = torch.autograd.grad(h.sum() + c.sum(), x, create_graph=True)
    g.square().sum().backward()
    assert set(ways) == {"core"}


CELL = ("x", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


@pytest.mark.parametrize("used", ["h", "c", "both"])
@pytest.mark.parametrize("frozen", [(), *[(name,) for name in CELL], CELL[:3], CELL[3:], CELL[5:]])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=str)
def test_a_cell_as_torch_s(dtype, bias, frozen, used):
    """Each of its inputs held fixed, some of them, and not."""

    def second(cell, dtype):
        given = {name: t.to(dtype).requires_grad_(name not in frozen) for name, t in states.items()}
        for name, parameter in cell.named_parameters():
            parameter.requires_grad_(name not in frozen)
        h, c = cell(given["x"], (given["h"], given["c"]))
        outputs = {"h": [h], "c": [c], "both": [h, c]}[used]
        named = {**given, **dict(cell.named_parameters())}
        leaves = [t for t in named.values() if t.requires_grad]
        dots = [d.to(dtype).requires_grad_() for d in cotangents[: len(outputs)]]
        first = torch.autograd.grad(outputs, leaves, dots, create_graph=True)
        inner = sum((g * w.to(dtype)).sum() for g, w in zip(first, directions, strict=False))
        return torch.autograd.grad(inner, [*dots, *leaves], allow_unused=True)

    states = {"x": torch.randn(3, 4), "h": torch.randn(3, 6), "c": torch.randn(3, 6)}
    states = {name: here(t) for name, t in states.items()}
    cotangents = [here(torch.randn(3, 6)) for _ in range(2)]
    cell = here(nn.LSTMCell(4, 6, bias=bias, dtype=dtype))
    sizes = {**{k: t.shape for k, t in states.items()}}
    sizes |= {k: t.shape for k, t in cell.named_parameters()}
    directions = [here(torch.randn(size)) for name, size in sizes.items() if name not in frozen]
    states = {name: t.to(dtype) for name, t in states.items()}
    truth = second(copy.deepcopy(cell).double(), F64)
    peer = second(copy.deepcopy(cell), dtype)
    made = second(lstm_ext.LSTMCell.from_torch(cell), dtype)
    for ours, theirs, true in zip(made, peer, truth, strict=True):
        if ours is None or true is None:
            assert ours is true or not (true if ours is None else ours).any()
            continue
        assert ours.dtype == dtype
        if dtype == torch.bfloat16:
            assert_as_good(ours, theirs, true)
        else:
            torch.testing.assert_close(ours.double(), true, **tol(dtype))


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=str)
def test_a_cell_s_sums(dtype, poisoned):
    """Gradients of a sum are expanded: copies of them must live as long as they are read."""
    cell, x = here(nn.LSTMCell(3, 6, dtype=dtype)), here(torch.randn(5, 3, dtype=dtype))

    def second(cell, x):
        x = x.clone().requires_grad_()
        h, c = cell(x)
        (g,) = torch.autograd.grad(h.sum() + c.sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, *cell.parameters()])

    truth, peer = second(copy.deepcopy(cell).double(), x.double()), second(cell, x)
    made = second(lstm_ext.LSTMCell.from_torch(cell), x)
    if dtype != torch.bfloat16:
        assert_near(made, [t.to(dtype) for t in truth])
        return
    for ours, theirs, true in zip(made, peer, truth, strict=True):
        assert_as_good(ours, theirs, true)


def test_a_layer_without_inputs():
    """All that its gates have are biases."""
    cell = nn.LSTMCell(0, 3, dtype=F64)
    module, names = here(copy.deepcopy(cell)), [name for name, _ in cell.named_parameters()]

    def tangents(cell):
        def of(x, *parameters):
            named = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(cell, named, (x,))

        at = next(cell.parameters()).new_zeros(2, 0), *(p.detach() for p in cell.parameters())
        return jvp(of, at, tuple(map(torch.ones_like, at)))[1]

    expected = here(tangents(cell))  # nn.LSTMCell has it on the CPU alone
    assert expected[0].abs().max() > 0.1
    assert_near(tangents(lstm_ext.LSTMCell.from_torch(module)), expected)


def test_of_torch_func(ways):
    """grad of grad; mapped over, a call each."""
    module = here(lstm_ext.LSTM(3, 5, dtype=F64))
    twin = module.to_torch()
    x, v = here(torch.randn(4, 2, 3, dtype=F64)), here(torch.randn(6, 4, 2, 3, dtype=F64))

    def product(model):
        def of(v):
            def inner(x):
                return (torch.func.grad(lambda x: model(x)[0].square().sum())(x) * v).sum()

            return torch.func.grad(inner)(x)

        return of

    assert_near([product(module)(v[0])], [product(twin)(v[0])])
    expected = torch.stack([product(twin)(one) for one in v])
    assert_near([vmap(product(module))(v)], [expected])
    assert set(ways) == {"core"}


def test_the_third_derivative_is_torch_s(ways):
    module = here(lstm_ext.LSTM(3, 5, dtype=F64))
    x = here(torch.randn(4, 2, 3, dtype=F64)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: torch.autograd.grad(gradient_penalty(module, x), x, create_graph=True), x
    )
    assert set(ways) == {"core", "torch"}


def test_nothing_in_the_padding_reaches_a_second_derivative():
    module = here(lstm_ext.LSTM(3, 5, bidirectional=True, proj_size=2, dtype=F64))
    lengths = torch.tensor([2, 4, 0])
    x = here(torch.randn(4, 3, 3, dtype=F64))
    padding = torch.arange(4).unsqueeze(1) >= lengths

    def run(fill):
        filled = x.clone()
        filled[padding] = fill
        filled.requires_grad_()
        module.zero_grad()
        gradient_penalty(module, filled, lengths=lengths).backward()
        assert not filled.grad[padding].any()
        return [filled.grad, *(p.grad.clone() for p in module.parameters())]

    for one, other in zip(run(0.0), run(float("nan")), strict=True):
        assert torch.equal(one, other)


def test_what_was_saved_is_checked():
    """As in a first backward: another version, another size."""
    module = here(lstm_ext.LSTM(3, 5))
    x = here(torch.randn(4, 2, 3)).requires_grad_()
    penalty = gradient_penalty(module, x)
    with torch.no_grad():
        module.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()
    if device.NAME == "cpu":
        penalty = gradient_penalty(module, x)
        module.weight_hh_l0.data = torch.randn(20, 6)
        with pytest.raises(RuntimeError, match=r"Expected weight_hh of size \(20, 5\)"):
            penalty.backward()


def test_it_is_repeated_bit_by_bit():
    torch.set_num_threads(2)
    module = here(lstm_ext.LSTM(24, 48, 2, bidirectional=True))
    x = here(torch.randn(50, 16, 24)).requires_grad_()

    def run():
        return torch.autograd.grad(gradient_penalty(module, x), [x, *module.parameters()])

    for one, again in zip(run(), run(), strict=True):
        assert torch.equal(one, again)


@pytest.mark.parametrize(
    "options", [{"proj_size": 2}, {"peephole": True}, {}, {"checkpoint_every": 2}], ids=str
)
def test_a_checkpointed_penalty(options):
    """Its saved tensors may be unpacked once only."""
    module = here(lstm_ext.LSTM(3, 5, dtype=F64, **options))
    x = here(torch.randn(4, 2, 3, dtype=F64)).requires_grad_()
    expected = torch.autograd.grad(gradient_penalty(module, x), x)
    found = checkpoint(lambda x: gradient_penalty(module, x), x, use_reentrant=False)
    assert_near(torch.autograd.grad(found, x), expected)
