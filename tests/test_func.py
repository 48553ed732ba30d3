"""torch.func: vmap, grad, jvp, jacobians and hessians, beside the reference and nn.LSTM."""

import device
import pytest
import torch
from device import here
from torch.autograd import functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close
from variants import EVERYTHING

import lstm_ext
from lstm_ext.autograd import LSTMLayer

V, T, B, I, H = 4, 3, 2, 3, 4
F64 = {"dtype": torch.float64}
MODULES = {
    "plain": {},
    "layers": {"num_layers": 2, "bidirectional": True},
    "batch_first": {"batch_first": True},
    "projection": {"proj_size": 2, "bias": False},
    "variants": {"layer_norm": True, "peephole": True, "zoneout": 0.3, "bidirectional": True},
    "cells": {"return_cell_sequence": True},
    "parts": {"checkpoint_every": 2, "bidirectional": True, "return_cell_sequence": True},
    "parts_of_variants": {"checkpoint_every": 1, "peephole": True, "zoneout": 0.3},
}


@pytest.fixture(params=MODULES)
def case(request):
    """A module, its parameters detached, and the loss and the output as functions of both."""
    module = here(lstm_ext.LSTM(I, H, **MODULES[request.param], **F64)).eval()
    return Case(module)


class Case:
    def __init__(self, module):
        self.module = module
        self.parameters = {k: p.detach() for k, p in module.named_parameters()}

    def outputs(self, parameters, x, *args, **kwargs):
        output, states, *cells = functional_call(self.module, parameters, (x, *args), kwargs)
        return (output, *states, *cells)

    def loss(self, *args, **kwargs):
        parts = self.outputs(*args, **kwargs)
        return sum((part * (k + 1)).pow(2).sum() for k, part in enumerate(parts))

    def of(self, function):
        """The function with the parameters as they are."""
        return lambda *args, **kwargs: function(self.parameters, *args, **kwargs)


def inputs(*sizes):
    return here(torch.randn(*sizes, T, B, I, **F64))


def each(function, *arguments):
    """What vmap should give: a call for each, stacked."""
    results = [function(*values) for values in zip(*arguments, strict=True)]
    if isinstance(results[0], dict):
        return {k: torch.stack([r[k] for r in results]) for k in results[0]}
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return torch.stack(results)


def plain_grad(function, parameters, *args):
    """The gradient of all parameters, without torch.func."""
    leaves = {k: p.clone().requires_grad_() for k, p in parameters.items()}
    made = torch.autograd.grad(function(leaves, *args), list(leaves.values()))
    return dict(zip(leaves, made, strict=True))


# --- vmap -----------------------------------------------------------------------------------------


def test_vmap_over_inputs(case):
    xs, run = inputs(V), case.of(case.outputs)
    assert_close(vmap(run)(xs), each(run, xs))
    moved = vmap(run, in_dims=2, out_dims=1)(xs.movedim(0, 2))
    assert_close(tuple(part.movedim(1, 0) for part in moved), each(run, xs))
    nested = vmap(vmap(run))(xs.unflatten(0, (2, 2)))
    assert_close(tuple(part.flatten(0, 1) for part in nested), each(run, xs))


def test_vmap_is_one_call(monkeypatch):
    """The mapped dimension joins the batch."""
    module = here(lstm_ext.LSTM(I, H, **F64)).requires_grad_(False)
    batches = []
    run = LSTMLayer.forward

    def spy(steps, *args, **kwargs):
        batches.append(steps.B)
        return run(steps, *args, **kwargs)

    monkeypatch.setattr(LSTMLayer, "forward", staticmethod(spy))
    vmap(lambda x: module(x)[0])(inputs(V))
    assert batches == [V * B]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("place", device.PLACES)
