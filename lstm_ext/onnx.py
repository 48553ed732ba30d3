"""ONNX: a model with lstm_ext modules in it as standard LSTM nodes, one a layer.

For the time of an export the modules' forward is one that computes a layer by the operator
``lstm_ext::onnx_lstm``, which is the ONNX LSTM in torch: the arguments, layouts and gate order of
the node, so that the translation has nothing to do. The weights are rearranged once, before.

Nodes have layout 0 and neither clip nor input_forget, as TensorRT's importer wants them. `onnx` and
`onnxscript` are imported by :func:`export` only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstm_ext import reference
from lstm_ext.cnn import CNNLSTM
from lstm_ext.compat import States, check_match, check_pair
from lstm_ext.lstm_cell import LSTMCell
from lstm_ext.modules import LSTM
from lstm_ext.ops import autocast_is_on

__all__ = ["export"]


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    dynamic_shapes: Any = None,
    **kwargs: Any,
) -> Any:
    """Write model, with every lstm_ext.LSTM and LSTMCell in it, as an ONNX file.

    Each layer of an LSTM, and each LSTMCell, becomes one standard LSTM node, with whatever of
    directions, biases, peepholes, initial states and ``lengths`` it has. A projection is not in
    ONNX's LSTM: it becomes a node of H unprojected units, R = W_hh W_hr (4H, H), and a product
    after it. Merging, transposing and the state of a sequence of no steps are plain nodes. What
    was exported holds no operator of another domain.

    Args:
        model: any module; in eval mode, where an LSTM in it has a dropout.
        args: example inputs, in order.
        path: the file; None: none is written.
        dynamic_shapes: which sizes may change, as :func:`torch.export.export` takes them; all
            others, T and B too, are those of args for good.
        kwargs: of :func:`torch.onnx.export`; ``kwargs={"lengths": …}`` are inputs by name.

    Returns:
        torch.onnx.ONNXProgram.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError: model is no nn.Module; dynamo=False.
        ValueError: what ONNX's LSTM cannot say: layer_norm, zoneout, return_cell_sequence,
            reset_mask, a PackedSequence, autocast, a dropout that is on, an initial state with a
            projection that loses precision in being inverted. And the modules' own errors.
    """
    _check_packages()
    if not isinstance(model, nn.Module):
        raise TypeError(f"export: expected a torch.nn.Module, got {type(model).__name__}")
    if not kwargs.pop("dynamo", True):
        raise TypeError("export: only torch.onnx.export's dynamo=True can do this, got dynamo=False")
    table = {torch.ops.lstm_ext.onnx_lstm.default: _translation()}
    table |= kwargs.pop("custom_translation_table", None) or {}
    if isinstance(args, Tensor):
        args = (args,)
    with _exportable(model) as refusals:
        try:
            return torch.onnx.export(
                model,
                args,
                path,
                dynamo=True,
                dynamic_shapes=dynamic_shapes,
                custom_translation_table=table,
                **kwargs,
            )
        except Exception:
            if refusals:  # torch tells of it in pages
                raise refusals[0].with_traceback(None) from None
            raise


def _check_packages() -> None:
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"lstm_ext.onnx.export needs {package}, which is not there: "
                "pip install onnx onnxscript",
                name=package,
            ) from error


# --- the operator ---------------------------------------------------------------------------------


@torch.library.custom_op("lstm_ext::onnx_lstm", mutates_args=())
def _onnx_lstm(
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


@_onnx_lstm.register_fake
def _(X, W, R, B, sequence_lens, initial_h, initial_c, P):
    steps, batch, _ = X.shape
    D, hidden = W.size(0), R.size(2)
    return (
        X.new_empty(steps, D, batch, hidden),
        X.new_empty(D, batch, hidden),
        X.new_empty(D, batch, hidden),
    )


@functools.cache
def _translation() -> Any:
    """The operator as its node."""
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

    return onnx_lstm


def _ordered(rows: Tensor, parts: int, order: tuple[int, ...]) -> Tensor:
    chunks = rows.chunk(parts)
    return torch.cat([chunks[k] for k in order])


def _iofc(rows: Tensor) -> Tensor:
    """Rows i, o, f, c, ONNX's order, from i, f, g, o."""
    return _ordered(rows, 4, (0, 3, 1, 2))


def _ifgo(rows: Tensor) -> Tensor:
    return _ordered(rows, 4, (0, 2, 3, 1))


# --- weights --------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """Constants of one node; D directions side by side."""

    W: Tensor  # (D, 4H, in)
    R: Tensor  # (D, 4H, H)
    B: Tensor | None  # (D, 8H)
    P: Tensor | None  # (D, 3H)
    projection: Tensor | None  # (D, H, P), what h is multiplied by
    inverse: Tensor | None  # (D, P, H), of the projection: h0 of H units from the one of P


