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
    if w_ch is None:
        return _cell(a, h, c, steps)
    w_i, w_f, w_o = w_ch.chunk(3)
    none = torch.zeros_like(c)
    a = a + torch.cat([w_i * c, w_f * c, none, none], dim=1)
    # o must see the new c: once for c, whose h is of no use, and again for h.
    _, c_new = _cell(a, h, c, steps)
    return _cell(a + torch.cat([none, none, none, w_o * c_new], dim=1), h, c, steps)


def _cell(a: Tensor, h: Tensor, c: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    if _must_be_seen() or not ops.has_native_kernels(a.device) or a.device.type != "cpu":
        return _formula(a, h, c, steps)
    a, h, c = (t.resolve_neg().contiguous() for t in (a, h, c))
    return PointwiseCell.apply(steps, a, h, c)


def _must_be_seen() -> bool:
    """Whether something follows torch's operations that would see none of the core's."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _get_current_dispatch_mode() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _formula(a: Tensor, h: Tensor, c: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    h_new, c_new = reference.lstm_cell(a, c)
    if steps.lengths is None:
        return h_new, c_new
    on = steps.active().T  # (rows, 1)
    return torch.where(on, h_new, h), torch.where(on, c_new, c)


class PointwiseCell(Function):
    """The native cell. Saves its inputs, and makes the activated gates again in backward: a
    second derivative needs the pre-activations, and to keep both would double the memory."""

    @staticmethod
    def forward(steps: Steps, a: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return _native_forward(steps, a, h, c, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.steps, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        a, h, c = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradients must be differentiable
            return None, *_formula_backward(ctx.steps, grads, (a, h, c))
        return None, *_native_backward(ctx.steps, grads, a, h, c)


def _formula_backward(
    steps: Steps, grads: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    # Views, so that an input that is a function of another counts as one of its own.
    inputs = tuple(t.view_as(t) if t.requires_grad else t for t in inputs)
    outputs = _formula(*inputs, steps)
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [t for t in inputs if t.requires_grad]
    made = iter(
        torch.autograd.grad(
            [o for o, _ in used], wanted, [g for _, g in used], create_graph=True, allow_unused=True
        )
        if used
        else [None] * len(wanted)
    )
    return tuple(next(made) if t.requires_grad else None for t in inputs)


def _native_forward(
    steps: Steps, a: Tensor, h: Tensor, c: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The new h and c. Rows of ``gates`` (rows, 4C) that take the step get the activated gates."""
    rows, C = c.shape
    code, threads = DTYPE_CODE[a.dtype], torch.get_num_threads()
    h_new, c_new = torch.empty_like(h), torch.empty_like(c)
    workspace = _workspace(
        _C.cpu_forward_workspace(code, threads, rows, C, C, 0, False, False, False)
    )
    _C.cpu_forward(
        dtype=code,
        threads=threads,
        steps=native_steps(_C, steps, False),
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
        gates=address(gates),
        c_seq=address(c_new),
        # One step: what it puts out is also the last state.
        y=address(h_new),
        y_stride=C,
        h_n=address(h_new),
        c_n=address(c_new),
        workspace=address(workspace),
    )
    return h_new, c_new


def _native_backward(
    steps: Steps, grads: tuple[Tensor | None, ...], a: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, h and c."""
    rows, C = c.shape
    code, threads = DTYPE_CODE[a.dtype], torch.get_num_threads()
    dh, dc = (None if g is None else g.resolve_neg().contiguous() for g in grads)
    gates = torch.empty_like(a)
    _, c_new = _native_forward(steps, a, h, c, gates)
    da = torch.empty_like(a) if steps.lengths is None else torch.zeros_like(a)
    dh0, dc0 = torch.empty_like(h), torch.empty_like(c)
    workspace = _workspace(_C.cpu_backward_workspace(code, threads, rows, C, C, False, False))
    _C.cpu_backward(
        dtype=code,
        threads=threads,
        steps=native_steps(_C, steps, False),
        H=C,
        P=C,
        w_hh=0,
        w_hr=0,
        h0=0,
        c0=address(c),
        y=0,
        y_stride=C,
        gates=address(gates),
        c_seq=address(c_new),
        dy=0,
        dy_stride=0,
        dh_n=address(dh),
        dc_n=address(dc),
        dcells=0,
        dgates=address(da),
        h_prev=0,
        dr=0,
        dh0=address(dh0),
        dc0=address(dc0),
        workspace=address(workspace),
    )
    return da, dh0, dc0
