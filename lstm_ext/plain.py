"""A plain layer or cell, where nothing surrounds the call: the short way.

For few sequences and steps the questions that :mod:`layer` and :mod:`ops` ask take longer than the
steps, and so do, on a GPU, allocations and products one by one. Here the core does all that, and a
call of any other kind goes the layer's way, which has its errors. On the CPU the bits are the same;
there it is for sequences of one length only, and of two directions for forward only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lstm_ext import batching, cpu_backward, cpu_engine, cpu_products, ops
from lstm_ext.autograd import LSTMLayerBackward, must_apply
from lstm_ext.engine import DTYPE_CODE, is_surrounded, native_steps
from lstm_ext.flat import grouped
from lstm_ext.native import _C
from lstm_ext.profiling import recorded
from lstm_ext.steps import Steps
from lstm_ext.torch_engine import side_by_side

if TYPE_CHECKING:
    from lstm_ext.modules import LSTM

_TYPES = (Tensor, nn.Parameter)
_WEIGHTS = 4  # of a direction
_INPUTS = 2 + _WEIGHTS  # h_0 and c_0 too
_RESULTS = 3  # of forward that are saved: gates, c_t and y
_plain = _C.CpuPlain(
    types=_TYPES,
    codes={t: DTYPE_CODE[t] for t in (torch.float64, torch.float32, torch.bfloat16)},
    half_acc=torch.float32,
)


def plain_layer(
    x: Any,
    hx: Any,
    weights: Sequence[Tensor | None],
    input_size: int,
    hidden_size: int,
    steps: int | Steps,
    batch_first: bool = False,
) -> Any:
    """(y, h_n, c_n), all tensors; None where the call is not one for the short way.

    Only where not :func:`engine.is_surrounded`.

    Args:
        x, hx: whatever the caller got. To be taken, as a module has them: (T, B, in) or (B, T, in),
            a pair of (D, B, H) or None for zeros; or as a layer: (T * B, in) and h_0 and c_0 of
            each direction in turn, (B, H), which returns y, every h_n and every c_n.
        weights: weight_ih, weight_hh, bias_ih, bias_hh of each direction; the biases may be None.
            The second direction is the reversed one.
        steps: T; 0 for a cell's only one, x being (B, in): then there is no y. Of a layer, where
            :func:`takes_more`, also Steps with lengths, offsets or resets.
    """
    engine = _engine_of(x)
    if engine is None:
        return None
    T, rows = _native(engine, steps)
    call = (x, hx, weights, input_size, hidden_size, T, batch_first)
    if engine is cpu_engine:
        made = recorded(_plain.cpu_forward)(
            *call,
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_grad_enabled(),
            cpu_products.workspace,
        )
    else:
        made = recorded(engine.plain.cuda_forward)(engine, *call, rows, torch.is_grad_enabled())
    if made is None:
        return None
    outputs, saved = made
    if saved is None:
        return outputs
    # Function.apply looks for wrappers of transforms before, which the core found none of.
    return super(Function, PlainLayer).apply(steps, batch_first, outputs, *saved)


def plain_module(module: LSTM, x: Any, hx: Any) -> Any:
    """What a module's forward returns for its input and hx; None where they are not for the short
    way."""
    directions = 2 if module.bidirectional else 1
    if (
        is_surrounded()
        or (module.num_layers > 1 and getattr(_engine_of(x), "wavefront", False))
        or module.proj_size
        or module.merge_mode != "concat"
        or module.return_cell_sequence
        or module.checkpoint_every is not None
        or module._varied()
        or x.dim() != 3
    ):
        return None
    parameters, layers = module._parameters, []
    for k, names in enumerate(module._all_weights):
        own = [parameters.get(name) for name in names]
        for weight in own:
            if weight is None:
                return None  # replaced: to look at one may change a parametrization's state
        if len(own) != (4 if module.bias else 2):
            return None  # attributes changed after construction
        if not module.bias:
            own += (None, None)
        if k % directions:
            layers[-1] += own
        else:
            layers.append(own)
    if len(module._all_weights) != module.num_layers * directions:
        return None  # as well
    steps = x.size(1 if module.batch_first else 0)
    if not steps:
        return None
    sizes = (module.input_size, module.hidden_size, steps, module.batch_first)
    if module.num_layers == 1:
        made = plain_layer(x, hx, layers[0], *sizes)
        return made if made is None else (made[0], made[1:])
    drop = module._drop if module.dropout and module.training else None
    return plain_stack(x, hx, layers, *sizes, drop)


def plain_stack(
    x: Any,
    hx: Any,
    layers: Sequence[Sequence[Tensor | None]],
    input_size: int,
    hidden_size: int,
    steps: int,
    batch_first: bool,
    drop: Callable[[Tensor], Tensor] | None,
) -> Any:
    """(y, (h_n, c_n)) of several plain layers; None where they are not for the short way.

    Args:
        x, hx: as a module has them; hx of all layers, (L * D, B, H). layers: each one's weights.
        drop: what becomes of an output on its way to the next layer.
        The rest: see :func:`plain_layer`.
    """
    # It takes all of them or none, but for what is an error in a later one.
    if x.dtype == torch.bfloat16 and not takes_more(x):
        return None  # the CPU's short way depends on the width of a layer's input
    for weights in layers[1:]:
        for weight in weights:
            if weight is not None and (type(weight) not in _TYPES or weight.is_neg()):
                return None
    D = len(layers[0]) // _WEIGHTS
    states = [None] * len(layers)
    if hx is not None:
        if not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            return None
        for state in hx:
            if type(state) not in _TYPES or state.dim() != 3 or len(state) != len(layers) * D:
                return None
        states = list(zip(*(state.split(D) for state in hx), strict=True))
    last = []
    for k, (state, weights) in enumerate(zip(states, layers, strict=True)):
        made = plain_layer(x, state, weights, input_size, hidden_size, steps, batch_first)
        if made is None:
            return None
        x, *own = made
        last.append(own)
        input_size = D * hidden_size
        if drop is not None and k + 1 < len(layers):
            x = drop(x)
    h_n, c_n = (torch.cat(parts) for parts in zip(*last, strict=True))
    return x, (h_n, c_n)


def takes_more(x: Any) -> bool:
    """Whether the short way for x takes sequences that differ: asked before all else, for on the
    CPU, where it does not, they would pay for the questions."""
    # What traces this reads no further.
    return not torch.compiler.is_compiling() and _engine_of(x) not in (None, cpu_engine)


def _native(engine: Any, steps: int | Steps) -> tuple[int, Any]:
    """T, and the core's description of Steps, which only an engine with a core has."""
    if isinstance(steps, int):
        return steps, None
    return steps.T, native_steps(engine.core, steps, False)


