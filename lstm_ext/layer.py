"""One LSTM layer, as the modules call it: what computes it depends on what surrounds the call."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._guards import TracingContext
from torch.autograd import forward_ad

from lstm_ext import library, ops, parts_library
from lstm_ext.autocast import cast_weight
from lstm_ext.autograd import LSTMLayer, has_tangent, needs_grad
from lstm_ext.checkpointing import PartsLayer
from lstm_ext.engine import (
    asked_once_a_graph,
    in_memory,
    is_lazy,
    is_recorded,
    is_recording,
    is_surrounded,
    is_watched,
    refuse_jit,
)
from lstm_ext.flat import flatten, kinds_of, map_tensors
from lstm_ext.ops import Direction
from lstm_ext.plain import plain_layer, takes_more
from lstm_ext.steps import Steps
from lstm_ext.tensors import is_autocast
from lstm_ext.torch_engine import LayerOutputs, reference_layer, side_by_side

# Numbers of a weight from which a cast takes longer than the question for the one that is kept:
# asked, one step of B 1 took 1.2 times as long with H 64, and as long with H 128 (Zen 4).
_LARGE = 1 << 16


def lstm_layer(
    x: Tensor,
    directions: list[Direction],
    steps: Steps,
    *,
    cells: bool = False,
    every: int | None = None,
) -> LayerOutputs:
    """One LSTM layer, all its directions, on the engine of x's device.

    Args:
        x: (rows, in), rows as ``steps`` says.
        directions: one or two; states (B, P) and (B, H). All of one dtype and device with x,
            unless autocast is on: then all are cast together.
        cells: also return c_t of every step.
        every: where a derivative may be asked for, keep no gates, but the state of every so many
            steps; see :mod:`checkpointing`. Where torch operations make the layer, they keep all.

    Returns:
        y, the directions side by side; h_n and c_n of each; and cells or None. Rows past the end
        of a sequence are 0. Differentiable any number of times, in forward mode and under the
        transforms of torch.func too. What records operations (torch.compile, torch.export,
        make_fx) sees one operator, which :mod:`library` or :mod:`parts_library` defines, or, in
        forward mode, those of :mod:`reference`.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`ops.check_layer` and
            :func:`ops.has_native_kernels`.
    """
    if (steps.is_whole or takes_more(x)) and not (cells or is_surrounded()):
        made = _plain(x, directions, steps) if every is None or steps.T <= every else None
        if made is not None:
            return made
    device = x.device.type
    if ops.autocast_is_on(device):
        dtype = torch.get_autocast_dtype(device)
        # Where autograd records, a layer's weights are cast for each call, whose gradients are
        # then added in their own dtype.
        kept = not (is_watched() or is_recording() or torch._C._are_functorch_transforms_active())

        def cast(tensor: Tensor) -> Tensor:
            if not is_autocast(tensor.dtype):
                return tensor
            large = tensor.numel() >= _LARGE
            return cast_weight(tensor, dtype) if kept and large else tensor.to(dtype)

        x, directions = map_tensors(cast, x, directions)
        with torch.autocast(device, enabled=False):
            return lstm_layer(x, directions, steps, cells=cells, every=every)
    compiling = torch.compiler.is_compiling()
    if compiling or is_recorded():
        forward_mode = not compiling and _is_forward_mode([x, *flatten(directions)])
        if forward_mode or not ops.has_native_kernels(x.device):
            return reference_layer(x, directions, steps, cells=cells)
        _refuse_onnx()
        if every is not None:
            return parts_library.lstm_layer_parts(x, directions, steps, cells=cells, every=every)
        return library.lstm_layer(x, directions, steps, cells=cells)
    if torch.jit.is_tracing():
        refuse_jit()
    flat = [x, *flatten(directions)]
    if _any_lazy(flat):
        x, directions = map_tensors(in_memory, x, directions)
        flat = [x, *flatten(directions)]
    ops.check_layer(x, directions, steps)
    forward_mode = _is_forward_mode(flat)
    if forward_mode and not (_tangents_go_on() and ops.has_native_second(x, directions, steps)):
        return reference_layer(x, directions, steps, cells=cells)
    if not ops.has_native_kernels(x.device):
        if device != "meta":
            _warn_no_kernels(device)
        return reference_layer(x, directions, steps, cells=cells)
    if torch._C._are_functorch_transforms_active() or forward_mode or needs_grad(flat):
        kinds = kinds_of(directions)
        if every is None or steps.T <= every:  # a graph does not ask: it is for any number
            y, all_cells, *states = LSTMLayer.run(steps, kinds, cells, *flat)
        else:
            y, all_cells, *states = PartsLayer.run(steps, kinds, cells, every, *flat)
        D = len(directions)
        return LayerOutputs(y, states[:D], states[D : 2 * D], all_cells)
    result = ops.layer_forward(x, directions, steps, save=False, cells=cells)
    all_cells = side_by_side(result.c_seq, x.dtype) if cells else None
    return LayerOutputs(result.y, result.h_n, result.c_n, all_cells)


def _plain(x: Tensor, directions: list[Direction], steps: Steps) -> LayerOutputs | None:
    """By :func:`plain.plain_layer`; None where it is not for that."""
    if steps.T == 0:
        return None
    states, weights = [], []
    for k, (h0, c0, w, reverse) in enumerate(directions):
        if reverse != (k == 1) or w.varied:
            return None
        states += (h0, c0)
        weights += w[:5]
    T = steps.T if steps.is_whole else steps
    P = 0 if weights[4] is None else states[0].size(-1)
    sizes = x.size(-1), states[1].size(-1)
    made = plain_layer(x, states, weights, *sizes, T, steps.batch_first, P)
    if made is None:
        return None
    y, *last = made
    D = len(directions)
    return LayerOutputs(y, last[:D], last[D:], None)


@asked_once_a_graph
def _refuse_onnx() -> None:
    # The first is also true in other threads, which only compute.
    if torch.onnx.is_in_onnx_export() and TracingContext.try_get() is not None:
        raise RuntimeError(
            "torch.onnx.export knows no operator of lstm_ext: use lstm_ext.onnx.export(model, "
            "args, path), or export the module that to_torch() returns"
        )


def _any_lazy(tensors: list[Tensor | None]) -> bool:
    for tensor in tensors:  # a loop: a generator takes twice as long, at every call
        if tensor is not None and is_lazy(tensor):
            return True
    return False


def _is_forward_mode(tensors: list[Tensor | None]) -> bool:
    """Whether a tensor has a tangent, or may have one that a transform hides."""
    if forward_ad._current_level < 0:
        return False
    return torch._C._are_functorch_transforms_active() or has_tangent(tensors)


def _tangents_go_on() -> bool:
    """Whether what is asked of a tangent in turn can be: torch.func, which computes it, knows no
    hooks on saved tensors, and functionalize no Function."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return False
    stack = get_interpreter_stack() or []
    return all(transform.key() != TransformType.Functionalize for transform in stack)


@functools.cache
def _warn_no_kernels(device: str) -> None:
    warnings.warn(
        f"lstm_ext has no native kernels for {device} tensors in this version: running its "
        "plain torch reference, which is correct and slow",
        stacklevel=5,
    )
