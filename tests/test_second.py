"""Second derivatives on the native core, beside the reference differentiated twice by autograd."""

from __future__ import annotations

import functools
import itertools

import device
import pytest
import torch
from device import here
from tolerances import assert_as_good, tol
from torch.autograd import forward_ad
from torch.func import jvp, vjp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

import lstm_ext
from lstm_ext import layer, ops
from lstm_ext.derivatives import BackwardTangents, ForwardTangents, SecondDerivative
from lstm_ext.ops import Direction, LayerWeights
from lstm_ext.steps import Steps
from lstm_ext.torch_engine import reference_layer

F64, F32 = torch.float64, torch.float32
NAMES = ("h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


def _steps(kind, T, B):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    resets = torch.rand(T, B, generator=generator) < 0.2
    on = {"device": device.DEVICE}
    if kind == "packed":
        sizes = torch.randint(1, B + 1, (T,), generator=generator).sort(descending=True).values
        sizes[0] = B
        return Steps.packed(sizes, int(sizes.sum()), **on)
    made = {
        "whole": {},
        "batch_first": {"batch_first": True},
        "lengths": {"lengths": lengths},
        "resets": {"reset_mask": resets},
        "both": {"batch_first": True, "lengths": lengths, "reset_mask": resets.T},
    }
    return Steps.padded(T, B, **made[kind], **on)


class Problem:
    """A layer's inputs, the cotangents of its outputs, and directions for both."""

    def __init__(self, steps, I, H, proj=0, directions=1, bias=True, dtype=F64):
        generator = torch.Generator().manual_seed(1)

        def draw(*size):
            drawn = torch.randn(*size, generator=generator, dtype=F64)
            if size[0] in (4 * H, P):  # weights: larger ones make errors grow from step to step
                drawn /= H**0.5
            return here(drawn.to(dtype))

        self.steps, P = steps, proj or H
        sizes = [(steps.B, P), (steps.B, H), (4 * H, I), (4 * H, P)]
        sizes += [(4 * H,), (4 * H,)] * bias
        self.names = ["x"]
        self.inputs = [draw(steps.rows, I)]
        self.bias, self.proj, self.directions = bias, proj, directions
        for k in range(directions):
            own = [name for name in NAMES if (bias or name[0] != "b") and (proj or name != "w_hr")]
            self.names += [f"{name}_{k}" for name in own]
            self.inputs += [draw(*size) for size in [*sizes, *[(P, H)] * bool(proj)]]
        outputs = [(steps.rows, directions * P), (steps.rows, directions * H)]
        outputs += [(steps.B, P)] * directions + [(steps.B, H)] * directions
        self.cotangents = [draw(*size) for size in outputs]
        self.v = [draw(*t.shape) for t in self.inputs]
        self.d_dot = [draw(*t.shape) for t in self.cotangents]

    def arranged(self, inputs):
        x, *flat = inputs
        size, directions = len(flat) // self.directions, []
        for k in range(self.directions):
            h0, c0, w_ih, w_hh, *more = flat[k * size : (k + 1) * size]
            b_ih, b_hh = (more.pop(0), more.pop(0)) if self.bias else (None, None)
            weights = LayerWeights(w_ih, w_hh, b_ih, b_hh, *more)
            directions.append(Direction(h0, c0, weights, k == 1))
        return x, directions

    def second(
        self, run, dtype=None, given=None, used=(0, 1, 2, 3, 4, 5), wanted=None, memory=None
    ):
        """Gradients of v^T g by every input and cotangent; g: gradients of the ``given`` inputs.

        used: which outputs the loss sees. wanted: indices of what is differentiated by, inputs
        and then cotangents; None: all. memory: a function that lays out a tensor otherwise.
        """
        memory = memory or (lambda tensor: tensor)

        def leaves(tensors):
            return [memory(t.detach().to(dtype or t.dtype)).requires_grad_() for t in tensors]

        inputs, cotangents = leaves(self.inputs), leaves(self.cotangents)
        result = run(*self.arranged(inputs), self.steps)
        outputs = [result.y, result.cells, *result.h_n, *result.c_n]
        pairs = [(outputs[k], cotangents[k]) for k in range(len(outputs)) if k in used]
        pairs = [(out, by) for out, by in pairs if out is not None]
        given = range(len(inputs)) if given is None else given
        first = torch.autograd.grad(
            [out for out, _ in pairs],
            [inputs[k] for k in given],
            [by for _, by in pairs],
            create_graph=True,
        )
        every = [*inputs, *cotangents]
        return torch.autograd.grad(
            first,
            every if wanted is None else [every[k] for k in wanted],
            [memory(self.v[k].to(g.dtype)) for k, g in zip(given, first, strict=True)],
            allow_unused=True,
            materialize_grads=True,
        )

    def outputs(self, run):
        """As a function of the inputs."""

        def of(*inputs):
            result = run(*self.arranged(inputs), self.steps)
            return result.y, result.cells, *result.h_n, *result.c_n

        return of

    def gradients(self, run):
        """As a function of the inputs and the cotangents."""

        def of(*tensors):
            n = len(self.inputs)
            return vjp(self.outputs(run), *tensors[:n])[1](tuple(tensors[n:]))

        return of


def _ours(x, directions, steps, cells=True):
    return layer.lstm_layer(x, directions, steps, cells=cells)


def _truth(x, directions, steps, cells=True):
    return reference_layer(x, directions, steps, cells=cells)


def _assert_near(found, expected, names=None):
    for one, true, name in zip(found, expected, names or [""] * len(found), strict=True):
        scale = max(1.0, true.abs().max().item()) if true.numel() else 1.0
        torch.testing.assert_close(
            one / scale, true / scale, **tol(one.dtype), msg=lambda m, name=name: f"{name}: {m}"
        )


SIZES = [(6, 3, 4, 7), (5, 1, 9, 33), (1, 4, 3, 5), (9, 8, 20, 16), (23, 17, 24, 19)]
KINDS = ["whole", "batch_first", "lengths", "resets", "both", "packed"]


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("proj", [False, True], ids=["plain", "proj"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids="T{0[0]}-B{0[1]}-I{0[2]}-H{0[3]}".format)
def test_as_the_reference(size, kind, proj, directions, isa):
    problem, truth = _problem_and_truth(size, kind, proj, directions)
    names = [*problem.names, "dy", "dcells", *["dh_n"] * directions, *["dc_n"] * directions]
    _assert_near(problem.second(_ours), truth, names)


@functools.cache
def _problem_and_truth(size, kind, proj, directions):
    T, B, I, H = size
    problem = Problem(_steps(kind, T, B), I, H, proj and H // 2, directions)
    return problem, problem.second(_truth)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["whole", "lengths"])
@pytest.mark.parametrize("proj", [0, 20])
def test_threads_and_groups(threads, kind, proj, isa):
    """Gradients beside the recurrence, threads that share units, groups, directions at once."""
    torch.set_num_threads(threads)
    problem = Problem(_steps(kind, 60, 32), 24, 48, proj, 2)
    _assert_near(problem.second(_ours), problem.second(_truth))


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["whole", "packed"])
@pytest.mark.parametrize("proj", [0, 6])
def test_other_dtypes(dtype, kind, proj, isa):
    """Half types as good as autograd on the reference in the same dtype, beside float64."""
    problem = Problem(_steps(kind, 12, 5), 8, 13, proj, 2, dtype=dtype)
    ours, truth = problem.second(_ours), problem.second(_truth, dtype=F64)
    if dtype == F32:
        _assert_near(ours, [t.to(F32) for t in truth])
        return
    for one, peer, true in zip(ours, problem.second(_truth), truth, strict=True):
        assert_as_good(one, peer, true)


@pytest.mark.parametrize("bias", [True, False])
def test_every_subset_of_one(bias):
    """g of one input, differentiated by one input or cotangent; one output in the loss."""
    problem = Problem(_steps("lengths", 5, 3), 3, 6, 4, 1, bias)
    count = len(problem.inputs)
    for k, j in itertools.product(range(count), range(count + 4)):
        options = {"given": [k], "wanted": [j]}
        _assert_near(
            problem.second(_ours, **options), problem.second(_truth, **options), [f"{k} {j}"]
        )
    for used in range(4):
        _assert_near(problem.second(_ours, used=[used]), problem.second(_truth, used=[used]))


MEMORY = {
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t.t().contiguous().t(),
    "negated": lambda t: torch._neg_view(-t),  # lazily: its memory is that of the opposite
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("proj", [0, 4])
def test_of_tensors_that_lie_otherwise(memory, proj, isa):
    problem = Problem(_steps("lengths", 5, 3), 3, 6, proj, 2)
    assert (MEMORY[memory](problem.v[0]) == problem.v[0]).all()
    found = problem.second(_ours, memory=MEMORY[memory])
    _assert_near(found, problem.second(_truth))


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
    _assert_near(found, expected)


@pytest.fixture
def ways(monkeypatch):
    """Which ways the second derivatives went: "core", "torch"."""
    found = []

    def noted(owner, name, way):
        function = getattr(owner, name)

        def run(*args, **kwargs):
            found.append(way)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, run if owner is ops else staticmethod(run))

    noted(ops, "layer_second", "core")
    for what in (ForwardTangents, BackwardTangents, SecondDerivative):
        noted(what, "in_torch", "torch")
    return found


def _penalty(module, x, **kwargs):
    (g,) = torch.autograd.grad(module(x, **kwargs)[0].sum(), x, create_graph=True)
    return g.square().sum()


WAY = "core" if device.NAME == "cpu" else "torch"


@pytest.mark.parametrize(
    "options, way",
    [
        ({}, WAY),
        ({"num_layers": 2, "bidirectional": True}, WAY),
        ({"proj_size": 3}, WAY),
        ({"dtype": torch.float16}, WAY),
        ({"peephole": True}, "torch"),
        ({"layer_norm": True}, "torch"),
        ({"zoneout": 0.1}, "torch"),
    ],
    ids=str,
)
def test_which_way(options, way, ways):
    module = here(lstm_ext.LSTM(4, 6, **options))
    x = here(torch.randn(5, 3, 4, dtype=options.get("dtype"))).requires_grad_()
    _penalty(module, x).backward()
    assert set(ways) == {way} and len(ways) == options.get("num_layers", 1)
    assert all(p.grad is not None for p in module.parameters())


def test_a_cell_goes_the_core_s_way(ways):
    cell = here(lstm_ext.LSTMCell(4, 6))
    x = here(torch.randn(3, 4)).requires_grad_()
    h, c = cell(x, cell(x))
    (g,) = torch.autograd.grad(h.sum() + c.sum(), x, create_graph=True)
    g.square().sum().backward()
    assert set(ways) == {WAY}


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

    _assert_near([product(module)(v[0])], [product(twin)(v[0])])
    expected = torch.stack([product(twin)(one) for one in v])
    _assert_near([vmap(product(module))(v)], [expected])
    assert set(ways) == {WAY}


def test_the_third_derivative_is_torch_s(ways):
    module = here(lstm_ext.LSTM(3, 5, dtype=F64))
    x = here(torch.randn(4, 2, 3, dtype=F64)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: torch.autograd.grad(_penalty(module, x), x, create_graph=True), x
    )
    assert set(ways) == {WAY, "torch"}


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
        _penalty(module, filled, lengths=lengths).backward()
        assert not filled.grad[padding].any()
        return [filled.grad, *(p.grad.clone() for p in module.parameters())]

    for one, other in zip(run(0.0), run(float("nan")), strict=True):
        assert torch.equal(one, other)


def test_what_was_saved_is_checked():
    """As in a first backward: another version, another size."""
    module = here(lstm_ext.LSTM(3, 5))
    x = here(torch.randn(4, 2, 3)).requires_grad_()
    penalty = _penalty(module, x)
    with torch.no_grad():
        module.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()
    if device.NAME == "cpu":
        penalty = _penalty(module, x)
        module.weight_hh_l0.data = torch.randn(20, 6)
        with pytest.raises(RuntimeError, match=r"Expected weight_hh of size \(20, 5\)"):
            penalty.backward()


def test_it_is_repeated_bit_by_bit():
    torch.set_num_threads(2)
    module = here(lstm_ext.LSTM(24, 48, 2, bidirectional=True))
    x = here(torch.randn(50, 16, 24)).requires_grad_()

    def run():
        return torch.autograd.grad(_penalty(module, x), [x, *module.parameters()])

    for one, again in zip(run(), run(), strict=True):
        assert torch.equal(one, again)


# --- forward mode ---------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("proj", [0, 5], ids=["plain", "proj"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind, proj, directions, ways):
    """Tangents of forward and of backward, along all arguments and along one alone."""
    problem = Problem(_steps(kind, 6, 3), 4, 9, proj, directions)
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
            _assert_near(tangents(_ours, chosen), tangents(_truth, chosen))
    assert "torch" not in ways and ("core" in ways) == (WAY == "core")


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
        found = mapped(_ours, function)
        calls = len(ways)
        _assert_near(found, mapped(_truth, function))
        expected = V if weights else 1  # of forward
        if function == problem.gradients:  # some of which are sums over all sequences
            expected += V
        assert calls == (expected if WAY == "core" else 0)


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

        _assert_near([jvp(torch.func.grad(loss), (x,), (v,))[1]], [torch.func.grad(product)(x)])
    assert ("core" in ways) == (WAY == "core") and ("torch" in ways) == (WAY != "core")


def test_derivatives_of_tangents():
    """In torch operations: reverse over forward, forward over forward."""
    problem = Problem(_steps("lengths", 4, 2), 3, 4, 3)
    at, v = tuple(problem.inputs), tuple(problem.v)
    u = tuple(map(torch.randn_like, at))
    results = []
    for run in (_ours, _truth):

        def tangents(*at, run=run):
            return jvp(problem.outputs(run), at, v)[1]

        found = vjp(tangents, *at)[1](tuple(problem.cotangents))
        results.append([*found, *jvp(tangents, at, u)[1]])
    _assert_near(*results)


def test_dual_tensors_that_require_a_gradient():
    """Forward over reverse without torch.func."""
    module = here(lstm_ext.LSTM(3, 5, dtype=F64))
    x, v = here(torch.randn(2, 4, 2, 3, dtype=F64))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), v)
        (g,) = torch.autograd.grad(module(dual)[0].square().sum(), dual)
        primal, tangent = forward_ad.unpack_dual(g)
    expected = jvp(torch.func.grad(lambda x: module.to_torch()(x)[0].square().sum()), (x,), (v,))
    _assert_near([primal, tangent], expected)


