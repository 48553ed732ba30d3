"""Weights in 8 bits, for inference on the CPU: numbers, layout, and a layer of them.

A row w of weights becomes w ~ s (u - 128), s = max |w| / 127, u whole numbers in 1 .. 255
(symmetric, a scale a row). Of x and h a row becomes whole numbers of 16 bits, or 8, when it is
multiplied (in the core, csrc/cpu/quantized.h): with 16 the rounding of the weights is the only
error to speak of. Sums, gates and cell states are float32, as ever.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lstm_ext import batching, plain
from lstm_ext.autograd import has_tangent, needs_grad
from lstm_ext.cpu.calls import biases_alone, gates_bytes, run_directions
from lstm_ext.engine import (
    DTYPE_CODE,
    Direction,
    allocate,
    autocast_is_on,
    in_memory,
    is_watched,
    native_steps,
    native_variants,
    refuse_jit,
)
from lstm_ext.flat import Kind
from lstm_ext.native import _C
from lstm_ext.ops import check_devices, check_tensors
from lstm_ext.profiling import recorded
from lstm_ext.steps import Steps, check_steps
from lstm_ext.torch_engine import LayerOutputs, side_by_side

ACTIVATION_BITS = (8, 16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS, _DEPTH, _ZERO_POINT = 16, 4, 128  # as in csrc/cpu/quantized.h
_ABSENT = 0  # the code of a column that is not there, and of no weight
_MOST_COLUMNS = 1 << 16  # sums of so many products fit 32 bits


class QuantizedWeights(NamedTuple):
    """Of one direction of a layer. Codes as :func:`pack` lays them, scales a number a row."""

    w_ih: Tensor  # uint8
    w_hh: Tensor  # uint8
    scale_ih: Tensor  # (4H) float32
    scale_hh: Tensor  # (4H) float32
    bias: Tensor | None = None  # (4H) float32, b_ih + b_hh
    w_hr: Tensor | None = None  # uint8
    scale_hr: Tensor | None = None  # (P) float32
    activation_bits: int = 16

    varied = False  # as LayerWeights' property: nothing beside nn.LSTM's


_TENSORS = len(QuantizedWeights._fields) - 1  # all but the last
_PROJECTION = QuantizedWeights._fields.index("w_hr")


def packed_size(rows: int, columns: int, gates: int) -> tuple[int, ...]:
    """Of the codes of (rows, columns) weights, those of all gates below each other.

    Raises:
        ValueError: there are more than 65536 columns.
    """
    if columns > _MOST_COLUMNS:
        raise ValueError(f"quantize: expected at most {_MOST_COLUMNS} columns, got {columns}")
    return -(-(rows // gates) // _ROWS), -(-columns // _DEPTH), gates * _ROWS * _DEPTH


def pack(weight: Tensor, gates: int = 4) -> tuple[Tensor, Tensor]:
    """The codes and scales of a weight (gates * n, K).

    Returns:
        uint8 (n / 16, K / 4, gates * 16 * 4), both rounded up, what is absent being 0; float32
        (gates * n).

    Raises:
        ValueError: a weight is not finite or has no value, or there are more than 65536 columns.
    """
    if weight.is_meta:
        raise ValueError("quantize: expected weights with values, got some on the meta device")
    given = weight.detach()
    weight = given.to("cpu", torch.float32)
    rows, K = weight.shape
    size = blocks, depth, _ = packed_size(rows, K, gates)
    if not weight.isfinite().all():
        got = "infinity or NaN among them"
        if given.isfinite().all():
            got = f"{given.abs().max():.3g}, which is none in float32, among them"
        raise ValueError(f"quantize: expected finite weights, got {got}")
    scale = weight.abs().amax(1) / 127 if K else weight.new_zeros(rows)
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, 0, scale)
    codes = weight / torch.where(scale == 0, torch.inf, scale)[:, None]
    codes = codes.round().add(_ZERO_POINT).to(torch.uint8)
    codes = codes.view(gates, rows // gates, K)
    pad = (0, depth * _DEPTH - K, 0, blocks * _ROWS - rows // gates)
    codes = F.pad(codes, pad, value=_ABSENT)
    codes = codes.view(gates, blocks, _ROWS, depth, _DEPTH).permute(1, 3, 0, 2, 4)
    return codes.reshape(size).contiguous(), scale


def is_of_columns(codes: Tensor, columns: int) -> bool:
    """Whether codes are of weights of so many columns, rather than of up to three fewer or more."""
    if -(-columns // _DEPTH) != codes.size(1) or not columns:
        return codes.size(1) == -(-columns // _DEPTH)
    last = codes[:, -1].view(codes.size(0), -1, _DEPTH)
    absent = columns % _DEPTH or _DEPTH
    return bool((last[..., absent:] == _ABSENT).all() and (last[:, 0, absent - 1] != _ABSENT).all())


def unpack(codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    """The weight (gates * n, columns), float32, that the codes stand for."""
    blocks, depth, width = codes.shape
    gates = width // (_ROWS * _DEPTH)
    rows = codes.view(blocks, depth, gates, _ROWS, _DEPTH).permute(2, 0, 3, 1, 4)
    rows = rows.reshape(gates, blocks * _ROWS, depth * _DEPTH)
    rows = rows[:, : scale.numel() // gates, :columns].reshape(scale.numel(), columns)
    return (rows.to(torch.float32) - _ZERO_POINT) * scale[:, None]


def quantized_layer(
    x: Tensor, directions: list[Direction], steps: Steps, *, cells: bool = False
) -> LayerOutputs:
    """As :func:`layer.lstm_layer`, with QuantizedWeights; on the CPU, and not differentiable.

    Raises:
        RuntimeError: a tensor on another device, or one that a gradient is to go through.
    """
    device = x.device.type
    if autocast_is_on(device):
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        directions = [d._replace(h0=d.h0.to(dtype), c0=d.c0.to(dtype)) for d in directions]
    tensors = [x, *(t for d in directions for t in (d.h0, d.c0))]
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise RuntimeError(
                f"weights of 8 bits run on the CPU, got a tensor on {tensor.device}: move the "
                "input there, or keep an lstm_ext.LSTM for this device"
            )
    _refuse_derivatives(tensors)
    if torch.jit.is_tracing():
        refuse_jit()
    x, *states = [in_memory(t) for t in tensors]
    flat = []
    for k, direction in enumerate(directions):
        flat += (*states[2 * k : 2 * k + 2], *direction.w[:_TENSORS])
    bits, reverse = directions[0].w.activation_bits, [d.reverse for d in directions]
    arguments = (
        *(x, flat, bits, reverse),
        *(steps.T, steps.B, steps.batch_first, steps.offsets, steps.lengths, steps.reset_mask),
        cells,
    )
    if is_watched():
        y, *results = torch.ops.lstm_ext.quantized_layer(*arguments)
    else:
        y, *results = _run(x, flat, bits, reverse, steps, cells)
    D = len(directions)
    # By indices: of a star's rest torch.compile makes a tuple before PyTorch 2.13.
    every, last = (results[0], results[1:]) if cells else (None, results)
    return LayerOutputs(y, list(last[:D]), list(last[D:]), every)


def _refuse_derivatives(tensors: Sequence[Tensor | None]) -> None:
    if needs_grad(tensors) or has_tangent(tensors):
        raise RuntimeError(
            "weights of 8 bits are for inference, got a tensor that requires grad, or has a "
            "tangent: call the module under torch.no_grad(), or detach its input and states"
        )


def _run(
    x: Tensor,
    flat: Sequence[Tensor | None],
    bits: int,
    reverse: Sequence[bool],
    steps: Steps,
    cells: bool,
) -> list[Tensor]:
    """y, every c_t if cells, h_n and c_n of each direction."""
    size = 2 + _TENSORS
    P, D = flat[0].size(-1), len(reverse)
    _check_sizes(x, flat, steps, D)
    y = allocate(x, steps.rows, D * P, zero=steps.has_padding)
    operand = x.to(torch.float32).contiguous()
    last, running, directions = [], [], []
    for k, backwards in enumerate(reverse):
        h0, c0, *own = flat[k * size : (k + 1) * size]
        direction = Direction(h0, c0, QuantizedWeights(*own, bits), backwards)
        directions.append(direction)
        part = y if D == 1 else y[:, k * P : (k + 1) * P]
        running.append(_forward(x, operand, direction, steps, cells, part, last))
    run_directions(recorded(_C.cpu_forward), running, gates_bytes(x, directions, steps))
    h_n, c_n, c_seq = zip(*last, strict=True)
    every = (side_by_side(c_seq, x.dtype),) if cells else ()
    return [y, *every, *h_n, *c_n]


_library = torch.library.Library("lstm_ext", "FRAGMENT")
# directions: h0, c0 and the tensors of the QuantizedWeights of each; the rest as of lstm_layer
# (library.py). For what records operations; a call outside of a graph costs less without.
_library.define(
    "quantized_layer(Tensor x, Tensor?[] directions, int activation_bits, bool[] reverse, "
    "SymInt T, SymInt B, bool batch_first, Tensor? offsets, Tensor? lengths, Tensor? reset_mask, "
    "bool cells) -> Tensor[]"
)


def _plain(
    x: Tensor,
    flat: Sequence[Tensor | None],
    bits: int,
    reverse: Sequence[bool],
    T: int,
    B: int,
    batch_first: bool,
    *differing: Any,
) -> list[Tensor] | None:
    """By the short way; None where there is none. What it refuses goes the long one, which has the
    errors. differing: offsets, lengths, reset_mask and cells."""
    *tensors, cells = differing
    if cells or any(t is not None for t in tensors):
        return None
    size = (2 + _TENSORS) * len(reverse)
    # First whether it is watched: T may be a symbol, which is asked for nothing then.
    if is_watched() or len(flat) != size or not plain.takes(x, T, reverse):
        return None
    parts = plain.parts(flat, len(reverse), _PROJECTION)
    if parts is None or bits not in ACTIVATION_BITS or x.size(0) != T * B:
        return None
    states, weights, H, P = parts
    made = plain.plain_quantized(
        *(x, states, weights, x.size(-1), H, T, batch_first, P), activation_bits=bits
    )
    return made if made is None else list(made)


def _autograd(*arguments: Any) -> list[Tensor]:
    _refuse_derivatives([arguments[0], *arguments[1]])
    made = _plain(*arguments)
    if made is not None:
        return made
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.lstm_ext.quantized_layer(*arguments)


def _kernel(*arguments: Any) -> list[Tensor]:
    made = _plain(*arguments)
    if made is not None:
        return made
    x, flat, bits, reverse, T, B, batch_first, *tensors, cells = arguments
    steps = Steps.of((T, B, x.size(0), batch_first), *tensors)
    check_steps(steps)
    return _run(x, flat, bits, reverse, steps, cells)


def _fake(
    x: Tensor, flat: Sequence[Tensor | None], bits: int, reverse: Sequence[bool], *rest: Any
) -> list[Tensor]:
    check_devices(x, flat)
    D, cells, (h0, c0) = len(reverse), rest[-1], flat[:2]
    widths = (h0.size(1), c0.size(1)) if cells else (h0.size(1),)
    rows = [x.new_empty(x.size(0), D * width) for width in widths]
    return rows + [x.new_empty(t.shape) for t in (h0, c0) for _ in reverse]


class _Operator:
    """As batching's rules call it."""

    @staticmethod
    def apply(
        steps: Steps, kinds: Sequence[Kind], options: tuple[int, bool], x: Tensor, *flat: Any
    ) -> list[Tensor]:
        bits, cells = options
        reverse = [backwards for backwards, _ in kinds]
        return torch.ops.lstm_ext.quantized_layer(
            *(x, list(flat), bits, reverse, steps.T, steps.B, steps.batch_first),
            *(steps.offsets, steps.lengths, steps.reset_mask, cells),
        )


