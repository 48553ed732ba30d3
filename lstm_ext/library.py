"""The layer as operators of torch, for what records operations: torch.compile, torch.export.

``lstm_ext::lstm_layer`` is one layer with its directions, ``lstm_ext::lstm_layer_backward`` its
first derivative. They exist to be recorded: a call outside of a graph goes to the Functions of
:mod:`autograd` directly, which cost less. Both have a kernel that calls the engine of the device,
a fake, which gives the shapes, and an autograd kernel.

While a graph is recorded, a second derivative, forward mode and torch.func.grad raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from lstm_ext import batching, ops
from lstm_ext.autograd import LSTMLayer, LSTMLayerBackward, has_tangent, needs_grad
from lstm_ext.engine import acc_dtype, is_recorded, transform_names
from lstm_ext.flat import Kind, flatten, kinds_of, unflatten
from lstm_ext.ops import Direction, Masks
from lstm_ext.plain_operator import plain_backward, plain_forward
from lstm_ext.steps import Steps, check_steps
from lstm_ext.torch_engine import LayerOutputs, side_by_side

# What both take. directions: h0, c0 and the weights of each, as flat.flatten lists them; masks and
# keeps: h_dropout, keep_h and keep_c of each, where they are tensors, and keep_h and keep_c where
# they are numbers; or both None, as AOTInductor passes an empty list of such tensors on. T, B,
# batch_first, offsets, lengths and reset_mask: see Steps.
LAYER = (
    "Tensor x, Tensor?[] directions, Tensor?[]? masks, float[]? keeps, bool[] reverse, "
    "SymInt T, SymInt B, bool batch_first, Tensor? offsets, Tensor? lengths, Tensor? reset_mask"
)
LAYER_COUNT = 11

_library = torch.library.Library("lstm_ext", "FRAGMENT")
# y, then every c_t if cells, h_n and c_n of each direction; with save, then what backward needs.
try:
    _library.define(f"lstm_layer({LAYER}, bool cells, bool save) -> Tensor[]")
except RuntimeError as error:
    raise ImportError(
        "lstm_ext was imported before in this process, by another copy of it or by one that was "
        "taken out of sys.modules: torch keeps its operators, so restart Python"
    ) from error
# grads: of y, cells, h_n and c_n. results: y and what backward needs. wanted: a flag for x and for
# each of directions. Returns the gradients that are wanted.
_library.define(
    f"lstm_layer_backward({LAYER}, Tensor?[] grads, Tensor[] results, bool[] wanted) -> Tensor[]"
)


def lstm_layer(
    x: Tensor, directions: Sequence[Direction], steps: Steps, *, cells: bool
) -> LayerOutputs:
    """:func:`layer.lstm_layer` by the operator."""
    arguments = encode(steps, kinds_of(directions), x, flatten(directions))
    y, *results = torch.ops.lstm_ext.lstm_layer(*arguments, cells, False)
    D, first = len(directions), int(cells)
    h_n, c_n = list(results[first : first + D]), list(results[first + D :])
    return LayerOutputs(y, h_n, c_n, results[0] if cells else None)


def encode(
    steps: Steps, kinds: Sequence[Kind], x: Tensor, flat: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """The operators' common arguments."""
    masks: list[Tensor | None] | None = None
    keeps: list[float] | None = None
    if any(m is not None for _, m in kinds):
        masks, keeps = [], []
        for _, direction_masks in kinds:
            h_dropout, *keep = direction_masks or Masks()
            masks += [h_dropout, *(k if isinstance(k, Tensor) else None for k in keep)]
            keeps += [0.0 if isinstance(k, Tensor) else float(k) for k in keep]
    return (
        x,
        list(flat),
        masks,
        keeps,
        [reverse for reverse, _ in kinds],
        steps.T,
        steps.B,
        steps.batch_first,
        steps.offsets,
        steps.lengths,
        steps.reset_mask,
    )


