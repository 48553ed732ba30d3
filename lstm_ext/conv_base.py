"""What ConvLSTMs and their cells share: arguments, parameters, checks, all layers on one input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstm_ext import conv_library  # noqa: F401, its operators
from lstm_ext.compat import States, check_match, check_weights
from lstm_ext.conv_layer import ConvWeights, conv_lstm_layer
from lstm_ext.conv_walk import Walk
from lstm_ext.convolutions import Window, input_window
from lstm_ext.engine import autocast_is_on, refuse_jit, without_autocast
from lstm_ext.ops import check_dtype
from lstm_ext.steps import Steps
from lstm_ext.tensors import check_dense, is_autocast
from lstm_ext.variants import check_bool, check_merge_mode, merged_pair

__all__ = ["ConvLSTMBase", "Size"]

Size = int | Sequence[int]


class Attributes(NamedTuple):
    """Those that the parameters were made for, or that the constructor puts in one form."""

    in_channels: int
    hidden_channels: int
    num_layers: int
    bias: bool
    peephole: bool
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    bidirectional: bool
    merge_mode: str | None


class ConvLSTMBase(nn.Module):
    """Arguments, parameters and checks of the sequences and the cells."""

    _dims: int  # set by each class
    _is_cell = False

    # On the class for what was pickled before they existed.
    bidirectional: bool = False
    merge_mode: str | None = "concat"
    _drops: bool = False  # whether dropout, which the cells have not, is more than 0

    __jit_ignored_attributes__ = property(refuse_jit)  # torch.jit.script asks this first

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: Size,
        num_layers: int,
        stride: Size,
        padding: Size | str,
        dilation: Size,
        bias: bool,
        peephole: bool,
        suffix: str,
        device: Any,
        dtype: torch.dtype | None,
        bidirectional: bool = False,
        merge_mode: str | None = "concat",
    ) -> None:
        super().__init__()
        counts = {"in_channels": in_channels, "hidden_channels": hidden_channels}
        for name, count in {**counts, "num_layers": num_layers}.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
        flags = {"bias": bias, "peephole": peephole, "bidirectional": bidirectional}
        for name, flag in flags.items():
            check_bool(name, flag)
        check_merge_mode(merge_mode, bidirectional, num_layers)
        self.bidirectional, self.merge_mode = bidirectional, merge_mode
        self.in_channels, self.hidden_channels = in_channels, hidden_channels
        self.num_layers, self.bias, self.peephole = num_layers, bias, peephole
        self.kernel_size = self._each("kernel_size", kernel_size, 1)
        self.stride = self._each("stride", stride, 1)
        self.dilation = self._each("dilation", dilation, 1)
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(
                    f'padding must be "same", "valid" or integers of at least 0, got {padding!r}'
                )
            self.padding: tuple[int, ...] | str = padding
        else:
            self.padding = self._each("padding", padding, 0)
        at = {"device": device, "dtype": dtype}
        self._names: list[dict[str, str]] = []
        for k in range(num_layers * self._directions):
            layer, second = divmod(k, self._directions)
            end, sizes = suffix.format(layer) + "_reverse" * second, self._sizes(layer)
            for name, size in sizes.items():
                self.register_parameter(name + end, nn.Parameter(torch.empty(size, **at)))
            self._names.append({name: name + end for name in sizes})
        self._made_as = self._attributes()
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # What was pickled before there were more attributes was made with their defaults.
        now = self._attributes()
        self._made_as = Attributes(*self._made_as, *now[len(self._made_as) :])

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _attributes(self) -> Attributes:
        # fmt: off
        return Attributes(
            self.in_channels, self.hidden_channels, self.num_layers, self.bias, self.peephole,
            self.kernel_size, self.stride, self.padding, self.dilation, self.bidirectional,
            self.merge_mode,
        )
        # fmt: on

    def _sizes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Of a layer's parameters, in the order of ConvWeights."""
        C = self.hidden_channels
        below = C * self._directions if self.merge_mode == "concat" else C
        inputs = below if layer else self.in_channels
        sizes: dict[str, tuple[int, ...]] = {
            "weight_ih": (4 * C, inputs, *self.kernel_size),
            "weight_hh": (4 * C, C, *self.kernel_size),
        }
        if self.bias:
            sizes |= {"bias_ih": (4 * C,), "bias_hh": (4 * C,)}
        if self.peephole:
            sizes["weight_ch"] = (3 * C,)
        return sizes

    def reset_parameters(self) -> None:
        """Draws every parameter from U(-1/sqrt(n), 1/sqrt(n)), n = C times the kernel's pixels."""
        bound = 1 / math.sqrt(self.hidden_channels * math.prod(self.kernel_size))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.hidden_channels}, kernel_size={self.kernel_size}"
        ones = (1,) * self._dims
        defaults = {"num_layers": 1, "stride": ones, "padding": "same", "dilation": ones}
        defaults |= {"bias": True, "batch_first": False, "peephole": False}
        defaults |= {"bidirectional": False, "merge_mode": "concat", "dropout": 0.0}
        for name, default in defaults.items():
            value = getattr(self, name, default)
            text += "" if value == default else f", {name}={value!r}"
        return text

    def _each(self, name: str, value: Size, least: int) -> tuple[int, ...]:
        """An integer for every dimension."""
        several = isinstance(value, Sequence) and not isinstance(value, str)
        values = tuple(value) if several else (value,) * self._dims
        right = all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values)
        if len(values) != self._dims or not right:
            raise ValueError(
                f"{name} must be an integer of at least {least}, or {self._dims} of them, "
                f"got {value!r}"
            )
        return values

    def _window(self, layer: int) -> Window:
        """Of a layer's input; the deeper layers keep the size."""
        if layer:
            return Window(self.kernel_size, (1,) * self._dims, "same", self.dilation)
        return input_window(self.kernel_size, self.stride, self.padding, self.dilation)

    def _weights(self, index: int, x: Tensor) -> ConvWeights:
        """The tensors of one direction of a layer, as they are now, for x."""
        names = self._names[index]
        tensors = {role: getattr(self, name) for role, name in names.items()}
        check_weights(names.values(), tensors.values(), x)
        sizes = self._sizes(index // self._directions)
        for role, tensor in tensors.items():
            check_dense(names[role], tensor)
            if tensor.shape != sizes.get(role, tensor.shape):
                got = tuple(tensor.shape)
                raise RuntimeError(f"Expected {names[role]} of size {sizes[role]}, got {got}")
        roles = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_ch")
        return ConvWeights(*(tensors.get(role) for role in roles))

    def _check_attributes(self) -> None:
        """Refuse attributes set after construction."""
        now = self._attributes()
        if now == self._made_as:
            return
        pairs = zip(Attributes._fields, now, self._made_as, strict=True)
        changed = [(name, *values) for name, *values in pairs if values[0] != values[1]]
        got, expected = (", ".join(f"{c[0]}={c[k]!r}" for c in changed) for k in (1, 2))
        raise RuntimeError(
            f"got {got}, expected {expected} as the module was constructed with: these attributes "
            "cannot be changed afterwards"
        )

    def _is_batched(self, input: Tensor, dims: int) -> bool:
        """Whether input has a dimension more than the `dims` of a single sequence or step.

        Raises:
            TypeError: no Tensor. RuntimeError: a sparse one. ValueError: other dimensions.
        """
        self._check_attributes()
        name = type(self).__name__
        if not isinstance(input, Tensor):
            got = type(input).__name__
            if isinstance(input, PackedSequence) and not self._is_cell:
                got += ": pad_packed_sequence makes one, and the lengths for lengths="
            raise TypeError(f"{name}: Expected input to be a Tensor, got {got}")
        check_dense("input", input)
        if input.dim() not in (dims, dims + 1):
            raise ValueError(
                f"{name}: Expected input to be {dims}D or {dims + 1}D, got {input.dim()}D instead"
            )
        return input.dim() == dims + 1

    def _check(self, input: Tensor, hx: States | None, batch: tuple[int, ...]) -> None:
        """Refuse an input of other channels, and states of another size than an input of `batch`
        (the sizes before the channels) asks for."""
        channels, *size = input.shape[-self._dims - 1 :]
        if channels != self.in_channels:
            raise RuntimeError(
                f"input must have in_channels channels. Expected {self.in_channels}, got {channels}"
            )
        expected = (*batch, self.hidden_channels, *self._window(0).output(size))
        for k, state in enumerate(hx or ()):
            check_dense(f"hidden[{k}]", state)
            if tuple(state.shape) != expected:
                got = list(state.shape)
                raise RuntimeError(f"Expected hidden[{k}] size {expected}, got {got}")

    def _run(
        self, x: Tensor, hx: States | None, steps: Steps
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """All layers on x (T, N, in, *size): the output, or the directions' two, and h and c of
        each layer and direction.

        hx: (num_layers * D, N, C, *output) each, of D directions.
        """
        if not torch.compiler.is_compiling() and torch.jit.is_tracing():
            refuse_jit()
        size = self._window(0).output(x.shape[3:])
        D = self._directions
        weights = [self._weights(k, x) for k in range(self.num_layers * D)]
        check_match("hidden", hx or (), x)
        check_dtype(x.dtype)
        device = x.device.type
        if is_autocast(x.dtype) and autocast_is_on(device):
            dtype = torch.get_autocast_dtype(device)
            x, hx = x.to(dtype), hx and (hx[0].to(dtype), hx[1].to(dtype))
            weights = [ConvWeights(*(t if t is None else t.to(dtype) for t in w)) for w in weights]
        with without_autocast(x.device):
            shape = (self.num_layers * D, steps.B, self.hidden_channels, *size)
            h0, c0 = hx or [x.new_zeros(shape)] * 2
            walk = Walk(x.dtype, steps, math.prod(size), self._is_cell)
            outputs = [walk.mask(x)]  # a NaN in the padding ends here
            h_n, c_n = [], []
            for layer in range(self.num_layers):
                (x,), outputs = outputs, []
                for k in range(layer * D, (layer + 1) * D):
                    y, h, c = conv_lstm_layer(
                        x, h0[k], c0[k], weights[k], self._window(layer), walk, k % D == 1
                    )
                    outputs.append(y)
                    h_n.append(h)
                    c_n.append(c)
                if D == 2 and self.merge_mode is not None:
                    outputs = [_merged(outputs, self.merge_mode)]
                if self._drops and self.training and layer < self.num_layers - 1:
                    outputs = [F.dropout(y, self.dropout) for y in outputs]
        return outputs, h_n, c_n


def _merged(outputs: Sequence[Tensor], mode: str) -> Tensor:
    """Of two directions' outputs (T, N, C, *output), one."""
    if mode != "concat":
        return merged_pair(*outputs, mode)
    # As they lie in memory, channels last, which torch.cat of five or six dimensions would not see.
    return torch.cat([y.movedim(2, -1) for y in outputs], -1).movedim(-1, 2)
