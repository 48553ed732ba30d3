"""QuantizedLSTM and QuantizedLSTMCell: inference on the CPU with weights of 8 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import LSTM as TorchLSTM  # torch.nn's may be set to this package's
from torch.nn.modules.rnn import LSTMCell as TorchLSTMCell
from torch.nn.utils.parametrize import is_parametrized

from lstm_ext.compat import States, adopt
from lstm_ext.convert import replaced
from lstm_ext.engine import as_one_function, is_intercepted, is_surrounded
from lstm_ext.lstm_cell import LSTMCell
from lstm_ext.modules import LSTM
from lstm_ext.plain import plain_quantized
from lstm_ext.plain_module import plain_layers
from lstm_ext.quantization import (
    ACTIVATION_BITS,
    DTYPES,
    QuantizedWeights,
    is_of_columns,
    pack,
    quantized_layer,
    unpack,
)

__all__ = ["QuantizedLSTM", "QuantizedLSTMCell", "quantize"]


def _check_bits(bits: Any) -> None:
    if type(bits) is not int or bits not in ACTIVATION_BITS:
        raise ValueError(f"activation_bits should be 8 or 16, got {bits!r}")


class _Quantized(nn.Module):
    """What both have: buffers in place of parameters, and evaluation mode for good."""

    proj_size: int = 0  # of a cell, for good

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise TypeError(
            f"{name} is made of a module with weights: expected {name}.from_float(module) or "
            "lstm_ext.quantize(model), got a call of the class"
        )

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode, as there is nothing to train."""
        return super().train(False)

    def reset_parameters(self) -> NoReturn:
        """Raise: there are no parameters to draw."""
        raise RuntimeError(f"{type(self).__name__} has no parameters to draw: quantize a new one")

    def to_torch(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"to_torch: torch.nn has no {name}: use dequantize().to_torch()")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in self._buffers.items():
            # A scale in bfloat16 would be another number.
            if tensor is not None and tensor.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(tensor.device)
        return self

    def _checked(self, name: str, value: Any) -> Any:
        if name == "activation_bits":
            _check_bits(value)
        return super()._checked(name, value)

    def extra_repr(self) -> str:
        bits = "" if self.activation_bits == 16 else f", activation_bits={self.activation_bits}"
        return super().extra_repr() + bits

    def _take(self, suffixes: list[str], activation_bits: int) -> None:
        """Put codes, scales and biases in the place of the adopted parameters."""
        self.activation_bits = activation_bits
        variants = self._variants()
        for name in ("recurrent_dropout", "weight_dropout"):  # of training
            variants.pop(name, None)
        for name, value in variants.items():
            raise ValueError(f"quantize: weights of 8 bits go without {name}; got {value!r}")
        self.recurrent_dropout = self.weight_dropout = 0.0
        self.forget_bias = None  # what it did is in the biases
        kinds = ["weight_ih", "weight_hh", *["bias_ih", "bias_hh"] * self.bias]
        kinds += ["weight_hr"] if self.proj_size else []
        weights = {}
        for name in (kind + suffix for suffix in suffixes for kind in kinds):
            weights[name] = self._parameters.pop(name, None)
            if weights[name] is None:
                raise ValueError(
                    f"quantize: expected the parameter {name}, which was replaced: undo pruning or "
                    "weight_norm before (torch.nn.utils.prune.remove, remove_weight_norm)"
                )
        self._made_as = self._attributes()
        for suffix in suffixes:
            for kind, gates in (("ih", 4), ("hh", 4), ("hr", 1)):
                weight = weights.get(f"weight_{kind}{suffix}")
                if weight is not None:
                    codes, scale = pack(weight, gates)
                    self.register_buffer(f"weight_{kind}{suffix}", codes)
                    self.register_buffer(f"scale_{kind}{suffix}", scale)
            if self.bias:
                biases = (weights[f"bias_{kind}{suffix}"].detach() for kind in ("ih", "hh"))
                total = sum(bias.to("cpu", torch.float32) for bias in biases)
                self.register_buffer(f"bias_sum{suffix}", total)
        super().train(False)

    def _attributes(self) -> tuple[Any, ...]:
        """Those that the buffers were made for."""
        sizes = self.input_size, self.hidden_size, self.bias
        return *sizes, self.peephole, self.layer_norm, self.zoneout

    def _check_attributes(self) -> None:
        """Refuse attributes set after construction that the buffers were not made for."""
        now = self._attributes()
        if now != self._made_as:
            raise RuntimeError(
                f"expected the attributes that the module was quantized with, {self._made_as}, got "
                f"{now}: they cannot be changed afterwards"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        *_, errors = rest
        for name, tensor in self._buffers.items():
            # Sizes of codes are rounded up: what is absent tells them apart.
            own = state_dict.get(prefix + name)
            if name.startswith("weight_") and own is not None and own.shape == tensor.shape:
                columns = self._columns(name)
                if not is_of_columns(own, columns):
                    errors.append(f"{prefix}{name}: expected weights of {columns} columns")

    @torch.no_grad()
    def _give(self, module: nn.Module, suffixes: list[str]) -> None:
        """The weights that the codes stand for, to the parameters of module."""
        parameters, buffers = module._parameters, self._buffers
        for suffix in suffixes:
            self._weights(suffix)  # which refuses what is missing
            for kind in ("ih", "hh", "hr"):
                weight = parameters.get(f"weight_{kind}{suffix}")
                if weight is not None:
                    codes, scale = (buffers[f"{n}_{kind}{suffix}"] for n in ("weight", "scale"))
                    weight.copy_(unpack(codes, scale, weight.size(1)))
            if self.bias:
                parameters[f"bias_ih{suffix}"].copy_(buffers[f"bias_sum{suffix}"])
                parameters[f"bias_hh{suffix}"].zero_()

    def _kinds(self) -> list[str]:
        """The names of a direction's buffers, but for the suffix."""
        kinds = ["weight_ih", "weight_hh", "scale_ih", "scale_hh"]
        kinds += ["bias_sum"] if self.bias else []
        return kinds + (["weight_hr", "scale_hr"] if self.proj_size else [])

    def _weights(self, suffix: str) -> QuantizedWeights:
        get = self._buffers.get
        w = QuantizedWeights(
            get("weight_ih" + suffix),
            get("weight_hh" + suffix),
            get("scale_ih" + suffix),
            get("scale_hh" + suffix),
            get("bias_sum" + suffix),
            get("weight_hr" + suffix),
            get("scale_hr" + suffix),
            self.activation_bits,
        )
        if (
            (w.w_ih is None or w.w_hh is None or w.scale_ih is None or w.scale_hh is None)
            or (w.bias is None and self.bias)
            or ((w.w_hr is None or w.scale_hr is None) and self.proj_size)
        ):
            self._refuse_buffers(suffix)
        return w

    def _refuse_buffers(self, suffix: str) -> NoReturn:
        names = [kind + suffix for kind in self._kinds()]
        name = next(n for n in names if self._buffers.get(n) is None)
        got = "a parametrization" if is_parametrized(self, name) else "None"
        if self._parameters.get(name) is not None:
            got = "a Parameter"
        raise RuntimeError(f"{name}: expected the buffer that the module was made with, got {got}")

    def _check_dtype(self, input: Tensor) -> None:
        if input.dtype not in DTYPES:
            expected = ", ".join(map(str, DTYPES))
            raise ValueError(f"input must have one of the types {expected}, got {input.dtype}")


class QuantizedLSTM(_Quantized, LSTM):
    r"""An :class:`LSTM` with weights of 8 bits, for inference on the CPU.

    Made by :meth:`from_float`, or by :func:`quantize` for all of a model. It is called as the LSTM,
    with everything that forward takes there, and returns the same, in its input's dtype: float32,
    bfloat16 or float16. With large sizes a fourth of float32's bytes of weights are read at every
    step, which is what the time goes into with few sequences and a large H. (H is rounded up to a
    multiple of 16.)

    Every row of weights has a scale of its own and 8-bit codes, w ~ s (u - 128), s = max \|w\| /
    127. Inputs and states are taken in 16 bits, or in 8 with ``activation_bits=8``, a scale a row,
    at every step; the products are sums of whole numbers, exact: a sequence's results depend
    neither on the batch around it nor on the number of threads. Gates and cell states are float32.
    A row of inputs with a number that is not finite gives NaN from that step on, one of numbers all
    below 1e-30 counts as zeros.

    Buffers, for each layer and direction, H hidden units: ``weight_ih_l{k}``, ``weight_hh_l{k}``
    and, with proj_size, ``weight_hr_l{k}``, uint8, packed as :func:`quantization.pack` says;
    ``scale_ih_l{k}`` and ``scale_hh_l{k}`` (4H,), ``scale_hr_l{k}`` (P,) and ``bias_sum_l{k}``
    (4H,), b_ih + b_hh, float32 whatever the module is moved to. A state_dict goes into any module
    quantized from the same architecture. It is always in evaluation mode.

    Raises:
        RuntimeError: (forward) a tensor that requires grad while gradients are recorded, or one
            on another device; attributes changed, or buffers replaced by anything but a tensor,
            since it was made; else as LSTM.
    """

    @classmethod
    def from_float(cls, module: LSTM, activation_bits: int = 16) -> QuantizedLSTM:
        """With the weights of an LSTM, rounded, its hooks and its attributes.

        activation_bits: of inputs and states in the products, 16 or 8.

        Raises:
            TypeError: module is not exactly an LSTM, or is parametrized, or its forward was
                replaced.
            ValueError: other activation_bits, or it has a peephole, layer_norm or zoneout, a weight
                that is not finite, or more than 65536 columns of weights.
        """
        new = adopt(cls.__new__(cls), module, LSTM)
        new.dropout, new.checkpoint_every = 0.0, None  # of training
        new._take(new._suffixes(), activation_bits)
        return new

    @classmethod
    def from_torch(cls, module: nn.LSTM, activation_bits: int = 16) -> QuantizedLSTM:
        """As :meth:`from_float`, of an nn.LSTM."""
        return cls.from_float(LSTM.from_torch(module), activation_bits)

    def dequantize(self) -> LSTM:
        """An LSTM, in float32 and evaluation mode, with the weights that the codes stand for.

        Raises:
            RuntimeError: as forward, for attributes and buffers changed since it was made.
        """
        self._check_attributes()
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional")
        names += ("proj_size", "merge_mode", "return_cell_sequence")
        options = {name: getattr(self, name) for name in names}
        module = LSTM(**options, device="cpu", dtype=torch.float32).eval()
        self._give(module, self._suffixes())
        return module

    def _attributes(self) -> tuple[Any, ...]:
        own = (self.num_layers, self.bidirectional, self.proj_size, self.merge_mode)
        return (*super()._attributes(), *own, self.checkpoint_every)

    def _columns(self, name: str) -> int:
        """Of weights, by the name of their buffer."""
        if name.startswith("weight_hr"):
            return self.hidden_size
        P = self.proj_size or self.hidden_size
        if name.startswith("weight_hh"):
            return P
        if name in ("weight_ih_l0", "weight_ih_l0_reverse"):
            return self.input_size
        return 2 * P if self.bidirectional and self.merge_mode == "concat" else P

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise for an input of a wrong dtype, rank or feature size."""
        self._check_dtype(input)
        dims = 3 if batch_sizes is None else 2
        if input.dim() != dims:
            raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. Expected "
                f"{self.input_size}, got {input.size(-1)}"
            )

    _run_layer = staticmethod(quantized_layer)

    def _short_way(self, x: Any, hx: Any) -> Any:
        """As :func:`plain_module.plain_module`."""
        self._check_attributes()
        if (
            is_surrounded()
            or self.merge_mode != "concat"
            or self.return_cell_sequence
            or x.dim() != 3
        ):
            return None
        directions, layers = 2 if self.bidirectional else 1, []
        for k, suffix in enumerate(self._suffixes()):
            weights = self._weights(suffix)[:-1]
            if k % directions:
                layers[-1] += weights
            else:
                layers.append(list(weights))
        options = {"proj_size": self.proj_size, "activation_bits": self.activation_bits}
        run = functools.partial(plain_quantized, **options)
        return plain_layers(self, x, hx, layers, run)

    def _named_weights(self) -> list[list[str]]:
        return [[kind + suffix for kind in self._kinds()] for suffix in self._suffixes()]

    def _weight_count(self) -> int:
        self._check_attributes()
        return 4 + self.bias + 2 * bool(self.proj_size)

    def _layer_weights(self, index: int, *call: Any) -> QuantizedWeights:
        return self._weights(self._suffixes()[index])


class QuantizedLSTMCell(_Quantized, LSTMCell):
    """An :class:`LSTMCell` with weights of 8 bits, for inference on the CPU; see
    :class:`QuantizedLSTM`.

    Its buffers are ``weight_ih``, ``weight_hh``, ``scale_ih``, ``scale_hh`` and ``bias_sum``.
    """

    @classmethod
    def from_float(cls, module: LSTMCell, activation_bits: int = 16) -> QuantizedLSTMCell:
        """With the weights of an LSTMCell, rounded.

        Raises:
            TypeError, ValueError: as :meth:`QuantizedLSTM.from_float`.
        """
        new = adopt(cls.__new__(cls), module, LSTMCell)
        new._take([""], activation_bits)
        return new

    @classmethod
    def from_torch(cls, module: nn.LSTMCell, activation_bits: int = 16) -> QuantizedLSTMCell:
        """As :meth:`from_float`, of an nn.LSTMCell."""
        return cls.from_float(LSTMCell.from_torch(module), activation_bits)

    def dequantize(self) -> LSTMCell:
        """An LSTMCell, in float32 and evaluation mode, with the weights that the codes stand for.

        Raises:
            RuntimeError: as forward, for attributes and buffers changed since it was made.
        """
        self._check_attributes()
        sizes = (self.input_size, self.hidden_size, self.bias)
        module = LSTMCell(*sizes, device="cpu", dtype=torch.float32).eval()
        self._give(module, [""])
        return module

    def _columns(self, name: str) -> int:
        return self.input_size if name == "weight_ih" else self.hidden_size

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        """Take one step, as :meth:`LSTMCell.forward`."""
        if is_intercepted(input):
            return as_one_function(QuantizedLSTMCell.forward, self, input, hx)
        self._check_attributes()
        if not is_surrounded():
            weights = list(self._weights("")[:-1])
            sizes = (self.input_size, self.hidden_size, 0)
            states = plain_quantized(
                input, hx, weights, *sizes, activation_bits=self.activation_bits
            )
            if states is not None:
                return states
        self._check_dtype(input)
        return self._by_layer(input, hx, [])

    _run_layer = staticmethod(quantized_layer)

    def _layer_weights(self, *call: Any) -> QuantizedWeights:
        return self._weights("")


def quantize(model: nn.Module, activation_bits: int | None = None) -> nn.Module:
    """Swap every LSTM and LSTMCell in model, lstm_ext's and torch.nn's, for its counterpart with
    weights of 8 bits, in place. For inference on the CPU.

    Subclasses, which parametrized modules are too, modules whose forward was replaced, those with a
    peephole, layer_norm or zoneout, and those whose weights are not finite or on the meta device
    are left alone, with one warning that names them.

    Args:
        model: any module; copy it before (copy.deepcopy) to keep the float weights.
        activation_bits: of inputs and states in the products, of what has weights of 8 bits
            already too; None: 16, and there as before. 16: no error beside that of the weights. 8:
            an error some twice as large; with several sequences, processors that multiply bytes
            (AVX512_VNNI, ARM's SDOT) may take half of the time.

    Returns:
        model, or, where model is itself such a module, its replacement.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: other activation_bits.
    """
    if activation_bits is not None:
        _check_bits(activation_bits)
        for module in model.modules() if isinstance(model, nn.Module) else ():
            if isinstance(module, _Quantized):
                module.activation_bits = activation_bits  # the weights are the same
    makers = {
        LSTM: QuantizedLSTM.from_float,
        TorchLSTM: QuantizedLSTM.from_torch,
        LSTMCell: QuantizedLSTMCell.from_float,
        TorchLSTMCell: QuantizedLSTMCell.from_torch,
    }
    makers = {
        kind: functools.partial(make, activation_bits=activation_bits or 16)
        for kind, make in makers.items()
    }
    return replaced("quantize", model, makers, done=_Quantized)