def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    x, flat, bits, reverse, T, B, batch_first, *tensors, cells = arguments
    x_dim, dims = in_dims[0], in_dims[1] or [None] * len(flat)
    steps = Steps.of((T, B, x.size(0 if x_dim != 0 else 1), batch_first), *tensors)
    kinds = tuple((backwards, None) for backwards in reverse)
    steps_dims, kinds_dims = Steps.of(steps.layout, *in_dims[7:10]), ((None, None),) * len(kinds)
    return batching.forward(
        _Operator,
        info.batch_size,
        (steps_dims, kinds_dims, (None, None), x_dim, *dims),
        (steps, kinds, (bits, cells), x, *flat),
    )


_library.impl("quantized_layer", _kernel, "CompositeExplicitAutograd")
_library.impl("quantized_layer", _autograd, "Autograd")
torch.library.register_vmap("lstm_ext::quantized_layer", _vmap, lib=_library)
torch.library.register_fake("lstm_ext::quantized_layer", _fake, lib=_library)


def _forward(
    x: Tensor,
    operand: Tensor,
    direction: Direction,
    steps: Steps,
    cells: bool,
    y: Tensor,
    last: list[Any],
) -> Generator[Any, None, None]:
    """One direction, as :func:`cpu.engine._forward`."""
    h0, c0, w, reverse = direction
    H, P, I = c0.size(1), h0.size(1), x.size(1)
    _check_weights(H, P, I, w)
    w = QuantizedWeights(*(t.contiguous() if isinstance(t, Tensor) else t for t in w))
    h0, c0 = h0.contiguous(), c0.contiguous()
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    c_seq = None
    if cells:
        c_seq = allocate(x, steps.rows, H, zero=steps.has_padding, dtype=torch.float32)
    variants, _ = native_variants(_C, w, x.dtype)
    gx: Tensor | None = None
    if I == 0:  # as in cpu.engine
        gx = biases_alone(steps.rows, 4 * H, [w.bias], w.scale_hh)
    # fmt: off
    call = _C.CpuForward(
        DTYPE_CODE[x.dtype], False, torch.get_num_threads(), False,
        native_steps(_C, steps, reverse), H, P, I,
        gx, operand, w.w_ih, w.bias, None, w.w_hh, w.w_hr, h0, c0, variants,
        None, c_seq, None, None,
        y, y.stride(0), h_n, c_n,
    )
    # fmt: on
    call.quantize(w.scale_ih, w.scale_hh, w.scale_hr, w.activation_bits)
    last.append((h_n, c_n, c_seq))
    yield call


