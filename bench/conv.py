"""``python -m bench.conv``: lstm_ext.ConvLSTM2d beside the loop that one writes without it.

The loop takes one nn.Conv2d of input and h together a step, and the cell in torch's operations.
Both have the same weights, and are first checked to compute the same; then they are timed in turn
in one run. The ratio is the loop's time over ConvLSTM2d's, a median of neighbouring samples.
Training is forward and backward with gradients for the parameters and the input.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lstm_ext
from bench.arguments import add_table_arguments, parse_table_arguments, write_table
from bench.suites import MODES
from bench.timing import samples_in_turn


class Film(NamedTuple):
    """A problem: images of size x size pixels."""

    steps: int
    batch: int
    inputs: int
    channels: int
    kernel: int
    size: int

    @property
    def name(self) -> str:
        T, N, I, C, k, s = self
        return f"T{T} N{N} I{I} C{C} k{k} {s}x{s}"


FILMS = tuple(
    Film(*sizes)
    for sizes in (
        (10, 1, 3, 8, 3, 16),
        (10, 2, 16, 16, 3, 16),
        (5, 8, 16, 32, 3, 16),
        (5, 4, 64, 64, 3, 8),
        (5, 1, 128, 128, 3, 4),
        (5, 8, 3, 16, 5, 16),
        (5, 4, 32, 32, 1, 16),
        (3, 1, 8, 16, 3, 64),
        (5, 1, 64, 128, 3, 8),
        (10, 8, 1, 64, 5, 32),
        # Of agents that plan on a small board.
        (20, 1, 8, 8, 3, 4),
        (20, 1, 8, 8, 3, 8),
        (10, 1, 16, 16, 3, 8),
        (10, 1, 32, 32, 3, 8),
    )
)
DTYPES = ("float32", "bfloat16", "float16")


class Loop(nn.Module):
    """One layer with the weights of an lstm_ext.ConvLSTM2d of padding "same"."""

    def __init__(self, lstm: lstm_ext.ConvLSTM2d) -> None:
        super().__init__()
        C, kernel = lstm.hidden_channels, lstm.kernel_size
        like = {"device": lstm.weight_ih_l0.device, "dtype": lstm.weight_ih_l0.dtype}
        self.conv = nn.Conv2d(lstm.in_channels + C, 4 * C, kernel, padding="same", **like)
        with torch.no_grad():
            self.conv.weight.copy_(torch.cat([lstm.weight_ih_l0, lstm.weight_hh_l0], 1))
            self.conv.bias.copy_(lstm.bias_ih_l0 + lstm.bias_hh_l0)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        C = self.conv.out_channels // 4
        h = c = x.new_zeros(x.size(1), C, *x.shape[3:])
        outputs = []
        for step in x:
            i, f, g, o = self.conv(torch.cat([step, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), (h, c)


def measure(
    film: Film,
    mode: str,
    dtype: torch.dtype,
    repeats: int,
    min_sample: float,
    device: torch.device,
) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    lstm = lstm_ext.ConvLSTM2d(film.inputs, film.channels, film.kernel)
    x = torch.randn(film.steps, film.batch, film.inputs, film.size, film.size)
    lstm, x = lstm.to(device, dtype), x.to(device, dtype)
    modules = [lstm, Loop(lstm)]
    leaf = x.detach().requires_grad_()
    results = []
    for module in modules:
        y, _ = module(leaf)
        results.append((y, *torch.autograd.grad(y.sum(), leaf)))
    limits = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0, "atol": 0.05}
    for ours, loop in zip(*results, strict=True):
        scale = max(loop.abs().max().item(), 1)
        torch.testing.assert_close(ours / scale, loop / scale, **limits)
    samples = samples_in_turn(modules, x, mode, repeats, min_sample, device)
    return {
        "film": film.name,
        "mode": mode,
        "seconds": statistics.median(ours for ours, _ in samples),
        "ratio": statistics.median(loop / ours for ours, loop in samples),
        "samples": samples,
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "problem": lambda row: row["film"],
    "mode": lambda row: row["mode"],
    "ms": lambda row: f"{1e3 * row['seconds']:.2f}",
    "ratio": lambda row: f"{row['ratio']:.2f}",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; exits with 2 on a bad argument."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.conv", description=__doc__.split("\n\n", 1)[1]
    )
    parser.add_argument("--film", metavar="TEXT", default="", help="only problems with it in them")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    add_table_arguments(parser)
    args = parse_table_arguments(parser, argv)
    films = [f for f in FILMS if args.film in f.name]
    if not films:
        parser.error(f"--film {args.film!r} is in none of {', '.join(f.name for f in FILMS)}")
    dtype, how = getattr(torch, args.dtype), (args.repeats, args.min_sample)
    rows = (
        measure(film, mode, dtype, *how, torch.device(args.device))
        for film in films
        for mode in MODES
    )
    write_table(args, rows, COLUMNS, {"dtype": args.dtype})
    return 0


if __name__ == "__main__":
    sys.exit(main())
