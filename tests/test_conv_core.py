"""ConvLSTM's steps in one call of the CPU's core."""

import types

import pytest
import torch
from device import leaf
from tolerances import assert_as_good

import lstm_ext
from lstm_ext import conv_cell
from lstm_ext.cpu import conv as cpu_conv

pytestmark = pytest.mark.cpu_only(reason="the CPU's core")
F64 = torch.float64
SIZES = {1: (7,), 2: (6, 5), 3: (4, 3, 5)}
SEQUENCES = {1: lstm_ext.ConvLSTM1d, 2: lstm_ext.ConvLSTM2d, 3: lstm_ext.ConvLSTM3d}
CELLS = {1: lstm_ext.ConvLSTM1dCell, 2: lstm_ext.ConvLSTM2dCell, 3: lstm_ext.ConvLSTM3dCell}
OPTIONS = {
    "plain": {},
    "even": {"kernel_size": 2},
    "wide": {"kernel_size": 5},
    "one": {"kernel_size": 1},
    "stride": {"stride": 2},
    "dilation": {"dilation": 2},
    "both": {"stride": 2, "dilation": 2, "padding": 2},
    "padding": {"padding": 3},
    "valid": {"padding": "valid"},
    "peephole": {"peephole": True, "bias": False},
}


@pytest.fixture
def way(monkeypatch):
    """way(flag) has the core take all steps, or none; and a list with an entry for each call."""
    calls = []

    def spied(run, name):
        def spy(*args):
            calls.append(name)
            return run(*args)

        return spy

    core, cell = conv_cell._core, {}
    for name in ("forward", "backward"):
        monkeypatch.setattr(cpu_conv, name, spied(getattr(cpu_conv, name), name))
        of_cell = "cpu_conv_cell" if name == "forward" else "cpu_conv_cell_backward"
        cell[of_cell] = spied(getattr(core, of_cell), name)
    monkeypatch.setattr(conv_cell, "_core", types.SimpleNamespace(**cell))

    def choose(flag):
        monkeypatch.setattr(cpu_conv.Call, "is_few_products", lambda *_, **__: flag)
        monkeypatch.setattr(cpu_conv.Call, "are_few_rows", True)
        calls.clear()
        return calls

    return choose


def made(dims, name, dtype, cell=False, **more):
    options = {"kernel_size": 3, **OPTIONS[name], **more}
    return (CELLS if cell else SEQUENCES)[dims](3, 4, dtype=dtype, **options)


def results(module, x, hx=None, **given):
    """Outputs, states and all gradients, of different numbers each."""
    y, (h, c) = module(x, hx, **given)
    parts = [y, h, c]
    loss = sum(
        (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in parts
    )
    wanted = [x, *(hx or ()), *module.parameters()]
    return [*parts, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dims", SIZES)
def test_as_a_library_s_convolutions(dims, name, dtype, way, isa):
    module = made(dims, name, dtype, bidirectional=name == "plain")
    x = leaf(torch.randn(4, 2, 3, *SIZES[dims], dtype=dtype))
    if name == "stride":  # in memory channels last
        x = leaf(torch.randn(4, 2, *SIZES[dims], 3, dtype=dtype).movedim(-1, 2))
    way(False)
    expected = results(module, x)
    calls = way(True)
    got = results(module, x)
    assert sorted(calls) == sorted(["forward", "backward"] * (1 + module.bidirectional))
    for a, b in zip(got, expected, strict=True):
        scale = max(1, b.abs().max().item())
        limit = 1e-12 if dtype == F64 else 2e-5
        torch.testing.assert_close(a, b, rtol=0, atol=limit * scale)


ENDS = torch.tensor([4, 0, 2])
MASK = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 1]], dtype=torch.bool)
GIVEN = {"ends": {"lengths": ENDS}, "resets": {"reset_mask": MASK}}
GIVEN["both"] = GIVEN["ends"] | GIVEN["resets"]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("dims", SIZES)
def test_lengths_and_resets(dims, given, dtype, way, isa):
    """With NaN in the padding, and states that are anything before a reset."""
    module = made(dims, "peephole", dtype, bidirectional=True)
    x = torch.randn(4, 3, 3, *SIZES[dims], dtype=dtype)
    if "lengths" in GIVEN[given]:
        x[torch.arange(4)[:, None] >= ENDS] = torch.nan
    x = leaf(x)
    states = torch.randn(2, 2, 3, 4, *SIZES[dims], dtype=dtype)
    if "reset_mask" in GIVEN[given] and "lengths" not in GIVEN[given]:
        states[:, 0, 1] = torch.nan  # of a sequence whose first step a reset stands before
    hx = [leaf(s) for s in states]
    way(False)
    expected = results(module, x, hx, **GIVEN[given])
    calls = way(True)
    got = results(module, x, hx, **GIVEN[given])
    assert sorted(calls) == sorted(["forward", "backward"] * 2)
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert not b.isnan().any(), k
        scale = max(1, b.abs().max().item())
        limit = 1e-12 if dtype == F64 else 2e-5
        torch.testing.assert_close(a, b, rtol=0, atol=limit * scale)


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("given", GIVEN)
def test_one_pass_by_the_core_and_one_by_a_library(given, forward, way, monkeypatch):
    module = made(2, "peephole", F64, bidirectional=True)
    x = leaf(torch.randn(4, 3, 3, 6, 5, dtype=F64))
    expected = results(module, x, **GIVEN[given])
    calls = way(True)
    monkeypatch.setattr(cpu_conv.Call, "is_few_products", lambda _, pass_, *__: pass_ == forward)
    got = results(module, x, **GIVEN[given])
    assert calls == ["forward" if forward else "backward"] * 2
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [*GIVEN, None])
def test_half_types(dtype, given, way):
    """In float32, but for h, which goes on as the caller sees it; saved as elsewhere."""
    truth = lstm_ext.ConvLSTM2d(3, 8, 3, 2)
    module = lstm_ext.ConvLSTM2d(3, 8, 3, 2, dtype=dtype)
    module.load_state_dict(truth.state_dict())
    truth.double().load_state_dict(module.state_dict())
    x, given = leaf(torch.randn(4, 3, 3, 6, 5, dtype=dtype)), GIVEN.get(given, {})
    way(False)
    peer, exact = results(module, x, **given), results(truth, leaf(x.detach().double()), **given)
    calls = way(True)
    ours = results(module, x, **given)
    assert calls.count("forward") == calls.count("backward") == 2
    for got, theirs, want in zip(ours, peer, exact, strict=True):
        assert got.dtype == dtype
        assert_as_good(got, theirs, want)
    # Of one step nothing but its results is rounded.
    if not given:
        y = module(x[:1])[0]
        single = truth(x[:1].double())[0]
        assert (y.double() - single).abs().max() <= 2 * torch.finfo(dtype).eps * single.abs().max()


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_some(reverse, way):
    module = made(2, "plain", F64, bidirectional=reverse)
    x = leaf(torch.randn(3, 2, 3, 5, 4, dtype=F64))
    hx = [leaf(torch.randn(1 + reverse, 2, 4, 5, 4, dtype=F64)) for _ in "hc"]
    every = {"x": x, "h": hx[0], "c": hx[1], **dict(module.named_parameters())}
    for name, tensor in every.items():
        found = []
        for flag in (False, True):
            calls = way(flag)
            for other in every.values():
                other.requires_grad_(other is tensor)
            y, (h, c) = module(x, hx)
            found += torch.autograd.grad((y.square().sum() + h.sum() + c.sum()), [tensor])
        assert calls[: 2 + reverse] == ["forward"] * (1 + reverse) + ["backward"], name
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("columns", [1, 900])
def test_products_of_a_few_steps_at_once(columns, way, monkeypatch):
    """The sums of the weights' gradients, where not all that kernels see is in memory."""
    module = made(2, "peephole", F64, num_layers=2)
    x = leaf(torch.randn(5, 2, 3, 5, 4, dtype=F64))
    way(True)
    expected = results(module, x)
    monkeypatch.setattr(cpu_conv, "_COLUMNS", columns)
    torch.testing.assert_close(results(module, x), expected)


