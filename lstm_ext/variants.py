"""What LSTM and LSTMCell have beyond torch.nn's: arguments, parameters, masks, merging."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lstm_ext.engine import refuse_jit
from lstm_ext.ops import LayerWeights, Masks, acc_dtype, with_masks
from lstm_ext.steps import Steps

MERGE_MODES = ("concat", "sum", "mul", "ave", None)

#: Parameters beside nn.LSTM's, by the argument that brings them: in multiples of H.
_PARAMETERS = {
    "peephole": {"weight_ch": 3},
    "layer_norm": {"gamma_ih": 4, "gamma_hh": 4, "gamma_ch": 1, "beta_ch": 1},
}


class Variants(nn.Module):
    """The variants of one layer and direction; LSTM and LSTMCell derive from it.

    The attributes on the class are those of torch.nn's own modules, also for what was made from
    one or was pickled before there were variants.
    """

    peephole: bool = False
    layer_norm: bool = False
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: float | Sequence[float] = 0.0
    forget_bias: float | None = None

    __jit_ignored_attributes__ = property(refuse_jit)  # torch.jit asks this first

    def _set_variants(
        self,
        peephole: bool,
        layer_norm: bool,
        recurrent_dropout: float,
        weight_dropout: float,
        zoneout: float | Sequence[float],
        forget_bias: float | None,
    ) -> None:
        """Keeps the arguments; torch.nn's own come before, by its constructor."""
        self.peephole, self.layer_norm = peephole, layer_norm
        self.recurrent_dropout, self.weight_dropout = recurrent_dropout, weight_dropout
        self.zoneout, self.forget_bias = zoneout, forget_bias

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._checked(name, value))

    def _checked(self, name: str, value: Any) -> Any:
        """The value of an attribute, of the constructor's arguments also when set later; raises
        for a wrong one."""
        if name in ("peephole", "layer_norm"):
            check_bool(name, value)
        elif name in ("recurrent_dropout", "weight_dropout"):
            check_probability(name, value)
        elif name == "zoneout":
            if isinstance(value, (tuple, list)):
                if len(value) != 2:
                    raise ValueError(f"zoneout should be a number or a pair (h, c), got {value!r}")
                value = tuple(value)
            for part in _pair(value):
                check_probability(name, part, "keeping its old value")
            if not any(_pair(value)):
                value = 0.0
        elif name == "forget_bias" and value is not None:
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                got = type(value).__name__
                raise TypeError(f"forget_bias should be a number or None, got: {got}")
            if not math.isfinite(value):
                raise ValueError(f"forget_bias should be finite, got {value}")
            if not self.__dict__.get("bias", True):
                raise ValueError(
                    f"forget_bias is the initial value of a bias, got {value} with bias=False"
                )
        return value

    def _variants(self) -> dict[str, Any]:
        """Those in use, by argument; forget_bias is none, being only how a bias starts."""
        names = ("peephole", "layer_norm", "recurrent_dropout", "weight_dropout", "zoneout")
        values = {name: getattr(self, name) for name in names}
        if not any(_pair(self.zoneout)):  # an old pickle's (0, 0)
            del values["zoneout"]
        return {name: value for name, value in values.items() if value}

    def _varied(self) -> bool:
        """Whether any takes part in a call, as dropout does in training only."""
        return bool(
            self.peephole
            or self.layer_norm
            or self.zoneout
            or ((self.recurrent_dropout or self.weight_dropout) and self.training)
        )

    def _variants_repr(self) -> str:
        parts = self._variants()
        if self.forget_bias is not None:
            parts["forget_bias"] = self.forget_bias
        return "".join(f", {name}={value}" for name, value in parts.items())

    def _variant_names(self, suffix: str = "") -> list[str]:
        """The names of the parameters beside torch.nn's, in LayerWeights' order."""
        return [
            name + suffix
            for flag, parameters in _PARAMETERS.items()
            if getattr(self, flag)
            for name in parameters
        ]

    def _new_parameter(self, like: Tensor, *size: int) -> nn.Parameter:
        """Drawn as torch.nn draws those of an LSTM."""
        bound = self.hidden_size**-0.5 if self.hidden_size else 0.0  # as torch.nn
        return nn.Parameter(nn.init.uniform_(like.detach().new_empty(size), -bound, bound))

    def _add_parameters(self, suffix: str, like: Tensor) -> None:
        for flag, parameters in _PARAMETERS.items():
            if getattr(self, flag):
                for name, multiple in parameters.items():
                    size = multiple * self.hidden_size
                    self.register_parameter(name + suffix, self._new_parameter(like, size))

    def reset_parameters(self) -> None:
        """Draw all parameters anew: U(-1/sqrt(H), 1/sqrt(H)); gammas 1, betas 0, forget_bias."""
        super().reset_parameters()
        self._reset_variants()

    @torch.no_grad()
    def _reset_variants(self) -> None:
        H = self.hidden_size
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("gamma_"):
                parameter.fill_(1)
            elif name.startswith("beta_"):
                parameter.zero_()
            elif self.forget_bias is not None and name.startswith("bias_"):
                # The gate sees the sum of its two biases.
                start = self.forget_bias if name.startswith("bias_ih") else 0.0
                parameter[H : 2 * H].fill_(start)

    def _masks(self, steps: Steps, h0: Tensor, c0: Tensor) -> Masks | None:
        """Masks of one direction of one layer, drawn from torch's generator; None if none."""
        keep_h, keep_c = _pair(self.zoneout)
        dropout = self.recurrent_dropout if self.training else 0.0
        if not (dropout or keep_h or keep_c):
            return None
        ones = h0.new_ones(h0.shape, dtype=acc_dtype(h0.dtype)) if dropout else None
        return Masks(
            None if ones is None else F.dropout(ones, dropout),
            _flags(keep_h, steps, h0) if self.training and keep_h else keep_h,
            _flags(keep_c, steps, c0) if self.training and keep_c else keep_c,
        )

    def _arranged(
        self,
        weights: list[Tensor | None],
        bias: bool,
        projection: bool,
        steps: Steps,
        h0: Tensor,
        c0: Tensor,
    ) -> LayerWeights:
        """The parameters of one direction, in the order of their names, and its masks.

        bias, projection: whether theirs are among the weights.
        """
        if bias and not self._varied():
            return LayerWeights(*weights)  # nn.LSTM's own, in their order; the usual case
        w_ih, w_hh, *rest = weights
        b_ih = b_hh = w_hr = w_ch = None
        if self.weight_dropout and self.training:
            w_hh = F.dropout(w_hh, self.weight_dropout)
        if bias:
            b_ih, b_hh, *rest = rest
        if projection:
            w_hr, *rest = rest
        if self.peephole:
            w_ch, *rest = rest
        weights = LayerWeights(w_ih, w_hh, b_ih, b_hh, w_hr, w_ch, *rest)
        return with_masks(weights, self._masks(steps, h0, c0))


