"""The vendor family on a GPU: the products of cuBLASLt, graphs, streams. `pytest --device=cuda`."""

import device
import pytest
import torch
from device import here
from tolerances import TF32_EPS, assert_as_good, tol
from torch import nn

import lstm_ext
from lstm_ext import ops
from lstm_ext.cuda.engine import FAMILIES, CudaEngine

pytestmark = [
    pytest.mark.tf32,
    pytest.mark.skipif(device.DEVICE.type != "cuda", reason="needs --device=cuda"),
]

T, B, I, H = 6, 24, 40, 520  # three blocks of units, the last not full; rows with padding
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VARIANTS = {"peephole": True, "zoneout": 0.1, "recurrent_dropout": 0.2}


class VendorEngine(CudaEngine):
    """Runs all layers on the vendor family."""

    def choose(self, problem, where):
        plans = self.core.cuda_plans(problem, self.properties(where))
        return next(plan for plan in plans if FAMILIES[plan.family] == "vendor")


@pytest.fixture(autouse=True)
def _vendor(monkeypatch):
    engine = VendorEngine(ops._engines["cuda"].core)
    assert engine.plain is not None, "cuBLASLt is not open"
    monkeypatch.setitem(ops._engines, "cuda", engine)


def layer(dtype, **options):
    torch.manual_seed(0)
    return here(lstm_ext.LSTM(I, H, **options)).to(dtype)


def batch(dtype):
    return here(torch.randn(T, B, I)).to(dtype), here(torch.randint(0, T + 1, (B,)))


def results(module, x, lengths=None):
    """Outputs and every gradient."""
    leaf = x.detach().clone().requires_grad_()
    y, (h, c) = module(leaf, lengths=lengths) if lengths is not None else module(leaf)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    loss = (y * weights.to(y.dtype)).sum() + h.sum() + c.sum()
    return [y.detach(), h.detach(), c.detach()] + list(
        torch.autograd.grad(loss, [leaf, *module.parameters()])
    )


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_as_torch(dtype, bidirectional):
    module = layer(dtype, bidirectional=bidirectional)
    peer = here(nn.LSTM(I, H, bidirectional=bidirectional)).to(dtype)
    peer.load_state_dict(module.state_dict())
    x, _ = batch(dtype)
    got, theirs = results(module, x), results(peer, x)
    truth = results(peer.double(), x.double())
    rounded = dtype.itemsize == 2 or (dtype == torch.float32 and device.tf32())
    for mine, other, true in zip(got, theirs, truth, strict=True):
        if rounded:
            assert_as_good(mine, other, true, eps=TF32_EPS if dtype == torch.float32 else None)
        else:
            scale = max(1.0, float(true.abs().max()))
            limits = tol(dtype)
            torch.testing.assert_close(
                mine, true.to(dtype), rtol=limits["rtol"], atol=scale * limits["atol"]
            )


@pytest.mark.parametrize("options", [{}, VARIANTS, {"layer_norm": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_as_the_family_step(dtype, options, monkeypatch):
    """With lengths, in both directions; masks of the same seed."""
    module, (x, lengths) = layer(dtype, bidirectional=True, **options), batch(dtype)
    torch.manual_seed(1)
    got = results(module, x, lengths)

    class StepEngine(CudaEngine):
        def choose(self, problem, where):
            return self.core.cuda_plans(problem, self.properties(where))[0]

    monkeypatch.setitem(ops._engines, "cuda", StepEngine(ops._engines["cuda"].core))
    torch.manual_seed(1)
    for mine, theirs in zip(got, results(module, x, lengths), strict=True):
        eps = 1e-10 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
        assert (mine - theirs).abs().max() <= eps * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(dtype):
    """While memory of all sizes comes and goes, on a stream of its own too."""
    module, (x, lengths) = layer(dtype), batch(dtype)
    first = results(module, x, lengths)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for turn in range(10):
        rubbish = [torch.full((k * 5000,), float("nan"), device=x.device) for k in range(turn)]
        with torch.cuda.stream(side if turn % 2 else torch.cuda.current_stream()):
            again = results(module, x, lengths)
        torch.cuda.synchronize()
        del rubbish
        for a, b in zip(again, first, strict=True):
            assert torch.equal(a, b)


def test_two_streams_at_once():
    module, (x, _) = layer(torch.bfloat16), batch(torch.bfloat16)
    inputs = [x, x.flip(1).contiguous()]
    expected = [results(module, each) for each in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(10):
        got = []
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(results(module, each))
        torch.cuda.synchronize()
        for ours, theirs in zip(got, expected, strict=True):
            assert all(map(torch.equal, ours, theirs))


def test_captured_in_a_graph():
    """After a call of the same shape, for the library is not to be asked for a way meanwhile."""
    module, (x, lengths) = layer(torch.bfloat16), batch(torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(module, x, lengths)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(module, x, lengths)
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            lengths.random_(0, T + 1)
        graph.replay()
        assert all(map(torch.equal, captured, results(module, x, lengths)))


def test_nothing_waits_for_the_device():
    module, (x, lengths) = layer(torch.bfloat16), batch(torch.bfloat16)
    results(module, x, lengths)  # what is asked of the device once is asked here
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(module, x, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
