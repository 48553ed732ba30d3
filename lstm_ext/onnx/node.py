"""The nodes of ONNX: as operators of torch, in ONNX, and the LSTM's constants from a module."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lstm_ext import reference
from lstm_ext.lstm_cell import LSTMCell
from lstm_ext.modules import LSTM
from lstm_ext.ops import Direction, LayerWeights, check_layer
from lstm_ext.steps import Steps

_OF_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@torch.library.custom_op("lstm_ext::onnx_lstm", mutates_args=())
def lstm_node(
    X: Tensor,
    W: Tensor,
    R: Tensor,
    B: Tensor | None,
    sequence_lens: Tensor | None,
    initial_h: Tensor | None,
    initial_c: Tensor | None,
    P: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX LSTM, layout 0: X (T, B, I), W (D, 4H, I), R (D, 4H, H), B (D, 8H), rows i, o, f, c;
    sequence_lens (B,) int32; initial_h and initial_c (D, B, H); P (D, 3H), rows i, o, f.

    Returns Y (T, D, B, H), Y_h and Y_c (D, B, H).
    """
    zeros = X.new_zeros(W.size(0), X.size(1), R.size(2))
    results = []
    for d in range(W.size(0)):
        bias = (None, None) if B is None else [_ifgo(half) for half in B[d].chunk(2)]
        y, h, c, _ = reference.lstm_layer(
            X,
            (zeros if initial_h is None else initial_h)[d],
            (zeros if initial_c is None else initial_c)[d],
            _ifgo(W[d]),
            _ifgo(R[d]),
            *bias,
            w_ch=None if P is None else _ordered(P[d], 3, (0, 2, 1)),
            lengths=sequence_lens,
            reverse=d == 1,
        )
        results.append((y, h, c))
    y, h, c = (torch.stack(parts) for parts in zip(*results, strict=True))
    return y.transpose(0, 1).contiguous(), h, c


@lstm_node.register_fake
def _(X, W, R, B, sequence_lens, initial_h, initial_c, P):
    steps, batch, _ = X.shape
    D, hidden = W.size(0), R.size(2)
    return (
        X.new_empty(steps, D, batch, hidden),
        X.new_empty(D, batch, hidden),
        X.new_empty(D, batch, hidden),
    )


@torch.library.custom_op("lstm_ext::onnx_matmul", mutates_args=())
def product_node(A: Tensor, B: Tensor) -> Tensor:
    """ONNX MatMul. torch's own asks for sizes that are 1, which are the export's for good then."""
    return A @ B


@product_node.register_fake
def _(A, B):
    return A.new_empty(*A.shape[:-1], B.size(-1))


@functools.cache
def translations() -> dict[Any, Any]:
    """The operators as their nodes."""
    from onnxscript import opset18 as op

    def onnx_lstm(X, W, R, B, sequence_lens, initial_h, initial_c, P):
        D, _, hidden = R.shape
        return op.LSTM(
            X,
            W,
            R,
            B,
            sequence_lens,
            initial_h,
            initial_c,
            P,
            direction="bidirectional" if D == 2 else "forward",
            hidden_size=hidden,
        )

    def onnx_matmul(A, B):
        return op.MatMul(A, B)

    ops = torch.ops.lstm_ext
    return {ops.onnx_lstm.default: onnx_lstm, ops.onnx_matmul.default: onnx_matmul}


def merged(y: Tensor, mode: str | None) -> Tensor:
    """(T, B, D*P) or, merged, (T, B, P) from (T, D, B, P)."""
    if y.size(1) == 1:
        return y.squeeze(1)
    if mode in ("concat", None):
        return torch.cat(y.unbind(1), -1)  # flatten would fix sizes that are 1
    forward, backward = y.unbind(1)
    if mode == "mul":
        return forward * backward
    total = forward + backward
    return total if mode == "sum" else total / 2


def _ordered(rows: Tensor, parts: int, order: tuple[int, ...]) -> Tensor:
    chunks = rows.chunk(parts)
    return torch.cat([chunks[k] for k in order])


def _iofc(rows: Tensor) -> Tensor:
    """Rows i, o, f, c, ONNX's order, from i, f, g, o."""
    return _ordered(rows, 4, (0, 3, 1, 2))


def _ifgo(rows: Tensor) -> Tensor:
    return _ordered(rows, 4, (0, 2, 3, 1))


# --- weights --------------------------------------------------------------------------------------


