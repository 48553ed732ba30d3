"""One LSTM layer, all its directions, on the engine of its device: checks and dispatch.

The engines (:mod:`cpu.engine`, :mod:`cuda.engine`) allocate, make the products over all steps and
call the native core.

Letters: T steps, B sequences, H hidden units, P = size of h (H, or the projection's size), D
directions, rows = (step, sequence) pairs in memory. Gates i, f, g, o. Half types compute in
float32.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from lstm_ext._build import CUDA_BUILD_COMMAND
from lstm_ext.cpu import engine as cpu_engine
from lstm_ext.cpu.engine import cpu_isa, cpu_isas, select_cpu_isa
from lstm_ext.cuda import engine as cuda_engine
from lstm_ext.engine import (
    DTYPE_CODE,
    Direction,
    DirectionGrads,
    LayerResult,
    LayerWeights,
    Masks,
    acc_dtype,
    autocast_is_on,
    in_memory,
    tensors_of,
    with_masks,
    without_autocast,
)
from lstm_ext.flat import map_tensors
from lstm_ext.native import _C
from lstm_ext.steps import Steps
from lstm_ext.tensors import check_dense

__all__ = [
    "Direction",
    "DirectionGrads",
    "LayerResult",
    "LayerWeights",
    "Masks",
    "acc_dtype",
    "autocast_is_on",
    "check_dtype",
    "check_layer",
    "check_saved",
    "cpu_isa",
    "cpu_isas",
    "engine_of",
    "has_native_kernels",
    "layer_backward",
    "layer_forward",
    "select_cpu_isa",
    "tensors_of",
    "with_masks",
    "without_autocast",
]


class Engine(Protocol):
    """What runs a layer on one kind of device; the arguments are those of the functions below.

    It may have as well, and is asked for it each time: ``layer_second``, of float32 and float64;
    ``plain``, the short way of :mod:`plain`; ``wavefront``, whether stacks may run as one.
    """

    def layer_forward(
        self,
        x: Tensor,
        directions: list[Direction],
        steps: Steps,
        *,
        save: bool,
        cells: bool,
    ) -> LayerResult: ...

    def layer_backward(
        self,
        dy: Tensor | None,
        dcells: Tensor | None,
        dh_n: list[Tensor | None],
        dc_n: list[Tensor | None],
        x: Tensor,
        directions: list[Direction],
        y: Tensor,
        saved: list[tuple[Tensor, ...]],
        steps: Steps,
        *,
        wanted_x: bool,
        wanted: list[DirectionGrads],
    ) -> tuple[Tensor | None, list[DirectionGrads]]: ...


_engines: dict[str, Engine] = {"cpu": cpu_engine}
if _C.build_info()["cuda"]:
    _engines["cuda"] = cuda_engine.CudaEngine(_C)


def engine_of(device: torch.device) -> Engine:
    """What runs layers on ``device``, which has native kernels."""
    return _engines[device.type]


def has_native_kernels(device: torch.device) -> bool:
    """Whether this build has kernels for tensors on ``device``.

    Raises:
        RuntimeError: a CUDA device and a build without CUDA; the text names the command that
            builds with it.
    """
    if device.type in _engines:
        return True
    if device.type == "cuda":
        raise RuntimeError(
            f"got a tensor on {device}, but this lstm_ext was built for the CPU only "
            f"({_C.build_info()['cuda_reason']}). In a checkout, this builds it with CUDA: "
            f"{CUDA_BUILD_COMMAND}"
        )
    return False


_DIRECTION_INPUTS = (
    "h0",
    "c0",
    "weight_ih",
    "weight_hh",
    "bias_ih",
    "bias_hh",
    "weight_hr",
    "weight_ch",
    "gamma_ih",
    "gamma_hh",
    "gamma_ch",
    "beta_ch",
)


def check_layer(x: Tensor, directions: list[Direction], steps: Steps) -> None:
    """Refuses what the core could not read safely.

    Raises:
        TypeError: a dtype without kernels. ValueError: dtypes or devices that differ.
        RuntimeError: a wrong size.
    """
    I = x.size(-1)
    check_dtype(x.dtype)
    check_dense("input", x)
    if x.shape != (steps.rows, I):
        raise RuntimeError(f"Expected input rows of size {(steps.rows, I)}, got {tuple(x.shape)}")
    H, P = directions[0].c0.size(-1), directions[0].h0.size(-1)
    # torch.compile takes a cache of numbers amiss.
    sizes = (_sizes_of if torch.compiler.is_compiling() else _sizes)(steps.B, I, H, P)
    for direction in directions:
        check_tensors(x, (direction.h0, direction.c0, *tensors_of(direction.w)), sizes)
        if direction.w.w_hr is None and P != H:
            got = tuple(direction.h0.shape)
            raise RuntimeError(f"Expected h0 of size {(steps.B, H)}, got {got}")
        if direction.w.masks is not None:
            _check_masks(direction.w.masks, ((steps.B, P), (steps.rows, P), (steps.rows, H)))


def check_dtype(dtype: torch.dtype) -> None:
    """Raises TypeError for a dtype without kernels."""
    if dtype not in DTYPE_CODE:
        raise TypeError(
            f"lstm_ext has no kernel for {dtype}: convert input and module to torch.float64, "
            "torch.float32, torch.bfloat16 or torch.float16"
        )


def check_devices(x: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Refuses tensors on another device than x: with one on the meta device among them torch calls
    an operator's fake, whose results hold nothing."""
    for tensor in tensors:
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(
                f"Expected all tensors on {x.device} like the input, got one on {tensor.device}"
            )


