"""Other LSTMs to stand beside, each made from the weights of an nn.LSTM.

A peer that is not installed, or cannot run a problem, says why: the row then has the reason instead
of a time. nn.LSTM itself is cuDNN on CUDA and, where oneDNN has the problem, oneDNN on a CPU.
"""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstm_ext
from bench.records import OURS, PEER
from bench.suites import QUANTIZED, Problem
from bench.timing import Builder, drop_in
from bench.work import each_step


class Unsupported(Exception):
    """The peer does not do this."""


def installed(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unsupported(f"{package} is not installed ({error})") from None


def plain(problem: Problem, what: str, *, layers: bool = False) -> None:
    """Refuses what only nn.LSTM has; without ``layers``, more than one layer or direction too."""
    refused = {
        "packed input": problem.lengths is not None,
        "projections": problem.proj_size > 0,
        "a stack of two modules": problem.first_bidirectional,
        "cell": problem.cell,
        "more than one layer": not layers and problem.num_layers > 1,
        "two directions": not layers and problem.bidirectional,
    }
    if reasons := [name for name, has in refused.items() if has]:
        raise Unsupported(f"{what} has no {', no '.join(reasons)}")


# --- loops in Python ------------------------------------------------------------------------------


class Loop(nn.Module):
    """nn.LSTM's layers and directions, each a Python loop over the steps."""

    what = "a loop"

    def __init__(self, reference: nn.LSTM, problem: Problem, mode: str) -> None:
        super().__init__()
        plain(problem, self.what, layers=True)
        self.hidden_size = problem.hidden_size
        self.directions = 2 if problem.bidirectional else 1
        for name, parameter in reference.named_parameters():
            setattr(self, name, nn.Parameter(parameter.detach().clone()))
        self.suffixes = [
            [f"_l{layer}{end}" for end in ("", "_reverse")[: self.directions]]
            for layer in range(problem.num_layers)
        ]

    def weights(self, suffix: str) -> tuple[Tensor, ...]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return tuple(getattr(self, name + suffix) for name in names)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        for suffixes in self.suffixes:
            outputs = [self.direction(x, suffixes[0])]
            if self.directions == 2:
                outputs.append(self.direction(x.flip(0), suffixes[1]).flip(0))
            x = torch.cat(outputs, -1) if self.directions == 2 else outputs[0]
        return x, None

    def direction(self, x: Tensor, suffix: str) -> Tensor:
        raise NotImplementedError


class CellLoop(Loop):
    """nn.LSTMCell at each step, as one writes it."""

    what = "a loop over nn.LSTMCell"

    def __init__(self, reference: nn.LSTM, problem: Problem, mode: str) -> None:
        super().__init__(reference, problem, mode)
        self.cells = {}  # not a submodule: the parameters are this module's
        for suffixes in self.suffixes:
            for suffix in suffixes:
                weight_ih, *_ = self.weights(suffix)
                cell = nn.LSTMCell(weight_ih.size(1), self.hidden_size, device="meta")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    setattr(cell, name, getattr(self, name + suffix))
                self.cells[suffix] = cell

    def direction(self, x: Tensor, suffix: str) -> Tensor:
        return each_step(self.cells[suffix], x)[0]


def _step(gates: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (gates + h @ weight_hh.t()).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class CompiledLoop(Loop):
    """The input's product for all steps at once, then a step compiled by torch.compile.

    The step and not the whole loop, which would be unrolled: its compilation takes minutes.
    """

    what = "a compiled loop"

    def __init__(self, reference: nn.LSTM, problem: Problem, mode: str) -> None:
        super().__init__(reference, problem, mode)
        torch._dynamo.reset()  # no more than a row's shapes: else it would compile for any
        self.step = torch.compile(_step, dynamic=False)

    def direction(self, x: Tensor, suffix: str) -> Tensor:
        weight_ih, weight_hh, bias_ih, bias_hh = self.weights(suffix)
        products = F.linear(x, weight_ih, bias_ih + bias_hh)
        h = c = x.new_zeros(x.size(1), self.hidden_size)
        outputs = []
        for gates in products:
            h, c = self.step(gates, h, c, weight_hh)
            outputs.append(h)
        return torch.stack(outputs)


# --- other packages -------------------------------------------------------------------------------


class OnnxRuntime(nn.Module):
    """ONNX Runtime on the CPU: one LSTM node a layer. Inference only."""

    DTYPES = (torch.float32, torch.float16)

    def __init__(self, reference: nn.LSTM, problem: Problem, mode: str) -> None:
        super().__init__()
        runtime = installed("onnxruntime")
        if mode != "inference":
            raise Unsupported("inference only")
        for package in ("onnx", "onnxscript"):
            installed(package)
        parameter = next(reference.parameters())
        if parameter.device.type != "cpu":
            raise Unsupported("only its CPU engine stands here")
        if parameter.dtype not in self.DTYPES:
            raise Unsupported(f"no LSTM of {str(parameter.dtype).removeprefix('torch.')}")
        plain(problem, "this peer", layers=True)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads may spin while it runs, and not into the next module's sample.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = runtime.InferenceSession(
            self.export(reference, problem), options, providers=["CPUExecutionProvider"]
        )
        self.name = self.session.get_inputs()[0].name

    @staticmethod
    def export(reference: nn.LSTM, problem: Problem) -> bytes:
        import lstm_ext.onnx

        example = next(reference.parameters()).new_zeros(
            problem.steps, problem.batch, problem.input_size
        )
        model = lstm_ext.LSTM.from_torch(reference).eval()
        written = io.BytesIO()
        log = logging.getLogger("torch.onnx")
        level = log.level
        log.setLevel(logging.ERROR)  # it warns of packages that are not there
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lstm_ext.onnx.export(model, (example,), verbose=False).save(written)
        finally:
            log.setLevel(level)
        return written.getvalue()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        output, *_ = self.session.run(None, {self.name: x.numpy()})
        return torch.from_numpy(output), None


class FlashRNN(nn.Module):
    """FlashRNN's fused CUDA kernel, and the input's product, which it does not do.

    It rounds c to the dtype at each step: in half types the check may say that it differs.
    """

    backend = "cuda_fused"

    def __init__(self, reference: nn.LSTM, problem: Problem, mode: str) -> None:
        super().__init__()
        package = installed("flashrnn")
        plain(problem, "FlashRNN")
        parameter = next(reference.parameters())
        if self.backend != "vanilla" and parameter.device.type != "cuda":
            raise Unsupported("a GPU only")
        dtype = str(parameter.dtype).removeprefix("torch.")
        self.config = package.FlashRNNConfig(
            backend=self.backend,
            function="lstm",
            hidden_dim=problem.hidden_size,
            num_heads=1,
            batch_size=problem.batch,
            input_shape="TBGHD",
            output_shape="STBHD",
            dtype=dtype,
            dtype_b=dtype,
            dtype_r=dtype,
            dtype_w=dtype,
        )
        self.call: Callable[..., Any] = package.flashrnn
        for name, parameter in reference.named_parameters():
            setattr(self, name, nn.Parameter(parameter.detach().clone()))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        H = self.config.hidden_dim
        products = F.linear(x, self.weight_ih_l0).view(*x.shape[:2], 4, 1, H)
        bias = (self.bias_ih_l0 + self.bias_hh_l0).view(4, 1, H)
        weight = self.weight_hh_l0.view(4, 1, H, H)
        states, _ = self.call(products, weight, bias, config=self.config)
        return states[0].squeeze(2), None  # h; (T, B, 1, H) without its heads


class Haste(nn.Module):
    """Haste's CUDA kernels; without them its package computes in a Python loop."""

    def __init__(self, reference: nn.LSTM, problem: Problem, mode: str) -> None:
        super().__init__()
        package = installed("haste_pytorch")
        plain(problem, "Haste")
        parameter = next(reference.parameters())
        if parameter.device.type != "cuda":
            raise Unsupported("a GPU only: on a CPU it is a loop in Python")
        if parameter.dtype not in (torch.float32, torch.float64):
            raise Unsupported("float32 and float64 only")
        self.lstm = package.LSTM(problem.input_size, problem.hidden_size)
        self.lstm.from_native_weights(*(p.detach() for p in reference.parameters()))
        self.lstm.to(parameter)

    def forward(self, x: Tensor | PackedSequence) -> tuple[Tensor, None]:
        return self.lstm(x)[0], None


def float_weights(reference: nn.Module, problem: Problem, mode: str) -> nn.Module:
    """lstm_ext.LSTM with the weights as they are, where the others have 8 bits."""
    if mode != QUANTIZED:
        raise Unsupported("it is lstm_ext itself where nothing is quantized")
    return drop_in(lstm_ext.LSTM)(reference, problem, "inference")


def rows_of_8_bits(reference: nn.Module, problem: Problem, mode: str) -> nn.Module:
    """lstm_ext's with activations of 8 bits too."""
    module = float_weights(reference, problem, mode)
    return lstm_ext.quantize(module, activation_bits=8)


#: What may stand beside nn.LSTM, by the name that ``--peer`` takes.
PEERS: dict[str, Builder] = {
    "cell-loop": CellLoop,
    "compiled-loop": CompiledLoop,
    "onnxruntime": OnnxRuntime,
    "flashrnn": FlashRNN,
    "haste": Haste,
    "float": float_weights,
    "8-bit-rows": rows_of_8_bits,
}


def builders(names: list[str], by_compile: bool = False) -> dict[str, Builder]:
    """nn.LSTM first, then the named peers, lstm_ext last. by_compile: each by torch.compile."""
    chosen = {PEER: drop_in(nn.LSTM)}
    chosen |= {name: PEERS[name] for name in names}
    chosen |= {OURS: drop_in(lstm_ext.LSTM)}
    if not by_compile:
        return chosen
    return {name: compiled(builder, afresh=name == PEER) for name, builder in chosen.items()}


def compiled(builder: Builder, afresh: bool) -> Builder:
    """By torch.compile. afresh: what was compiled before is forgotten, for torch.compile gives up
    after so many problems."""

    def make(reference: nn.Module, problem: Problem, mode: str) -> nn.Module:
        if afresh:
            torch._dynamo.reset()
        module = builder(reference, problem, mode)
        module.compile()
        return module

    return make