class NodeConstants(NamedTuple):
    """Constants of one node; D directions side by side."""

    W: Tensor  # (D, 4H, in)
    R: Tensor  # (D, 4H, H)
    B: Tensor | None  # (D, 8H)
    P: Tensor | None  # (D, 3H)
    projection: Tensor | None  # (D, H, P), what h is multiplied by
    inverse: Tensor | None  # (D, P, H), of the projection: h0 of H units from the one of P


def checked_weights(module: LSTM | LSTMCell) -> list[list[LayerWeights]]:
    """A list a layer, an entry a direction, as the module's forward reads and checks them.

    Raises:
        TypeError, ValueError, RuntimeError: the module's own, for weights that are missing, or not
            of one dtype, device and size.
    """
    H, I, D = module.hidden_size, module.input_size, 1
    P, steps = getattr(module, "proj_size", 0) or H, Steps.padded(1, 1)
    cell = isinstance(module, LSTMCell)
    if not cell:
        module._check_attributes()
        D += module.bidirectional
    first = getattr(module, "weight_ih" if cell else "weight_ih_l0")
    like = first if isinstance(first, Tensor) else torch.empty(0)
    h, c = like.new_empty(1, P), like.new_empty(1, H)
    layers = []
    for k in range(1 if cell else module.num_layers):
        x = like.new_empty(1, I)
        if cell:
            each = [module._layer_weights([getattr(module, n) for n in _OF_CELL], x, steps, h, c)]
        else:
            each = [module._layer_weights(D * k + d, x, steps, h, c) for d in range(D)]
        check_layer(x, [Direction(h, c, w, d == 1) for d, w in enumerate(each)], steps)
        layers.append(each)
        I = D * P if getattr(module, "merge_mode", "") in ("concat", None) else P
    return layers


@torch.no_grad()
def node_constants(directions: list[LayerWeights]) -> NodeConstants:
    """The node of one layer."""
    bias = peepholes = projection = inverse = None
    r = [w.w_hh for w in directions]
    if any(b is not None for w in directions for b in (w.b_ih, w.b_hh)):
        zeros = r[0].new_zeros(r[0].size(0))  # a cell may have one bias only
        pairs = [[zeros if b is None else b for b in (w.b_ih, w.b_hh)] for w in directions]
        bias = torch.stack([torch.cat([_iofc(b) for b in pair]) for pair in pairs])
    if directions[0].w_ch is not None:
        peepholes = torch.stack([_ordered(w.w_ch, 3, (0, 2, 1)) for w in directions])
    if directions[0].w_hr is not None:
        hr = [w.w_hr.double() for w in directions]
        dtype = r[0].dtype
        r = [(a.double() @ b).to(dtype) for a, b in zip(r, hr, strict=True)]
        projection = torch.stack([p.T for p in hr]).to(dtype)
        # W_hr inverse = 1, so that R takes from the widened state what W_hh takes from h0.
        singular = torch.linalg.svdvals(torch.stack(hr))
        if bool((singular[:, -1] > singular[:, 0] * torch.finfo(dtype).eps ** 0.5).all()):
            inverse = torch.linalg.pinv(torch.stack(hr)).transpose(1, 2).to(dtype)
    return NodeConstants(
        torch.stack([_iofc(w.w_ih) for w in directions]),
        torch.stack([_iofc(t) for t in r]),
        bias,
        peepholes,
        projection,
        inverse,
    )


def weight_names(module: LSTM | LSTMCell) -> list[list[str]]:
    """The names of the weights that a layer's node is made of, a list a layer."""
    if isinstance(module, LSTMCell):
        return [[*_OF_CELL, *module._variant_names()]]
    flat, D = module._named_weights(), 1 + module.bidirectional
    return [sum(flat[k : k + D], []) for k in range(0, len(flat), D)]


class Held(NamedTuple):
    """Where a module has a tensor, the tensor, and the versions of what it is made of.

    A parametrization makes a new tensor each time: its originals count.
    """

    place: str
    tensor: Any
    versions: list[int | None]


def held(module: nn.Module, name: str) -> Held:
    places = ("_parameters", "_buffers")
    place = next((p for p in places if module.__dict__[p].get(name) is not None), "")
    tensor = (module.__dict__[place] if place else module.__dict__).get(name)
    sources = [tensor] if isinstance(tensor, Tensor) else []
    if is_parametrized(module, name):
        sources = module.parametrizations[name].parameters()
    # Inference tensors count no versions.
    return Held(place, tensor, [None if t.is_inference() else t._version for t in sources])