def decode(
    x: Tensor,
    flat: Sequence[Tensor | None],
    masks: Sequence[Tensor | None] | None,
    keeps: Sequence[float] | None,
    reverse: Sequence[bool],
    T: int,
    B: int,
    batch_first: bool,
    offsets: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
) -> tuple[Steps, tuple[Kind, ...]]:
    """The inverse of :func:`encode`."""
    kinds: list[Kind] = []
    for k, backwards in enumerate(reverse):
        direction_masks = None
        if masks:
            h_dropout, keep_h, keep_c = masks[3 * k : 3 * k + 3]
            direction_masks = Masks(
                h_dropout,
                keeps[2 * k] if keep_h is None else keep_h,
                keeps[2 * k + 1] if keep_c is None else keep_c,
            )
        kinds.append((backwards, direction_masks))
    steps = Steps.of((T, B, x.size(0), batch_first), offsets, lengths, reset_mask)
    return steps, tuple(kinds)


# --- kernels --------------------------------------------------------------------------------------


def _forward(*arguments: Any) -> list[Tensor]:
    made = plain_forward(*arguments)
    if made is not None:
        return made
    *layer, cells, save = arguments
    x, flat = layer[:2]
    steps, kinds = decode(*layer)
    directions = unflatten(flat, kinds)
    check_inputs(x, directions, steps)
    if save:
        results = LSTMLayer.forward(steps, kinds, cells, x, *flat)
    else:
        result = ops.layer_forward(x, directions, steps, save=False, cells=cells)
        all_cells = side_by_side(result.c_seq, x.dtype) if cells else None
        results = (result.y, all_cells, *result.h_n, *result.c_n)
    return [t.contiguous() for t in results if t is not None]


def _backward(*arguments: Any) -> list[Tensor]:
    made = plain_backward(*arguments)
    if made is not None:
        return made
    *layer, grads, results, wanted = arguments
    x, flat = layer[:2]
    steps, kinds = decode(*layer)
    directions = unflatten(flat, kinds)
    check_inputs(x, directions, steps)
    check_gradients(grads, directions, steps)
    made = LSTMLayerBackward.forward(steps, kinds, tuple(wanted), *grads, x, *flat, *results)
    return [g.contiguous() for g, want in zip(made, wanted, strict=True) if want]


def check_inputs(x: Tensor, directions: list[Direction], steps: Steps) -> None:
    """As a graph's inputs, nothing has been checked yet."""
    if len(directions) not in (1, 2):
        raise RuntimeError(f"Expected 1 or 2 directions, got {len(directions)}")
    for h0, c0, w, _ in directions:
        if any(t is None for t in (h0, c0, w.w_ih, w.w_hh)):
            raise RuntimeError("Expected h0, c0, weight_ih and weight_hh, got None for one")
        norm = (w.gamma_ih, w.gamma_hh, w.gamma_ch, w.beta_ch)
        if any(t is None for t in norm) and any(t is not None for t in norm):
            raise RuntimeError("Expected all four tensors of a layer norm or none, got some")
        if w.w_hr is not None and not h0.size(-1):  # its address is that of none
            raise RuntimeError("Expected a weight_hr of at least one row, got none")
    ops.check_layer(x, directions, steps)
    check_steps(steps)


def check_gradients(
    grads: Sequence[Tensor | None], directions: list[Direction], steps: Steps
) -> None:
    """Of y, of the cells, and of each h_n and each c_n."""
    D, P, H = len(directions), directions[0].h0.size(1), directions[0].c0.size(1)
    sizes = [(steps.rows, D * P), (steps.rows, D * H), *[(steps.B, P)] * D, *[(steps.B, H)] * D]
    if len(grads) != len(sizes):
        raise RuntimeError(f"Expected {len(sizes)} gradients, got {len(grads)}")
    for grad, size in zip(grads, sizes, strict=True):
        if grad is not None and grad.shape != size:
            raise RuntimeError(f"Expected a gradient of size {size}, got {tuple(grad.shape)}")