def _check_sizes(x: Tensor, flat: Sequence[Tensor | None], steps: Steps, D: int) -> None:
    """Refuses what the core could not read safely: as ops.check_layer, but for weights."""
    if x.dtype not in DTYPES:
        expected = ", ".join(map(str, DTYPES))
        raise TypeError(f"weights of 8 bits: expected an input of {expected}, got {x.dtype}")
    size = 2 + _TENSORS
    if len(flat) != D * size or x.dim() != 2 or x.size(0) != steps.rows:
        raise RuntimeError(f"Expected input of {steps.rows} rows, got size {tuple(x.shape)}")
    P, H = flat[0].size(-1), flat[1].size(-1)
    for k in range(D):
        check_tensors(x, flat[k * size : k * size + 2], ((steps.B, P), (steps.B, H)))


def _check_weights(H: int, P: int, I: int, w: QuantizedWeights) -> None:
    """Likewise the weights."""
    _check_tensor("weight_ih", w.w_ih, torch.uint8, packed_size(4 * H, I, 4))
    _check_tensor("weight_hh", w.w_hh, torch.uint8, packed_size(4 * H, P, 4))
    _check_tensor("scale_ih", w.scale_ih, torch.float32, (4 * H,))
    _check_tensor("scale_hh", w.scale_hh, torch.float32, (4 * H,))
    if w.bias is not None:
        _check_tensor("bias", w.bias, torch.float32, (4 * H,))
    if P == 0 < H:
        raise RuntimeError("Expected states of at least one feature, got h0 without")
    if P != H or w.w_hr is not None:
        _check_tensor("weight_hr", w.w_hr, torch.uint8, packed_size(P, H, 1))
        _check_tensor("scale_hr", w.scale_hr, torch.float32, (P,))


def _check_tensor(
    name: str, tensor: Tensor | None, dtype: torch.dtype, size: tuple[int, ...]
) -> None:
    if tensor is None or tensor.device.type != "cpu" or tensor.dtype != dtype:
        got = "None" if tensor is None else f"{tensor.dtype} on {tensor.device}"
        raise RuntimeError(f"{name}: expected {dtype} on the CPU, got {got}")
    if tensor.shape != size:
        raise RuntimeError(f"{name}: expected size {size}, got {tuple(tensor.shape)}")
