"""A module with projections by the CPU's short way, forward and backward: the same bits as by the
layer's way."""

import itertools

import pytest
import torch
from device import leaf
from torch import nn

import lstm_ext
from lstm_ext import layer, plain

pytestmark = pytest.mark.cpu_only(reason="the CPU's own")
I, H, P = 6, 10, 3


class Spy:
    """Stands before plain_layer and plain_gradients: notes what they take, or refuses it all."""

    def __init__(self, monkeypatch):
        self.taken, self.back, self.refuses = [], [], False
        forward = self.before(plain.plain_layer, self.taken)
        for caller in (plain, layer):
            monkeypatch.setattr(caller, "plain_layer", forward)
        backward = self.before(plain.plain_gradients, self.back)
        monkeypatch.setattr(plain, "plain_gradients", backward)

    def before(self, function, taken):
        def run(*args, **kwargs):
            made = None if self.refuses else function(*args, **kwargs)
            if not self.refuses:
                taken.append(made is not None)
            return made

        return run


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


def flat(results):
    y, states = results
    return [y, *states]


def compare(spy, module, x, hx=None, calls=1, backward=True):
    """Outputs without gradients and with, and all gradients, of each output alone too; returns the
    first of the short way, which is taken, by backward too if so said."""
    inputs = [leaf(t) for t in (x, *(hx or ()))]
    wanted = [*inputs, *module.parameters()]

    def run():
        with torch.no_grad():
            results = flat(module(x, hx))
        outputs = flat(module(inputs[0], tuple(inputs[1:]) or None))
        torch.manual_seed(1)
        v = [torch.randn_like(t) for t in outputs]
        results += [*outputs, *torch.autograd.grad(outputs, wanted, v, retain_graph=True)]
        for output, d in zip(outputs, v, strict=True):
            results += torch.autograd.grad(output, wanted, d, retain_graph=True, allow_unused=True)
        return results

    spy.taken.clear()
    spy.back.clear()
    ours = run()
    assert spy.taken == [True] * 2 * calls
    assert spy.back == [backward] * 4 * calls
    spy.refuses = True
    theirs = run()
    spy.refuses = False
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            assert torch.equal(a, b)
    return ours[:3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first, given", list(itertools.product([False, True], repeat=2)))
def test_the_same_bits(isa, batch_first, given, bias, bidirectional, dtype, spy):
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "bias": bias}
    if dtype == torch.bfloat16 and not plain._C.cpu_bf16_products():
        pytest.skip("the short way is for processors with bfloat16")
    for T, B, h, p in ((1, 1, H, P), (1, 4, 19, 1), (5, 3, 17, 16), (2, 7, 33, 8)):
        module = lstm_ext.LSTM(I, h, proj_size=p, dtype=dtype, **options)
        x = torch.randn(*((B, T) if batch_first else (T, B)), I, dtype=dtype)
        sizes = [(1 + bidirectional, B, width) for width in (p, h)]
        hx = tuple(torch.randn(size, dtype=dtype) for size in sizes) if given else None
        odd = dtype == torch.bfloat16 and p % 2 == 1
        compare(spy, module, x, hx, backward=not (odd or bidirectional))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps, batch", [(1, 1), (1, 6), (9, 3), (40, 6)])
def test_the_same_bits_of_many_weights(steps, batch, dtype, spy):
    """By products that are torch's, too."""
    if dtype == torch.bfloat16 and not plain._C.cpu_bf16_products():
        pytest.skip("the short way is for processors with bfloat16")
    module = lstm_ext.LSTM(64, 160, proj_size=104, dtype=dtype)
    assert plain._C.cpu_dh0_is_a_product(module.weight_hh_l0.numel(), True)
    compare(spy, module, torch.randn(steps, batch, 64, dtype=dtype))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_stack_is_nn_lstms(bidirectional, spy):
    peer = nn.LSTM(I, H, 3, proj_size=P, bidirectional=bidirectional, dropout=0.5).eval()
    module = lstm_ext.LSTM.from_torch(peer)
    x = torch.randn(5, 2, I)
    sizes = [(3 * (1 + bidirectional), 2, width) for width in (P, H)]
    hx = tuple(torch.randn(size) for size in sizes)
    ours = compare(spy, module, x, hx, calls=3, backward=not bidirectional)
    for a, b in zip(ours, flat(peer(x, hx)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["x", "weight_ih_l0", "weight_hr_l0", "bias_hh_l0"])
def test_a_gradient_of_one_alone(name, spy):
    module, x = lstm_ext.LSTM(I, H, proj_size=P).requires_grad_(False), torch.randn(1, 2, I)
    assert module(x)[0].grad_fn is None
    one = x if name == "x" else getattr(module, name)
    one.requires_grad_()
    found = torch.autograd.grad(module(x)[0].sum(), one)
    assert spy.taken == [True] * 2
    assert spy.back == [name != "bias_hh_l0"]
    spy.refuses = True
    assert torch.equal(*found, *torch.autograd.grad(module(x)[0].sum(), one))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_derivatives(layers, bidirectional, spy):
    module = lstm_ext.LSTM(2, 3, layers, proj_size=2, bidirectional=bidirectional).double()
    x = leaf(torch.randn(2, 2, 2).double())
    count = layers * (1 + bidirectional)
    hx = [leaf(torch.randn(count, 2, width).double()) for width in (2, 3)]

    def run(x, h, c):
        return tuple(flat(module(x, (h, c))))

    assert torch.autograd.gradcheck(run, (x, *hx))
    assert torch.autograd.gradgradcheck(run, (x, *hx), fast_mode=True)
    assert all(spy.taken)


STATES = {
    "wide": lambda h, c: (c, c),
    "of another dtype": lambda h, c: (h.double(), c),
    "exchanged": lambda h, c: (c, h),
    "of another batch": lambda h, c: (h[:, :1], c),
}


@pytest.mark.parametrize("how", STATES)
def test_wrong_states_have_the_layers_error(how, spy):
    module, x = lstm_ext.LSTM(I, H, proj_size=P), torch.randn(4, 2, I)
    hx = STATES[how](torch.randn(1, 2, P), torch.randn(1, 2, H))
    with torch.no_grad():
        with pytest.raises((RuntimeError, ValueError)) as ours:
            module(x, hx)
        assert spy.taken == [False]
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            spy.refuses = True
            module(x, hx)
    assert str(ours.value) == str(theirs.value)


def test_a_weight_of_a_wrong_size_is_refused():
    module, x = lstm_ext.LSTM(I, H, proj_size=P), torch.randn(4, 2, I)
    module.weight_hr_l0 = nn.Parameter(torch.zeros(P, H - 1))
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight_hr"):
        module(x)
