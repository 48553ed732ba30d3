"""A module of plain layers, where nothing surrounds the call: each layer by :mod:`plain`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lstm_ext import plain
from lstm_ext.engine import is_lazy, is_surrounded

if TYPE_CHECKING:
    from lstm_ext.modules import LSTM


def plain_module(module: LSTM, x: Any, hx: Any) -> Any:
    """What a module's forward returns for its input and hx; None where they are not for the short
    way."""
    directions = 2 if module.bidirectional else 1
    if (
        is_surrounded()
        or (module.num_layers > 1 and getattr(plain.plain_engine_of(x), "wavefront", False))
        or module.merge_mode != "concat"
        or module.return_cell_sequence
        or module.checkpoint_every is not None
        or module._varied()
        or type(module._parameters) is not dict  # which may make what is taken out of it
        or x.dim() != 3
    ):
        return None
    parameters, layers, P = module._parameters, [], module.proj_size
    for k, names in enumerate(module._all_weights):
        own = [parameters.get(name) for name in names]
        for weight in own:
            if weight is None:
                return None  # replaced: to look at one may change a parametrization's state
        if len(own) != 2 + 2 * module.bias + (P > 0):
            return None  # attributes changed after construction
        if not module.bias:
            own[2:2] = (None, None)
        if not P:
            own.append(None)
        if k % directions:
            layers[-1] += own
        else:
            layers.append(own)
    if len(module._all_weights) != module.num_layers * directions:
        return None  # as well
    run = functools.partial(plain.plain_layer, proj_size=P) if P else plain.plain_layer
    return plain_layers(module, x, hx, layers, run)


def plain_layers(
    module: LSTM,
    x: Any,
    hx: Any,
    layers: Sequence[Sequence[Tensor | None]],
    run: Callable[..., Any],
) -> Any:
    """As :func:`plain_module`, for weights that are known. layers: each one's; run: a layer, as
    :func:`plain.plain_layer`."""
    steps = x.size(1 if module.batch_first else 0)
    if not steps:
        return None
    sizes = (module.input_size, module.hidden_size, steps, module.batch_first)
    if len(layers) == 1:
        made = run(x, hx, layers[0], *sizes)
        return made if made is None else (made[0], made[1:])
    drop = module._drop if module.dropout and module.training else None
    directions = 2 if module.bidirectional else 1
    width = directions * (module.proj_size or module.hidden_size)
    return plain_stack(x, hx, layers, directions, width, *sizes, drop, run)


def plain_stack(
    x: Any,
    hx: Any,
    layers: Sequence[Sequence[Tensor | None]],
    D: int,
    width: int,
    input_size: int,
    hidden_size: int,
    steps: int,
    batch_first: bool,
    drop: Callable[[Tensor], Tensor] | None,
    run: Callable[..., Any],
) -> Any:
    """(y, (h_n, c_n)) of several plain layers; None where they are not for the short way.

    Args:
        x, hx: as a module has them; hx of all layers, (L * D, B, H). layers: each one's weights.
        D: directions. width: of a layer's output. drop: what becomes of one on its way to the next
        layer. run: a layer. The rest: see :func:`plain.plain_layer`.
    """
    # It takes all of them or none, but for what is an error in a later one.
    if x.dtype == torch.bfloat16 and not plain.takes_more(x):
        return None  # the CPU's short way depends on the width of a layer's input
    for weights in layers[1:]:
        for weight in weights:
            if weight is not None and (type(weight) not in plain.TYPES or is_lazy(weight)):
                return None
    states = [None] * len(layers)
    if hx is not None:
        if not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            return None
        for state in hx:
            if type(state) not in plain.TYPES or state.dim() != 3 or len(state) != len(layers) * D:
                return None
        states = list(zip(*(state.split(D) for state in hx), strict=True))
    last = []
    for k, (state, weights) in enumerate(zip(states, layers, strict=True)):
        made = run(x, state, weights, input_size, hidden_size, steps, batch_first)
        if made is None:
            return None
        x, *own = made
        last.append(own)
        input_size = width
        if drop is not None and k + 1 < len(layers):
            x = drop(x)
    h_n, c_n = (torch.cat(parts) for parts in zip(*last, strict=True))
    return x, (h_n, c_n)
