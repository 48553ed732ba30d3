"""A ConvLSTM's layer by a library's convolutions channels first, and the cells in planes."""

import copy

import pytest
import torch
from device import leaf
from test_conv_core import F64, SEQUENCES, SIZES, results

import lstm_ext
from lstm_ext import conv_planes, reference
from lstm_ext.cpu import cell
from lstm_ext.cpu import conv as cpu_conv
from lstm_ext.engine import acc_dtype

pytestmark = pytest.mark.cpu_only(reason="the CPU's cells")
OPTIONS = {
    "plain": {},
    "peephole": {"peephole": True, "bias": False, "num_layers": 2},
    "wide": {"kernel_size": 5, "padding": 2},
    "one": {"kernel_size": 1},
    "even": {"kernel_size": 2, "bidirectional": True},
    "both": {"bidirectional": True, "peephole": True, "num_layers": 2},
}


@pytest.fixture
def planes(monkeypatch):
    """planes(flag) has layers go this way, or step by step channels last; a list with the passes
    that did since."""
    calls = []
    monkeypatch.setattr(cpu_conv.Call, "is_few_products", lambda *_, **__: False)
    for name in ("forward", "gradients"):
        run = getattr(conv_planes, name)

        def spy(*args, run=run, name=name):
            calls.append(name)
            return run(*args)

        monkeypatch.setattr(conv_planes, name, spy)

    def choose(flag):
        monkeypatch.setattr(conv_planes, "_pays", lambda _: flag)
        calls.clear()
        return calls

    return choose


