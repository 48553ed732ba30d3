"""The operators of :mod:`library` by the short way of :mod:`plain`: arguments and results are
theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lstm_ext import plain
from lstm_ext.engine import is_surrounded, is_watched
from lstm_ext.steps import Steps, check_steps

# Of a plain direction: h0, c0, four weights and that of a projection.
_PLAIN_INPUTS = 7
_PROJECTION = 4  # of the weights
# Of one such in backward: those, the gradients, the results that were saved, and a flag for each
# input, x too.
_PLAIN_BACKWARD = (_PLAIN_INPUTS, 4, 3, 1 + _PLAIN_INPUTS)


def _plain_steps(layer: Sequence[Any]) -> int | Steps | None:
    """The steps of a layer for the short way, as :mod:`plain` takes them; None for another one."""
    x, flat, masks, _, reverse, T, B, batch_first, *differing = layer
    if masks or len(flat) != _PLAIN_INPUTS * len(reverse) or not plain.takes(x, T, reverse):
        return None
    if all(t is None for t in differing):
        return T if x.size(0) == T * B else None
    if not plain.takes_more(x):
        return None
    steps = Steps.of((T, B, x.size(0), batch_first), *differing)
    check_steps(steps)
    return steps


def plain_forward(*arguments: Any) -> list[Tensor] | None:
    """By the short way; None where there is none. What it refuses goes the layer's way, which has
    the errors."""
    *layer, cells, save = arguments
    # What it saves of two directions lies in one tensor, and results must not.
    two = len(layer[1]) > _PLAIN_INPUTS
    steps = None if cells or (save and two) or is_watched() else _plain_steps(layer)
    if steps is None:
        return None
    x, flat, *_, batch_first, _, _, _ = layer
    parts = plain.parts(flat, 1 + two, _PROJECTION)
    if parts is None:
        return None
    states, weights, H, P = parts
    sizes = x.size(-1), H, P
    made = plain.plain_results(x, states, weights, sizes, steps, batch_first, 2 * save)
    if made is None:
        return None
    outputs, saved = made
    return [*outputs, *saved[:2]] if save else list(outputs)


def plain_backward(*arguments: Any) -> list[Tensor] | None:
    """As :func:`plain_forward`, of a single direction."""
    *layer, grads, results, wanted = arguments
    counts = len(layer[1]), len(grads), len(results), len(wanted)
    if counts != _PLAIN_BACKWARD or is_surrounded():
        return None
    if grads[1] is not None:
        return None
    steps = _plain_steps(layer)
    if steps is None:
        return None
    x, flat, *_, batch_first, _, _, _ = layer
    y, *of_forward = results
    saved = (x, *flat, *of_forward, y)
    made = plain.plain_gradients((grads[0], *grads[2:]), saved, tuple(wanted), steps, batch_first)
    return made if made is None else [g for g in made if g is not None]
