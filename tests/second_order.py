"""What tests of second derivatives and of forward mode share: a layer, directions for its inputs
and gradients, and the same by the reference. The fixture ``ways`` is in conftest.py."""

from __future__ import annotations

import device
import torch
from device import here
from tolerances import tol
from torch.func import vjp

from lstm_ext import layer
from lstm_ext.ops import Direction, LayerWeights
from lstm_ext.steps import Steps
from lstm_ext.torch_engine import reference_layer

F64, F32 = torch.float64, torch.float32
NAMES = ("h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


def make_steps(kind, T, B):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    lengths[1:2] = 0
    resets = torch.rand(T, B, generator=generator) < 0.2
    on = {"device": device.DEVICE}
    if kind == "packed":
        sizes = torch.randint(1, B + 1, (T,), generator=generator).sort(descending=True).values
        sizes[0] = B
        return Steps.packed(sizes, int(sizes.sum()), **on)
    made = {
        "whole": {},
        "batch_first": {"batch_first": True},
        "lengths": {"lengths": lengths},
        "resets": {"reset_mask": resets},
        "both": {"batch_first": True, "lengths": lengths, "reset_mask": resets.T},
    }
    return Steps.padded(T, B, **made[kind], **on)


class Problem:
    """A layer's inputs, the cotangents of its outputs, and directions for both."""

    def __init__(self, steps, I, H, proj=0, directions=1, bias=True, dtype=F64):
        generator = torch.Generator().manual_seed(1)

        def draw(*size):
            drawn = torch.randn(*size, generator=generator, dtype=F64)
            if size[0] in (4 * H, P):  # weights: larger ones make errors grow from step to step
                drawn /= H**0.5
            return here(drawn.to(dtype))

        self.steps, P = steps, proj or H
        sizes = [(steps.B, P), (steps.B, H), (4 * H, I), (4 * H, P)]
        sizes += [(4 * H,), (4 * H,)] * bias
        self.names = ["x"]
        self.inputs = [draw(steps.rows, I)]
        self.bias, self.proj, self.directions = bias, proj, directions
        for k in range(directions):
            own = [name for name in NAMES if (bias or name[0] != "b") and (proj or name != "w_hr")]
            self.names += [f"{name}_{k}" for name in own]
            self.inputs += [draw(*size) for size in [*sizes, *[(P, H)] * bool(proj)]]
        outputs = [(steps.rows, directions * P), (steps.rows, directions * H)]
        outputs += [(steps.B, P)] * directions + [(steps.B, H)] * directions
        self.cotangents = [draw(*size) for size in outputs]
        self.v = [draw(*t.shape) for t in self.inputs]
        self.d_dot = [draw(*t.shape) for t in self.cotangents]

    def arranged(self, inputs):
        x, *flat = inputs
        size, directions = len(flat) // self.directions, []
        for k in range(self.directions):
            h0, c0, w_ih, w_hh, *more = flat[k * size : (k + 1) * size]
            b_ih, b_hh = (more.pop(0), more.pop(0)) if self.bias else (None, None)
            weights = LayerWeights(w_ih, w_hh, b_ih, b_hh, *more)
            directions.append(Direction(h0, c0, weights, k == 1))
        return x, directions

    def second(
        self, run, dtype=None, given=None, used=(0, 1, 2, 3, 4, 5), wanted=None, memory=None
    ):
        """Gradients of v^T g by every input and cotangent; g: gradients of the ``given`` inputs.

        used: which outputs the loss sees. wanted: indices of what is differentiated by, inputs
        and then cotangents; None: all. memory: a function that lays out a tensor otherwise.
        """
        memory = memory or (lambda tensor: tensor)

        def leaves(tensors):
            return [memory(t.detach().to(dtype or t.dtype)).requires_grad_() for t in tensors]

        inputs, cotangents = leaves(self.inputs), leaves(self.cotangents)
        result = run(*self.arranged(inputs), self.steps)
        outputs = [result.y, result.cells, *result.h_n, *result.c_n]
        pairs = [(outputs[k], cotangents[k]) for k in range(len(outputs)) if k in used]
        pairs = [(out, by) for out, by in pairs if out is not None]
        given = range(len(inputs)) if given is None else given
        first = torch.autograd.grad(
            [out for out, _ in pairs],
            [inputs[k] for k in given],
            [by for _, by in pairs],
            create_graph=True,
        )
        every = [*inputs, *cotangents]
        return torch.autograd.grad(
            first,
            every if wanted is None else [every[k] for k in wanted],
            [memory(self.v[k].to(g.dtype)) for k, g in zip(given, first, strict=True)],
            allow_unused=True,
            materialize_grads=True,
        )

    def outputs(self, run):
        """As a function of the inputs."""

        def of(*inputs):
            result = run(*self.arranged(inputs), self.steps)
            return result.y, result.cells, *result.h_n, *result.c_n

        return of

    def gradients(self, run):
        """As a function of the inputs and the cotangents."""

        def of(*tensors):
            n = len(self.inputs)
            return vjp(self.outputs(run), *tensors[:n])[1](tuple(tensors[n:]))

        return of


def by_layer(x, directions, steps, cells=True):
    return layer.lstm_layer(x, directions, steps, cells=cells)


def by_reference(x, directions, steps, cells=True):
    return reference_layer(x, directions, steps, cells=cells)


def assert_near(found, expected, names=None):
    for one, true, name in zip(found, expected, names or [""] * len(found), strict=True):
        scale = max(1.0, true.abs().max().item()) if true.numel() else 1.0
        torch.testing.assert_close(
            one / scale, true / scale, **tol(one.dtype), msg=lambda m, name=name: f"{name}: {m}"
        )


KINDS = ["whole", "batch_first", "lengths", "resets", "both", "packed"]


def gradient_penalty(module, x, **kwargs):
    (g,) = torch.autograd.grad(module(x, **kwargs)[0].sum(), x, create_graph=True)
    return g.square().sum()
