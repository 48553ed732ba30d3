"""Plans of the CUDA engine that tests make of those that it lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lstm_ext.cuda.engine import FAMILIES


def grid_plan(
    plans: Sequence[Any],
    tile: tuple[int, int],
    shared: int,
    *,
    ahead: bool = False,
    in_l2: int = 0,
) -> Any:
    """One launch with these m- and n-tiles, in as few groups as there are: so many chunks of a
    warp's weights in shared memory and, ``ahead``, those behind in a stream, of which L2 is to keep
    ``in_l2``."""
    fitting = [
        plan
        for plan in plans
        if FAMILIES[plan.family] == "grid"
        and (plan.m_tiles, plan.n_tiles) == tile
        and not plan.ahead
    ]
    plan = min(fitting, key=lambda plan: plan.groups)
    plan.shared_bytes += (shared - plan.shared) * 8 * plan.m_tiles * 1024 + 65536 * ahead
    plan.shared, plan.ahead, plan.in_l2 = shared, ahead, in_l2
    return plan


def fetching(plan: Any, fetches: bool) -> Any:
    """A forward plan of two rounds whose cells fetch their words a tile at a time, or do not."""
    plan.shared_bytes += (fetches - plan.fetches) * 2 * 4 * 1024  # rounds, words
    plan.fetches = fetches
    return plan
