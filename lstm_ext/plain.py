"""A plain layer or cell, where nothing surrounds the call: the short way.

For few sequences and steps the questions that :mod:`layer` and :mod:`ops` ask take longer than the
steps, and so do, on a GPU, allocations and products one by one. Here the core does all that, and a
call of any other kind goes the layer's way, which has its errors. On the CPU the bits are the same;
there it is for sequences of one length only, and of two directions for forward only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, profiler

from lstm_ext import batching, ops
from lstm_ext.autocast import cast_weight
from lstm_ext.autograd import LSTMLayerBackward, must_apply, second_derivative
from lstm_ext.cpu import backward as cpu_backward
from lstm_ext.cpu import engine as cpu_engine
from lstm_ext.cpu import products as cpu_products
from lstm_ext.cpu import second as cpu_second
from lstm_ext.engine import (
    DTYPE_CODE,
    EXCHANGE,
    SURROUNDINGS,
    autocast_is_on,
    is_lazy,
    is_recording,
    is_surrounded,
    native_steps,
    without_autocast,
)
from lstm_ext.flat import grouped
from lstm_ext.native import _C
from lstm_ext.plain_form import LayerForm
from lstm_ext.profiling import recorded
from lstm_ext.step_gradients import (
    CellWeights,
    Kept,
    KeptSteps,
    cell_products,
    cell_weights,
    may_keep,
    nothing_kept,
    step_before,
)
from lstm_ext.steps import Steps
from lstm_ext.tensors import is_autocast

if TYPE_CHECKING:
    from lstm_ext.lstm_cell import LSTMCell

TYPES = (Tensor, nn.Parameter)
_RESULTS = 3  # of forward that are saved: gates, c_t and y
_WEIGHTS = 5  # of a direction
_AS_RECORDED = -1  # to save what backward needs where autograd records


def core(exchange: Any) -> Any:
    """The core's part. exchange: as :data:`engine.EXCHANGE`."""
    return _C.CpuPlain(
        types=TYPES,
        codes={t: DTYPE_CODE[t] for t in (torch.float64, torch.float32, torch.bfloat16)},
        half_acc=torch.float32,
        bytes=torch.uint8,
        exchange=exchange,
        surroundings=SURROUNDINGS,
    )


_plain = core(EXCHANGE)


def plain_layer(
    x: Any,
    hx: Any,
    weights: Sequence[Tensor | None],
    input_size: int,
    hidden_size: int,
    steps: int | Steps,
    batch_first: bool = False,
    proj_size: int = 0,
) -> Any:
    """(y, h_n, c_n), all tensors; None where the call is not one for the short way.

    Only where not :func:`engine.is_surrounded`.

    Args:
        x, hx: whatever the caller got. To be taken, as a module has them: (T, B, in) or (B, T, in),
            a pair of (D, B, H) or None for zeros; or as a layer: (T * B, in) and h_0 and c_0 of
            each direction in turn, (B, H), which returns y, every h_n and every c_n.
        weights: weight_ih, weight_hh, bias_ih, bias_hh and weight_hr of each direction; the biases
            may be None, weight_hr is so without a projection. The second direction is the reversed
            one.
        steps: T; 0 for a cell's only one, x being (B, in) or (in,): then there is no y. Of a layer,
            where :func:`takes_more`, also Steps with lengths, offsets or resets.
        proj_size: features of h; 0: H, without a projection.
    """
    sizes = input_size, hidden_size, proj_size
    made = plain_results(x, hx, weights, sizes, steps, batch_first, _AS_RECORDED)
    if made is None:
        return None
    outputs, saved = made
    if saved is None:
        return outputs
    # Of a single step: what many of them have in common.
    alike = steps == 1 and len(weights) == _WEIGHTS and weights[-1] is None
    own = cell_weights(hx, weights) if alike and plain_engine_of(x) is cpu_engine else None
    return _recorded(steps, batch_first, own, outputs, saved)


