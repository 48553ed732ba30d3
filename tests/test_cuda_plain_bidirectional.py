"""As test_cuda_plain.py, of a layer of two directions: it goes the short way too, as a module of
its own and as a layer of a stack, and gives what nn.LSTM and the layer's way give."""

import contextlib
import random

import pytest
import torch
from cases import HALF, Case, compare
from device import leaf
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

from lstm_ext.cuda import engine as cuda_engine

pytestmark = pytest.mark.usefixtures("exact_float32")


def bidirectional(*args, **kwargs):
    return lstm(*args, bidirectional=True, **kwargs)


def states(batch, layers=1, dtype=torch.float32):
    return tuple(leaf(draw(2 * layers, batch, H, dtype=dtype)) for _ in range(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("steps, batch", [(1, 1), (1, 9), (2, 1), (6, 3)])
def test_both_ways(dtype, batch_first, given, steps, batch, short, poisoned):
    module = bidirectional(I, H, batch_first=batch_first, dtype=dtype)
    x = leaf(draw(*((batch, steps) if batch_first else (steps, batch)), I, dtype=dtype))
    hx = states(batch, dtype=dtype) if given else None
    module_both_ways(short, module, x, hx, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"T": 1},
        {"T": 1, "hx": False},
        {"hx": False},
        {"hx": False, "batch_first": True},
        {"batch_first": True, "memory": "strided"},
        {"bias": False, "B": 1},
        {"I": 1, "H": 1},
        {"I": 33, "H": 64, "B": 9},
    ],
)
def test_as_nn_lstm(dtype, case, short):
    compare(Case(**{"T": 7, "B": 5, "I": 6, "H": 20, "dtype": dtype, **case}, bidirectional=True))
    assert short.forwards == [True] and short.backwards == [True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [{}, {"hx": False, "batch_first": True}, {"bias": False, "T": 1}])
def test_stacks_as_nn_lstm(dtype, case, short):
    compare(Case(**{"T": 4, "H": 20, "dtype": dtype, **case}, layers=2, bidirectional=True))
    assert short.forwards == [True] * 2 and short.backwards == [True] * 2


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("merge_mode", ["sum", "mul", "ave", None])
def test_merged(merge_mode, layers, short):
    """Outside of the layer, which goes the short way still."""
    if merge_mode is None and layers == 2:
        pytest.skip("refused")
    module = bidirectional(I, H, layers, merge_mode=merge_mode, batch_first=True)
    x, hx = leaf(draw(3, 4, I)), states(3, layers)

    def run():
        y, last = module(x, hx)
        outputs = [*(y if merge_mode is None else [y]), *last]
        return [*outputs, *gradients(outputs, [x, *hx, *module.parameters()])]

    both_ways(short, run, torch.float32)
    assert short.forwards.count(True) == layers


@EMULATOR
@pytest.mark.parametrize("arithmetic", ["tf32", "bfloat16"])
@pytest.mark.parametrize("family", cuda_engine.FAMILIES)
def test_every_family(family, arithmetic):
    torch.backends.cudnn.allow_tf32 = True
    dtype = torch.float32 if arithmetic == "tf32" else torch.bfloat16
    with installed(only(family), sm_count=16, clusters=[16, 8, 4, 2, 1]) as engine:
        engine.plain = Short(engine.plain)
        module = bidirectional(I, 64, dtype=dtype)
        x = leaf(draw(4, 9, I, dtype=dtype))

        def run():
            y, last = module(x)
            return [y, *gradients([y, *last], [x, *module.parameters()])]

        both_ways(engine.plain, run, torch.bfloat16)
        assert families_of(engine) == {family}


def subsets(count):
    """Of so many inputs, which are wanted: each alone, all but each, and some of the others."""
    yield from ([k == one for k in range(count)] for one in range(count))
    yield from ([k != one for k in range(count)] for one in range(count))
    chance = random.Random(1)
    yield from ([chance.random() < 0.5 for _ in range(count)] for _ in range(8))
    yield [False] * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps, given", [(1, True), (1, False), (4, True), (4, False)])
