"""Trains one character language model twice, with nn.LSTM and with lstm_ext.LSTM.

The text is Python's own standard library, which every machine has. Both models start from the
same weights and see the same batches, a step of one after a step of the other, so the loss
curves must lie on each other and the ratio of the step times is like with like. At the end the
lstm_ext model is read with weights of 8 bits too, and writes some Python.

    python examples/char_lm.py            # some 100 s on two cores
    python examples/char_lm.py --short    # a few seconds, to see that it runs

Exit status: 0 if the curves lie on each other, 1 if not, 2 for a bad argument.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from side_by_side import LIMIT, curves_agree, draw_losses, ratio_of
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import lstm_ext
from lstm_ext import ops

# Classes: newline, printable ASCII from space to tilde, and one for everything else.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
OTHER = len(ALPHABET)
CLASSES = OTHER + 1

EMBEDDING = 64
TEXT_LIMIT = 4_000_000  # bytes of training text
HELD_OUT = 12  # every 12th file is for validation
VALID_LANES, VALID_LENGTH = 32, 1024


def read_library() -> tuple[torch.Tensor, torch.Tensor]:
    """(training, validation) classes, int64 (characters,), of the standard library's modules.

    Files in alphabetical order; those for validation are whole files that are never trained on.
    """
    table = np.full(256, OTHER, dtype=np.int64)
    table[np.frombuffer(ALPHABET.encode(), dtype=np.uint8)] = np.arange(OTHER)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    # _sysconfigdata is generated: a table of the build's settings, not a program.
    files = [file for file in files if not file.name.startswith("_sysconfigdata")]
    if len(files) < HELD_OUT:
        raise SystemExit("this Python has no source files of its standard library to train on")
    text = [np.frombuffer(file.read_bytes(), dtype=np.uint8) for file in files]
    held_out = np.concatenate(text[HELD_OUT - 1 :: HELD_OUT])
    del text[HELD_OUT - 1 :: HELD_OUT]
    training = np.concatenate(text)[:TEXT_LIMIT]
    return torch.from_numpy(table[training]), torch.from_numpy(table[held_out])


def lanes(text: torch.Tensor, count: int) -> torch.Tensor:
    """(characters // count, count): ``count`` stretches of the text side by side."""
    length = len(text) // count
    return text[: length * count].view(count, length).t().contiguous()


class CharModel(nn.Module):
    """Embedding, LSTM, linear head. ``lstm`` is nn.LSTM or its drop-in."""

    def __init__(self, lstm, hidden: int, layers: int):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, EMBEDDING)
        self.lstm = lstm(EMBEDDING, hidden, num_layers=layers)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, text, state=None):
        """(T, B) classes and the state so far -> (T, B, CLASSES) logits and the new state."""
        y, state = self.lstm(self.embed(text), state)
        return self.head(y), state


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


class Stopwatch:
    """Times an LSTM's forward and backward inside a training step that also does other work."""

    def __init__(self, lstm: nn.Module):
        self.seconds = 0.0
        lstm.register_forward_pre_hook(self._before)
        lstm.register_forward_hook(self._after)

    def _start(self, like: torch.Tensor) -> None:
        self.seconds -= now(like.device)

    def _stop(self, like: torch.Tensor) -> None:
        self.seconds += now(like.device)

    def _before(self, _lstm, args) -> None:
        if args[0].requires_grad:
            # The input's gradient is what backward through the LSTM computes last, with the
            # weights' gradients stored before it is handed on.
            args[0].register_hook(self._stop)
            self._start(args[0])

    def _after(self, _lstm, args, result) -> None:
        if args[0].requires_grad:
            self._stop(args[0])
            result[0].register_hook(self._start)


