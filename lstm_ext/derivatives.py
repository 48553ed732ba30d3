"""Derivatives of a layer's forward and backward, each a function that can be differentiated again.

They run on the native core where that has them, else in torch operations; what is asked of them in
turn is computed in torch operations in any case.

Their tensors come in groups. "inputs": x and the tensors of the directions, as flat.py lists them.
"v": a direction in the space of those, None for zero. "d": gradients of y, of the cells, of each
h_n and of each c_n, None for zero; "d_dot": a direction in theirs. After the groups: what forward
has saved, a function of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad

from lstm_ext import batching, ops
from lstm_ext.flat import Kind, grouped, unflatten
from lstm_ext.ops import DirectionGrads
from lstm_ext.steps import Steps
from lstm_ext.torch_engine import reference_layer

Kinds = tuple[Kind, ...]
Tensors = Sequence[Tensor | None]
Results = tuple[Tensor | None, ...]


class LayerFunction(Function):
    """What the functions of a layer share."""

    @classmethod
    def run(cls, *args: Any) -> Any:
        """``apply`` without its look at forward's signature, which takes 13 us, the rest 8."""
        if torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        # As Function.apply goes on.
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))


def save(ctx: Any, tensors: Tensors) -> None:
    """For backward, and for forward mode where that may come."""
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)


class ForwardTangents:
    """The tangents of y, the cells (None unless asked for), each h_n and each c_n in the direction
    v. flags: whether for the cells too."""

    groups = ("v", "inputs")

    @staticmethod
    def on_core(steps: Steps, kinds: Kinds, flags: Any, saved: Tensors, *parts: Tensors) -> Results:
        v, (x, *flat) = parts
        no_gradients = [None] * (2 + 2 * len(kinds))
        wanted = (False,) * len(v)
        return _by_core(steps, kinds, v, no_gradients, x, flat, saved, wanted, cells=flags)[0]

    @staticmethod
    def in_torch(steps: Steps, kinds: Kinds, flags: Any, *parts: Tensors) -> Results:
        v, inputs = parts
        return _tangents(lambda *some: _outputs(steps, kinds, some, flags), inputs, v)


class BackwardTangents:
    """The tangents of backward's results in the directions d_dot and v. flags: which are wanted, of
    each input."""

    groups = ("d_dot", "v", "d", "inputs")

    @staticmethod
    def on_core(steps: Steps, kinds: Kinds, flags: Any, saved: Tensors, *parts: Tensors) -> Results:
        d_dot, v, d, (x, *flat) = parts
        return _by_core(steps, kinds, v, d, x, flat, saved, flags, d_dot=d_dot)[1]

    @staticmethod
    def in_torch(steps: Steps, kinds: Kinds, flags: Any, *parts: Tensors) -> Results:
        d_dot, v, d, inputs = parts
        count = len(d)

        def gradients(*some: Tensor | None) -> Results:
            return _gradients(steps, kinds, some[:count], some[count:], flags)

        return _tangents(gradients, (*d, *inputs), (*d_dot, *v))


class SecondDerivative:
    """The derivative of the sum of v times backward's results, by d and by the inputs. flags: which
    are needed, of each of those."""

    groups = ("v", "d", "inputs")

    @staticmethod
    def on_core(steps: Steps, kinds: Kinds, flags: Any, saved: Tensors, *parts: Tensors) -> Results:
        v, d, (x, *flat) = parts
        wanted = flags[len(d) :]
        outputs, gradients = _by_core(
            steps, kinds, v, d, x, flat, saved, wanted, cells=d[1] is not None
        )
        return tuple(
            t if flag else None for t, flag in zip((*outputs, *gradients), flags, strict=True)
        )

    @staticmethod
    def in_torch(steps: Steps, kinds: Kinds, flags: Any, *parts: Tensors) -> Results:
        v, d, inputs = parts
        count, first = len(d), [t is not None for t in v]

        def gradients(*some: Tensor | None) -> Results:
            return _gradients(steps, kinds, some[:count], some[count:], first)

        return pulled(gradients, (*d, *inputs), v, flags)


