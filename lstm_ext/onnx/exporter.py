"""What lstm_ext's modules are during an ONNX export: constants, and a forward by nodes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.rnn import PackedSequence
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lstm_ext.cnn import CNNLSTM
from lstm_ext.compat import States, check_match, check_pair
from lstm_ext.lstm_cell import LSTMCell
from lstm_ext.modules import LSTM
from lstm_ext.onnx.node import (
    Held,
    NodeConstants,
    checked_weights,
    held,
    lstm_node,
    merged,
    node_constants,
    product_node,
    weight_names,
)
from lstm_ext.ops import autocast_is_on
from lstm_ext.quantized import QuantizedLSTM, QuantizedLSTMCell
from lstm_ext.steps import lengths_tensor

# Where a module has its name in the model during an export.
NAME = "_onnx_name"
# Hooks that make a weight of parameters whenever the module runs.
_WEIGHT_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)


class Exporter:
    """The forwards, for the modules of one model.

    refusals: errors raised while tracing, which torch wraps, or takes as a reason to try again.
    thread: the one that exports.
    """

    def __init__(self, model: nn.Module) -> None:
        self.refusals: list[Exception] = []
        self.thread = threading.get_ident()
        self.names: dict[nn.Module, str] = {}
        self.buffers: dict[nn.Module, list[str]] = {}
        # By the names of module and weight: as it was; and those made by a hook.
        self.weights: dict[tuple[str, str], Held] = {}
        self.hooked: set[tuple[str, str]] = set()
        self.stale = False
        for name, module in model.named_modules():
            node = isinstance(module, (LSTM, LSTMCell))
            if node or (isinstance(module, CNNLSTM) and isinstance(module.lstm, LSTM)):
                self.names[module] = f"{name or 'the model itself'} ({type(module).__name__})"
            if node:
                self._check(module)

    def _check(self, module: LSTM | LSTMCell) -> None:
        if isinstance(module, (QuantizedLSTM, QuantizedLSTMCell)):
            text = "ONNX's LSTM has no weights of 8 bits: export what dequantize() returns"
            raise self.refuse(module, text)
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
        return ValueError(f"export: {self._name(module)}: {text}")

    def _name(self, module: nn.Module) -> str:
        return self.names.get(module) or module.__dict__[NAME]

    def attach(self) -> None:
        """Give the modules the constants of their nodes, as buffers, whose names the file keeps."""
        for module, own_name in self.names.items():
            module.__dict__[NAME] = own_name
            names = self.buffers[module] = []
            if isinstance(module, CNNLSTM):
                continue
            self._run_hooks(module)
            module.__dict__["_run_layer"] = self._past_forward(module)
            for k, directions in enumerate(checked_weights(module)):
                for field, tensor in node_constants(directions)._asdict().items():
                    name = f"onnx_l{k}_{field}"
                    # A buffer that is None makes torch.export fail at first.
                    (module.__dict__ if tensor is None else module._buffers)[name] = tensor
                    names.append(name)

    def _past_forward(self, module: LSTM | LSTMCell) -> Any:
        """What a forward other than the one here comes to."""

        # No method: torch.export may copy the module, with all that it holds.
        def refuse(*args: Any, **kwargs: Any) -> Any:
            self._check_thread(module)
            text = (
                "it ran by a forward taken from it or its class before the export, as what "
                "replaces a module's forward may call: undo that before"
            )
            self.refusals.append(self.refuse(module, text))
            raise self.refusals[-1]

        return refuse

    def _run_hooks(self, module: LSTM | LSTMCell) -> None:
        """Let hooks make their weights of the parameters as they are now."""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _WEIGHT_HOOKS):
                if isinstance(hook, SpectralNorm) and module.training:
                    raise self.refuse(module, "spectral_norm in training: call model.eval() before")
                hook(module, ())
                name = getattr(hook, "name", None) or hook._tensor_name
                self.hooked.add((self._name(module), name))

    def start(self, model: nn.Module, args: Any) -> None:
        """A hook of the model's: note the weights that the constants were made of. They are other
        tensors by now, for torch.export has put its own in their place."""
        if not torch.compiler.is_dynamo_compiling():
            for module in self.buffers:
                names = () if isinstance(module, CNNLSTM) else weight_names(module)
                for name in itertools.chain.from_iterable(names):
                    self.weights[self._name(module), name] = held(module, name)

    def _check_weights(self, module: LSTM | LSTMCell, k: int) -> None:
        """Refuse what is not what the constants were made of."""
        for name in weight_names(module)[k]:
            key = self._name(module), name
            now, before = held(module, name), self.weights[key]
            got = f"another {name} while it ran, set or given by torch.func.functional_call"
            if now.place == before.place:
                if key in self.hooked:
                    continue
                if now.tensor is before.tensor:
                    if now.versions == before.versions:
                        continue
                    got = f"{name} changed in place while it ran"
            self.stale = True
            raise self.refuse(
                module,
                f"the constants of a node are made before the model runs; got {got}: set the "
                "module's parameter before, or use torch.nn.utils.parametrize",
            )

    def detach(self) -> None:
        for module, names in self.buffers.items():
            module.__dict__.pop(NAME, None)
            module.__dict__.pop("_run_layer", None)
            for name in names:
                module._buffers.pop(name, None)
                module.__dict__.pop(name, None)

    def run(self, forward: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """One of the forwards below, for a module."""
        self._check_thread(module)
        try:
            return forward(self, module, *args, **kwargs)
        except Exception as error:
            # The others are torch's own.
            if type(error) in (ValueError, TypeError, RuntimeError, AttributeError):
                self.refusals.append(error)
            raise

    def _check_thread(self, module: nn.Module) -> None:
        if not self._is_elsewhere():
            return
        raise RuntimeError(
            f"{self._name(module)} is being exported to ONNX and has no weights of its own until "
            "that is done, got a call of it in another thread"
        )

    def _is_elsewhere(self) -> bool:
        # Dynamo, which traces no question for the thread, runs in the one that exports.
        return not torch.compiler.is_dynamo_compiling() and threading.get_ident() != self.thread

    def refuse_stranger(self, module: nn.Module) -> None:
        """Raise where the export comes to a module that is none of the model's."""
        if torch.compiler.is_dynamo_compiling() or self._is_elsewhere():
            return
        self.refusals.append(
            ValueError(
                f"export: {module} ran, which is no submodule of the model, as in a plain list: "
                "make it one, say by a torch.nn.ModuleList"
            )
        )
        raise self.refusals[-1]

    def lstm(
        self,
        module: LSTM,
        input: Tensor,
        hx: States | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
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
            if isinstance(lengths, Tensor) and lengths.dim() == 0:
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
            if isinstance(lengths, (list, tuple)):
                raise TypeError("lengths should be a tensor in an export: a list would be fixed")
            lengths = lengths_tensor(lengths, x.size(1)).to(torch.int32)
        y, states = x, []
        D = 1 + module.bidirectional
        for k in range(module.num_layers):
            rows = slice(k * D, (k + 1) * D)
            initial = None if hx is None else (hx[0][rows], hx[1][rows])
            parts, h, c = self._node(module, k, y, initial, lengths)
            states.append((h, c))
            y = merged(parts, module.merge_mode)
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
        layer = NodeConstants(
            *(getattr(module, f"onnx_l{k}_{field}") for field in NodeConstants._fields)
        )
        if not torch.compiler.is_dynamo_compiling():
            self._check_weights(module, k)
        elif self.stale:  # torch's second try, which does not see what the first did
            raise ValueError("export: refused before")
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
            wide = product_node(h0, layer.inverse)
        y, h, c = lstm_node(x, layer.W, layer.R, layer.B, lengths, wide, c0, layer.P)
        if layer.projection is not None:
            y, h = (product_node(t, layer.projection) for t in (y, h))
        if hx is not None and lengths is not None:
            # The specification does not say what the states are after no steps.
            taken = (lengths > 0).view(1, -1, 1)
            h, c = torch.where(taken, h, h0), torch.where(taken, c, c0)
        return y, h, c

    def _check_autocast(self, module: nn.Module, input: Tensor) -> None:
        if autocast_is_on(input.device.type):
            raise self.refuse(module, "autocast is on: convert model and inputs to its dtype")
