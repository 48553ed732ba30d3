"""A stack of layers on the CUDA engine as a wavefront: several layers at once, a part of the steps
each.

Part k of layer l needs part k - 1 of itself and part k of the layer below (backward: above). Each
layer has a stream, its lane: part by part the input product and the launch of the recurrence, which
goes on from what the launch before left on the device (`StepRange` of csrc/cuda/engine.h), so that
nothing is rounded between two parts and the bits of the recurrence are those of one launch. What a
part needs of another lane is an event. On memory see :mod:`lanes`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_ext.cuda.engine import CudaEngine, verbose
from lstm_ext.cuda.gradients import gradients
from lstm_ext.engine import (
    DTYPE_CODE,
    Direction,
    DirectionGrads,
    acc_dtype,
    address,
    in_memory,
    native_steps,
    native_variants,
    rows_of,
    without_autocast,
)
from lstm_ext.profiling import recorded
from lstm_ext.steps import Steps


class Saved(NamedTuple):
    """Of each layer, what backward needs."""

    x: Sequence[Tensor]  # (rows, in): its input, after dropout
    y: Sequence[Tensor]  # (rows, H)
    gates: Sequence[Tensor]  # (rows, 4H) acc
    c_seq: Sequence[Tensor | None]  # (rows, H) acc; None: not asked for


class StackResult(NamedTuple):
    """What a stack returns: of each layer h_n and c_n (layers, B, H), and the rest."""

    h_n: Tensor
    c_n: Tensor
    of_layers: Saved


@functools.lru_cache(maxsize=4096)
def plan_of(
    engine: CudaEngine,
    device: torch.device,
    dtype: torch.dtype,
    tf32: bool,
    backward: bool,
    B: int,
    H: int,
    layers: int,
    T: int,
) -> Any:
    """In how many parts, with which plan: CudaWavefront of csrc/cuda/plan.h."""
    problem = engine.core.CudaProblem(
        dtype=DTYPE_CODE[dtype],
        tf32=tf32,
        backward=backward,
        projection=False,
        variants=False,
        normed=False,
        directions=1,
        T=T,
        B=B,
        H=H,
        P=H,
    )
    wave = engine.choose_wavefront(problem, device, layers, T)
    if verbose():
        text = f"{layers} layers, {T} steps in {wave.parts} parts: "
        text += engine.core.cuda_describe_plan(wave.plan, problem)
        print(f"lstm_ext on {device}: {text}", file=sys.stderr)
    return wave


def order(layers: int, parts: int) -> Iterator[tuple[int, int]]:
    """(layer, part), diagonal by diagonal: as the calling thread hands them out."""
    for diagonal in range(layers + parts - 1):
        for layer in range(max(0, diagonal - parts + 1), min(layers, diagonal + 1)):
            yield layer, diagonal - layer


def cuts(T: int, parts: int) -> list[int]:
    """Where the parts begin, and T: about equal parts."""
    return [T * k // parts for k in range(parts + 1)]


def row_cuts(steps: Steps, at: Sequence[int]) -> list[int]:
    """The first row of these steps, time-major or packed."""
    return [t * steps.B for t in at] if steps.offsets is None else [steps._starts[t] for t in at]


def forward(
    engine: CudaEngine,
    x: Tensor,
    layers: Sequence[Direction],
    kept: Sequence[Tensor | None],
    scale: float,
    steps: Steps,
    *,
    save: bool,
    cells: bool,
) -> StackResult:
    """All layers on the rows of x.

    Args:
        x: (rows, in), time-major or packed. layers: as ``wavefront.applies`` wants them.
        kept: after each layer but the last, which elements dropout keeps, bool (rows, H), and
            multiplies by ``scale``; or None.
        save: also return what backward needs. cells: c_seq of the last layer.
    """
    core, dtype, acc = engine.core, x.dtype, acc_dtype(x.dtype)
    L, H, B, rows = len(layers), layers[0].c0.size(1), steps.B, steps.rows
    tf32 = engine.uses_tf32(x)
    with engine.guard(x.device), without_autocast(x.device):
        wave = plan_of(engine, x.device, dtype, tf32, False, B, H, L, steps.T)
        at = cuts(steps.T, wave.parts)
        row = row_cuts(steps, at)
        ys = [x.new_empty(rows, H) for _ in layers]
        xs = [x]
        for y, mask in zip(ys, kept, strict=False):
            xs.append(y if mask is None else torch.empty_like(y))
        gates = [x.new_empty(rows, 4 * H, dtype=acc) for _ in layers]
        c_seqs = [
            x.new_empty(rows, H, dtype=acc) if save or (cells and layer == L - 1) else None
            for layer in range(L)
        ]
        h_n, c_n = x.new_empty(L, B, H), x.new_empty(L, B, H)
        native, size = _native(engine, x, H, steps, wave.plan, tf32, core.cuda_forward_workspace)
        calls, alive = [], []
        for layer, (h0, c0, w, _) in enumerate(layers):
            tensors = (
                engine.arranged(w.w_hh),
                *(None if b is None else b.contiguous() for b in (w.b_ih, w.b_hh)),
                h0.contiguous(),
                c0.contiguous(),
            )
            workspace = x.new_empty(size, dtype=torch.uint8)
            w_hh, b_ih, b_hh, h0, c0 = map(address, tensors)
            alive.append((tensors, workspace))
            direction = core.CudaForwardDirection(
                reverse=False,
                gx=address(gates[layer]),
                b_ih=b_ih,
                b_hh=b_hh,
                w_hh=w_hh,
                w_hr=0,
                h0=h0,
                c0=c0,
                variants=native_variants(core, w, dtype)[0],
                gates=address(gates[layer]) if save else 0,
                c_seq=address(c_seqs[layer]),
                norm=0,
                norm_r=0,
                y=address(ys[layer]),
                y_stride=H,
                h_n=address(h_n[layer]),
                c_n=address(c_n[layer]),
            )
            calls.append((native, [direction], address(workspace)))
        with engine.lanes(x.device, L if wave.parts > 1 else 0) as lanes:
            for layer, part in order(L, wave.parts):
                of_part = slice(row[part], row[part + 1])
                with lanes.cell(layer, part, layer > 0):
                    if layer and kept[layer - 1] is not None:
                        torch.mul(
                            ys[layer - 1][of_part], kept[layer - 1][of_part], out=xs[layer][of_part]
                        )
                        xs[layer][of_part].mul_(scale)
                    w_ih, part_of_x = layers[layer].w.w_ih, xs[layer][of_part]
                    engine.products.into(gates[layer][of_part], part_of_x, w_ih.t(), tf32)
                    stream = engine.stream(x.device)
                    steps_of_part = (at[part], at[part + 1])
                    recorded(core.cuda_forward)(*calls[layer], stream, steps_of_part)
        del alive  # the caller's stream has joined the lanes
    return StackResult(h_n, c_n, Saved(xs, ys, gates, c_seqs))


def backward(
    engine: CudaEngine,
    dy: Tensor | None,
    dcells: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    layers: Sequence[Direction],
    kept: Sequence[Tensor | None],
    scale: float,
    saved: Saved,
    steps: Steps,
    *,
    wanted_x: bool,
    wanted: Sequence[DirectionGrads],
) -> tuple[Tensor | None, list[DirectionGrads | None]]:
    """Gradients of the inputs of :func:`forward`; None for a layer below which none is wanted.

    Args:
        dy: (rows, H), dcells: (rows, H) of the last layer; dh_n, dc_n: (layers, B, H); None: zero.
    """
    core, x, T, B = engine.core, saved.x[0], steps.T, steps.B
    dtype = x.dtype
    L, H, rows = len(layers), layers[0].c0.size(1), steps.rows
    tf32 = engine.uses_tf32(x)
    lowest = 0 if wanted_x else next((k for k, w in enumerate(wanted) if any(w)), L)
    grads: list[DirectionGrads | None] = [None] * L
    if lowest == L:
        return None, grads
    count = L - lowest
    with engine.guard(x.device), without_autocast(x.device):
        wave = plan_of(engine, x.device, dtype, tf32, True, B, H, count, T)
        at = cuts(T, wave.parts)
        row = row_cuts(steps, at)
        native, size = _native(engine, x, H, steps, wave.plan, tf32, core.cuda_backward_workspace)
        # Of each layer's output; dys[0] is x's.
        dys: list[Tensor | None] = [None] * L + [rows_of(dy, 0, H)]
        for layer in range(lowest, L):
            if layer > lowest or (layer == 0 and wanted_x):
                dys[layer] = torch.empty_like(saved.x[layer])
        calls, alive, outputs = {}, [], {}
        for layer in range(lowest, L):
            (h0, c0, w, _), want = layers[layer], wanted[layer]
            part_dy = dys[layer + 1]
            tensors = [
                None if t is None else in_memory(t).contiguous()
                for t in (
                    h0,
                    c0,
                    None if dh_n is None else dh_n[layer],
                    None if dc_n is None else dc_n[layer],
                    dcells if layer == L - 1 else None,
                )
            ]
            w_hh = engine.arranged(w.w_hh, transposed=True)
            workspace = x.new_empty(size, dtype=torch.uint8)
            gates, c_seq = saved.gates[layer], saved.c_seq[layer]
            dgates = x.new_empty(rows, 4 * H)
            h_prev = x.new_empty(rows, H) if want.w_hh else None
            dh0 = h0.new_empty(B, H) if want.h0 else None
            dc0 = c0.new_empty(B, H) if want.c0 else None
            h0, c0, part_dh_n, part_dc_n, part_dcells = map(address, tensors)
            alive.append((tensors, w_hh, workspace))
            outputs[layer] = (dgates, h_prev, None, dh0, dc0, gates, c_seq, (), *[None] * 4)
            direction = core.CudaBackwardDirection(
                reverse=False,
                w_hh=address(w_hh),
                w_hr=0,
                h0=h0,
                c0=c0,
                y=address(saved.y[layer]),
                y_stride=H,
                gates=address(gates),
                c_seq=address(c_seq),
                variants=native_variants(core, w, dtype)[0],
                norm=0,
                norm_r=0,
                dy=address(part_dy),
                dy_stride=0 if part_dy is None else part_dy.stride(0),
                dh_n=part_dh_n,
                dc_n=part_dc_n,
                dcells=part_dcells,
                dgates=address(dgates),
                dproduct=0,
                cell_out=0,
                dpeephole=0,
                dnorm=0,
                h_prev=address(h_prev),
                dr=0,
                dh0=address(dh0),
                dc0=address(dc0),
            )
            calls[layer] = (native, [direction], address(workspace))
        if steps.has_padding:
            _ = steps.padding_rows  # made once, and read on every lane
        with engine.lanes(x.device, count if wave.parts > 1 else 0) as lanes:
            for lane, taken in order(count, wave.parts):
                layer, part = L - 1 - lane, wave.parts - 1 - taken  # from the last step
                of_part = slice(row[part], row[part + 1])
                with lanes.cell(lane, taken, lane > 0):
                    stream = engine.stream(x.device)
                    steps_of_part = (T - at[part + 1], T - at[part])
                    recorded(core.cuda_backward)(*calls[layer], stream, steps_of_part)
                    dx = dys[layer]
                    if dx is None:
                        continue
                    w, mask = layers[layer].w, kept[layer - 1] if layer else None
                    engine.products.into(dx[of_part], outputs[layer][0][of_part], w.w_ih, tf32)
                    if mask is not None:
                        dx[of_part].mul_(mask[of_part]).mul_(scale)
            for lane in range(count):
                # Last, so that the calling thread hands out first what other layers wait for.
                layer = L - 1 - lane
                with lanes.cell(lane, wave.parts, False):
                    _, (grads[layer],) = gradients(
                        engine,
                        saved.x[layer],
                        [layers[layer]],
                        steps,
                        [outputs[layer]],
                        False,
                        [wanted[layer]],
                        tf32,
                    )
                    for tensor in grads[layer]:
                        if tensor is not None:
                            lanes.hand_over(tensor)
        del alive, outputs  # the caller's stream has joined the lanes
    return (dys[0] if wanted_x else None), grads


def _native(
    engine: CudaEngine, x: Tensor, H: int, steps: Steps, plan: Any, tf32: bool, workspace: Any
) -> tuple[Any, int]:
    """The core's description of a layer's call, and the bytes of scratch it needs."""
    layer = engine.core.CudaLayer(
        dtype=DTYPE_CODE[x.dtype],
        tf32=tf32,
        device=x.device.index or 0,
        directions=1,
        steps=native_steps(engine.core, steps, False),
        H=H,
        P=H,
        variants=False,
        normed=False,
        plan=plan,
    )
    return layer, workspace(layer, False)
