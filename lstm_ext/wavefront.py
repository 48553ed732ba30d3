"""Stacks of layers that run as a wavefront on CUDA: which do, and their place in autograd.

Off by default, for it has never run on a GPU: LSTM_EXT_WAVEFRONT=on, or ``wavefront`` of the CUDA
engine. :mod:`cuda.wavefront` runs them; csrc/cuda/plan.cpp says in how many parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from lstm_ext import batching, ops
from lstm_ext.autograd import needs_grad
from lstm_ext.cuda import wavefront as cuda_wavefront
from lstm_ext.cuda.wavefront import Saved, StackResult
from lstm_ext.engine import in_memory, is_recorded, is_recording, tensors_of
from lstm_ext.flat import grouped
from lstm_ext.layer import lstm_layer
from lstm_ext.ops import Direction, DirectionGrads, LayerWeights
from lstm_ext.steps import Steps

if TYPE_CHECKING:
    from lstm_ext.modules import LSTM

_INPUTS = 6  # of a layer: h0, c0, w_ih, w_hh, b_ih, b_hh

Outputs = tuple[Tensor, Tensor, Tensor, Tensor | None]  # y, h_n, c_n, cells


def applies(module: LSTM, x: Tensor, steps: Steps) -> bool:
    """Whether the layers of a call run as a wavefront.

    Without directions, projections, variants and checkpoints, eagerly, and where the plan has more
    than one part for the forward pass or, while gradients are recorded, for backward.
    """
    engine: Any = ops._engines.get(x.device.type)
    if not getattr(engine, "wavefront", False):
        return False
    grads = is_recording()
    if (
        torch.compiler.is_compiling()
        or is_recorded()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or module.bidirectional
        or module.proj_size
        or module._varied()
        or module.dropout == 1
        or (grads and module.checkpoint_every is not None)
        or min(steps.T, steps.B) == 0
        or (steps.offsets is not None and steps.batch_sizes is None)
    ):
        return False
    dtype = _dtype(x)
    tf32 = engine.uses_tf32(x.new_empty(0, dtype=dtype))
    sizes = (steps.B, module.hidden_size, module.num_layers, steps.T)
    return any(
        cuda_wavefront.plan_of(engine, x.device, dtype, tf32, backward, *sizes).parts > 1
        for backward in ((False, True) if grads else (False,))
    )


def run(
    module: LSTM, x: Tensor, h0: Sequence[Tensor], c0: Sequence[Tensor], steps: Steps
) -> Outputs:
    """All layers of a module on the rows of x, as ``LSTM._layers`` returns them."""
    dtype, dropout = _dtype(x), module.dropout if module.training else 0.0
    ops_steps = steps
    if steps.batch_first and steps.offsets is None:
        # A part's rows lie together only if time comes first.
        ops_steps = _time_major(steps)
        x = steps.to_time_major(x).reshape(steps.rows, x.size(1))
    layers, kept = [], []
    like = x
    for k in range(module.num_layers):  # what is random in the order of the layers, as in turn
        w = module._layer_weights(k, like, steps, h0[k], c0[k])
        layers.append(Direction(h0[k], c0[k], w, False))
        like = x.new_empty(0, dtype=dtype)
        if k + 1 < module.num_layers:
            kept.append(_draw(dropout, like, steps.rows, w.w_hh.size(1)) if dropout else None)
    scale = 1 / (1 - dropout)
    flat = [t for h, c, w, _ in layers for t in (h, c, *tensors_of(w)[: _INPUTS - 2])]
    x, *flat = (None if t is None else _prepared(t, dtype) for t in (x, *flat))
    cells = module.return_cell_sequence
    with ops.without_autocast(x.device):
        layers = _layers(flat)
        _check(x, layers, ops_steps)
        if needs_grad([x, *flat]):
            outputs = WavefrontStack.apply(ops_steps, kept, scale, cells, x, *flat)
        else:
            outputs = _outputs(_forward(x, layers, kept, scale, ops_steps, False, cells), cells)
    y, h_n, c_n, all_cells = outputs
    if ops_steps is not steps:
        y, all_cells = (
            None if t is None else steps.from_time_major(ops_steps.to_time_major(t))
            for t in (y, all_cells)
        )
    return y, h_n, c_n, all_cells


class WavefrontStack(Function):
    """A stack as one node, on the caller's stream; it forks and joins the lanes in itself."""

    @staticmethod
    def forward(
        ctx: Any,
        steps: Steps,
        kept: list[Tensor | None],
        scale: float,
        cells: bool,
        x: Tensor,
        *flat: Tensor | None,
    ) -> Outputs:
        result = _forward(x, _layers(flat), kept, scale, steps, True, cells)
        ctx.steps, ctx.scale, ctx.cells = steps, scale, cells
        outputs = _outputs(result, cells)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *flat, *kept, *(t for kind in result.of_layers for t in kind))
        return outputs

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        dy, dh_n, dc_n, dcells = grad_outputs
        count = len(ctx.needs_input_grad) - 5  # of flat
        L = count // _INPUTS
        x, *saved = ctx.saved_tensors
        flat, saved = saved[:count], saved[count:]
        kept, saved = saved[: L - 1], grouped(saved[L - 1 :], 4)
        wanted_x, *wanted = ctx.needs_input_grad[4:]
        if (
            torch.is_grad_enabled()  # create_graph
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
        ):
            return (None,) * 4 + _in_turn(ctx, x, flat, kept, grad_outputs)
        layers, results = _layers(flat), Saved(*saved)
        for of_layer, layer in zip(zip(*results, strict=True), layers, strict=True):
            layer_x, y, gates, c_seq = of_layer
            ops.check_saved(grad_outputs, layer_x, [layer], y, [(gates, c_seq)], ctx.steps)
        dx, grads = cuda_wavefront.backward(
            ops.engine_of(x.device),
            dy,
            dcells,
            dh_n,
            dc_n,
            layers,
            kept,
            ctx.scale,
            results,
            ctx.steps,
            wanted_x=wanted_x,
            wanted=[DirectionGrads(*group, False) for group in grouped(wanted, L)],
        )
        none = (None,) * _INPUTS
        return (None,) * 4 + (dx, *(g for k in grads for g in (none if k is None else k[:_INPUTS])))


