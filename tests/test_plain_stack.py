"""A stack of plain layers by the short way of each: that it gives what the layer's way gives."""

import itertools

import device
import pytest
import torch
from device import here, leaf
from short_way import CLOSE, DTYPES, gradients

import lstm_ext
from lstm_ext import plain, plain_module

pytestmark = pytest.mark.usefixtures("exact_float32")
I, H = 6, 10


class Stacks:
    """Stands before plain_stack: counts what it takes, or refuses it all."""

    def __init__(self):
        self.plain_stack = plain_module.plain_stack
        self.taken, self.refuses = [], False

    def __call__(self, *args):
        made = None if self.refuses else self.plain_stack(*args)
        self.taken.append(made is not None)
        return made


@pytest.fixture
def stacks(monkeypatch):
    spy = Stacks()
    monkeypatch.setattr(plain_module, "plain_stack", spy)
    return spy


def stack(*, layers=2, T=4, B=3, given=True, dtype=torch.float32, **options):
    """A module, x and hx."""
    module = here(lstm_ext.LSTM(I, H, layers, dtype=dtype, **options))
    count = layers * (2 if module.bidirectional else 1)
    x = here(torch.randn(*((B, T) if module.batch_first else (T, B)), I, dtype=dtype))
    hx = [leaf(here(torch.randn(count, B, H, dtype=dtype))) for _ in range(2)] if given else None
    return module, leaf(x), hx


def run(module, x, hx):
    torch.manual_seed(3)  # of dropout
    y, states = module(x, hx)
    drawn = torch.rand(())
    with torch.no_grad():
        alone = module(x, hx)
    inputs = [x, *(hx or ()), *module.parameters()]
    return [y, *states, drawn, alone[0], *alone[1], *gradients([y, *states], inputs)]


def compare(stacks, module, x, hx):
    """The short way, which is taken, and the layers'."""
    stacks.refuses = False
    stacks.taken.clear()
    ours = run(module, x, hx)
    assert stacks.taken == [True, True]
    stacks.refuses = True
    theirs = run(module, x, hx)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        limit = CLOSE[x.dtype] * b.abs().max().item() if plain.takes_more(x) else 0
        torch.testing.assert_close(a, b, rtol=0, atol=limit)


def skip_unless_taken(dtype):
    """On the CPU, what does not depend on a layer's width."""
    if not plain.takes_more(here(torch.zeros(1))) and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("the CPU has no short way for this")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first, given", list(itertools.product([False, True], repeat=2)))
def test_both_ways(batch_first, given, bidirectional, layers, dtype, stacks):
    skip_unless_taken(dtype)
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "dtype": dtype}
    compare(stacks, *stack(layers=layers, given=given, **options))


@pytest.mark.parametrize("T, B", [(1, 1), (1, 2), (5, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows(T, B, bias, stacks):
    compare(stacks, *stack(T=T, B=B, bias=bias))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout(p, batch_first, stacks):
    """The same is dropped, and as many numbers are drawn."""
    module, x, hx = stack(layers=3, batch_first=batch_first, dropout=p)
    compare(stacks, module, x, hx)
    module.eval()
    compare(stacks, module, x, hx)


@pytest.mark.cpu_only(reason="the CPU's own")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_go_the_layers_way(dtype, stacks):
    run(*stack(dtype=dtype, dropout=0.5))
    assert not any(stacks.taken)


STATES = {
    "a layer's": lambda h, c: (h[:1], c[:1]),
    "one": lambda h, c: (h,),
    "none of them": lambda h, c: (None, None),
    "unbatched": lambda h, c: (h[:, 0], c[:, 0]),
    "too wide": lambda h, c: (torch.cat([h, h], 2), c),
    "of another dtype": lambda h, c: (h.double(), c),
    "on another device": lambda h, c: (h.to("meta"), c),
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_are_refused(name, stacks):
    """With the layers' errors."""
    module, x, hx = stack()
    errors = []
    for stacks.refuses in (False, True):
        with pytest.raises((RuntimeError, TypeError, ValueError)) as error:
            module(x, STATES[name](*hx))
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1] and not any(stacks.taken)


def test_weights_that_are_replaced(stacks):
    module, x, hx = stack()
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l1")
    run(module, x, hx)
    assert not stacks.taken


class Subclass(torch.nn.Parameter):
    pass


@pytest.mark.parametrize("change", ["subclass", "negated"])
def test_a_later_weight_for_the_layer(change, stacks):
    """Nothing was run or drawn before."""
    module, x, hx = stack(dropout=0.5)
    weight = module.weight_ih_l1
    if change == "subclass":
        module.weight_ih_l1 = Subclass(weight.detach())
        assert type(module.weight_ih_l1) is Subclass
    else:
        module._parameters["weight_ih_l1"] = torch._neg_view(-weight.detach())
    results = []
    for stacks.refuses in (False, True):
        torch.manual_seed(3)
        y, states = module(x, hx)
        results.append([y, *states])
    assert stacks.taken == [False, False]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("attribute, value", [("num_layers", 3), ("bidirectional", True)])
def test_attributes_changed_after_construction(attribute, value, stacks):
    module, x, _ = stack()
    setattr(module, attribute, value)
    with pytest.raises(RuntimeError, match="cannot be changed afterwards"):
        module(x)
    assert not any(stacks.taken)


def test_an_error_of_a_later_layer(stacks):
    """Is the layers'."""
    module, x, hx = stack()
    module.weight_hh_l1.data = module.weight_hh_l1.data.double()
    with pytest.raises(RuntimeError, match="not the same dtype"):
        module(x, hx)
    assert stacks.taken == [False]


def test_the_device_is_known():
    """So that what is skipped above is skipped on the CPU's own engine only."""
    assert plain.takes_more(here(torch.zeros(1))) == (device.NAME != "cpu")