def _engine_of(x: Any) -> Any:
    """The engine that has a short way for x; None where there is none."""
    if type(x) not in _TYPES:
        return None
    engine = ops._engines.get(x.device.type)
    return engine if engine is cpu_engine or getattr(engine, "plain", None) is not None else None


def plain_cell(
    x: Any, hx: Any, weights: Sequence[Tensor | None], input_size: int, hidden_size: int
) -> tuple[Tensor, Tensor] | None:
    """(h_1, c_1) as LSTMCell.forward returns them, x and hx being what it got; else as
    :func:`plain_layer`."""
    return plain_layer(x, hx, weights, input_size, hidden_size, 0)


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
        outputs: tuple[Tensor, ...],
        gates: Tensor,
        c_seq: Tensor,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """outputs: y, unless of a cell (steps 0), every h_n and every c_n. inputs: x and, of each
        direction, h_0, c_0 and the weights; a module's states, of all directions, are the first's.

        gates (D * T * B, 4H), c_seq (D * T * B, H).
        """
        ctx.steps = steps, batch_first
        T = steps.T if isinstance(steps, Steps) else steps
        ctx.save_for_backward(*inputs, gates, c_seq, outputs[0] if T > 1 else None)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @batching.batched_gradients
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[5:]
        if not (must_apply() or torch._C._is_any_autocast_enabled()):
            made = _backward(gradients, saved, wanted, *ctx.steps)
            if made is not None:
                return (None,) * 5 + made
        return (None,) * 5 + _by_the_layer(gradients, saved, wanted, *ctx.steps)


