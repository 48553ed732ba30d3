"""A layer's directions as flat lists of tensors, which autograd Functions and operators take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lstm_ext.engine import Direction, LayerWeights, Masks, tensors_of, with_masks

#: What a direction is besides its tensors: whether it is the reverse one, and its masks, which
#: nobody else holds.
Kind = tuple[bool, Masks | None]


def flatten(directions: Sequence[Direction]) -> list[Tensor | None]:
    """The tensors of all directions, without the masks."""
    if len(directions) == 1:
        h0, c0, w, _ = directions[0]
        return [h0, c0, *tensors_of(w)]
    return [tensor for d in directions for tensor in (d.h0, d.c0, *tensors_of(d.w))]


def kinds_of(directions: Sequence[Direction]) -> tuple[Kind, ...]:
    return tuple((d.reverse, d.w.masks) for d in directions)


def grouped(flat: Sequence[Any], groups: int) -> list[Sequence[Any]]:
    """The inverse of :func:`flatten`, a group a direction."""
    size = len(flat) // groups
    return [flat[k * size : (k + 1) * size] for k in range(groups)]


def unflatten(flat: Sequence[Any], kinds: Sequence[Kind]) -> list[Direction]:
    """The directions that :func:`flatten` and :func:`kinds_of` took apart."""
    return [
        Direction(h0, c0, _weights(weights, masks), reverse)
        for (h0, c0, *weights), (reverse, masks) in zip(
            grouped(flat, len(kinds)), kinds, strict=True
        )
    ]


def _weights(tensors: Sequence[Tensor | None], masks: Masks | None) -> LayerWeights:
    return with_masks(LayerWeights(*tensors), masks)


def map_tensors(
    function: Callable[[Tensor], Tensor], x: Tensor, directions: Sequence[Direction]
) -> tuple[Tensor, list[Direction]]:
    """The function of x and of every tensor of the directions but the masks."""
    flat = [None if t is None else function(t) for t in flatten(directions)]
    return function(x), unflatten(flat, kinds_of(directions))
