"""The layer as a differentiable function: what is saved, what is computed, double backward."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from lstm_ext import ops, reference
from lstm_ext.ops import LayerGrads, LayerWeights
from lstm_ext.steps import Steps

LayerOutputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: LayerWeights,
    steps: Steps,
    *,
    reverse: bool = False,
    cells: bool = False,
) -> LayerOutputs:
    """One direction of one LSTM layer, on the engine of x's device.

    Args:
        x: (rows, in), rows as ``steps`` says. h0: (B, P). c0: (B, H). All of one dtype and
            device with the weights, unless autocast is on: then all are cast together.
        reverse: walk the steps from the last to the first.
        cells: also return c_t of every step.

    Returns:
        y (rows, P), h_n (B, P), c_n (B, H), and cells (rows, H) or None. Rows past the end of a
        sequence are 0. Differentiable any number of times.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`ops.check_layer` and
            :func:`ops.has_native_kernels`.
    """
    if torch.compiler.is_compiling():
        from lstm_ext import eager  # here, because it loads the compiler

        return eager.lstm_layer(x, h0, c0, weights, steps, reverse=reverse, cells=cells)
    return _lstm_layer(x, h0, c0, weights, steps, reverse=reverse, cells=cells)


def _lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: LayerWeights,
    steps: Steps,
    *,
    reverse: bool,
    cells: bool,
) -> LayerOutputs:
    device = x.device.type
    if ops.autocast_is_on(device):
        dtype = torch.get_autocast_dtype(device)
        x, h0, c0 = (_autocast(t, dtype) for t in (x, h0, c0))
        weights = LayerWeights(*(w if w is None else _autocast(w, dtype) for w in weights))
        with torch.autocast(device, enabled=False):
            return _lstm_layer(x, h0, c0, weights, steps, reverse=reverse, cells=cells)
    if torch.jit.is_tracing() or _is_recorded():
        raise RuntimeError(
            "lstm_ext cannot be traced by torch.jit.trace, torch.export or make_fx, which would "
            "record nothing of the native core. Trace the module that to_torch() returns."
        )
    # A tensor that is negated lazily has the memory of its opposite.
    x, h0, c0 = x.resolve_neg(), h0.resolve_neg(), c0.resolve_neg()
    weights = LayerWeights(*(w if w is None else w.resolve_neg() for w in weights))
    ops.check_layer(x, h0, c0, weights, steps)
    if not ops.has_native_kernels(x.device):
        if device != "meta":
            _warn_no_kernels(device)
        return _reference_layer(x, h0, c0, weights, steps, reverse=reverse, cells=cells)
    inputs = (x, h0, c0, *weights)
    if _needs_autograd(inputs):
        y, h_n, c_n, all_cells, _, _ = LSTMLayer.apply(*inputs, steps, reverse, cells)
        return y, h_n, c_n, all_cells
    y, h_n, c_n, _, c_seq = ops.layer_forward(
        x, h0, c0, weights, steps, reverse=reverse, save=False, cells=cells
    )
    return y, h_n, c_n, None if c_seq is None else c_seq.to(x.dtype)


def _is_recorded() -> bool:
    """Whether torch operations go into a graph (make_fx, export) or run on tensors without data."""
    kinds = torch._C._TorchDispatchModeKey
    mode = torch._C._get_dispatch_mode
    return mode(kinds.PROXY) is not None or mode(kinds.FAKE) is not None


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast's lower-precision list: everything floating but float64."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


def _needs_autograd(inputs: tuple[Tensor | None, ...]) -> bool:
    if torch.autograd.forward_ad._current_level >= 0:
        return True  # the Function refuses forward mode; going around it would drop tangents
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


@functools.cache
def _warn_no_kernels(device: str) -> None:
    warnings.warn(
        f"lstm_ext has no native kernels for {device} tensors in this version: running its "
        "plain torch reference, which is correct and slow",
        stacklevel=5,
    )


def _reference_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: LayerWeights,
    steps: Steps,
    *,
    reverse: bool,
    cells: bool,
) -> LayerOutputs:
    def to_device(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(x.device)

    y, h_n, c_n, all_cells = reference.lstm_layer(
        steps.to_time_major(x),
        h0,
        c0,
        *weights,
        lengths=to_device(steps.lengths),
        reset_mask=to_device(steps.reset_mask),
        reverse=reverse,
    )
    all_cells = steps.from_time_major(all_cells) if cells else None
    return steps.from_time_major(y), h_n, c_n, all_cells


class LSTMLayer(Function):
    """Forward and backward on the native core.

    Saved: the activated gates and c_t, both results of forward, the output, and references to
    the inputs (no copies): a second derivative needs them whichever of them require grad.
    """

    @staticmethod
    def forward(
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        w_hr: Tensor | None,
        steps: Steps,
        reverse: bool,
        cells: bool,
    ) -> tuple[Tensor | None, ...]:
        y, h_n, c_n, gates, c_seq = ops.layer_forward(
            x,
            h0,
            c0,
            LayerWeights(w_ih, w_hh, b_ih, b_hh, w_hr),
            steps,
            reverse=reverse,
            save=True,
            cells=cells,
        )
        if not cells:
            return y, h_n, c_n, None, gates, c_seq
        assert c_seq is not None
        if c_seq.dtype == x.dtype:
            return y, h_n, c_n, c_seq, gates, None  # one tensor, output and saved at once
        return y, h_n, c_n, c_seq.to(x.dtype), gates, c_seq

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, ctx.steps, ctx.reverse, _ = inputs
        y, _, _, all_cells, gates, c_seq = output
        ctx.mark_non_differentiable(*(t for t in (gates, c_seq) if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, y, gates, all_cells if c_seq is None else c_seq)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        wanted = LayerGrads(*ctx.needs_input_grad[:8])
        arguments = (*grad_outputs[:4], *ctx.saved_tensors, ctx.steps, ctx.reverse, wanted)
        # With create_graph the gradients must themselves be differentiable.
        run = LSTMLayerBackward.apply if torch.is_grad_enabled() else LSTMLayerBackward.forward
        return (*run(*arguments), None, None, None)


class LSTMLayerBackward(Function):
    """The first derivative on the native core; its own derivative recomputes the layer in torch."""

    @staticmethod
    def forward(
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        dcells: Tensor | None,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        w_hr: Tensor | None,
        y: Tensor,
        gates: Tensor,
        c_seq: Tensor,
        steps: Steps,
        reverse: bool,
        wanted: LayerGrads,
    ) -> tuple[Tensor | None, ...]:
        weights = LayerWeights(w_ih, w_hh, b_ih, b_hh, w_hr)
        grads = ops.layer_backward(
            *(dy, dh_n, dc_n, dcells),
            *(x, h0, c0, weights, y, gates, c_seq, steps),
            reverse=reverse,
            wanted=wanted,
        )
        return tuple(grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs[:12])  # all but the results of forward: they are recomputed
        ctx.steps, ctx.reverse, ctx.wanted = inputs[15:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
        second_order = _second_order(ctx, second)
        return (*second_order, *([None] * 6))


def _second_order(ctx: FunctionCtx, second: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Vector-Hessian products with ``second``, one of each wanted gradient.

    Differentiates the reference twice. Works on views of the saved tensors, so that a weight
    that is itself a function of x counts as an input of its own.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), ops.without_autocast(ctx.saved_tensors[4].device):
        tensors = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
        grad_outputs, (x, h0, c0, *weights) = tensors[:4], tensors[4:]
        outputs = _reference_layer(
            x,
            h0,
            c0,
            LayerWeights(*weights),
            ctx.steps,
            reverse=ctx.reverse,
            cells=grad_outputs[3] is not None,
        )
        used = [
            (o, g)
            for o, g in zip(outputs, grad_outputs, strict=True)
            if g is not None and o.requires_grad
        ]
        if not used:
            return [None] * len(tensors)
        inputs = [t for t, want in zip(tensors[4:], ctx.wanted, strict=True) if want]
        first = torch.autograd.grad(
            [o for o, _ in used],
            inputs,
            [g for _, g in used],
            create_graph=True,
            allow_unused=True,
        )
        vectors = [v for v, want in zip(second, ctx.wanted, strict=True) if want]
        paired = [
            (f, v)
            for f, v in zip(first, vectors, strict=True)
            if f is not None and v is not None and f.requires_grad
        ]
        differentiable = [i for i, t in enumerate(tensors) if t is not None and t.requires_grad]
        results: list[Tensor | None] = [None] * len(tensors)
        if paired and differentiable:
            grads = torch.autograd.grad(
                [f for f, _ in paired],
                [tensors[i] for i in differentiable],
                [v for _, v in paired],
                create_graph=create_graph,
                allow_unused=True,
            )
            for i, grad in zip(differentiable, grads, strict=True):
                results[i] = grad
    return results
