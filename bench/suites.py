"""The benchmark problems of the design, as data.

A problem that the design leaves without a number has it chosen here, beside the list it
belongs to: the step count of GNMT and of the edges, and the lengths of packed batches. The suites
host, one-step, cell, decoder, random, second, quantized, scaling and gate are not of the design.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

MODES = ("inference", "training")
# A second derivative: the gradient by the input, and its gradients by all. "both" leaves it out.
SECOND = "second"
# Inference with weights of 8 bits, lstm_ext's and torch's. "both" leaves it out.
QUANTIZED = "quantized"
# Times the forward pass: how many products a call makes, of the input's and the recurrent ones; and
# how many walks through the steps. A product has one more for its input's gradient and one for its
# weight's. Differentiated again, forward's and its input's gradient have a tangent each, and each
# weight's gradient is a sum of two products.
PRODUCTS = {"inference": 1, "training": 3, SECOND: 6, QUANTIZED: 1}
PASSES = {"inference": 1, "training": 2, SECOND: 4, QUANTIZED: 1}


@dataclass(frozen=True)
class Problem:
    """One LSTM and the shape of the batch it runs on.

    ``lengths`` holds one length a sequence and makes the batch a PackedSequence; without it
    every sequence has ``steps`` steps and the batch is a padded (T, B, I) tensor.
    ``first_bidirectional`` makes only the first layer bidirectional (GNMT's encoder), which
    takes two modules to say. ``cell`` is a loop over an nn.LSTMCell, or its counterpart; with
    ``head`` an nn.Linear (H, H) of each h and a tanh come between two steps, on both sides, whose
    work is in the times and not in flop().
    """

    steps: int
    batch: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    lengths: tuple[int, ...] | None = None
    first_bidirectional: bool = False
    cell: bool = False
    head: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        if self.lengths is not None and (
            len(self.lengths) != self.batch or max(self.lengths) != self.steps
        ):
            raise ValueError(
                f"lengths must name {self.batch} sequences, the longest of {self.steps} steps"
            )

    @property
    def name(self) -> str:
        """What ``--rows`` matches: ``T100 B32 H256``, then whatever is unusual."""
        parts = [self.label, f"T{self.steps}", f"B{self.batch}", f"H{self.hidden_size}"]
        if self.input_size != self.hidden_size:
            parts.append(f"I{self.input_size}")
        if self.num_layers > 1:
            parts.append(f"L{self.num_layers}")
        if self.proj_size:
            parts.append(f"proj{self.proj_size}")
        if self.bidirectional:
            parts.append("bi")
        if self.first_bidirectional:
            parts.append("bi-first")
        if self.cell:
            parts.append("cell")
        if self.head:
            parts.append("head")
        if self.lengths is not None:
            parts.append(f"packed{min(self.lengths)}-{max(self.lengths)}")
        return " ".join(part for part in parts if part)

    @property
    def active_rows(self) -> int:
        """Steps summed over sequences: the rows that carry data, padding not counted."""
        return self.steps * self.batch if self.lengths is None else sum(self.lengths)

    def layer_shapes(self) -> Iterator[tuple[int, int]]:
        """(input width, directions) of each layer."""
        recurrent = self.proj_size or self.hidden_size
        width = self.input_size
        for layer in range(self.num_layers):
            both = self.bidirectional or (self.first_bidirectional and layer == 0)
            directions = 2 if both else 1
            yield width, directions
            width = directions * recurrent

    def flop(self, mode: str) -> int:
        """Useful floating-point operations of one call, a multiply-add counted as two.

        A row and direction costs 2·4H·(I + P) for the gates (P is H without a projection) and
        2·H·P for the projection; the elementwise part and padding are not counted. That is the
        forward pass; see PRODUCTS.
        """
        recurrent = self.proj_size or self.hidden_size
        per_row = sum(
            directions
            * (
                2 * 4 * self.hidden_size * (width + recurrent)
                + 2 * self.hidden_size * self.proj_size
            )
            for width, directions in self.layer_shapes()
        )
        return self.active_rows * per_row * PRODUCTS[mode]


def spread(shortest: int, longest: int, count: int) -> tuple[int, ...]:
    """``count`` lengths spread evenly from ``shortest`` to ``longest``.

    They ascend, so that the packed batch comes with a real permutation.
    """
    return tuple(round(shortest + (longest - shortest) * n / (count - 1)) for n in range(count))


def square(steps: int, batch: int, hidden: int, **more) -> Problem:
    """A problem whose input is as wide as its state."""
    return Problem(steps, batch, hidden, hidden, **more)


def _deepbench_train() -> tuple[Problem, ...]:
    return (
        *(square(25, b, h) for h in (512, 1024, 2048, 4096) for b in (16, 32, 64, 128)),
        *(square(50, b, 1536) for b in (8, 16, 32)),
        *(square(150, b, 256) for b in (16, 32, 64)),
    )


def _deepbench_infer() -> tuple[Problem, ...]:
    return (
        *(square(25, b, h) for h in (512, 1024, 2048) for b in (1, 2, 4)),
        *(square(50, b, 1536) for b in (1, 2, 4)),
        *(square(150, b, 256) for b in (1, 2, 4)),
    )


def _one_step() -> tuple[Problem, ...]:
    # A policy that acts, a decoder: one step a call, as LSTMCell's.
    return tuple(square(1, b, h) for h in (64, 128, 256, 512, 1024) for b in (1, 8, 32, 128))


def _cell() -> tuple[Problem, ...]:
    # A loop over a cell and nothing else: its code stays in the caches.
    return tuple(square(8, b, h, cell=True) for h in (16, 64, 256, 1024) for b in (1, 5, 16, 64))


def _decoder() -> tuple[Problem, ...]:
    # A decoder, or a policy: other code runs between two calls of the cell.
    few, many = (16, 64, 128, 256), (1, 8, 32)
    return tuple(square(8, b, h, cell=True, head=True) for h in few for b in many)


def _random() -> tuple[Problem, ...]:
    # Of any kind, chosen by nobody: sizes whose logarithms are evenly spread, half of the hidden
    # sizes a power of two, from what takes microseconds to what takes some ten milliseconds.
    draw = random.Random(0)

    def size(least: int, most: int) -> int:
        return round(math.exp(draw.uniform(math.log(least), math.log(most))))

    problems: list[Problem] = []
    while len(problems) < 60:
        steps, batch, hidden = size(1, 300), size(1, 256), size(8, 1024)
        if draw.random() < 0.5:
            hidden = 2 ** draw.randint(3, 10)
        problem = Problem(
            steps,
            batch,
            hidden if draw.random() < 0.4 else size(1, 1024),
            hidden,
            num_layers=draw.choice((1, 1, 1, 2, 3)),
            bidirectional=draw.random() < 0.3,
            proj_size=draw.choice((0, 0, 0, 0, 0, hidden // 2)),
            lengths=spread(1, steps, batch) if batch > 1 and draw.random() < 0.15 else None,
        )
        if 1e5 < problem.flop("inference") < 3e9:
            problems.append(problem)
    return tuple(sorted(problems, key=lambda problem: problem.flop("inference")))


def _flashrnn() -> tuple[Problem, ...]:
    # One base point, T 1024 and B 16, and a sweep of each by powers of two through it.
    return (
        *(square(1024, b, 768) for b in (2, 4, 8, 16, 32, 64, 128, 256)),
        *(square(t, 16, 768) for t in (256, 512, 2048)),
    )


def _classic() -> tuple[Problem, ...]:
    return (
        square(100, 64, 512, label="fastrnns"),
        square(100, 64, 512, num_layers=4, label="appleyard"),
        # Sentences of up to 50 tokens, the usual cut in GNMT training.
        square(
            50,
            128,
            1024,
            num_layers=4,
            first_bidirectional=True,
            lengths=spread(5, 50, 128),
            label="gnmt",
        ),
    )


def _edges() -> tuple[Problem, ...]:
    # One change at a time from T 100, B 8, I = H = 128: each crosses a rule by which a vendor
    # library picks another kernel. The hidden sizes keep the input at 128, a legal width.
    t, b, i, h = 100, 8, 128, 128
    return (
        *(Problem(t, b, i, hidden) for hidden in (128, 129, 192, 193)),
        *(Problem(t, batch, i, h) for batch in (7, 9, 128, 136)),
        Problem(t, b, 100, h),
        Problem(t, b, i, h, num_layers=2),
        Problem(t, b, i, h, bidirectional=True),
        Problem(t, b, i, h, lengths=spread(5, t, b)),
    )


def _cpu() -> tuple[Problem, ...]:
    return (
        square(50, 1, 64),
        square(50, 1, 128),
        square(100, 1, 256),
        square(25, 1, 512),
        square(25, 4, 512),
        square(25, 1, 1024),
        square(150, 4, 256),
        square(100, 16, 256),
        square(50, 64, 128),
        square(50, 64, 512),
        square(100, 32, 256, lengths=spread(5, 100, 32)),
        square(100, 32, 256, proj_size=128),
        square(100, 32, 128, num_layers=2, bidirectional=True),
    )


def _host() -> tuple[Problem, ...]:
    # Next to nothing to compute: what a call costs the thread that makes it.
    t, b, h = 4, 1, 64
    return (
        square(t, b, h),
        square(t, b, h, num_layers=2),
        square(t, b, h, bidirectional=True),
        square(t, 4, h, lengths=spread(1, t, 4)),
    )


def _second() -> tuple[Problem, ...]:
    # Gradient penalties, meta-learning, products with a Hessian: smaller than what is trained.
    return (
        square(5, 1, 16),
        square(20, 8, 32),
        square(50, 1, 64),
        square(50, 32, 64),
        square(100, 16, 128),
        square(25, 4, 512),
        square(50, 64, 256),
        square(50, 32, 64, lengths=spread(5, 50, 32)),
        square(50, 32, 64, proj_size=32),
        square(50, 32, 64, num_layers=2, bidirectional=True),
        square(8, 16, 64, cell=True),
    )


def _quantized() -> tuple[Problem, ...]:
    # What a CPU serves: few sequences, and a step at a time; some batches.
    return (
        *(square(1, 1, h) for h in (256, 512, 1024, 2048)),
        square(1, 8, 512),
        square(50, 1, 128),
        square(100, 1, 256),
        square(25, 1, 512),
        square(25, 1, 1024),
        square(10, 1, 2048),
        square(25, 4, 512),
        square(25, 4, 1024),
        square(100, 16, 256),
        square(50, 64, 128),
        square(50, 64, 512),
        square(100, 8, 256, lengths=spread(5, 100, 8)),
        square(50, 4, 256, num_layers=2, bidirectional=True),
    )


def _scaling() -> tuple[Problem, ...]:
    # One size at a time from T 100, B 16, H 256: the work doubles with T and B, and grows fourfold
    # with H.
    t, b, h = SCALING_BASE
    return (
        *(square(steps, b, h) for steps in (25, 50, 100, 200, 400, 800)),
        *(square(t, batch, h) for batch in (1, 2, 4, 8, 32, 64)),
        *(square(t, b, hidden) for hidden in (64, 128, 512, 1024)),
    )


def _gate() -> tuple[Problem, ...]:
    # A few of the CPU's, seconds in all: every way through its kernels.
    return (
        square(50, 1, 64),
        square(100, 1, 256),
        square(150, 4, 256),
        square(100, 16, 256),
        square(50, 64, 128),
        square(100, 32, 256, lengths=spread(5, 100, 32)),
    )


SCALING_BASE = (100, 16, 256)

SUITES: dict[str, tuple[Problem, ...]] = {
    "host": _host(),
    "cpu": _cpu(),
    "one-step": _one_step(),
    "cell": _cell(),
    "decoder": _decoder(),
    "random": _random(),
    "deepbench-train": _deepbench_train(),
    "deepbench-infer": _deepbench_infer(),
    "flashrnn": _flashrnn(),
    "classic": _classic(),
    "edges": _edges(),
    "second": _second(),
    "quantized": _quantized(),
    "scaling": _scaling(),
    "gate": _gate(),
}

# DeepBench publishes one list for each; every other suite but one runs both unless told.
DEFAULT_MODES: dict[str, tuple[str, ...]] = {
    "deepbench-train": ("training",),
    "deepbench-infer": ("inference",),
    "second": (SECOND,),
    "quantized": (QUANTIZED,),
}


def modes_of(suite: str, wanted: str | None) -> tuple[str, ...]:
    """The modes to run: what ``--mode`` says, else the suite's own."""
    if wanted is None:
        return DEFAULT_MODES.get(suite, MODES)
    return MODES if wanted == "both" else (wanted,)
