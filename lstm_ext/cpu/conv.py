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
# forward 0.5 to 0.9 of it, and with six times as many, of up to 64 pixels in all images or of a
# single step, 0.8 to 0.95; backward 0.4 to 0.9. Above, copies of what kernels see take longer than
# they save, the sooner the more threads. Layers of 8 to 128 channels, 4x4 to 64x64 pixels, one and
# two threads (Zen 4).
_FEW_PRODUCTS = 10_000_000
_FEW_PRODUCTS_BACK = 5_000_000
_FEW_ROWS, _MORE_PRODUCTS = 64, 60_000_000
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
    def state_strides(self) -> tuple[int, ...]:
        """Of (N, C, *output) that lies channels last."""
        pixels = [self.C]
        for n in self.output[::-1]:
            pixels.append(pixels[-1] * n)
        return (pixels[-1], 1, *pixels[-2::-1])

    def is_few_products(self, forward: bool) -> bool:
        """Whether a step has so few that the core, which copies what the kernel sees at each pixel,
        takes less time than a library's convolutions."""
        count = self.rows * self.kernel_size * (self.inputs + self.C) * 4 * self.C
        if not forward:
            return count <= _FEW_PRODUCTS_BACK
        few = self.T == 1 or self.rows <= _FEW_ROWS
        return count <= (_MORE_PRODUCTS if few else _FEW_PRODUCTS)


@functools.lru_cache(maxsize=256)
def _windows(call: Call) -> tuple[Any, Any]:
    """Of the input's and the recurrent convolution."""
    none = 3 - len(call.size)  # dimensions that there are not

    def made(window: Window, size: tuple[int, ...], channels: int) -> Any:
        before = [pad for pad, _ in window.pads(size)]
        ones = [1] * none
        # fmt: off
        return _C.ConvWindow(
            [*ones, *size], [*ones, *call.output], [*ones, *window.kernel],
            [*ones, *window.stride], [0] * none + before, [*ones, *window.dilation], channels,
        )
        # fmt: on

    of_states = made(call.window.of_states(), call.output, call.C)
    return made(call.window, call.size, call.inputs), of_states


def _laid_out(images: Tensor, channels: int) -> tuple[Tensor, bool]:
    """Images as they lie in memory, and whether the channels, that dimension, come first there. Of
    few numbers it takes torch longer than the core to lay them out otherwise."""
    if images.is_contiguous():
        return images, True
    if images.movedim(channels, -1).is_contiguous():
        return images, False
    return images.contiguous(), True


def _layer(
    call: Call,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    more_bias: Tensor | None = None,
    w_ch: Tensor | None = None,
) -> tuple[Any, list[Any]]:
    """The core's, and the tensors whose memory it has."""
    x, x_first = _laid_out(x, 2 if x.dim() == len(call.size) + 3 else 1)
    kept = [x, w_ih.contiguous(), w_hh.contiguous()]
    kept += [t if t is None else t.contiguous() for t in (bias, more_bias, w_ch)]
    # fmt: off
    made = _C.CpuConv(
        DTYPE_CODE[x.dtype], torch.get_num_threads(), call.T, call.N, call.C, call.reverse,
        *_windows(call), x, x_first, *kept[1:],
    )
    # fmt: on
    return made, kept


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
) -> None:
    """All steps. x (T, N, in, *size), or of one step (N, in, *size); h0 and c0 (N, C, *output);
    weights: w_ih, w_hh, bias, what is added to it, and w_ch. Written are h_n and c_n, whose memory
    is (rows, C), and if they are given h_first, h_out, c_seq and gates, as
    :func:`conv_layer.on_cells` has them."""
    made, kept = _layer(call, x, *weights)
    (h0, h0_first), (c0, c0_first) = _laid_out(h0, 1), _laid_out(c0, 1)
    memories = 2 if c_seq is None else c_seq.size(0)
    recorded(made.forward)(
        *(h0, h0_first, c0, c0_first, h_first, h_out, c_seq, memories, gates, h_n, c_n),
        cpu_products.workspace,
    )
    del kept


def backward(
    call: Call,
    wanted: Sequence[bool],
    tensors: Sequence[Any],
    gates: Tensor,
    h_seq: Tensor,
    c_seq: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of the layer's tensors, None where not wanted; of h0 and c0 (rows, C).

    wanted, tensors: as of :func:`conv_layer.gradients`. dy (T, rows, C), dh_n and dc_n (rows, C):
    None for zero.
    """
    x, w_ih, _, w_hh, _, _, w_ch = tensors
    of_x, of_w_ih, of_bias, of_w_hh, of_h0, _, of_w_ch = wanted
    rows, C, new = call.rows, call.C, gates.new_empty
    made, kept = _layer(call, x, w_ih, w_hh, w_ch=w_ch)
    width = call.kernel_size * (call.inputs + C)
    at_once = max(1, min(call.T, _COLUMNS // (rows * width)))
    dh = gates.new_zeros(rows, C) if dh_n is None else dh_n.clone()
    dc = new(2, rows, C)
    dc[0] = 0 if dc_n is None else dc_n
    dw_ih = new(w_ih.shape) if of_w_ih else None
    dw_hh = new(w_hh.shape) if of_w_hh else None
    dbias = new(2, 4 * C) if of_w_ih or of_w_hh or of_bias else None
    dw_ch = None if w_ch is None else gates.new_zeros(rows, 3 * C)
    dx = new(call.T, call.N, *call.size, call.inputs) if of_x else None
    last = recorded(made.backward)(
        *(gates, h_seq, c_seq, dy, at_once, of_h0, dx, dh, dc, dw_ih, dw_hh, dbias, dw_ch),
        cpu_products.workspace,
    )
    del kept
    return (
        None if dx is None else dx.movedim(-1, 2),
        dw_ih,
        dbias[0] if of_bias else None,
        dw_hh,
        dh,
        dc[last].clone(),  # alone in memory, as an operator's results are to be
        dw_ch.sum(0) if of_w_ch else None,
    )