def _recorded(
    steps: int | Steps,
    batch_first: bool,
    own: CellWeights | None,
    outputs: tuple[Tensor, ...],
    saved: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """The outputs of :func:`plain_results`, differentiable."""
    shared = None if own is None else own.shared
    # Function.apply looks for wrappers of transforms before, which the core found none of.
    return super(Function, PlainLayer).apply(steps, batch_first, own, shared, outputs, *saved)


def plain_results(
    x: Any,
    hx: Any,
    weights: Sequence[Tensor | None],
    sizes: tuple[int, int, int],
    steps: int | Steps,
    batch_first: bool,
    save: int,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...] | None] | None:
    """As :func:`plain_layer`, which makes them differentiable: the outputs, and what
    :class:`PlainLayer` saves besides, gates, c_seq and the inputs, or None.

    Args:
        sizes: input_size, hidden_size and proj_size.
        save: whether to save: 0: no; 1: if any of the tensors requires grad; 2: in any case; -1: 1
            where autograd records, else 0.
    """
    engine = plain_engine_of(x)
    if engine is cpu_engine and type(steps) is int:
        call = (x, hx, weights, *sizes, steps, batch_first, save, cpu_products.workspace)
        return recorded(_plain.cpu_forward)(*call)
    if engine is None or engine is cpu_engine:
        return None
    T, rows = _native(engine, steps)
    save = is_recording() if save < 0 else save
    call = (x, hx, weights, *sizes, T, batch_first)
    return recorded(engine.plain.cuda_forward)(engine, *call, rows, save)


def takes_more(x: Any) -> bool:
    """Whether the short way for x takes sequences that differ: asked before all else, for on the
    CPU, where it does not, they would pay for the questions."""
    # What traces this reads no further.
    return not torch.compiler.is_compiling() and plain_engine_of(x) not in (None, cpu_engine)


def takes(x: Tensor, T: int, reverse: Sequence[bool]) -> bool:
    """Whether there is a short way for an operator's rows x, so many steps and directions."""
    return T > 0 and x.dim() == 2 and list(reverse) == [False, True][: len(reverse)]


def parts(
    flat: Sequence[Tensor | None], D: int, projection: int
) -> tuple[list[Tensor | None], list[Tensor | None], int, int] | None:
    """An operator's directions as :func:`plain_layer` takes them: states and weights, hidden_size
    and proj_size; None where there is no short way. projection: the number of weight_hr among the
    weights of a direction."""
    states, weights = [], []
    for h0, c0, *own in grouped(flat, D):
        if h0 is None or c0 is None:
            return None
        states += (h0, c0)
        weights += own
    P = 0 if weights[projection] is None else states[0].size(-1)
    return states, weights, states[1].size(-1), P


def _native(engine: Any, steps: int | Steps) -> tuple[int, Any]:
    """T, and the core's description of Steps, which only an engine with a core has."""
    if isinstance(steps, int):
        return steps, None
    return steps.T, native_steps(engine.core, steps, False)


def plain_engine_of(x: Any) -> Any:
    """The engine that has a short way for x; None where there is none."""
    if type(x) not in TYPES:
        return None
    engine = ops._engines.get(x.device.type)
    return engine if engine is cpu_engine or getattr(engine, "plain", None) is not None else None


def plain_cell(cell: LSTMCell, x: Any, hx: Any) -> tuple[Tensor, Tensor] | None:
    """What a cell's forward returns for x and hx, on the CPU and with the parameters that it was
    made with; None where they are not for the short way, or something surrounds the call. Not
    where operations are traced."""
    if ops._engines["cpu"] is not cpu_engine:
        return None
    # In one call: each one more, after other code has run, takes a microsecond of some forty.
    step = recorded(_plain.cpu_cell) if profiler._is_profiler_enabled else _plain.cpu_cell
    made = step(cell, x, hx, cpu_products.workspace)
    if made is None:
        return None
    outputs, saved = made
    if saved is None:
        return outputs
    return _recorded(0, False, cell_weights(hx, saved[-_WEIGHTS:]), outputs, saved)


