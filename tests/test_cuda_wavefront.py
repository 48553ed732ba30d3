"""Stacks as a wavefront on a GPU with clusters: real streams. `pytest --device=cuda`."""

from types import SimpleNamespace

import device
import pytest
import torch
from device import here
from tolerances import TF32_EPS, assert_as_good
from torch import nn

import lstm_ext
from lstm_ext import ops, wavefront
from lstm_ext.cuda.engine import FAMILIES
from lstm_ext.cuda.wavefront import plan_of

pytestmark = [
    pytest.mark.tf32,
    pytest.mark.skipif(device.DEVICE.type != "cuda", reason="needs --device=cuda"),
]

T, B, I, H, LAYERS = 96, 12, 72, 200, 4
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def engine(monkeypatch):
    """Eight parts wherever there are clusters; counts the stacks."""
    engine = ops._engines[device.DEVICE.type]

    def choose(problem, where, layers, steps):
        plans = engine.core.cuda_plans(problem, engine.properties(where))
        clusters = [plan for plan in plans if FAMILIES[plan.family] == "cluster"]
        if not clusters:
            pytest.skip("no clusters here, in this arithmetic")
        plan = min(clusters, key=lambda plan: (plan.groups, plan.step_us))
        return SimpleNamespace(parts=8, plan=plan)

    run = wavefront.run

    def counted(*arguments):
        engine.stacks += 1
        return run(*arguments)

    monkeypatch.setattr(wavefront, "run", counted)
    monkeypatch.setattr(engine, "choose_wavefront", choose)
    monkeypatch.setattr(engine, "wavefront", True)
    monkeypatch.setattr(engine, "stacks", 0, raising=False)
    plan_of.cache_clear()
    yield engine
    plan_of.cache_clear()


def stack(dtype, **options):
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        pytest.skip("clusters multiply float32 in TF32 only")
    torch.manual_seed(0)
    return here(nn.LSTM(I, H, LAYERS, **options)).to(dtype)


def results(module, x, lengths=None):
    """Outputs and every gradient, by name."""
    leaf = x.detach().clone().requires_grad_()
    y, (h, c) = module(leaf) if lengths is None else module(leaf, lengths=lengths)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    loss = (y * weights.to(y.dtype)).sum() + h.sum() + c.sum()
    named = {"x": leaf, **dict(module.named_parameters())}
    grads = torch.autograd.grad(loss, list(named.values()))
    return {"y": y.detach(), "h": h.detach(), "c": c.detach()} | dict(
        zip(named, grads, strict=True)
    )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_good_as_the_layers_in_turn(engine, dtype, batch_first):
    reference = stack(dtype, batch_first=batch_first)
    module = lstm_ext.LSTM.from_torch(reference)
    x = here(torch.randn((B, T, I) if batch_first else (T, B, I))).to(dtype)
    mine = results(module, x)
    assert engine.stacks == 1
    engine.wavefront = False
    in_turn = results(module, x)
    assert engine.stacks == 1
    with device.without_cudnn():
        truth = results(reference.double(), x.double())
    eps = TF32_EPS if dtype == torch.float32 else None
    for name in mine:
        assert_as_good(mine[name], in_turn[name], truth[name], name, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(engine, dtype):
    """While memory of all sizes comes and goes, in training, with dropout and lengths."""
    module = lstm_ext.LSTM.from_torch(stack(dtype, dropout=0.2))
    x, lengths = here(torch.randn(T, B, I)).to(dtype), here(torch.randint(0, T + 1, (B,)))
    torch.manual_seed(7)
    first = results(module, x, lengths)
    for turn in range(20):
        rubbish = [torch.full((k * 5000,), float("nan"), device=x.device) for k in range(turn)]
        torch.manual_seed(7)
        again = results(module, x, lengths)
        del rubbish
        for name in first:
            assert torch.equal(first[name], again[name]), (turn, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference(engine, dtype):
    module = lstm_ext.LSTM.from_torch(stack(dtype)).eval()
    x = here(torch.randn(T, B, I)).to(dtype)
    trained = module(x)[0].detach()
    with torch.inference_mode():
        for _ in range(20):
            assert torch.equal(module(x)[0], trained)


def test_dropout_draws_the_same_numbers(engine):
    module = lstm_ext.LSTM.from_torch(stack(torch.bfloat16, dropout=0.5))
    x = here(torch.randn(T, B, I)).bfloat16()
    found = []
    for engine.wavefront in (True, False):
        torch.manual_seed(3)
        found.append((module(x)[0].float(), torch.rand(4, device=x.device)))
    (mine, after), (in_turn, after_in_turn) = found
    assert torch.equal(after, after_in_turn), "the generator is where it would be"
    eps = torch.finfo(torch.bfloat16).eps
    assert (mine - in_turn).abs().max() < 8 * eps, "other masks differ by much more"


def test_captured_in_a_graph(engine):
    """Training too: replays see new input and weights."""
    module = lstm_ext.LSTM.from_torch(stack(torch.bfloat16))
    x = here(torch.randn(T, B, I)).bfloat16()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            results(module, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(module, x)
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            for parameter in module.parameters():
                parameter.uniform_(-0.1, 0.1)
        graph.replay()
        eager = results(module, x)
        for name in captured:
            assert torch.equal(captured[name], eager[name]), name


def test_nothing_waits_for_the_device(engine):
    module = lstm_ext.LSTM.from_torch(stack(torch.bfloat16))
    x = here(torch.randn(T, B, I)).bfloat16()
    results(module, x)  # what is asked of the device once is asked here
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(module, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.stacks == 2


def test_on_a_stream_of_the_users(engine):
    module = lstm_ext.LSTM.from_torch(stack(torch.bfloat16))
    x = here(torch.randn(T, B, I)).bfloat16()
    expected = results(module, x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(5):
            found = results(module, x)
            for name in expected:
                assert torch.equal(found[name], expected[name]), name
