"""Tells from its words which library a docstring comes from: a bidirectional LSTM with lengths.

The text is in the packages that are installed here anyway: docstrings of the standard library,
torch, NumPy, SciPy, pandas, Matplotlib, scikit-learn and statsmodels, without the names of the
libraries. A fifth of the files is held out. Once with nn.LSTM, which needs packing, once with
lstm_ext.LSTM and its ``lengths=``, from the same weights.

    python examples/which_library.py            # a minute on two cores
    python examples/which_library.py --short

Exit status: 0 if the loss curves of the two lie on each other, 1 if not, 2 for a bad argument.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import side_by_side as sbs
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext

LIBRARIES = ("torch", "numpy", "scipy", "pandas", "matplotlib", "sklearn", "statsmodels")
CLASSES = ("stdlib", *LIBRARIES)
NAMES = {
    *LIBRARIES,
    "np",
    "plt",
    "pd",
    "sp",
    "sm",
    "scikit",
    "learn",
    "python",
    "pytorch",
    "tensor",
}
WORDS = 40  # of a docstring are read
SHORTEST = 5
VOCABULARY = 4000
PADDING, UNKNOWN = 0, 1
HELD_OUT = 5  # every 5th file is for the test

Text = tuple[list[str], int]  # words and class


def docstrings(file: Path) -> list[list[str]]:
    """The words of every docstring of functions and classes in a file."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            words = re.findall("[a-z]+", (ast.get_docstring(node) or "").lower())
            words = [word for word in words if word not in NAMES][:WORDS]
            if len(words) >= SHORTEST:
                texts.append(words)
    return texts


def read(each: int, seed: int) -> tuple[list[Text], list[Text]]:
    """Docstrings to train on and held out, about ``each`` and a quarter of that a library."""
    parts: tuple[list[Text], list[Text]] = ([], [])
    for number, name in enumerate(CLASSES):
        if name == "stdlib":
            root = Path(sysconfig.get_paths()["stdlib"])
        else:
            root = Path(importlib.util.find_spec(name).origin).parent
        files = [path.relative_to(root) for path in root.rglob("*.py")]
        files = sorted(f for f in files if not {"site-packages", "tests", "test"} & set(f.parts))
        random.Random(seed).shuffle(files)
        counts = [0, 0]
        for k, file in enumerate(files):
            held = k % HELD_OUT == 0
            if counts[held] < (each // 4 if held else each):
                texts = docstrings(root / file)[:20]  # no file has all the say
                parts[held].extend((words, number) for words in texts)
                counts[held] += len(texts)
    return parts


def encode(texts: list[Text], index: dict[str, int]) -> tuple[torch.Tensor, ...]:
    """Words (WORDS, texts), lengths (texts,) and classes (texts,), all int64."""
    words = torch.full((WORDS, len(texts)), PADDING)
    for n, (text, _) in enumerate(texts):
        words[: len(text), n] = torch.tensor([index.get(word, UNKNOWN) for word in text])
    lengths = torch.tensor([len(text) for text, _ in texts])
    return words, lengths, torch.tensor([number for _, number in texts])


class Reader(nn.Module):
    def __init__(self, lstm):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 48)
        self.lstm = lstm(48, 64, bidirectional=True)
        self.head = nn.Linear(128, len(CLASSES))

    def forward(self, words, lengths):
        """(T, B) words and (B,) lengths -> (B, classes) logits."""
        x = self.embed(words)
        if isinstance(self.lstm, lstm_ext.LSTM):
            _, (h, _) = self.lstm(x, lengths=lengths)
        else:
            _, (h, _) = self.lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return self.head(torch.cat([h[0], h[1]], dim=1))


def main(argv: list[str] | None = None) -> int:
    args = sbs.arguments(__doc__, "which_library", 400, argv)
    training, test = read(80 if args.short else 800, args.seed)
    counts = Counter(word for text, _ in training for word in text)
    common = [word for word, _ in counts.most_common(VOCABULARY - 2)]
    index = {word: number for number, word in enumerate(common, start=2)}
    words, lengths, classes = encode(training, index)
    test_words, test_lengths, test_classes = encode(test, index)
    print(f"{len(training)} docstrings to train on, {len(test)} held out, {len(CLASSES)} libraries")

    learners = sbs.pair(Reader, 3e-3)
    batches = sbs.slices(len(training), 64, args.steps)
    sbs.train(
        learners,
        args.steps,
        lambda n: (words[:, batches[n]], lengths[batches[n]], classes[batches[n]]),
        lambda model, words, lengths, classes: F.cross_entropy(model(words, lengths), classes),
    )
    with torch.inference_mode():
        logits = {learner.name: learner.model(test_words, test_lengths) for learner in learners}
    guesses = {name: values.argmax(1) for name, values in logits.items()}
    scores = {
        name: 100 * (guess == test_classes).float().mean().item() for name, guess in guesses.items()
    }
    agree = sbs.report(learners, scores, "% of the held-out docstrings told right")
    print(f"the largest class: {100 * test_classes.bincount().max().item() / len(test):.4g} %")

    figure, (left, right) = sbs.picture(2, "Which library is a docstring of?", height=4.5)
    sbs.draw_losses(left, learners, "training loss, nats")
    table = torch.zeros(len(CLASSES), len(CLASSES))
    table.index_put_((test_classes, guesses[sbs.OURS]), torch.ones(len(test)), accumulate=True)
    right.imshow(table / table.sum(1, keepdim=True), cmap="Blues", vmin=0, vmax=1)
    right.set_xticks(range(len(CLASSES)), CLASSES, rotation=60, fontsize=8)
    right.set_yticks(range(len(CLASSES)), CLASSES, fontsize=8)
    right.set_xlabel("told by lstm_ext")
    right.set_ylabel("is of")
    sbs.save(figure, args.out)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
