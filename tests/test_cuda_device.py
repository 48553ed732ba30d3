"""What only a GPU can show: graphs, streams, hidden waits, devices. `pytest --device=cuda`."""

import copy

import device
import pytest
import torch
from device import here

import lstm_ext
from lstm_ext import ops

pytestmark = [
    pytest.mark.tf32,
    pytest.mark.skipif(device.DEVICE.type != "cuda", reason="needs --device=cuda"),
]


def layer(kind="plain"):
    peephole = kind == "peepholes"
    return here(lstm_ext.LSTM(24, 40, num_layers=2, bidirectional=True, peephole=peephole))


@pytest.fixture(params=["plain", "lengths", "peepholes"])
def kind(request):
    """Of a call: those with peepholes go another way through the engine than the others."""
    return request.param


def batch(kind="lengths", T=7, B=5):
    """x, lengths and a reset mask."""
    x = here(torch.randn(T, B, 24))
    if kind == "plain":
        return x, None, None
    return x, here(torch.randint(0, T + 1, (B,))), here(torch.rand(T, B) < 0.2)


def gradients(module, x, lengths, mask):
    y, (h_n, c_n) = module(x, lengths=lengths, reset_mask=mask)
    loss = y.square().sum() + h_n.sum() + c_n.sum()
    return [y, *torch.autograd.grad(loss, list(module.parameters()))]


def test_nothing_waits_for_the_device(kind):
    """torch raises at whatever synchronises, with lengths and masks on the device."""
    module, (x, lengths, mask) = layer(kind), batch(kind)
    gradients(module, x, lengths, mask)  # what is asked of the device once is asked here
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(module, x, lengths, mask)
        module(torch.nn.utils.rnn.PackedSequence(x.flatten(0, 1), torch.tensor([5] * 7)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("T", [1, 7])
def test_captured_in_a_graph(kind, T):
    """Training too: replays see new input, lengths and weights."""
    module, (x, lengths, mask) = layer(kind), batch(kind, T)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients(module, x, lengths, mask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(module, x, lengths, mask)
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            if lengths is not None:
                lengths.random_(0, T + 1)
            for parameter in module.parameters():
                parameter.uniform_(-0.2, 0.2)
        graph.replay()
        for ours, eager in zip(captured, gradients(module, x, lengths, mask), strict=True):
            assert torch.equal(ours, eager)


def test_make_graphed_callables():
    """Forward and backward as one graph each, beside the module itself; the same bits."""
    module = layer()
    twin = copy.deepcopy(module)
    graphed = torch.cuda.make_graphed_callables(module, (batch()[0],))
    for _ in range(3):
        x, results = batch()[0], []
        for call, owner in ((graphed, module), (twin, twin)):
            y, (h_n, c_n) = call(x)
            owner.zero_grad()
            (y.square().sum() + h_n.sum() + c_n.sum()).backward()
            results.append([y, h_n, c_n, *(p.grad for p in owner.parameters())])
        for ours, eager in zip(*results, strict=True):
            assert torch.equal(ours, eager)


def test_a_training_step_with_autocast_and_a_capturable_optimizer_in_a_graph():
    """The whole step, weights cast and updated inside: replays train as eager steps do."""
    module, x = layer(), batch()[0]
    twin = copy.deepcopy(module)

    def optimizer_of(module):
        return torch.optim.Adam(module.parameters(), lr=1e-2, capturable=True, fused=True)

    def step(module, optimizer):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            y, _ = module(x)
        loss = y.float().square().mean()
        loss.backward()
        optimizer.step()
        return loss

    optimizer, other = optimizer_of(module), optimizer_of(twin)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(module, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        captured = step(module, optimizer)
    eager = [step(twin, other) for _ in range(6)]
    for loss in eager[3:]:
        graph.replay()
        torch.testing.assert_close(captured, loss, rtol=0, atol=0)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_lengths_on_the_cpu_cannot_be_captured():
    module, (x, lengths, _) = layer(), batch()
    module(x, lengths=lengths)
    on_cpu = lengths.cpu()
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            module(x, lengths=on_cpu)


def test_the_current_stream_is_used(kind):
    """On a stream of its own, after work that a wrong stream would not wait for."""
    module, (x, lengths, mask) = layer(kind), batch(kind)
    expected = gradients(module, x, lengths, mask)
    source, side = x.clone(), torch.cuda.Stream()
    x.zero_()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        x.copy_(source)
        got = gradients(module, x, lengths, mask)
    torch.cuda.current_stream().wait_stream(side)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_same_bits_every_time(kind):
    module, arguments = layer(kind), batch(kind, 40, 70)
    first = gradients(module, *arguments)
    for _ in range(10):
        for ours, theirs in zip(gradients(module, *arguments), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(kind):
    module, (x, lengths, mask) = layer(kind), batch(kind)
    expected = gradients(module, x, lengths, mask)
    module, x, lengths, mask = (
        v if v is None else v.to("cuda:1") for v in (module, x, lengths, mask)
    )
    got = gradients(module, x, lengths, mask)
    assert torch.cuda.current_device() == device.DEVICE.index
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu())


def test_memory_comes_from_torch(kind):
    """What a call leaves behind is what its results need; scratch goes back to torch."""
    module, (x, lengths, _) = layer(kind), batch(kind)
    with torch.no_grad():
        for _ in range(2):  # what is kept once, such as the plan's facts, is there after one
            kept = module(x, lengths=lengths)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(5):
            kept = module(x, lengths=lengths)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
    assert kept[0].is_cuda


def test_lengths_out_of_range_fail_an_assertion_of_the_device():
    """In a process of its own: a failed assertion ends the use of the device."""
    import subprocess
    import sys

    code = (
        "import torch, lstm_ext\n"
        "m = lstm_ext.LSTM(3, 4).cuda()\n"
        "m(torch.zeros(2, 1, 3).cuda(), lengths=torch.tensor([5]).cuda())\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "lengths must lie between 0 and the number of steps, 2" in done.stderr + done.stdout


def test_the_engine_is_there():
    assert "cuda" in ops._engines
    assert ops.has_native_kernels(device.DEVICE)
