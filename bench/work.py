"""What a row runs: the module of a problem, its inputs, one call of it, and what it computes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext
from bench.suites import QUANTIZED, SECOND, Problem

LSTMClass = Callable[..., nn.Module]
Input = Tensor | PackedSequence

# Inputs of the smallest problems stay below this many: their caches are warm with more than x.
MOST_INPUTS = 1024
# One rounding of the arithmetic, relative to a tensor's largest element, and then some in float32
# and float64, whose sums are long (tests/tolerances.py).
ROUNDING = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
}
TF32_ROUNDING = 2.0**-10


class Chain(nn.Module):
    """LSTMs one after the other, for stacks that no single nn.LSTM describes."""

    def __init__(self, *lstms: nn.Module):
        super().__init__()
        self.lstms = nn.ModuleList(lstms)

    def forward(self, x):
        state = None
        for lstm in self.lstms:
            x, state = lstm(x)
        return x, state


def each_step(cell: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A loop over a cell, as one writes it: one call a step, from a zero state."""
    state, outputs = None, []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0])
    return torch.stack(outputs), state


class Stepwise(nn.Module):
    """A cell, called like a layer."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        return each_step(self.cell, x)


class Decoder(Stepwise):
    """A cell whose every h goes through a linear layer and a tanh, before the next step."""

    def __init__(self, cell: nn.Module):
        super().__init__(cell)
        self.head = nn.Linear(cell.hidden_size, cell.hidden_size)

    def forward(self, x):
        state, outputs = None, []
        for step in x:
            state = self.cell(step, state)
            outputs.append(torch.tanh(self.head(state[0])))
        return torch.stack(outputs), state


CELLS: Mapping[LSTMClass, LSTMClass] = {
    nn.LSTM: nn.LSTMCell,
    lstm_ext.LSTM: lstm_ext.LSTMCell,
}


def build(lstm: LSTMClass, problem: Problem) -> nn.Module:
    """The problem's module, made of ``lstm`` (nn.LSTM or a drop-in for it).

    Raises:
        ValueError: the problem is a cell's, and ``lstm`` has none.
    """
    if problem.cell:
        if lstm not in CELLS:
            raise ValueError(f"{problem.name}: no cell belongs to {lstm}")
        stepwise = Decoder if problem.head else Stepwise
        return stepwise(CELLS[lstm](problem.input_size, problem.hidden_size))
    if not problem.first_bidirectional:
        return lstm(
            problem.input_size,
            problem.hidden_size,
            num_layers=problem.num_layers,
            bidirectional=problem.bidirectional,
            proj_size=problem.proj_size,
        )
    first = lstm(problem.input_size, problem.hidden_size, bidirectional=True)
    rest = lstm(2 * problem.hidden_size, problem.hidden_size, num_layers=problem.num_layers - 1)
    return Chain(first, rest)


def build_on(
    device: torch.device, dtype: torch.dtype, lstm: LSTMClass, problem: Problem
) -> nn.Module:
    """As build, the parameters drawn on the device: the CPU takes seconds for a large module's."""
    with device:
        return build(lstm, problem).to(dtype)


def make_input(problem: Problem, dtype: torch.dtype, device: torch.device) -> Input:
    """Standard normal input, (T, B, I) or packed."""
    x = torch.randn(problem.steps, problem.batch, problem.input_size, device=device).to(dtype)
    if problem.lengths is None:
        return x
    return pack_padded_sequence(x, torch.tensor(problem.lengths), enforce_sorted=False)


def make_inputs(
    problem: Problem, dtype: torch.dtype, device: torch.device, cache: int
) -> list[Input]:
    """Different inputs, so many that they fill a cache of that many bytes twice."""
    one = make_input(problem, dtype, device)
    size = values(one).numel() * dtype.itemsize
    count = min(MOST_INPUTS, max(2, math.ceil(2 * cache / size)))
    return [one, *(make_input(problem, dtype, device) for _ in range(count - 1))]


