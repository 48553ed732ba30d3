"""How the CPU engine calls the core: what its forward and its backward share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch import Tensor

from lstm_ext.cpu import products as cpu_products
from lstm_ext.engine import Direction, LayerWeights, acc_dtype
from lstm_ext.native import _C
from lstm_ext.steps import Steps


def bf16_products(dtype: torch.dtype, w: LayerWeights) -> bool:
    """Whether products multiply bf16 as it is, rather than as float32. The sums are float32.

    oneDNN, which makes some of the products of backward over all steps, needs all its threads.
    """
    return (
        dtype == torch.bfloat16
        and not w.varied
        and _C.cpu_bf16_products()
        and _C.openmp_grants(torch.get_num_threads())
    )


def biases_alone(rows: int, columns: int, biases: Iterable[Tensor | None], like: Tensor) -> Tensor:
    """What an input of no features gives: the sum of the biases in every row."""
    gx = like.new_zeros(rows, columns)
    for bias in biases:
        if bias is not None:
            gx += bias
    return gx


# Of one direction's gates, of all steps: about so much more memory do two directions at once need.
# Of more rows each has work enough for all threads.
_AT_ONCE_BYTES = 32 << 20


def gates_bytes(x: Tensor, directions: list[Direction], steps: Steps) -> int:
    return steps.rows * 4 * directions[0].c0.size(1) * acc_dtype(x.dtype).itemsize


def run_directions(
    core: Callable[..., None], running: list[Generator[Any, None, None]], gates_bytes: int
) -> list[Any]:
    """Runs the core's calls that the directions yield: at once where that takes less time.

    Returns what each yields afterwards, or None.
    """
    first = next(running[0])
    second = None
    if len(running) == 2 and gates_bytes <= _AT_ONCE_BYTES and first.side_by_side():
        second = next(running[1])
    core(first, second, cpu_products.workspace)
    made = [_end(running[0])]
    for one in running[1:]:
        if second is None:
            core(next(one), None, cpu_products.workspace)
        made.append(_end(one))
    return made


def _end(running: Generator[Any, None, None]) -> Any:
    """What it yields last; its tensors are let go."""
    made = next(running, None)
    running.close()
    return made
