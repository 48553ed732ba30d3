"""Layers with variants: what a module drew and ran, and the reference on the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lstm_ext
from lstm_ext import modules, reference
from lstm_ext.ops import Direction, Masks, tensors_of
from lstm_ext.steps import Steps

EVERYTHING = {
    "layer_norm": True,
    "peephole": True,
    "zoneout": (0.3, 0.2),
    "recurrent_dropout": 0.4,
    "weight_dropout": 0.2,
}
#: By name, the arguments of a module; each alone and in company.
VARIANTS: dict[str, dict[str, Any]] = {
    "peephole": {"peephole": True},
    "layer_norm": {"layer_norm": True},
    "zoneout": {"zoneout": 0.3},
    "zoneout_h": {"zoneout": (0.4, 0.0)},
    "zoneout_c": {"zoneout": (0.0, 0.4)},
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "weight_dropout": {"weight_dropout": 0.3},
    "forget_bias": {"forget_bias": 1.0},
    "cell_and_state": {"peephole": True, "zoneout": (0.3, 0.2), "recurrent_dropout": 0.3},
    "normed_state": {"layer_norm": True, "zoneout": (0.3, 0.2), "recurrent_dropout": 0.3},
    "everything": EVERYTHING,
}


class Recorder:
    """Every direction that modules ran meanwhile, with its masks and weights as they were."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.directions: list[Direction] = []
        self.steps: Steps | None = None
        run = modules.LSTM._run_layer

        def spy(x: Tensor, directions: list[Direction], steps: Steps, **options: Any) -> Any:
            self.directions += directions
            self.steps = steps
            return run(x, directions, steps, **options)

        patch.setattr(modules.LSTM, "_run_layer", staticmethod(spy))

    def weights(self) -> list[Tensor]:
        return [t for d in self.directions for t in tensors_of(d.w) if t is not None]

    def masks(self, dtype: torch.dtype) -> list[Masks]:
        """As the reference takes them."""
        return [self._masks(d.w.masks or Masks(), dtype) for d in self.directions]

    def _masks(self, masks: Masks, dtype: torch.dtype) -> Masks:
        h_dropout, *keeps = masks
        return Masks(
            None if h_dropout is None else h_dropout.to(dtype),
            *(self.steps.to_time_major(k) if isinstance(k, Tensor) else k for k in keeps),
        )

    def reference(
        self,
        module: lstm_ext.LSTM,
        x: Tensor,
        hx: tuple[Tensor, Tensor] | None,
        weights: list[Tensor],
        dtype: torch.dtype,
        **extra: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a module returned, of x (T, B, I) and the weights that it ran with: y, h_n, c_n and
        cells."""
        count = len(weights) // len(self.directions)
        y, (h_n, c_n), cells = reference.lstm(
            x,
            hx,
            [weights[k : k + count] for k in range(0, len(weights), count)],
            num_layers=module.num_layers,
            bidirectional=module.bidirectional,
            peephole=module.peephole,
            layer_norm=module.layer_norm,
            merge_mode=module.merge_mode,
            masks=self.masks(dtype),
            **extra,
        )
        return y, h_n, c_n, cells
