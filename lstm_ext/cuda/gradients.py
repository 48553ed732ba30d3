"""The CUDA engine's gradients after the recurrence: products and sums over all steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lstm_ext.engine import (
    DTYPE_CODE,
    Direction,
    DirectionGrads,
    acc_dtype,
    address,
    native_steps,
    norm_input_backward,
)
from lstm_ext.steps import Steps


def gradients(
    engine: Any,
    x: Tensor,
    directions: list[Direction],
    steps: Steps,
    outputs: list[tuple[Any, ...]],
    wanted_x: bool,
    wanted: list[DirectionGrads],
    tf32: bool,
) -> tuple[Tensor | None, list[DirectionGrads]]:
    """Of x and of the directions' inputs, from those of the gates of all steps.

    outputs: of each direction dgates, h_prev, dr, dh0, dc0, gates, c_seq, what a layer norm saved,
        and CudaEngine._variant_outputs.
    """
    dtype, acc = x.dtype, acc_dtype(x.dtype)
    dx: Tensor | None = None
    grads = []
    # The padding of x may hold anything, NaN too: its zero gradient must not meet it.
    inputs: Tensor | None = None
    for direction, want, output in zip(directions, wanted, outputs, strict=True):
        dgates, h_prev, dr, dh0, dc0, gates, c_seq, more, *more_outputs = output
        dproduct, cell_out, dpeephole, dnorm = more_outputs
        w, H = direction.w, direction.c0.size(1)
        dinput, dgamma_ih = dgates, None  # gradients of x W_ih^T and of its norm
        if w.normed and (wanted_x or want.w_ih or want.gamma_ih):
            dinput, dgamma_ih = norm_input_backward(dgates, w, tuple(more[:3]))
            dinput = dinput.to(dtype)
        if wanted_x and dx is None:
            dx = engine.product(dinput, w.w_ih, dtype if len(directions) == 1 else acc, tf32)
        elif wanted_x:
            engine.products.into(dx, dinput, w.w_ih, tf32, add=True)
        if want.w_ih and inputs is None:
            inputs = x if not steps.has_padding else x.masked_fill(steps.padding_rows, 0)
        db_ih, db_hh = _bias_gradients(engine, dgates, dtype, want)
        dw_hr = None
        if want.w_hr and dr is not None:
            if cell_out is None:
                cell_out = x.new_empty(steps.rows, H)
                engine.core.cuda_cell_outputs(
                    DTYPE_CODE[dtype],
                    native_steps(engine.core, steps, False),
                    *map(address, (gates, c_seq)),
                    *(H, address(cell_out), engine.stream(x.device)),
                )
            dw_hr = engine.product(dr.t(), cell_out, dtype, tf32)

        def summed(tensor: Tensor | None, start: int, size: int) -> Tensor:
            return tensor[:, start : start + size].sum(0).to(dtype)

        dproduct = dgates if dproduct is None else dproduct
        grads.append(
            DirectionGrads(
                h0=dh0,
                c0=dc0,
                w_ih=engine.product(dinput.t(), inputs, dtype, tf32) if want.w_ih else None,
                w_hh=(
                    None if h_prev is None else engine.product(dproduct.t(), h_prev, dtype, tf32)
                ),
                b_ih=db_ih,
                b_hh=db_hh,
                w_hr=dw_hr,
                w_ch=summed(dpeephole, 0, 3 * H) if want.w_ch else None,
                gamma_ih=dgamma_ih.to(dtype) if want.gamma_ih else None,
                gamma_hh=summed(dnorm, 0, 4 * H) if want.gamma_hh else None,
                gamma_ch=summed(dnorm, 4 * H, H) if want.gamma_ch else None,
                beta_ch=summed(dnorm, 5 * H, H) if want.beta_ch else None,
            )
        )
    return (None if dx is None else dx.to(dtype)), grads


def _bias_gradients(
    engine: Any, dgates: Tensor, dtype: torch.dtype, want: DirectionGrads
) -> list[Tensor | None]:
    """Of b_ih and b_hh: two tensors, as for two parameters, for a caller may change one in
    place."""
    sums = [dgates.new_empty(dgates.size(1)) if w else None for w in (want.b_ih, want.b_hh)]
    if want.b_ih or want.b_hh:
        engine.core.cuda_sum_rows(
            DTYPE_CODE[dgates.dtype],
            address(dgates),
            *dgates.shape,
            *map(address, sums),
            engine.stream(dgates.device),
        )
    return [None if s is None else s.to(dtype) for s in sums]
