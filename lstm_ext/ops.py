"""One direction of one LSTM layer on the native core: checks, allocation, products, calls.

The only module that imports the compiled core. The input product of many rows is a library's; the
recurrence, the input product of few rows and the products of backward are the core's.

Letters: T steps, B sequences, H hidden units, P = size of h (H, or the projection's size),
rows = (step, sequence) pairs in memory. Gates i, f, g, o. Half types compute in float32.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_ext._build import CUDA_BUILD_COMMAND
from lstm_ext.steps import Steps

try:
    from lstm_ext import _C
except ImportError as error:
    raise ImportError(
        "the compiled core of lstm_ext is missing or does not load here; "
        f"`pip install .` in a checkout builds it ({error})"
    ) from error

# enum Dtype of csrc/params.h
_DTYPE_CODE = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class LayerWeights(NamedTuple):
    """Weights of one direction of one layer, gates in the order i, f, g, o."""

    w_ih: Tensor  # (4H, in)
    w_hh: Tensor  # (4H, P)
    b_ih: Tensor | None = None  # (4H)
    b_hh: Tensor | None = None  # (4H)
    w_hr: Tensor | None = None  # (P, H), then P < H


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
    select_cpu_isa(_isa)


def has_native_kernels(device: torch.device) -> bool:
    """Whether this build has kernels for tensors on ``device``.

    Raises:
        RuntimeError: a CUDA device and a build without CUDA; the text names the command that
            builds with it.
    """
    if device.type == "cuda" and not _C.build_info()["cuda"]:
        raise RuntimeError(
            f"got a tensor on {device}, but this lstm_ext was built for the CPU only "
            f"({_C.build_info()['cuda_reason']}). In a checkout, this builds it with CUDA: "
            f"{CUDA_BUILD_COMMAND}"
        )
    return device.type == "cpu"


_LAYER_INPUTS = (
    "input rows",
    "h0",
    "c0",
    "weight_ih",
    "weight_hh",
    "bias_ih",
    "bias_hh",
    "weight_hr",
)


def check_layer(x: Tensor, h0: Tensor, c0: Tensor, w: LayerWeights, steps: Steps) -> None:
    """Refuses what the core could not read safely.

    Raises:
        TypeError: a dtype without kernels. ValueError: dtypes or devices that differ.
        RuntimeError: a wrong size.
    """
    if x.dtype not in _DTYPE_CODE:
        raise TypeError(
            f"lstm_ext has no kernel for {x.dtype}: convert input and module to torch.float64, "
            "torch.float32, torch.bfloat16 or torch.float16"
        )
    H, P, I = c0.size(-1), h0.size(-1), x.size(-1)
    sizes = (
        (steps.rows, I),
        (steps.B, P),
        (steps.B, H),
        (4 * H, I),
        (4 * H, P),
        (4 * H,),
        (4 * H,),
        (P, H),
    )
    dtype, device = x.dtype, x.device
    for k, (tensor, size) in enumerate(zip((x, h0, c0, *w), sizes, strict=True)):
        if tensor is None:
            continue
        if tensor.shape != size:
            name = _LAYER_INPUTS[k]
            raise RuntimeError(f"Expected {name} of size {size}, got {tuple(tensor.shape)}")
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"Expected {_LAYER_INPUTS[k]} to be {dtype} on {device} like the input, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if w.w_hr is None and P != H:
        raise RuntimeError(f"Expected h0 of size {(steps.B, H)}, got {tuple(h0.shape)}")


def _address(tensor: Tensor | None) -> int:
    """The address that the core reads or writes; 0 for None.

    Raises:
        RuntimeError: the tensor has elements but no memory, as a fake or functionalized one.
    """
    if tensor is None:
        return 0
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise RuntimeError(
            f"lstm_ext needs tensors with memory, got a {type(tensor).__name__} without: tracing "
            "with fake or functionalized tensors is not supported"
        )
    return address


def _acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is enabled for a device type; False for those that know no autocast."""
    if not torch._C._is_any_autocast_enabled():  # the usual case, and much the cheapest question
        return False
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The products run in the dtype that was chosen for the layer, whatever autocast says."""
    if autocast_is_on(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


# oneDNN's product, which torch.compile's CPU backend calls too. torch's own float32 matmul goes to
# MKL, which on AMD processors ran at 175-200 GFLOP/s beside this one's 430 (two Zen 5 cores,
# 3200 x 512 x 2048).
_onednn_linear = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)
_ONEDNN_MIN_MACS = 1_000_000  # below, its set-up (about 12 us) costs more than it gains

# Up to this many rows the core makes the input product too, on the team that is there already:
# 10-25 % of a whole call at T 25-100, B 1-4, H 64-512 on the same machine.
_CORE_INPUT_ROWS = 128
# Up to this many sequences a single step is like any other; of more, packing W_hh for one use
# costs more than a product by torch.
_CORE_ONE_STEP_ROWS = 4


def _linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (m, k) times the transpose of w (n, k), plus bias (n)."""
    if (
        _onednn_linear
        and x.dtype == torch.float32
        and x.size(0) * x.size(1) * w.size(0) >= _ONEDNN_MIN_MACS
        and torch.backends.mkldnn.enabled
        # With fewer threads than it asked for, oneDNN leaves parts of its result unwritten.
        and _C.openmp_grants(torch.get_num_threads())
    ):
        # It reads the bias as if it were contiguous.
        bias = None if bias is None else bias.contiguous()
        return _onednn_linear(x, w, bias, "none", [], "")
    return torch.nn.functional.linear(x, w, bias)