def made(dims, name, dtype):
    return SEQUENCES[dims](3, 4, **{"kernel_size": 3, **OPTIONS[name]}, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dims", SIZES)
def test_as_step_by_step(dims, name, dtype, planes, isa):
    module = made(dims, name, dtype)
    x = leaf(torch.randn(4, 2, 3, *SIZES[dims], dtype=dtype))
    hx = [leaf(torch.randn_like(s)) for s in module(x)[1]]
    planes(False)
    expected = results(module, x, hx)
    calls = planes(True)
    got = results(module, x, hx)
    layers = module.num_layers * (1 + module.bidirectional)
    assert calls == ["forward"] * layers + ["gradients"] * layers
    with torch.no_grad():
        y, (h, c) = module(x, hx)
    for a, b in zip([*got, y, h, c], [*expected, *expected[:3]], strict=True):
        scale = max(1, b.abs().max().item())
        limit = 1e-12 if dtype == F64 else 2e-5
        torch.testing.assert_close(a, b, rtol=0, atol=limit * scale)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_some(reverse, planes):
    """Of each tensor alone, of each but one, and from each result alone."""
    module = SEQUENCES[2](3, 4, 3, peephole=True, bidirectional=reverse, dtype=F64)
    x = leaf(torch.randn(3, 2, 3, 5, 4, dtype=F64))
    hx = [leaf(torch.randn(1 + reverse, 2, 4, 5, 4, dtype=F64)) for _ in "hc"]
    every = [x, *hx, *module.parameters()]
    planes(True)
    for part in range(3):

        def loss(part=part):
            y, (h, c) = module(x, hx)
            return (y, h, c)[part].sin().sum()

        for t in every:
            t.requires_grad_(True)
        expected = torch.autograd.grad(loss(), every)
        for k, tensor in enumerate(every):
            for alone in (True, False):
                for other in every:
                    other.requires_grad_((other is tensor) == alone)
                wanted = [t for t in every if t.requires_grad]
                whole = [g for g, t in zip(expected, every, strict=True) if t.requires_grad]
                got = torch.autograd.grad(loss(), wanted, allow_unused=True)
                for a, b in zip(got, whole, strict=True):
                    torch.testing.assert_close(a, b, msg=str((part, k, alone)))


def test_results_are_alone_in_memory_and_may_be_changed(planes):
    module = made(2, "plain", F64)
    x = leaf(torch.randn(3, 2, 3, 6, 5, dtype=F64))
    planes(True)
    (expected,) = torch.autograd.grad(module(x)[0].sum(), x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y, (h, c) = module(x)
        assert y.is_contiguous() and y.stride() == torch.empty(y.shape).stride()
        assert len({t.untyped_storage().data_ptr() for t in (y, h, c)}) == 3
    total = y.sum()
    with torch.no_grad():
        for t in (y, h, c):
            t.zero_()
    assert torch.equal(torch.autograd.grad(total, x)[0], expected)
    y, (h, c) = module(x)
    expected = torch.autograd.grad(y.relu().sum() + h.exp().sum() + c.tanh().sum(), x)
    y, (h, c) = module(x)
    y.relu_()
    h.exp_()
    c.tanh_()
    torch.testing.assert_close(torch.autograd.grad(y.sum() + h.sum() + c.sum(), x), expected)


@pytest.mark.parametrize("flag", [False, True])
def test_gradients_of_weights_are_contiguous(flag, planes):
    module = made(2, "plain", torch.float32)
    x = leaf(torch.randn(3, 1, 3, 6, 5))
    planes(flag)
    for g in torch.autograd.grad(module(x)[0].sum(), list(module.parameters())):
        assert g.is_contiguous() and g.untyped_storage().nbytes() == 4 * g.numel()


def test_second_derivatives(planes):
    module = made(1, "peephole", F64)
    x = leaf(torch.randn(2, 1, 3, 4, dtype=F64))
    calls = planes(True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,))
    assert "forward" in calls


@pytest.mark.parametrize("name", ["plain", "both"])
def test_compiled(name, planes):
    module = made(2, name, torch.float32)
    x = leaf(torch.randn(3, 2, 3, 6, 5))
    calls = planes(True)
    expected = results(module, x)
    run = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    got = run(x)
    for a, b in zip((got[0], *got[1]), expected, strict=False):
        assert torch.equal(a, b)
    count = len(calls)
    got = torch.autograd.grad(got[0].sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(module(x)[0].sum(), x), rtol=0, atol=0)
    assert len(calls) > count


@pytest.mark.parametrize("given", ["lengths", "resets", "stride", "half"])
def test_what_goes_step_by_step(given, planes):
    options = {"stride": 2} if given == "stride" else {}
    module = lstm_ext.ConvLSTM2d(3, 4, 3, **options)
    x, more = torch.randn(3, 2, 3, 6, 5), {}
    if given == "half":
        module, x = module.half(), x.half()
    elif given == "lengths":
        more["lengths"] = torch.tensor([3, 2])
    elif given == "resets":
        more["reset_mask"] = torch.tensor([[0, 0], [0, 1], [0, 0]], dtype=torch.bool)
    calls = planes(True)
    module(x, **more)
    assert not calls


def test_which_layers_go_this_way():
    """Those of whose channels the library's blocks are no less full, and not too large."""
    for inputs, C, kernel, expected in (
        (8, 8, 3, True),
        (3, 8, 3, True),
        (16, 16, 3, True),
        (32, 32, 3, True),
        (3, 16, 3, False),
        (8, 16, 5, False),
        (16, 16, 1, False),
        (64, 64, 3, False),
    ):
        module = lstm_ext.ConvLSTM2d(inputs, C, kernel)
        call = cpu_conv.Call(module._window(0), False, 2, 1, inputs, C, (8, 8), (8, 8))
        assert conv_planes._pays(call) == expected


@pytest.mark.parametrize("of_cell", [False, True])
def test_any_number_of_threads(of_cell, planes):
    """Of so many units that several threads share them."""
    module = (lstm_ext.ConvLSTM1dCell if of_cell else lstm_ext.ConvLSTM1d)(1, 3, 1, peephole=True)
    x = leaf(torch.randn(*([] if of_cell else [2]), 3, 1, 10007))
    planes(True)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            y = module(x)[0]
            found.append((y, torch.autograd.grad(y.sin().sum(), x)[0]))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


HALF = [torch.bfloat16, torch.float16]
KINDS = [(t, t) for t in (F64, torch.float32, torch.bfloat16)] + [(torch.float32, t) for t in HALF]


@pytest.mark.parametrize("gradients", ["h", "c", "both"])
@pytest.mark.parametrize("peephole", [False, True])
@pytest.mark.parametrize("given, states", KINDS)
def test_the_cells_alone(given, states, peephole, gradients, isa):
    """Of 21 and of 100 units, beside autograd in float64."""
    acc = acc_dtype(states)
    for size in ((7,), (5, 20)):
        pixels = torch.Size(size).numel()
        a = torch.randn(2, 12, *size, dtype=given)
        c0, dh, dc = (torch.randn(2, 3, *size, dtype=states) for _ in range(3))
        w_ch = torch.randn(9, dtype=acc) if peephole else None
        gates, c_kept = torch.empty_like(a, dtype=acc), torch.empty_like(c0, dtype=acc)
        h, c = torch.empty_like(c0), torch.empty_like(c0)
        of_units = cell.of_units(w_ch, pixels)
        cell.planes_forward(a, c0, of_units, gates, c_kept, h, c)
        dh, dc = (dh if gradients != "c" else None), (dc if gradients != "h" else None)
        da = torch.empty_like(a)
        dc0, dw_ch = cell.planes_backward(gates, c_kept, c0, of_units, dh, dc, da)

        wide = [leaf(t.double()) for t in (a, c0)] + ([leaf(w_ch.double())] if peephole else [])
        rows = [t.movedim(1, -1).flatten(0, -2) for t in wide[:2]]
        truth = reference.lstm_cell(*rows, wide[2] if peephole else None)
        truth = [t.view(2, *size, 3).movedim(-1, 1) for t in truth]
        used = [(t, g.double()) for t, g in zip(truth, (dh, dc), strict=True) if g is not None]
        outputs, cotangents = zip(*used, strict=True)
        expected = torch.autograd.grad(outputs, wide, cotangents)
        near = {F64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
        for got, want in zip((h, c, da, dc0, dw_ch), (*truth, *expected), strict=False):
            scale = max(1, want.abs().max().item())
            limit = scale * near[got.dtype]
            torch.testing.assert_close(got.double(), want, rtol=0, atol=limit)