def _in_turn(
    ctx: Any,
    x: Tensor,
    flat: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients as differentiable functions: by the layers in turn, computed again."""
    needed = ctx.needs_input_grad[4:]
    results: list[Tensor | None] = [None] * len(needed)
    with torch.enable_grad(), ops.without_autocast(x.device):
        # Each a tensor of its own: one may be a function of another, or another twice.
        own = [None if t is None else t.view_as(t) for t in (x, *flat)]
        y, layers = own[0], _layers(own[1:])
        h_n, c_n, cells = [], [], None
        for k, direction in enumerate(layers):
            last = k + 1 == len(layers)
            y, h, c, cells = lstm_layer(y, [direction], ctx.steps, cells=last and ctx.cells)
            h_n += h
            c_n += c
            if not last and kept[k] is not None:
                y = y * kept[k] * ctx.scale
        outputs = (y, torch.stack(h_n), torch.stack(c_n), cells)
        used = [k for k, g in enumerate(grad_outputs) if g is not None]
        wanted = [k for k, is_needed in enumerate(needed) if is_needed]
        grads = torch.autograd.grad(
            [outputs[k] for k in used],
            [own[k] for k in wanted],
            [grad_outputs[k] for k in used],
            create_graph=True,
            allow_unused=True,
        )
    for k, grad in zip(wanted, grads, strict=True):
        results[k] = grad
    return tuple(results)


def _forward(
    x: Tensor,
    layers: list[Direction],
    kept: list[Tensor | None],
    scale: float,
    steps: Steps,
    save: bool,
    cells: bool,
) -> StackResult:
    engine: Any = ops.engine_of(x.device)
    return cuda_wavefront.forward(engine, x, layers, kept, scale, steps, save=save, cells=cells)


def _outputs(result: StackResult, cells: bool) -> Outputs:
    y, c_seq = result.of_layers.y[-1], result.of_layers.c_seq[-1]
    return y, result.h_n, result.c_n, c_seq.to(y.dtype) if cells else None


def _layers(flat: Sequence[Tensor | None]) -> list[Direction]:
    groups = grouped(flat, len(flat) // _INPUTS)
    return [Direction(h, c, LayerWeights(*w), False) for h, c, *w in groups]


def _check(x: Tensor, layers: list[Direction], steps: Steps) -> None:
    """As :func:`layer.lstm_layer` does for each."""
    for k, layer in enumerate(layers):
        # Of a deeper layer's input only the size is known.
        rows = x if k == 0 else x.new_empty(1).expand(steps.rows, layers[k - 1].w.w_hh.size(1))
        ops.check_layer(rows, [layer], steps)


def _dtype(x: Tensor) -> torch.dtype:
    """That of the layers, autocast's if it is on."""
    if ops.autocast_is_on(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _prepared(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts; and its own values where it is lazily negated."""
    return in_memory(tensor.to(dtype) if tensor.dtype != torch.float64 else tensor)


def _draw(p: float, like: Tensor, rows: int, width: int) -> Tensor:
    """What dropout keeps between two layers, bool, drawn as ``LSTM._drop`` draws it."""
    return torch.native_dropout(like.new_ones(rows, width), p, True)[1]


def _time_major(steps: Steps) -> Steps:
    if steps.lengths is None and steps.reset_mask is None:
        return Steps.padded(steps.T, steps.B)
    tensors = {"lengths": steps.lengths, "reset_mask": steps.reset_mask}
    return Steps(steps.T, steps.B, rows=steps.rows, **tensors)
