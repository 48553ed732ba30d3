"""Moving digits: where do they go (CNN-LSTM), and what comes next (ConvLSTM)?

scikit-learn's handwritten digits fly over a 16 x 16 frame and bounce off its edges. From ten noisy
frames a CNNLSTM tells the direction a digit flies in at the end, once with nn.LSTM and once with
lstm_ext.LSTM from the same weights. A ConvLSTM2d, which torch has none of, foresees the next frame,
and is compared with what needs no model: the last frame again. A third of the digits is held out.

    python examples/moving_digits.py            # a minute on two cores
    python examples/moving_digits.py --short

Exit status: 0 if the loss curves of the two lie on each other, 1 if not, 2 for a bad argument.
"""

from __future__ import annotations

import sys

import side_by_side as sbs
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import lstm_ext

FRAME, DIGIT, STEPS = 16, 8, 10
NOISE = 0.3
# Pixels a step down and to the right; the class of a direction is its index.
WAYS = torch.tensor([(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)])


def fly(digits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Films (STEPS, N, 1, FRAME, FRAME) of digits (N, 8, 8), and the way (N,) of the last step."""
    count, room = len(digits), FRAME - DIGIT
    place = torch.randint(room + 1, (count, 2))
    way = WAYS[torch.randint(len(WAYS), (count,))]
    film = torch.zeros(STEPS, count, FRAME, FRAME)
    pixel = torch.arange(DIGIT)
    for step in range(STEPS):
        rows = (place[:, :1] + pixel)[:, :, None]
        columns = (place[:, 1:] + pixel)[:, None, :]
        film[step][torch.arange(count)[:, None, None], rows, columns] = digits
        if step < STEPS - 1:
            ahead = place + way
            way = torch.where((ahead < 0) | (ahead > room), -way, way)
            place = place + way
    number = (way[:, None] == WAYS).all(2).int().argmax(1)
    return film.unsqueeze(2), number


class Wayfinder(nn.Module):
    def __init__(self, lstm):
        super().__init__()
        cnn = nn.Sequential(
            nn.Conv2d(1, 12, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, stride=2, padding=1),
            nn.ReLU(),
        )  # (M, 12, 4, 4)
        self.body = lstm_ext.CNNLSTM(cnn, lstm(192, 48))
        self.head = nn.Linear(48, len(WAYS))

    def forward(self, film):
        """(T, B, 1, FRAME, FRAME) -> (B, ways) logits."""
        _, (h, _) = self.body(film)
        return self.head(h[-1])


class Seer(nn.Module):
    """Each frame and the change to the next."""

    def __init__(self):
        super().__init__()
        self.lstm = lstm_ext.ConvLSTM2d(1, 16, 3, 2)
        self.head = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, film):
        """(T, B, 1, FRAME, FRAME) -> the frame after each, of the same size."""
        y, _ = self.lstm(film)
        return film + self.head(y.flatten(0, 1)).view_as(film)


def foresight(model, film):
    # The first two frames tell neither place nor way.
    return F.mse_loss(model(film[:-1])[2:], film[3:])


def main(argv: list[str] | None = None) -> int:
    args = sbs.arguments(__doc__, "moving_digits", 400, argv)
    digits = torch.tensor(load_digits().images / 16, dtype=torch.float32)
    held = torch.arange(len(digits)) % 3 == 0
    seen = digits[~held]
    test_film, test_way = fly(digits[held])
    test_noisy = test_film + NOISE * torch.randn_like(test_film)

    batches = sbs.slices(len(seen), 32, args.steps)

    def noisy(step):
        film, way = fly(seen[batches[step]])
        return film + NOISE * torch.randn_like(film), way

    learners = sbs.pair(Wayfinder, 2e-3)
    sbs.train(learners, args.steps, noisy, lambda model, x, y: F.cross_entropy(model(x), y))
    with torch.inference_mode():
        guesses = {learner.name: learner.model(test_noisy).argmax(1) for learner in learners}
    scores = {name: 100 * (g == test_way).float().mean().item() for name, g in guesses.items()}
    agree = sbs.report(learners, scores, f"% of {len(test_way)} held-out films told right")

    seer = sbs.Learner("ConvLSTM2d", Seer(), 1e-2)
    steps = max(args.steps * 3 // 4, 1)
    sbs.train([seer], steps, lambda n: fly(seen[batches[n][:16]])[:1], foresight)
    with torch.inference_mode():
        film = test_film[:, :256]
        foreseen = seer.model(film[:-1])
    error = (foreseen[-1] - film[-1]).pow(2).mean().item()
    again = (film[-2] - film[-1]).pow(2).mean().item()
    print(f"ConvLSTM2d    loss {seer.losses[0]:.4f} -> {seer.losses[-1]:.4f}")
    print(f"next frame, mean square error: {error:.4f}; the last frame again: {again:.4f}")

    figure, (left, middle, right) = sbs.picture(3, "Moving digits")
    sbs.draw_losses(left, learners, "CNN-LSTM, direction: training loss, nats")
    sbs.draw_losses(middle, [seer], "ConvLSTM, next frame: training loss", log=True)
    middle.axhline(again, color="#636363", linestyle=":", linewidth=1)
    # Four films, two lines each: the frames, and below what was foreseen of each.
    lines = []
    for n in range(4):
        lines.append(torch.cat(list(film[4:, n, 0]), dim=1))
        lines.append(torch.cat(list(foreseen[3:, n, 0]), dim=1))
    right.imshow(torch.cat(lines), cmap="gray_r", vmin=0, vmax=1)
    for line in range(0, 8 * FRAME, FRAME):
        right.axhline(line - 0.5, color="#9ecae1", linewidth=2 if line % (2 * FRAME) == 0 else 0.5)
    right.set_title("frames, and below them what was foreseen", fontsize=9)
    right.axis("off")
    sbs.save(figure, args.out)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
