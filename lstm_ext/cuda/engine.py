"""A layer on the native core's CUDA kernels: allocation, products over all steps, launches.

The products over all steps are :mod:`cuda.products`', in the layer's own precision; the recurrence
is the core's. Nothing here waits for the device. Letters as in :mod:`ops`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from lstm_ext.cuda.gradients import gradients
from lstm_ext.cuda.lanes import Lanes, NoLanes
from lstm_ext.cuda.precision import lstm_uses_tf32
from lstm_ext.cuda.products import Products, TorchProducts, VendorProducts, open_vendor
from lstm_ext.cuda.second import layer_second
from lstm_ext.engine import (
    DTYPE_CODE,
    EXCHANGE,
    Direction,
    DirectionGrads,
    LayerResult,
    acc_dtype,
    address,
    in_memory,
    native_steps,
    native_variants,
    norm_input,
    rows_of,
    without_autocast,
)
from lstm_ext.profiling import recorded
from lstm_ext.steps import Steps

FAMILIES = ("step", "grid", "cluster", "vendor", "tagged")  # enum CudaFamily of csrc/cuda/plan.h


def verbose() -> bool:
    """Whether to say which kernels run what."""
    return os.environ.get("LSTM_EXT_VERBOSE", "0") not in ("", "0")


def switch(name: str) -> bool:
    """An environment variable that is on or off, or else not set: off.

    Raises:
        ValueError: it is something else.
    """
    value = os.environ.get(name) or "off"
    if value not in ("on", "off"):
        raise ValueError(f"{name} should be on or off, got {value}")
    return value == "on"


class CudaEngine:
    """The kernels of one native module, for torch's CUDA devices.

    Tests make one of a module that runs the same kernels on the CPU: they override what asks
    the device.
    """

    device_type = "cuda"

    def __init__(self, core: Any) -> None:
        self.core = core
        self.plan = functools.lru_cache(maxsize=4096)(self._plan)
        #: Why cuBLASLt cannot be used; empty if it can.
        self.no_vendor = open_vendor(core)
        self._use_vendor(not self.no_vendor)
        #: Whether stacks of layers may run as a wavefront. Off: it has never run on a GPU.
        self.wavefront = switch("LSTM_EXT_WAVEFRONT")
        #: Whether kernels that nobody has timed on a GPU may be chosen.
        self.untimed = switch("LSTM_EXT_UNTIMED")

    def _use_vendor(self, use: bool) -> None:
        self.products: Products = VendorProducts(self) if use else TorchProducts()
        #: Plain layers in one call of the core each way; None: only by cuBLASLt.
        self.plain: Any = None
        #: As of :func:`ops.layer_second`; None: only by cuBLASLt.
        self.layer_second: Any = None
        if use:
            self.layer_second = functools.partial(layer_second, self)
            self.plain = self.core.CudaPlain(
                types=(Tensor, nn.Parameter),
                codes=DTYPE_CODE,
                half_acc=torch.float32,
                bytes=torch.uint8,
                is_cpu=self.device_type == "cpu",
                exchange=EXCHANGE,
            )

    # --- the device -------------------------------------------------------------------------------

    @functools.cache  # noqa: B019  (an engine lives as long as the process)
    def properties(self, device: torch.device) -> Any:
        """What the plan asks of a device."""
        # The core makes it current and then again what was: in a thread that has not used CUDA yet
        # that would be a context on device 0.
        with self.guard(device):
            return self.core.cuda_properties(device.index, self.untimed)

    def stream(self, device: torch.device) -> int:
        """The address of torch's current stream."""
        return self.raw_stream(device.index)

    def raw_stream(self, index: int) -> int:
        """As :meth:`stream`, by the device's index."""
        return torch._C._cuda_getCurrentRawStream(index)

    def is_current(self, index: int) -> bool:
        """Whether the device is the calling thread's current one."""
        return torch._C._cuda_getDevice() == index

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Makes the device current."""
        return torch.cuda.device(device)

    def lanes(self, device: torch.device, count: int) -> Lanes | NoLanes:
        """So many streams beside the current one."""
        return Lanes(device, count) if count else NoLanes()

    def uses_tf32(self, x: Tensor) -> bool:
        """Whether x's products round their factors to TF32."""
        # Turing has no TF32: nn.LSTM is exact there too.
        return (
            x.dtype == torch.float32 and lstm_uses_tf32() and self.properties(x.device).major >= 8
        )

    # --- the plan ---------------------------------------------------------------------------------

    def _plan(
        self,
        device: torch.device,
        dtype: torch.dtype,
        tf32: bool,
        backward: bool,
        projection: bool,
        variants: bool,
        normed: bool,
        directions: int,
        T: int,
        B: int,
        H: int,
        P: int,
    ) -> Any:
        problem = self.core.CudaProblem(
            dtype=DTYPE_CODE[dtype],
            tf32=tf32,
            backward=backward,
            projection=projection,
            variants=variants,
            normed=normed,
            directions=directions,
            T=T,
            B=B,
            H=H,
            P=P,
        )
        plan = self.choose(problem, device)
        if verbose():
            text = self.core.cuda_describe_plan(plan, problem)
            print(f"lstm_ext on {device}: {text}", file=sys.stderr)
        return plan

    def choose(self, problem: Any, device: torch.device) -> Any:
        """The plan for a problem."""
        return self.core.cuda_plan(problem, self.properties(device))

    def choose_wavefront(self, problem: Any, device: torch.device, layers: int, T: int) -> Any:
        """In how many parts, with which plan (CudaWavefront of csrc/cuda/plan.h)."""
        return self.core.cuda_wavefront(problem, self.properties(device), layers, T)

    def _layer(
        self, x: Tensor, directions: list[Direction], steps: Steps, tf32: bool, backward: bool
    ) -> tuple[Any, int]:
        """The core's description of a layer's call, and the bytes of scratch it needs."""
        (_, c0, w, _), D = directions[0], len(directions)
        H, P, projection = c0.size(1), w.w_hh.size(1), w.w_hr is not None
        normed, variants = w.normed, w.varied
        key = (self, x.device, x.dtype, tf32, backward, D, H, P, projection, variants, normed)
        kept = steps.native.get(key)
        if kept is not None:
            return kept
        # All that a plan asks of T is whether there is more than one step.
        shape = (min(steps.T, 2), steps.B, H, P)
        layer = self.core.CudaLayer(
            dtype=DTYPE_CODE[x.dtype],
            tf32=tf32,
            device=x.device.index or 0,
            directions=D,
            steps=native_steps(self.core, steps, False),
            H=H,
            P=P,
            variants=variants,
            normed=normed,
            plan=self.plan(
                *(x.device, x.dtype, tf32, backward, projection, variants, normed, D), *shape
            ),
        )
        core = self.core
        workspace = core.cuda_backward_workspace if backward else core.cuda_forward_workspace
        kept = steps.native[key] = (layer, workspace(layer, projection))
        return kept

    # --- forward ----------------------------------------------------------------------------------

    def layer_forward(
        self, x: Tensor, directions: list[Direction], steps: Steps, *, save: bool, cells: bool
    ) -> LayerResult:
        """See :func:`ops.layer_forward`."""
        core, dtype, acc = self.core, x.dtype, acc_dtype(x.dtype)
        H, P, D = directions[0].c0.size(1), directions[0].h0.size(1), len(directions)
        tf32 = self.uses_tf32(x)
        with self.guard(x.device), without_autocast(x.device):
            y = x.new_empty(steps.rows, D * P)
            result = LayerResult(y, [], [], [], [], [])
            parts, kept = [], []
            for k, (h0, c0, w, reverse) in enumerate(directions):
                gx = self.product(x, w.w_ih.t(), acc, tf32)
                variants, variant_tensors = native_variants(core, w, dtype)
                biases, more, norm, norm_r = (w.b_ih, w.b_hh), (), None, None
                if w.normed:
                    given = [b.to(acc) for b in biases if b is not None]
                    bias = sum(given[1:], *given[:1]) if given else None
                    gx, more = norm_input(gx, w, bias, steps)
                    biases = (None, None)  # gx has them
                    if save:
                        norm = x.new_empty(steps.rows, 4 * H, dtype=acc)
                        norm_r = x.new_empty(steps.rows, dtype=acc)
                        more = (*more, norm, norm_r)
                h_n, c_n = h0.new_empty(steps.B, P), c0.new_empty(steps.B, H)
                c_seq = x.new_empty(steps.rows, H, dtype=acc) if save or cells else None
                tensors = (
                    self.arranged(w.w_hh),
                    None if w.w_hr is None else self.arranged(w.w_hr),
                    *(None if b is None else b.contiguous() for b in biases),
                    h0.contiguous(),
                    c0.contiguous(),
                )
                w_hh, w_hr, b_ih, b_hh, h0, c0 = map(address, tensors)
                kept.append((gx, tensors, variant_tensors))  # until all is launched
                parts.append(
                    core.CudaForwardDirection(
                        reverse=reverse,
                        gx=address(gx),
                        b_ih=b_ih,
                        b_hh=b_hh,
                        w_hh=w_hh,
                        w_hr=w_hr,
                        h0=h0,
                        c0=c0,
                        variants=variants,
                        gates=address(gx) if save else 0,  # a row's gx is read before they are
                        c_seq=address(c_seq),
                        norm=address(norm),
                        norm_r=address(norm_r),
                        y=address(y) + k * P * y.element_size(),
                        y_stride=D * P,
                        h_n=address(h_n),
                        c_n=address(c_n),
                    )
                )
                result.h_n.append(h_n)
                result.c_n.append(c_n)
                result.gates.append(gx if save else None)
                result.c_seq.append(c_seq)
                if save:
                    result.more.append(more)
            layer, size = self._layer(x, directions, steps, tf32, backward=False)
            workspace = x.new_empty(size, dtype=torch.uint8)
            recorded(core.cuda_forward)(layer, parts, address(workspace), self.stream(x.device))
        return result

    # --- backward ---------------------------------------------------------------------------------

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
    ) -> tuple[Tensor | None, list[DirectionGrads]]:
        """See :func:`ops.layer_backward`."""
        core, dtype = self.core, x.dtype
        H, P = directions[0].c0.size(1), directions[0].h0.size(1)
        tf32 = self.uses_tf32(x)
        with self.guard(x.device), without_autocast(x.device):
            parts, kept, outputs = [], [], []
            for k, (direction, want) in enumerate(zip(directions, wanted, strict=True)):
                h0, c0, w, reverse = direction
                gates, c_seq, *more = (t.contiguous() for t in saved[k])
                variants, variant_tensors = native_variants(core, w, dtype)
                normed = w.normed
                norm, norm_r = more[3:] if normed else (None, None)
                part_y, part_dy = rows_of(y, k * P, P), rows_of(dy, k * P, P)
                w_hh = self.arranged(w.w_hh, transposed=True)
                w_hr = None if w.w_hr is None else self.arranged(w.w_hr, transposed=True)
                tensors = [
                    None if t is None else in_memory(t).contiguous()
                    for t in (h0, c0, dh_n[k], dc_n[k], rows_of(dcells, k * H, H))
                ]
                dgates = x.new_empty(steps.rows, 4 * H, dtype=acc_dtype(dtype) if normed else dtype)
                h_prev = x.new_empty(steps.rows, P) if want.w_hh else None
                dr = None if w_hr is None else x.new_empty(steps.rows, P)
                dh0 = h0.new_empty(steps.B, P) if want.h0 else None
                dc0 = c0.new_empty(steps.B, H) if want.c0 else None
                more_outputs = self._variant_outputs(x, direction, steps, want)
                dproduct, cell_out, dpeephole, dnorm = more_outputs
                h0, c0, part_dh_n, part_dc_n, part_dcells = map(address, tensors)
                # Until all is launched.
                kept.append((w_hh, w_hr, tensors, part_y, part_dy, more, variant_tensors))
                outputs.append((dgates, h_prev, dr, dh0, dc0, gates, c_seq, more, *more_outputs))
                parts.append(
                    core.CudaBackwardDirection(
                        reverse=reverse,
                        w_hh=address(w_hh),
                        w_hr=address(w_hr),
                        h0=h0,
                        c0=c0,
                        y=address(part_y),
                        y_stride=part_y.stride(0),
                        gates=address(gates),
                        c_seq=address(c_seq),
                        variants=variants,
                        norm=address(norm),
                        norm_r=address(norm_r),
                        dy=address(part_dy),
                        dy_stride=0 if part_dy is None else part_dy.stride(0),
                        dh_n=part_dh_n,
                        dc_n=part_dc_n,
                        dcells=part_dcells,
                        dgates=address(dgates),
                        dproduct=address(dproduct),
                        cell_out=address(cell_out),
                        dpeephole=address(dpeephole),
                        dnorm=address(dnorm),
                        h_prev=address(h_prev),
                        dr=address(dr),
                        dh0=address(dh0),
                        dc0=address(dc0),
                    )
                )
            layer, size = self._layer(x, directions, steps, tf32, backward=True)
            workspace = x.new_empty(size, dtype=torch.uint8)
            recorded(core.cuda_backward)(layer, parts, address(workspace), self.stream(x.device))
            return gradients(self, x, directions, steps, outputs, wanted_x, wanted, tf32)

    @staticmethod
    def _variant_outputs(
        x: Tensor, direction: Direction, steps: Steps, want: DirectionGrads
    ) -> tuple[Tensor | None, ...]:
        """dproduct, cell_out, dpeephole and dnorm of CudaBackwardDirection, if needed."""
        w, H, acc = direction.w, direction.c0.size(1), acc_dtype(x.dtype)
        dnorm_wanted = want.gamma_hh or want.gamma_ch or want.beta_ch
        return (
            x.new_empty(steps.rows, 4 * H) if w.normed and want.w_hh else None,
            # Padding has no cell, and no gradient: its rows stay zero.
            x.new_zeros(steps.rows, H) if want.w_hr and w.w_hr is not None and w.varied else None,
            x.new_zeros(steps.B, 3 * H, dtype=acc) if want.w_ch else None,
            x.new_zeros(steps.B, 6 * H, dtype=acc) if dnorm_wanted else None,
        )

    def product(self, a: Tensor, b: Tensor, dtype: torch.dtype, tf32: bool) -> Tensor:
        """a b in a dtype that may be wider than theirs."""
        out = a.new_empty(a.size(0), b.size(1), dtype=dtype)
        self.products.into(out, a, b, tf32)
        return out

    def arranged(self, w: Tensor, *, transposed: bool = False) -> Tensor:
        """w, or its transpose, as the kernels read it: rows padded with zeros to whole chunks, on
        16-byte boundaries."""
        rows, columns = w.shape
        code = DTYPE_CODE[w.dtype]
        width = self.core.cuda_padded(rows if transposed else columns, code)
        w = w.contiguous()
        if not transposed and width == columns and w.data_ptr() % 16 == 0:
            return w
        out = w.new_empty(columns if transposed else rows, width)
        self.core.cuda_arrange(
            *(code, transposed, rows, columns, width),
            *(address(w), address(out), self.stream(w.device)),
        )
        return out
