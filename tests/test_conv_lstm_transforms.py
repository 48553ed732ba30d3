"""What surrounds a ConvLSTM: derivatives, torch.func, a graph, autocast, checkpoints; and how its
weights lie for oneDNN."""

import pytest
import torch
from device import here, leaf
from test_conv_lstm import F64, IN, SEQUENCES, SIZES, C, L, N, _close, _near
from tolerances import tol

import lstm_ext
from lstm_ext import conv_planes, convolutions
from lstm_ext.convolutions import Convolution
from lstm_ext.cpu import conv as cpu_conv


def test_third_derivative():
    module = here(SEQUENCES[1](1, 2, 3, **F64))
    x = leaf(torch.randn(2, 1, 1, 3, **F64))

    def second(x):
        first = torch.autograd.grad(module(x)[0].pow(2).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, [x])


def test_transforms():
    module = here(SEQUENCES[2](IN, C, 3, peephole=True, **F64))
    parameters = dict(module.named_parameters())
    x, v = (here(torch.randn(L, N, IN, 4, 4, **F64)) for _ in range(2))

    def run(p, x):
        return torch.func.functional_call(module, p, (x,))[0]

    # Per-sequence gradients: vmap over grad.
    each = torch.func.vmap(
        torch.func.grad(lambda p, x: run(p, x.unsqueeze(1)).pow(2).sum()), in_dims=(None, 1)
    )(parameters, x)
    whole = torch.autograd.grad(run(parameters, x).pow(2).sum(), list(parameters.values()))
    for name, gradient in zip(parameters, whole, strict=True):
        _close(each[name].sum(0), gradient)
    _, tangent = torch.func.jvp(lambda x: run(parameters, x), (x,), (v,))
    step = 1e-6
    numeric = (run(parameters, x + step * v) - run(parameters, x - step * v)) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compile_as_one_graph(dtype):
    module = here(SEQUENCES[2](IN, C, 3, 2, dtype=dtype))
    x = leaf(torch.randn(3, N, IN, 4, 4, dtype=dtype))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for function in (module, compiled):
        y, _ = function(x, lengths=None)
        results.append([y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])])
    for got, want in zip(*results, strict=True):
        _near(got, want)


@pytest.mark.cpu_only(reason="oneDNN's layouts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [3, 2])
@pytest.mark.parametrize("dims", SEQUENCES)
def test_a_weight_laid_out_for_all_steps(dims, kernel, dtype, monkeypatch):
    """As is done for many channels only."""
    monkeypatch.setattr(conv_planes, "_pays", lambda _: False)
    monkeypatch.setattr(cpu_conv.Call, "is_few_products", lambda *_: False)
    module = SEQUENCES[dims](IN, C, kernel, dtype=dtype)
    x = torch.randn(L, N, IN, *SIZES[dims], dtype=dtype).requires_grad_()
    kinds, results = [], []
    many = Convolution.many
    monkeypatch.setattr(Convolution, "many", lambda *args: kinds.append(many(*args)) or kinds[-1])
    for least in (10**9, 0):
        monkeypatch.setattr(convolutions, "_LARGE", least)
        y, _ = module(x)
        results.append([y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])])
    assert [isinstance(kind, Convolution) for kind in kinds] == [True, False]
    for got, want in zip(*results, strict=True):
        _near(got, want)


@pytest.mark.cpu_only(reason="CPU autocast")
def test_autocast():
    module = SEQUENCES[2](IN, C, 3, 2)
    x = torch.randn(L, N, IN, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, (h, c) = module(x)
    half = SEQUENCES[2](IN, C, 3, 2, dtype=torch.bfloat16)
    half.load_state_dict(module.state_dict())
    expected, states = half(x.bfloat16())
    for got, want in ((y, expected), (h, states[0]), (c, states[1])):
        assert got.dtype == torch.bfloat16 and torch.equal(got, want)
    y.float().sum().backward()
    assert module.weight_ih_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_ensemble(dims):
    members = [here(SEQUENCES[dims](IN, C, 3, peephole=True, **F64)) for _ in range(3)]
    x = here(torch.randn(2, N, IN, *[4] * dims, **F64))
    stacked, _ = torch.func.stack_module_state(members)
    y = torch.func.vmap(lambda p: torch.func.functional_call(members[0], p, (x,))[0])(stacked)
    for found, member in zip(y, members, strict=True):
        torch.testing.assert_close(found, member(x)[0], **tol(torch.float64))


def test_a_jacobian_by_torchs_own_vmap():
    module = here(lstm_ext.ConvLSTM1d(IN, C, 3, **F64))
    x = here(torch.randn(2, 1, IN, 4, **F64))
    found, expected = (
        torch.autograd.functional.jacobian(lambda x: module(x)[0], x, vectorize=vectorize)
        for vectorize in (True, False)
    )
    torch.testing.assert_close(found, expected, **tol(torch.float64))


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(reentrant):
    """Which lets backward read each saved tensor once."""
    module = here(lstm_ext.ConvLSTM2d(IN, C, 3, peephole=True, **F64))
    x = leaf(torch.randn(L, N, IN, 5, 5, **F64))
    inputs = [x, *module.parameters()]

    def gradients(y):
        y.square().sum().backward()
        made = [t.grad for t in inputs]
        for t in inputs:
            t.grad = None
        return made

    inside = torch.utils.checkpoint.checkpoint(lambda x: module(x)[0], x, use_reentrant=reentrant)
    for found, expected in zip(gradients(inside), gradients(module(x)[0]), strict=True):
        torch.testing.assert_close(found, expected, **tol(torch.float64))


def test_no_steps_have_a_place_in_the_graph():
    module, x = here(lstm_ext.ConvLSTM2d(IN, C, 3)), leaf(torch.randn(0, N, IN, 5, 5))
    y, _ = module(x)
    y.sum().backward()
    assert x.grad.shape == x.shape and not module.weight_ih_l0.grad.any()
