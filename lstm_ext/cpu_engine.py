"""A layer on the native core's CPU kernels: allocation, calls, products over all steps.

The core makes the input product too, a few steps at a time between those of the recurrence: what it
makes is still in the caches when it is used, 2-10 % of inference beside oneDNN's product over all
steps (fp32, B 16-64, H 128-256, two Zen 5 cores). Products over all steps are a library's where a
layer norm needs whole rows, and in backward where csrc/cpu/choice.h says so.
Letters as in :mod:`ops`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from lstm_ext import cpu_products
from lstm_ext.cpu_products import linear, matmul, transposed_matmul
from lstm_ext.engine import (
    DTYPE_CODE,
    Direction,
    DirectionGrads,
    LayerResult,
    LayerWeights,
    acc_dtype,
    native_steps,
    native_variants,
    norm_input,
    norm_input_backward,
    rows_of,
    without_autocast,
)
from lstm_ext.native import _C
from lstm_ext.profiling import recorded
from lstm_ext.steps import Steps


def cpu_isas() -> list[str]:
    """Names of the CPU kernel sets that run on this machine, best first."""
    return _C.cpu_isas()


def cpu_isa() -> str:
    """The CPU kernel set in use: the best, unless LSTM_EXT_CPU_ISA or select_cpu_isa chose."""
    return _C.cpu_isa()


def select_cpu_isa(name: str) -> None:
    """Chooses the CPU kernel set by name, for tests and comparisons; ValueError if unknown here.

    For the whole process; not while another thread runs a layer.
    """
    if not _C.select_cpu_isa(name):
        raise ValueError(f"CPU kernels that run here: {', '.join(cpu_isas())}; got {name!r}")


if _isa := os.environ.get("LSTM_EXT_CPU_ISA"):
    try:
        select_cpu_isa(_isa)
    except ValueError as error:
        raise ValueError(f"LSTM_EXT_CPU_ISA: {error}") from None


def _bf16_products(dtype: torch.dtype, w: LayerWeights) -> bool:
    """Whether products multiply bf16 as it is, rather than as float32. The sums are float32.

    oneDNN, which makes some of the products of backward over all steps, needs all its threads.
    """
    return (
        dtype == torch.bfloat16
        and not w.varied
        and _C.cpu_bf16_products()
        and _C.openmp_grants(torch.get_num_threads())
    )


# Beside the recurrence the core makes the gradients of x and of the weights from dgates that are
# still in the caches, if there are enough rows to be worth packing W_ih for them, and it stays in a
# cache as well. Backward took 5-8 % less time at H 128, level at H 256, 8 % more at H 512 (float32,
# B 16 to 64, two Zen 5 cores; two Zen 4 cores, products in longer slices: 5 % less at H 128, 2 %
# less at H 256, 1 % more at H 512); dgates of all steps need no memory. Of padded sequences, whose
# rows would have to be gathered first, training takes 4-19 % less at any size (H 64 to 1024).
FUSED_ROWS = 512
_FUSED_WEIGHT_BYTES = 1 << 20  # as products read them
# Numbers of a projection's W_hh whose packing, for one step, takes longer than a product by torch.
_MANY_WEIGHTS = 1 << 16


def _fused(w: LayerWeights, steps: Steps, operand: torch.dtype, wanted: DirectionGrads) -> bool:
    """Whether the core makes the gradients of products beside the recurrence."""
    return bool(
        wanted.w_ih
        and wanted.w_hh
        and not w.normed
        and steps.rows >= FUSED_ROWS
        and (steps.has_padding or w.w_ih.numel() * operand.itemsize <= _FUSED_WEIGHT_BYTES)
    )


def _even_rows(x: Tensor) -> Tensor:
    """x (m, k), contiguous, with a column of zeros more if k is odd: the core multiplies pairs."""
    return torch.nn.functional.pad(x, (0, 1)) if x.size(1) % 2 else x.contiguous()


def _allocate(like: Tensor, *size: int, zero: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of padding are not touched by the core: then the tensor starts as zeros."""
    return (like.new_zeros if zero else like.new_empty)(size, dtype=dtype)


