"""The gradients of the weights of a cell, of all steps of a graph in few products.

A loop over a cell sums dW = da_t^T x_t (a ConvLSTM's: the same, of convolutions) a step at a time:
products of few rows, each of which writes a matrix of the weights' size, which is then added to the
sum of the others. Here the backward of a step keeps da_t, x_t and h_{t-1}, and what many steps have
kept is multiplied at once. It goes the way that the gradients would have gone, through the graph:
as the gradient of one more input, which all steps of a graph share. So autograd adds it up, and
knows when all steps are there. In half precision the sums over the steps are float32 then.

Steps belong together if the state that one gets is that which another made, or a few operations
away from it, as after a mask of the sequences that have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lstm_ext.batching import SavedOnce
from lstm_ext.cpu.products import transposed_matmul
from lstm_ext.engine import is_surrounded

# A graph with fewer numbers in W_ih and W_hh takes longer to be told of what it is to keep than it
# gains. Training with it over without, float32, Zen 4: 20 steps, B 8 H 32 1.11, B 1 H 64 0.96, H
# 128 0.77 to 0.83, H 256 0.50 to 0.68, H 1024 0.37 to 0.46, B 64 H 512 0.89 to 0.92; 8 steps with a
# linear layer after each, B 1 and 8, H 64 1.17 and 1.19, H 128 0.76 and 0.90.
_FEW_WEIGHTS = 1 << 16
# Operations between two steps, and before them, that are looked at: of a stack of layers the states
# are taken apart and put together.
_MOST_BETWEEN = 12
# Kept, before they are multiplied: what there is in memory at once, and a product of more rows is
# no faster.
MOST_ROWS = 1024


class CellWeights:
    """The weights of a cell, as the steps of a graph share them."""

    __slots__ = ("casts", "made_by", "shared", "wanted", "weights")

    def __init__(
        self, weights: Sequence[Tensor | None], casts: Sequence[Tensor | None] | None = None
    ) -> None:
        """weights: weight_ih, weight_hh, bias_ih, bias_hh and None; casts: autocast's of them."""
        self.weights, self.casts = weights, casts
        self.shared: Tensor | None = None  # the input that steps share, once there are two

    def are(self, weights: Sequence[Tensor | None]) -> bool:
        """Whether these are the weights, and to autograd what they were as the input was made."""
        if any(own is not w for own, w in zip(self.weights, weights, strict=True)):
            return False
        return self.shared is None or (self.wanted, self.made_by) == self._to_autograd()

    def _to_autograd(self) -> tuple[list[bool], list[Any]]:
        wanted = [w is not None and w.requires_grad for w in self.weights]
        return wanted, [None if w is None else w.grad_fn for w in self.weights]

    def share(self) -> None:
        """Make that input."""
        if self.shared is None:
            self.wanted, self.made_by = self._to_autograd()
            self.shared = SharedInput.apply(*self.weights)


def cell_weights(
    hx: Any, weights: Sequence[Tensor | None], few: int | None = None
) -> CellWeights | None:
    """Those of a step with the states hx, None for zeros; None where there are ``few``, whose
    gradients are not worth keeping."""
    if weights[0].numel() + weights[1].numel() < (_FEW_WEIGHTS if few is None else few):
        return None
    own = step_before(hx, weights)
    if own is None:
        return CellWeights(weights)
    own.share()
    return own


def step_before(hx: Any, weights: Sequence[Tensor | None]) -> CellWeights | None:
    """Those of the step that made the states hx, if it had the same weights."""
    nodes = [] if hx is None else [hx[1].grad_fn]
    seen = 0
    for node in nodes:  # which grows
        if node is None:
            continue
        own = getattr(node, "cell_weights", None)
        if isinstance(own, CellWeights):
            if own.are(weights):
                return own
            continue
        seen += 1
        if seen > _MOST_BETWEEN:
            return None
        nodes += [before for before, _ in node.next_functions[:_MOST_BETWEEN]]
    return None


def _identity(tensor: Tensor) -> tuple[int, int]:
    """It changes with the numbers, and where the memory is freed."""
    return tensor._version, tensor.data_ptr()


