"""The LSTM cell alone, on pre-activations that somebody else made: a convolution, for one.

On the CPU the native core's cell, a step without a recurrent product. Elsewhere the formula of
:mod:`reference` in torch operations: the CUDA kernels have no step without a product. So, too,
under whatever must see torch's operations: torch.compile (whose compiler fuses them itself),
torch.export, make_fx, vmap, jvp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lstm_ext import ops, reference
from lstm_ext.cpu_engine import _workspace
from lstm_ext.engine import DTYPE_CODE, address, native_steps
from lstm_ext.native import _C
from lstm_ext.steps import Steps


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
    if _must_be_seen() or not ops.has_native_kernels(a.device) or a.device.type != "cpu":
        return _formula(a, h, c, w_ch, steps)
    a, h, c = (t.resolve_neg().contiguous() for t in (a, h, c))
    w_ch = None if w_ch is None else w_ch.resolve_neg().contiguous()
    return PointwiseCell.apply(steps, a, h, c, w_ch)


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


class PointwiseCell(Function):
    """The native cell. Saves its inputs, and makes the activated gates again in backward: a
    second derivative needs the pre-activations, and to keep both would double the memory."""

    @staticmethod
    def forward(
        steps: Steps, a: Tensor, h: Tensor, c: Tensor, w_ch: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _native_forward(steps, a, h, c, w_ch, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.steps, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # With create_graph the gradients must be differentiable.
        run = _formula_backward if torch.is_grad_enabled() else _native_backward
        return None, *run(ctx.steps, grads, *ctx.saved_tensors)


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


def _native_forward(
    steps: Steps, a: Tensor, h: Tensor, c: Tensor, w_ch: Tensor | None, gates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The new h and c. Rows of ``gates`` (rows, 4C) that take the step get the activated gates."""
    rows, C = c.shape
    code, threads = DTYPE_CODE[a.dtype], torch.get_num_threads()
    variants = _C.Variants(peephole=address(w_ch))
    h_new, c_new = torch.empty_like(h), torch.empty_like(c)
    native = native_steps(_C, steps, False)
    workspace = _workspace(
        _C.cpu_forward_workspace(code, threads, native, C, C, 0, False, False, False, variants)
    )
    _C.cpu_forward(
        dtype=code,
        threads=threads,
        steps=native,
        H=C,
        P=C,
        I=0,
        gx=address(a),
        x=0,
        w_ih=0,
        b_ih=0,
        b_hh=0,
        w_hh=0,
        w_hr=0,
        h0=address(h),
        c0=address(c),
        variants=variants,
        gates=address(gates),
        c_seq=address(c_new),
        norm=0,
        norm_r=0,
        # One step: what it puts out is also the last state.
        y=address(h_new),
        y_stride=C,
        h_n=address(h_new),
        c_n=address(c_new),
        workspace=address(workspace),
    )
    return h_new, c_new


def _native_backward(
    steps: Steps,
    grads: tuple[Tensor | None, ...],
    a: Tensor,
    h: Tensor,
    c: Tensor,
    w_ch: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of a, h, c and w_ch."""
    rows, C = c.shape
    code, threads = DTYPE_CODE[a.dtype], torch.get_num_threads()
    variants = _C.Variants(peephole=address(w_ch))
    dh, dc = (None if g is None else g.resolve_neg().contiguous() for g in grads)
    gates = torch.empty_like(a)
    _, c_new = _native_forward(steps, a, h, c, w_ch, gates)
    da = torch.empty_like(a) if steps.lengths is None else torch.zeros_like(a)
    dw_ch = None if w_ch is None else a.new_zeros(rows, 3 * C)
    dh0, dc0 = torch.empty_like(h), torch.empty_like(c)
    native = native_steps(_C, steps, False)
    workspace = _workspace(
        _C.cpu_backward_workspace(code, threads, native, C, C, False, False, variants)
    )
    _C.cpu_backward(
        dtype=code,
        threads=threads,
        steps=native,
        H=C,
        P=C,
        variants=variants,
        w_hh=0,
        w_hr=0,
        h0=0,
        c0=address(c),
        y=0,
        y_stride=C,
        gates=address(gates),
        c_seq=address(c_new),
        norm=0,
        norm_r=0,
        dy=0,
        dy_stride=0,
        dh_n=address(dh),
        dc_n=address(dc),
        dcells=0,
        dgates=address(da),
        dproduct=0,
        h_prev=0,
        dr=0,
        cell_out=0,
        dpeephole=address(dw_ch),
        dnorm=0,
        dh0=address(dh0),
        dc0=address(dc0),
        workspace=address(workspace),
    )
    return da, dh0, dc0, None if dw_ch is None else dw_ch.sum(0)