def check_tensors(
    x: Tensor, tensors: Sequence[Tensor | None], sizes: Sequence[tuple[int, ...]]
) -> None:
    """Refuses what is not of its size, or of another dtype or device than x: of a direction's h0,
    c0 and what follows, as far as given.

    Raises:
        ValueError, RuntimeError: as :func:`check_layer`.
    """
    dtype, device = x.dtype, x.device
    for tensor, size in zip(tensors, sizes, strict=False):
        if tensor is None:
            continue
        if (
            tensor.shape != size
            or tensor.dtype != dtype
            or tensor.device != device
            or tensor.layout is not torch.strided
        ):
            _refuse(tensors, sizes, x)


def _sizes_of(B: int, I: int, H: int, P: int) -> tuple[tuple[int, ...], ...]:
    """Of the tensors of a direction, in the order of _DIRECTION_INPUTS."""
    gates = (4 * H,)
    weights = ((4 * H, I), (4 * H, P), gates, gates, (P, H), (3 * H,), gates, gates, (H,), (H,))
    return ((B, P), (B, H), *weights)


_sizes = functools.lru_cache(maxsize=256)(_sizes_of)


def _refuse(
    tensors: Sequence[Tensor | None], sizes: Sequence[tuple[int, ...]], x: Tensor
) -> NoReturn:
    """Raises for the first of a direction's tensors that is not as x and the sizes ask."""
    for name, tensor, size in zip(_DIRECTION_INPUTS, tensors, sizes, strict=False):
        if tensor is None:
            continue
        if tensor.shape != size:
            raise RuntimeError(f"Expected {name} of size {size}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"Expected {name} to be {x.dtype} on {x.device} like the input, "
                f"got {tensor.dtype} on {tensor.device}"
            )
        check_dense(name, tensor)
    raise AssertionError("no tensor is wrong")


def _check_masks(masks: Masks, sizes: tuple[tuple[int, int], ...]) -> None:
    for name, mask, size in zip(Masks._fields, masks, sizes, strict=True):
        if isinstance(mask, Tensor) and mask.shape != size:
            raise RuntimeError(f"Expected {name} of size {size}, got {tuple(mask.shape)}")


def layer_forward(
    x: Tensor, directions: list[Direction], steps: Steps, *, save: bool, cells: bool
) -> LayerResult:
    """Runs a layer over all steps.

    Args:
        x: (rows, in). Each direction's h0: (B, P), c0: (B, H).
        save: also return what backward needs.
        cells: also return every c_t.
    """
    engine = engine_of(x.device)
    return engine.layer_forward(x, directions, steps, save=save, cells=cells)


def check_saved(
    gradients: Sequence[Tensor | None],
    x: Tensor,
    directions: list[Direction],
    y: Tensor,
    saved: Sequence[tuple[Tensor, ...]],
    steps: Steps,
) -> None:
    """Refuses what is no longer as forward left it: a hook on saved tensors may return anything,
    and ``.data``, which Module.to() sets too, changes a parameter without a new version.

    gradients: of the outputs. The rest as for :func:`layer_backward`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`check_layer`; RuntimeError also for a result
            of forward of another size, dtype or device, gradients of another dtype or device, and
            for what is lazily negated.
    """
    check_layer(x, directions, steps)
    rows, dtype, device = steps.rows, x.dtype, x.device
    H, P = directions[0].c0.size(1), directions[0].h0.size(1)
    check_result(y, (rows, len(directions) * P), dtype, device)
    # As LayerResult and, with a layer norm, norm_input and the engines list them.
    sizes = ((rows, 4 * H), (rows, H), (rows, 4 * H), (rows, 1), (rows, 1), (rows, 4 * H), (rows,))
    acc = acc_dtype(dtype)
    for tensors in saved:
        for tensor, size in zip(tensors, sizes, strict=False):
            check_result(tensor, size, acc, device)
    for direction in directions:
        for tensor in (x, direction.h0, direction.c0, *tensors_of(direction.w)):
            if tensor is not None and tensor.is_neg():  # forward has resolved its caller's
                raise RuntimeError("Expected what was saved for backward, got it lazily negated")
    for gradient in gradients:  # of the sizes of the outputs, says autograd
        if gradient is not None and (gradient.dtype != dtype or gradient.device != device):
            raise RuntimeError(
                f"Expected what is saved for backward to be {gradient.dtype} on {gradient.device} "
                f"like the gradients, got {dtype} on {device}"
            )


