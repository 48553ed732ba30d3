"""``python -m bench.variants``: what a variant of the LSTM costs.

Each row times three modules in turn in one run: the variant, the LSTM without it (both
lstm_ext's), and the variant as one writes it without lstm_ext, a Python loop over nn.LSTMCell (of
peepholes and layer norm, which that does not have, over torch's operations). One table:
the variant's time, its ratio to the LSTM without it (cost), and the loop's time over the variant's
(gain), medians of the ratios of neighbouring samples. Training is forward and backward, with the
masks drawn; inference is without masks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lstm_ext
from bench.arguments import (
    add_table_arguments,
    parse_table_arguments,
    positive,
    write_table,
)
from bench.suites import MODES
from bench.timing import samples_in_turn
from lstm_ext import reference

#: Arguments of the variant; those that the LSTM beside it has too come from BASES.
VARIANTS: dict[str, dict[str, Any]] = {
    "peephole": {"peephole": True},
    "layer_norm": {"layer_norm": True},
    "zoneout": {"zoneout": 0.1},
    "recurrent_dropout": {"recurrent_dropout": 0.2},
    "weight_dropout": {"weight_dropout": 0.2},
    "merge_mode": {"merge_mode": "sum"},
}
BASES: dict[str, dict[str, Any]] = {"merge_mode": {"bidirectional": True}}


class Loop(nn.Module):
    """One layer with the parameters and the variant of an lstm_ext.LSTM, step by step in Python."""

    def __init__(self, lstm: lstm_ext.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        lstm = self.lstm
        if lstm.peephole or lstm.layer_norm:
            options = {"peephole": lstm.peephole, "layer_norm": lstm.layer_norm}
            return reference.lstm(x, None, lstm.all_weights, **options)[0], None
        outputs = [self._direction(x, *weights) for weights in lstm.all_weights[:1]]
        for weights in lstm.all_weights[1:]:
            outputs.append(self._direction(x.flip(0), *weights).flip(0))
        return outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1], None

    def _direction(self, x: Tensor, *weights: Tensor) -> Tensor:
        lstm, training = self.lstm, self.training
        cell = nn.LSTMCell(lstm.input_size, lstm.hidden_size, device="meta")
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for name, weight in zip(names, weights, strict=True):
            delattr(cell, name)  # a parameter, where what was dropped is none
            if name == "weight_hh":
                weight = F.dropout(weight, lstm.weight_dropout, training)
            setattr(cell, name, weight)
        h = c = x.new_zeros(x.size(1), lstm.hidden_size)
        factors = F.dropout(torch.ones_like(h), lstm.recurrent_dropout, training)
        outputs = []
        for step in x:
            h_in = h * factors if training and lstm.recurrent_dropout else h
            new_h, new_c = cell(step, (h_in, c))
            if lstm.zoneout and training:
                keep = torch.rand(2, *h.shape, device=h.device) < lstm.zoneout
                h, c = torch.where(keep[0], h, new_h), torch.where(keep[1], c, new_c)
            elif lstm.zoneout:
                h, c = torch.lerp(new_h, h, lstm.zoneout), torch.lerp(new_c, c, lstm.zoneout)
            else:
                h, c = new_h, new_c
            outputs.append(h)
        return torch.stack(outputs)


def measure(
    name: str,
    mode: str,
    size: tuple[int, int, int],
    repeats: int,
    min_sample: float,
    device: torch.device,
) -> dict[str, Any]:
    """One row. size: steps, batch, hidden units and as many inputs."""
    torch.manual_seed(0)
    T, B, H = size
    plain = lstm_ext.LSTM(H, H, **BASES.get(name, {}))
    variant = lstm_ext.LSTM(H, H, **BASES.get(name, {}), **VARIANTS[name])
    modules = [module.to(device) for module in (variant, plain, Loop(variant))]
    x = torch.randn(T, B, H, device=device)
    samples = samples_in_turn(modules, x, mode, repeats, min_sample, device)
    return {
        "variant": name,
        "mode": mode,
        "seconds": statistics.median(ours for ours, _, _ in samples),
        "cost": statistics.median(ours / base for ours, base, _ in samples),
        "gain": statistics.median(loop / ours for ours, _, loop in samples),
        "samples": samples,
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "variant": lambda row: row["variant"],
    "mode": lambda row: row["mode"],
    "ms": lambda row: f"{1e3 * row['seconds']:.1f}",
    "cost": lambda row: f"{row['cost']:.2f}",
    "gain": lambda row: f"{row['gain']:.1f}",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; exits with 2 on a bad argument."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.variants",
        description=__doc__.split("\n\n", 1)[1],
    )
    for name, default in (("steps", 100), ("batch", 32), ("hidden", 256)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="default: all")
    add_table_arguments(parser)
    args = parse_table_arguments(parser, argv)
    size = args.steps, args.batch, args.hidden
    how = args.repeats, args.min_sample, torch.device(args.device)
    rows = (measure(name, mode, size, *how) for name in args.variant or VARIANTS for mode in MODES)
    write_table(args, rows, COLUMNS, {"size": size})
    return 0


if __name__ == "__main__":
    sys.exit(main())