def guard(monkeypatch):
    """Memory behind what each call of the core takes, filled with 0xA5; a list of it."""
    given = []

    def guarded(size):
        memory = torch.full((size + (1 << 20),), 0xA5, dtype=torch.uint8)
        given.append(memory[size:])
        return memory

    monkeypatch.setattr(cpu_conv.cpu_products, "workspace", guarded)
    return given


# A product of fewer steps, the last, can need more memory than the others.
@pytest.mark.parametrize("shape", [(66, 1, 16, 8, 8), (81, 1, 16, 8, 8)])
def test_scratch_is_large_enough(shape, way, monkeypatch):
    module, x = lstm_ext.ConvLSTM2d(16, 16, 3), leaf(torch.randn(shape))
    way(True)
    expected, given = results(module, x), guard(monkeypatch)
    got = results(module, x)
    assert len(given) == 3 and all((after == 0xA5).all() for after in given)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_weights_that_lie_channels_last(dims, cell, way):
    module = made(dims, "peephole", F64, cell=cell)
    x = leaf(torch.randn(*([] if cell else [4]), 2, 3, *SIZES[dims], dtype=F64))
    way(True)

    def run():
        if not cell:
            return results(module, x)
        h, c = module(x)
        wanted = [x, *module.parameters()]
        return [h, c, *torch.autograd.grad(h.square().sum() + c.sum(), wanted)]

    expected = run()
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    for name in ("weight_ih", "weight_hh"):
        weight = getattr(module, name if cell else name + "_l0")
        weight.data = weight.data.contiguous(memory_format=last)
        assert not weight.is_contiguous()
    calls = way(True)
    for a, b in zip(run(), expected, strict=True):
        assert torch.equal(a, b)
    assert calls == ["forward", "backward"]


def test_which_sizes_the_core_takes():
    module, large = lstm_ext.ConvLSTM2d(8, 8, 3), lstm_ext.ConvLSTM2d(32, 64, 3)
    for lstm, x, forward, backward in (
        (module, torch.randn(2, 1, 8, 8, 8), True, True),
        (large, torch.randn(1, 1, 32, 8, 8), True, True),
        (large, torch.randn(2, 1, 32, 8, 8), True, True),
        (large, torch.randn(2, 1, 32, 9, 8), False, False),
        (module, torch.randn(2, 9, 8, 9, 20), True, False),
        (large, torch.randn(2, 8, 32, 32, 32), False, False),
    ):
        T, N, inputs, *size = x.shape
        C = lstm.hidden_channels
        call = cpu_conv.Call(lstm._window(0), False, T, N, inputs, C, tuple(size), tuple(size))
        assert call.is_few_products(True) == forward
        assert call.is_few_products(False) == backward
