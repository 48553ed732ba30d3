"""What is differentiated, saved and computed; first and second derivatives."""

import device
import pytest
import torch
from device import here, leaf, without_cudnn
from layers import lstm_layer
from tolerances import tol
from torch import nn

import lstm_ext
from lstm_ext import ops, reference
from lstm_ext.ops import LayerWeights
from lstm_ext.steps import Steps

T, B, I, H, P = 3, 2, 2, 3, 2
F64 = {"dtype": torch.float64}
ON = {"device": device.DEVICE}


def _lengths():
    return {"lengths": torch.tensor([1, 3])}


def _resets():
    return {"reset_mask": torch.tensor([[False, True], [True, False], [False, False]])}


STEPS = {
    "plain": lambda: Steps.padded(T, B, **ON),
    "batch_first": lambda: Steps.padded(T, B, batch_first=True, **ON),
    "lengths": lambda: Steps.padded(T, B, **_lengths(), **ON),
    "zero_length": lambda: Steps.padded(T, B, lengths=torch.tensor([0, 2]), **ON),
    "resets": lambda: Steps.padded(T, B, **_resets(), **ON),
    "lengths_resets": lambda: Steps.padded(T, B, **_lengths(), **_resets(), **ON),
    "packed": lambda: Steps.packed(torch.tensor([2, 2, 1]), 5, **ON),
    "one_step": lambda: Steps.padded(1, B, reset_mask=torch.tensor([[False, True]]), **ON),
}


def _inputs(steps, proj):
    """x, h0, c0, w_ih, w_hh, b_ih, b_hh and, with a projection, w_hr."""
    p = P if proj else H
    sizes = [(steps.rows, I), (B, p), (B, H), (4 * H, I), (4 * H, p), (4 * H,), (4 * H,)]
    sizes += [(P, H)] * proj
    return [leaf(torch.randn(size, **F64)) for size in sizes]


def _function(steps, reverse, cells=True):
    def run(x, h0, c0, *weights):
        outputs = lstm_layer(x, h0, c0, LayerWeights(*weights), steps, reverse=reverse, cells=cells)
        return outputs if cells else outputs[:3]

    return run


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("proj", [False, True], ids=["plain", "proj"])
@pytest.mark.parametrize("name", STEPS)
def test_gradcheck(name, proj, reverse):
    steps = STEPS[name]()
    assert torch.autograd.gradcheck(_function(steps, reverse), _inputs(steps, proj))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("proj", [False, True], ids=["plain", "proj"])
@pytest.mark.parametrize("name", STEPS)
def test_gradgradcheck(name, proj, reverse):
    steps = STEPS[name]()
    assert torch.autograd.gradgradcheck(
        _function(steps, reverse), _inputs(steps, proj), fast_mode=True
    )


def test_gradgradcheck_element_by_element():
    steps = STEPS["plain"]()
    assert torch.autograd.gradgradcheck(_function(steps, False, cells=False), _inputs(steps, False))


def test_third_derivative():
    def f(module, x):
        y = module(x)[0].sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(second.pow(2).sum(), [x, *module.parameters()])

    module = here(lstm_ext.LSTM(I, H, **F64))
    x = leaf(torch.randn(T, B, I, **F64))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = module

        def forward(self, x):
            return reference.lstm(x, None, self.lstm.all_weights)

    for ours, plain in zip(f(module, x), f(Plain(), x), strict=True):
        torch.testing.assert_close(ours, plain, **tol(torch.float64))


def test_second_derivative_when_a_weight_depends_on_the_input():
    """A gradient by x must not run through a weight that was computed from x, and vice versa."""
    steps = STEPS["plain"]()
    x0 = here(torch.randn(steps.rows, I, **F64))
    h0, c0 = here(torch.randn(B, H, **F64)), here(torch.randn(B, H, **F64))
    w_hh, w = here(torch.randn(4 * H, H, **F64)), here(torch.randn(4 * H, steps.rows, **F64))

    def run(layer):
        x = x0.clone().requires_grad_()
        w_ih = w @ x
        y = layer(x, w_ih).pow(2).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    ours = run(lambda x, w_ih: lstm_layer(x, h0, c0, LayerWeights(w_ih, w_hh), steps)[0])
    plain = run(
        lambda x, w_ih: reference.lstm_layer(x.view(T, B, I), h0, c0, w_ih, w_hh)[0].view(-1, H)
    )
    torch.testing.assert_close(ours, plain, **tol(torch.float64))