@pytest.mark.cpu_only(reason="elsewhere torch's operations say so in words of their own")
@pytest.mark.parametrize("name", ["x", "h_0", "weight_hh_l0"])
def test_a_tangent_of_another_dtype_is_refused(name):
    module = lstm_ext.LSTM(3, 5)
    at = {"x": torch.randn(4, 2, 3), "h_0": torch.randn(1, 2, 5), **dict(module.named_parameters())}

    def run(one):
        given = {**at, name: one}
        x, h = given.pop("x"), given.pop("h_0")
        return torch.func.functional_call(module, given, (x, (h, torch.zeros(1, 2, 5))))[0]

    with pytest.raises(TypeError, match="Expected tangents to be torch.float32 on cpu .*float64"):
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
        _assert_near(forward_ad.unpack_dual(found), expected)


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2}], ids=str)
def test_forward_mode_where_torch_func_cannot_follow(options):
    """Under hooks on saved tensors and functionalize: in torch operations."""
    module, twin = (here(lstm_ext.LSTM(3, 5, dtype=F64, **o)) for o in (options, {}))
    twin.load_state_dict(module.state_dict())
    x, v = here(torch.randn(2, 4, 2, 3, dtype=F64))

    def tangent(module):
        return lambda x: jvp(lambda x: module(x)[0], (x,), (v,))[1]

    _assert_near(*([jvp(tangent(m), (x,), (v,))[1]] for m in (module, twin)))
    if not options:
        _assert_near([torch.func.functionalize(tangent(module))(x)], [tangent(twin)(x)])
    with torch.autograd.graph.save_on_cpu(), forward_ad.dual_level():
        leaf = x.clone().requires_grad_()
        y = forward_ad.unpack_dual(module(forward_ad.make_dual(leaf, v))[0]).tangent
        (g,) = torch.autograd.grad(y.sum(), leaf)
    expected = torch.func.grad(lambda x: tangent(twin)(x).sum())(x)
    _assert_near([y, g], [tangent(twin)(x), expected])


@pytest.mark.parametrize("options", [{"proj_size": 2}, {"peephole": True}, {}], ids=str)
def test_a_checkpointed_penalty(options):
    """Its saved tensors may be unpacked once only."""
    module = here(lstm_ext.LSTM(3, 5, dtype=F64, **options))
    x = here(torch.randn(4, 2, 3, dtype=F64)).requires_grad_()
    expected = torch.autograd.grad(_penalty(module, x), x)
    found = checkpoint(lambda x: _penalty(module, x), x, use_reentrant=False)
    _assert_near(torch.autograd.grad(found, x), expected)