def _forward_fake(*arguments: Any) -> list[Tensor]:
    *layer, cells, save = arguments
    x, flat = layer[:2]
    _, kinds = decode(*layer)
    directions, rows, D = unflatten(flat, kinds), x.size(0), len(kinds)
    ops.check_devices(x, flat)
    h0, c0, w, _ = directions[0]
    H, P = c0.size(1), h0.size(1)
    results = [x.new_empty(rows, D * P)]
    if cells:
        results.append(x.new_empty(rows, D * H))
    results += [x.new_empty(h0.shape) for _ in kinds] + [x.new_empty(c0.shape) for _ in kinds]
    if save:
        acc = acc_dtype(x.dtype)
        sizes = [(rows, 4 * H)] * D
        if not _cells_are_saved(x, kinds, cells):
            sizes += [(rows, H)] * D
        if w.normed:  # the product that was normalized, mean and 1/std; the same of the recurrence
            sizes += [(rows, 4 * H), (rows, 1), (rows, 1), (rows, 4 * H), (rows,)] * D
        results += [x.new_empty(size, dtype=acc) for size in sizes]
    return results


def _backward_fake(*arguments: Any) -> list[Tensor]:
    (x, flat, *_), wanted = arguments[:LAYER_COUNT], arguments[-1]
    ops.check_devices(x, flat)
    return [t.new_empty(t.shape) for t, want in zip([x, *flat], wanted, strict=True) if want]


def _cells_are_saved(x: Tensor, kinds: Sequence[Kind], cells: bool) -> bool:
    """Whether the result cells is also what backward needs, and so is returned once."""
    return cells and len(kinds) == 1 and x.dtype == acc_dtype(x.dtype)


# --- autograd -------------------------------------------------------------------------------------