@torch.no_grad()
def _layer(module: LSTM | LSTMCell, suffixes: list[str], refuse: Any) -> _Layer:
    """The node of one layer, from the parameters with these suffixes."""

    def stacked(name: str) -> list[Tensor]:
        return [getattr(module, name + suffix).detach() for suffix in suffixes]

    w, r, bias, peepholes = stacked("weight_ih"), stacked("weight_hh"), None, None
    projection = inverse = None
    if module.bias:
        pairs = zip(stacked("bias_ih"), stacked("bias_hh"), strict=True)
        bias = torch.stack([torch.cat([_iofc(b) for b in pair]) for pair in pairs])
    if module.peephole:
        peepholes = torch.stack([_ordered(p, 3, (0, 2, 1)) for p in stacked("weight_ch")])
    if getattr(module, "proj_size", 0):
        hr = [p.double() for p in stacked("weight_hr")]
        dtype = r[0].dtype
        r = [(a.double() @ b).to(dtype) for a, b in zip(r, hr, strict=True)]
        projection = torch.stack([p.T for p in hr]).to(dtype)
        # W_hr inverse = 1, so that R takes from the widened state what W_hh takes from h0.
        singular = torch.linalg.svdvals(torch.stack(hr))
        if bool((singular[:, -1] > singular[:, 0] * torch.finfo(dtype).eps ** 0.5).all()):
            inverse = torch.linalg.pinv(torch.stack(hr)).transpose(1, 2).to(dtype)
    return _Layer(
        torch.stack([_iofc(t) for t in w]),
        torch.stack([_iofc(t) for t in r]),
        bias,
        peepholes,
        projection,
        inverse,
    )


# --- forward, while exporting ---------------------------------------------------------------------


class _Exporter:
    """The forwards, for the modules of one model.

    refusals: errors raised while tracing, which torch wraps, or takes as a reason to try again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.refusals: list[Exception] = []
        self.names: dict[nn.Module, str] = {}  # of what is a node
        self.cnns: set[nn.Module] = set()
        self.buffers: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules():
            if isinstance(module, (LSTM, LSTMCell)):
                self.names[module] = f"{name or 'the model itself'} ({type(module).__name__})"
                self._check(module)
            elif isinstance(module, CNNLSTM) and isinstance(module.lstm, LSTM):
                self.cnns.add(module)

    def _check(self, module: LSTM | LSTMCell) -> None:
        own = module._variants()
        if getattr(module, "return_cell_sequence", False):
            own["return_cell_sequence"] = True
        for name in ("layer_norm", "zoneout", "return_cell_sequence"):
            if name in own:
                raise self.refuse(module, f"ONNX's LSTM has no {name}; got {own[name]!r}")
        between = getattr(module, "dropout", 0) if getattr(module, "num_layers", 1) > 1 else 0
        dropouts = {"dropout": between} if between else {}
        dropouts |= {k: own[k] for k in ("recurrent_dropout", "weight_dropout") if k in own}
        if module.training and dropouts:
            got = ", ".join(f"{name}={value}" for name, value in dropouts.items())
            raise self.refuse(module, f"a dropout that is on, got {got}: call model.eval() before")

    def refuse(self, module: nn.Module, text: str) -> ValueError:
        return ValueError(f"export: {self.names[module]}: {text}")

    def attach(self) -> None:
        """Give the modules the constants of their nodes, as buffers, whose names the file keeps."""
        for module in self.names:
            names = self.buffers[module] = []
            for k, suffixes in enumerate(_suffixes(module)):
                for field, tensor in _layer(module, suffixes, self.refuse)._asdict().items():
                    name = f"onnx_l{k}_{field}"
                    module._buffers[name] = tensor
                    names.append(name)

    def detach(self) -> None:
        for module, names in self.buffers.items():
            for name in names:
                module._buffers.pop(name, None)

    def run(self, forward: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(self, module, *args, **kwargs)
        except (ValueError, TypeError, RuntimeError) as error:
            self.refusals.append(error)
            raise

    def lstm(
        self,
        module: LSTM,
        input: Tensor,
        hx: States | None = None,
        *,
        lengths: Tensor | None = None,
        reset_mask: Tensor | None = None,
    ) -> Any:
        if isinstance(input, PackedSequence):
            raise self.refuse(module, "a PackedSequence is no ONNX tensor: give lengths= instead")
        if reset_mask is not None:
            raise self.refuse(module, "ONNX's LSTM has no reset_mask; got one")
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        self._check_autocast(module, input)
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(0 if module.batch_first else 1)
            if lengths is not None and lengths.dim() == 0:
                lengths = lengths.unsqueeze(0)
        if hx is None:
            module.check_input(input, None)
        else:
            check_pair(hx)
            if not batched:
                hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
            module.check_forward_args(input, hx, None)
            check_match("hidden", hx, input)
        x = input.transpose(0, 1) if module.batch_first else input
        if lengths is not None:
            if lengths.is_floating_point() or lengths.dtype == torch.bool:
                raise TypeError(f"lengths should have an integer dtype, got {lengths.dtype}")
            if lengths.dim() != 1 or lengths.size(0) != x.size(1):
                size = (x.size(1),)
                raise ValueError(f"Expected lengths of size {size}, got {tuple(lengths.shape)}")
            lengths = lengths.to(torch.int32)
        y, states = x, []
        for k, suffixes in enumerate(_suffixes(module)):
            rows = slice(k * len(suffixes), (k + 1) * len(suffixes))
            initial = None if hx is None else (hx[0][rows], hx[1][rows])
            parts, h, c = self._node(module, k, y, initial, lengths)
            states.append((h, c))
            y = _merged(parts, module.merge_mode)
        h_n, c_n = (torch.cat(s) if len(s) > 1 else s[0] for s in zip(*states, strict=True))
        if module.batch_first:
            y = y.transpose(0, 1)
        if not batched:
            y = y.squeeze(0 if module.batch_first else 1)
            h_n, c_n = h_n.squeeze(1), c_n.squeeze(1)
        return (y.chunk(2, dim=-1) if module.merge_mode is None else y), (h_n, c_n)

    def cell(self, module: LSTMCell, input: Tensor, hx: States | None = None) -> States:
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        self._check_autocast(module, input)
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
        if input.size(1) != module.input_size:
            raise RuntimeError(
                "input has inconsistent input_size: "
                f"got {input.size(1)} expected {module.input_size}"
            )
        if hx is not None:
            check_pair(hx, "lstm_cell")
            h, c = hx if batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
            module._check_state(h, 0, input.size(0))
            module._check_state(c, 1, input.size(0))
            check_match("hidden", (h, c), input)
            hx = (h.unsqueeze(0), c.unsqueeze(0))
        _, h, c = self._node(module, 0, input.unsqueeze(0), hx, None)
        h, c = h.squeeze(0), c.squeeze(0)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))

    def cnn(self, module: CNNLSTM, input: Tensor, hx: Any = None, **options: Any) -> Any:
        """The frames past a length go through the cnn too: no size then hangs on their number."""
        features = module._features(input.flatten(0, 1))
        return module.lstm(features.unflatten(0, input.shape[:2]), hx, **options)

    def _node(
        self, module: LSTM | LSTMCell, k: int, x: Tensor, hx: States | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Layer k: x (T, B, in) to y (T, D, B, P), h_n (D, B, P) and c_n (D, B, H)."""
        layer = _Layer(*(getattr(module, f"onnx_l{k}_{field}") for field in _Layer._fields))
        h0, c0 = (None, None) if hx is None else hx
        wide = h0
        if layer.projection is not None and h0 is not None:
            if layer.inverse is None:
                raise self.refuse(
                    module,
                    "ONNX's LSTM has no projection, and an initial state can be given only by "
                    f"inverting weight_hr_l{k}, which loses too much precision: got one whose "
                    "rows are nearly dependent",
                )
            wide = h0 @ layer.inverse
        y, h, c = _onnx_lstm(x, layer.W, layer.R, layer.B, lengths, wide, c0, layer.P)
        if layer.projection is not None:
            y, h = y @ layer.projection, h @ layer.projection
        if hx is not None and lengths is not None:
            # The specification does not say what the states are after no steps.
            taken = (lengths > 0).view(1, -1, 1)
            h, c = torch.where(taken, h, h0), torch.where(taken, c, c0)
        return y, h, c

    def _check_autocast(self, module: nn.Module, input: Tensor) -> None:
        if autocast_is_on(input.device.type):
            raise self.refuse(module, "autocast is on: convert model and inputs to its dtype")