def test_vmap_over_lengths_and_resets(batch_first, place):
    case = Case(here(lstm_ext.LSTM(I, H, 2, bidirectional=True, batch_first=batch_first, **F64)))
    xs = inputs(V).transpose(1, 2) if batch_first else inputs(V)
    lengths = torch.tensor([[1, 3], [0, 2], [3, 3], [2, 1]], device=place)
    resets = (torch.rand(xs.shape[:3]) < 0.4).to(place)

    def run(x, lengths, resets):
        return case.of(case.outputs)(x, lengths=lengths, reset_mask=resets)

    assert_close(vmap(run)(xs, lengths, resets), each(run, xs, lengths, resets))
    shared = (None, 0, None)
    assert_close(
        vmap(run, in_dims=shared)(xs[0], lengths, resets[0]),
        each(lambda lengths: run(xs[0], lengths, resets[0]), lengths),
    )
    slopes = grad(lambda x, *args: sum(part.sum() for part in run(x, *args)))
    assert_close(vmap(slopes)(xs, lengths, resets), each(slopes, xs, lengths, resets))
    if place == "cpu":
        with pytest.raises(ValueError, match="got values from 1 to 4"):
            vmap(run)(xs, lengths.clamp(min=1) + (lengths == 3), resets)


def test_vmap_of_one_sequence_of_a_length():
    """The length, repeated, is one number in memory."""
    module, x = here(lstm_ext.LSTM(I, H, **F64)), here(torch.randn(6, 5, 1, I, **F64))
    run = lambda x: module(x, lengths=torch.tensor([2]))[0]  # noqa: E731
    assert_close(vmap(run)(x), each(run, x))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_over_resets_of_any_dimension(dim):
    """A call each, for weights or second derivatives: of masks that are strided."""
    module = here(lstm_ext.LSTM(I, H, **F64))
    x, resets = here(torch.randn(4, T, B, I, **F64)), here(torch.rand(4, T, B) < 0.4)
    weights = here(torch.randn(4, 4 * H, I, **F64))

    def run(x, reset_mask, weight):
        given = (x,), {"reset_mask": reset_mask}
        return functional_call(module, {"weight_ih_l0": weight}, *given)[0]

    def second(x, *args):
        first = grad(lambda x: run(x, *args).square().sum())
        return grad(lambda x: first(x).square().sum())(x)

    strided = resets.movedim(0, dim).contiguous()
    for function in (run, second):
        found = vmap(function, (0, dim, 0))(x, strided, weights)
        assert_close(found, each(function, x, resets, weights))


def test_vmap_over_packed_data(case):
    """The batch sizes are shared."""
    data, sizes = here(torch.randn(V, 5, I, **F64)), torch.tensor([2, 2, 1])

    def run(data):
        packed = PackedSequence(data, sizes)
        output, states, *_ = functional_call(case.module, case.parameters, (packed,))
        return (output.data, *states)

    assert_close(vmap(run)(data), each(run, data))
    slopes = grad(lambda data: sum(part.pow(2).sum() for part in run(data)))
    assert_close(vmap(slopes)(data), each(slopes, data))


def test_vmap_over_states(case):
    x = inputs()
    shapes = [part.shape for part in case.of(case.outputs)(x)[1:3]]
    h, c = (here(torch.randn(V, *shape, **F64)) for shape in shapes)
    run = lambda h, c: case.of(case.outputs)(x, (h, c))  # noqa: E731
    assert_close(vmap(run)(h, c), each(run, h, c))
    assert_close(vmap(run, in_dims=(0, None))(h, c[0]), each(lambda h: run(h, c[0]), h))


def test_vmap_over_stacked_parameters(case):
    """An ensemble, on one batch and on a batch each, and its gradients."""
    stacked = {k: torch.stack([p, p / 2, -p, p.flip(0)]) for k, p in case.parameters.items()}
    members = [{k: p[v] for k, p in stacked.items()} for v in range(V)]
    xs = inputs(V)
    expected = each(lambda p: case.outputs(p, xs[0]), members)
    assert_close(vmap(case.outputs, in_dims=(0, None))(stacked, xs[0]), expected)
    assert_close(vmap(case.outputs)(stacked, xs), each(case.outputs, members, xs))
    expected = each(lambda p, x: plain_grad(case.loss, p, x), members, xs)
    assert_close(vmap(grad(case.loss))(stacked, xs), expected)


