"""What the examples share: arguments, training with a progress bar, comparison, drawing.

Two models that start from the same weights and see the same batches, one with nn.LSTM and one with
lstm_ext.LSTM, are trained a step of one after a step of the other, so that their loss curves must
lie on each other and the ratio of their step times is like with like.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import lstm_ext

PEER, OURS = "nn.LSTM", "lstm_ext.LSTM"
COLOURS = {PEER: ("#9ecae1", 5), OURS: ("#08306b", 1.2)}  # and line width: ours lies on the peer's

# How far two right implementations may drift apart. Their sums run in another order, so they
# differ by rounding from the first step, and training magnifies that. Measured over 300 steps of
# char_lm.py with five pairs of seed and rate, in nats: nn.LSTM with oneDNN against nn.LSTM without
# it was apart by at most 4.8e-7 in the first 30 steps and 4.5e-2 over all; lstm_ext against either
# by at most 4.8e-7 and 4.2e-2.
EARLY_STEPS, EARLY_LIMIT = 30, 1e-5
LIMIT = 0.1


def arguments(doc: str | None, name: str, steps: int, argv: list[str] | None) -> argparse.Namespace:
    """steps, seed, out and short, as given or by default; in short mode a tenth of the steps."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, help=f"training steps, by default {steps}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="the PNG")
    parser.add_argument("--short", action="store_true", help="seconds, to see that it runs")
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = max(steps // 10, 1) if args.short else steps
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if not args.out.parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.parent}")
    torch.manual_seed(args.seed)
    return args


@dataclass
class Learner:
    """A model, its optimiser, and what happened to it."""

    name: str
    model: nn.Module
    rate: float
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds of each whole step

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.rate)

    def step(self, loss_of: Callable[..., torch.Tensor], batch: tuple[Any, ...]) -> None:
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        loss = loss_of(self.model, *batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.times.append(time.perf_counter() - begin)


def pair(make: Callable[[type[nn.Module]], nn.Module], rate: float) -> list[Learner]:
    """``make(nn.LSTM)`` and ``make(lstm_ext.LSTM)``, with the same weights."""
    peer, ours = make(nn.LSTM), make(lstm_ext.LSTM)
    ours.load_state_dict(peer.state_dict())
    return [Learner(PEER, peer, rate), Learner(OURS, ours, rate)]


def train(
    learners: list[Learner],
    steps: int,
    batch_of: Callable[[int], tuple[Any, ...]],
    loss_of: Callable[..., torch.Tensor],
) -> None:
    """``steps`` steps of each: ``loss_of(model, *batch_of(step))``, with a progress bar."""
    bar = progress(steps)
    for step in bar:
        batch = batch_of(step)
        for learner in learners:
            learner.step(loss_of, batch)
        show(bar, learners)


def progress(steps: int) -> tqdm:
    return tqdm(range(steps), unit="step", mininterval=0.5, dynamic_ncols=True)


def show(bar: tqdm, learners: list[Learner], more: str = "") -> None:
    """The losses beside a progress bar."""
    losses = ", ".join(f"{learner.name} {learner.losses[-1]:.4f}" for learner in learners)
    bar.set_postfix_str(f"loss {losses}{more}", refresh=False)


def slices(count: int, size: int, steps: int) -> list[torch.Tensor]:
    """Indices of ``steps`` random batches of ``count`` examples, epoch after epoch."""
    size = min(size, count)
    epochs = -(-steps // (count // size))
    order = [torch.randperm(count)[: count // size * size].view(-1, size) for _ in range(epochs)]
    return list(torch.cat(order)[:steps])


def curves_agree(
    peer: Any,
    ours: Any,
    *,
    early_steps: int = EARLY_STEPS,
    early_limit: float = EARLY_LIMIT,
    limit: float = LIMIT,
) -> bool:
    """Says whether the loss curves (attribute ``losses``) lie on each other."""
    gaps = [abs(a - b) for a, b in zip(peer.losses, ours.losses, strict=True)]
    early, whole = max(gaps[:early_steps]), max(gaps)
    # Written so that a NaN in either curve counts as a difference.
    agree = early <= early_limit and whole <= limit
    agree = agree and all(math.isfinite(gap) for gap in gaps)
    print(
        f"the loss curves {'lie' if agree else 'DO NOT LIE'} on each other: largest difference "
        f"{early:.1e} in the first {min(early_steps, len(gaps))} steps (limit {early_limit:g}), "
        f"{whole:.1e} over all {len(gaps)} (limit {limit:g})"
    )
    return agree


def ratio_of(peer: list[float], ours: list[float]) -> float:
    """Median of the paired ratios of times; above 1 lstm_ext is faster."""
    return statistics.median(a / b for a, b in zip(peer, ours, strict=True))


def report(
    learners: list[Learner],
    scores: dict[str, float] | None = None,
    unit: str = "",
    limit: float = LIMIT,
) -> bool:
    """Losses, times and scores of a pair in a few lines; whether their curves agree."""
    for learner in learners:
        tenth = max(len(learner.losses) // 10, 1)
        first, last = (statistics.fmean(part) for part in ends(learner.losses, tenth))
        score = f", {scores[learner.name]:.4g} {unit}" if scores else ""
        print(f"{learner.name:13} loss {first:.4f} -> {last:.4f}{score}")
    peer, ours = learners
    print(f"training step, nn.LSTM's time over lstm_ext's: {ratio_of(peer.times, ours.times):.2f}")
    return curves_agree(peer, ours, limit=limit)


def ends(values: list[float], count: int) -> tuple[list[float], list[float]]:
    """The first and the last ``count``."""
    return values[:count], values[-count:]


def picture(columns: int, title: str, height: float = 4.0) -> tuple[Figure, Any]:
    """A figure and its axes, side by side."""
    figure = Figure(figsize=(5 * columns, height), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(1, columns)


def draw_losses(axes: Any, learners: list[Learner], label: str, log: bool = False) -> None:
    for learner in learners:
        colour, width = COLOURS.get(learner.name, ("#cb181d", 1.2))
        steps = range(1, len(learner.losses) + 1)
        axes.plot(steps, learner.losses, color=colour, linewidth=width, label=learner.name)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    axes.legend()
    axes.grid(alpha=0.3)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=110)
    print(f"drawn in {path}")