def _matmul(a: Tensor, w: Tensor, *, a_transposed: bool = False) -> Tensor:
    """a w for a (m, k), or transposed (k, m), and w (k, n); in a's dtype, which is w's acc type."""
    K, M = a.shape if a_transposed else a.shape[::-1]
    N = w.size(1)
    out = a.new_empty(M, N) if K else a.new_zeros(M, N)
    if not out.numel() or not K:
        return out
    a, w, code, threads = (
        a.contiguous(),
        w.contiguous(),
        _DTYPE_CODE[w.dtype],
        torch.get_num_threads(),
    )
    workspace = _workspace(_C.cpu_matmul_workspace(code, threads, M, N, K, a_transposed))
    _C.cpu_matmul(
        dtype=code,
        threads=threads,
        M=M,
        N=N,
        K=K,
        a_transposed=a_transposed,
        a=_address(a),
        w=_address(w),
        out=_address(out),
        workspace=_address(workspace),
    )
    return out


def _native_steps(steps: Steps, reverse: bool) -> Any:
    """The core's description of the steps, walked forwards or backwards."""
    if reverse not in steps.native:
        steps.native[reverse] = _C.Steps(
            T=steps.T,
            B=steps.B,
            rows=steps.rows,
            stride_t=1 if steps.batch_first else steps.B,
            stride_b=steps.T if steps.batch_first else 1,
            offsets=_address(steps.offsets),
            lengths=_address(steps.lengths),
            reset=_address(steps.reset_mask),
            reverse=reverse,
        )
    return steps.native[reverse]