class SharedInput(Function):
    """What all steps of a graph get: a scalar, a function of the weights for autograd alone."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sizes = [None if w is None else (w.shape, w.dtype) for w in weights]
        return torch.zeros((), dtype=torch.float32, device="cpu")

    @staticmethod
    def backward(ctx: Any, kept: Tensor | None) -> tuple[Tensor | None, ...]:
        if kept is None:
            return (None,) * len(ctx.sizes)
        wanted = zip(ctx.needs_input_grad, ctx.sizes, strict=True)
        if not isinstance(kept, KeptSteps):  # all steps made the gradients themselves
            return tuple(torch.zeros(s[0], dtype=s[1]) if flag else None for flag, s in wanted)
        return tuple(
            gradient.to(size[1]) if flag else None
            for gradient, (flag, size) in zip(kept.gradients(), wanted, strict=True)
        )


# What one asks a gradient before it goes on: of this one the answers are those of a zero. What
# makes another gradient of it is not among them.
_QUESTIONS = {
    getattr(torch.ops.aten, name)
    for name in (
        "abs isnan isinf isfinite isneginf isposinf ne eq lt le gt ge any all max min amax amin "
        "mean sum norm linalg_vector_norm _local_scalar_dense is_nonzero equal"
    ).split()
}


class Kept(NamedTuple):
    """Of one step, or of several alike."""

    dgates: Tensor
    x: Tensor
    h_0: Tensor


#: From what steps of one kind have kept and which gradients are wanted: those of weight_ih and
#: weight_hh and of a bias.
Products = Callable[[Sequence[Kept], Sequence[bool]], Sequence[Tensor | None]]


def cell_products(steps: Sequence[Kept], wanted: Sequence[bool]) -> Sequence[Tensor | None]:
    """Products of an LSTMCell: dgates (B, 4H), x (B, in) and h_0 (B, H), also (in) and (H), or
    (1, B, in) and (1, B, H)."""
    dgates, *both = zip(*steps, strict=True)
    rows = [[t.reshape(-1, t.size(-1)) for t in of_steps] for of_steps in both]
    dgates, x, h = (t[0] if len(t) == 1 else torch.cat(t) for t in (dgates, *rows))
    w_ih, w_hh, *biases = wanted
    return transposed_matmul(dgates, x if w_ih else None, h if w_hh else None, any(biases))


class KeptSteps(Tensor):
    """The gradient of a :class:`SharedInput`, of one step or, added up, of several."""

    @staticmethod
    def __new__(cls, *_: Any) -> KeptSteps:
        return Tensor._make_wrapper_subclass(cls, (), dtype=torch.float32)

    def __init__(self, products: Products, step: Kept, rows: int, wanted: Sequence[bool]) -> None:
        """products: equal for steps alike. rows: of a step's dgates. wanted: the gradients, of the
        weights."""
        self._steps = [(products, step)]
        self._are = [_identity(step.x), _identity(step.h_0)]
        self._rows = rows
        self._wanted = wanted
        self._sums: list[Tensor | None] | None = None  # of weight_ih, weight_hh and a bias

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **options: Any) -> str:
        return f"KeptSteps(rows={self._rows})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.add.Tensor and any(isinstance(t, cls) for t in args):
            kept = [t for t in args if isinstance(t, cls)]  # else 0: a step that kept nothing
            if len(kept) == 2:
                kept[0]._add(kept[1])
            return kept[0]
        if function is torch.ops.aten.detach.default:
            return args[0]
        if function.overloadpacket in _QUESTIONS:
            zero = torch.zeros((), dtype=torch.float32)
            args = tuple(zero if isinstance(t, cls) else t for t in args)
            return function(*args, **(kwargs or {}))
        raise NotImplementedError(
            "The gradient of an input that the steps of an lstm_ext cell share is for autograd to "
            f"add up, got {function}"
        )

    def _add(self, more: KeptSteps) -> None:
        self._steps += more._steps
        self._are += more._are
        self._rows += more._rows
        if more._sums is not None:
            self._add_products(more._sums)
        if self._rows >= MOST_ROWS:
            self._multiply()

    def _multiply(self) -> None:
        read = [tensor for _, (_, *both) in self._steps for tensor in both]
        if self._are != [_identity(t) for t in read]:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                "inplace operation: an input or a state of an lstm_ext cell, in backward, before "
                "the gradients of the weights were made of it"
            )
        self._are.clear()
        alike: dict[Products, list[Kept]] = {}
        for products, step in self._steps:
            alike.setdefault(products, []).append(step)
        self._steps, self._rows = [], 0
        for products, steps in alike.items():
            self._add_products(products(steps, self._wanted))

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
        return w_ih, w_hh, *two_biases(b, *self._wanted[2:4]), None


def two_biases(
    b: Tensor | None, of_b_ih: bool, of_b_hh: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of both biases, None where not wanted, from that of one: two tensors, as for
    two parameters, of which a caller may change one in place."""
    return b if of_b_ih else None, (b.clone() if of_b_ih else b) if of_b_hh else None


def may_keep(ctx: Any) -> bool:
    """Whether the backward of a step that shares an input may keep what the weights' gradients are
    made of: not where each of them is asked for numbers, where steps are batched, nor where what
    surrounds backward adds up all that there is, as compiled autograd does."""
    return not (torch.is_anomaly_enabled() or isinstance(ctx, SavedOnce) or is_surrounded())


def nothing_kept() -> Tensor:
    """The shared input's gradient, of a step that made those of the weights itself: compiled
    autograd adds it up in any case."""
    return torch.zeros((), dtype=torch.float32)