def _pair(zoneout: float | tuple[float, float]) -> tuple[float, float]:
    return zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)


_LEVELS = 1 << 16


def _flags(p: float, steps: Steps, state: Tensor) -> Tensor:
    """bool (rows, n): true with probability p, rounded to a multiple of 2**-16.

    Drawn time-first whatever the layout, four to a 64-bit number: a fourth of bernoulli_'s time.
    """
    n = state.size(1)
    count = steps.rows * n
    # As Tensor.random_ draws them, and vmap and torch.compile know; but for the largest number.
    words = torch.randint(-(2**63), 2**63 - 1, (-(-count // 4),), device=state.device)
    bits = words.view(torch.int16)[:count]
    level = round(p * _LEVELS)
    flags = bits < level - _LEVELS // 2 if level < _LEVELS else torch.ones_like(bits).bool()
    flags = flags.view(steps.rows, n)
    if not steps.batch_first or steps.offsets is not None:
        return flags
    return steps.from_time_major(flags.view(steps.T, steps.B, n))


def merged(y: Tensor, mode: str | None) -> Tensor:
    """The two directions of y (rows, 2P) in one of Keras' modes but concat and None."""
    return merged_pair(*y.chunk(2, dim=1), mode)


def merged_pair(forward: Tensor, backward: Tensor, mode: str | None) -> Tensor:
    """Likewise, of a tensor each."""
    if mode == "mul":
        return forward * backward
    total = forward + backward
    return total if mode == "sum" else total / 2


def check_merge_mode(mode: str | None, bidirectional: bool, num_layers: int) -> None:
    """Raise ValueError for a mode that does not exist or has nothing to merge."""
    if mode not in MERGE_MODES:
        names = ", ".join(map(repr, MERGE_MODES))
        raise ValueError(f"merge_mode should be one of {names}, got {mode!r}")
    if mode != "concat" and not bidirectional:
        raise ValueError(f"merge_mode={mode!r} needs two directions, got bidirectional=False")
    if mode is None and num_layers > 1:
        raise ValueError(
            "merge_mode=None gives a pair of outputs, which a further layer cannot take: expected "
            f"num_layers=1, got {num_layers}"
        )


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def check_probability(name: str, value: Any, event: str = "being zeroed") -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(
            f"{name} should be a number in range [0, 1] representing the probability of an "
            f"element {event}, got {value!r}"
        )
