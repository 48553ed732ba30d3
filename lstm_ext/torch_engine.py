"""A layer in torch operations, by the reference: where there are no kernels, and where something
must see every operation (derivatives that the core does not have)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lstm_ext import reference
from lstm_ext.engine import Direction, LayerWeights, Masks, tensors_of
from lstm_ext.steps import Steps


class LayerOutputs(NamedTuple):
    """Results of a layer; the lists are over its directions."""

    y: Tensor  # (rows, D*P)
    h_n: list[Tensor]  # (B, P)
    c_n: list[Tensor]  # (B, H)
    cells: Tensor | None  # (rows, D*H)


def side_by_side(parts: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """The parts (rows, n) that are there, as one of that dtype."""
    tensors = [part.to(dtype) for part in parts if part is not None]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)


def reference_step(x: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
    """h_1 and c_1, (B, H) each, of a cell's step; x (B, in)."""
    h0, c0, w, _ = direction
    if w.varied:
        layer = reference_layer(x, [direction], Steps.padded(1, x.size(0)), cells=False)
        return layer.h_n[0], layer.c_n[0]
    a = F.linear(x, w.w_ih, w.b_ih) + F.linear(h0, w.w_hh, w.b_hh)  # (B, 4H)
    return reference.lstm_cell(a, c0)


def reference_layer(
    x: Tensor, directions: Sequence[Direction], steps: Steps, *, cells: bool
) -> LayerOutputs:
    """A layer as :func:`layer.lstm_layer` describes it; a loop over the steps."""

    def to_device(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(x.device)

    def masks(w: LayerWeights) -> dict[str, Any]:
        h_dropout, keep_h, keep_c = w.masks or Masks()
        return {
            "h_dropout": None if h_dropout is None else h_dropout.to(x.dtype),
            "keep_h": steps.to_time_major(keep_h) if isinstance(keep_h, Tensor) else keep_h,
            "keep_c": steps.to_time_major(keep_c) if isinstance(keep_c, Tensor) else keep_c,
        }

    time_major = steps.to_time_major(x)
    results = [
        reference.lstm_layer(
            time_major,
            d.h0,
            d.c0,
            *tensors_of(d.w),
            **masks(d.w),
            lengths=to_device(steps.lengths),
            reset_mask=to_device(steps.reset_mask),
            reverse=d.reverse,
        )
        for d in directions
    ]
    y, h_n, c_n, all_cells = zip(*results, strict=True)
    return LayerOutputs(
        side_by_side([steps.from_time_major(part) for part in y], x.dtype),
        list(h_n),
        list(c_n),
        side_by_side([steps.from_time_major(part) for part in all_cells], x.dtype)
        if cells
        else None,
    )