def test_vmap_of_cells():
    cell = here(lstm_ext.LSTMCell(I, H, **F64)).requires_grad_(False)
    xs, h = here(torch.randn(V, B, I, **F64)), here(torch.randn(V, B, H, **F64))
    run = lambda x, h: cell(x, cell(x, (h, h)))  # noqa: E731
    assert_close(vmap(run)(xs, h), each(run, xs, h))


def test_masks_drawn_under_vmap():
    """One mask a sample or the same for all, as vmap was told; none without a word."""
    module = here(lstm_ext.LSTM(I, H, **EVERYTHING, **F64)).requires_grad_(False)
    x = inputs().expand(V, -1, -1, -1)
    run = lambda x: module(x)[0]  # noqa: E731
    different = vmap(run, randomness="different")(x)
    assert all(not torch.equal(different[0], y) for y in different[1:])
    same = vmap(run, randomness="same")(x)
    assert all(torch.equal(same[0], y) for y in same[1:])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(run)(x)


# --- derivatives ----------------------------------------------------------------------------------


def test_grad(case):
    x = inputs()
    assert_close(grad(case.loss)(case.parameters, x), plain_grad(case.loss, case.parameters, x))


def test_per_sample_gradients(case):
    xs = inputs(V)
    expected = each(lambda x: plain_grad(case.loss, case.parameters, x), xs)
    assert_close(vmap(grad(case.loss), in_dims=(None, 0))(case.parameters, xs), expected)
    total = grad(lambda p: vmap(case.loss, in_dims=(None, 0))(p, xs).sum())(case.parameters)
    assert_close(total, {k: g.sum(0) for k, g in expected.items()})


def test_jvp(case):
    """Beside the derivative of the vjp: torch's own double-backward trick."""
    x, v = inputs(), inputs()
    for function, at, along in (
        (case.of(case.outputs), x, v),
        (lambda p: case.outputs({**case.parameters, **p}, x), *weight(case)),
    ):
        values, tangents = jvp(function, (at,), (along,))
        assert_close(values, function(at))
        leaves, structure = torch.utils._pytree.tree_flatten(at)
        directions = torch.utils._pytree.tree_leaves(along)
        flat = lambda *ts, f=function, s=structure: f(s.unflatten(ts))  # noqa: E731
        assert_close(tangents, functional.jvp(flat, tuple(leaves), tuple(directions))[1])


def weight(case):
    name = "weight_hh_l0"
    value = case.parameters[name]
    return {name: value}, {name: torch.randn_like(value)}


def test_linearize(case):
    x, v, run = inputs(), inputs(), case.of(case.outputs)
    outputs, along = linearize(run, x)
    values, tangents = jvp(run, (x,), (v,))
    assert_close(outputs, values)
    assert_close(along(v), tangents)


@pytest.mark.parametrize("kwargs", [{}, {"zoneout": 0.4}], ids=str)
@pytest.mark.parametrize("given", ["nothing", "lengths", "reset_mask", "packed"])
def test_pulled_back_after_vjp_returned(given, kwargs):
    """What is no argument of the function is wrapped by vjp too; lengths may change meanwhile."""
    module = here(lstm_ext.LSTM(I, H, 2, bidirectional=True, **kwargs, **F64))
    module.requires_grad_(False)
    given_tensor = {
        "lengths": torch.tensor([1, 3]),
        "reset_mask": torch.tensor([[False, True], [True, False], [False, False]]),
    }.get(given)
    sizes = torch.tensor([2, 2, 1])

    def run(x, given_tensor=given_tensor):
        torch.manual_seed(4)
        if given == "packed":
            return module(PackedSequence(x.reshape(-1, I)[:5], sizes))[0].data
        return module(x, **({} if given_tensor is None else {given: given_tensor}))[0]

    x = inputs().requires_grad_()
    y = run(x, None if given_tensor is None else given_tensor.clone())
    g = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, g)
    _, pull = vjp(run, x.detach())
    if given_tensor is not None:
        given_tensor.fill_(0)
    assert_close(pull(g), (expected,))
    (made,) = vmap(pull)(g.expand(V, *g.shape))
    assert_close(made, expected.expand(V, *expected.shape))
    (made,) = pull(g.requires_grad_())  # with a graph of its own
    (linear,) = torch.autograd.grad(made, g, expected)
    assert_close((linear * g).sum(), expected.square().sum())


