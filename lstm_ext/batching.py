"""torch.func.vmap over a layer: its rules for forward and backward.

Where the weights are shared, the mapped dimension joins the batch: V times B sequences are one
call. Where every one has its own weights, or its own gradient of shared weights, it is a call each.

torch.autograd's is_grads_batched and vectorize=True map a backward by a vmap older than
torch.func's, which knows no rules: :func:`batched_gradients` takes its tensors apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import (
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    unwrap_if_dead,
)
from torch.utils import _pytree as pytree

from lstm_ext.engine import Masks
from lstm_ext.flat import Kind
from lstm_ext.steps import Steps

# So that transforms reach the tensors inside, wherever Steps is an argument of a Function.
pytree.register_pytree_node(
    Steps,
    lambda steps: ([steps.offsets, steps.lengths, steps.reset_mask], steps.layout),
    lambda tensors, layout: Steps.of(layout, *tensors),
    serialized_type_name="lstm_ext.Steps",
)


class _Fold(NamedTuple):
    """The mapped dimension as part of the batch.

    Time-first and packed rows (t, b) become (t, b, v): a packed batch stays sorted. Batch-first
    rows (b, t) become (v, b, t), which moves nothing.
    """

    size: int  # V
    inner: bool

    def join(self, tensor: Any, dim: int | None, at: int = 0) -> Any:
        """A tensor's dimension ``at``, of rows or sequences, with V joined to it.

        dim: where V is; None: nowhere, then it is repeated. What is no tensor stays.
        """
        if not isinstance(tensor, Tensor):
            return tensor
        place = at + self.inner
        if dim is None:
            sizes = [-1] * (tensor.dim() + 1)
            sizes[place] = self.size
            tensor = tensor.unsqueeze(place).expand(sizes)
        else:
            tensor = tensor.movedim(dim, place)
        return tensor.flatten(at, at + 1)

    def split(self, tensor: Tensor | None) -> tuple[Tensor | None, int | None]:
        """The inverse, at dimension 0, and where V is then."""
        if tensor is None:
            return None, None
        n = tensor.size(0) // self.size
        place = int(self.inner)
        return tensor.unflatten(0, (n, self.size) if self.inner else (self.size, n)), place

    def steps(self, steps: Steps, dims: Steps) -> Steps:
        T, B, rows, batch_first = steps.layout
        layout = (T, B * self.size, rows * self.size, batch_first)
        offsets = None if steps.offsets is None else steps.offsets * self.size
        return Steps.of(
            layout,
            offsets,
            self._contiguous(self.join(steps.lengths, dims.lengths)),
            self._contiguous(self.join(steps.reset_mask, dims.reset_mask, 1)),
        )

    @staticmethod
    def _contiguous(tensor: Any) -> Any:
        return tensor.contiguous() if isinstance(tensor, Tensor) else tensor

    def kinds(self, kinds: Sequence[Kind], dims: Sequence[Kind]) -> tuple[Kind, ...]:
        return tuple(
            (reverse, None if masks is None else Masks(*map(self.join, masks, mask_dims)))
            for (reverse, masks), (_, mask_dims) in zip(kinds, dims, strict=True)
        )


def forward(
    function: Any, size: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The rule of LSTMLayer; see its forward."""
    weights = weights_of(len(inputs) - 3, len(inputs[1]))
    return mapped(function, size, in_dims, inputs, weights)


