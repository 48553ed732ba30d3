"""LSTMCell: one step, as torch.nn has it. As in modules, the weights are read at every call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import LSTMCell as TorchLSTMCell  # torch.nn's may be set to this one
from torch.nn.utils.rnn import PackedSequence

from lstm_ext.autograd import needs_grad
from lstm_ext.compat import (
    States,
    adopt,
    check_match,
    check_none,
    check_pair,
    check_weights,
    forget,
)
from lstm_ext.engine import as_one_function, autocast_is_on, is_intercepted, is_surrounded
from lstm_ext.flat import flatten
from lstm_ext.layer import lstm_layer
from lstm_ext.ops import Direction, LayerWeights, check_layer
from lstm_ext.plain import plain_autocast_cell, plain_cell, plain_layer
from lstm_ext.steps import Steps
from lstm_ext.tensors import check_dense
from lstm_ext.torch_engine import reference_step
from lstm_ext.variants import Variants

__all__ = ["LSTMCell"]

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

# Numbers of W_ih and W_hh below which a compiled step takes less time in torch's operations. Their
# time over the operator's, float32, B 1 to 128, two Zen 4 cores: a loop of four steps in inference
# H 64 0.32 to 0.84, H 256 1.03 to 1.28, H 512 1.67 to 1.93; of eight with backward, H 64 to 1024
# 0.40 to 0.88.
_FEW_WEIGHTS = 1 << 18


def _is_fused(input: Tensor, direction: Direction) -> bool:
    """Whether torch.compile is to see the step's operations, which it fuses, and not an operator
    that calls the core."""
    w = direction.w
    if not isinstance(w, LayerWeights):  # of 8 bits
        return False
    few = w.w_ih.numel() + w.w_hh.numel() < _FEW_WEIGHTS
    return (
        input.dtype in (torch.float32, torch.float64)
        # Not is_exporting(), which torch.compile takes for true before PyTorch 2.13.
        and not torch.compiler._is_exporting_flag
        and not autocast_is_on(input.device.type)
        and (few or needs_grad([input, *flatten([direction])]))
    )


class LSTMCell(Variants, nn.RNNCellBase):
    r"""A drop-in replacement for :class:`torch.nn.LSTMCell`: one step of an LSTM.

    Args:
        input_size, hidden_size, bias, device, dtype: as :class:`torch.nn.LSTMCell`.
        peephole, layer_norm, zoneout, forget_bias: as :class:`LSTM`.
        recurrent_dropout, weight_dropout: as :class:`LSTM`, but a cell does not know where a
            sequence begins: every call draws a mask of its own.

    Parameters, gate order and formula are those of :class:`LSTM` without projection:
    ``weight_ih`` (4H, input_size), ``weight_hh`` (4H, H), ``bias_ih`` and ``bias_hh`` (4H,); of
    the variants ``weight_ch`` (3H,), ``gamma_ih`` and ``gamma_hh`` (4H,), ``gamma_ch`` and
    ``beta_ch`` (H,).

    Raises:
        TypeError, ValueError: as :class:`LSTM`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        peephole: bool = False,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        forget_bias: float | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self._set_variants(
            peephole, layer_norm, recurrent_dropout, weight_dropout, zoneout, forget_bias
        )
        self._add_parameters("", self.weight_hh)
        self._reset_variants()

    def extra_repr(self) -> str:
        return super().extra_repr() + self._variants_repr()

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        """Take one step.

        Args:
            input: (N, input_size), or (input_size,) unbatched.
            hx: (h_0, c_0), each (N, H), or (H,) unbatched; None: zeros.

        Returns:
            (h_1, c_1), shaped as hx. Under autocast both in its dtype, as nn.LSTMCell on CUDA.

        Raises:
            ValueError, RuntimeError, TypeError: nn.LSTMCell's own for what it refuses; RuntimeError
                also for a c_0 of another dtype, which nn.LSTMCell lets pass.
        """
        if not torch.compiler.is_compiling():
            states = plain_cell(self, input, hx)
            if states is not None:
                return states
        if is_intercepted(input):
            return as_one_function(LSTMCell.forward, self, input, hx)
        self._check_attributes()
        # getattr finds every kind of replaced weight, but is slow for a plain parameter.
        parameters = self._parameters
        weights = [parameters[n] if n in parameters else getattr(self, n) for n in _WEIGHTS]
        if not (torch.compiler.is_compiling() or self._varied()):
            call = input, hx, [*weights, None], self.input_size, self.hidden_size
            states = plain_autocast_cell(*call) if is_surrounded() else plain_layer(*call, 0)
            if states is not None:
                return states
        return self._by_layer(input, hx, weights)

    def _check_attributes(self) -> None:
        """Refuse attributes set after construction that the parameters were not made for."""
        for name, parameter in (("peephole", "weight_ch"), ("layer_norm", "gamma_hh")):
            # Without a look at it, which may change a parametrization's state.
            made_with = hasattr(type(self), parameter) or any(
                parameter in place for place in (self._parameters, self.__dict__)
            )
            if getattr(self, name) != made_with:
                raise RuntimeError(
                    f"got {name}={getattr(self, name)}, expected {name}={made_with} as the cell "
                    "was constructed with: this attribute cannot be changed afterwards"
                )

    def _by_layer(self, input: Tensor, hx: States | None, weights: list[Tensor | None]) -> States:
        """forward, of any call, with all its errors."""
        if isinstance(input, PackedSequence):
            raise TypeError("LSTMCell: Expected input to be a Tensor, got PackedSequence")
        if isinstance(input, Tensor):
            check_dense("input", input)
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        batched = input.dim() == 2
        as_expected = True
        if hx is not None:
            check_pair(hx, "lstm_cell")
            size = (*input.shape[:-1], self.hidden_size)
            as_expected = hx[0].shape == size and hx[1].shape == size
            if not as_expected:
                for k, state in enumerate(hx):
                    if state.dim() not in (1, 2):
                        raise ValueError(
                            f"LSTMCell: Expected hx[{k}] to be 1D or 2D, got {state.dim()}D instead"
                        )
        if not batched:
            input = input.unsqueeze(0)
        if input.size(1) != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}"
            )
        batch = input.size(0)
        if hx is None:
            h = c = input.new_zeros(batch, self.hidden_size)
        else:
            h, c = hx if batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
            if not as_expected:
                self._check_state(h, 0, batch)
                self._check_state(c, 1, batch)
        steps = Steps.padded(1, batch)
        w = self._layer_weights(weights, input, steps, h, c)
        check_match("hidden", (h, c), input)
        direction = Direction(h, c, w, False)
        if torch.compiler.is_compiling() and _is_fused(input, direction):
            check_layer(input, [direction], steps)
            h, c = reference_step(input, direction)
        else:
            _, (h,), (c,), _ = self._run_layer(input, [direction], steps)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))

    _run_layer = staticmethod(lstm_layer)

    def _layer_weights(
        self, weights: list[Tensor | None], input: Tensor, steps: Steps, h: Tensor, c: Tensor
    ) -> LayerWeights:
        """weights, with those of the variants, and masks drawn for this call."""
        names = list(_WEIGHTS)
        if self.peephole or self.layer_norm:
            names += self._variant_names()
            weights += [getattr(self, name) for name in names[len(_WEIGHTS) :]]
        for name, weight in zip(names, weights, strict=True):
            if weight is not None or not name.startswith("bias"):  # as torch.nn's cell takes them
                check_weights([name], [weight], input)
        return self._arranged(weights, True, False, steps, h, c)

    def _check_state(self, state: Tensor, k: int, batch: int) -> None:
        if state.dim() != 2:  # batched unlike the input
            raise RuntimeError(
                f"Expected 2D hidden{k} (batch x hidden_size), but got {state.dim()}D tensor"
            )
        if state.size(0) != batch:
            raise RuntimeError(
                f"Input batch size {batch} doesn't match hidden{k} batch size {state.size(0)}"
            )
        if state.size(1) != self.hidden_size:
            raise RuntimeError(
                f"hidden{k} has inconsistent hidden_size: got {state.size(1)}, expected "
                f"{self.hidden_size}"
            )

    @classmethod
    def from_torch(cls, module: nn.LSTMCell) -> LSTMCell:
        """An LSTMCell that shares the Parameters, hooks and training flag of an nn.LSTMCell.

        Raises:
            TypeError: module is not exactly an nn.LSTMCell.
        """
        return adopt(cls.__new__(cls), module, TorchLSTMCell)

    def to_torch(self) -> nn.LSTMCell:
        """An nn.LSTMCell that shares the Parameters, hooks and training flag of this module.

        Raises:
            ValueError: nn.LSTMCell has no variant that is in use here.
            TypeError: this is a subclass, is parametrized, or its forward was replaced.
        """
        check_none("nn.LSTMCell", self._variants())
        return forget(adopt(TorchLSTMCell.__new__(TorchLSTMCell), self, LSTMCell))
