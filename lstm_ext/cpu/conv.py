"""A ConvLSTM's layer on the native core's CPU kernels, all of its steps in one call, where that
takes less time than a library's convolutions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_ext.convolutions import Window
from lstm_ext.cpu import products as cpu_products
from lstm_ext.engine import DTYPE_CODE
from lstm_ext.native import _C
from lstm_ext.profiling import recorded

# Up to so many multiplications of a step the core takes less time than a library's convolutions:
# forward 0.5 to 0.9 of it, backward 0.4 to 0.9; and with six times as many, either way, of up to 64
# pixels in all images 0.5 to 1.0. Above, copies of what kernels see take longer than they save, the
# sooner the more threads. Layers of 8 to 128 channels, 4x4 to 64x64 pixels, one and two threads
# (Zen 4).
_FEW_PRODUCTS = 10_000_000
_FEW_PRODUCTS_BACK = 5_000_000
_FEW_ROWS, _MORE_PRODUCTS = 64, 60_000_000
# A single step: the time of a loop over nn.Conv2d over that of one over a cell, by the core and by
# the library, three steps and backward: 16 channels of 32x32 pixels 1.01 and 0.96, of 16x16, N 4
# 0.98 both, 32 of 16x16, N 4 0.91 and 1.03, 8 of 64x64 0.73 and 0.99; inference of 8 of 32x32 0.89
# and 1.14.
_FEW_ROWS_OF_A_STEP, _FEW_PRODUCTS_OF_A_STEP = 1024, 20_000_000
# Beside convolutions of bfloat16 0.3 to 0.8 of their time, 1.0 with twice as many; of more pixels,
# 1024, 1.3 already.
_FEW_PRODUCTS_HALF = 5_000_000
_FEW_ROWS_HALF = 512
# Numbers of what kernels see, in memory at once for the products of the weights' gradients.
_COLUMNS = 1 << 20


class Call(NamedTuple):
    """What a layer is but for its tensors."""

    window: Window  # of the input's convolution
    reverse: bool
    T: int
    N: int
    inputs: int
    C: int
    size: tuple[int, ...]  # of the input
    output: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Pixels of a step's states."""
        return self.N * math.prod(self.output)

    @property
    def kernel_size(self) -> int:
        """Its pixels."""
        return math.prod(self.window.kernel)

    @property
    def weights(self) -> int:
        """Numbers in W_ih and W_hh."""
        return 4 * self.C * (self.inputs + self.C) * self.kernel_size

    def weight_size(self, channels: int) -> tuple[int, ...]:
        return 4 * self.C, channels, *self.window.kernel

    @property
    def state_strides(self) -> tuple[int, ...]:
        """Of (N, C, *output) that lies channels last."""
        pixels = [self.C]
        for n in self.output[::-1]:
            pixels.append(pixels[-1] * n)
        return (pixels[-1], 1, *pixels[-2::-1])

    @property
    def are_few_rows(self) -> bool:
        """For so many channels: the core's vectors are of channels, those of planes always full."""
        return self.rows <= _FEW_ROWS * self.C

    def is_few_products(self, forward: bool, half: bool = False) -> bool:
        """Whether a step has so few that the core, which copies what the kernel sees at each pixel,
        takes less time than a library's convolutions; ``half``: than those of bfloat16."""
        count = self.rows * self.weights
        if half:
            return count <= _FEW_PRODUCTS_HALF and self.rows <= _FEW_ROWS_HALF
        if self.rows <= _FEW_ROWS:
            return count <= _MORE_PRODUCTS
        if self.T == 1:
            few = self.rows <= _FEW_ROWS_OF_A_STEP and self.are_few_rows
            return few and count <= _FEW_PRODUCTS_OF_A_STEP
        return count <= (_FEW_PRODUCTS if forward else _FEW_PRODUCTS_BACK)


class Masks(NamedTuple):
    """bool (T, N): which sequences take a step, and whose state is zero before it; None: all, and
    none. What one that takes no step puts out is anything."""

    on: Tensor | None
    reset: Tensor | None


NO_MASKS = Masks(None, None)


@functools.lru_cache(maxsize=256)
def core_window(
    window: Window, size: tuple[int, ...], output: tuple[int, ...], channels: int
) -> Any:
    """The core's, over images of that size and so many channels."""
    before = [pad for pad, _ in window.pads(size)]
    ones = [1] * (3 - len(size))  # of dimensions that there are not
    # fmt: off
    return _C.ConvWindow(
        [*ones, *size], [*ones, *output], [*ones, *window.kernel],
        [*ones, *window.stride], [0] * len(ones) + before, [*ones, *window.dilation], channels,
    )
    # fmt: on


def _laid_out(images: Tensor, channels: int) -> tuple[Tensor, bool]:
    """Images, or weights, as they lie in memory, and whether the channels, that dimension, come
    first there. Of few numbers it takes torch longer than the core to lay them out otherwise."""
    if images.is_contiguous():
        return images, True
    if images.movedim(channels, -1).is_contiguous():
        return images, False
    return images.contiguous(), True