def test_forward_mode_of_dual_tensors():
    case = Case(here(lstm_ext.LSTM(I, H, 2, **F64)))
    run, x, v = case.of(case.outputs), inputs(), inputs()
    with torch.autograd.forward_ad.dual_level():
        outputs = run(torch.autograd.forward_ad.make_dual(x, v))
        tangents = tuple(torch.autograd.forward_ad.unpack_dual(o).tangent for o in outputs)
        assert all(
            torch.autograd.forward_ad.unpack_dual(o).tangent is None for o in case.of(run_plain)(x)
        )
    assert_close(tangents, functional.jvp(run, x, v)[1])


def run_plain(parameters, x):
    return lstm_ext.LSTM(I, H, 2, **F64).to(x.device)(x)[:1]


@pytest.mark.parametrize("options", [{}, {"peephole": True}], ids=str)
def test_a_dual_gradient_is_not_dropped(options):
    """Forward ran before the level: backward, linear in it, is made of its tangent as well."""
    module = here(lstm_ext.LSTM(I, H, **options, **F64))
    x = inputs().requires_grad_()
    y = module(x)[0]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 3))
        (gradient,) = torch.autograd.grad(y, x, dual)
        primal, tangent = torch.autograd.forward_ad.unpack_dual(gradient)
    assert primal.abs().sum() > 0
    assert_close(tangent, 3 * primal)


def test_jacobians_and_hessians(case):
    x, run, loss = inputs(), case.of(case.outputs), case.of(case.loss)
    jacobian = functional.jacobian(run, x)
    assert_close(jacrev(run)(x), jacobian)
    assert_close(jacfwd(run)(x), jacobian)
    assert_close(functional.jacobian(run, x, vectorize=True), jacobian)
    expected = functional.hessian(loss, x)
    for second in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))):
        assert_close(second(loss)(x), expected)
    assert_close(functional.hessian(loss, x, vectorize=True), expected)
    forward = {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}
    assert_close(functional.hessian(loss, x, **forward), expected)


def test_jacobian_and_hessian_of_weights(case):
    x = inputs()
    point, v = weight(case)
    run = lambda p: case.outputs({**case.parameters, **p}, x)  # noqa: E731
    loss = lambda p: case.loss({**case.parameters, **p}, x)  # noqa: E731
    name, value = next(iter(point.items()))
    expected = functional.jacobian(lambda w: run({name: w}), value)
    assert_close(tuple(j[name] for j in jacrev(run)(point)), expected)
    product = grad(lambda p: (grad(loss)(p)[name] * v[name]).sum())(point)[name]
    assert_close(product, functional.hvp(lambda w: loss({name: w}), value, v[name])[1])
    _, along = jvp(grad(loss), (point,), (v,))
    assert_close(along[name], product)
    _, pull = vjp(grad(loss), point)
    assert_close(pull(v)[0][name], product)


def test_batched_gradients(case):
    """torch.autograd.grad's own vmap, with and without a graph."""
    x = inputs().requires_grad_()
    y = case.of(case.outputs)(x)[0]
    gs = torch.randn(V, *y.shape, **F64).to(y)
    expected = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in gs])
    for create_graph in (False, True):
        options = {"is_grads_batched": True, "retain_graph": True, "create_graph": create_graph}
        (made,) = torch.autograd.grad(y, x, gs, **options)
        assert_close(made.detach(), expected)
    (second,) = torch.autograd.grad(made.pow(2).sum(), x)
    assert second.isfinite().all() and second.abs().max() > 0


def test_functionalized_and_then_the_same():
    module = here(lstm_ext.LSTM(I, H, **F64)).requires_grad_(False)
    x = inputs()
    assert_close(torch.func.functionalize(lambda x: module(x)[0])(x), module(x)[0])


def test_a_jacobian_of_nothing_is_refused():
    module = here(lstm_ext.LSTM(I, H, **F64)).requires_grad_(False)
    with pytest.raises(ValueError, match="to map over, got 0"):
        jacrev(lambda x: module(x)[0])(here(torch.randn(0, B, I, **F64)))
