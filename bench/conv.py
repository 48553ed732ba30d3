"""``python -m bench.conv``: lstm_ext.ConvLSTM2d beside the loop that one writes without it.

The loop takes one nn.Conv2d of input and h together a step, and the cell in torch's operations.
Both have the same weights, and are first checked to compute the same; then they are timed in turn
in one run. The ratio is the loop's time over ConvLSTM2d's, a median of neighbouring samples.
Training is forward and backward with gradients for the parameters and the input.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lstm_ext
from bench.machine import environment, grow_heap
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
    limits = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0, "atol": 0.05}
    torch.testing.assert_close(*(module(x)[0] for module in modules), **limits)
    samples = samples_in_turn(modules, x, mode, repeats, min_sample, device)
    return {
        "film": film.name,
        "mode": mode,
        "seconds": statistics.median(ours for ours, _ in samples),
        "ratio": statistics.median(loop / ours for ours, loop in samples),
        "samples": samples,
    }


def table(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| problem | mode | ms | ratio |"
    yield "| --- | --- | --- | --- |"
    for row in rows:
        yield (
            f"| {row['film']} | {row['mode']} | {1e3 * row['seconds']:.2f} | {row['ratio']:.2f} |"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; exits with 2 on a bad argument."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.conv", description=__doc__.split("\n\n", 1)[1]
    )
    parser.add_argument("--film", metavar="TEXT", default="", help="only problems with it in them")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--min-sample", type=float, default=0.02, help="seconds (default: 0.02)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the samples as JSON")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    grow_heap()
    films, device = [f for f in FILMS if args.film in f.name], torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    if not films:
        parser.error(f"--film {args.film!r} is in none of {', '.join(f.name for f in FILMS)}")
    rows = []

    def measured() -> Iterator[dict[str, Any]]:
        for film in films:
            for mode in MODES:
                rows.append(measure(film, mode, dtype, args.repeats, args.min_sample, device))
                yield rows[-1]

    for line in table(measured()):
        print(line, flush=True)
    if args.out is not None:
        threads = torch.get_num_threads()
        settings = {"dtype": args.dtype, "repeats": args.repeats, "threads": threads}
        facts = {"settings": settings, "environment": environment(device), "rows": rows}
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