def plain_autocast_cell(
    x: Any, hx: Any, weights: Sequence[Tensor | None], input_size: int, hidden_size: int
) -> tuple[Tensor, Tensor] | None:
    """As :func:`plain_layer`, of a cell on the CPU under autocast, all of it in autocast's dtype:
    the weights are cast once a graph, and where none is recorded once an autocast. None also where
    more than autocast is around."""
    if plain_engine_of(x) is not cpu_engine or not autocast_is_on("cpu"):
        return None
    states = () if hx is None else hx
    if not (isinstance(states, (tuple, list)) and len(states) in (0, 2)):
        return None
    if (hx is not None and not states) or not all(type(t) in TYPES for t in states):
        return None
    if not all(t is None or is_autocast(t.dtype) for t in (x, *states, *weights)):
        return None
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        if is_surrounded():
            return None
        own = step_before(hx, weights) if is_recording() else None
        with torch.autocast("cpu", dtype):
            w_hh = cast_weight(weights[1], dtype)
            # Of another autocast the weights may have changed since, as .data in place.
            if own is None or own.casts is None or own.casts[1] is not w_hh:
                casts = [None if w is None else cast_weight(w, dtype) for w in weights]
                own = CellWeights(weights, casts)
        given = x.to(dtype), None if hx is None else [t.to(dtype) for t in states]
        sizes = input_size, hidden_size, 0
        made = plain_results(*given, list(own.casts), sizes, 0, False, _AS_RECORDED)
        if made is None:
            return None
        outputs, saved = made
        if saved is None:
            return outputs
        own.share()
        return _recorded(0, False, own, outputs, saved)


def plain_quantized(
    x: Any,
    hx: Any,
    weights: Sequence[Tensor | None],
    input_size: int,
    hidden_size: int,
    steps: int,
    batch_first: bool = False,
    proj_size: int = 0,
    *,
    activation_bits: int,
) -> Any:
    """As :func:`plain_layer`, with weights of 8 bits: of each direction the tensors of
    :class:`quantization.QuantizedWeights`. Of float32, where nothing asks for a gradient."""
    made = recorded(_plain.cpu_forward_quantized)(
        x,
        hx,
        weights,
        activation_bits,
        input_size,
        hidden_size,
        proj_size,
        steps,
        batch_first,
        cpu_products.workspace,
    )
    return None if made is None else made[0]


class PlainLayer(Function):
    """What was computed already, made differentiable.

    Saved: references to the inputs, the gates and c_t, and y of several steps; not the last states
    and not y of a single step, which the caller may change in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        steps: int | Steps,
        batch_first: bool,
        cell_weights: CellWeights | None,
        shared: Tensor | None,
        outputs: tuple[Tensor, ...],
        gates: Tensor,
        c_seq: Tensor,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """outputs: y, unless of a cell (steps 0), every h_n and every c_n. inputs: x and, of each
        direction, h_0, c_0 and the weights; a module's states, of all directions, are the first's.
        cell_weights, shared: of a single step, as :mod:`step_gradients` has them.

        gates (D * T * B, 4H), c_seq (D * T * B, H).
        """
        ctx.steps = steps, batch_first
        ctx.cell_weights = cell_weights
        T = steps.T if isinstance(steps, Steps) else steps
        ctx.save_for_backward(*inputs, gates, c_seq, outputs[0] if T > 1 else None)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if not torch._C._is_any_autocast_enabled():
            return _plain_backward(ctx, gradients)
        given = [g.device for g in gradients if g is not None]
        with without_autocast(given[0] if given else torch.device("cpu")):
            return _plain_backward(ctx, gradients)


def _plain_backward(ctx: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """PlainLayer's, where no autocast has a say in the products."""
    saved, shared, wanted = ctx.saved_tensors, ctx.needs_input_grad[3], ctx.needs_input_grad[7:]
    made = kept = None
    if is_surrounded():
        pass
    elif torch.is_grad_enabled():
        with torch.no_grad():  # the products that are torch's
            made = plain_gradients(gradients, saved, wanted, *ctx.steps)
        if made is not None:
            call = (*ctx.steps, wanted, made, *gradients, *saved)
            made = super(Function, PlainLayerBackward).apply(*call)  # as in plain_layer
    elif shared and may_keep(ctx):
        states = wanted[:-_WEIGHTS] + (False,) * _WEIGHTS
        made = plain_gradients(gradients, saved, states, *ctx.steps, with_dgates=True)
        if made is not None:
            *made, dgates = made
            step = Kept(dgates, *saved[:2])
            kept = KeptSteps(cell_products, step, len(dgates), ctx.cell_weights.wanted)
    else:
        made = plain_gradients(gradients, saved, wanted, *ctx.steps)
    if made is None:
        made = _by_the_layer(gradients, saved, wanted, *ctx.steps)
    if shared and kept is None:
        kept = nothing_kept()
    return (None, None, None, kept, None, None, None, *made)


