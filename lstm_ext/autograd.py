"""The layer as a differentiable function: what is saved, what is computed, double backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad

from lstm_ext import batching, ops
from lstm_ext.flat import Kind, grouped, unflatten
from lstm_ext.ops import DirectionGrads
from lstm_ext.steps import Steps
from lstm_ext.torch_engine import reference_layer, side_by_side


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether what is made of the tensors is to be recorded for backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def has_tangent(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a tensor has a tangent of forward mode."""
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


class _Layer(Function):
    """What the three functions below share."""

    @classmethod
    def run(cls, *args: Any) -> Any:
        """``apply`` without its look at forward's signature, which takes 13 us, the rest 8."""
        if torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        # As Function.apply goes on.
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))


class LSTMLayer(_Layer):
    """Forward and backward on the native core.

    Saved: the activated gates and c_t, both results of forward, with a layer norm what was
    normalized, the output, and references to the inputs (no copies): a second derivative needs
    them whichever of them require grad.
    """

    @staticmethod
    def forward(
        steps: Steps,
        kinds: tuple[Kind, ...],
        cells: bool,
        x: Tensor,
        *flat: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """y, cells or None, then h_n, c_n, gates and c_seq of each direction, and all else saved.

        A c_seq that is also the second result is None.
        """
        result = ops.layer_forward(x, unflatten(flat, kinds), steps, save=True, cells=cells)
        c_seq = result.c_seq
        all_cells = side_by_side(c_seq, x.dtype) if cells else None
        if all_cells is not None and all_cells is c_seq[0]:
            c_seq = [None]  # one tensor, output and saved at once
        more = [tensor for direction in result.more for tensor in direction]
        return result.y, all_cells, *result.h_n, *result.c_n, *result.gates, *c_seq, *more

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.steps, ctx.kinds, _, *tensors = inputs
        D = len(ctx.kinds)
        y, all_cells = output[:2]
        saved = output[2 + 2 * D :]
        ctx.mark_non_differentiable(*(t for t in saved if t is not None))
        ctx.set_materialize_grads(False)
        # The only None is a c_seq.
        ctx.save_for_backward(*tensors, y, *(all_cells if t is None else t for t in saved))

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        grads = grad_outputs[: 2 + 2 * len(ctx.kinds)]
        wanted = ctx.needs_input_grad[3:]
        steps, kinds = batching.unwrapped(ctx.steps, ctx.kinds)
        run = LSTMLayerBackward.run if must_apply() else LSTMLayerBackward.forward
        return (None, None, None, *run(steps, kinds, wanted, *grads, *ctx.saved_tensors))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return batching.forward(LSTMLayer, info.batch_size, in_dims, inputs)


class LSTMLayerBackward(_Layer):
    """The first derivative, on the native core."""

    @staticmethod
    def forward(
        steps: Steps, kinds: tuple[Kind, ...], wanted: tuple[bool, ...], *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """tensors: gradients of y, cells, h_n, c_n; x and the directions; y, gates, c_seq, more."""
        D, inputs = len(kinds), 2 + 2 * len(kinds)
        dy, dcells, *states = tensors[:inputs]
        x, *flat = tensors[inputs : inputs + len(wanted)]
        y, *saved = tensors[inputs + len(wanted) :]
        more = grouped(saved[2 * D :], D)
        dx, grads = ops.layer_backward(
            dy,
            dcells,
            states[:D],
            states[D:],
            x,
            unflatten(flat, kinds),
            y,
            [(saved[k], saved[D + k], *more[k]) for k in range(D)],
            steps,
            wanted_x=wanted[0],
            wanted=[DirectionGrads(*group) for group in grouped(wanted[1:], D)],
        )
        count = len(flat) // D
        return (dx, *(grad for direction in grads for grad in direction[:count]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.steps, ctx.kinds, ctx.wanted, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *v: Tensor | None) -> tuple[Any, ...]:
        # Those of forward's results get none: they are functions of its inputs.
        needed = ctx.needs_input_grad[3 : 3 + _inputs_of(ctx.kinds, ctx.wanted)]
        steps, kinds = batching.unwrapped(ctx.steps, ctx.kinds)
        v = tuple(t if wanted else None for t, wanted in zip(v, ctx.wanted, strict=True))
        made = second_derivative(steps, kinds, ctx.wanted, needed, v, ctx.saved_tensors)
        return (*[None] * 3, *made, *[None] * (len(ctx.saved_tensors) - len(made)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return batching.backward(LSTMLayerBackward, info.batch_size, in_dims, inputs)


class LSTMLayerSecond(_Layer):
    """The second derivative, on the native core where it has one; the third recomputes the layer in
    torch."""

    @staticmethod
    def forward(
        steps: Steps,
        kinds: tuple[Kind, ...],
        wanted: tuple[bool, ...],
        needed: tuple[bool, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """The derivative of the sum of v times LSTMLayerBackward's results, by its inputs but for
        forward's results.

        tensors: v, one of each result, None for zero; LSTMLayerBackward's. needed: which results to
        make, None for the others.
        """
        v, tensors = tensors[: len(wanted)], tensors[len(wanted) :]
        D, count = len(kinds), 2 + 2 * len(kinds)
        (dy, dcells, *states), (x, *flat) = tensors[:count], tensors[count : len(needed)]
        y, *saved = tensors[len(needed) :]
        directions = unflatten(flat, kinds)
        if all(t is None for t in v) or all(t is None for t in tensors[:count]):
            return (None,) * len(needed)
        if not ops.has_native_second(x, directions, steps):
            return _by_torch(steps, kinds, needed, v, tensors[: len(needed)])
        outputs, dx, grads = ops.layer_second(
            v[0],
            [DirectionGrads(*group) for group in grouped(v[1:], D)],
            dy,
            dcells,
            states[:D],
            states[D:],
            x,
            directions,
            y,
            [(saved[k], saved[D + k]) for k in range(D)],
            steps,
            wanted_x=needed[count],
            wanted=[DirectionGrads(*group) for group in grouped(needed[count + 1 :], D)],
        )
        size = len(flat) // D
        made = (*outputs, dx, *(grad for direction in grads for grad in direction[:size]))
        return tuple(t if flag else None for t, flag in zip(made, needed, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.steps, ctx.kinds, ctx.wanted, ctx.needed, *tensors = inputs
        # All but the results of forward: they are recomputed.
        kept = len(ctx.wanted) + len(ctx.needed)
        ctx.save_for_backward(*tensors[:kept])
        ctx.recomputed = len(tensors) - kept
        ctx.set_materialize_grads(False)

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *third: Tensor | None) -> tuple[Any, ...]:
        saved, n = ctx.saved_tensors, len(ctx.wanted)
        steps, kinds = batching.unwrapped(ctx.steps, ctx.kinds)
        results: list[Tensor | None] = [None] * len(saved)
        used = [k for k, t in enumerate(third) if t is not None]
        asked = [k for k, flag in enumerate(ctx.needs_input_grad[4 : 4 + len(saved)]) if flag]
        if used and asked:

            def second(*tensors: Tensor) -> tuple[Tensor, ...]:
                at = list(saved)
                for k, tensor in zip(asked, tensors, strict=True):
                    at[k] = tensor
                made = _by_torch(steps, kinds, ctx.needed, tuple(at[:n]), tuple(at[n:]))
                return tuple(made[k] for k in used)

            with ops.without_autocast(saved[n + 2 + 2 * len(kinds)].device):
                _, pull = torch.func.vjp(second, *(saved[k] for k in asked))
                for k, result in zip(asked, pull(tuple(third[k] for k in used)), strict=True):
                    results[k] = result
        return (*[None] * 4, *results, *[None] * ctx.recomputed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return batching.one_by_one(LSTMLayerSecond, info.batch_size, in_dims, inputs)


def second_derivative(
    steps: Steps,
    kinds: tuple[Kind, ...],
    wanted: tuple[bool, ...],
    needed: tuple[bool, ...],
    v: tuple[Tensor | None, ...],
    tensors: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """By LSTMLayerSecond; see its forward."""
    run = LSTMLayerSecond.run if must_apply() else LSTMLayerSecond.forward
    return run(steps, kinds, wanted, needed, *v, *tensors)


def _inputs_of(kinds: tuple[Kind, ...], wanted: tuple[bool, ...]) -> int:
    """How many tensors of LSTMLayerBackward are no results of forward: gradients and inputs."""
    return 2 + 2 * len(kinds) + len(wanted)


def must_apply() -> bool:
    """Whether a backward must go through LSTMLayerBackward.apply, rather than its forward alone.

    With create_graph the gradients must themselves be differentiable; transforms of torch.func and
    forward mode reach a Function by its apply alone.
    """
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _by_torch(
    steps: Steps,
    kinds: tuple[Kind, ...],
    needed: tuple[bool, ...],
    v: tuple[Tensor | None, ...],
    tensors: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """What LSTMLayerSecond.forward returns, ``tensors`` without forward's results.

    Differentiates the reference twice, by torch.func, which any transform around it may follow.
    """
    count = 2 + 2 * len(kinds)
    grads, inputs = tensors[:count], tensors[count:]
    # A tensor that is two inputs counts as two: each is an argument of its own below.
    used = [k for k, g in enumerate(grads) if g is not None]
    first = [k for k, t in enumerate(v) if t is not None]
    asked = [k for k, flag in enumerate(needed) if flag]

    def gradients(*some: Tensor) -> tuple[Tensor, ...]:
        """Those that v is for, as a function of all that is asked for."""
        at = list(tensors)
        for k, tensor in zip(asked, some, strict=True):
            at[k] = tensor

        def outputs(*some: Tensor) -> tuple[Tensor, ...]:
            x_and_flat = at[count:]
            for k, tensor in zip(first, some, strict=True):
                x_and_flat[k] = tensor
            x, *flat = x_and_flat
            layer = reference_layer(x, unflatten(flat, kinds), steps, cells=1 in used)
            every = (layer.y, layer.cells, *layer.h_n, *layer.c_n)
            return tuple(every[k] for k in used)

        _, pull = torch.func.vjp(outputs, *(at[count + k] for k in first))
        return pull(tuple(at[k] for k in used))

    results: list[Tensor | None] = [None] * len(tensors)
    with ops.without_autocast(inputs[0].device):
        _, pull = torch.func.vjp(gradients, *(tensors[k] for k in asked))
        for k, result in zip(asked, pull(tuple(v[k] for k in first)), strict=True):
            results[k] = result
    return tuple(results)
