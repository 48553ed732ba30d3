"""The layer in parts as operators of torch, for what records operations; see :mod:`library`.

``lstm_ext::lstm_layer_parts`` and its first derivative, ``lstm_ext::lstm_layer_parts_backward``,
make the parts of :mod:`checkpointing` when they run, so that a graph is for any number of steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lstm_ext import ops
from lstm_ext.autograd import needs_grad
from lstm_ext.checkpointing import PartsLayer, gradients, kept_count
from lstm_ext.derivatives import LayerFunction
from lstm_ext.engine import is_recorded
from lstm_ext.flat import Kind, flatten, kinds_of, unflatten
from lstm_ext.library import (
    LAYER,
    LAYER_COUNT,
    batched,
    check_gradients,
    check_inputs,
    decode,
    encode,
    refuse,
    refuse_transforms,
    register,
)
from lstm_ext.ops import Direction
from lstm_ext.steps import Steps
from lstm_ext.torch_engine import LayerOutputs

_library = torch.library.Library("lstm_ext", "FRAGMENT")
# PartsLayer's results; every: steps of a part.
_library.define(f"lstm_layer_parts({LAYER}, bool cells, int every) -> Tensor[]")
# grads: of those results. kept: the states among them. wanted: a flag for x and for each of
# directions. Returns the gradients that are wanted.
_library.define(
    f"lstm_layer_parts_backward({LAYER}, int every, Tensor?[] grads, Tensor[] kept, "
    "bool[] wanted) -> Tensor[]"
)


def lstm_layer_parts(
    x: Tensor, directions: Sequence[Direction], steps: Steps, *, cells: bool, every: int
) -> LayerOutputs:
    """:func:`layer.lstm_layer` by the operator."""
    arguments = encode(steps, kinds_of(directions), x, flatten(directions))
    y, *results = torch.ops.lstm_ext.lstm_layer_parts(*arguments, cells, every)
    D, first = len(directions), int(cells)
    h_n, c_n = list(results[first : first + D]), list(results[first + D : first + 2 * D])
    return LayerOutputs(y, h_n, c_n, results[0] if cells else None)


# --- kernels --------------------------------------------------------------------------------------


def _forward(*arguments: Any) -> list[Tensor]:
    *layer, cells, every = arguments
    (x, flat), (steps, kinds) = layer[:2], decode(*layer)
    _check(x, flat, steps, kinds, every)
    made = PartsLayer.forward(steps, kinds, cells, every, x, *flat)
    return [t.contiguous() for t in made if t is not None]


def _backward(*arguments: Any) -> list[Tensor]:
    *layer, every, grads, kept, wanted = arguments
    (x, flat), (steps, kinds) = layer[:2], decode(*layer)
    _check(x, flat, steps, kinds, every)
    D, sizes = len(kinds), _kept_sizes(flat, steps.T, kinds, every)
    check_gradients(grads[: 2 + 2 * D], unflatten(flat, kinds), steps)
    if len(grads) != 2 + 4 * D or len(kept) != 2 * D or len(wanted) != 1 + len(flat):
        got = len(grads), len(kept), len(wanted)
        raise RuntimeError(
            f"Expected {2 + 4 * D} gradients, {2 * D} states and {1 + len(flat)} flags, got {got}"
        )
    for size, state, grad in zip(sizes, kept, grads[2 + 2 * D :], strict=True):
        ops.check_result(state, size, x.dtype, x.device)
        if grad is not None and grad.shape != size:
            raise RuntimeError(f"Expected a gradient of size {size}, got {tuple(grad.shape)}")
    made = gradients(steps, kinds, every, wanted, grads, (x, *flat, *kept), differentiable=False)
    return [g.contiguous() for g in made if g is not None]


def _check(
    x: Tensor, flat: Sequence[Tensor | None], steps: Steps, kinds: Sequence[Kind], every: int
) -> None:
    check_inputs(x, unflatten(flat, kinds), steps)
    if every < 1:
        raise RuntimeError(f"Expected parts of at least 1 step, got {every}")


def _kept_sizes(
    flat: Sequence[Tensor | None], T: int, kinds: Sequence[Kind], every: int
) -> list[tuple[int, int, int]]:
    """Of the states that are kept: each direction's h, each direction's c."""
    h0, c0 = flat[:2]
    count = kept_count(T, every)
    return [(s.size(0), count, s.size(1)) for s in (h0, c0) for _ in kinds]


def _forward_fake(*arguments: Any) -> list[Tensor]:
    *layer, cells, every = arguments
    (x, flat), (steps, kinds) = layer[:2], decode(*layer)
    ops.check_devices(x, flat)
    D, (h0, c0) = len(kinds), flat[:2]
    sizes = [(x.size(0), D * h0.size(1))]
    if cells:
        sizes.append((x.size(0), D * c0.size(1)))
    sizes += [s.shape for s in (h0, c0) for _ in kinds]
    return [x.new_empty(s) for s in (*sizes, *_kept_sizes(flat, steps.T, kinds, every))]


def _backward_fake(*arguments: Any) -> list[Tensor]:
    (x, flat, *_), wanted = arguments[:LAYER_COUNT], arguments[-1]
    ops.check_devices(x, flat)
    return [t.new_empty(t.shape) for t, want in zip([x, *flat], wanted, strict=True) if want]


# --- autograd -------------------------------------------------------------------------------------


class RecordedParts(PartsLayer):
    """PartsLayer with an operator for each pass."""

    @staticmethod
    def forward(
        steps: Steps,
        kinds: tuple[Kind, ...],
        cells: bool,
        every: int,
        x: Tensor,
        *flat: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            y, *results = torch.ops.lstm_ext.lstm_layer_parts(
                *encode(steps, kinds, x, flat), cells, every
            )
        return (y, *results) if cells else (y, None, *results)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[4:]
        tensors = ctx.saved_tensors  # once: torch.utils.checkpoint gives them no second time
        x, *flat = tensors[: len(wanted)]
        made = torch.ops.lstm_ext.lstm_layer_parts_backward(
            *encode(ctx.steps, ctx.kinds, x, flat),
            ctx.every,
            list(grad_outputs),
            list(tensors[len(wanted) :]),
            list(wanted),
        )
        return (*[None] * 4, *(made.pop(0) if want else None for want in wanted))


class RecordedBackward(LayerFunction):
    """The first derivative, while a graph is recorded that does not ask for more."""

    @staticmethod
    def forward(ctx: Any, call: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        """call: the operator, of no arguments; tensors: those that require grad."""
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(call())

    @staticmethod
    def backward(ctx: Any, *v: Tensor | None) -> tuple[Any, ...]:
        refuse("a second derivative")


def _forward_autograd(*arguments: Any) -> list[Tensor]:
    *layer, cells, every = arguments
    x, flat = layer[:2]
    refuse_transforms([x, *flat])
    if not needs_grad([x, *flat]):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.lstm_ext.lstm_layer_parts(*arguments)
    steps, kinds = decode(*layer)
    made = RecordedParts.apply(steps, kinds, cells, every, x, *flat)
    return [t for t in made if t is not None]


def _backward_autograd(*arguments: Any) -> list[Tensor]:
    *layer, every, grads, kept, wanted = arguments
    x, flat = layer[:2]
    tensors = [t for t in (x, *flat, *grads) if t is not None]
    refuse_transforms(tensors)
    if not needs_grad(tensors):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.lstm_ext.lstm_layer_parts_backward(*arguments)
    if is_recorded():
        call = functools.partial(torch.ops.lstm_ext.lstm_layer_parts_backward, *arguments)
        return list(RecordedBackward.apply(call, *tensors))
    steps, kinds = decode(*layer)
    # The states again: a recorded graph has cut off what it keeps from the inputs.
    results = PartsLayer.run(steps, kinds, False, every, x, *flat)
    inputs = (x, *flat, *results[2 + 2 * len(kinds) :])
    made = gradients(steps, kinds, every, wanted, grads, inputs, differentiable=True)
    return [g for g in made if g is not None]


torch.library.register_vmap(
    "lstm_ext::lstm_layer_parts", functools.partial(batched, "lstm_layer_parts"), lib=_library
)

register(_library, "lstm_layer_parts", _forward, _forward_fake, _forward_autograd)
register(_library, "lstm_layer_parts_backward", _backward, _backward_fake, _backward_autograd)
