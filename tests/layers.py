"""One direction of one layer, as most tests want it."""

from __future__ import annotations

from torch import Tensor

from lstm_ext import layer
from lstm_ext.ops import Direction, LayerWeights
from lstm_ext.steps import Steps


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: LayerWeights,
    steps: Steps,
    *,
    reverse: bool = False,
    cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y (rows, P), h_n (B, P), c_n (B, H), cells (rows, H) or None."""
    result = layer.lstm_layer(x, [Direction(h0, c0, weights, reverse)], steps, cells=cells)
    return result.y, result.h_n[0], result.c_n[0], result.cells