class LayerDerivative(LayerFunction):
    """One of the classes above, ``what``, as a differentiable function."""

    @staticmethod
    def forward(
        what: Any, steps: Steps, kinds: Kinds, size: int, flags: Any, *tensors: Tensor | None
    ) -> Results:
        """size: number of the layer's inputs. tensors: the groups, then forward's results."""
        parts, saved = _parts(what, kinds, size, tensors)
        x, *flat = parts[-1]
        if ops.has_native_second(x, unflatten(flat, kinds), steps):
            return what.on_core(steps, kinds, flags, saved, *parts)
        with ops.without_autocast(x.device):
            return what.in_torch(steps, kinds, flags, *parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.what, ctx.steps, ctx.kinds, ctx.size, ctx.flags, *tensors = inputs
        parts, saved = _parts(ctx.what, ctx.kinds, ctx.size, tensors)
        save(ctx, [t for part in parts for t in part])
        ctx.results, ctx.made = len(saved), [t is not None for t in output]
        ctx.set_materialize_grads(False)

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        tensors = unwrap_dead_wrappers(ctx.saved_tensors)
        needed = ctx.needs_input_grad[5 : 5 + len(tensors)]
        with ops.without_autocast(_device(ctx, tensors)):
            results = pulled(_again(ctx), tensors, gradients, needed)
        return (*[None] * 5, *results, *[None] * ctx.results)

    @staticmethod
    @batching.batched_gradients
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        tensors = unwrap_dead_wrappers(ctx.saved_tensors)
        with ops.without_autocast(_device(ctx, tensors)):
            return _tangents(_again(ctx), tensors, tangents[5 : 5 + len(tensors)])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        what, _, kinds, size, flags, *tensors = inputs
        own, weights = batching.weights_of(size, len(kinds)), []
        for group in what.groups:
            weights += own if group in _LIKE_INPUTS else [False] * _length(group, kinds, size)
        weights += [False] * (len(tensors) - len(weights))
        made = [] if what is ForwardTangents else flags[-size:]
        summed = any(flag and weight for flag, weight in zip(made, own, strict=False))
        return batching.mapped(LayerDerivative, info.batch_size, in_dims, inputs, weights, summed)


def _again(ctx: Any) -> Callable[..., Results]:
    """ctx's function in torch operations, of the groups' tensors."""
    steps, kinds = batching.unwrapped(ctx.steps, ctx.kinds)

    def again(*tensors: Tensor | None) -> Results:
        parts, _ = _parts(ctx.what, kinds, ctx.size, tensors)
        made = ctx.what.in_torch(steps, kinds, ctx.flags, *parts)
        return tuple(t if there else None for t, there in zip(made, ctx.made, strict=True))

    return again


_LIKE_INPUTS = ("v", "inputs")


def _length(group: str, kinds: Kinds, size: int) -> int:
    return size if group in _LIKE_INPUTS else 2 + 2 * len(kinds)


def _parts(
    what: Any, kinds: Kinds, size: int, tensors: Tensors
) -> tuple[list[tuple[Tensor | None, ...]], Tensors]:
    """The groups, and what is left."""
    parts, at = [], 0
    for group in what.groups:
        count = _length(group, kinds, size)
        parts.append(tuple(tensors[at : at + count]))
        at += count
    return parts, tensors[at:]


def _device(ctx: Any, tensors: Tensors) -> torch.device:
    return tensors[len(tensors) - ctx.size].device  # of x


def _by_core(
    steps: Steps,
    kinds: Kinds,
    v: Tensors,
    d: Tensors,
    x: Tensor,
    flat: Tensors,
    saved: Tensors,
    wanted: Sequence[bool],
    **more: Any,
) -> tuple[Results, Results]:
    """By :func:`ops.layer_second`: of the outputs, and of the inputs."""
    D = len(kinds)
    y, *saved = saved
    outputs, dx, grads = ops.layer_second(
        v[0],
        [DirectionGrads(*group) for group in grouped(v[1:], D)],
        d,
        x,
        unflatten(flat, kinds),
        y,
        [(saved[k], saved[D + k]) for k in range(D)],
        steps,
        wanted_x=wanted[0],
        wanted=[DirectionGrads(*group) for group in grouped(wanted[1:], D)],
        **more,
    )
    size = len(flat) // D
    return tuple(outputs), (dx, *(grad for direction in grads for grad in direction[:size]))


# --- in torch operations --------------------------------------------------------------------------


def _outputs(steps: Steps, kinds: Kinds, inputs: Tensors, cells: bool) -> Results:
    x, *flat = inputs
    layer = reference_layer(x, unflatten(flat, kinds), steps, cells=cells)
    return layer.y, layer.cells, *layer.h_n, *layer.c_n


def _gradients(
    steps: Steps, kinds: Kinds, d: Tensors, inputs: Tensors, wanted: Sequence[bool]
) -> Results:
    """Backward's results."""
    return pulled(lambda *some: _outputs(steps, kinds, some, d[1] is not None), inputs, d, wanted)


def pulled(
    function: Callable[..., Results], at: Tensors, gradients: Tensors, wanted: Sequence[bool]
) -> Results:
    """The gradients of function's arguments that are wanted, None for the others, from those of its
    results. By torch.func, which any transform around it may follow."""
    used = [k for k, t in enumerate(gradients) if t is not None]
    asked = [k for k, flag in enumerate(wanted) if flag]
    results: list[Tensor | None] = [None] * len(at)
    if used and asked:

        def some(*tensors: Tensor) -> tuple[Tensor, ...]:
            made = function(*_with(at, asked, tensors))
            return tuple(made[k] for k in used)

        _, pull = torch.func.vjp(some, *(at[k] for k in asked))
        for k, result in zip(asked, pull(tuple(gradients[k] for k in used)), strict=True):
            results[k] = result
    return tuple(results)


def _tangents(function: Callable[..., Results], at: Tensors, directions: Tensors) -> Results:
    """The tangents of function's results, None for what it does not make.

    As the derivative of the gradients, linear in those of the results: within a dual level there is
    no other.
    """
    asked = [k for k, t in enumerate(directions) if t is not None]
    there: list[bool] = []

    def some(*tensors: Tensor) -> tuple[Tensor, ...]:
        made = function(*_with(at, asked, tensors))
        there[:] = [t is not None for t in made]
        return tuple(t for t in made if t is not None)

    made, pull = torch.func.vjp(some, *(at[k] for k in asked))
    _, push = torch.func.vjp(lambda *d: pull(d), *map(torch.zeros_like, made))
    tangents = iter(push(tuple(directions[k] for k in asked)))
    return tuple(next(tangents) if flag else None for flag in there)


def _with(at: Tensors, places: list[int], tensors: Tensors) -> list[Tensor | None]:
    """``at`` with others in some places. A tensor that is two arguments counts as two."""
    every = list(at)
    for k, tensor in zip(places, tensors, strict=True):
        every[k] = tensor
    return every
