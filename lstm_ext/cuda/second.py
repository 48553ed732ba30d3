"""Forward mode and second derivatives of a layer on the CUDA engine.

By the two recurrences of :mod:`cpu.second`, one like forward's and one like backward's, each with a
product or more a step by cuBLASLt and a kernel for the rest. Backward itself, which keeps nothing,
is made again beside its tangent, by the same products and kernels. Letters as in :mod:`ops`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lstm_ext.cuda.gradients import gradients
from lstm_ext.engine import (
    DTYPE_CODE,
    Direction,
    DirectionGrads,
    address,
    allocate,
    in_memory,
    native_steps,
    of_direction,
    rows_of,
    sum_of,
    without_autocast,
)
from lstm_ext.profiling import recorded
from lstm_ext.steps import Steps


def layer_second(
    engine: Any,
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
    cells: bool,
    d_dot: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], Tensor | None, list[DirectionGrads]]:
    """See :func:`ops.layer_second`; x float32 or float64."""
    P, H, D = directions[0].h0.size(1), directions[0].c0.size(1), len(directions)
    tf32 = engine.uses_tf32(x)
    with engine.guard(x.device), without_autocast(x.device):
        y_dot = _rows(x, D * P, steps)
        parts = [
            _Second(
                *(engine, v_x, own, of_direction(d, k, H, P), of_direction(d_dot, k, H, P)),
                *(x, directions[k], rows_of(y, k * P, P), saved[k][:2], steps, tf32),
                y_dot[:, k * P : (k + 1) * P],
            )
            for k, own in enumerate(v)
        ]
        for part in parts:
            part.forward()
        cells_dot = torch.cat([part.c_seq for part in parts], 1) if cells else None
        outputs = [y_dot, cells_dot, *(part.h_n for part in parts), *(part.c_n for part in parts)]
        if not (wanted_x or any(flag for one in wanted for flag in one)):
            return outputs, None, [DirectionGrads(*[None] * len(one)) for one in wanted]
        made = [part.backward(wanted_x, want) for part, want in zip(parts, wanted, strict=True)]
    return outputs, functools.reduce(sum_of, [dx for dx, _ in made]), [own for _, own in made]


def _rows(like: Tensor, columns: int, steps: Steps) -> Tensor:
    return allocate(like, steps.rows, columns, zero=steps.has_padding)


def _filled(tensor: Tensor | None, like: Tensor) -> Tensor:
    """A copy, which the core changes; zeros for None."""
    return torch.zeros_like(like) if tensor is None else torch.empty_like(like).copy_(tensor)


@dataclasses.dataclass
class _Second:
    """One direction: :meth:`forward`, then :meth:`backward`."""

    engine: Any
    v_x: Tensor | None
    v: DirectionGrads
    d: tuple[Tensor | None, ...]
    d_dot: tuple[Tensor | None, ...]
    x: Tensor
    direction: Direction
    y: Tensor
    saved: tuple[Tensor, ...]
    steps: Steps
    tf32: bool
    y_dot: Tensor

    def __post_init__(self) -> None:
        h0, c0, w, reverse = self.direction
        h0, c0 = h0.contiguous(), c0.contiguous()
        self.direction = self.direction._replace(h0=h0, c0=c0)
        self.saved = tuple(t.contiguous() for t in self.saved)
        self.v = self.v._replace(
            **{name: None if t is None else t.contiguous() for name, t in self.v._asdict().items()}
        )
        core, x = self.engine.core, self.x
        self.native = core.CudaSecond(
            dtype=DTYPE_CODE[x.dtype],
            tf32=self.tf32,
            device=x.device.index or 0,
            stream=self.engine.stream(x.device),
            steps=native_steps(core, self.steps, reverse),
            H=c0.size(1),
            P=h0.size(1),
            gates=address(self.saved[0]),
            c_seq=address(self.saved[1]),
            c0=address(c0),
        )
        self.projects = w.w_hr is not None

    def forward(self) -> None:
        """The tangents of forward: gates before the activations, c_seq, cell_out, h_n, c_n and, in
        y_dot, y."""
        engine, core, x, v, steps = self.engine, self.engine.core, self.x, self.v, self.steps
        (h0, c0, w, _), (point, c_seq) = self.direction, self.saved
        (B, P), H = h0.shape, c0.size(1)

        # What does not wait for the recurrence.
        self.gates = x.new_empty(steps.rows, 4 * H)
        made = False
        for a, b in ((self.v_x, w.w_ih), (x, v.w_ih)):
            if a is not None and b is not None:
                engine.products.into(self.gates, a, b.t(), self.tf32, add=made)
                made = True
        if not made:
            self.gates.zero_()
        for bias in (v.b_ih, v.b_hh):
            if bias is not None:
                self.gates += bias
        after = first = more = None
        if v.w_hh is not None:
            after, first = self._product(self.y, v.w_hh.t()), self._product(h0, v.w_hh.t())
        if v.w_hr is not None:
            more = self._product(point[:, 3 * H :] * c_seq.tanh(), v.w_hr.t())

        self.c_seq, self.cell_out = _rows(x, H, steps), None
        self.h_n, self.c_n = _filled(v.h0, h0), _filled(v.c0, c0)
        state = x.new_zeros(B, core.cuda_padded(P, DTYPE_CODE[x.dtype]))
        if v.h0 is not None:
            state[:, :P] = v.h0
        w_hh, w_hr = engine.arranged(w.w_hh), None
        if self.projects:
            w_hr, self.cell_out = engine.arranged(w.w_hr), _rows(x, H, steps)
        scratch = self._scratch(core.cuda_tangents_workspace)
        recorded(core.cuda_tangents)(
            self.native,
            address(scratch),
            gates=address(self.gates),
            gates_after=address(after),
            gates_first=address(first),
            h_more=address(more),
            w_hh=address(w_hh),
            w_hr=address(w_hr),
            c0=address(v.c0),
            state=address(state),
            c_seq=address(self.c_seq),
            cell_out=address(self.cell_out),
            y=address(self.y_dot),
            y_stride=self.y_dot.stride(0),
            h_n=address(self.h_n),
            c_n=address(self.c_n),
        )

    def backward(
        self, wanted_x: bool, wanted: DirectionGrads
    ) -> tuple[Tensor | None, DirectionGrads]:
        """The tangents of backward's results."""
        engine, core, v, (h0, c0, w, _) = self.engine, self.engine.core, self.v, self.direction
        here = _Side(self, self.d, h0, self.y, wanted)
        tangent = _Side(self, self.d_dot, v.h0, self.y_dot, wanted)
        dh0 = _filled(self.d_dot[2], h0) if wanted.h0 else None
        dc0 = _filled(self.d_dot[3], c0) if wanted.c0 else None
        weights = [
            None if t is None else engine.arranged(t, transposed=True)
            for t in (w.w_hh, w.w_hr, v.w_hh, v.w_hr)
        ]
        w_hh, w_hr, v_hh, v_hr = map(address, weights)
        scratch = self._scratch(core.cuda_second_workspace)
        recorded(core.cuda_second)(
            self.native,
            address(scratch),
            here.native,
            tangent.native,
            gates_dot=address(self.gates),
            c_seq_dot=address(self.c_seq),
            c0_dot=address(v.c0),
            w_hh=w_hh,
            w_hr=w_hr,
            v_hh=v_hh,
            v_hr=v_hr,
            dh0=address(dh0),
            dc0=address(dc0),
        )

        # The products after the recurrence: backward's gradients times tangents, and the gradients'
        # tangents times what backward multiplies.
        def products(x: Tensor, w_ih: Tensor, *rest: Any) -> tuple[Tensor | None, DirectionGrads]:
            dx, own = gradients(
                engine, x, [self.direction._replace(w=w._replace(w_ih=w_ih))], self.steps, *rest
            )
            return dx, own[0]

        saved, none = (*self.saved, ()), (None, None)
        outputs = here.dgates, tangent.h_prev, here.dr, *none, *saved, None, self.cell_out, *none
        want = DirectionGrads(*[False] * len(wanted))._replace(
            w_ih=wanted.w_ih and self.v_x is not None, w_hh=wanted.w_hh, w_hr=wanted.w_hr
        )
        first = products(
            self.x if self.v_x is None else self.v_x,
            w.w_ih if v.w_ih is None else v.w_ih,
            *([outputs], wanted_x and v.w_ih is not None, [want], self.tf32),
        )
        outputs = tangent.dgates, here.h_prev, tangent.dr, dh0, dc0, *saved, *none, *none
        second = products(self.x, w.w_ih, [outputs], wanted_x, [wanted], self.tf32)
        return sum_of(first[0], second[0]), DirectionGrads(*map(sum_of, first[1], second[1]))

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return self.engine.product(a, b, a.dtype, self.tf32)

    def _scratch(self, size_of: Any) -> Tensor:
        return self.x.new_empty(size_of(self.native, self.projects), dtype=torch.uint8)


class _Side:
    """What backward, or its tangent, reads and writes, of one direction."""

    def __init__(
        self,
        second: _Second,
        d: tuple[Tensor | None, ...],
        h0: Tensor | None,
        y: Tensor,
        wanted: DirectionGrads,
    ) -> None:
        x, steps, P = second.x, second.steps, y.size(1)
        dy, *rest = d
        kept = [None if t is None else in_memory(t).contiguous() for t in rest]
        dcells, dh_n, dc_n = kept
        self.dgates = _rows(x, 4 * second.direction.c0.size(1), steps)
        self.h_prev = _rows(x, P, steps) if wanted.w_hh else None
        self.dr = _rows(x, P, steps) if second.projects else None
        self._kept = dy, kept  # until all is launched
        self.native = second.engine.core.CudaSecondSide(
            dy=address(dy),
            dy_stride=0 if dy is None else dy.stride(0),
            dcells=address(dcells),
            dh_n=address(dh_n),
            dc_n=address(dc_n),
            h0=address(h0),
            y=address(y),
            y_stride=y.stride(0),
            dgates=address(self.dgates),
            h_prev=address(self.h_prev),
            dr=address(self.dr),
        )