def _suffixes(module: LSTM | LSTMCell) -> list[list[str]]:
    """Of the names of parameters: a list a layer, an entry a direction."""
    if isinstance(module, LSTMCell):
        return [[""]]
    flat, D = module._suffixes(), 1 + module.bidirectional
    return [flat[k : k + D] for k in range(0, len(flat), D)]


def _merged(y: Tensor, mode: str | None) -> Tensor:
    """(T, B, D*P) or, merged, (T, B, P) from (T, D, B, P)."""
    if y.size(1) == 1:
        return y.squeeze(1)
    if mode in ("concat", None):
        return y.transpose(1, 2).flatten(2)
    forward, backward = y.unbind(1)
    if mode == "mul":
        return forward * backward
    total = forward + backward
    return total if mode == "sum" else total / 2


_lock = threading.RLock()


@contextlib.contextmanager
def _exportable(model: nn.Module) -> Iterator[list[Exception]]:
    """Within it the model's lstm_ext modules compute by nodes; gives what they refused.

    Their classes' forward is replaced, which a subclass's own forward calls too; modules of other
    models, in other threads, run as ever.
    """
    exporter = _Exporter(model)
    kinds = (
        (LSTM, exporter.names, _Exporter.lstm),
        (LSTMCell, exporter.names, _Exporter.cell),
        (CNNLSTM, exporter.cnns, _Exporter.cnn),
    )
    with _lock, contextlib.ExitStack() as stack:
        stack.callback(exporter.detach)
        exporter.attach()
        for kind, members, traced in kinds:
            stack.callback(setattr, kind, "forward", kind.forward)
            kind.forward = _replaced(kind.forward, members, traced, exporter)
        yield exporter.refusals


def _replaced(original: Any, members: Any, traced: Any, exporter: _Exporter) -> Any:
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self in members:
            return exporter.run(traced, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return forward
