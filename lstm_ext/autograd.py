"""The layer as a differentiable function: what is saved, what is computed, double backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lstm_ext import batching, ops
from lstm_ext.derivatives import (
    BackwardTangents,
    ForwardTangents,
    LayerDerivative,
    LayerFunction,
    SecondDerivative,
    save,
)
from lstm_ext.engine import is_recording
from lstm_ext.flat import Kind, grouped, unflatten
from lstm_ext.ops import DirectionGrads
from lstm_ext.steps import Steps
from lstm_ext.torch_engine import side_by_side


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether what is made of the tensors is to be recorded for backward."""
    return is_recording() and any(t is not None and t.requires_grad for t in tensors)


def has_tangent(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a tensor has a tangent of forward mode."""
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


class LSTMLayer(LayerFunction):
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
        ctx.steps, ctx.kinds, ctx.cells, *tensors = inputs
        D = len(ctx.kinds)
        y, all_cells = output[:2]
        saved = output[2 + 2 * D :]
        ctx.mark_non_differentiable(*(t for t in saved if t is not None))
        ctx.set_materialize_grads(False)
        # The only None is a c_seq.
        save(ctx, [*tensors, y, *(all_cells if t is None else t for t in saved)])

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        grads = grad_outputs[: 2 + 2 * len(ctx.kinds)]
        wanted = ctx.needs_input_grad[3:]
        steps, kinds = batching.unwrapped(ctx.steps, ctx.kinds)
        run = LSTMLayerBackward.run if must_apply() else LSTMLayerBackward.forward
        return (None, None, None, *run(steps, kinds, wanted, *grads, *ctx.saved_tensors))

    @staticmethod
    @batching.batched_gradients
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        v, tensors = tangents[3:], ctx.saved_tensors
        call = (ForwardTangents, ctx.steps, ctx.kinds, len(v), ctx.cells)
        made = LayerDerivative.run(*call, *v, *tensors)
        return (*made, *[None] * (len(tensors) - len(v) - 1))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return batching.forward(LSTMLayer, info.batch_size, in_dims, inputs)


class LSTMLayerBackward(LayerFunction):
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
        save(ctx, tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *v: Tensor | None) -> tuple[Any, ...]:
        # Those of forward's results get none: they are functions of its inputs.
        needed = ctx.needs_input_grad[3 : 5 + 2 * len(ctx.kinds) + len(ctx.wanted)]
        tensors = ctx.saved_tensors  # once: hooks may unpack them anew each time, or refuse
        steps, kinds = batching.unwrapped(ctx.steps, ctx.kinds)
        v = [t if wanted else None for t, wanted in zip(v, ctx.wanted, strict=True)]
        made = second_derivative(steps, kinds, needed, v, tensors)
        return (*[None] * 3, *made, *[None] * (len(tensors) - len(made)))

    @staticmethod
    @batching.batched_gradients
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        size = len(ctx.wanted)
        given = tangents[3 : 5 + 2 * len(ctx.kinds) + size]  # those of forward's results follow
        call = (BackwardTangents, ctx.steps, ctx.kinds, size, tuple(ctx.wanted))
        return LayerDerivative.run(*call, *given, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return batching.backward(LSTMLayerBackward, info.batch_size, in_dims, inputs)


def second_derivative(
    steps: Steps,
    kinds: tuple[Kind, ...],
    needed: Sequence[bool],
    v: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The derivative of the sum of v times LSTMLayerBackward's results, by its tensors but for
    forward's results; None for those that are not needed.

    v: one of each result, None for zero. tensors: LSTMLayerBackward's.
    """
    count = len(needed) - len(v)
    if all(t is None for t in v) or all(t is None for t in tensors[:count]):
        return (None,) * len(needed)
    run = LayerDerivative.run if must_apply() else LayerDerivative.forward
    return run(SecondDerivative, steps, kinds, len(v), tuple(needed), *v, *tensors)


def must_apply() -> bool:
    """Whether a derivative must go through its Function, rather than the Function's forward alone.

    With create_graph the gradients must themselves be differentiable; transforms of torch.func and
    forward mode reach a Function by its apply alone.
    """
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
