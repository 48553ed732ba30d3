"""Forward mode on the native core: tangents of forward and of backward, beside the reference's."""

from __future__ import annotations

import device
import pytest
import torch
from device import here
from second_order import F64, KINDS, Problem, assert_near, by_layer, by_reference, make_steps
from torch.autograd import forward_ad
from torch.func import jvp, vjp, vmap
from torch.nn.utils.rnn import PackedSequence

import lstm_ext
from lstm_ext.steps import Steps


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("proj", [0, 5], ids=["plain", "proj"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind, proj, directions, ways):
    """Tangents of forward and of backward, along all arguments and along one alone."""
    problem = Problem(make_steps(kind, 6, 3), 4, 9, proj, directions)
    inputs, cotangents = tuple(problem.inputs), tuple(problem.cotangents)
    for function, at, along in (
        (problem.outputs, inputs, problem.v),
        (problem.gradients, inputs + cotangents, problem.v + problem.d_dot),
    ):

        def tangents(run, chosen, function=function, at=at, along=along):
            def of(*some):
                every = list(at)
                for k, tensor in zip(chosen, some, strict=True):
                    every[k] = tensor
                return function(run)(*every)

            pairs = [(at[k], along[k]) for k in chosen]
            return jvp(of, *zip(*pairs, strict=True))[1]

        for chosen in (range(len(at)), *([k] for k in range(len(at)))):
            assert_near(tangents(by_layer, chosen), tangents(by_reference, chosen))
    assert set(ways) == {"core"}


@pytest.mark.parametrize("weights", [False, True], ids=["input", "weights"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_forward_mode_mapped(batch_first, weights, ways):
    """Directions of x join the batch: one call. Those of a weight take a call each."""
    steps = Steps.padded(5, 3, batch_first=batch_first, device=device.DEVICE)
    problem, k = Problem(steps, 4, 9, 0, 2), 3 if weights else 0
    at, V = problem.inputs, 4
    along = here(torch.randn(V, *at[k].shape, dtype=F64))

    def mapped(run, function):
        def of(one):
            some = [*at[:k], one, *at[k + 1 :], *problem.cotangents]
            return function(run)(*some[: None if function == problem.gradients else len(at)])

        return vmap(lambda v: jvp(of, (at[k],), (v,))[1])(along)

    for function in (problem.outputs, problem.gradients):
        ways.clear()
        found = mapped(by_layer, function)
        calls = len(ways)
        assert_near(found, mapped(by_reference, function))
        expected = V if weights else 1  # of forward
        if function == problem.gradients:  # some of which are sums over all sequences
            expected += V
        assert calls == expected


def test_of_a_module_in_forward_mode(ways):
    """What it is given is wrapped by transforms; a product with the Hessian."""
    module = here(lstm_ext.LSTM(3, 5, 2, bidirectional=True, dtype=F64))
    x, v = here(torch.randn(2, 4, 3, 3, dtype=F64))
    sizes = torch.tensor([3, 2, 2, 1])
    for given in ({"lengths": torch.tensor([2, 4, 0])}, {"reset_mask": torch.rand(4, 3) < 0.4}, {}):

        def loss(x, given=given):
            if not given:
                y = module(PackedSequence(x.reshape(-1, 3)[:8], sizes))[0].data
            else:
                y = module(x, **given)[0]
            return y.square().sum()

        def product(x, loss=loss):
            return (torch.func.grad(loss)(x) * v).sum()

        assert_near([jvp(torch.func.grad(loss), (x,), (v,))[1]], [torch.func.grad(product)(x)])
    assert set(ways) == {"core"}


def test_derivatives_of_tangents():
    """In torch operations: reverse over forward, forward over forward."""
    problem = Problem(make_steps("lengths", 4, 2), 3, 4, 3)
    at, v = tuple(problem.inputs), tuple(problem.v)
    u = tuple(map(torch.randn_like, at))
    results = []
    for run in (by_layer, by_reference):

        def tangents(*at, run=run):
            return jvp(problem.outputs(run), at, v)[1]

        found = vjp(tangents, *at)[1](tuple(problem.cotangents))
        results.append([*found, *jvp(tangents, at, u)[1]])
    assert_near(*results)


def test_dual_tensors_that_require_a_gradient():
    """Forward over reverse without torch.func."""
    module = here(lstm_ext.LSTM(3, 5, dtype=F64))
    x, v = here(torch.randn(2, 4, 2, 3, dtype=F64))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), v)
        (g,) = torch.autograd.grad(module(dual)[0].square().sum(), dual)
        primal, tangent = forward_ad.unpack_dual(g)
    expected = jvp(torch.func.grad(lambda x: module.to_torch()(x)[0].square().sum()), (x,), (v,))
    assert_near([primal, tangent], expected)


@pytest.mark.parametrize("name", ["x", "h_0", "weight_hh_l0"])
def test_a_tangent_of_another_dtype_is_refused(name):
    module = here(lstm_ext.LSTM(3, 5))
    x, h0, c0 = here([torch.randn(4, 2, 3), torch.randn(1, 2, 5), torch.zeros(1, 2, 5)])
    at = {"x": x, "h_0": h0, **dict(module.named_parameters())}

    def run(one):
        given = {**at, name: one}
        x, h = given.pop("x"), given.pop("h_0")
        return torch.func.functional_call(module, given, (x, (h, c0)))[0]

    with pytest.raises(TypeError, match="Expected tangents to be torch.float32 on .*float64"):
        jvp(run, (at[name],), (torch.randn_like(at[name], dtype=F64),))


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"peephole": True}], ids=str)
def test_a_dual_direction_of_an_older_graph(options):
    """A second derivative is linear in v, and so is its tangent."""
    module = here(lstm_ext.LSTM(3, 5, dtype=F64, **options))
    x, v, v_dot = here(torch.randn(3, 4, 2, 3, dtype=F64))
    x.requires_grad_()
    (g,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    expected = [torch.autograd.grad(g, x, t, retain_graph=True)[0] for t in (v, v_dot)]
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(g, x, forward_ad.make_dual(v, v_dot))
        assert_near(forward_ad.unpack_dual(found), expected)


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2}], ids=str)
def test_forward_mode_where_torch_func_cannot_follow(options):
    """Under hooks on saved tensors and functionalize: in torch operations."""
    module, twin = (here(lstm_ext.LSTM(3, 5, dtype=F64, **o)) for o in (options, {}))
    twin.load_state_dict(module.state_dict())
    x, v = here(torch.randn(2, 4, 2, 3, dtype=F64))

    def tangent(module):
        return lambda x: jvp(lambda x: module(x)[0], (x,), (v,))[1]

    assert_near(*([jvp(tangent(m), (x,), (v,))[1]] for m in (module, twin)))
    if not options:
        assert_near([torch.func.functionalize(tangent(module))(x)], [tangent(twin)(x)])
    with torch.autograd.graph.save_on_cpu(), forward_ad.dual_level():
        leaf = x.clone().requires_grad_()
        y = forward_ad.unpack_dual(module(forward_ad.make_dual(leaf, v))[0]).tangent
        (g,) = torch.autograd.grad(y.sum(), leaf)
    expected = torch.func.grad(lambda x: tangent(twin)(x).sum())(x)
    assert_near([y, g], [tangent(twin)(x), expected])
