"""The layer as a differentiable function: what is saved, what is computed, double backward."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from lstm_ext import ops, reference
from lstm_ext.ops import Direction, DirectionGrads, LayerWeights, Masks
from lstm_ext.steps import Steps


class LayerOutputs(NamedTuple):
    """Results of a layer; the lists are over its directions."""

    y: Tensor  # (rows, D*P)
    h_n: list[Tensor]  # (B, P)
    c_n: list[Tensor]  # (B, H)
    cells: Tensor | None  # (rows, D*H)


def lstm_layer(
    x: Tensor,
    directions: list[Direction],
    steps: Steps,
    *,
    cells: bool = False,
) -> LayerOutputs:
    """One LSTM layer, all its directions, on the engine of x's device.

    Args:
        x: (rows, in), rows as ``steps`` says.
        directions: one or two; states (B, P) and (B, H). All of one dtype and device with x,
            unless autocast is on: then all are cast together.
        cells: also return c_t of every step.

    Returns:
        y, the directions side by side; h_n and c_n of each; and cells or None. Rows past the end
        of a sequence are 0. Differentiable any number of times.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`ops.check_layer` and
            :func:`ops.has_native_kernels`.
    """
    if torch.compiler.is_compiling():
        from lstm_ext import eager  # here, because it loads the compiler

        return eager.lstm_layer(x, directions, steps, cells=cells)
    return eager_layer(x, directions, steps, cells=cells)


def eager_layer(
    x: Tensor, directions: list[Direction], steps: Steps, *, cells: bool
) -> LayerOutputs:
    """:func:`lstm_layer` outside of torch.compile."""
    device = x.device.type
    if ops.autocast_is_on(device):
        dtype = torch.get_autocast_dtype(device)
        x, directions = _map(lambda t: _autocast(t, dtype), x, directions)
        with torch.autocast(device, enabled=False):
            return eager_layer(x, directions, steps, cells=cells)
    if torch.jit.is_tracing() or _is_recorded():
        raise RuntimeError(
            "lstm_ext cannot be traced by torch.jit.trace, torch.export or make_fx, which would "
            "record nothing of the native core. Trace the module that to_torch() returns; "
            "for ONNX there is lstm_ext.onnx.export."
        )
    flat = [x, *_flatten(directions)]
    if _any_negated(flat):  # lazily: the memory is that of the opposite
        x, directions = _map(Tensor.resolve_neg, x, directions)
        flat = [x, *_flatten(directions)]
    ops.check_layer(x, directions, steps)
    if not ops.has_native_kernels(x.device):
        if device != "meta":
            _warn_no_kernels(device)
        return _reference_layer(x, directions, steps, cells=cells)
    if _needs_autograd(flat):
        kinds = tuple((d.reverse, d.w.masks) for d in directions)
        y, all_cells, *states = LSTMLayer.apply(steps, kinds, cells, *flat)
        D = len(directions)
        return LayerOutputs(y, states[:D], states[D : 2 * D], all_cells)
    result = ops.layer_forward(x, directions, steps, save=False, cells=cells)
    all_cells = _side_by_side(result.c_seq, x.dtype) if cells else None
    return LayerOutputs(result.y, result.h_n, result.c_n, all_cells)


def _any_negated(tensors: list[Tensor | None]) -> bool:
    for tensor in tensors:  # a loop: a generator takes twice as long, at every call
        if tensor is not None and tensor.is_neg():
            return True
    return False


#: What a direction is besides its tensors: whether it is the reverse one, and its masks, which
#: nobody else holds.
Kind = tuple[bool, Masks | None]


def _map(function: Any, x: Tensor, directions: list[Direction]) -> tuple[Tensor, list[Direction]]:
    def apply(weights: LayerWeights) -> LayerWeights:
        *tensors, masks = weights
        return LayerWeights(*(t if t is None else function(t) for t in tensors), masks)

    return function(x), [
        Direction(function(d.h0), function(d.c0), apply(d.w), d.reverse) for d in directions
    ]


def _flatten(directions: list[Direction]) -> list[Tensor | None]:
    """The tensors of all directions, as arguments of a Function."""
    if len(directions) == 1:
        h0, c0, w, _ = directions[0]
        return [h0, c0, *w.tensors]
    return [tensor for d in directions for tensor in (d.h0, d.c0, *d.w.tensors)]


def _grouped(flat: Sequence[Any], groups: int) -> list[Sequence[Any]]:
    """The inverse of :func:`_flatten`, a group a direction."""
    size = len(flat) // groups
    return [flat[k * size : (k + 1) * size] for k in range(groups)]


def _directions(flat: Sequence[Any], kinds: Sequence[Kind]) -> list[Direction]:
    return [
        Direction(h0, c0, _weights(weights, masks), reverse)
        for (h0, c0, *weights), (reverse, masks) in zip(
            _grouped(flat, len(kinds)), kinds, strict=True
        )
    ]


def _weights(tensors: list[Tensor | None], masks: Masks | None) -> LayerWeights:
    weights = LayerWeights(*tensors)
    return weights if masks is None else weights._replace(masks=masks)


def _side_by_side(parts: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    tensors = [part.to(dtype) for part in parts if part is not None]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)


def _is_recorded() -> bool:
    """Whether torch operations go into a graph (make_fx, export) or run on tensors without data."""
    kinds = torch._C._TorchDispatchModeKey
    mode = torch._C._get_dispatch_mode
    return mode(kinds.PROXY) is not None or mode(kinds.FAKE) is not None


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast's lower-precision list: everything floating but float64."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


def _needs_autograd(inputs: list[Tensor | None]) -> bool:
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
    x: Tensor, directions: list[Direction], steps: Steps, *, cells: bool
) -> LayerOutputs:
    def to_device(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(x.device)

    def masks(w: LayerWeights) -> dict[str, Any]:
        h_dropout, keep_h, keep_c = w.masks or Masks()
        return {
            "h_dropout": None if h_dropout is None else h_dropout.to(x.dtype),
            "keep_h": steps.to_time_major(keep_h) if isinstance(keep_h, Tensor) else keep_h,
            "keep_c": steps.to_time_major(keep_c) if isinstance(keep_c, Tensor) else keep_c,
        }

    time_major = steps.to_time_major(x)
    results = [
        reference.lstm_layer(
            time_major,
            d.h0,
            d.c0,
            *d.w.tensors,
            **masks(d.w),
            lengths=to_device(steps.lengths),
            reset_mask=to_device(steps.reset_mask),
            reverse=d.reverse,
        )
        for d in directions
    ]
    y, h_n, c_n, all_cells = zip(*results, strict=True)
    return LayerOutputs(
        _side_by_side([steps.from_time_major(part) for part in y], x.dtype),
        list(h_n),
        list(c_n),
        _side_by_side([steps.from_time_major(part) for part in all_cells], x.dtype)
        if cells
        else None,
    )


class LSTMLayer(Function):
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
        result = ops.layer_forward(x, _directions(flat, kinds), steps, save=True, cells=cells)
        c_seq = result.c_seq
        all_cells = _side_by_side(c_seq, x.dtype) if cells else None
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
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        grads = grad_outputs[: 2 + 2 * len(ctx.kinds)]
        wanted = ctx.needs_input_grad[3:]
        arguments = (ctx.steps, ctx.kinds, wanted, *grads, *ctx.saved_tensors)
        # With create_graph the gradients must themselves be differentiable.
        run = LSTMLayerBackward.apply if torch.is_grad_enabled() else LSTMLayerBackward.forward
        return (None, None, None, *run(*arguments))


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
        more = _grouped(saved[2 * D :], D)
        dx, grads = ops.layer_backward(
            dy,
            dcells,
            states[:D],
            states[D:],
            x,
            _directions(flat, kinds),
            y,
            [(saved[k], saved[D + k], *more[k]) for k in range(D)],
            steps,
            wanted_x=wanted[0],
            wanted=[DirectionGrads(*group) for group in _grouped(wanted[1:], D)],
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
    def backward(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
        return (*[None] * 3, *_second_order(ctx, second), *[None] * ctx.recomputed)


def _second_order(ctx: FunctionCtx, second: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Vector-Hessian products with ``second``, one of each wanted gradient.

    Differentiates the reference twice. Works on views of the saved tensors, so that a weight
    that is itself a function of x counts as an input of its own.
    """
    create_graph = torch.is_grad_enabled()
    outputs_count = 2 + 2 * len(ctx.kinds)
    with torch.enable_grad(), ops.without_autocast(ctx.saved_tensors[outputs_count].device):
        tensors = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
        grad_outputs, (x, *flat) = tensors[:outputs_count], tensors[outputs_count:]
        layer = _reference_layer(
            x,
            _directions(flat, ctx.kinds),
            ctx.steps,
            cells=grad_outputs[1] is not None,
        )
        outputs = (layer.y, layer.cells, *layer.h_n, *layer.c_n)
        used = [
            (o, g)
            for o, g in zip(outputs, grad_outputs, strict=True)
            if g is not None and o is not None and o.requires_grad
        ]
        if not used:
            return [None] * len(tensors)
        inputs = [t for t, want in zip(tensors[outputs_count:], ctx.wanted, strict=True) if want]
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