class PlainLayerBackward(Function):
    """Gradients that were computed already, made differentiable. Saved: references to what they are
    made of."""

    @staticmethod
    def forward(
        ctx: Any,
        steps: int | Steps,
        batch_first: bool,
        wanted: tuple[bool, ...],
        made: tuple[Tensor | None, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """made: the gradients. tensors: those of the outputs, then what PlainLayer has saved."""
        ctx.steps, ctx.wanted = (steps, batch_first), wanted
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return made

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *v: Tensor | None) -> tuple[Any, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.wanted
        outputs = len(tensors) - _RESULTS - len(wanted)
        needed = ctx.needs_input_grad[4 : 4 + outputs + len(wanted)]
        v = tuple(t if flag else None for t, flag in zip(v, wanted, strict=True))
        made = _second_of_a_step(tensors, outputs, ctx.steps[0], v, needed)
        if made is not None:
            return (None,) * 4 + made + (None,) * _RESULTS
        form = LayerForm(tensors[:outputs], tensors[outputs:], *ctx.steps)
        made = second_derivative(
            form.steps,
            form.kinds,
            (*form.of_outputs(needed[:outputs]), *form.inputs(needed[outputs:])),
            form.inputs(v),
            form.tensors,
        )
        count = 2 + 2 * len(form.kinds)
        results = (*form.as_outputs(made[:count]), *form.as_inputs(made[count:]))
        return (None,) * 4 + results + (None,) * _RESULTS


def _second_of_a_step(
    tensors: Sequence[Tensor | None],
    outputs: int,
    steps: int | Steps,
    v: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...] | None:
    """The second derivative of a cell on the CPU; None where it is another call, or zero. The
    arguments are PlainLayerBackward's."""
    x, h0 = tensors[outputs : outputs + 2]
    if (
        steps != 0
        or x.dim() != 2
        or h0 is None
        or plain_engine_of(x) is not cpu_engine
        or must_apply()
        or is_surrounded()
        or all(t is None for t in v)
        or all(t is None for t in tensors[:outputs])
    ):
        return None
    *every, _ = (*v, *tensors)  # y there is none
    for tensor in every:
        if tensor is not None and (type(tensor) not in TYPES or is_lazy(tensor)):
            return None
    if x.dtype == torch.bfloat16:
        every = [t if t is None else t.float() for t in every]
    count = len(v)
    v, d, inputs, saved = (
        every[:count],
        every[count : count + outputs],
        every[count + outputs : -2],
        every[-2:],
    )
    made = cpu_second.step_second(Steps.padded(1, x.size(0)), d, inputs, saved, v, needed)
    if x.dtype == torch.bfloat16:
        made = [t if t is None else t.to(x.dtype) for t in made]
    return tuple(made)


def plain_gradients(
    gradients: tuple[Tensor | None, ...],
    saved: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    steps: int | Steps,
    batch_first: bool,
    *,
    with_dgates: bool = False,
) -> tuple[Tensor | None, ...] | None:
    """The gradients of the inputs, None where not wanted; None where the call is not one for the
    short way. Only where not :func:`engine.is_surrounded`.

    Args:
        gradients: of the outputs; None for zero. saved: as PlainLayer saves. wanted: of each input.
        with_dgates: on the CPU, also those of the gates before activation, (rows, 4H), last.
    """
    engine = plain_engine_of(saved[0])
    if engine is cpu_engine and type(steps) is int:
        most_rows, workspace = cpu_backward.FUSED_ROWS - 1, cpu_products.workspace
        call = (gradients, saved, wanted, steps, batch_first, with_dgates, most_rows, workspace)
        return recorded(_plain.cpu_backward)(*call)
    if engine is None or engine is cpu_engine:
        return None  # the latter: by a hook on saved tensors
    T, rows = _native(engine, steps)
    call = (gradients, saved, wanted, T, batch_first)
    return recorded(engine.plain.cuda_backward)(engine, *call, rows)


def _by_the_layer(
    gradients: tuple[Tensor | None, ...],
    saved: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    steps: int | Steps,
    batch_first: bool,
) -> tuple[Tensor | None, ...]:
    """As :func:`plain_gradients`, by LSTMLayerBackward."""
    form = LayerForm(gradients, saved, steps, batch_first)
    run = LSTMLayerBackward.run if must_apply() else LSTMLayerBackward.forward
    return form.as_inputs(run(form.steps, form.kinds, form.inputs(wanted), *form.tensors))
