"""Forecasts the carbon dioxide in the air above Mauna Loa, a year ahead, week by week.

The series is that of statsmodels: weekly means, 1958 to 2001. A model reads two years and says the
next; it learns from the weeks before 1990 and is judged on those after, beside what needs no model:
last year again, with last year's growth. Once with nn.LSTM, once with lstm_ext.LSTM, from the same
weights.

    python examples/forecast.py            # half a minute on two cores
    python examples/forecast.py --short    # a few seconds

Exit status: 0 if the loss curves of the two lie on each other, 1 if not, 2 for a bad argument.
"""

from __future__ import annotations

import sys

import side_by_side as sbs
import torch
from statsmodels.datasets import co2
from torch import nn

PAST, AHEAD, YEAR = 104, 52, 52
SPLIT = "1990"
SCALE = 5.0  # ppm; about the amplitude of a year


class Forecaster(nn.Module):
    """The past relative to its last value -> the future relative to it, both in units of SCALE."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm(1, 48)
        self.head = nn.Linear(48, AHEAD)

    def forward(self, past):
        """(PAST, B) ppm -> (AHEAD, B) ppm."""
        last = past[-1]
        _, (h, _) = self.lstm(((past - last) / SCALE).unsqueeze(2))
        return last + SCALE * self.head(h[-1]).T


def read() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and test weeks, (weeks,) ppm; the few missing ones are interpolated."""
    series = co2.load_pandas().data["co2"].interpolate()
    parts = series[series.index < SPLIT], series[series.index >= SPLIT]
    return tuple(torch.tensor(part.to_numpy(), dtype=torch.float32) for part in parts)


def windows(weeks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every past (PAST, windows) and the future (AHEAD, windows) that followed it."""
    every = weeks.unfold(0, PAST + AHEAD, 1).T
    return every[:PAST], every[PAST:]


def loss_of(model, past, future):
    return ((model(past) - future) / SCALE).pow(2).mean()


def main(argv: list[str] | None = None) -> int:
    args = sbs.arguments(__doc__, "forecast", 800, argv)
    training, test = read()
    past, future = windows(training)
    test_past, test_future = windows(test)
    learners = sbs.pair(Forecaster, 3e-3)
    batches = sbs.slices(past.size(1), 64, args.steps)
    sbs.train(learners, args.steps, lambda n: (past[:, batches[n]], future[:, batches[n]]), loss_of)

    with torch.inference_mode():
        forecasts = {learner.name: learner.model(test_past) for learner in learners}
    error = {name: (y - test_future).abs().mean().item() for name, y in forecasts.items()}
    again = test_past[-AHEAD:] + (test_past[-1] - test_past[-1 - YEAR])
    agree = sbs.report(learners, error, "ppm mean error a year ahead, 1990-2001")
    print(f"last year again, with its growth: {(again - test_future).abs().mean().item():.4g} ppm")

    figure, (left, right) = sbs.picture(2, "CO2 above Mauna Loa, a year ahead")
    sbs.draw_losses(left, learners, "training loss", log=True)
    at = test_past.size(1) // 2
    time = torch.arange(-PAST, AHEAD)
    truth = torch.cat([test_past[:, at], test_future[:, at]])
    right.plot(time, truth, color="#636363", linewidth=1, label="measured")
    right.plot(time[PAST:], again[:, at], ":", color="#cb181d", label="last year again")
    for learner in learners:
        colour, width = sbs.COLOURS[learner.name]
        values = forecasts[learner.name][:, at]
        right.plot(time[PAST:], values, color=colour, linewidth=width, label=learner.name)
    right.set_xlabel("weeks")
    right.set_ylabel("ppm")
    right.legend()
    sbs.save(figure, args.out)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
