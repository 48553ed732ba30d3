"""The CUDA LSTM kernels, broken in one place at a time.

A mutant is an edit of the source that removes a synchronisation or another precaution; one that
nobody notices is a hole in the tests, or a precaution that is not needed.
"""

import re

from emulator import cluster_mutants, cluster_problems, norm_mutants
from emulator.mutant import BEYOND, DEADLOCK, OVERRUN, RACE, SOURCES, TWICE, UNFINISHED, WRONG, of

# Arguments of lstm_driver for few_kernels.cu, small: a thread costs ThreadSanitizer half a
# millisecond. Each has at least two blocks that need each other.
FORWARD = "forward float32 grid 2x1 0+1 1 1 3 9 21 21 lengths"  # two tiles a block
FORWARD_BOTH = "forward float32 grid 2x1 0+0 1 2 3 5 13 13 lengths"  # both directions
FORWARD_GROUPS = "forward float32 grid 2x1 0+0 2 1 3 9 13 13 dense"
FORWARD_ROUNDS = "forward bfloat16 grid 8x2 0+1 1 1 3 9 33 33 lengths"  # two rounds a tile
FORWARD_OVERLAP = "forward bfloat16 step 8x2 0+0 2 1 3 9 33 33 dense"  # tiles wider than a group
FORWARD_PROJECTED = "forward float32 step 2x1 0+0 1 2 3 17 21 18 lengths"
# Two tiles, one; some warps' chunks are one more than are on their way.
STREAM = "forward bfloat16 grid 8x2 0+0a 1 1 2 17 300 300 dense"
STREAM_TURNS = "backward bfloat16 grid 2x8 0+0a 1 1 2 3 280 280 dense"
BACKWARD = "backward float32 grid 1x1 0+1 1 1 3 9 17 17 lengths"
BACKWARD_ROUNDS = "backward float32 grid 2x4 0+1 1 1 3 9 33 33 lengths"  # four rounds a tile
BACKWARD_DENSE = "backward float32 grid 2x4 0+1 1 1 3 9 33 33 dense"
BACKWARD_PROJECTED = "backward float32 step 1x1 0+0 1 2 3 9 21 18 lengths"
CONTROL = [
    *(FORWARD, FORWARD_BOTH, FORWARD_GROUPS, FORWARD_ROUNDS, FORWARD_OVERLAP, FORWARD_PROJECTED),
    *(BACKWARD, BACKWARD_ROUNDS, BACKWARD_DENSE, BACKWARD_PROJECTED, STREAM, STREAM_TURNS),
    *cluster_problems.CONTROL,
    *norm_mutants.CONTROL,
]
# What a mutant has to remove or alter.
SYNCHRONISATION = re.compile(
    r"__syncthreads\(|__syncwarp\(|\barrive_at\(|\bwait_until\(|barrier\.(?:wait|arrive)\("
    r"|\bcluster_sync\(|\bmbarrier_\w+\(|\bmailboxes_?\.\w+\(|\bletter_?\.\w+\("
    r"|\bexchange\.(?:open|close|expect|receive|put|send)\("
    r"|\bstore_words?\(|\bload_words\(|\btake_words<"
    r"|\bcopies_see\(|\bcopy_async\(|\basync_(?:commit|wait)\b|\bahead\.(?:close|wait)\("
)

GUARD = "if (round > 0 || tile > place.row_first) __syncthreads();"
ROUND_GUARD = "if (round > 0) __syncthreads();"
CELL_MEET = ("__syncthreads();  // all warps' parts are there", "")
PROJECTION_MEET = (
    "Sum::put(partial, sums, round); __syncthreads();",
    "Sum::put(partial, sums, round);",
)
ONE_BUFFER = (("int64_t(i % 2) * B * K", "0"), ("int64_t((i + 1) % 2) * B * K", "0"))

