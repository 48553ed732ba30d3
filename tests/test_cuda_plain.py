"""The short way of a plain layer or cell on the CUDA engine, emulated unless there is a GPU: that
it gives what the layer's way gives. When it is taken: test_cuda_plain_calls.py."""

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import Case, compare
from device import here, leaf
from emulated import families_of, installed, only
from short_way import (
    DTYPES,
    EMULATOR,
    H,
    I,
    Short,
    both_ways,
    draw,
    gradients,
    lstm,
    module_both_ways,
)
from tolerances import tol

import lstm_ext
from lstm_ext.cuda import engine as cuda_engine

pytestmark = pytest.mark.usefixtures("exact_float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("steps, batch", [(1, 1), (1, 9), (2, 1), (6, 3), (3, 17)])
def test_both_ways(dtype, batch_first, given, steps, batch, short, poisoned):
    module = lstm(I, H, batch_first=batch_first, dtype=dtype)
    x = leaf(draw(*((batch, steps) if batch_first else (steps, batch)), I, dtype=dtype))
    hx = tuple(leaf(draw(1, batch, H, dtype=dtype)) for _ in range(2)) if given else None
    module_both_ways(short, module, x, hx, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [{}, {"batch_first": True, "hx": False}, {"bias": False}])
@pytest.mark.parametrize("memory", ["contiguous", "strided"])
def test_as_nn_lstm(dtype, case, memory, short):
    compare(Case(T=7, B=5, I=6, H=20, dtype=dtype, memory=memory, **case))
    assert short.forwards == [True] and short.backwards == [True]


@EMULATOR
@pytest.mark.parametrize("arithmetic", ["tf32", "bfloat16"])
@pytest.mark.parametrize("family", cuda_engine.FAMILIES)
def test_every_family(family, arithmetic):
    torch.backends.cudnn.allow_tf32 = True
    dtype = torch.float32 if arithmetic == "tf32" else torch.bfloat16
    with installed(only(family), sm_count=8) as engine:
        engine.plain = Short(engine.plain)
        module = lstm(I, 64, dtype=dtype)
        x = leaf(draw(4, 9, I, dtype=dtype))

        def run():
            y, states = module(x)
            return [y, *gradients([y, *states], [x, *module.parameters()])]

        both_ways(engine.plain, run, torch.bfloat16)
        assert families_of(engine) == {family}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps, batch_first", [(1, False), (4, False), (4, True)])
@pytest.mark.parametrize("bias", [False, True])
def test_any_inputs_may_be_wanted(dtype, steps, batch_first, bias, short):
    module = lstm(I, H, bias=bias, batch_first=batch_first, dtype=dtype)
    x = draw(*((3, steps) if batch_first else (steps, 3)), I, dtype=dtype)
    tensors = [x, *(draw(1, 3, H, dtype=dtype) for _ in range(2)), *module.parameters()]
    for flags in itertools.product([False, True], repeat=len(tensors)):
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)
        wanted = [t for t in tensors if t.requires_grad]

        def run(wanted=wanted):
            y, (_, c_n) = module(x, tuple(tensors[1:3]))
            assert y.requires_grad == bool(wanted)
            return torch.autograd.grad(y.sum() + c_n.sum(), wanted) if wanted else []

        both_ways(short, run, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("batch", [1, 9])
def test_a_cell(dtype, given, batch, short, poisoned):
    module = here(lstm_ext.LSTMCell(I, H, dtype=dtype))
    x, *hx = (leaf(draw(batch, n, dtype=dtype)) for n in (I, H, H))
    hx = tuple(hx) if given else None

    def run():
        states = module(x, hx)
        with torch.no_grad():
            alone = module(x, hx)
        return [*states, *alone, *gradients(states, [x, *(hx or ()), *module.parameters()])]

    both_ways(short, run, dtype)


def test_a_layer_of_a_stack(short):
    module, x = lstm(I, H, num_layers=2), leaf(draw(4, 3, I))

    def run():
        y, states = module(x)
        return [y, *states, *gradients([y, *states], [x, *module.parameters()])]

    both_ways(short, run, torch.float32)


def test_two_gradients_of_biases(short):
    """A caller may change one in place."""
    module = lstm(I, H)
    module(draw(3, 2, I))[0].sum().backward()
    before = module.bias_ih_l0.grad.clone()
    module.bias_hh_l0.grad.zero_()
    assert torch.equal(module.bias_ih_l0.grad, before)


def test_outputs_share_no_memory(short):
    module, x = lstm(I, H), draw(4, 3, I)
    for context in (torch.no_grad(), contextlib.nullcontext()):
        with context:
            y, (h_n, c_n) = module(x)
        last = y[-1:].clone()
        y.detach().zero_()
        assert torch.equal(h_n, last) and not torch.equal(c_n, last)


def test_bits_repeat_with_or_without_gradients(short):
    module, x = lstm(I, H, dtype=torch.bfloat16), draw(4, 9, I, dtype=torch.bfloat16)
    with torch.no_grad():
        alone = module(x)
    recorded = module(x)
    for a, b in zip((alone[0], *alone[1]), (recorded[0], *recorded[1]), strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_and_batched_gradients(short):
    module = lstm(2, 3, dtype=torch.float64, batch_first=True)
    x = leaf(draw(2, 4, 2, dtype=torch.float64))
    for given in (False, True):
        hx = tuple(leaf(draw(1, 2, 3, dtype=torch.float64)) for _ in range(2))
        hx = hx if given else None

        def run(hx=hx):
            y, (h, c) = module(x, hx)
            inputs = [x, *(hx or ())]
            first = torch.autograd.grad((y.sum() * h * c).sum(), inputs, create_graph=True)
            loss = sum(g.pow(2).sum() for g in first)
            batched = torch.autograd.functional.jacobian(
                lambda x: module(x, hx)[0], x, vectorize=True
            )
            return [batched, *torch.autograd.grad(loss, [*inputs, *module.parameters()])]

        ours = run()
        assert short.forwards.count(True) == 2
        short.refuses = True
        torch.testing.assert_close(ours, run(), **tol(torch.float64))
        short.refuses = False
        short.forwards.clear()


def test_by_several_threads(short):
    modules = [lstm(I, H, dtype=torch.float64) for _ in range(4)]
    xs = [draw(3, 2 + k % 3, I, dtype=torch.float64) for k in range(16)]

    def run(k):
        torch.set_num_threads(1)
        x = xs[k].clone().requires_grad_()
        y, _ = modules[k % 4](x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), x)]

    alone = [run(k) for k in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(16)))
    for ours, theirs in zip(together, alone, strict=True):
        assert all(map(torch.equal, ours, theirs))