def _backward(
    gradients: tuple[Tensor | None, ...],
    saved: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    steps: int | Steps,
    batch_first: bool,
) -> tuple[Tensor | None, ...] | None:
    """The gradients of the inputs, None where not wanted; None where the call is not one for the
    short way."""
    engine = _engine_of(saved[0])
    if engine is None or (engine is cpu_engine and not isinstance(steps, int)):
        return None  # the latter: by a hook on saved tensors
    T, rows = _native(engine, steps)
    call = (gradients, saved, wanted, T, batch_first)
    if engine is cpu_engine:
        return recorded(_plain.cpu_backward)(
            *call, torch.get_num_threads(), cpu_backward.FUSED_ROWS - 1, cpu_products.workspace
        )
    return recorded(engine.plain.cuda_backward)(engine, *call, rows)


def _by_the_layer(
    gradients: tuple[Tensor | None, ...],
    saved: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    steps: int | Steps,
    batch_first: bool,
) -> tuple[Tensor | None, ...]:
    """As :func:`_backward`, by LSTMLayerBackward."""
    D, states = _directions(saved), len(gradients) // 2
    together = D // states  # directions of a tensor of states: a module's has all
    x, *flat, gates, c_seq, y = saved
    inputs, flags = grouped(flat, D), grouped(wanted[1:], D)
    I, H = x.size(-1), inputs[0][3].size(1)

    def apart(*tensors: Tensor | None) -> list[Tensor | None]:
        """(B, H) of each direction."""
        if together == 1:
            return [_rows(t, H) for t in tensors]
        (t,) = tensors
        return [None] * D if t is None else list(_rows(t, H).tensor_split(D))

    if inputs[0][0] is None:
        zeros = x.new_zeros(x.numel() // (I * (steps or 1)), H)
        h0 = c0 = [zeros] * D
    else:
        h0, c0 = (apart(*(group[k] for group in inputs[:states])) for k in range(2))
    if not isinstance(steps, Steps):
        steps = Steps.padded(steps or 1, h0[0].size(0), batch_first=batch_first)
    dy = _rows(gradients[0], D * H) if len(gradients) % 2 else None
    dh, dc = apart(*gradients[-2 * states : -states]), apart(*gradients[-states:])
    # The output is read only at a step before another.
    y = side_by_side(h0, x.dtype) if y is None else _rows(y, D * H)
    directions, wanted_ones = [], []
    for k in range(D):
        directions += [h0[k], c0[k], *inputs[k][2:], None]  # no weight_hr
        wanted_ones += [*flags[k // together][:2], *flags[k][2:], False]
    run = LSTMLayerBackward.apply if must_apply() else LSTMLayerBackward.forward
    dx, *made = run(
        steps,
        ((False, None), (True, None))[:D],
        (wanted[0], *wanted_ones),
        *(dy, None, *dh, *dc, _rows(x, I), *directions, y),
        *(gates.tensor_split(D) if D > 1 else (gates,)),
        *(c_seq.tensor_split(D) if D > 1 else (c_seq,)),
    )
    results = [dx if dx is None else dx.view(x.shape)]
    of_directions = grouped(made, D)
    for k, (group, given) in enumerate(zip(of_directions, inputs, strict=True)):
        for i in range(2):
            parts = [g[i] for g in of_directions[k : k + together]]
            if parts[0] is None or k % together:
                results.append(None)
            else:
                whole = parts[0] if together == 1 else torch.cat(parts)
                results.append(whole.view(given[i].shape))
        results += group[2:6]
    return tuple(results)


def _directions(saved: tuple[Tensor | None, ...]) -> int:
    return (len(saved) - _RESULTS) // _INPUTS


def _rows(tensor: Tensor | None, width: int) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() == 2 else tensor.reshape(-1, width)