# The first of each place is among the USUAL ones.
MUTANTS = [
    *of(
        "forward.cuh",
        "forward_cell(",
        ("sums overwritten too early", FORWARD, RACE, (GUARD, "")),
        ("no barrier between rounds", FORWARD_ROUNDS, RACE, ("round > 0 || ", "")),
        ("no barrier between tiles", FORWARD, RACE, (" || tile > place.row_first", "")),
        ("sums read too early", FORWARD, RACE, CELL_MEET),
        (
            "state of the next group",
            "forward bfloat16 grid 8x2 0+0 2 1 3 9 33 33 dense",
            RACE,
            ("tile, place.row_end - 1, sums", "tile, B - 1, sums"),
        ),
        (
            "words not waited for",
            FORWARD_ROUNDS,
            WRONG,
            ("if (kFetches && round == 0 && fetches) weights.wait_for_others();", ""),
        ),
        ("words of the first step", FORWARD_ROUNDS, WRONG, ("fetch(i + 1, place.row_first);", "")),
        (
            "no words of the first step",
            FORWARD_ROUNDS,
            WRONG,
            ("fetch(args.shape.first, place.row_first);", ""),
        ),
        (
            "words of the next tile",
            "forward bfloat16 grid 8x2 0+1 1 1 3 17 33 33 dense",
            WRONG,
            ("if (tile > place.row_first) fetch(i, tile);", ""),
        ),
        ("words do not end", FORWARD_ROUNDS, WRONG, ("async_commit();", "")),
        (
            "words where the weights are",
            FORWARD_ROUNDS,
            f"{RACE}|{WRONG}",
            ("fetched + (fetches ?", "fetched + (false ?"),
        ),
        ("one buffer for the state", FORWARD, RACE, *ONE_BUFFER),
        ("no wait", FORWARD, RACE, ("if (i > args.shape.first) barrier.wait();", "")),
        ("no arrival", FORWARD, DEADLOCK, ("barrier.arrive();", "")),
        ("cells of the next group", FORWARD_OVERLAP, RACE, ("b < place.row_end", "b < B")),
        (
            "units past the end",
            FORWARD,
            OVERRUN,
            ("b < place.row_end && unit < H", "b < place.row_end"),
        ),
        ("sequences past the end", FORWARD, OVERRUN, ("b < place.row_end && unit < H", "unit < H")),
    ),
    *of(
        "forward.cuh",
        "forward_projection(",
        ("sums read too early", FORWARD_PROJECTED, RACE, PROJECTION_MEET),
        ("sums overwritten too early", FORWARD_PROJECTED, RACE, (ROUND_GUARD, "")),
        (
            "next step's reset ignored",
            FORWARD_PROJECTED,
            WRONG,
            ("walk.resets(following, b)", "false"),
        ),
        (
            "state not kept",
            FORWARD_PROJECTED,
            WRONG,
            (": state[at(b, K, unit)]", ": T(from_acc<T>(Acc(0)))"),
        ),
        ("outputs past the end", FORWARD_PROJECTED, OVERRUN, (" || unit >= P", "")),
    ),
    *of(
        "forward.cuh",
        "forward_prepare(",
        ("counters not zeroed", FORWARD, DEADLOCK, ("d.counters[at] = 0", "(void)at")),
        (
            "words not zeroed",
            cluster_problems.TAGGED,
            f"{WRONG}|{DEADLOCK}",
            ("d.counters[at] = 0", "(void)at"),
        ),
        (
            "padding of the state not zeroed",
            FORWARD,
            WRONG,
            ("k = lane; k < K; k += 32", "k = lane; k < P; k += 32"),
        ),
        (
            "padding of the other buffer not zeroed",
            FORWARD,
            WRONG,
            ("as<T>(d.state)[(B + b) * K + k] = zero;", ""),
        ),
        ("padding of hidden not zeroed", FORWARD_PROJECTED, WRONG, ("if (d.hidden)", "if (false)")),
        ("first step's reset ignored", FORWARD, WRONG, (" && !starts_at_zero", "")),
        (
            "results of an empty sequence not made",
            FORWARD,
            WRONG,
            ("if (walk.length(int(b))) continue;", "continue;"),
        ),
    ),
    *of(
        "backward.cuh",
        "backward_cell(",
        ("sums read too early", BACKWARD, RACE, CELL_MEET),
        ("sums overwritten too early", BACKWARD, RACE, (GUARD, "")),
        ("no barrier between rounds", BACKWARD_ROUNDS, RACE, ("round > 0 || ", "")),
        ("no barrier between tiles", BACKWARD, RACE, (" || tile > place.row_first", "")),
        (
            "words not waited for",
            BACKWARD_ROUNDS,
            WRONG,
            ("if (kFetches && round == 0) {", "if (false) {"),
        ),
        ("words of the first step", BACKWARD_ROUNDS, WRONG, ("fetch(j + 1, place.row_first);", "")),
        ("no wait in the first step", BACKWARD_ROUNDS, WRONG, ("async_wait<0>();", ";")),
        ("words do not end", BACKWARD_ROUNDS, WRONG, ("async_commit();", "")),
        (
            "words where the weights are",
            BACKWARD_ROUNDS,
            f"{RACE}|{WRONG}",
            ("fetched + (kFetches ?", "fetched + (false ?"),
        ),
        ("dy of the first round", BACKWARD_DENSE, WRONG, ("turn, dy[round])", "turn, dy[0])")),
        (
            "words of the next tile",
            "backward float32 grid 2x4 0+1 1 1 3 33 33 33 dense",
            WRONG,
            ("if (tile > place.row_first) fetch(j, tile);", ""),
        ),
        (
            "no words of the first step",
            BACKWARD_ROUNDS,
            WRONG,
            ("fetch(args.shape.first, place.row_first);", ""),
        ),
        (
            "one buffer for the state",
            BACKWARD,
            RACE,
            ("int64_t(j % 2) * B * K", "0"),
            ("int64_t((j + 1) % 2) * B * K", "0"),
        ),
        ("no wait", BACKWARD, RACE, ("if (j > args.shape.first) barrier.wait();", "")),
        ("no arrival", BACKWARD, DEADLOCK, ("barrier.arrive();", "")),
        (
            "units past the end",
            BACKWARD,
            OVERRUN,
            ("b < place.row_end && unit < H", "b < place.row_end"),
        ),
    ),
    *of(
        "backward.cuh",
        "backward_projection(",
        ("sums overwritten too early", BACKWARD_PROJECTED, RACE, (ROUND_GUARD, "")),
        ("sums read too early", BACKWARD_PROJECTED, RACE, PROJECTION_MEET),
        ("outputs past the end", BACKWARD_PROJECTED, OVERRUN, (" || unit >= P", "")),
    ),
    *of(
        "backward.cuh",
        "backward_prepare(",
        ("counters not zeroed", BACKWARD, DEADLOCK, ("d.counters[at] = 0", "(void)at")),
        (
            "words not zeroed",
            cluster_problems.BACKWARD_TAGGED,
            f"{WRONG}|{DEADLOCK}",
            ("d.counters[at] = 0", "(void)at"),
        ),
        ("padding of the state not zeroed", BACKWARD, WRONG, ("k < pad", "k < 0")),
        ("padding of one buffer not zeroed", BACKWARD, WRONG, ("b < 2 * B", "b < B")),
        (
            "padding of hidden not zeroed",
            BACKWARD_PROJECTED,
            WRONG,
            ("if (d.hidden)", "if (false)"),
        ),
        ("reset ignored", BACKWARD, WRONG, (" && !turn.reset", "")),
    ),
    *of(
        "forward_cells.cuh",
        "class ForwardUnit",
        ("cell not reset", FORWARD, WRONG, ("turn.reset ? Acc(0) : c;", "c;")),
        (
            "next step's reset ignored",
            FORWARD,
            WRONG,
            ("in.reset_follows ? zero : Arithmetic", "Arithmetic"),
        ),
        (
            "reset after the steps not taken ignored",
            FORWARD_BOTH,
            WRONG,
            ("in.reset_follows || projects() ? from_acc", "projects() ? from_acc"),
        ),
        (
            "state not kept over a step not taken",
            FORWARD_BOTH,
            WRONG,
            (": before();", ": from_acc<T>(Acc(0));"),
        ),
        ("cell not kept over a step not taken", FORWARD_BOTH, WRONG, ("c = in.c;", "c = 0;")),
    ),
    *of(
        "backward_cells.cuh",
        "class BackwardUnit",
        ("reset of the cell ignored", BACKWARD, WRONG, ("if (turn.reset) dc = 0;", "")),
        (
            "reset of the state ignored",
            BACKWARD,
            WRONG,
            ("turn.reset ? from_acc<T>(Acc(0)) : ", ""),
        ),
        (
            "reset of the cell before ignored",
            BACKWARD,
            WRONG,
            ("if (!turn.reset) in.c_prev = turn.first ? first_c(turn) : *", "in.c_prev = *"),
        ),
        (
            "reset of the cell before ignored, fetched",
            BACKWARD_ROUNDS,
            WRONG,
            (
                "if (!turn.reset) in.c_prev = turn.first ? first_c(turn) : words",
                "in.c_prev = words",
            ),
        ),
        (
            "c before the first step from a step",
            BACKWARD_ROUNDS,
            WRONG,
            ("turn.first ? first_c(turn) : words", "words"),
        ),
        ("words of other gates", BACKWARD_ROUNDS, WRONG, ("s + gate * H_", "s")),
    ),
    *of(
        "backward_cells.cuh",
        "Acc gradient_of_h(",
        (
            "carry not kept",
            BACKWARD,
            WRONG,
            ("carry = turn.active ? Acc(0) : sum", "carry = Acc(0)"),
        ),
        (
            "carry kept for ever",
            BACKWARD,
            WRONG,
            ("carry = turn.active ? Acc(0) : sum", "carry = sum"),
        ),
        ("carry not added", BACKWARD, WRONG, ("if (j > 0) sum += carry;", "")),
    ),
    *of(
        "block.cuh",
        "class GroupBarrier",
        (
            "arrives before all have written",
            FORWARD,
            RACE,
            (
                "__syncthreads();  // all of the block has written, and has read its partial sums",
                "",
            ),
        ),
        (
            "others do not wait for thread 0",
            FORWARD,
            RACE,
            ("__syncthreads();  // nobody reads before thread 0 has seen it", ""),
        ),
        ("nobody arrives", FORWARD, DEADLOCK, ("if (threadIdx.x == 0) arrive_at(counter_);", "")),
        (
            "every warp arrives",
            FORWARD,
            RACE,
            (
                "if (threadIdx.x == 0) arrive_at(counter_);",
                "if (threadIdx.x % 32 == 0) arrive_at(counter_);",
            ),
        ),
        (
            "nobody waits",
            FORWARD,
            RACE,
            ("if (threadIdx.x == 0) wait_until(counter_, target_);", ""),
        ),
        (
            "waits for the generation before",
            FORWARD,
            RACE,
            ("wait_until(counter_, target_)", "wait_until(counter_, target_ - blocks_)"),
        ),
        (
            "waits for the first generation only",
            FORWARD,
            RACE,
            ("target_ += blocks_", "target_ = blocks_"),
        ),
        (
            "waits for all but one",
            FORWARD,
            RACE,
            ("wait_until(counter_, target_)", "wait_until(counter_, target_ - 1)"),
        ),
        (
            "one counter for all groups",
            FORWARD_GROUPS,
            RACE,
            (" + place.group * kCounterStride", ""),
        ),
    ),
    *of(
        "product.cuh",
        "class Weights",
        ("lanes read too early", FORWARD, RACE, ("__syncwarp();", "")),
        ("others are not waited for", FORWARD_ROUNDS, WRONG, ("async_wait<0>();", "")),
        ("lanes write the same", FORWARD, RACE, ("kParts == 1 || lane % 4 == 0", "true")),
        (
            "warps write the same",
            FORWARD,
            RACE,
            (" + size_t(threadIdx.x / 32) * shared * kMTiles * 64", ""),
        ),
        ("sequences past the end", FORWARD, RACE, ("state.row(min(b, last)", "state.row(b")),
    ),
    *of(
        "stream.cuh",
        "class WeightStream {",
        ("nobody waits", STREAM, WRONG, ("async_wait<int(kSlots) * kMTiles - kTogether>();", ";")),
        ("waits for one too few", STREAM, WRONG, ("kMTiles - kTogether>", "kMTiles - 1>")),
        ("groups are not counted", STREAM, WRONG, ("++i) async_commit();", "++i) {}")),
        (
            "loads are not told apart",
            STREAM,
            WRONG,
            ("half, chunk)); async_commit();", "half, chunk));"),
        ),
        ("all come twice", STREAM, TWICE, ("due_ = false;", "")),
        ("nothing comes after the barrier", STREAM, WRONG, ("due_ = arrives();", "")),
        ("ends with loads on their way", STREAM, UNFINISHED, ("async_wait<0>();", "")),
        (
            "a place beside is filled",
            STREAM_TURNS,
            WRONG,
            ("- kTogether, next, slot, from)", "- kTogether, next, (slot + 1) % kSlots, from)"),
        ),
        ("the next turn begins elsewhere", STREAM_TURNS, WRONG, ("turn_ += unsigned(", "(void)(")),
        (
            "the last chunks come twice",
            STREAM,
            WRONG,
            ("next -= end_ - first_;", "next = end_ - 1;"),
        ),
        ("chunks past the end", STREAM, BEYOND, ("if (next >= end_)", "if (false)")),
        ("warps share their places", STREAM, RACE, ("threadIdx.x / 32 *", "0 *")),
    ),
    *of(
        "product.cuh",
        "struct GateRows",
        ("rows past the end", FORWARD, OVERRUN, ("(unit < H ? unit : H - 1)", "unit")),
    ),
    *of(
        "product.cuh",
        "struct PlainRows",
        ("rows past the end", BACKWARD, OVERRUN, ("unit < H ? unit : H - 1", "unit")),
    ),
    *cluster_mutants.MUTANTS,
    *norm_mutants.MUTANTS,
]
# For every day: one of each place.
USUAL = [*{m.where: m for m in reversed(MUTANTS)}.values()]


def uncovered():
    """Places in the kernels' sources that synchronise, and that no mutant removes or alters."""
    mutants = [*MUTANTS, *cluster_mutants.SPARE]
    for path in sorted(SOURCES.glob("*.cuh")):
        if path.name in ("primitives.cuh", "cluster.cuh"):  # they define what kernels call
            continue
        text = path.read_text()
        spans = [span for m in mutants if m.file == path.name for span in m.spans(text)]
        for line in re.finditer(r"^.*$", text, re.MULTILINE):
            for found in SYNCHRONISATION.finditer(line[0].split("//")[0]):
                at = line.start() + found.start()
                if not any(start <= at < end for start, end, _ in spans):
                    yield f"{path.name}:{text.count(chr(10), 0, at) + 1}: {line[0].strip()}"
