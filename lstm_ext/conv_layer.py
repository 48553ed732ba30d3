"""One layer of a ConvLSTM: the convolutions and the loop over the steps.

Everything lies channels last inside: a convolution leaves the four gates of a pixel side by side,
as the fused cell (:mod:`pointwise`) wants them, and no step transposes anything.

Letters: T steps, N sequences, C hidden channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from lstm_ext.engine import acc_dtype
from lstm_ext.pointwise import lstm_cell
from lstm_ext.steps import Steps


class ConvWeights(NamedTuple):
    """Weights of one layer, gates in the order i, f, g, o; k is the kernel's size."""

    w_ih: Tensor  # (4C, in, *k)
    w_hh: Tensor  # (4C, C, *k)
    b_ih: Tensor | None  # (4C)
    b_hh: Tensor | None  # (4C)
    w_ch: Tensor | None  # (3C), rows i, f, o


class Window(NamedTuple):
    """How a kernel moves over its input, a number a dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str  # or "same"
    dilation: tuple[int, ...]

    def pads(self, size: Sequence[int]) -> list[tuple[int, int]]:
        """Zeros before and after each dimension of an input of that size.

        "same": so many that the output has ceil(size / stride), the odd one after (TensorFlow's
        rule, and torch's where the stride is 1).
        """
        if self.padding != "same":
            return [(p, p) for p in self.padding]
        pads = []
        for n, k, s, d in zip(size, self.kernel, self.stride, self.dilation, strict=True):
            total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            pads.append((total // 2, total - total // 2))
        return pads

    def output(self, size: Sequence[int]) -> tuple[int, ...]:
        """Size of the output for an input of that size.

        Raises:
            RuntimeError: the input is smaller than the kernel.
        """
        pads, result = self.pads(size), []
        for n, k, s, d, (before, after) in zip(
            size, self.kernel, self.stride, self.dilation, pads, strict=True
        ):
            span = n + before + after - d * (k - 1) - 1
            if n < 1 or span < 0:
                raise RuntimeError(
                    f"input of size {tuple(size)} with padding {self.padding} is too small for "
                    f"kernel size {self.kernel} and dilation {self.dilation}"
                )
            result.append(span // s + 1)
        return tuple(result)

    def convolution(self, w: Tensor, size: Sequence[int]) -> Convolution:
        """Of images (N, in, *size) with w (out, in, *kernel); gives (N, out, *output)."""
        pads = self.pads(size)
        even = all(before == after for before, after in pads)
        padding = [before for before, _ in pads] if even else [0] * len(pads)
        stride, dilation = list(self.stride), list(self.dilation)
        row = len(pads) == 1
        if row:  # as an image one pixel high: torch has no channels last in one dimension
            w = w.unsqueeze(2)
            stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
        # A weight that lies channels last makes the output lie so, whatever the input's format.
        # vmap knows no formats.
        if peek_interpreter_stack() is None:
            w = w.contiguous(
                memory_format=torch.channels_last if w.dim() == 4 else torch.channels_last_3d
            )
        unequal = None if even else [n for pair in reversed(pads) for n in pair]
        product = even and not any(padding) and all(n == 1 for n in (*stride, *w.shape[2:]))
        return Convolution(w, stride, padding, dilation, unequal, row, product)


class Convolution(NamedTuple):
    """A window's, made once for all steps: a weight is copied to lie channels last."""

    w: Tensor
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    unequal: list[int] | None  # zeros that F.pad adds before
    row: bool  # images are rows of pixels
    # A pixel of the output is made of one of the input: a product of matrices, which leaves the
    # channels last, as no weight of one pixel tells a convolution to.
    product: bool

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (N, in, *size), bias (out)."""
        w, stride, padding, dilation, unequal, row, product = self
        if product:
            y = F.linear(x.movedim(1, -1), w.flatten(1), bias)
            return y.movedim(-1, 1)
        if unequal is not None:
            x = F.pad(x, unequal)
        if row:
            x = x.unsqueeze(2)
        convolve = F.conv2d if w.dim() == 4 else F.conv3d
        y = convolve(x, w, bias, stride, padding, dilation)
        return y.squeeze(2) if row else y


def _pixels(x: Tensor) -> Tensor:
    """(N, C, *size) as (N * pixels, C)."""
    return x.movedim(1, -1).reshape(-1, x.size(1))


class Walk(NamedTuple):
    """What the layers share of a batch: its sequences' ends and the layout of the output."""

    steps: Steps  # T steps of N sequences
    pixels: list[Steps]  # per step: which of the N * pixels rows take it
    batch_first: bool

    @staticmethod
    def of(steps: Steps, pixels: int, batch_first: bool) -> Walk:
        rows = steps.B * pixels
        if steps.lengths is None:
            return Walk(steps, [Steps.padded(1, rows)] * steps.T, batch_first)
        on = steps.active().to(torch.int64).repeat_interleave(pixels, dim=1)  # (T, rows)
        each = [Steps(1, rows, rows=rows, lengths=row) for row in on.unbind(0)]
        return Walk(steps, each, batch_first)

    def mask(self, x: Tensor) -> Tensor:
        """x, whose first two dimensions are time and batch, with zeros past each sequence's end."""
        if self.steps.lengths is None:
            return x
        on = self.steps.active()
        on = on.T if self.batch_first else on
        return torch.where(on.view(*on.shape, *[1] * (x.dim() - 2)), x, 0)


def conv_lstm_layer(
    x: Tensor, h0: Tensor, c0: Tensor, w: ConvWeights, window: Window, walk: Walk
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer.

    Args:
        x: (T, N, in, *size), or (N, T, in, *size) with batch_first.
        h0, c0: (N, C, *output).
        window: of the input's convolution.

    Returns:
        Output shaped as x with C and the output's size, h_n and c_n (N, C, *output).
    """
    dtype, acc, (N, C, *size) = x.dtype, acc_dtype(x.dtype), h0.shape
    # Half types compute in float32 on the CPU, as the LSTM does.
    within = acc if x.device.type == "cpu" else dtype
    w = ConvWeights(*(t if t is None else t.to(within) for t in w))
    bias = w.b_ih if w.b_ih is None else w.b_ih + w.b_hh
    time, batch = (1, 0) if walk.batch_first else (0, 1)
    T = x.size(time)
    of_input = window.convolution(w.w_ih, x.shape[3:])
    gx = _pixels(of_input(x.flatten(0, 1).to(within), bias)).to(acc)
    gx = gx.view(*x.shape[:2], math.prod(size), 4 * C)
    if T == 0:  # no numbers, but a place in the graph
        y = gx[..., :C].to(dtype).reshape(*x.shape[:2], *size, C)
        return y.movedim(-1, 2), h0, c0
    gx = gx.unbind(time)  # T of (N, pixels, 4C)
    ones = (1,) * len(size)
    recurrent = Window(window.kernel, ones, "same", ones).convolution(w.w_hh, size)
    h, c = _pixels(h0).to(acc), _pixels(c0).to(acc)
    w_ch = None if w.w_ch is None else w.w_ch.to(acc)
    outputs = []
    for t in range(T):
        # The recurrence goes on with h as the user sees it: rounded to its dtype.
        image = h.to(dtype).to(within).view(N, *size, C).movedim(-1, 1)
        a = gx[t].flatten(0, 1) + _pixels(recurrent(image)).to(acc)
        h, c = lstm_cell(a, h, c, walk.pixels[t], w_ch)
        outputs.append(h.to(dtype).view(N, *size, C))
    y = torch.stack(outputs, dim=time)
    h, c = (s.to(dtype).view(N, *size, C).movedim(-1, 1) for s in (h, c))
    return walk.mask(y.movedim(-1, 2)), h, c
