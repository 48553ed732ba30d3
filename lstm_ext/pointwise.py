"""The LSTM cell alone, on pre-activations that somebody else made: a convolution, for one.

Where there are kernels, the native core's cell (:mod:`cpu_cell`, :mod:`cuda_cell`). Elsewhere the
formula of :mod:`reference` in torch operations; and under whatever must see torch's operations:
torch.compile (whose compiler fuses them itself), torch.export, make_fx, vmap, jvp.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lstm_ext import cpu_cell, ops, reference
from lstm_ext.autograd import needs_grad
from lstm_ext.batching import batched_gradients
from lstm_ext.cuda_cell import CudaCells
from lstm_ext.cuda_engine import CudaEngine
from lstm_ext.derivatives import LayerFunction
from lstm_ext.engine import in_memory
from lstm_ext.steps import Steps


class Cells(Protocol):
    """What runs the cell on one kind of device; tensors as in :func:`lstm_cell`, contiguous."""

    def cell_forward(
        self, steps: Steps, a: Tensor, h: Tensor, c: Tensor, w_ch: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The states after the step."""
        ...

    def cell_backward(
        self,
        steps: Steps,
        grads: tuple[Tensor | None, ...],
        a: Tensor,
        h: Tensor,
        c: Tensor,
        w_ch: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of a, h, c and w_ch from those of the states, None for zero."""
        ...


def _cells(device: torch.device) -> Cells:
    engine = ops.engine_of(device)
    return CudaCells(engine) if isinstance(engine, CudaEngine) else cpu_cell


def lstm_cell(
    a: Tensor, h: Tensor, c: Tensor, steps: Steps, w_ch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of ``rows`` cells, differentiable any number of times.

    Args:
        a: (rows, 4C) pre-activations, gates i, f, g, o, without the peepholes.
        h, c: (rows, C) states before the step, of a's dtype, float64 or float32.
        steps: ``Steps.padded(1, rows)``, with lengths where some rows take no step.
        w_ch: (3C,) peepholes of i, f, o, or None. i and f see c before the step, o after it
            (Gers et al. 2002; ONNX LSTM).

    Returns:
        The states after it, (rows, C) each; those of a row that takes no step are as before.
    """
    if _must_be_seen() or not ops.has_native_kernels(a.device):
        return _formula(a, h, c, w_ch, steps)
    a, h, c = (in_memory(t).contiguous() for t in (a, h, c))
    w_ch = None if w_ch is None else in_memory(w_ch).contiguous()
    if needs_grad((a, h, c, w_ch)):
        return PointwiseCell.run(steps, a, h, c, w_ch)
    return PointwiseCell.forward(steps, a, h, c, w_ch)


def _must_be_seen() -> bool:
    """Whether something follows torch's operations that would see none of the core's."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _get_current_dispatch_mode() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _formula(
    a: Tensor, h: Tensor, c: Tensor, w_ch: Tensor | None, steps: Steps
) -> tuple[Tensor, Tensor]:
    h_new, c_new = reference.lstm_cell(a, c, w_ch)
    if steps.lengths is None:
        return h_new, c_new
    on = steps.active().T  # (rows, 1)
    return torch.where(on, h_new, h), torch.where(on, c_new, c)


class PointwiseCell(LayerFunction):
    """The native cell. Saves its inputs, and makes the activated gates again in backward: a
    second derivative needs the pre-activations, and to keep both would double the memory."""

    @staticmethod
    def forward(
        steps: Steps, a: Tensor, h: Tensor, c: Tensor, w_ch: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _cells(a.device).cell_forward(steps, a, h, c, w_ch)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.steps, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @batched_gradients
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        a, *others = ctx.saved_tensors  # once: torch.utils.checkpoint gives them no second time
        # With create_graph the gradients must be differentiable.
        run = _formula_backward if torch.is_grad_enabled() else _cells(a.device).cell_backward
        return None, *run(ctx.steps, grads, a, *others)


def _formula_backward(
    steps: Steps, grads: tuple[Tensor | None, ...], *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    # Views, so that an input that is a function of another counts as one of its own.
    a, h, c, w_ch = views = [None if t is None else t.view_as(t) for t in inputs]
    outputs = _formula(a, h, c, w_ch, steps)
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [k for k, t in enumerate(views) if t is not None and t.requires_grad]
    results: list[Tensor | None] = [None] * len(views)
    if used:
        made = torch.autograd.grad(
            [o for o, _ in used],
            [views[k] for k in wanted],
            [g for _, g in used],
            create_graph=True,
            allow_unused=True,
        )
        for k, gradient in zip(wanted, made, strict=True):
            results[k] = gradient
    return tuple(results)
