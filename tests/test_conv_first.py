"""The steps of a ConvLSTM's cell by a library's convolutions, channels first, and the gradients of
large weights of many steps at once."""

import threading

import pytest
import torch
from device import leaf
from kept_steps import rows_kept
from test_conv_core import CELLS, F64, OPTIONS, SIZES, made
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

from lstm_ext import conv, conv_cell, conv_first, step_gradients
from lstm_ext.cpu import conv as cpu_conv

pytestmark = pytest.mark.cpu_only(reason="the CPU's short way")


@pytest.fixture
def found(monkeypatch):
    """A list with the rows of every step that was kept; no step is the core's."""
    monkeypatch.setattr(cpu_conv.Call, "is_few_products", lambda *_, **__: False)
    monkeypatch.setattr(conv_first, "MANY_WEIGHTS", 0)
    return rows_kept(monkeypatch)


def loop(cell, x, hx, steps=4):
    """Outputs and states of a few steps, and what makes a loss of them."""
    outputs, states = [], hx
    for k in range(steps):
        states = cell(x * (1 + k), states)
        outputs += states
    return outputs


def gradients(outputs, wanted, **options):
    loss = sum(
        (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in outputs
    )
    return torch.autograd.grad(loss, wanted, **options)


def the_other_way(monkeypatch):
    monkeypatch.setattr(conv, "short_step", lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dims", SIZES)
def test_as_the_other_way(dims, name, dtype, found, monkeypatch):
    cell = made(dims, name, dtype, cell=True)
    x = leaf(torch.randn(2, 3, *SIZES[dims], dtype=dtype))
    if name == "padding":  # in memory channels last
        x = leaf(torch.randn(2, *SIZES[dims], 3, dtype=dtype).movedim(-1, 1))
    hx = [leaf(torch.randn(cell(x)[0].shape, dtype=dtype)) for _ in "hc"]
    wanted = [x, *hx, *cell.parameters()]
    with torch.no_grad():
        plain = loop(cell, x, hx)
    got = loop(cell, x, hx)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    got += gradients(got, wanted)
    assert found == [hx[0][:, 0].numel()] * 3  # the first does not know of others yet
    the_other_way(monkeypatch)
    expected = loop(cell, x, hx)
    expected += gradients(expected, wanted)
    assert len(found) == 3
    for a, b in zip(got, expected, strict=True):
        scale = max(1, b.abs().max().item())
        limit = 1e-12 if dtype == F64 else 2e-5
        torch.testing.assert_close(a, b, rtol=0, atol=limit * scale)


@pytest.mark.parametrize("few", [0, 1 << 19])
@pytest.mark.parametrize("sizes", [(), (1, 1), (3, 1)])
def test_one_convolution_of_both(sizes, few, found, monkeypatch):
    """Padding in numbers that is "same", and such that is not."""
    kernel = sizes or (3, 3)
    cell = CELLS[2](2, 3, kernel, padding=tuple(k // 2 for k in kernel), dtype=F64)
    x, hx = leaf(torch.randn(2, 2, 4, 5, dtype=F64)), list(torch.randn(2, 2, 3, 4, 5, dtype=F64))
    monkeypatch.setattr(conv_first, "MANY_WEIGHTS", few)
    call = conv_cell._step(cell._attributes(), x.shape, F64, None).call
    assert (conv_first.both_moves(call) is not None) == bool(few)
    got = loop(cell, x, hx)
    got += gradients(got, [x])
    the_other_way(monkeypatch)
    expected = loop(cell, x, hx)
    expected += gradients(expected, [x])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rows", [1, 100, 10**6])
def test_gradients_of_some(rows, found, monkeypatch):
    """Of every subset of the parameters, products being made meanwhile or at last."""
    cell = made(2, "plain", F64, cell=True, peephole=True)
    x, hx = torch.randn(2, 3, 4, 5, dtype=F64), list(torch.randn(2, 2, 4, 4, 5, dtype=F64))
    monkeypatch.setattr(step_gradients, "MOST_ROWS", rows)
    parameters = list(cell.parameters())
    cases = []
    for subset in range(1, 2 ** len(parameters)):
        wanted = [p for k, p in enumerate(parameters) if subset >> k & 1]
        for p in parameters:
            p.requires_grad_(any(p is w for w in wanted))
        cases.append((wanted, gradients(loop(cell, x, hx), wanted)))
    assert bool(found) == (rows > 40)
    the_other_way(monkeypatch)
    for wanted, got in cases:
        for p in parameters:
            p.requires_grad_(any(p is w for w in wanted))
        torch.testing.assert_close(got, gradients(loop(cell, x, hx), wanted))


def test_images_of_other_sizes_and_windows(found, monkeypatch):
    """Steps that share weights but are not alike: products of each kind."""
    cell, wider = (CELLS[2](2, 3, 3, dtype=F64, dilation=d) for d in (1, 2))
    for name, parameter in cell.named_parameters():
        setattr(wider, name, parameter)
    x, small = torch.randn(2, 2, 4, 4, dtype=F64), torch.randn(2, 2, 2, 2, dtype=F64)

    def run():
        states, outputs = None, []
        for images, module in ((x, cell), (x, cell), (x, wider), (small, cell), (small, wider)):
            if images is small and states[0].size(2) == 4:
                states = [s[..., ::2, ::2] for s in states]
            states = module(images, states)
            outputs += states
        return gradients(outputs, list(cell.parameters()))

    got = run()
    assert found == [8, 8, 32, 32]  # backward, from the last; not the first step
    the_other_way(monkeypatch)
    torch.testing.assert_close(got, run())


def test_graphs(found, monkeypatch):
    """Gradients of gradients, in batches, of anomalies, twice, and of a step within others."""
    cell = made(2, "plain", F64, cell=True)
    x = leaf(torch.randn(1, 3, 3, 3, dtype=F64))
    wanted = [x, *cell.parameters()]

    def run():
        outputs, results = loop(cell, x, None), []
        first = gradients(outputs, wanted, create_graph=True)
        results += torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        outputs = loop(cell, x, None)
        for _ in range(2):
            results += gradients(outputs, wanted, retain_graph=True)
        losses = torch.stack([t.square().sum() for t in outputs])
        flags = torch.eye(len(outputs), dtype=F64)
        results += torch.autograd.grad(losses, wanted, flags, is_grads_batched=True)
        with torch.autograd.detect_anomaly(check_nan=True):
            results += gradients(loop(cell, x, None), wanted)
        return results

    got = run()
    assert found
    the_other_way(monkeypatch)
    for a, b in zip(got, run(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_autograd(backend, found, monkeypatch):
    cell = made(2, "plain", F64, cell=True)
    x = torch.randn(2, 3, 3, 4, dtype=F64)

    def run():
        cell.zero_grad()
        loss = sum(t.square().sum() for t in loop(cell, x, None))
        with compiled_autograd._enable(torch.compile(backend=backend)):
            loss.backward()
        return [w.grad for w in cell.parameters()]

    got = run()
    assert not found  # it adds up all that there is
    the_other_way(monkeypatch)
    torch.testing.assert_close(got, run())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_threads_and_some_steps_under_autocast(reentrant, found, monkeypatch):
    cell = made(2, "plain", torch.float32, cell=True)
    x = leaf(torch.randn(2, 3, 3, 4))
    wanted = [x, *cell.parameters()]

    def part(x, *states):
        return tuple(loop(cell, x, states or None))

    def in_parts(states=None):
        outputs = []
        for _ in range(2):
            outputs += checkpoint(part, x, *(states or ()), use_reentrant=reentrant)
            states = outputs[-2:]
        return outputs

    def of_two_dtypes():
        outputs, states = [], None
        for k in range(5):
            with torch.autocast("cpu", torch.bfloat16, enabled=k in (1, 2)):
                states = cell(x, None if states is None else [s.float() for s in states])
            outputs += [s.float() for s in states]
        return outputs

    def run(outputs):
        loss = sum(t.square().sum() for t in outputs)
        loss.backward()
        made = [w.grad.clone() for w in wanted]
        for w in wanted:
            w.grad = None
        return made

    def of_threads():
        states = loop(cell, x, None)
        thread = threading.Thread(target=lambda: states[-1].sum().backward(retain_graph=True))
        thread.start()
        thread.join()
        return states[:-1]

    cases = in_parts, of_two_dtypes, of_threads
    got = [run(case()) for case in cases]
    assert found
    the_other_way(monkeypatch)
    for case, ours in zip(cases, got, strict=True):
        limits = {"rtol": 0.02, "atol": 0.02} if case is of_two_dtypes else {}
        torch.testing.assert_close(ours, run(case()), **limits)


def test_what_is_read_later_changed_meanwhile(found):
    cell = made(2, "plain", F64, cell=True)
    x = [torch.randn(1, 3, 3, 3, dtype=F64) for _ in range(3)]

    def change_later(grad):
        x[2].zero_()

    states = None
    for k, images in enumerate(x):
        states = cell(images, states)
        if k == 1:
            states[0].register_hook(change_later)
    with pytest.raises(RuntimeError, match="an input or a state of an lstm_ext cell"):
        states[0].sum().backward()
    assert found


def test_states_may_be_changed(found):
    cell = made(2, "plain", F64, cell=True)
    x = leaf(torch.randn(2, 3, 6, 5, dtype=F64))
    expected = torch.autograd.grad(cell(x)[0].sum(), [x, cell.weight_ih])
    h, c = cell(x)
    assert h.untyped_storage().nbytes() == c.untyped_storage().nbytes() == 8 * h.numel()
    total = h.sum()
    with torch.no_grad():
        h.zero_()
        c.zero_()
    for a, b in zip(torch.autograd.grad(total, [x, cell.weight_ih]), expected, strict=True):
        assert torch.equal(a, b)


def test_which_steps_are_the_core_s():
    """And that channels last weights go the other way where a library's convolutions take them."""
    ways = []
    for channels, size in ((8, 8), (128, 4), (32, 32)):
        cell = CELLS[2](channels, channels, 3)
        x = leaf(torch.randn(1, channels, size, size))
        ways.append(cell(x)[0].grad_fn)
        cell.to(memory_format=torch.channels_last)
        ways.append(cell(x)[0].grad_fn)
    kinds = [getattr(node, "kind", None) for node in ways]
    assert [kind and kind.in_core for kind in kinds] == [True, True, False, None, False, None]


@pytest.mark.parametrize("few", [0, 1 << 19])
def test_gradients_whose_numbers_are_not_in_memory(few, found, monkeypatch):
    """Lazily negated ones, and zeros of forward mode."""
    monkeypatch.setattr(conv_first, "MANY_WEIGHTS", few)
    cell = made(2, "peephole", F64, cell=True)
    x = leaf(torch.randn(2, 3, 6, 5, dtype=F64))
    wanted = [x, *cell.parameters()]
    h, c = cell(x)
    ones, zero = torch.ones_like(h), torch._efficientzerotensor(h.shape, dtype=F64)
    expected = torch.autograd.grad((h, c), wanted, (-ones, -ones), retain_graph=True)
    negated = torch._neg_view(ones), torch._neg_view(ones)
    got = torch.autograd.grad((h, c), wanted, negated, retain_graph=True)
    torch.testing.assert_close(got, expected)
    expected = torch.autograd.grad(c, wanted, ones, retain_graph=True)
    got = torch.autograd.grad((h, c), wanted, (zero, ones))
    torch.testing.assert_close(got, expected)


def test_gradients_are_alone_in_memory_and_contiguous(monkeypatch):
    monkeypatch.setattr(cpu_conv.Call, "is_few_products", lambda *_, **__: False)
    cell = made(2, "plain", F64, cell=True)
    for N in (1, 2):
        x = leaf(torch.randn(N, 3, 6, 5, dtype=F64))
        hx = [leaf(torch.randn(N, 4, 6, 5, dtype=F64)) for _ in "hc"]
        wanted = [x, *hx, *cell.parameters()]
        for gradient in torch.autograd.grad(sum(s.sum() for s in cell(x, hx)), wanted):
            assert gradient.is_contiguous()
            assert gradient.untyped_storage().nbytes() == 8 * gradient.numel()
