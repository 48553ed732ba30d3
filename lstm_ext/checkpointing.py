"""A layer whose backward makes the gates again, a part of the steps at a time.

Training keeps 5H numbers of a step and sequence (the gates and c_t) until backward. Taken in parts
of ``every`` steps, only the states between the parts are kept, and one part's gates at a time
exist. Each direction is taken alone, for the two meet the parts in opposite order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from lstm_ext import batching, ops
from lstm_ext.autograd import LSTMLayer, LSTMLayerBackward, must_apply
from lstm_ext.derivatives import ForwardTangents, LayerDerivative, LayerFunction, save
from lstm_ext.engine import Masks, acc_dtype, sum_of
from lstm_ext.flat import Kind, grouped, unflatten
from lstm_ext.steps import Steps, StepsPart

Tensors = Sequence[Tensor | None]


def kept_count(T: int, every: int) -> int:
    """How many states are kept: before the first part and after each. (Never one where there are
    steps: a graph's guard whether it is one would be for some numbers of steps alone.)"""
    return (T + every - 1) // every + 1


class PartsLayer(LayerFunction):
    """LSTMLayer in parts.

    Saved: references to the inputs, and the states before the first part and after each. Those are
    results that nobody sees, so that a second derivative goes back through them.
    """

    @staticmethod
    def forward(
        steps: Steps,
        kinds: tuple[Kind, ...],
        cells: bool,
        every: int,
        x: Tensor,
        *flat: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """y, cells or None, h_n, c_n, then h and c before the direction's first part and after
        each, (B, parts + 1, P) and (B, parts + 1, H); the last four of each direction."""
        D = len(kinds)
        y = x.new_empty(steps.rows, D * flat[0].size(1))
        all_cells = x.new_empty(steps.rows, D * flat[1].size(1)) if cells else None
        states: list[list[Tensor]] = [[], [], [], []]
        for k, (own, kind) in enumerate(zip(grouped(flat, D), kinds, strict=True)):
            h, c, *weights = own
            count = kept_count(steps.T, every)
            h_kept, c_kept = (t.new_empty(steps.B, count, t.size(1)) for t in (h, c))
            h_kept[:, 0], c_kept[:, 0] = h, c
            for n, part in enumerate(_walk(steps, every, kind), 1):
                x_part, *state = _inputs_of(part, (x, h, c, *weights))
                directions = unflatten(state, [_kind_of(part, kind)])
                result = ops.layer_forward(x_part, directions, part.steps, save=False, cells=cells)
                part.put(_columns(y, k, D), result.y)
                if all_cells is not None:
                    part.put(_columns(all_cells, k, D), result.c_seq[0])
                h, c = _with_rest(result.h_n[0], h), _with_rest(result.c_n[0], c)
                h_kept[:, n], c_kept[:, n] = h, c
            if steps.T == 0:  # results are no inputs
                h, c = h.clone(), c.clone()
            for listed, state in zip(states, (h, c, h_kept, c_kept), strict=True):
                listed.append(state)
        return y, all_cells, *(state for listed in states for state in listed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.steps, ctx.kinds, ctx.cells, ctx.every, *tensors = inputs
        ctx.set_materialize_grads(False)
        save(ctx, [*tensors, *output[2 + 2 * len(ctx.kinds) :]])

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        steps, kinds = batching.unwrapped(ctx.steps, ctx.kinds)
        wanted, tensors = ctx.needs_input_grad[4:], unwrap_dead_wrappers(ctx.saved_tensors)
        made = gradients(
            steps, kinds, ctx.every, wanted, grad_outputs, tensors, differentiable=must_apply()
        )
        return (*[None] * 4, *made)

    @staticmethod
    @batching.batched_gradients
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        steps, kinds = batching.unwrapped(ctx.steps, ctx.kinds)
        saved = unwrap_dead_wrappers(ctx.saved_tensors)
        # Torch switches forward mode off here, for the transforms around this one too, which are to
        # follow; of this one's own tangents the inputs are freed.
        with forward_ad._set_fwd_grad_enabled(True):
            tensors = [t if t is None else forward_ad.unpack_dual(t).primal for t in saved]
            return _tangents(steps, kinds, ctx.cells, ctx.every, tangents[4:], tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        weights = batching.weights_of(len(inputs) - 4, len(inputs[1]))
        return batching.mapped(PartsLayer, info.batch_size, in_dims, inputs, weights)


def gradients(
    steps: Steps,
    kinds: Sequence[Kind],
    every: int,
    wanted: Sequence[bool],
    d: Tensors,
    tensors: Tensors,
    *,
    differentiable: bool,
) -> list[Tensor | None]:
    """The gradients of x and of the tensors of the directions, None where they are not wanted.

    d: of PartsLayer's results, None for zero. tensors: x, the directions', and the states that were
    kept. differentiable: see :func:`autograd.must_apply`; then nothing is written in place.
    """
    D = len(kinds)
    (x, *flat), kept = tensors[: len(wanted)], tensors[len(wanted) :]
    written = x.new_empty(x.shape) if wanted[0] and not differentiable else None
    dx: Tensor | None = None
    results: list[Tensor | None] = []
    for k, (own, flags, kind) in enumerate(
        zip(grouped(flat, D), grouped(wanted[1:], D), kinds, strict=True)
    ):
        h0, c0, *weights = own
        h_kept, c_kept = (t.unbind(1) for t in kept[k::D])
        last, d_kept = d[2 + k : 2 + 2 * D : D], d[2 + 2 * D + k :: D]
        dh_kept, dc_kept = ([None] * len(h_kept) if t is None else t.unbind(1) for t in d_kept)
        dh, dc = (
            torch.zeros_like(state) if t is None else t
            for t, state in zip(last, (h0, c0), strict=True)
        )
        dh, dc = sum_of(dh, dh_kept[-1]), sum_of(dc, dc_kept[-1])
        rows = _columns(d[0], k, D), _columns(d[1], k, D)
        sums: list[Tensor | None] = [None] * len(weights)
        dx_parts: list[Tensor] = []
        for n, part in reversed(list(enumerate(_walk(steps, every, kind)))):
            of_state = (True, True) if n else flags[:2]  # of one between parts in any case
            dx_part, dh_part, dc_part, *made = _part_gradients(
                part,
                kind,
                (wanted[0], *of_state, *flags[2:]),
                (*rows, dh, dc),
                (x, h_kept[n], c_kept[n], *weights),
                differentiable,
            )
            sums = [_added(total, g, differentiable) for total, g in zip(sums, made, strict=True)]
            if written is not None:
                part.put(written, dx_part, add=k > 0)
            elif dx_part is not None:
                dx_parts.append(dx_part)
            dh = None if dh_part is None else sum_of(_with_rest(dh_part, dh), dh_kept[n])
            dc = None if dc_part is None else sum_of(_with_rest(dc_part, dc), dc_kept[n])
        if dx_parts:
            in_time = dx_parts if kind[0] else dx_parts[::-1]
            dx = sum_of(dx, steps.joined(in_time))
        for g, tensor, flag in zip((dh, dc, *sums), own, flags, strict=True):
            if flag and g is None:  # no steps
                g = torch.zeros_like(tensor)
            results.append(g.to(x.dtype) if flag else None)
    if not wanted[0]:
        return [None, *results]
    if written is None and dx is None:
        dx = torch.zeros_like(x)
    return [written if dx is None else dx, *results]


def _part_gradients(
    part: StepsPart,
    kind: Kind,
    wanted: Sequence[bool],
    d: Tensors,
    tensors: Tensors,
    differentiable: bool,
) -> tuple[Tensor | None, ...]:
    """LSTMLayerBackward's results of a direction's part, whose gates are made again.

    d: of y, the cells, h_n and c_n; tensors: x, h0, c0 and the weights: rows and sequences are
    those of all parts.
    """
    kinds = (_kind_of(part, kind),)
    inputs = _inputs_of(part, tensors)
    dy, dcells, *states = d
    grads = [t if t is None else part.take(t) for t in (dy, dcells)]
    grads += [t[: part.steps.B] for t in states]
    run = LSTMLayerBackward.run if differentiable else LSTMLayerBackward.forward
    saved = _saved(part, kinds, inputs, differentiable)
    return run(part.steps, kinds, tuple(wanted), *grads, *inputs, *saved)


def _tangents(
    steps: Steps,
    kinds: Sequence[Kind],
    cells: bool,
    every: int,
    v: Tensors,
    tensors: Tensors,
) -> tuple[Tensor | None, ...]:
    """The tangents of PartsLayer's results. v: of its tensors, None for zero; tensors: as for
    :func:`gradients`."""
    D, size = len(kinds), len(v)
    (x, *flat), kept = tensors[:size], tensors[size:]
    rows: list[list[Tensor]] = [[], []]
    states: list[list[Tensor]] = [[], [], [], []]
    for k, (own, own_v, kind) in enumerate(
        zip(grouped(flat, D), grouped(v[1:], D), kinds, strict=True)
    ):
        h0, c0, *weights = own
        h, c, *v_weights = own_v
        h = torch.zeros_like(h0) if h is None else h
        c = torch.zeros_like(c0) if c is None else c
        h_kept, c_kept = (t.unbind(1) for t in kept[k::D])
        hs, cs = [h], [c]
        parts: list[tuple[Tensor, Tensor | None]] = []
        for n, part in enumerate(_walk(steps, every, kind)):
            part_kinds = (_kind_of(part, kind),)
            inputs = _inputs_of(part, (x, h_kept[n], c_kept[n], *weights))
            part_v = _inputs_of(part, (v[0], h, c, *v_weights))
            y, all_cells, h_n, c_n = LayerDerivative.run(
                *(ForwardTangents, part.steps, part_kinds, len(inputs), cells),
                *(*part_v, *inputs, *_saved(part, part_kinds, inputs)),
            )
            parts.append((y, all_cells))
            h, c = _with_rest(h_n, h), _with_rest(c_n, c)
            hs.append(h)
            cs.append(c)
        y_parts, cells_parts = zip(*(parts[::-1] if kind[0] else parts), strict=True)
        rows[0].append(steps.joined(y_parts))
        if cells:
            rows[1].append(steps.joined(cells_parts))
        made = h, c, torch.stack(hs, 1), torch.stack(cs, 1)
        for listed, state in zip(states, made, strict=True):
            listed.append(state)
    y, all_cells = (torch.cat(columns, 1) if columns else None for columns in rows)
    return y, all_cells, *(state for listed in states for state in listed)


def _walk(steps: Steps, every: int, kind: Kind) -> list[StepsPart]:
    """The parts, in the order in which the direction takes them."""
    starts = range(0, steps.T, every)
    parts = [steps.part(start, min(start + every, steps.T)) for start in starts]
    return parts[::-1] if kind[0] else parts


def _kind_of(part: StepsPart, kind: Kind) -> Kind:
    """With the masks of a part."""
    reverse, masks = kind
    if masks is None:
        return kind
    h_dropout, *keep = masks
    h_dropout = None if h_dropout is None else h_dropout[: part.steps.B]
    return reverse, Masks(h_dropout, *(part.take(m) if isinstance(m, Tensor) else m for m in keep))


def _inputs_of(part: StepsPart, tensors: Tensors) -> list[Tensor | None]:
    """x, h0, c0 and the weights, or what belongs to each, as a layer of the part has them."""
    x, h, c, *weights = tensors
    x = None if x is None else part.take(x)
    return [x, *(s[: part.steps.B].contiguous() for s in (h, c)), *weights]


def _saved(
    part: StepsPart, kinds: tuple[Kind, ...], inputs: Tensors, differentiable: bool = True
) -> list[Tensor | None]:
    """y, gates, c_seq and what else backward needs of a part, made again: no derivative goes
    through them, for those of LSTMLayer are functions of its inputs."""
    ops.check_layer(inputs[0], unflatten(inputs[1:], kinds), part.steps)  # see ops.check_saved
    if not differentiable:
        made = LSTMLayer.forward(part.steps, kinds, False, *inputs)
    else:
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            made = LSTMLayer.run(part.steps, kinds, False, *inputs)
    y, _, _, _, *saved = made
    return [y, *saved]


def _columns(rows: Tensor | None, k: int, D: int) -> Tensor | None:
    """The k-th direction's."""
    if rows is None or D == 1:
        return rows
    n = rows.size(1) // D
    return rows[:, k * n : (k + 1) * n]


def _with_rest(state: Tensor, whole: Tensor) -> Tensor:
    """Of a packed sequence the others have ended, or not begun yet."""
    B = state.size(0)
    return state if B == whole.size(0) else torch.cat((state, whole[B:]))


def _added(total: Tensor | None, g: Tensor | None, differentiable: bool) -> Tensor | None:
    """The sum over parts of a weight's gradient, of half types in float32."""
    if g is None:
        return total
    if total is None:
        return g.to(acc_dtype(g.dtype))
    return total + g if differentiable else total.add_(g)