def _layer(
    call: Call,
    x: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor | None,
    bias: Tensor | None = None,
    more_bias: Tensor | None = None,
    w_ch: Tensor | None = None,
    masks: Masks = NO_MASKS,
    h_dtype: torch.dtype | None = None,
) -> tuple[Any, list[Any]]:
    """The core's, and the tensors whose memory it has."""
    x, x_first = _laid_out(x, 2 if x.dim() == len(call.size) + 3 else 1)
    (w_ih, ih_first), (w_hh, hh_first) = (
        (None, True) if w is None else _laid_out(w, 1) for w in (w_ih, w_hh)
    )
    more = [t if t is None else t.contiguous() for t in (bias, more_bias, w_ch, *masks)]
    of_x, of_h, code = call.window, call.window.of_states(), DTYPE_CODE[x.dtype]
    # fmt: off
    made = _C.CpuConv(
        code, code if h_dtype is None else DTYPE_CODE[h_dtype], torch.get_num_threads(),
        call.T, call.N, call.C, call.reverse,
        core_window(of_x, call.size, call.output, call.inputs),
        core_window(of_h, call.output, call.output, call.C),
        x, x_first, w_ih, ih_first, w_hh, hh_first, *more,
    )
    # fmt: on
    return made, [x, w_ih, w_hh, more]


def forward(
    call: Call,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor | None],
    h_n: Tensor,
    c_n: Tensor,
    h_first: Tensor | None = None,
    h_out: Tensor | None = None,
    c_seq: Tensor | None = None,
    gates: Tensor | None = None,
    masks: Masks = NO_MASKS,
    h_dtype: torch.dtype | None = None,
) -> None:
    """All steps. x (T, N, in, *size), or of one step (N, in, *size); h0 and c0 (N, C, *output);
    weights: w_ih, w_hh, bias, what is added to it, and w_ch. Written are h_n and c_n, whose memory
    is (rows, C), and if they are given h_first, h_out, c_seq and gates, as
    :func:`conv_passes.on_cells` has them. h_dtype: to which h is rounded on its way to the next
    step; None: to none."""
    made, kept = _layer(call, x, *weights, masks, h_dtype)
    (h0, h0_first), (c0, c0_first) = _laid_out(h0, 1), _laid_out(c0, 1)
    memories = 2 if c_seq is None else c_seq.size(0)
    recorded(made.forward)(
        *(h0, h0_first, c0, c0_first, h_first, h_out, c_seq, memories, gates, h_n, c_n),
        cpu_products.workspace,
    )
    del kept


def backward(
    call: Call,
    of_x: bool,
    of_h0: bool,
    tensors: Sequence[Any],
    gates: Tensor,
    c_seq: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    masks: Masks = NO_MASKS,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """All steps back: the gradients of the gates before activation (T, rows, 4C), of x, None if
    not wanted, of h0, nothing if not wanted, and c0 (rows, C), and of w_ch.

    tensors: x, w_ih, w_hh and w_ch. dy (T, rows, C), dh_n and dc_n (rows, C): None for zero.
    """
    x, w_ih, w_hh, w_ch = tensors
    rows, C, new = call.rows, call.C, gates.new_empty
    made, kept = _layer(call, x, w_ih, w_hh, w_ch=w_ch, masks=masks)
    dgates = new(call.T, rows, 4 * C)
    dh = gates.new_zeros(rows, C) if dh_n is None else dh_n.clone()
    dc = new(2, rows, C)
    dc[0] = 0 if dc_n is None else dc_n
    dw_ch = None if w_ch is None else new(3 * C)
    dx = new(call.T, call.N, *call.size, call.inputs) if of_x else None
    last = recorded(made.backward)(
        gates, c_seq, dy, of_h0, dgates, dx, dh, dc, dw_ch, cpu_products.workspace
    )
    del kept
    return (
        dgates,
        None if dx is None else dx.movedim(-1, 2),
        dh,
        dc[last].clone(),  # alone in memory, as an operator's results are to be
        dw_ch,
    )


def weights_gradients(
    call: Call,
    of_w_ih: bool,
    of_w_hh: bool,
    x: Tensor,
    h_before: Tensor,
    dgates: Tensor,
    masks: Masks = NO_MASKS,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Of w_ih, w_hh, None where not wanted, and a bias, from those of the gates (T, rows, 4C).

    h_before (T, rows, C): before each step.
    """
    made, kept = _layer(call, x, None, None, masks=masks)
    width = call.kernel_size * (call.inputs + call.C)
    at_once = max(1, min(call.T, _COLUMNS // (call.rows * width)))
    dw_ih = dgates.new_empty(call.weight_size(call.inputs)) if of_w_ih else None
    dw_hh = dgates.new_empty(call.weight_size(call.C)) if of_w_hh else None
    dbias = dgates.new_empty(2, 4 * call.C)
    recorded(made.weights)(h_before, dgates, at_once, dw_ih, dw_hh, dbias, cpu_products.workspace)
    del kept
    return dw_ih, dw_hh, dbias[0]
