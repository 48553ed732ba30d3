"""Second derivatives of a layer on the native core's CPU kernels.

Of the gradients g = J^T d that backward makes, d being those of the outputs and J the derivative of
forward, v^T g is to be differentiated, for a v of the shapes of g. As v^T g = d^T (J v), its
derivative by d is the tangent J v of forward in the direction v; that by forward's inputs is the
tangent of backward in that direction, with d held fixed (Pearlmutter 1994, "Fast exact
multiplication by the Hessian"). So there are two recurrences more, with W_hh as it is: one like
forward's, one like backward's. Backward itself runs once more, for it keeps nothing.
In forward mode d has a tangent too: backward, linear in d, adds what it makes of that.

Letters as in :mod:`ops`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_ext.cpu.backward import Kept, backward
from lstm_ext.cpu.calls import gates_bytes, run_directions
from lstm_ext.cpu.products import linear, matmul, transposed_matmul, workspace
from lstm_ext.engine import (
    DTYPE_CODE,
    Direction,
    DirectionGrads,
    LayerWeights,
    allocate,
    native_steps,
    native_variants,
    of_direction,
    rows_of,
    sum_of,
    without_autocast,
)
from lstm_ext.native import _C
from lstm_ext.profiling import recorded
from lstm_ext.steps import Steps


class _Tangents(NamedTuple):
    """Of one direction's forward."""

    h0: Tensor  # (B, P)
    c0: Tensor  # (B, H)
    y: Tensor  # (rows, P)
    h_n: Tensor  # (B, P)
    c_n: Tensor  # (B, H)
    gates: Tensor  # (rows, 4H), before the activations
    c_seq: Tensor  # (rows, H)
    cell_out: Tensor | None  # (rows, H) of o * tanh(c); None without a projection


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
    cells: bool,
    d_dot: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], Tensor | None, list[DirectionGrads]]:
    """See :func:`ops.layer_second`; x float32 or float64."""
    P, H, D = directions[0].h0.size(1), directions[0].c0.size(1), len(directions)
    y_dot = allocate(x, steps.rows, D * P, zero=steps.has_padding)
    work = gates_bytes(x, directions, steps)
    parts = [
        _Second(
            *(v_x, own, of_direction(d, k, H, P), of_direction(d_dot, k, H, P)),
            *(x, directions[k], rows_of(y, k * P, P), saved[k], steps, wanted_x, wanted[k]),
        )
        for k, own in enumerate(v)
    ]
    with without_autocast(x.device):
        running = [p.forward(y_dot[:, k * P : (k + 1) * P]) for k, p in enumerate(parts)]
        run_directions(recorded(_C.cpu_forward), running, work)
        dots = [p.dots for p in parts]
        cells_dot = torch.cat([dot.c_seq for dot in dots], 1) if cells else None
        outputs = [y_dot, cells_dot, *(dot.h_n for dot in dots), *(dot.c_n for dot in dots)]
        if not (wanted_x or any(flag for one in wanted for flag in one)):
            return outputs, None, [DirectionGrads(*[None] * len(one)) for one in wanted]
        core = recorded(_C.cpu_backward)
        first = run_directions(core, [p.gradients_again() for p in parts], work)
        second = run_directions(core, [p.backward() for p in parts], work)
        grads = [p.sums(*own) for p, *own in zip(parts, first, second, strict=True)]
    return outputs, functools.reduce(sum_of, [dx for dx, _ in (*first, *second)]), grads


