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
import sys
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from lstm_ext.cpu.backward import backward
from lstm_ext.cpu.calls import (
    bf16_products,
    biases_alone,
    gates_bytes,
    run_directions,
)
from lstm_ext.cpu.products import linear
from lstm_ext.cpu.second import layer_second as layer_second  # a part of the engine
from lstm_ext.engine import (
    DTYPE_CODE,
    Direction,
    DirectionGrads,
    LayerResult,
    acc_dtype,
    allocate,
    native_steps,
    native_variants,
    norm_input,
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


isa_error = ""
if _isa := os.environ.get("LSTM_EXT_CPU_ISA"):
    try:
        select_cpu_isa(_isa)
    except ValueError as error:
        isa_error = f"LSTM_EXT_CPU_ISA: {error}"
        # python -m lstm_ext imports the package before its report, which is to tell this.
        if not (sys.argv[:1] == ["-m"] and "lstm_ext" in sys.orig_argv):
            raise ValueError(isa_error) from None


def _even_rows(x: Tensor) -> Tensor:
    """x (m, k), contiguous, with a column of zeros more if k is odd: the core multiplies pairs."""
    return torch.nn.functional.pad(x, (0, 1)) if x.size(1) % 2 else x.contiguous()


def layer_forward(
    x: Tensor, directions: list[Direction], steps: Steps, *, save: bool, cells: bool
) -> LayerResult:
    """See :func:`ops.layer_forward`."""
    P = directions[0].h0.size(1)
    y = allocate(x, steps.rows, len(directions) * P, zero=steps.has_padding)
    result = LayerResult(y, [], [], [], [], [])

    @functools.cache  # for both directions
    def operand(bf16: bool) -> Tensor:
        if bf16:
            return _even_rows(x)
        return x.to(acc_dtype(x.dtype)).contiguous()

    running = []
    for k, direction in enumerate(directions):
        part = y if len(directions) == 1 else y[:, k * P : (k + 1) * P]
        running.append(_forward(x, operand, direction, steps, save, cells, part, result))
    run_directions(recorded(_C.cpu_forward), running, gates_bytes(x, directions, steps))
    return result


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
    bf16 = bf16_products(x.dtype, w)
    # Then a step's sums do not depend on how many steps there are.
    deterministic = torch.are_deterministic_algorithms_enabled()
    if normed:
        biases = [b.to(acc) for b in (w.b_ih, w.b_hh) if b is not None]
        bias = sum(biases[1:], *biases[:1]) if biases else None
        with without_autocast(x.device):
            gx = linear(x.to(acc), w.w_ih.to(acc))
            gx, more = norm_input(gx, w, bias, steps)
        gates = gx if save else None  # the core reads a row's gx before it writes its gates
    elif I == 0:  # nothing to multiply, and an address that is null
        gx = biases_alone(steps.rows, 4 * H, (w.b_ih, w.b_hh), c0.new_empty(0, dtype=acc))
        gates = gx if save else None
    else:
        core_input = operand(bf16)
        w_ih = w.w_ih
        gates = x.new_empty((steps.rows, 4 * H), dtype=acc) if save else None
    h0, c0 = h0.contiguous(), c0.contiguous()
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    c_seq = allocate(x, steps.rows, H, zero=padding and cells, dtype=acc) if save or cells else None
    norm = norm_r = None
    if save and normed:
        norm = allocate(x, steps.rows, 4 * H, zero=False, dtype=acc)
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
        code, bf16, threads, deterministic, native, H, P, I,
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
        backward(
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
    made = run_directions(recorded(_C.cpu_backward), running, gates_bytes(x, directions, steps))
    parts, grads = zip(*made, strict=True)
    dx = parts[0]
    for part in parts[1:]:
        dx = None if dx is None else dx + part
    return (None if dx is None else dx.to(x.dtype)), list(grads)
