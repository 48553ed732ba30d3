"""The gradients of the weights of a cell, of all steps of a graph in few products.

A loop over a cell sums dW = da_t^T x_t a step at a time: products of few rows, each of which writes
a matrix of the weights' size, which is then added to the sum of the others. Here the backward of a
step keeps da_t, x_t and h_{t-1}, and what many steps have kept is multiplied at once. It goes the
way that the gradients would have gone, through the graph: as the gradient of one more input, which
all steps of a graph share. So autograd adds it up, and knows when all steps are there. In half
precision the sums over the steps are float32 then.

Steps belong together if the state that one gets is that which another made, or a few operations
away from it, as after a mask of the sequences that have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lstm_ext.cpu.products import transposed_matmul

# A graph with fewer numbers in W_ih and W_hh takes longer to be told of what it is to keep than it
# gains. Training, 20 steps, float32, one Zen 4 core: B 8 H 32 1.11 times as long as without, B 1
# H 64 0.96, H 128 0.77 to 0.83, H 256 0.50 to 0.68, H 1024 0.37 to 0.46; B 64 H 512 0.89 to 0.92.
_FEW_WEIGHTS = 1 << 15
# Operations between two steps: of a stack of layers its states are taken apart and put together.
_MOST_BETWEEN = 4
# Kept, before they are multiplied: what there is in memory at once, and a product of more rows is
# no faster.
_MOST_ROWS = 1024


class CellWeights:
    """The weights of a cell, as the steps of a graph share them."""

    __slots__ = ("casts", "shared", "versions", "wanted", "weights")

    def __init__(
        self, weights: Sequence[Tensor | None], casts: Sequence[Tensor | None] | None = None
    ) -> None:
        """weights: weight_ih, weight_hh, bias_ih, bias_hh and None; casts: autocast's of them."""
        self.weights, self.casts = weights, casts
        self.wanted = [w is not None and w.requires_grad for w in weights]
        self.versions = None if casts is None else [_version(w) for w in weights]
        self.shared: Tensor | None = None  # the input that steps share, once there are two

    def are(self, weights: Sequence[Tensor | None], dtype: torch.dtype | None = None) -> bool:
        """Whether these are the weights still, and the casts, of such a dtype, as they are now."""
        for own, other, wanted in zip(self.weights, weights, self.wanted, strict=True):
            if own is not other or wanted != (own is not None and own.requires_grad):
                return False
        if self.casts is None or dtype is None:
            return self.casts is None and dtype is None
        return self.casts[0].dtype == dtype and self.versions == [_version(w) for w in weights]

    def share(self) -> None:
        if self.shared is None:
            self.shared = SharedInput.apply(*self.weights)


def _version(weight: Tensor | None) -> int | None:
    return None if weight is None or weight.is_inference() else weight._version


def cell_weights(hx: Any, weights: Sequence[Tensor | None]) -> CellWeights | None:
    """Those of a step with the states hx, None for zeros; None where their gradients are not worth
    keeping."""
    if weights[0].numel() + weights[1].numel() < _FEW_WEIGHTS:
        return None
    own = step_before(hx, weights)
    if own is None:
        return CellWeights(weights)
    own.share()
    return own


def step_before(
    hx: Any, weights: Sequence[Tensor | None], dtype: torch.dtype | None = None
) -> CellWeights | None:
    """Those of the step that made the states hx, if they are these weights: see CellWeights.are."""
    node = None if hx is None else hx[1].grad_fn
    return None if node is None else _found(node, weights, dtype, _MOST_BETWEEN)


def _found(
    node: Any, weights: Sequence[Tensor | None], dtype: torch.dtype | None, depth: int
) -> CellWeights | None:
    own: CellWeights | None = getattr(node, "cell_weights", None)
    if own is not None:
        return own if own.are(weights, dtype) else None
    if depth:
        for before, _ in node.next_functions:
            own = None if before is None else _found(before, weights, dtype, depth - 1)
            if own is not None:
                return own
    return None


class SharedInput(Function):
    """What all steps of a graph get: a scalar, a function of the weights for autograd alone."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if w is None else w.dtype for w in weights]
        return torch.zeros((), dtype=torch.float32, device="cpu")

    @staticmethod
    def backward(ctx: Any, kept: KeptSteps | None) -> tuple[Tensor | None, ...]:
        if kept is None:  # all steps returned gradients of the weights themselves
            return (None,) * len(ctx.dtypes)
        return tuple(
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(kept.gradients(), ctx.dtypes, strict=True)
        )


class KeptSteps(Tensor):
    """Its gradient, of one step or, added up, of several."""

    @staticmethod
    def __new__(cls, dgates: Tensor, x: Tensor, h_0: Tensor, wanted: Sequence[bool]) -> KeptSteps:
        return Tensor._make_wrapper_subclass(cls, (), dtype=torch.float32)

    def __init__(self, dgates: Tensor, x: Tensor, h_0: Tensor, wanted: Sequence[bool]) -> None:
        """dgates (B, 4H), x (B, in) and h_0 (B, H), also (in) and (H), or (1, B, in) and (1, B, H);
        wanted: the gradients, of the weights."""
        self._steps = [(dgates, x.reshape(-1, x.size(-1)), h_0.reshape(-1, h_0.size(-1)))]
        self._rows = dgates.size(0)
        self._wanted = wanted
        self._sums: list[Tensor | None] | None = None  # of weight_ih, weight_hh and a bias

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **options: Any) -> str:
        return f"KeptSteps(rows={self._rows})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.add.Tensor and all(type(t) is cls for t in args):
            kept, more = args
            kept._add(more)
            return kept
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(
            "The gradient of an input that the steps of an lstm_ext.LSTMCell share is for autograd "
            f"to add up, got {function}"
        )

    def _add(self, more: KeptSteps) -> None:
        self._steps += more._steps
        self._rows += more._rows
        if more._sums is not None:
            self._add_products(more._sums)
        if self._rows >= _MOST_ROWS:
            self._multiply()

    def _multiply(self) -> None:
        kept = zip(*self._steps, strict=True)
        dgates, x, h = (t[0] if len(t) == 1 else torch.cat(t) for t in kept)
        self._steps, self._rows = [], 0
        w_ih, w_hh, *biases = self._wanted
        products = transposed_matmul(dgates, x if w_ih else None, h if w_hh else None, any(biases))
        self._add_products(products)

    def _add_products(self, products: Sequence[Tensor | None]) -> None:
        if self._sums is None:
            self._sums = [
                None if p is None else p.to(torch.promote_types(p.dtype, torch.float32))
                for p in products
            ]
        else:
            for total, product in zip(self._sums, products, strict=True):
                if total is not None:
                    total += product

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Those that are wanted, of the steps until now, in the dtype of sums."""
        if self._steps:
            self._multiply()
        w_ih, w_hh, b = self._sums
        _, _, b_ih, b_hh, _ = self._wanted
        # Two tensors, as for two parameters: a caller may change one in place.
        return w_ih, w_hh, b if b_ih else None, (b.clone() if b_ih else b) if b_hh else None, None