def layer_forward(
    x: Tensor, directions: list[Direction], steps: Steps, *, save: bool, cells: bool
) -> LayerResult:
    """See :func:`ops.layer_forward`."""
    P = directions[0].h0.size(1)
    y = _allocate(x, steps.rows, len(directions) * P, zero=steps.has_padding)
    result = LayerResult(y, [], [], [], [], [])

    @functools.cache  # for both directions
    def operand(bf16_products: bool) -> Tensor:
        if bf16_products:
            return _even_rows(x)
        return x.to(acc_dtype(x.dtype)).contiguous()

    running = []
    for k, direction in enumerate(directions):
        part = y if len(directions) == 1 else y[:, k * P : (k + 1) * P]
        running.append(_forward(x, operand, direction, steps, save, cells, part, result))
    _run(recorded(_C.cpu_forward), running, _gates_bytes(x, directions, steps))
    return result


# Of one direction's gates, of all steps: about so much more memory do two directions at once need.
# Of more rows each has work enough for all threads.
_AT_ONCE_BYTES = 32 << 20


def _gates_bytes(x: Tensor, directions: list[Direction], steps: Steps) -> int:
    return steps.rows * 4 * directions[0].c0.size(1) * acc_dtype(x.dtype).itemsize


def _run(
    core: Callable[..., None], running: list[Generator[Any, None, None]], gates_bytes: int
) -> list[Any]:
    """Runs the core's calls that the directions yield: at once where that takes less time.

    Returns what each yields afterwards, or None.
    """
    first = next(running[0])
    second = None
    if len(running) == 2 and gates_bytes <= _AT_ONCE_BYTES and first.side_by_side():
        second = next(running[1])
    core(first, second, cpu_products.workspace)
    made = [_end(running[0])]
    for one in running[1:]:
        if second is None:
            core(next(one), None, cpu_products.workspace)
        made.append(_end(one))
    return made


def _end(running: Generator[Any, None, None]) -> Any:
    """What it yields last; its tensors are let go."""
    made = next(running, None)
    running.close()
    return made


def _forward(
    x: Tensor,
    operand: Callable[[bool], Tensor],
    direction: Direction,
    steps: Steps,
    save: bool,
    cells: bool,
    y: Tensor,
    result: LayerResult,
) -> Generator[Any, None, None]:
    """One direction, which fills its columns y of the output: appends to the result's lists, and
    yields the core's call, whose tensors it keeps until it ends."""
    h0, c0, w, reverse = direction
    H, P, I, acc = c0.size(1), h0.size(1), x.size(1), acc_dtype(x.dtype)
    padding = steps.has_padding
    w_ih: Tensor | None = None  # with core_input, if the core makes the input product itself
    core_input: Tensor | None = None
    gx: Tensor | None = None
    normed = w.normed
    variants, _kept = native_variants(_C, w, x.dtype)
    more: tuple[Tensor, ...] = ()
    bf16_products = _bf16_products(x.dtype, w)
    # Then a step's sums do not depend on how many steps there are.
    deterministic = torch.are_deterministic_algorithms_enabled()
    if normed:
        biases = [b.to(acc) for b in (w.b_ih, w.b_hh) if b is not None]
        bias = sum(biases[1:], *biases[:1]) if biases else None
        with without_autocast(x.device):
            gx = linear(x.to(acc), w.w_ih.to(acc))
            gx, more = norm_input(gx, w, bias, steps)
        gates = gx if save else None  # the core reads a row's gx before it writes its gates
    else:
        core_input = operand(bf16_products)
        w_ih = w.w_ih
        gates = x.new_empty((steps.rows, 4 * H), dtype=acc) if save else None
    h0, c0 = h0.contiguous(), c0.contiguous()
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    c_seq = (
        _allocate(x, steps.rows, H, zero=padding and cells, dtype=acc) if save or cells else None
    )
    norm = norm_r = None
    if save and normed:
        norm = _allocate(x, steps.rows, 4 * H, zero=False, dtype=acc)
        norm_r = x.new_empty(steps.rows, dtype=acc)
        more = (*more, norm, norm_r)
    native = native_steps(_C, steps, reverse)
    threads = torch.get_num_threads()
    code = DTYPE_CODE[x.dtype]
    w_ih = None if w_ih is None else w_ih.contiguous()
    w_hh = w.w_hh.contiguous()
    b_ih = None if w.b_ih is None else w.b_ih.contiguous()
    b_hh = None if w.b_hh is None else w.b_hh.contiguous()
    w_hr = None if w.w_hr is None else w.w_hr.contiguous()
    # fmt: off
    call = _C.CpuForward(
        code, bf16_products, threads, deterministic, native, H, P, I,
        gx, core_input, w_ih, b_ih, b_hh, w_hh, w_hr, h0, c0, variants,
        gates, c_seq, norm, norm_r,
        y, y.stride(0), h_n, c_n,
    )
    # fmt: on
    result.h_n.append(h_n)
    result.c_n.append(c_n)
    result.gates.append(gates)
    result.c_seq.append(c_seq)
    if save:
        result.more.append(more)
    yield call


