"""Small shapes through every option, on any device: few enough for compute-sanitizer to repeat.

`lstm_ext.LSTM` against reference.py only, since a sanitizer would also follow cuDNN's kernels.
"""

from types import SimpleNamespace

import device
import pytest
import torch
import torch.nn.functional as F
from device import here
from second_order import F32, F64, Problem, assert_near, by_layer, by_reference, make_steps
from tolerances import TF32_EPS, assert_as_good, tol

import lstm_ext
from lstm_ext import reference

pytestmark = [pytest.mark.sanitizer, pytest.mark.tf32]

T, I = 4, 8
OPTIONS = ["plain", "lengths", "resets", "projection", "zeros", "batch_first"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def extras(option, B):
    """lengths= and reset_mask= for an option; lengths on the device, the mask on the CPU."""
    if option == "lengths":
        return {"lengths": here(torch.tensor([3, 0, 4, 1, 2][:B]))}
    if option == "resets":
        mask = torch.rand(T, B, generator=torch.Generator().manual_seed(1)) < 0.4
        return {"reset_mask": mask}
    return {}


def rounded(t):
    """float32 to the nearest TF32 value, ties to even: 13 bits of the fraction go."""
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class TF32Linear(torch.autograd.Function):
    """F.linear whose products, forward and backward, have both factors rounded to TF32."""

    @staticmethod
    def forward(ctx, x, w, bias):
        ctx.save_for_backward(x, w)
        return F.linear(rounded(x), rounded(w), bias)

    @staticmethod
    def backward(ctx, grad):
        x, w = map(rounded, ctx.saved_tensors)
        rows = rounded(grad).flatten(0, -2)
        return rounded(grad) @ w, rows.T @ x.flatten(0, -2), grad.flatten(0, -2).sum(0)


def linear_in_tf32(x, w, bias=None):
    return TF32Linear.apply(x, w, x.new_zeros(w.size(0)) if bias is None else bias)


def test_rounding_to_tf32():
    eps = 2.0**-10
    values = torch.tensor(
        [1.0, 1 + eps, 1 + eps / 2, 1 + 1.5 * eps, 1 + 0.51 * eps, -1 - 0.4 * eps]
    )
    expected = torch.tensor([1.0, 1 + eps, 1.0, 1 + 2 * eps, 1 + eps, -1.0])
    assert torch.equal(rounded(values), expected)


def run(function, leaves, dtype):
    """Outputs of function(**leaves) and the gradients by all leaves, both converted to dtype."""
    leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
    outputs = function(**leaves)
    g = torch.Generator().manual_seed(2)
    loss = sum((o.double() * here(torch.randn(o.shape, generator=g))).sum() for o in outputs)
    return [o.detach() for o in outputs] + list(torch.autograd.grad(loss, list(leaves.values())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("H", [8, 40])
def test_both_directions(monkeypatch, H, B, option, dtype):
    module = lstm_ext.LSTM(
        I,
        H,
        bidirectional=True,
        batch_first=option == "batch_first",
        proj_size=4 if option == "projection" else 0,
        dtype=dtype,
    )
    P = module.proj_size or H
    options = extras(option, B)
    leaves = {"x": torch.randn(T, B, I)}
    if option != "zeros":  # no states are given
        leaves |= {"h0": torch.randn(2, B, P), "c0": torch.randn(2, B, H)}
    # Rounded once, so that every dtype starts from the same numbers.
    leaves = {name: here(leaf.to(dtype)) for name, leaf in leaves.items()}
    leaves |= {name: here(p.detach()) for name, p in module.named_parameters()}
    names = module._all_weights

    def turned(x):
        return x.transpose(0, 1) if module.batch_first else x

    def ours(x, h0=None, c0=None, **weights):
        hx = None if h0 is None else (h0, c0)
        y, hn = torch.func.functional_call(here(module), weights, (turned(x), hx), options)
        return turned(y), *hn

    def plain(x, h0=None, c0=None, **weights):
        layers = [[weights[name] for name in direction] for direction in names]
        hx = (x.new_zeros(2, B, P), x.new_zeros(2, B, H)) if h0 is None else (h0, c0)
        y, hn, _ = reference.lstm(x, hx, layers, bidirectional=True, **here(options))
        return y, *hn

    got = run(ours, leaves, dtype)
    truth = run(plain, leaves, torch.float64)
    as_tf32 = dtype == torch.float32 and device.tf32()
    if dtype in (torch.float64, torch.float32) and not as_tf32:
        for mine, exact in zip(got, truth, strict=True):
            limits = tol(dtype)
            limits["atol"] *= max(1.0, exact.abs().max().item())
            torch.testing.assert_close(mine.double(), exact, **limits)
        return
    if as_tf32:
        linear = SimpleNamespace(linear=linear_in_tf32, dropout=F.dropout)
        monkeypatch.setattr(reference, "F", linear)
    eps = TF32_EPS if as_tf32 else None
    for mine, peer, exact in zip(got, run(plain, leaves, dtype), truth, strict=True):
        assert_as_good(mine, peer, exact, eps=eps)


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["whole", "both", "packed"])
@pytest.mark.parametrize("proj", [0, 4], ids=["plain", "proj"])
def test_second_derivatives(proj, kind, dtype):
    problem = Problem(make_steps(kind, T, 5), I, 40, proj, 2, dtype=dtype)
    ours, truth = problem.second(by_layer), problem.second(by_reference, dtype=F64)
    if dtype == torch.bfloat16:
        peers = problem.second(by_reference)
        for mine, peer, exact in zip(ours, peers, truth, strict=True):
            assert_as_good(mine, peer, exact)
    elif dtype == F32 and device.tf32():
        for mine, exact in zip(ours, truth, strict=True):
            # In the emulator at most 2.4 roundings of the largest element.
            assert (mine - exact).abs().max() <= 8 * TF32_EPS * exact.abs().max()
    else:
        assert_near(ours, [t.to(dtype) for t in truth])
