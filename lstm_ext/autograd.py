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


class LSTMLayer(Function):
    """Forward and backward on the native core.

    Saved: the activated gates and c_t, both results of forward, with a layer norm what was
    normalized, the output, and references to the inputs (no copies): a second derivative needs
    them whichever of them require grad.
    """

    @classmethod
    def run(cls, *args: Any) -> Any:
        """``apply`` without its look at forward's signature, which takes 13 us, the rest 8."""
        if torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        # As Function.apply goes on.
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))

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
        run = LSTMLayerBackward.apply if must_apply() else LSTMLayerBackward.forward
        return (None, None, None, *run(steps, kinds, wanted, *grads, *ctx.saved_tensors))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return batching.forward(LSTMLayer, info.batch_size, in_dims, inputs)


class LSTMLayerBackward(Function):
    """The first derivative on the native core; its own derivative recomputes the layer in torch."""

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
        # All but the results of forward: they are recomputed.
        kept = 2 + 2 * len(ctx.kinds) + len(ctx.wanted)
        ctx.save_for_backward(*tensors[:kept])
        ctx.recomputed = len(tensors) - kept
        ctx.set_materialize_grads(False)

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
        return (*[None] * 3, *_second_order(ctx, second), *[None] * ctx.recomputed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return batching.backward(LSTMLayerBackward, info.batch_size, in_dims, inputs)


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


def _second_order(ctx: Any, second: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Vector-Hessian products with ``second``, one of each wanted gradient.

    Differentiates the reference twice, by torch.func, which any transform around it may follow.
    """
    count = 2 + 2 * len(ctx.kinds)
    saved = ctx.saved_tensors
    grads, inputs = saved[:count], saved[count:]
    # A tensor that is two inputs counts as two: each is an argument of its own below.
    used = [k for k, g in enumerate(grads) if g is not None]
    first = [k for k, v in enumerate(second) if v is not None and ctx.wanted[k]]
    results: list[Tensor | None] = [None] * len(saved)
    wanted = [k for k, needed in enumerate(ctx.needs_input_grad[3 : 3 + len(saved)]) if needed]
    if not (used and first and wanted):
        return results

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        """The wanted gradients as a function of all that ``wanted`` names."""
        at = list(saved)
        for k, tensor in zip(wanted, tensors, strict=True):
            at[k] = tensor

        def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
            x_and_flat = at[count:]
            for k, tensor in zip(first, tensors, strict=True):
                x_and_flat[k] = tensor
            x, *flat = x_and_flat
            layer = reference_layer(x, unflatten(flat, ctx.kinds), ctx.steps, cells=1 in used)
            every = (layer.y, layer.cells, *layer.h_n, *layer.c_n)
            return tuple(every[k] for k in used)

        _, pull = torch.func.vjp(outputs, *(at[count + k] for k in first))
        return pull(tuple(at[k] for k in used))

    with ops.without_autocast(inputs[0].device):
        _, pull = torch.func.vjp(gradients, *(saved[k] for k in wanted))
        for k, result in zip(wanted, pull(tuple(second[k] for k in first)), strict=True):
            results[k] = result
    return results