def check_result(
    tensor: Tensor, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if (
        tensor.shape != size
        or tensor.dtype != dtype
        or tensor.device != device
        or tensor.is_neg()  # lazily: its memory is that of the opposite
    ):
        negated = ", lazily negated" if tensor.is_neg() else ""
        raise RuntimeError(
            f"Expected a result saved for backward to be {dtype} of size {size} on {device}, "
            f"got {tensor.dtype} of size {tuple(tensor.shape)} on {tensor.device}{negated}"
        )


def layer_backward(*arguments: Any, **wanted: Any) -> tuple[Tensor | None, list[DirectionGrads]]:
    """Gradients of a layer's inputs: of x, and per direction; None where they are not wanted.

    Args:
        dy (rows, D*P), dcells (rows, D*H): gradients of the outputs, None for zero; dh_n (B, P)
            and dc_n (B, H) likewise, a list over the directions. The rest: inputs and results of
            :func:`layer_forward` with ``save``, ``saved`` as (gates, c_seq, *more) of each.
        wanted_x, wanted: which gradients to make, a flag each.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`check_saved`.
    """
    dy, dcells, dh_n, dc_n, x, *rest = arguments
    check_saved((dy, dcells, *dh_n, *dc_n), x, *rest)
    return engine_of(x.device).layer_backward(*arguments, **wanted)


def has_native_second(x: Tensor, directions: list[Direction], steps: Steps) -> bool:
    """Whether x's engine makes second derivatives of such a layer."""
    return (
        getattr(_engines.get(x.device.type), "layer_second", None) is not None
        and steps.rows > 0
        and not any(direction.w.varied for direction in directions)
    )


def layer_second(
    v_x: Tensor | None,
    v: list[DirectionGrads],
    d: Sequence[Tensor | None],
    x: Tensor,
    directions: list[Direction],
    y: Tensor,
    saved: list[tuple[Tensor, ...]],
    steps: Steps,
    *,
    wanted_x: bool,
    wanted: list[DirectionGrads],
    cells: bool = False,
    d_dot: Sequence[Tensor | None] | None = None,
) -> tuple[list[Tensor | None], Tensor | None, list[DirectionGrads]]:
    """The derivative of v^T g by the arguments of :func:`layer_backward`, g being its results.

    Args:
        v_x, v: of the shapes of g, of x and per direction; None for zero.
        d: of dy, dcells, each dh_n and each dc_n; None for zero.
        The rest: as for :func:`layer_backward`, the flags too, of the second derivatives.
        cells: whether that by dcells is wanted.
        d_dot: also the derivative of g in that direction of d is added; None for zero.

    Returns:
        The gradients of dy, of dcells (None unless wanted), of each dh_n and of each dc_n: also the
        tangents of forward's results in the direction v. Then those of x and of the directions,
        None where they are not wanted: also the tangents of g. For :func:`has_native_second`.

    Raises:
        TypeError: a dtype or device of v or d_dot that is not x's. The rest: see
            :func:`check_saved`.
    """
    check_saved(d, x, directions, y, saved, steps)
    d_dot = [None] * len(d) if d_dot is None else d_dot
    for tensor in (v_x, *itertools.chain(*v), *d_dot):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise TypeError(
                f"Expected tangents to be {x.dtype} on {x.device} like the tensors they belong to, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    dtype, acc = x.dtype, acc_dtype(x.dtype)

    def cast(tensors: Sequence[Tensor | None], to: torch.dtype = acc) -> list[Tensor | None]:
        return [None if t is None else in_memory(t).to(to) for t in tensors]

    if dtype != acc:
        x, directions = map_tensors(lambda t: t.to(acc), x, directions)
    outputs, dx, grads = engine_of(x.device).layer_second(
        *(cast([v_x])[0], [DirectionGrads(*cast(own)) for own in v], cast(d)),
        *(x, directions, cast([y])[0], saved, steps),
        wanted_x=wanted_x,
        wanted=wanted,
        cells=cells,
        d_dot=cast(d_dot),
    )
    return (
        cast(outputs, dtype),
        cast([dx], dtype)[0],
        [DirectionGrads(*cast(own, dtype)) for own in grads],
    )