def _allocate(like: Tensor, *size: int, zero: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of padding are not touched by the core: then the tensor starts as zeros."""
    return (like.new_zeros if zero else like.new_empty)(size, dtype=dtype)


_kept = threading.local()
_KEEP_BYTES = 64 << 20


def _workspace(size: int) -> Tensor:
    """Scratch for one call of the core, on the CPU, contents arbitrary.

    One buffer is kept per thread, up to a limit: glibc returns large ones to the system, and taking
    their pages anew cost up to a fifth of a call (H 1024 to 2048).
    """
    buffer: Tensor | None = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size <= _KEEP_BYTES:
            _kept.buffer = buffer
    return buffer


def layer_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w: LayerWeights,
    steps: Steps,
    *,
    reverse: bool,
    save: bool,
    cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Runs the layer over all steps.

    Args:
        x: (rows, in). h0: (B, P). c0: (B, H).
        save: also return what backward needs.
        cells: also return every c_t.

    Returns:
        y (rows, P), h_n (B, P), c_n (B, H), the activated gates (rows, 4H) if ``save``, and
        c_t (rows, H) if ``save`` or ``cells``; the last two in float32 for half types.
    """
    H, P, I, acc = c0.size(1), h0.size(1), x.size(1), _acc_dtype(x.dtype)
    padding = steps.has_padding
    w_hh: Tensor | None = w.w_hh
    w_ih: Tensor | None = None  # with core_input, if the core makes the input product itself
    core_input: Tensor | None = None
    # One step of many sequences: h0 is known, so its product needs no packed weights either.
    one_step = steps.T == 1 and steps.B > _CORE_ONE_STEP_ROWS and w.w_hr is None
    if steps.rows <= _CORE_INPUT_ROWS and not one_step:
        core_input, w_ih = x.to(acc).contiguous(), w.w_ih
        gx = x.new_empty((steps.rows, 4 * H), dtype=acc)
    else:
        biases = [b.to(acc) for b in (w.b_ih, w.b_hh) if b is not None]
        bias = sum(biases[1:], *biases[:1]) if biases else None
        with without_autocast(x.device):
            gx = _linear(x.to(acc), w.w_ih.to(acc), bias)
            if one_step:
                start = h0 if steps.reset_mask is None else h0.masked_fill(steps.reset_mask.T, 0)
                gx.addmm_(start.to(acc), w.w_hh.to(acc).T)
                w_hh = None
    y = _allocate(x, steps.rows, P, zero=padding)
    h_n, c_n = h0.new_empty(steps.B, P), c0.new_empty(steps.B, H)
    gates = gx if save else None  # the core reads a row's gx before it writes its gates
    c_seq = (
        _allocate(x, steps.rows, H, zero=padding and cells, dtype=acc) if save or cells else None
    )
    threads = torch.get_num_threads()
    code = _DTYPE_CODE[x.dtype]
    workspace = _workspace(
        _C.cpu_forward_workspace(
            code,
            threads,
            steps.B,
            H,
            P,
            I,
            core_input is not None,
            w_hh is not None,
            w.w_hr is not None,
        )
    )
    weights = LayerWeights(*(None if t is None else t.contiguous() for t in (w_ih, w_hh, *w[2:])))
    h0, c0 = h0.contiguous(), c0.contiguous()
    _C.cpu_forward(
        dtype=code,
        threads=threads,
        steps=_native_steps(steps, reverse),
        H=H,
        P=P,
        I=I,
        gx=_address(gx),
        x=_address(core_input),
        w_ih=_address(weights.w_ih),
        b_ih=_address(weights.b_ih),
        b_hh=_address(weights.b_hh),
        w_hh=_address(weights.w_hh),
        w_hr=_address(weights.w_hr),
        h0=_address(h0),
        c0=_address(c0),
        gates=_address(gates),
        c_seq=_address(c_seq),
        y=_address(y),
        h_n=_address(h_n),
        c_n=_address(c_n),
        workspace=_address(workspace),
    )
    return y, h_n, c_n, gates, c_seq


class LayerGrads(NamedTuple):
    """Gradients, or flags of which are wanted, in the order of the layer's inputs."""

    x: Any
    h0: Any
    c0: Any
    w_ih: Any
    w_hh: Any
    b_ih: Any
    b_hh: Any
    w_hr: Any


def layer_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w: LayerWeights,
    y: Tensor,
    gates: Tensor,
    c_seq: Tensor,
    steps: Steps,
    *,
    reverse: bool,
    wanted: LayerGrads,
) -> LayerGrads:
    """Gradients of the layer's inputs; None where they are not wanted.

    Args:
        dy (rows, P), dh_n (B, P), dc_n (B, H), dcells (rows, H): gradients of the outputs, None
            for zero. The rest: inputs and results of :func:`layer_forward` with ``save``.
    """
    H, P, dtype = c0.size(1), h0.size(1), x.dtype
    one_step = steps.T == 1 and w.w_hr is None  # then dh0 needs one product, without packing
    padding = steps.has_padding
    dy, dh_n, dc_n, dcells = (g if g is None else g.resolve_neg() for g in (dy, dh_n, dc_n, dcells))
    if dy is not None and dy.size(1) > 1 and dy.stride(1) != 1:
        dy = dy.contiguous()
    dh_n, dc_n, dcells = (g if g is None else g.contiguous() for g in (dh_n, dc_n, dcells))
    h0, c0, y, gates, c_seq = (t.contiguous() for t in (h0, c0, y, gates, c_seq))
    w_hh = None if one_step else w.w_hh.contiguous()
    w_hr = None if w.w_hr is None else w.w_hr.contiguous()
    dgates = _allocate(gates, steps.rows, 4 * H, zero=padding)
    h_prev = y.new_empty(steps.rows, P) if wanted.w_hh else None
    dr = None if w_hr is None else gates.new_empty(steps.rows, P)
    dh0, dc0 = h0.new_empty(steps.B, P), c0.new_empty(steps.B, H)
    threads = torch.get_num_threads()
    code = _DTYPE_CODE[dtype]
    workspace = _workspace(
        _C.cpu_backward_workspace(code, threads, steps.B, H, P, w_hh is not None, w_hr is not None)
    )
    _C.cpu_backward(
        dtype=code,
        threads=threads,
        steps=_native_steps(steps, reverse),
        H=H,
        P=P,
        w_hh=_address(w_hh),
        w_hr=_address(w_hr),
        h0=_address(h0),
        c0=_address(c0),
        y=_address(y),
        gates=_address(gates),
        c_seq=_address(c_seq),
        dy=_address(dy),
        dy_stride=0 if dy is None else dy.stride(0),
        dh_n=_address(dh_n),
        dc_n=_address(dc_n),
        dcells=_address(dcells),
        dgates=_address(dgates),
        h_prev=_address(h_prev),
        dr=_address(dr),
        dh0=_address(dh0),
        dc0=_address(dc0),
        workspace=_address(workspace),
    )
    with without_autocast(x.device):
        if one_step and wanted.h0:
            product = _matmul(dgates, w.w_hh)
            if steps.reset_mask is not None:
                product.masked_fill_(steps.reset_mask.T, 0)
            dh0 += product.to(dtype)
        dx = _matmul(dgates, w.w_ih).to(dtype) if wanted.x else None
        # What lies in the padding of x, and of what the core left untouched there, may be
        # anything, NaN too: its zero gradient must not meet it.
        real = steps.active_rows if padding else None

        def rows(tensor: Tensor) -> Tensor:
            return tensor if real is None else tensor.index_select(0, real)

        def over_rows(left: Tensor, right: Tensor) -> Tensor:
            return _matmul(left, right, a_transposed=True).to(dtype)

        some_weight = wanted.w_ih or wanted.w_hh or wanted.b_ih or wanted.b_hh
        dgates = rows(dgates) if some_weight else dgates
        dw_ih = over_rows(dgates, rows(x)) if wanted.w_ih else None
        dw_hh = over_rows(dgates, rows(h_prev)) if h_prev is not None else None
        db = dgates.sum(0).to(dtype) if wanted.b_ih or wanted.b_hh else None
        dw_hr = None
        if wanted.w_hr and dr is not None:
            cell_out = rows(gates[:, 3 * H :]) * rows(c_seq).tanh()
            dw_hr = over_rows(rows(dr), cell_out)
    return LayerGrads(
        x=dx,
        h0=dh0 if wanted.h0 else None,
        c0=dc0 if wanted.c0 else None,
        w_ih=dw_ih,
        w_hh=dw_hh,
        b_ih=db if wanted.b_ih else None,
        # Two tensors, as for two parameters: a caller may change one in place.
        b_hh=db.clone() if wanted.b_hh and db is not None else None,
        w_hr=dw_hr,
    )
