"""Reads handwritten digits row by row with a bidirectional LSTM.

The digits are scikit-learn's, 1,797 images of 8 x 8: eight steps of eight numbers. A quarter is
held out. Once with nn.LSTM, once with lstm_ext.LSTM, from the same weights.

    python examples/digit_rows.py            # seconds on two cores
    python examples/digit_rows.py --short

Exit status: 0 if the loss curves of the two lie on each other, 1 if not, 2 for a bad argument.
"""

from __future__ import annotations

import sys

import side_by_side as sbs
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

HELD_OUT = 4  # every 4th image is never trained on


class RowReader(nn.Module):
    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm(8, 48, bidirectional=True)
        self.head = nn.Linear(96, 10)

    def forward(self, images):
        """(B, 8, 8) -> (B, 10) logits."""
        _, (h, _) = self.lstm(images.transpose(0, 1))
        return self.head(torch.cat([h[0], h[1]], dim=1))


def main(argv: list[str] | None = None) -> int:
    args = sbs.arguments(__doc__, "digit_rows", 800, argv)
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)
    classes = torch.tensor(data.target)
    held = torch.arange(len(images)) % HELD_OUT == 0
    train_images, train_classes = images[~held], classes[~held]

    learners = sbs.pair(RowReader, 5e-3)
    batches = sbs.slices(len(train_images), 64, args.steps)
    sbs.train(
        learners,
        args.steps,
        lambda n: (train_images[batches[n]], train_classes[batches[n]]),
        lambda model, x, y: F.cross_entropy(model(x), y),
    )
    with torch.inference_mode():
        guesses = {learner.name: learner.model(images[held]).argmax(1) for learner in learners}
    right = {name: (guess == classes[held]) for name, guess in guesses.items()}
    scores = {name: 100 * r.float().mean().item() for name, r in right.items()}
    agree = sbs.report(learners, scores, f"% of {int(held.sum())} held-out digits read right")

    figure, (left, grid) = sbs.picture(2, "Handwritten digits, row by row, in both directions")
    sbs.draw_losses(left, learners, "training loss, nats", log=True)
    # Those that were read wrong first.
    order = right[sbs.OURS].int().sort(stable=True).indices[:40]
    sheet = images[held][order].view(5, 8, 8, 8).permute(0, 2, 1, 3).reshape(40, 64)
    grid.imshow(sheet, cmap="gray_r")
    for k, index in enumerate(order.tolist()):
        guess, truth = int(guesses[sbs.OURS][index]), int(classes[held][index])
        colour = "#08306b" if guess == truth else "#cb181d"
        grid.text(k % 8 * 8, k // 8 * 8 + 1, str(guess), color=colour, fontsize=8)
    grid.set_title("held out, with what lstm_ext read (red: wrong)", fontsize=9)
    grid.axis("off")
    sbs.save(figure, args.out)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
