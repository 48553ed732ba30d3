"""A layer on the native core's CUDA kernels: allocation, products over all steps, launches.

The products over all steps are torch's, in the layer's own precision; the recurrence is the
core's. Nothing here waits for the device. Letters as in :mod:`ops`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from typing import Any

import torch
from torch import Tensor

from lstm_ext.engine import (
    DTYPE_CODE,
    Direction,
    DirectionGrads,
    LayerResult,
    acc_dtype,
    address,
    native_steps,
    rows_of,
    without_autocast,
)
from lstm_ext.profiling import recorded
from lstm_ext.steps import Steps

FAMILIES = ("step", "grid")  # enum CudaFamily of csrc/cuda/plan.h

# torch 2.9 and later have a setting for each kind of operation; before, one flag for each library.
_get_precision = getattr(torch._C, "_get_fp32_precision_getter", None)
_set_precision = getattr(torch._C, "_set_fp32_precision_setter", None)


def lstm_uses_tf32() -> bool:
    """Whether float32 LSTMs may round the operands of their products to TF32.

    The setting that nn.LSTM obeys on cuDNN: torch.backends.cudnn.allow_tf32 (on by default), or
    torch.backends.cudnn.rnn.fp32_precision.
    """
    if _get_precision is not None:
        return _get_precision("cuda", "rnn") == "tf32"
    return torch._C._get_cudnn_allow_tf32()


def _own_precision() -> str:
    """The setting of float32 products on CUDA itself: "none" where it follows a wider one."""
    effective = _get_precision("cuda", "matmul")
    if effective != "none":
        _set_precision("cuda", "matmul", "none")
        if _get_precision("cuda", "matmul") == effective:
            return "none"
    return effective


class _Products:
    """``with _Products(tf32):`` torch's float32 products on CUDA run at the LSTM's precision.

    cuBLAS has a setting of its own (exact by default, where cuDNN's is TF32), and it is the
    process's: autograd has a thread for each device, so the first who needs another setting makes
    it, the last one puts the user's back. A float32 product of another thread meanwhile may see it.
    """

    _lock = threading.Lock()
    _inside = 0
    _before: Any = None  # the user's own setting, if it had to be changed

    def __init__(self, tf32: bool) -> None:
        self._tf32 = tf32

    def __enter__(self) -> None:
        kind = type(self)
        with kind._lock:
            if kind._inside == 0 and self._differs():
                kind._before = self._read()
                self._write("tf32" if self._tf32 else "ieee")
            kind._inside += 1

    def __exit__(self, *_: object) -> None:
        kind = type(self)
        with kind._lock:
            kind._inside -= 1
            if kind._inside == 0 and kind._before is not None:
                self._write(kind._before)
                kind._before = None

    def _differs(self) -> bool:
        if _get_precision is None:
            return torch._C._get_cublas_allow_tf32() != self._tf32
        return (_get_precision("cuda", "matmul") == "tf32") != self._tf32

    @staticmethod
    def _read() -> str:
        if _get_precision is None:
            return "tf32" if torch._C._get_cublas_allow_tf32() else "ieee"
        return _own_precision()

    @staticmethod
    def _write(value: str) -> None:
        if _set_precision is None:
            torch._C._set_cublas_allow_tf32(value == "tf32")
        else:
            _set_precision("cuda", "matmul", value)


def _products_in(dtype: torch.dtype, tf32: bool) -> contextlib.AbstractContextManager[None]:
    """Products of layers in ``dtype``; only float32 has a choice."""
    return _Products(tf32) if dtype == torch.float32 else contextlib.nullcontext()


def _padded_rows(w: Tensor, size: int) -> Tensor:
    """w (n, k) as the kernels read it: rows of ``size``, zero past k, on 16-byte boundaries."""
    if w.size(1) == size and w.is_contiguous() and w.data_ptr() % 16 == 0:
        return w
    if w.size(1) == size:
        return w.new_empty(w.shape).copy_(w)
    padded = w.new_zeros(w.size(0), size)
    padded[:, : w.size(1)] = w
    return padded


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in a dtype that may be wider than theirs, without a rounding between."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


class CudaEngine:
    """The kernels of one native module, for torch's CUDA devices.

    Tests make one of a module that runs the same kernels on the CPU: they override what asks
    the device.
    """

    def __init__(self, core: Any) -> None:
        self.core = core
        self.plan = functools.lru_cache(maxsize=4096)(self._plan)

    # --- the device -------------------------------------------------------------------------------

    @functools.cache  # noqa: B019  (an engine lives as long as the process)
    def properties(self, device: torch.device) -> Any:
        """What the plan asks of a device."""
        return self.core.cuda_properties(device.index)

    def stream(self, device: torch.device) -> int:
        """The address of torch's current stream."""
        return torch._C._cuda_getCurrentRawStream(device.index)

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Makes the device current."""
        return torch.cuda.device(device)

    def _uses_tf32(self, x: Tensor) -> bool:
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
            directions=directions,
            T=T,
            B=B,
            H=H,
            P=P,
        )
        plan = self.choose(problem, device)
        if os.environ.get("LSTM_EXT_VERBOSE", "0") not in ("", "0"):
            text = self.core.cuda_describe_plan(plan, problem)
            print(f"lstm_ext on {device}: {text}", file=sys.stderr)
        return plan

    def choose(self, problem: Any, device: torch.device) -> Any:
        """The plan for a problem."""
        return self.core.cuda_plan(problem, self.properties(device))

    def _layer(
        self, x: Tensor, directions: list[Direction], steps: Steps, tf32: bool, backward: bool
    ) -> tuple[Any, int]:
        """The core's description of a layer's call, and the bytes of scratch it needs."""
        (_, c0, w, _), D = directions[0], len(directions)
        H, P, projection = c0.size(1), w.w_hh.size(1), w.w_hr is not None
        key = (self, x.device, x.dtype, tf32, backward, D, H, P, projection)
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
            plan=self.plan(x.device, x.dtype, tf32, backward, projection, D, *shape),
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
        code = DTYPE_CODE[dtype]
        tf32 = self._uses_tf32(x)
        with self.guard(x.device), without_autocast(x.device):
            y = x.new_empty(steps.rows, D * P)
            result = LayerResult(y, [], [], [], [])
            parts, kept = [], []
            for k, (h0, c0, w, reverse) in enumerate(directions):
                with _products_in(dtype, tf32):
                    gx = _product(x, w.w_ih.t(), acc)
                h_n, c_n = h0.new_empty(steps.B, P), c0.new_empty(steps.B, H)
                c_seq = x.new_empty(steps.rows, H, dtype=acc) if save or cells else None
                tensors = (
                    _padded_rows(w.w_hh, core.cuda_padded(P, code)),
                    None if w.w_hr is None else _padded_rows(w.w_hr, core.cuda_padded(H, code)),
                    *(None if b is None else b.contiguous() for b in (w.b_ih, w.b_hh)),
                    h0.contiguous(),
                    c0.contiguous(),
                )
                w_hh, w_hr, b_ih, b_hh, h0, c0 = map(address, tensors)
                kept.append((gx, tensors))  # until all is launched
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
                        gates=address(gx) if save else 0,  # a row's gx is read before they are
                        c_seq=address(c_seq),
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
        saved: list[tuple[Tensor, Tensor]],
        steps: Steps,
        *,
        wanted_x: bool,
        wanted: list[DirectionGrads],
    ) -> tuple[Tensor | None, list[DirectionGrads]]:
        """See :func:`ops.layer_backward`."""
        core, dtype = self.core, x.dtype
        H, P = directions[0].c0.size(1), directions[0].h0.size(1)
        code = DTYPE_CODE[dtype]
        tf32 = self._uses_tf32(x)
        with self.guard(x.device), without_autocast(x.device):
            parts, kept, outputs = [], [], []
            for k, (direction, want) in enumerate(zip(directions, wanted, strict=True)):
                h0, c0, w, reverse = direction
                gates, c_seq = (t.contiguous() for t in saved[k])
                part_y, part_dy = rows_of(y, k * P, P), rows_of(dy, k * P, P)
                w_hh = _padded_rows(w.w_hh.t(), core.cuda_padded(4 * H, code))
                w_hr = (
                    None if w.w_hr is None else _padded_rows(w.w_hr.t(), core.cuda_padded(P, code))
                )
                tensors = [
                    None if t is None else t.resolve_neg().contiguous()
                    for t in (h0, c0, dh_n[k], dc_n[k], rows_of(dcells, k * H, H))
                ]
                dgates = x.new_empty(steps.rows, 4 * H)
                h_prev = x.new_empty(steps.rows, P) if want.w_hh else None
                dr = None if w_hr is None else x.new_empty(steps.rows, P)
                dh0 = h0.new_empty(steps.B, P) if want.h0 else None
                dc0 = c0.new_empty(steps.B, H) if want.c0 else None
                h0, c0, part_dh_n, part_dc_n, part_dcells = map(address, tensors)
                kept.append((w_hh, w_hr, tensors, part_y, part_dy))  # until all is launched
                outputs.append((dgates, h_prev, dr, dh0, dc0, gates, c_seq))
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
                        dy=address(part_dy),
                        dy_stride=0 if part_dy is None else part_dy.stride(0),
                        dh_n=part_dh_n,
                        dc_n=part_dc_n,
                        dcells=part_dcells,
                        dgates=address(dgates),
                        h_prev=address(h_prev),
                        dr=address(dr),
                        dh0=address(dh0),
                        dc0=address(dc0),
                    )
                )
            layer, size = self._layer(x, directions, steps, tf32, backward=True)
            workspace = x.new_empty(size, dtype=torch.uint8)
            recorded(core.cuda_backward)(layer, parts, address(workspace), self.stream(x.device))
            with _products_in(dtype, tf32):
                return self._products(x, directions, steps, outputs, wanted_x, wanted)

    def _products(
        self,
        x: Tensor,
        directions: list[Direction],
        steps: Steps,
        outputs: list[tuple[Any, ...]],
        wanted_x: bool,
        wanted: list[DirectionGrads],
    ) -> tuple[Tensor | None, list[DirectionGrads]]:
        """What follows from the gradients of the gates of all steps."""
        dtype, acc = x.dtype, acc_dtype(x.dtype)
        dx: Tensor | None = None
        grads = []
        # The padding of x may hold anything, NaN too: its zero gradient must not meet it.
        inputs: Tensor | None = None
        for direction, want, output in zip(directions, wanted, outputs, strict=True):
            dgates, h_prev, dr, dh0, dc0, gates, c_seq = output
            w = direction.w
            if wanted_x:
                part = _product(dgates, w.w_ih, acc)
                dx = part if dx is None else dx.add_(part)
            if want.w_ih and inputs is None:
                inputs = x if not steps.has_padding else x.masked_fill(steps.padding_rows, 0)
            db = dgates.sum(0, dtype=acc).to(dtype) if want.b_ih or want.b_hh else None
            dw_hr = None
            if want.w_hr and dr is not None:
                hidden = gates[:, -c_seq.size(1) :] * c_seq.tanh()
                if steps.has_padding:
                    hidden.masked_fill_(steps.padding_rows, 0)
                dw_hr = dr.t() @ hidden.to(dtype)
            grads.append(
                DirectionGrads(
                    h0=dh0,
                    c0=dc0,
                    w_ih=dgates.t() @ inputs if want.w_ih else None,
                    w_hh=None if h_prev is None else dgates.t() @ h_prev,
                    b_ih=db if want.b_ih else None,
                    # Two tensors, as for two parameters: a caller may change one in place.
                    b_hh=db.clone() if want.b_hh and db is not None else None,
                    w_hr=dw_hr,
                )
            )
        return (None if dx is None else dx.to(dtype)), grads
