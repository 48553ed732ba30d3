"""Why LSTMs: the adding problem over 500 steps, and how far back the gradient reaches.

Each step gives a random number and a mark; two numbers are marked, one in each half, and the answer
after the last step is their sum (Hochreiter & Schmidhuber 1997). To say 1 always has a mean square
error of 0.167. The sequences grow: 10 steps at first, twice as many whenever a network can do it.
nn.LSTM and lstm_ext.LSTM from the same weights, with a forget bias of 1 (Gers et al. 2000), see the
same batches; a plain nn.RNN gets as many steps, and goes at its own pace.

The picture: the norm of the loss's gradient with respect to the input of each of the 500 steps,
before and after training.

    python examples/long_memory.py            # half a minute on two cores
    python examples/long_memory.py --short    # does not get as far as 500 steps

Exit status: 0 if the loss curves of the two LSTMs lie on each other as far as they should, 1 if
not, 2 for a bad argument.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import side_by_side as sbs
import torch
from torch import nn

STEPS, FIRST = 500, 10  # of a sequence, at the end and at first
BATCH, HIDDEN, RATE = 32, 32, 1e-2
SOLVED = 0.02  # mean square error over WINDOW training steps at which the sequences grow
WINDOW = 30
GUESS = 1 / 6  # mean square error of saying 1


def adding(steps: int, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Inputs (steps, batch, 2), number and mark, and answers (batch,)."""
    numbers = torch.rand(steps, batch, generator=generator)
    marks, each = torch.zeros(steps, batch), torch.arange(batch)
    for start, end in ((0, steps // 2), (steps // 2, steps)):
        marks[torch.randint(start, end, (batch,), generator=generator), each] = 1
    return torch.stack([numbers, marks], dim=2), (numbers * marks).sum(0)


class Adder(nn.Module):
    """``recurrent``: nn.RNN, nn.LSTM or its drop-in."""

    def __init__(self, recurrent: Callable[[int, int], nn.Module]):
        super().__init__()
        self.recurrent = recurrent(2, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)
        if self.recurrent.bias_ih_l0.numel() == 4 * HIDDEN:
            with torch.no_grad():  # rows i, f, g, o
                self.recurrent.bias_ih_l0[HIDDEN : 2 * HIDDEN] = 1
                self.recurrent.bias_hh_l0[HIDDEN : 2 * HIDDEN] = 0

    def forward(self, x):
        """(T, B, 2) -> (B,) sums."""
        return self.head(self.recurrent(x)[0][-1]).squeeze(1)


def loss_of(model: nn.Module, x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    return (model(x) - answer).pow(2).mean()


@dataclass
class Course:
    """Batches that grow with what the learner can do."""

    learner: sbs.Learner
    generator: torch.Generator
    steps: int = FIRST
    since: int = 0  # training steps at this length

    def batch(self) -> tuple[torch.Tensor, ...]:
        """The next batch; before it, the sequences grow if the learner is ready."""
        if self.since >= WINDOW and statistics.fmean(self.learner.losses[-WINDOW:]) < SOLVED:
            if self.steps < STEPS:
                self.steps, self.since = min(2 * self.steps, STEPS), 0
        self.since += 1
        return adding(self.steps, BATCH, self.generator)


def learn(course: Course, others: list[sbs.Learner], steps: int) -> Iterator[int]:
    """Trains, others on the same batches; yields after each training step."""
    for step in range(steps):
        batch = course.batch()
        for learner in (course.learner, *others):
            learner.step(loss_of, batch)
        yield step


def gradient_norms(model: nn.Module, seed: int = 1) -> tuple[list[float], float]:
    """The norm of the gradient of the input of every step (STEPS), and the mean square error.

    Of one batch of 256 sequences of STEPS steps.
    """
    x, answer = adding(STEPS, 256, torch.Generator().manual_seed(seed))
    x.requires_grad_()
    loss = loss_of(model, x, answer)
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient.flatten(1).norm(dim=1).tolist(), loss.item()


def main(argv: list[str] | None = None) -> int:
    args = sbs.arguments(__doc__, "long_memory", 1000, argv)
    peer, ours = sbs.pair(Adder, RATE)
    rnn = sbs.Learner("nn.RNN", Adder(nn.RNN), RATE)
    before = {learner.name: gradient_norms(learner.model)[0] for learner in (ours, rnn)}

    course, own = (
        Course(learner, torch.Generator().manual_seed(args.seed)) for learner in (ours, rnn)
    )
    bar = sbs.progress(args.steps)
    both = zip(learn(course, [peer], args.steps), learn(own, [], args.steps), strict=True)
    for _ in both:
        sbs.show(bar, [peer, ours, rnn], f"; length {course.steps}, RNN {own.steps}")
        bar.update()
    bar.close()

    after, errors = {}, {}
    for learner in (peer, ours, rnn):
        after[learner.name], errors[learner.name] = gradient_norms(learner.model)
    print(
        f"mean square error at {STEPS} steps (to guess: {GUESS:.4f}), longest sequences learnt on:"
    )
    for learner, length in ((peer, course.steps), (ours, course.steps), (rnn, own.steps)):
        far = after[learner.name][: STEPS // 2]
        near = after[learner.name][STEPS // 2 :]
        reach = statistics.fmean(far) / max(statistics.fmean(near), 1e-45)
        print(
            f"{learner.name:13} {errors[learner.name]:.4f}, {length} steps; gradient of the first "
            f"half over that of the second {reach:.1e}"
        )
    print(
        f"training step, nn.LSTM's time over lstm_ext's: {sbs.ratio_of(peer.times, ours.times):.2f}"
    )
    agree = sbs.curves_agree(peer, ours, limit=0.5)

    figure, (left, right) = sbs.picture(2, f"The adding problem over {STEPS} steps")
    sbs.draw_losses(left, [peer, ours, rnn], "training loss (lengths grow)", log=True)
    left.axhline(GUESS, color="#636363", linestyle=":", linewidth=1)
    for name, colour, title in (
        (ours.name, "#08306b", "LSTM, forget bias 1"),
        (rnn.name, "#cb181d", "plain RNN"),
    ):
        # A logarithmic axis has no place for what has vanished altogether.
        for norms, style, when in ((before, ":", "before"), (after, "-", "after training")):
            values = [norm if norm > 0 else float("nan") for norm in norms[name]]
            right.semilogy(values, style, color=colour, linewidth=1, label=f"{title}, {when}")
    right.set_ylim(bottom=1e-20)
    right.set_xlabel("step of the sequence")
    right.set_ylabel("norm of the loss's gradient, of its input")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    sbs.save(figure, args.out)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
