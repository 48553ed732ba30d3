"""What the layers of a ConvLSTM share of a batch: which sequences take which step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lstm_ext.cpu.conv import Masks
from lstm_ext.engine import is_watched
from lstm_ext.steps import Steps


class Walk:
    """What the layers share of a batch: its dtype, its sequences' ends and resets."""

    def __init__(
        self, dtype: torch.dtype, steps: Steps, pixels: int, of_cell: bool = False
    ) -> None:
        self.dtype = dtype
        self.steps = steps  # T steps of N sequences
        self.pixels = pixels  # of a state
        self.of_cell = of_cell  # a single step
        self._each: list[Steps] | None = None
        self._resets: Sequence[Tensor | None] | None = None

    def each(self) -> list[Steps]:
        """Per step: which of the N * pixels rows take it. Not for a graph of any number of steps,
        which a list would fix."""
        if self._each is None:
            steps, rows = self.steps, self.steps.B * self.pixels
            if steps.lengths is None:
                self._each = [Steps.padded(1, rows)] * steps.T
            else:
                on = self._by_rows(steps.active().to(torch.int64))
                self._each = [Steps(1, rows, rows=rows, lengths=row) for row in on.unbind(0)]
        return self._each

    def _by_rows(self, x: Tensor) -> Tensor:
        """(T, N) as (T, N * pixels)."""
        return x.repeat_interleave(self.pixels, dim=1)

    def renewed(self, t: int, state: Tensor) -> Tensor:
        """A state (N * pixels, n) as step t finds it: zero where a reset stands before that step;
        one that is not taken resets nothing. Also the gradient of the state before the reset, from
        that of the one after it."""
        steps = self.steps
        if steps.reset_mask is None:
            return state
        if self._resets is None:
            mask = steps.reset_mask
            mask = mask if steps.lengths is None else mask & steps.active()
            self._resets = self._by_rows(mask).unsqueeze(2).unbind(0)
            if mask.device.type == "cpu" and not is_watched():  # most steps reset nothing
                some = mask.any(1).tolist()
                self._resets = [r if s else None for r, s in zip(self._resets, some, strict=True)]
        reset = self._resets[t]
        return state if reset is None else state.masked_fill(reset, 0)

    def masks(self) -> Masks:
        """For the CPU's core, which takes all steps at once."""
        steps = self.steps
        on = None if steps.lengths is None else steps.active()
        reset = steps.reset_mask
        return Masks(on, None if reset is None or not reset.any() else reset)

    def mask(self, x: Tensor) -> Tensor:
        """x (T, N, ...) with zeros past each sequence's end."""
        if self.steps.lengths is None:
            return x
        on = self.steps.active()
        return torch.where(on.view(*on.shape, *[1] * (x.dim() - 2)), x, 0)
