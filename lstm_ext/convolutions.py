"""Convolutions of a ConvLSTM: sizes, padding, and the memory's layout, which is channels last.

So a convolution leaves the four gates of a pixel side by side, as the fused cell (:mod:`pointwise`)
wants them, and no step transposes anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack


def pixels_of(images: Tensor) -> Tensor:
    """(N, C, *size) as (N * pixels, C), contiguous: reshape alone does not see to that."""
    return images.movedim(1, -1).reshape(-1, images.size(1)).contiguous()


class Window(NamedTuple):
    """How a kernel moves over its input, a number a dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str  # or "same"
    dilation: tuple[int, ...]

    @property
    def reach(self) -> tuple[int, ...]:
        """How many pixels of the input an output's are spread over."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    def of_states(self) -> Window:
        """That of the recurrent convolution, which keeps the size."""
        ones = (1,) * len(self.kernel)
        return Window(self.kernel, ones, "same", ones)

    def pads(self, size: Sequence[int]) -> list[tuple[int, int]]:
        """Zeros before and after each dimension of an input of that size.

        "same": so many that the output has ceil(size / stride), the odd one after (TensorFlow's
        rule, and torch's where the stride is 1).
        """
        if self.padding != "same":
            return [(p, p) for p in self.padding]
        pads = []
        for n, r, s in zip(size, self.reach, self.stride, strict=True):
            total = max(((n + s - 1) // s - 1) * s + r - n, 0)
            pads.append((total // 2, total - total // 2))
        return pads

    def output(self, size: Sequence[int]) -> tuple[int, ...]:
        """Size of the output for an input of that size.

        Raises:
            RuntimeError: the input is smaller than the kernel.
        """
        pads, result = self.pads(size), []
        for n, r, s, (before, after) in zip(size, self.reach, self.stride, pads, strict=True):
            span = n + before + after - r
            if n < 1 or span < 0:
                raise RuntimeError(
                    f"input of size {tuple(size)} with padding {self.padding} is too small for "
                    f"kernel size {self.kernel} and dilation {self.dilation}"
                )
            # One quotient: of a sum with one, torch's default compiler fails to divide symbols.
            result.append((n + s - 1) // s if self.padding == "same" else (span + s) // s)
        return tuple(result)

    def moves(self, size: Sequence[int], channels: int) -> Moves:
        """What torch's convolution of images of that size, and so many channels, is told of it."""
        pads = self.pads(size)
        # What oneDNN is not to pad: it knows no unequal pads, and in volumes, with strides and few
        # pixels beside the kernel's, its gradients (3.x) are anything and write past the end.
        padded = any(before != after for before, after in pads)
        padded |= len(pads) == 3 and max(self.stride) > 1 and any(before for before, _ in pads)
        padding = [0] * len(pads) if padded else [before for before, _ in pads]
        # Of one pixel a dilation means nothing, and oneDNN has crashed on it.
        pairs = zip(self.kernel, self.dilation, strict=True)
        stride, dilation = list(self.stride), [d if k > 1 else 1 for k, d in pairs]
        # Channels last, oneDNN (3.x) has crashed where an output sees nothing but padding, and in
        # strides over one channel it has read elsewhere.
        first = any(p >= n for p, n in zip(padding, self.reach, strict=True))
        first |= channels == 1 and any(n > 1 for n in stride)
        row = len(pads) == 1
        if row:  # as an image one pixel high: torch has no channels last in one dimension
            stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
        zeros = [n for pair in reversed(pads) for n in pair] if padded else None
        return Moves(stride, padding, dilation, zeros, row, first)

    def convolution(self, w: Tensor, size: Sequence[int]) -> Convolution:
        """Of images (N, in, *size) with w (out, in, *kernel); gives (N, out, *output), which lies
        channels last, where it may."""
        moves = self.moves(size, w.size(1))
        first = moves.first
        if moves.row:
            w = w.unsqueeze(2)
        # A weight that lies channels last makes the output lie so, whatever the input's format: by
        # its strides, which contiguous() leaves as they are where there is one channel or the
        # kernel is one pixel. vmap knows no formats.
        if peek_interpreter_stack() is None:
            channels_last = torch.channels_last if w.dim() == 4 else torch.channels_last_3d
            ambiguous = w.size(1) == 1 or math.prod(self.kernel) == 1
            laid = w.clone if first or ambiguous else w.contiguous
            w = laid(memory_format=torch.contiguous_format if first else channels_last)
        return Convolution(w, *moves)


def input_window(
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
) -> Window:
    """That of a first layer's input, of a module's attributes."""
    return Window(kernel, stride, (0,) * len(kernel) if padding == "valid" else padding, dilation)


#: From how many calls, and how many elements, a weight is laid out for all of them.
_MANY, _LARGE = 3, 1 << 16


def _is_for_onednn(w: Tensor) -> bool:
    return (
        w.device.type == "cpu"
        and w.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


class Moves(NamedTuple):
    """How torch's convolution goes over images."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    zeros: list[int] | None  # that F.pad adds before
    row: bool  # images are rows of pixels
    first: bool  # images and weight must lie channels first

    def convolution(self, w: Tensor) -> Convolution:
        """With a contiguous w (out, in, *kernel): neither it nor contiguous images are copied, and
        the output lies channels first."""
        w = w.unsqueeze(2) if self.row else w
        # Copied, it has the strides of channels first, where there are others that are contiguous.
        w = w.clone(memory_format=torch.contiguous_format) if self.first else w.contiguous()
        return Convolution(w, *self)


class Convolution(NamedTuple):
    """A window's, made once for all steps: a weight is copied to lie channels last."""

    w: Tensor
    # As in Moves, whose order this is.
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    zeros: list[int] | None
    row: bool
    first: bool

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (N, in, *size), bias (out)."""
        w, stride, padding, dilation, _, row, _ = self
        x = self._images(x)
        convolve = F.conv2d if w.dim() == 4 else F.conv3d
        y = convolve(x, w, bias, stride, padding, dilation)
        return y.squeeze(2) if row else y

    def _images(self, x: Tensor) -> Tensor:
        """x as torch's convolution takes it."""
        if self.first and peek_interpreter_stack() is None:
            x = x.clone(memory_format=torch.contiguous_format)
        x = x if self.zeros is None else F.pad(x, self.zeros)
        return x.unsqueeze(2) if self.row else x

    def many(self, x: Tensor, count: int) -> Callable[[Tensor], Tensor]:
        """This function, without a graph, for so many images like x: where it pays, with the
        weight laid out as oneDNN wants it once, not at every call. Of 128 channels and 16 pixels
        that takes two fifths of the time."""
        w, stride, padding, dilation, *_ = self
        if count < _MANY or w.numel() < _LARGE or not _is_for_onednn(w):
            return self
        size = list(self._images(x).shape)
        laid_out = torch.ops.mkldnn._reorder_convolution_weight(
            w, padding, stride, dilation, 1, size
        )
        run, row = torch.ops.mkldnn._convolution_pointwise.default, self.row

        def convolve(x: Tensor) -> Tensor:
            images = self._images(x)
            y = run(images, laid_out, None, padding, stride, dilation, 1, "none", [], "")
            return y.squeeze(2) if row else y

        return convolve

    def gradients(
        self, g: Tensor, x: Tensor, of_x: bool, of_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of x (N, in, *size) and of the weight, None if not asked for, from g (N, out, *output),
        the output's."""
        w, stride, padding, dilation, zeros, row, _ = self
        # fmt: off
        dx, dw, _ = torch.ops.aten.convolution_backward(
            g.unsqueeze(2) if row else g, self._images(x), w, None, stride, padding, dilation,
            False, [0] * len(stride), 1, [of_x, of_w, False],
        )
        # fmt: on
        if row:
            dx, dw = (None if t is None else t.squeeze(2) for t in (dx, dw))
        if dx is not None and zeros is not None:
            dx = F.pad(dx, [-n for n in zeros])
        return dx, dw
