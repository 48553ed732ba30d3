"""Backward's short way of a plain layer or cell: when it is taken, and that it gives the bits of
the layer's."""

import itertools

import pytest
import torch
from device import leaf
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

import lstm_ext
from lstm_ext import native, plain

pytestmark = pytest.mark.cpu_only(reason="the CPU engine's own way for a plain layer")
I, H = 6, 19
BF16 = torch.bfloat16


@pytest.fixture
def short(monkeypatch):
    """A list with an entry for each backward that asks for it: whether it went the short way."""
    found = []

    class Spy:
        cpu_forward = plain._plain.cpu_forward
        cpu_cell = plain._plain.cpu_cell
        refuses = False

        def cpu_backward(self, *args, core=plain._plain):
            made = None if self.refuses else core.cpu_backward(*args)
            found.append(made is not None)
            return made

    monkeypatch.setattr(plain, "_plain", Spy())
    return found


def both_ways(short, run):
    """What run() returns, after it was found to be the same by the layer's way."""
    short.clear()
    ours = run()
    assert short and all(short)
    plain._plain.refuses = True
    theirs = run()
    plain._plain.refuses = False
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
        assert a is None or (a.dtype == b.dtype and a.stride() == b.stride())
    return ours


def skip_without_bf16(dtype):
    if dtype == BF16 and not native._C.cpu_bf16_products():
        pytest.skip("these kernels do not multiply bf16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("steps, batch", [(1, 1), (1, 3), (2, 1), (7, 6), (50, 1), (73, 7)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_of_a_layer(dtype, batch_first, steps, batch, threads, short, isa):
    skip_without_bf16(dtype)
    torch.set_num_threads(threads)
    module = lstm_ext.LSTM(I, H, batch_first=batch_first, dtype=dtype)
    size = (batch, steps, I) if batch_first else (steps, batch, I)
    x = leaf(torch.randn(size, dtype=dtype))
    hx = tuple(leaf(torch.randn(1, batch, H, dtype=dtype)) for _ in range(2))
    y, (h, c) = module(x, hx)
    outputs, inputs = (y, h, c), [x, *hx, *module.parameters()]
    cotangents = [torch.randn_like(t) for t in outputs]
    spread = torch.randn(1, dtype=dtype).expand_as(y)  # as of a sum
    turned = torch.randn(y.shape[::-1], dtype=dtype).permute(2, 1, 0)

    def run():
        grads = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)
        for output, cotangent in (*zip(outputs, cotangents, strict=True), (y, spread), (y, turned)):
            grads += torch.autograd.grad(output, inputs, cotangent, retain_graph=True)
        return grads

    both_ways(short, run)
    assert len(short) == 12


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("steps, batch", [(1, 1), (1, 4), (5, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_any_inputs_may_be_wanted(dtype, steps, batch, bias, short):
    skip_without_bf16(dtype)
    module = lstm_ext.LSTM(I, H, bias=bias, dtype=dtype)
    tensors = [torch.randn(n, batch, k, dtype=dtype) for n, k in ((steps, I), (1, H), (1, H))]
    tensors += module.parameters()
    for flags in itertools.product([False, True], repeat=len(tensors)):
        if not any(flags):
            continue
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)
        wanted = [t for t in tensors if t.requires_grad]
        x, h, c = tensors[:3]

        def run(x=x, h=h, c=c, wanted=wanted):
            y, (_, c_n) = module(x, (h, c))
            return torch.autograd.grad(y.sum() + c_n.sum(), wanted)

        if any(flags[5:]) and not any(flags[3:5]):
            run()
            assert short.pop() is False, "biases alone are the layer's"
        else:
            both_ways(short, run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_bits_of_a_cell(dtype, batch, short, isa):
    skip_without_bf16(dtype)
    module = lstm_ext.LSTMCell(I, H, dtype=dtype)
    x, *hx = (leaf(torch.randn(batch, n, dtype=dtype)) for n in (I, H, H))
    cotangents = [torch.randn(batch, H, dtype=dtype) for _ in range(2)]

    def run():
        states = module(x, hx)
        return torch.autograd.grad(states, [x, *hx, *module.parameters()], cotangents)

    both_ways(short, run)


def test_two_gradients_of_biases(short):
    """A caller may change one in place."""
    module = lstm_ext.LSTM(I, H)
    module(torch.randn(3, 2, I))[0].sum().backward()
    assert short == [True]
    before = module.bias_ih_l0.grad.clone()
    module.bias_hh_l0.grad.zero_()
    assert torch.equal(module.bias_ih_l0.grad, before)


class Subclass(torch.Tensor):
    pass


def test_autocast_around_backward(short):
    """It has no say in the products: they are of the dtype that forward had."""
    module = lstm_ext.LSTM(I, H)
    x = leaf(torch.randn(9, 3, I))
    y, _ = module(x)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return torch.autograd.grad(y.sum(), [x, *module.parameters()], retain_graph=True)

    inside = both_ways(short, run)
    outside = torch.autograd.grad(y.sum(), [x, *module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("kind", ["rows", "gradient"])
def test_what_the_layer_s_way_does(kind, short):
    module = lstm_ext.LSTM(I, H, dtype=torch.float64)
    twin = module.to_torch()
    x = leaf(torch.randn(512 if kind == "rows" else 9, 1, I, dtype=torch.float64))
    cotangent = torch.randn(x.size(0), 1, H, dtype=torch.float64)

    def gradients(module):
        y, _ = module(x)
        given = cotangent.as_subclass(Subclass) if kind == "gradient" else cotangent
        return torch.autograd.grad(y, [x, *module.parameters()], given)

    for ours, theirs in zip(gradients(module), gradients(twin), strict=True):
        torch.testing.assert_close(ours, theirs, check_dtype=True)
    assert short == [False]


@pytest.mark.parametrize("steps", [1, 4])
def test_saved_tensors_laid_out_anew(steps, short):
    module = lstm_ext.LSTM(I, H)
    x = leaf(torch.randn(steps, 3, I))

    def relaid(tensor):
        return torch.stack([tensor, tensor], -1)[..., 0]

    def run():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, relaid):
            y, _ = module(x)
        return torch.autograd.grad(y.sum(), [x, *module.parameters()])

    both_ways(short, run)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.double(),
        lambda t: t[:-1],
        lambda t: torch._neg_view(-t),
        lambda t: t.to("meta"),
    ],
)
@pytest.mark.parametrize("index", range(10))
def test_saved_tensors_that_are_others(index, change, short):
    """As forward saved them: x, h_0, c_0, the weights, gates, c_seq and y."""
    module = lstm_ext.LSTM(I, H)
    x = leaf(torch.randn(4, 3, I))
    hx = tuple(leaf(torch.randn(1, 3, H)) for _ in range(2))
    count = itertools.count()

    def pack(tensor):
        return tensor, next(count) == index

    def unpack(packed):
        tensor, changed = packed
        return change(tensor) if changed else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y, _ = module(x, hx)
    assert next(count) == 10
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        torch.autograd.grad(y.sum(), [x, *hx, *module.parameters()])
    assert not any(short)


class Interrupts(TorchFunctionMode):
    """Raises at the first look at a tensor of a kind that the core asks for."""

    def __init__(self, name, error):
        super().__init__()
        self.name, self.error = name, error

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == self.name:
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["is_neg", "contiguous", "data_ptr"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, AssertionError])
def test_what_is_raised_meanwhile_goes_on(name, error):
    """As by a signal's handler, for which a mode gives Python the time, of the core's questions: to
    a mode a module's forward is one function."""
    module, x = lstm_ext.LSTM(I, H), torch.randn(4, 1, 2 * I)[..., ::2]
    with pytest.raises(error), Interrupts(name, error):
        plain.plain_layer(x, None, [*module.parameters(), None], I, H, 4)
    y = module(x)[0]
    # torch.autograd.grad would leave the mode before.
    with pytest.raises(error), Interrupts(name, error):
        _engine_run_backward(
            (y,),
            (torch.ones_like(y),),
            False,
            False,
            (),
            allow_unreachable=True,
            accumulate_grad=True,
        )


class OtherShape(TorchFunctionMode):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return self.shape if isinstance(result, torch.Size) else result


@pytest.mark.parametrize("shape", [[4, 6], (4.0, 6.0), None])
def test_shapes_that_are_no_tuples_of_numbers(shape):
    module, x = lstm_ext.LSTMCell(I, H), torch.randn(4, I)
    with pytest.raises(TypeError), OtherShape(shape):
        plain.plain_cell(x, None, list(module.parameters()), I, H)


def test_weights_that_lie_column_by_column(short):
    module = lstm_ext.LSTM(90, 70)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        weight = getattr(module, name)
        weight.data = weight.data.t().contiguous().t()
    x, *hx = (leaf(torch.randn(1, 1, n)) for n in (90, 70, 70))

    def run():
        return torch.autograd.grad(module(x, hx)[0].sum(), [x, *hx, *module.parameters()])

    both_ways(short, run)
