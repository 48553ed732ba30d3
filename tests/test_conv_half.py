"""A ConvLSTM's cell in half types and under autocast: its short way beside the other."""

import pytest
import torch
from device import leaf
from kept_steps import rows_kept
from test_conv_core import CELLS, GIVEN, SIZES
from tolerances import assert_as_good

import lstm_ext
from lstm_ext import conv, conv_cell, conv_first
from lstm_ext.cpu import conv as cpu_conv

pytestmark = pytest.mark.cpu_only(reason="the CPU's short way")
HALF = [torch.bfloat16, torch.float16]
WAYS = ["core", "library", "at_once"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """How the short way computes a step; the first that keeps what gradients are made of."""
    monkeypatch.setattr(cpu_conv.Call, "is_few_products", lambda *_, **__: request.param == "core")
    monkeypatch.setattr(conv_first, "MANY_WEIGHTS", 0 if request.param == "at_once" else 10**9)
    return request.param


def twins(dims, dtype, autocast, **options):
    """A cell of 8 channels, and the same in float64; under autocast it is of float32."""
    cell = CELLS[dims](3, 8, 3, dtype=torch.float32 if autocast else dtype, **options)
    truth = CELLS[dims](3, 8, 3, dtype=torch.float64, **options)
    if autocast:  # both round the same numbers
        for p in cell.parameters():
            p.data = p.data.to(dtype).float()
    truth.load_state_dict(cell.state_dict())
    return cell, truth


def results(cell, x, hx, steps=3, context=None):
    """Of each step, and the gradients of all that there is."""
    outputs, states = [], hx
    for _ in range(steps):
        if context is None:
            states = cell(x, states)
        else:
            with context():
                states = cell(x, states)
        outputs += states
    loss = sum(t.double().square().sum() for t in outputs[::2]) + outputs[-1].double().sum()
    return [*outputs, *torch.autograd.grad(loss, [x, *hx, *cell.parameters()])]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("options", [{}, {"peephole": True, "stride": 2}, {"bias": False}])
@pytest.mark.parametrize("dims", SIZES)
def test_as_good_as_the_other_way(dims, options, dtype, autocast, way, monkeypatch):
    cell, truth = twins(dims, dtype, autocast, **options)
    kind = torch.float32 if autocast else dtype
    x = leaf(torch.randn(2, 3, *SIZES[dims]).to(dtype).to(kind))
    size = truth(x.double())[0].shape
    hx = [leaf(torch.randn(size).to(dtype).to(kind)) for _ in "hc"]
    context = (lambda: torch.autocast("cpu", dtype)) if autocast else None
    found, run = [], conv.short_step

    def spy(*arguments):
        found.append(run(*arguments))
        return found[-1]

    monkeypatch.setattr(conv, "short_step", spy)
    ours = results(cell, x, hx, context=context)
    assert len(found) == 3 and all(states is not None for states in found)
    monkeypatch.setattr(conv, "short_step", lambda *_: None)
    peer = results(cell, x, hx, context=context)
    exact = results(
        truth, *(leaf(t.detach().double()) for t in (x,)), [leaf(t.detach().double()) for t in hx]
    )
    assert [t.dtype for t in ours[:6]] == [dtype] * 6
    eps = torch.finfo(dtype).eps
    for k, (got, theirs, want) in enumerate(zip(ours, peer, exact, strict=True)):
        assert_as_good(got, theirs, want, str(k), eps=eps)


@pytest.mark.parametrize("dtype", HALF)
def test_second_derivatives(dtype, way, monkeypatch):
    cell, _ = twins(2, dtype, False)
    x = leaf(torch.randn(1, 3, 4, 3, dtype=dtype))

    def run():
        h, c = cell(x, cell(x))
        first = torch.autograd.grad(
            h.float().square().sum() + c.float().sum(), x, create_graph=True
        )
        return torch.autograd.grad(first[0].float().square().sum(), [x, *cell.parameters()])

    ours = run()
    monkeypatch.setattr(conv, "short_step", lambda *_: None)
    for got, want in zip(ours, run(), strict=True):
        limit = 0.05 * want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=0, atol=limit)


def test_gradients_of_many_steps_are_kept(way, monkeypatch):
    found = rows_kept(monkeypatch)
    cell, _ = twins(2, torch.bfloat16, False)
    x = torch.randn(2, 3, 4, 3, dtype=torch.bfloat16)
    states = None
    for _ in range(4):
        states = cell(x, states)
    states[0].float().sum().backward()
    assert found == ([24] * 3 if way == "at_once" else [])
    assert all(p.grad.dtype == torch.bfloat16 for p in cell.parameters())


def test_what_is_around_autocast_or_of_other_dtypes(monkeypatch):
    """The other way is there for it, and has the errors."""
    cell, _ = twins(2, torch.bfloat16, True)
    x = torch.randn(2, 3, 4, 3)
    found, run = [], conv_cell._run

    def spy(*arguments):
        found.append(run(*arguments) is not None)

    monkeypatch.setattr(conv_cell, "_run", spy)
    with torch.autocast("cpu", torch.bfloat16):
        torch.func.vmap(cell)(x[None])
        assert not found
        cell.double()(x.double())  # autocast leaves float64 as it is
        assert found.pop()
        with pytest.raises(RuntimeError, match="float32"):
            cell(x)
        assert not found.pop()
    with pytest.raises(RuntimeError, match="bfloat16"):
        cell.float()(x.bfloat16())
    assert not found.pop()


def test_layers_and_their_single_steps(monkeypatch):
    """A layer of half types goes the core's way in as many steps as a loop over its cell."""
    layer = lstm_ext.ConvLSTM2d(3, 8, 3, dtype=torch.bfloat16)
    cell = lstm_ext.ConvLSTM2dCell(3, 8, 3, dtype=torch.bfloat16)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(4, 3, 3, 6, 5, dtype=torch.bfloat16)
    y, (h, _) = layer(x)
    states = None
    for t, images in enumerate(x):
        states = cell(images, states)
        # The layer's c is not rounded between steps.
        torch.testing.assert_close(y[t], states[0], rtol=0, atol=2**-7)
    torch.testing.assert_close(h[0], states[0], rtol=0, atol=2**-7)
    again = layer(x, **GIVEN["ends"])[0]
    assert torch.equal(again[:, 0], y[:, 0])