@dataclass
class Learner:
    """A model, its optimiser, and what happened to it."""

    name: str
    model: CharModel
    steps: int
    rate: float
    state: tuple[torch.Tensor, torch.Tensor] | None = None
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds of each whole step
    lstm_times: list[float] = field(default_factory=list)  # the LSTM's share of them

    def __post_init__(self):
        self.stopwatch = Stopwatch(self.model.lstm)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.rate)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=self.rate, total_steps=self.steps, pct_start=0.1
        )

    def step(self, text: torch.Tensor, target: torch.Tensor) -> None:
        """One training step; the state carries on from the step before (truncated BPTT)."""
        self.stopwatch.seconds = 0.0
        begin = now(text.device)
        self.optimizer.zero_grad()
        logits, state = self.model(text, self.state)
        loss = loss_of(logits, target)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.state = tuple(part.detach() for part in state)
        self.losses.append(loss.item())
        self.times.append(now(text.device) - begin)
        self.lstm_times.append(self.stopwatch.seconds)


@torch.inference_mode()
def bits_per_character(model: CharModel, text: torch.Tensor) -> float:
    """Held-out loss in bits; ``text`` is (T + 1, B), read from a zero state."""
    logits, _ = model.eval()(text[:-1])
    return loss_of(logits, text[1:]).item() / math.log(2)


def now(device: torch.device) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def write(model: CharModel, prompt: str, length: int, temperature: float, seed: int) -> str:
    """Continues ``prompt`` one character at a time; the LSTM's state is all its memory."""
    model.eval()
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    text = [ALPHABET.index(char) for char in prompt]
    logits, state = model(torch.tensor(text, device=device)[:, None])
    for _ in range(length):
        # "Everything else" has no character to print.
        odds = (logits[-1, 0, :OTHER] / temperature).softmax(0).cpu()
        text.append(int(torch.multinomial(odds, 1, generator=generator)))
        logits, state = model(torch.tensor([text[-1:]], device=device), state)
    return "".join(ALPHABET[c] for c in text)


def in_ms(times: list[float]) -> str:
    """Median in milliseconds."""
    return f"{statistics.median(times) * 1e3:.1f}"