def backward(
    function: Any, size: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The rule of LSTMLayerBackward; see its forward."""
    _, kinds, wanted, *tensors = inputs
    own = weights_of(len(wanted), len(kinds))
    weights = [False] * (2 + 2 * len(kinds)) + own
    weights += [False] * (len(tensors) - len(weights))
    summed = any(flag and weight for flag, weight in zip(wanted, own, strict=True))
    return mapped(function, size, in_dims, inputs, weights, summed)


def weights_of(size: int, groups: int) -> list[bool]:
    """Which of a layer's inputs, so many, are weights."""
    each = (size - 1) // groups
    return [False] + [k >= 2 for k in range(each)] * groups


def mapped(
    function: Any,
    size: int,
    in_dims: tuple[Any, ...],
    inputs: tuple[Any, ...],
    weights: Sequence[bool],
    summed: bool = False,
) -> tuple[Any, Any]:
    """One call, if no weight is mapped and no result is a sum over sequences; else a call each.

    inputs: of function.apply; Steps and kinds are next to each other, tensors at the end, as many
    as ``weights`` has flags, which say what is a weight. summed: some result is such a sum.
    """
    _check_size(size)
    first = len(inputs) - len(weights)
    tensors, dims = inputs[first:], in_dims[first:]
    own = [dim for dim, weight in zip(dims, weights, strict=True) if weight]
    if summed or any(dim is not None for dim in own):
        return one_by_one(function, size, in_dims, inputs)
    at = next(k for k, value in enumerate(inputs) if isinstance(value, Steps))
    steps = inputs[at]
    fold = _Fold(size, not steps.batch_first)
    results = function.apply(
        *inputs[:at],
        fold.steps(steps, in_dims[at]),
        fold.kinds(inputs[at + 1], in_dims[at + 1]),
        *inputs[at + 2 : first],
        *(
            tensor if weight else fold.join(tensor, dim)
            for tensor, dim, weight in zip(tensors, dims, weights, strict=True)
        ),
    )
    outputs, out_dims = zip(*map(fold.split, results), strict=True)
    return outputs, out_dims


def _check_size(size: int) -> None:
    if size == 0:
        raise ValueError(
            "Expected a dimension of size 1 or more to map over, got 0: vmap over nothing, or a "
            "Jacobian of an output without elements"
        )


def one_by_one(
    function: Any, size: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Any, Any]:
    """A call for each of V, and their results stacked."""
    leaves, structure = pytree.tree_flatten(inputs)
    dims = pytree.tree_leaves(in_dims)
    each = []
    for v in range(size):
        taken = [
            leaf if dim is None else leaf.select(dim, v).contiguous()  # Steps are read as they lie
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        each.append(function.apply(*pytree.tree_unflatten(taken, structure)))
    stacked = [
        None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)
    ]
    return tuple(stacked), tuple(None if part is None else 0 for part in stacked)


def unwrapped(steps: Steps, kinds: tuple[Kind, ...]) -> tuple[Steps, tuple[Kind, ...]]:
    """Both without the wrappers of transforms that are over, such as vjp's when it has returned.

    The core reads these tensors, and such a wrapper has no memory.
    """
    held = [steps.offsets, steps.lengths, steps.reset_mask]
    held += [mask for _, masks in kinds for mask in masks or ()]
    if not any(isinstance(t, Tensor) and is_functorch_wrapped_tensor(t) for t in held):
        return steps, kinds
    return pytree.tree_map_only(Tensor, unwrap_if_dead, (steps, kinds))


class SavedOnce:
    """A ctx whose saved tensors are asked for once: torch.utils.checkpoint gives them no second
    time."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    @functools.cached_property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        return self._ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def batched_gradients(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A Function's backward(ctx, *gradients), or its jvp, under torch.autograd's own vmap too: a
    call each.

    Raises:
        RuntimeError: one such vmap inside of another.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        for g in gradients:
            if g is not None and is_legacy_batchedtensor(g):
                break
        else:
            return backward(ctx, *gradients)
        is_batched = [g is not None and is_legacy_batchedtensor(g) for g in gradients]
        # Autograd's threads for devices other than the CPU know of no nesting: 0.
        level = max(torch._C._vmapmode_increment_nesting() - 1, 1)
        torch._C._vmapmode_decrement_nesting()
        if level > 1:
            raise RuntimeError("Expected one vmap of torch.autograd at a time, got one in another")
        # The size counts only for what is not batched.
        parts = [
            torch._remove_batch_dim(g, level, 1, 0).unbind(0) if batched else None
            for g, batched in zip(gradients, is_batched, strict=True)
        ]
        once = SavedOnce(ctx)
        each = [
            backward(
                once, *(g if p is None else p[v] for g, p in zip(gradients, parts, strict=True))
            )
            for v in range(len(parts[is_batched.index(True)]))
        ]
        return tuple(
            None if made[0] is None else torch._add_batch_dim(torch.stack(made), 0, level)
            for made in zip(*each, strict=True)
        )

    return run