def step_second(
    steps: Steps,
    d: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    v: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """:func:`layer_second` of a single step of a plain direction: the same algebra, without a
    recurrence and without the questions of a layer. A loop over LSTMCell with B 16, H 64 so takes
    0.95 of nn.LSTMCell's time in float32, 0.79 in bfloat16; by layer_second it took 1.37 and 1.08
    (two records, Zen 4).

    Args:
        d: of h_1 and c_1, (B, H); None for zero. inputs: x (B, I), h_0 and c_0 (B, H), the two
            weights and the two biases or None. saved: gates and c_1.
        v: of the inputs; None for zero. needed: of d and of the inputs.

    Returns:
        The derivatives by d and by the inputs, None where they are not needed.
    """
    x, h0, c0, w_ih, w_hh = inputs[:5]
    v_x, v_h0, v_c0, v_ih, v_hh, *v_b = v
    c0, gates, c_1 = (t.contiguous() for t in (c0, *saved))
    B, H = c0.shape
    native, variants = native_steps(_C, steps, False), native_variants(_C, _PLAIN, x.dtype)[0]
    common = DTYPE_CODE[x.dtype], False, torch.get_num_threads()
    # The tangents of the gates before the activations, of h_1 and of c_1.
    a_dot: Tensor | None = None
    for rows, w in ((x, v_ih), (h0, v_hh), (v_x, w_ih), (v_h0, w_hh)):
        if rows is None or w is None:
            continue
        a_dot = torch.mm(rows, w.t()) if a_dot is None else a_dot.addmm_(rows, w.t())
    if a_dot is None:
        a_dot = gates.new_zeros(B, 4 * H)
    for bias in v_b:
        if bias is not None:
            a_dot += bias
    c0_dot = c0.new_zeros(B, H) if v_c0 is None else v_c0.contiguous()
    h_dot, c_dot, c_last = (c0.new_empty(B, H) for _ in range(3))
    # fmt: off
    call = _C.CpuForward(
        *common, False, native, H, H, 0,
        a_dot, None, None, None, None, None, None, c0, c0_dot, variants,
        None, c_dot, None, None, h_dot, H, h_dot, c_last,
    )
    # fmt: on
    call.make_tangents(gates, c_1, c0, None, None, None, None)
    recorded(_C.cpu_forward)(call, None, workspace)
    results = [h_dot if needed[0] else None, c_dot if needed[1] else None, *[None] * len(inputs)]
    if not any(needed[2:]):
        return results

    def backwards(dh: Tensor | None, dc: Tensor | None) -> tuple[Any, Tensor, Tensor]:
        dgates, dc0 = gates.new_empty(B, 4 * H), c0.new_empty(B, H)
        # fmt: off
        call = _C.CpuBackward(
            *common, native, H, H, variants,
            None, None, None, c0, None, H, gates, c_1, None, None,
            None, 0, dh, dc, None,
            dgates, None, None, None, None, None, None, h_dot, dc0,
        )
        # fmt: on
        return call, dgates, dc0

    h_dot = c0.new_empty(B, H)  # what a step makes of dh_0 without W_hh is not used
    dense = [None if t is None else t.contiguous() for t in d]  # kept: calls have addresses only
    first, da, _ = backwards(*dense)
    dout, dc = gates.new_empty(B, H), gates.new_empty(B, H)
    first.keep_gradients(dout, dc)
    recorded(_C.cpu_backward)(first, None, workspace)
    second, da_dot, dc0_dot = backwards(None, None)
    second.make_tangents(a_dot, c_dot, c0_dot, dout, dc, None, None)
    recorded(_C.cpu_backward)(second, None, workspace)
    for k, (w, v_w) in ((0, (w_ih, v_ih)), (1, (w_hh, v_hh))):
        if needed[2 + k]:
            results[2 + k] = matmul(da_dot, w)
            if v_w is not None:
                results[2 + k] += matmul(da, v_w)
    if needed[4]:
        results[4] = dc0_dot
    biases = needed[7] or needed[8]
    if needed[5] or needed[6] or biases:
        flags = needed[5], needed[6]
        sides = [t if flag else None for t, flag in zip((x, h0), flags, strict=True)]
        *of_weights, total = transposed_matmul(da_dot, *sides, biases)
        sides = [t if flag else None for t, flag in zip((v_x, v_h0), flags, strict=True)]
        if any(t is not None for t in sides):
            *more, _ = transposed_matmul(da, *sides, False)
            of_weights = list(map(sum_of, of_weights, more))
        results[5:7] = of_weights
        if needed[7]:
            results[7] = total
        if needed[8]:  # two tensors, as for two parameters
            results[8] = total.clone() if needed[7] else total
    return results


_PLAIN = LayerWeights(None, None)  # nothing beside nn.LSTM's


@dataclasses.dataclass
class _Second:
    """One direction. Its three recurrences are generators that yield the core's call; each needs
    what those before it have left."""

    v_x: Tensor | None
    v: DirectionGrads
    d: tuple[Tensor | None, ...]
    d_dot: tuple[Tensor | None, ...]
    x: Tensor
    direction: Direction
    y: Tensor
    saved: tuple[Tensor, ...]
    steps: Steps
    wanted_x: bool
    wanted: DirectionGrads

    def forward(self, y_dot: Tensor) -> Generator[Any, None, None]:
        """The tangents of forward; those of y go to y_dot."""
        (h0, c0, w, reverse), v, v_x, x, steps = (
            self.direction,
            self.v,
            self.v_x,
            self.x,
            self.steps,
        )
        H, P = c0.size(1), h0.size(1)
        padding = steps.has_padding
        v_x = v_x if x.size(1) else None  # of no features: the core would take it for no x
        point, c_seq = (t.contiguous() for t in self.saved)
        # W_ih v_x + v_b + v_W_ih x + v_W_hh h_{t-1} + W_hh times the tangent of h_{t-1}. The core
        # makes all but the products with v_W_ih and v_W_hh, and knows which row holds h_{t-1}.
        gx = None if v.w_ih is None else linear(x, v.w_ih)
        b_ih, b_hh = (None if b is None else b.contiguous() for b in (v.b_ih, v.b_hh))
        if v_x is None and not (
            b_ih is None and b_hh is None
        ):  # the core adds them to what x makes
            gx = x.new_zeros(steps.rows, 4 * H) if gx is None else gx
            gx += sum_of(b_ih, b_hh)
        w_ih = None if v_x is None else w.w_ih.contiguous()
        v_x = None if v_x is None else v_x.contiguous()
        gx_after = gx_first = h_more = cell_out = None
        if v.w_hh is not None:
            gx_after, gx_first = linear(self.y.contiguous(), v.w_hh), linear(h0, v.w_hh)
        if w.w_hr is not None:
            cell_out = x.new_empty(steps.rows, H)
            if v.w_hr is not None:
                h_more = linear(point[:, 3 * H :] * c_seq.tanh(), v.w_hr)
        h0_dot = h0.new_zeros(h0.shape) if v.h0 is None else v.h0.contiguous()
        c0_dot = c0.new_zeros(c0.shape) if v.c0 is None else v.c0.contiguous()
        h_n, c_n = torch.empty_like(h0_dot), torch.empty_like(c0_dot)
        gates, c_dot = x.new_empty(steps.rows, 4 * H), allocate(x, steps.rows, H, zero=padding)
        w_hh, w_hr = w.w_hh.contiguous(), None if w.w_hr is None else w.w_hr.contiguous()
        c0 = c0.contiguous()
        code, threads = DTYPE_CODE[x.dtype], torch.get_num_threads()
        deterministic = torch.are_deterministic_algorithms_enabled()
        native, (variants, _) = native_steps(_C, steps, reverse), native_variants(_C, w, x.dtype)
        # fmt: off
        call = _C.CpuForward(
            code, False, threads, deterministic, native, H, P, x.size(1),
            gx, v_x, w_ih, b_ih, b_hh, w_hh, w_hr, h0_dot, c0_dot, variants,
            gates, c_dot, None, None,
            y_dot, y_dot.stride(0), h_n, c_n,
        )
        # fmt: on
        call.make_tangents(point, c_seq, c0, gx_after, gx_first, h_more, cell_out)
        yield call
        self.dots = _Tangents(h0_dot, c0_dot, y_dot, h_n, c_n, gates, c_dot, cell_out)

    def gradients_again(self) -> Generator[Any, None, None]:
        """Backward again, as :func:`backward` yields it. Tangents stand for x, W_ih, h0 and y,
        which only the products after the recurrence read: those are then dgates times the
        tangents, terms of the result."""
        self.kept = Kept()
        v_x, v_w, wanted = self.v_x, self.v.w_ih, self.wanted
        w = self.direction.w if v_w is None else self.direction.w._replace(w_ih=v_w)
        own = DirectionGrads(*[False] * len(wanted))._replace(
            w_ih=wanted.w_ih and v_x is not None, w_hh=wanted.w_hh
        )
        return backward(
            *self.d,
            self.x if v_x is None else v_x,
            self.direction._replace(h0=self.dots.h0, w=w),
            *(self.dots.y, self.saved, self.steps),
            self.wanted_x and v_w is not None,
            own,
            keep=self.kept,
        )

    def backward(self) -> Generator[Any, None, None]:
        """The tangent of :func:`backward`; yields the same."""
        v, kept, dots = self.v, self.kept, self.dots
        dh_more = None if v.w_hh is None else matmul(kept.dgates, v.w_hh)
        dout_more = None if v.w_hr is None else matmul(kept.dr, v.w_hr)
        return backward(
            *self.d_dot,
            *(self.x, self.direction, self.y, self.saved, self.steps, self.wanted_x, self.wanted),
            tangents=(dots.gates, dots.c_seq, dots.c0, kept.dout, kept.dc, dh_more, dout_more),
        )

    def sums(self, first: tuple[Any, ...], second: tuple[Any, ...]) -> DirectionGrads:
        """Of both backwards' gradients, and what neither has."""
        sums = DirectionGrads(*map(sum_of, first[1], second[1]))
        if not self.wanted.w_hr:
            return sums
        real = self.steps.active_rows if self.steps.has_padding else slice(None)
        factors = self.kept.dr[real], self.dots.cell_out[real]
        return sums._replace(w_hr=sums.w_hr + transposed_matmul(*factors, None, False)[0])