def draw(peer: Learner, ours: Learner, ratio: float, path: Path) -> None:
    """Both loss curves, and how far they are apart, as a PNG."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    draw_losses(top, [peer, ours], "training loss, nats a character")
    top.set_title(f"Character model of Python's library: step time nn.LSTM / lstm_ext {ratio:.2f}")
    steps = range(1, len(peer.losses) + 1)
    gap = np.abs(np.subtract(peer.losses, ours.losses))
    # A logarithmic axis has no place for the steps where the two are equal to the last bit.
    bottom.semilogy(steps, np.where(gap > 0, gap, np.nan), ".", markersize=3, color="#08306b")
    bottom.axhline(LIMIT, color="#cb181d", linestyle="--", label=f"limit {LIMIT:g}")
    bottom.set_ylabel("difference, nats")
    bottom.set_xlabel("training step")
    bottom.legend(loc="lower right")
    bottom.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def curve_table(peer: Learner, ours: Learner) -> str:
    """A dozen points of both loss curves."""
    count = len(peer.losses)
    picked = sorted({round(1 + (count - 1) * n / 11) for n in range(12)})
    lines = [f"{'step':>6}  {'nn.LSTM':>9}  {'lstm_ext':>9}  {'difference':>10}"]
    for step in picked:
        a, b = peer.losses[step - 1], ours.losses[step - 1]
        lines.append(f"{step:>6}  {a:>9.5f}  {b:>9.5f}  {abs(a - b):>10.1e}")
    return "\n".join(lines)


def runs_natively(device: str) -> bool:
    """Whether torch sees such a device and this build of lstm_ext has kernels for it."""
    try:
        return ops.has_native_kernels(torch.empty(0, device=device).device)
    except (RuntimeError, AssertionError):
        return False


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains one character language model with nn.LSTM and with lstm_ext.LSTM on "
        "the standard library's source and compares losses and speed."
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps of each model")
    parser.add_argument("--batch", type=int, default=32, help="stretches of text read at once")
    parser.add_argument("--length", type=int, default=64, help="characters a step")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-2, help="highest learning rate")
    parser.add_argument(
        "--device", help="default: cuda where there is one and lstm_ext has kernels for it, or cpu"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("char_lm.png"), help="the PNG")
    parser.add_argument("--short", action="store_true", help="a small model and a few steps")
    args = parser.parse_args(argv)
    if args.short:
        args.steps, args.batch, args.length, args.hidden = 12, 8, 32, 64
    for name in ("steps", "batch", "length", "hidden", "layers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.rate <= 0:
        parser.error(f"--rate must be above 0, got {args.rate}")
    if not args.out.parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.parent}")
    if args.device is None:
        args.device = "cuda" if runs_natively("cuda") else "cpu"
    try:
        args.device = torch.empty(0, device=args.device).device
        ops.has_native_kernels(args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    # TF32, cuDNN's default for float32, rounds by more than curves_agree allows for early on.
    torch.backends.cudnn.allow_tf32 = False
    training, held_out = read_library()
    text = lanes(training.to(args.device), args.batch)
    if len(text) <= args.length:
        raise SystemExit(f"--batch {args.batch} leaves {len(text)} characters a stretch")
    valid = lanes(held_out.to(args.device), VALID_LANES)[: VALID_LENGTH + 1]

    torch.manual_seed(args.seed)
    first = CharModel(nn.LSTM, args.hidden, args.layers)
    second = CharModel(lstm_ext.LSTM, args.hidden, args.layers)
    second.load_state_dict(first.state_dict())
    peer = Learner("nn.LSTM", first.to(args.device), args.steps, args.rate)
    ours = Learner("lstm_ext.LSTM", second.to(args.device), args.steps, args.rate)
    print(
        f"{len(training):,} characters to train on, {len(held_out):,} held out; {args.layers} "
        f"layers of {args.hidden}, {sum(p.numel() for p in first.parameters()):,} parameters; "
        f"batch {args.batch} of {args.length} on {args.device}, {torch.get_num_threads()} threads"
    )

    begin = time.perf_counter()
    bar = tqdm(range(args.steps), unit="step", mininterval=0.5, dynamic_ncols=True)
    for number in bar:
        # Each lane reads on where it stopped, and from its start again at the end of the text.
        start = number * args.length % (len(text) - args.length)
        batch = text[start : start + args.length + 1]
        for learner in (peer, ours):
            learner.step(batch[:-1], batch[1:])
        bar.set_postfix_str(
            f"loss nn.LSTM {peer.losses[-1]:.4f}, lstm_ext {ours.losses[-1]:.4f}", refresh=False
        )
    spent = time.perf_counter() - begin

    print(curve_table(peer, ours))
    agree = curves_agree(peer, ours)
    for learner in (peer, ours):
        bits = bits_per_character(learner.model, valid)
        print(f"held-out text: {learner.name:13} {bits:.4f} bits a character")
    if args.device.type == "cpu":
        served = lstm_ext.quantize(copy.deepcopy(ours.model))
        print(f"  with weights of 8 bits     {bits_per_character(served, valid):.4f}")

    whole = ratio_of(peer.times, ours.times)
    alone = ratio_of(peer.lstm_times, ours.lstm_times)
    print(f"both trained in {spent:.0f} s; nn.LSTM's time over lstm_ext's, median of the steps:")
    print(
        f"  whole training step        {whole:.2f} ({in_ms(peer.times)} / {in_ms(ours.times)} ms)"
    )
    print(
        f"  LSTM forward and backward  {alone:.2f} "
        f"({in_ms(peer.lstm_times)} / {in_ms(ours.lstm_times)} ms)"
    )
    draw(peer, ours, whole, args.out)
    print(f"curves drawn in {args.out}")
    length = 100 if args.short else 600
    print(f"sample from the lstm_ext model:\n{'-' * 60}")
    print(write(ours.model, "\n    def ", length, temperature=0.7, seed=args.seed))
    print("-" * 60)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