def test_gradient_penalty_with_frozen_weights():
    module = here(lstm_ext.LSTM(I, H, 2, **F64)).requires_grad_(False)
    x = leaf(torch.randn(T, B, I, **F64))
    (first,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    (ours,) = torch.autograd.grad(first.pow(2).sum(), x)
    peer = module.to_torch()
    with without_cudnn():
        (first,) = torch.autograd.grad(peer(x)[0].sum(), x, create_graph=True)
        (theirs,) = torch.autograd.grad(first.pow(2).sum(), x)
    torch.testing.assert_close(ours, theirs, **tol(torch.float64))


WANTED = [pytest.param(8, index) for index in range(8)]
WANTED += [pytest.param(13, index) for index in range(13)]


@pytest.mark.parametrize("count, index", WANTED)
def test_only_what_is_wanted_is_computed(count, index, monkeypatch):
    """Of nn.LSTM's eight inputs of a layer and, with 13, of those that variants add."""
    steps = Steps.padded(T, B, **ON)
    variants = [leaf(torch.randn(n * H, **F64)) for n in (3, 4, 4, 1, 1)]
    inputs = [t.detach() for t in (*_inputs(steps, True), *variants[: count - 8])]
    inputs[index].requires_grad_()
    seen = []
    backward = ops.layer_backward

    def spy(*args, **kwargs):
        seen.append(backward(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(ops, "layer_backward", spy)
    y = _function(steps, False)(*inputs)[0]
    y.sum().backward()
    ((dx, (grads,)),) = seen
    assert [g is not None for g in (dx, *grads)] == [i == index for i in range(13)]
    assert inputs[index].grad.shape == inputs[index].shape


def test_nothing_is_saved_when_nothing_requires_grad(monkeypatch):
    calls = []
    forward = ops.layer_forward

    def spy(*args, **kwargs):
        calls.append(kwargs["save"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(ops, "layer_forward", spy)
    module = here(lstm_ext.LSTM(I, H, return_cell_sequence=True))  # not for the short way
    x = here(torch.randn(T, B, I))
    with torch.no_grad():
        assert module(x)[0].grad_fn is None
    with torch.inference_mode():
        module(x)
    module.requires_grad_(False)
    assert module(x)[0].grad_fn is None
    assert calls == [False] * 3
    module.requires_grad_(True)
    module(x)
    assert calls[-1] is True


def test_eval_mode_backward():
    module = here(lstm_ext.LSTM(I, H, 2, dropout=0.5)).eval()
    x = leaf(torch.randn(T, B, I))
    module(x)[0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_saved_tensors_are_version_checked():
    module = here(lstm_ext.LSTM(I, H))
    y, _ = module(here(torch.randn(T, B, I)))
    with torch.no_grad():
        module.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("write", ["inplace", "data", "optimizer", "replace"])
def test_no_stale_weights(write):
    module = here(lstm_ext.LSTM(I, H, **F64))
    x = here(torch.randn(T, B, I, **F64))
    before = module(x)[0]
    if write == "inplace":
        with torch.no_grad():
            module.weight_hh_l0.mul_(2)
    elif write == "data":
        module.weight_hh_l0.data.mul_(2)
    elif write == "optimizer":
        before.sum().backward()
        torch.optim.SGD(module.parameters(), 0.5).step()
    else:
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach() * 2)
    after = module(x)[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, module.to_torch()(x)[0], **tol(torch.float64))


def test_backward_twice_with_retain_graph():
    module = here(lstm_ext.LSTM(I, H))
    y = module(here(torch.randn(T, B, I)))[0].sum()
    first = torch.autograd.grad(y, list(module.parameters()), retain_graph=True)
    again = torch.autograd.grad(y, list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_outputs_do_not_share_memory():
    module = here(lstm_ext.LSTM(I, H))
    y, (h_n, c_n) = module(here(torch.randn(T, B, I)))
    with torch.no_grad():
        h_n.zero_()
        c_n.zero_()
    assert y[-1].abs().sum() > 0


def test_gradient_of_expanded_and_strided_cotangents():
    module = here(lstm_ext.LSTM(I, H, **F64))
    x = here(torch.randn(T, B, I, **F64))
    wide = here(torch.randn(T, B, 2 * H, **F64))
    for cotangent in (here(torch.ones(1, **F64)).expand(T, B, H), wide[:, :, ::2], wide[:, :, H:]):
        ours = torch.autograd.grad(module(x)[0], list(module.parameters()), cotangent)
        theirs = torch.autograd.grad(
            module(x)[0], list(module.parameters()), cotangent.contiguous()
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_everything_together(dtype):
    module = here(lstm_ext.LSTM(I, H, 2, bidirectional=True))
    x = leaf(torch.randn(T, B, I))
    with torch.autocast(device.DEVICE.type, dtype=dtype):
        y, (h_n, c_n) = module(x)
    assert y.dtype == h_n.dtype == c_n.dtype == dtype
    plain = here(lstm_ext.LSTM(I, H, 2, bidirectional=True))
    plain.load_state_dict(module.state_dict())
    assert torch.equal(y, plain.to(dtype)(x.to(dtype))[0])
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