class RecordedLayer(LSTMLayer):
    """LSTMLayer with an operator for each pass."""

    @staticmethod
    def forward(
        steps: Steps, kinds: tuple[Kind, ...], cells: bool, x: Tensor, *flat: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            results: list[Tensor | None] = torch.ops.lstm_ext.lstm_layer(
                *encode(steps, kinds, x, flat), cells, True
            )
        if not cells:
            results.insert(1, None)
        elif _cells_are_saved(x, kinds, cells):
            results.insert(2 + 3 * len(kinds), None)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[3:]
        tensors = ctx.saved_tensors  # once: torch.utils.checkpoint gives them no second time
        x, *flat = tensors[: len(wanted)]
        made = torch.ops.lstm_ext.lstm_layer_backward(
            *encode(ctx.steps, ctx.kinds, x, flat),
            list(grad_outputs[: 2 + 2 * len(ctx.kinds)]),
            list(tensors[len(wanted) :]),
            list(wanted),
        )
        return (None, None, None, *(made.pop(0) if want else None for want in wanted))


class RecordedLayerBackward(LSTMLayerBackward):
    """LSTMLayerBackward with an operator, as a recorded graph runs it."""

    @staticmethod
    def forward(
        steps: Steps, kinds: tuple[Kind, ...], wanted: tuple[bool, ...], *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs, end = 2 + 2 * len(kinds), 2 + 2 * len(kinds) + len(wanted)
        x, *flat = tensors[inputs:end]
        with torch._C._AutoDispatchBelowAutograd():
            made = torch.ops.lstm_ext.lstm_layer_backward(
                *encode(steps, kinds, x, flat), tensors[:inputs], tensors[end:], wanted
            )
        return tuple(made.pop(0) if want else None for want in wanted)

    @staticmethod
    def backward(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
        if is_recorded():
            refuse("a second derivative")
        return LSTMLayerBackward.backward(ctx, *second)


def refuse(what: str) -> NoReturn:
    raise RuntimeError(
        "lstm_ext's LSTM in a recorded graph (torch.compile, torch.export, make_fx) has a first "
        f"derivative only, got {what}: leave the function that asks for it out of the graph"
    )


def refuse_transforms(tensors: Sequence[Tensor | None]) -> None:
    names = transform_names()
    if has_tangent(tensors):
        names.append("forward mode")
    if names:
        refuse(", ".join(names))


def _forward_autograd(*arguments: Any) -> list[Tensor]:
    *layer, cells, save = arguments
    x, flat = layer[:2]
    refuse_transforms([x, *flat])
    if not needs_grad([x, *flat]):
        made = plain_forward(*arguments)
        if made is not None:
            return made
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.lstm_ext.lstm_layer(*arguments)
    steps, kinds = decode(*layer)
    results = [t for t in RecordedLayer.apply(steps, kinds, cells, x, *flat) if t is not None]
    return results if save else results[: 1 + cells + 2 * len(kinds)]


def _backward_autograd(*arguments: Any) -> list[Tensor]:
    *layer, grads, results, wanted = arguments
    x, flat = layer[:2]
    refuse_transforms([x, *flat, *grads])
    if not needs_grad([x, *flat, *grads]):
        made = plain_backward(*arguments)
        if made is not None:
            return made
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.lstm_ext.lstm_layer_backward(*arguments)
    steps, kinds = decode(*layer)
    made = RecordedLayerBackward.apply(steps, kinds, tuple(wanted), *grads, x, *flat, *results)
    return [g for g, want in zip(made, wanted, strict=True) if want]


# --- vmap -----------------------------------------------------------------------------------------


class _Operator(NamedTuple):
    """An operator with the arguments and results of LSTMLayer, as the rules of batching call it."""

    name: str
    last: bool | int  # argument

    def apply(
        self, steps: Steps, kinds: Sequence[Kind], cells: bool, x: Tensor, *flat: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        operator = getattr(torch.ops.lstm_ext, self.name)
        y, *results = operator(*encode(steps, kinds, x, flat), cells, self.last)
        return (y, *results) if cells else (y, None, *results)


def batched(
    name: str, info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[list[Tensor], list[int | None]]:
    """The rule of vmap of an operator whose last two arguments are cells and one more."""
    *layer, cells, last = arguments
    *layer_dims, _, _ = in_dims
    x, flat = layer[:2]
    steps, kinds = decode(*layer)
    dims = layer_dims[1] or [None] * len(flat)
    masks = layer_dims[2] or [None] * len(layer[2] or ())
    tensors = Steps.of(steps.layout, *layer_dims[8:])
    kinds_dims = tuple(
        (None, None if m is None else Masks(*masks[3 * k : 3 * k + 3]))
        for k, (_, m) in enumerate(kinds)
    )
    results, out_dims = batching.forward(
        _Operator(name, last),
        info.batch_size,
        (tensors, kinds_dims, None, layer_dims[0], *dims),
        (steps, kinds, cells, x, *flat),
    )
    pairs = [pair for pair in zip(results, out_dims, strict=True) if pair[0] is not None]
    return [result for result, _ in pairs], [dim for _, dim in pairs]


def _forward_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    if arguments[-1]:
        raise RuntimeError("lstm_ext::lstm_layer has no rule of vmap with save=True")
    return batched("lstm_layer", info, in_dims, *arguments)


torch.library.register_vmap("lstm_ext::lstm_layer", _forward_vmap, lib=_library)


def register(
    library: torch.library.Library, name: str, kernel: Any, fake: Any, autograd: Any
) -> None:
    """What every operator here has: a kernel that calls the engine of the device, a fake, which
    gives the shapes, and an autograd kernel."""
    library.impl(name, kernel, "CompositeExplicitAutograd")
    library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"lstm_ext::{name}", fake, lib=library)


register(_library, "lstm_layer", _forward, _forward_fake, _forward_autograd)
register(_library, "lstm_layer_backward", _backward, _backward_fake, _backward_autograd)