def layer_backward(
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
) -> tuple[Tensor | None, list[DirectionGrads]]:
    """See :func:`ops.layer_backward`."""
    P, H = directions[0].h0.size(1), directions[0].c0.size(1)
    running = [
        _backward(
            rows_of(dy, k * P, P),
            rows_of(dcells, k * H, H),
            dh_n[k],
            dc_n[k],
            x,
            direction,
            rows_of(y, k * P, P),
            saved[k],
            steps,
            wanted_x,
            wanted[k],
        )
        for k, direction in enumerate(directions)
    ]
    made = _run(recorded(_C.cpu_backward), running, _gates_bytes(x, directions, steps))
    parts, grads = zip(*made, strict=True)
    dx = parts[0]
    for part in parts[1:]:
        dx = None if dx is None else dx + part
    return (None if dx is None else dx.to(x.dtype)), list(grads)


def _dense(gradient: Tensor | None) -> Tensor | None:
    return gradient if gradient is None else gradient.resolve_neg().contiguous()


def _backward(
    dy: Tensor | None,
    dcells: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    direction: Direction,
    y: Tensor,
    saved: tuple[Tensor, ...],
    steps: Steps,
    wanted_x: bool,
    wanted: DirectionGrads,
) -> Generator[Any, None, None]:
    """One direction: yields the core's call, and when that has run the gradient of x in the acc
    dtype and the direction's own."""
    h0, c0, w, reverse = direction
    H, P, dtype = c0.size(1), h0.size(1), x.dtype
    normed = w.normed
    variants, _kept = native_variants(_C, w, dtype)
    # Then dh0 needs one product, without packing. Of a projection's few weights that takes longer.
    one_step = steps.T == 1 and not normed and (w.w_hr is None or w.w_hh.numel() >= _MANY_WEIGHTS)
    # Then W_hh was multiplied with h0 itself, and dh0 is that product.
    plain_step = one_step and not w.varied and steps.lengths is None and steps.reset_mask is None
    padding = steps.has_padding
    dh_n, dc_n, dcells = _dense(dh_n), _dense(dc_n), _dense(dcells)
    gates, c_seq, *more = [t.contiguous() for t in saved]
    h0, c0 = h0.contiguous(), c0.contiguous()
    norm, norm_r = more[3:] if normed else (None, None)
    w_hh = None if one_step else w.w_hh.contiguous()
    w_hr = None if w.w_hr is None else w.w_hr.contiguous()
    bf16_products = _bf16_products(dtype, w)
    operand = dtype if bf16_products else gates.dtype  # of the gradients that go into products
    fused = not one_step and _fused(w, steps, operand, wanted)
    dgates = h_prev = dx = dw_ih = dw_hh = db = None
    x_read = w_ih = None
    if fused:
        x_read, w_ih = x.contiguous(), w.w_ih.contiguous()
        dx = _allocate(gates, *x.shape, zero=padding) if wanted_x else None
        dw_ih = _allocate(gates, *w.w_ih.shape, zero=padding)
        dw_hh = _allocate(gates, *w.w_hh.shape, zero=padding)
        wanted_b = wanted.b_ih or wanted.b_hh
        db = _allocate(gates, 4 * H, zero=padding) if wanted_b else None
    else:
        dgates = _allocate(gates, steps.rows, 4 * H, zero=padding, dtype=operand)
        h_prev = y.new_empty(steps.rows, P) if wanted.w_hh and not plain_step else None
    dproduct = gates.new_empty(steps.rows, 4 * H) if normed else None
    dr = None
    if w_hr is not None:
        dr = gates.new_empty(steps.rows, P + P % 2 if bf16_products else P, dtype=operand)
    cell_out = None
    if wanted.w_hr and w_hr is not None:
        cell_out = gates.new_empty(steps.rows, H, dtype=operand)
    dpeephole = gates.new_zeros(steps.B, 3 * H) if wanted.w_ch else None
    wanted_norm = wanted.gamma_hh or wanted.gamma_ch or wanted.beta_ch
    dnorm = gates.new_zeros(steps.B, 6 * H) if wanted_norm else None
    dh0, dc0 = h0.new_empty(steps.B, P), c0.new_empty(steps.B, H)
    native = native_steps(_C, steps, reverse)
    threads = torch.get_num_threads()
    code = DTYPE_CODE[dtype]
    # fmt: off
    call = _C.CpuBackward(
        code, bf16_products, threads, native, H, P, variants,
        w_hh, w_hr, h0, c0, y, y.stride(0), gates, c_seq, norm, norm_r,
        dy, 0 if dy is None else dy.stride(0), dh_n, dc_n, dcells,
        dgates, dproduct, h_prev, dr, cell_out, dpeephole, dnorm, dh0, dc0,
        x_read, w_ih, x.size(1), dx, dw_ih, dw_hh, db,
    )
    # fmt: on
    yield call
    with without_autocast(x.device):
        if one_step and wanted.h0:
            product = matmul(dgates, w.w_hh)
            if plain_step:
                dh0 = product.to(dtype)
            else:
                if w.masks is not None and w.masks.h_dropout is not None:
                    product *= w.masks.h_dropout
                if steps.reset_mask is not None:
                    product.masked_fill_(steps.reset_mask.T, 0)
                dh0 += product.to(dtype)
        dinput, dgamma_ih = dgates, None  # gradients of x W_ih^T and of its norm
        if normed and (wanted_x or wanted.w_ih or wanted.gamma_ih):
            dinput, dgamma_ih = norm_input_backward(dgates, w, tuple(more[:3]))
        if wanted_x and not fused:
            dx = matmul(dinput, w.w_ih)
        # What lies in the padding of x, and of what the core left untouched there, may be
        # anything, NaN too: its zero gradient must not meet it.
        real = steps.active_rows if padding and not (fused and cell_out is None) else None

        def rows(tensor: Tensor) -> Tensor:
            return tensor if real is None else tensor.index_select(0, real)

        def summed(tensor: Tensor, start: int, size: int) -> Tensor:
            return tensor[:, start : start + size].sum(0).to(dtype)

        wanted_b = wanted.b_ih or wanted.b_hh
        if not fused and (wanted.w_ih or wanted.w_hh or wanted_b):
            dgates = rows(dgates)
        x_rows = rows(x) if wanted.w_ih and not fused else None
        h_rows = None
        if wanted.w_hh and not fused:
            h_rows = h0 if plain_step else rows(h_prev)
        dw_hr = None
        if fused:
            pass  # the core has made them
        elif not normed:
            if wanted_b or wanted.w_ih or wanted.w_hh:
                dw_ih, dw_hh, db = transposed_matmul(dgates, x_rows, h_rows, wanted_b)
        else:
            if wanted.w_ih:
                dw_ih = transposed_matmul(rows(dinput), x_rows, None, False)[0]
            if h_rows is not None:
                dw_hh = transposed_matmul(rows(dproduct), h_rows, None, False)[0]
            db = dgates.sum(0) if wanted_b else None
        if cell_out is not None:
            dw_hr = transposed_matmul(rows(dr[:, :P]), rows(cell_out), None, False)[0]
        if dtype != gates.dtype:
            dw_ih, dw_hh, dw_hr, db = [
                g if g is None else g.to(dtype) for g in (dw_ih, dw_hh, dw_hr, db)
            ]
    grads = DirectionGrads(
        h0=dh0 if wanted.h0 else None,
        c0=dc0 if wanted.c0 else None,
        w_ih=dw_ih,
        w_hh=dw_hh,
        b_ih=db if wanted.b_ih else None,
        # Two tensors, as for two parameters: a caller may change one in place.
        b_hh=db.clone() if wanted.b_hh and db is not None else None,
        w_hr=dw_hr,
        w_ch=summed(dpeephole, 0, 3 * H) if wanted.w_ch else None,
        gamma_ih=dgamma_ih.to(dtype) if wanted.gamma_ih else None,
        gamma_hh=summed(dnorm, 0, 4 * H) if wanted.gamma_hh else None,
        gamma_ch=summed(dnorm, 4 * H, H) if wanted.gamma_ch else None,
        beta_ch=summed(dnorm, 5 * H, H) if wanted.beta_ch else None,
    )
    yield dx, grads
