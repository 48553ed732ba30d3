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
from lstm_ext.flat import Kind, grouped
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
            self.join(steps.lengths, dims.lengths),
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
    _check_size(size)
    steps, kinds, cells, x, *flat = inputs
    steps_dims, kinds_dims, _, x_dim, *dims = in_dims
    if any(dim is not None for group in grouped(dims, len(kinds)) for dim in group[2:]):
        return one_by_one(function, size, in_dims, inputs)
    fold = _Fold(size, not steps.batch_first)
    results = function.apply(
        fold.steps(steps, steps_dims),
        fold.kinds(kinds, kinds_dims),
        cells,
        fold.join(x, x_dim),
        *_states_joined(fold, flat, dims, len(kinds)),
    )
    outputs, out_dims = zip(*map(fold.split, results), strict=True)
    return outputs, out_dims


def backward(
    function: Any, size: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The rule of LSTMLayerBackward; see its forward."""
    _check_size(size)
    steps, kinds, wanted, *tensors = inputs
    steps_dims, kinds_dims, _, *dims = in_dims
    D, first = len(kinds), 2 + 2 * len(kinds)  # first: where the layer's inputs begin
    end = first + len(wanted)
    weights_dims = [g[2:] for g in grouped(dims[first + 1 : end], D)]
    weights_wanted = [g[2:] for g in grouped(wanted[1:], D)]
    own = any(dim is not None for group in weights_dims for dim in group)
    if own or any(flag for group in weights_wanted for flag in group):
        return one_by_one(function, size, in_dims, inputs)
    fold = _Fold(size, not steps.batch_first)
    results = function.apply(
        fold.steps(steps, steps_dims),
        fold.kinds(kinds, kinds_dims),
        wanted,
        *map(fold.join, tensors[: first + 1], dims[: first + 1]),
        *_states_joined(fold, tensors[first + 1 : end], dims[first + 1 : end], D),
        *map(fold.join, tensors[end:], dims[end:]),
    )
    outputs, out_dims = zip(*map(fold.split, results), strict=True)
    return outputs, out_dims


def _check_size(size: int) -> None:
    if size == 0:
        raise ValueError(
            "Expected a dimension of size 1 or more to map over, got 0: vmap over nothing, or a "
            "Jacobian of an output without elements"
        )


def _states_joined(fold: _Fold, flat: Sequence[Any], dims: Sequence[Any], groups: int) -> list[Any]:
    """The directions' tensors, V joined to their states."""
    joined = []
    for group, group_dims in zip(grouped(flat, groups), grouped(dims, groups), strict=True):
        joined += [*map(fold.join, group[:2], group_dims[:2]), *group[2:]]
    return joined


def one_by_one(
    function: Any, size: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Any, Any]:
    """A call for each of V, and their results stacked."""
    leaves, structure = pytree.tree_flatten(inputs)
    dims = pytree.tree_leaves(in_dims)
    each = []
    for v in range(size):
        taken = [
            leaf if dim is None else leaf.select(dim, v)
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


def batched_gradients(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A Function's backward(ctx, *gradients) under torch.autograd's own vmap too: a call each.

    Raises:
        RuntimeError: one such vmap inside of another.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        is_batched = [g is not None and is_legacy_batchedtensor(g) for g in gradients]
        if True not in is_batched:
            return backward(ctx, *gradients)
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
        each = [
            backward(
                ctx, *(g if p is None else p[v] for g, p in zip(gradients, parts, strict=True))
            )
            for v in range(len(parts[is_batched.index(True)]))
        ]
        return tuple(
            None if made[0] is None else torch._add_batch_dim(torch.stack(made), 0, level)
            for made in zip(*each, strict=True)
        )

    return run