def values(sequence: Input) -> Tensor:
    return sequence.data if isinstance(sequence, PackedSequence) else sequence


def with_leaf(x: Input) -> tuple[Input, Tensor]:
    """x anew, and the tensor in it, which asks for its gradient."""
    leaf = values(x).detach().clone().requires_grad_()
    return (x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf), leaf


def make_call(
    module: nn.Module, inputs: Sequence[Input], mode: str, cotangent: Tensor
) -> Callable[[], Tensor]:
    """A function without arguments that does one unit of work and returns the output.

    Each call takes the next of the inputs. Inference is a forward pass in eval mode. Training is a
    forward pass and the gradients of ``sum(output * cotangent)`` with respect to every parameter
    and the input; the cotangent is handed to backward as such, which keeps the product and the sum
    out of the timing. Second is in :func:`backward`.
    """
    if mode in ("inference", QUANTIZED):
        module.eval()
        turn = itertools.cycle(inputs)

        def forward() -> Tensor:
            with torch.inference_mode():
                return values(module(next(turn))[0])

        return forward

    module.train()
    leaves = itertools.cycle([with_leaf(x) for x in inputs])
    parameters = list(module.parameters())

    def step() -> Tensor:
        x, leaf = next(leaves)
        output = run(module, x, mode)
        backward(mode, output, leaf, cotangent)
        # Dropped here and not before the next call: gradients that one module keeps while the
        # other is timed push the other's to the top of the heap, which malloc gives back to the
        # system at each call. nn.LSTM beside itself then read 0.74 (T25 B1 H1024).
        leaf.grad = None
        for parameter in parameters:
            parameter.grad = None
        return output

    return step


def run(module: nn.Module, x: Input, mode: str) -> Tensor:
    """The output. On CUDA, nn.LSTM in the mode second goes without cuDNN, which has no second
    derivatives."""
    if mode != SECOND or not values(x).is_cuda:
        return values(module(x)[0])
    before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        return values(module(x)[0])
    finally:
        torch.backends.cudnn.enabled = before


def backward(mode: str, output: Tensor, leaf: Tensor, cotangent: Tensor) -> None:
    """Leaves the gradients of ``sum(output * cotangent)`` with all that asks for one. In the mode
    second, those of ``sum(leaf * g)``, leaf held fixed; g is the first ones' for the leaf."""
    if mode != SECOND:
        output.backward(cotangent)
        return
    (gradient,) = torch.autograd.grad(output, leaf, cotangent, create_graph=True)
    gradient.backward(leaf.detach())


def outcome(module: nn.Module, x: Input, mode: str, cotangent: Tensor) -> dict[str, Tensor]:
    """What one call computes: the output; else the gradients too, the input's as "x"."""
    if mode in ("inference", QUANTIZED):
        with torch.inference_mode():
            return {"output": values(module.eval()(x)[0])}
    x, leaf = with_leaf(x)
    output = run(module.train(), x, mode)
    backward(mode, output, leaf, cotangent.to(output))
    found = {"output": output.detach(), "x": leaf.grad}
    for name, parameter in module.named_parameters():
        found[name], parameter.grad = parameter.grad, None
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def error_of(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to a tensor's largest element; of the names in both. Of a
    tensor of zeros, such as W_hh's gradient after one step from h_0 = 0, the difference itself.

    Raises:
        ValueError: a tensor of another shape.
    """
    largest = 0.0
    for name in found.keys() & truth.keys():
        one, true = found[name], truth[name]
        if one.shape != true.shape:
            raise ValueError(
                f"{name} is {tuple(one.shape)} {str(one.dtype).removeprefix('torch.')}, "
                f"expected {tuple(true.shape)}"
            )
        one = one.to(true.device, torch.float64)
        error = float((one - true).abs().max()) / (float(true.abs().max()) or 1)
        largest = math.inf if math.isnan(error) else max(largest, error)
    return largest


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """What a result may be off by in any case, relative to its largest element."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return TF32_ROUNDING
    return ROUNDING[dtype]