@pytest.mark.parametrize("layers", [1, 2])
def test_any_inputs_may_be_wanted(dtype, steps, given, layers, short):
    module = bidirectional(I, H, layers, dtype=dtype)
    hx = states(3, layers, dtype) if given else None
    tensors = [draw(steps, 3, I, dtype=dtype), *(hx or ()), *module.parameters()]
    for flags in subsets(len(tensors)):
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)
        wanted = [t for t in tensors if t.requires_grad]

        def run(wanted=wanted):
            y, (_, c_n) = module(tensors[0], hx)
            assert y.requires_grad == bool(wanted)
            return torch.autograd.grad(y.sum() + c_n.sum(), wanted) if wanted else []

        both_ways(short, run, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_dx_is_rounded_once(dtype, short):
    """The sum of both directions': as near to float64 as the layer's way, on average."""
    module = bidirectional(I, H, dtype=dtype)
    x = leaf(draw(16, 32, I, dtype=dtype))
    y, _ = module(x)
    cotangent = torch.randn_like(y)

    def dx(module, x):
        return torch.autograd.grad(module(x)[0], x, cotangent.to(x.dtype))[0]

    ours = dx(module, x)
    short.refuses = True
    theirs = dx(module, x)
    truth = dx(module.double(), leaf(x.double()))
    our_error, their_error = ((t.double() - truth).square().mean() for t in (ours, theirs))
    assert our_error <= 1.02 * their_error


def test_dx_of_more_elements_than_threads(short):
    """That round it."""
    module = bidirectional(550_000, 1, dtype=torch.bfloat16)
    x = leaf(1e-3 * draw(2, 2, 550_000, dtype=torch.bfloat16))  # gates that are not saturated
    both_ways(short, lambda: torch.autograd.grad(module(x)[0].sum(), x), torch.bfloat16)


def test_two_gradients_of_biases(short):
    """A caller may change one in place."""
    module = bidirectional(I, H)
    module(draw(3, 2, I))[0].sum().backward()
    biases = [p.grad for name, p in module.named_parameters() if name.startswith("bias")]
    for k, bias in enumerate(biases):
        before = [b.clone() for b in biases]
        bias.zero_()
        assert all(i == k or torch.equal(b, before[i]) for i, b in enumerate(biases))
        bias.copy_(before[k])


def test_outputs_share_no_memory(short):
    module, x = bidirectional(I, H), draw(1, 3, I)
    for context in (torch.no_grad(), contextlib.nullcontext()):
        with context:
            y, (h_n, c_n) = module(x)
        before = h_n.clone()
        y.detach().zero_()
        assert torch.equal(h_n, before) and not torch.equal(h_n, c_n)


def test_bits_repeat_with_or_without_gradients(short):
    module, x = bidirectional(I, H, dtype=torch.bfloat16), draw(4, 9, I, dtype=torch.bfloat16)
    with torch.no_grad():
        alone = module(x)
    y, last = module(x)
    for a, b in zip((alone[0], *alone[1]), (y, *last), strict=True):
        assert torch.equal(a, b)
    parameters = list(module.parameters())
    twice = [torch.autograd.grad(y.sum(), parameters, retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, *twice)) and short.backwards == [True] * 2


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_second_derivatives_and_batched_gradients(layers, given, steps, short):
    module = bidirectional(2, 3, layers, dtype=torch.float64, batch_first=True)
    x = leaf(draw(2, steps, 2, dtype=torch.float64))
    hx = None
    if given:
        hx = tuple(leaf(draw(2 * layers, 2, 3, dtype=torch.float64)) for _ in range(2))

    def run():
        y, (h, c) = module(x, hx)
        inputs = [x, *(hx or ())]
        first = torch.autograd.grad((y.sum() * h * c).sum(), inputs, create_graph=True)
        loss = sum(g.pow(2).sum() for g in first)
        batched = torch.autograd.functional.jacobian(lambda x: module(x, hx)[0], x, vectorize=True)
        return [batched, *torch.autograd.grad(loss, [*inputs, *module.parameters()])]

    ours = run()
    assert short.forwards.count(True) == 2 * layers
    short.refuses = True
    torch.testing.assert_close(ours, run(), **tol(torch.float64))


def test_some_gradients_by_the_layer(short):
    """Within a level of forward mode; not all inputs want one, and not all outputs have one."""
    module, x, hx = bidirectional(I, H), draw(4, 3, I), states(3)
    module.weight_hh_l0_reverse.requires_grad_(False)
    hx[1].requires_grad_(False)
    wanted = [hx[0], *(p for p in module.parameters() if p.requires_grad)]

    loss = module(x, hx)[1][1].sum()
    ours = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert short.backwards == [True]
    again = torch.autograd.grad(loss, wanted, create_graph=True)
    assert short.backwards == [True, True]
    with torch.autograd.forward_ad.dual_level():
        theirs = torch.autograd.grad(loss, wanted)
    assert short.backwards == [True, True]
    torch.testing.assert_close(ours, again, rtol=0, atol=0)
    torch.testing.assert_close(ours, theirs, **tol(torch.float32))


@pytest.mark.parametrize("given", [False, True])
def test_no_more_is_saved_than_by_the_layer(given, short):
    module, x = bidirectional(I, H), leaf(draw(4, 3, I))
    hx = states(3) if given else None

    def saved_bytes():
        memory = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            memory[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y, _ = module(x, hx)  # held, so that no address comes twice
        return y, sum(memory.values())

    _, ours = saved_bytes()
    short.refuses = True
    _, theirs = saved_bytes()
    assert short.forwards[0] and not any(short.forwards[1:])
    assert ours <= theirs
