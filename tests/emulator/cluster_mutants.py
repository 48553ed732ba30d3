"""Mutants of the cluster kernels; see mutants.py."""

from emulator import cluster_backward_mutants, cluster_exchange_mutants, cluster_forward_mutants
from emulator.cluster_problems import (
    AHEAD,
    BACKWARD,
    BACKWARD_48,
    BACKWARD_BOTH,
    BACKWARD_PARTS,
    FORWARD,
    FORWARD_48,
    FORWARD_BOTH,
    FORWARD_SHARED,
    FORWARD_TWO,
    NOT_INITIALISED,
    TOO_EARLY,
)
from emulator.mutant import BEYOND, DEADLOCK, OVERRUN, RACE, UNFINISHED, WRONG, of

MUTANTS = [
    *of(
        "block.cuh",
        "class Course",
        ("a step more", FORWARD, WRONG, ("i < end_", "i <= end_")),
        ("a step less", FORWARD, WRONG, ("i < end_", "i < end_ - 1")),
        ("another end", FORWARD, WRONG, ("walk.T() : length", "walk.T() : walk.T()")),
        ("another end, reversed", FORWARD_BOTH, WRONG, ("walk.T() : length", "length : length")),
        ("begins with all, reversed", FORWARD_BOTH, WRONG, ("walk.T() - length : 0", "0 : 0")),
        ("never the first", BACKWARD, BEYOND, ("i == begin_,", "false,")),
        ("never the last", FORWARD, WRONG, ("i + 1 == end_,", "false,")),
        ("resets ignored", BACKWARD_BOTH, WRONG, ("active && walk.marked(t, b_)", "false")),
    ),
    *of(
        "block.cuh",
        "class Walk",
        ("rows the other way", FORWARD, BEYOND, ("reverse_ == kForth ?", "reverse_ != kForth ?")),
        ("rows one way only", BACKWARD_BOTH, BEYOND, ("reverse_ == kForth ?", "kForth ?")),
    ),
    *of(
        "cluster_block.cuh",
        "class Mailboxes",
        (
            "no wait for what comes",
            BACKWARD,
            AHEAD,
            ("mbarrier_wait(&full_[box], count & 1);", ""),
        ),
        (
            "sent before all have begun",
            FORWARD,
            TOO_EARLY,
            ("peers' copies may follow on it cluster_sync();", ""),
        ),
        ("one is not initialised", FORWARD, NOT_INITIALISED, ("mbarrier_init(&full_[0], 1);", "")),
        (
            "the other is not initialised",
            FORWARD,
            NOT_INITIALISED,
            ("mbarrier_init(&full_[1], 1);", ""),
        ),
        (
            "nobody expects",
            FORWARD,
            DEADLOCK,
            ("if (threadIdx.x == 0) mbarrier_arrive_expect_tx(&full_[box], unsigned(bytes));", ""),
        ),
        (
            "every warp expects",
            FORWARD,
            "more arrivals than the phase expects|data race|deadlock",
            (
                "if (threadIdx.x == 0) mbarrier_arrive_expect_tx",
                "if (threadIdx.x % 32 == 0) mbarrier_arrive_expect_tx",
            ),
        ),
        (
            "no bytes are expected",
            FORWARD,
            RACE,
            (
                "mbarrier_arrive_expect_tx(&full_[box], unsigned(bytes))",
                "mbarrier_arrive(&full_[box])",
            ),
        ),
        ("waits for the time before", FORWARD, AHEAD, ("count & 1", "(count + 1) & 1")),
        ("waits for the first time only", FORWARD, RACE, ("count & 1", "0")),
        (
            "leaves while peers copy from it",
            FORWARD,
            RACE,
            ("close() { cluster_sync(); }", "close() {}"),
        ),
    ),
    *of(
        "cluster_block.cuh",
        "class Letter {",
        (
            "not asked for",
            FORWARD,
            DEADLOCK,
            (
                "if (peer_ >= 0) copy_async(to_ + box * box_bytes_, from + peer_ * stride,"
                " unsigned(bytes), full_ + box * 8);",
                "",
            ),
        ),
        (
            "asked for by all",
            FORWARD,
            f"{RACE}|tx-count|more arrivals|{DEADLOCK}",
            ("if (peer_ >= 0) copy_async", "copy_async"),
        ),
        (
            "counted in one mailbox",
            FORWARD,
            f"{DEADLOCK}|{RACE}|more arrivals",
            ("full_ + box * 8", "full_"),
        ),
        (
            "all in one mailbox",
            FORWARD,
            f"{RACE}|{WRONG}",
            ("to_ + box * box_bytes_", "to_"),
        ),
        (
            "counted by the sender",
            FORWARD,
            "the mbarrier is not in the destination's block",
            (
                "map_to_rank(shared_address(mailboxes.full_), rank)",
                "shared_address(mailboxes.full_)",
            ),
        ),
        (
            "sent to oneself",
            FORWARD,
            "the mbarrier is not in the destination's block",
            ("map_to_rank(shared_address(place), rank)", "shared_address(place)"),
        ),
        (
            "the same for every peer",
            BACKWARD,
            f"{RACE}|{WRONG}",
            ("from + peer_ * stride", "from"),
        ),
        ("less is sent", FORWARD, DEADLOCK, ("unsigned(bytes)", "unsigned(bytes) - 16")),
        (
            "one lane of a warp has a peer",
            FORWARD_SHARED,
            DEADLOCK,
            ("lane < 2 &&", "lane < 1 &&"),
        ),
        (
            "peers that there are not",
            FORWARD,
            "map to rank .* of a cluster of 4",
            ("&& threadIdx.x / 32 + lane * kWarps < unsigned(slices)", ""),
        ),
        (
            "blocks without units get one",
            FORWARD,
            UNFINISHED,
            ("< unsigned(slices)", "< cluster_size()"),
        ),
    ),
    *of(
        "cluster_block.cuh",
        "struct Ahead",
        ("nobody waits", FORWARD, WRONG, ("async_wait<1>();", "")),
        ("waits for the step before", FORWARD, WRONG, ("async_wait<1>()", "async_wait<2>()")),
        ("steps do not end", FORWARD, WRONG, ("async_commit();", "")),
        (
            "one place for all steps",
            FORWARD,
            WRONG,
            ("step % 2 * kCells + cell", "cell"),
        ),
        (
            "one place for all cells",
            FORWARD_TWO,
            WRONG,
            ("step % 2 * kCells + cell", "step % 2 * kCells"),
        ),
    ),
    *of(
        "block.cuh",
        "class FetchedWords",
        (
            "one place for all threads",
            FORWARD,
            RACE,
            (
                "reinterpret_cast<float*>(memory) + thread",
                "reinterpret_cast<float*>(memory)",
            ),
        ),
        ("one place for all slots", FORWARD, WRONG, ("slot * kWords + word", "word")),
        ("one place for all words", FORWARD, WRONG, ("slot * kWords + word", "slot")),
    ),
    *of(
        "cluster_block.cuh",
        "struct SlicePlace",
        ("sequences of the next group", FORWARD, RACE, ("row_first + shape.group_rows", "B")),
        (
            "sequences past the end",
            FORWARD,
            OVERRUN,
            ("min(B, row_first + shape.group_rows)", "row_first + shape.group_rows"),
        ),
    ),
    *cluster_forward_mutants.MUTANTS,
    *cluster_backward_mutants.MUTANTS,
    *cluster_exchange_mutants.MUTANTS,
    *of(
        "product.cuh",
        "class Weights",
        (
            "warps of other rows write the same",
            FORWARD_SHARED,
            f"{RACE}|{WRONG}",
            ("size_t(threadIdx.x / 32) * shared", "size_t(warp) * shared"),
        ),
    ),
    *of(
        "product.cuh",
        "struct WarpShare",
        (
            "warps have the same rows",
            FORWARD,
            f"{RACE}|{WRONG}",
            ("kMWarps == 1 ? 0 : ", "true ? 0 : "),
        ),
    ),
    *of(
        "product.cuh",
        "struct StateInShared",
        (
            "lanes of sequences that are not there read on",
            FORWARD_48,
            RACE,
            ("(b & (rows - 1))", "b"),
        ),
        (
            "sequences in order",
            FORWARD,
            WRONG,
            (" ^ swapped(int(threadIdx.x % 4), rows)", ""),
        ),
        (
            "the next sequence's for the next k's",
            FORWARD,
            f"{RACE}|{WRONG}",
            ("return uint32_t(rows);", "return 1;"),
        ),
    ),
]

# Precautions that no run can miss, and there all the same: sign "".
SPARE = [
    # The emulator does not know what is written to shared memory by threads from what copies write.
    *of(
        "cluster_block.cuh",
        "class Mailboxes",
        (
            "copies before what was written",
            FORWARD,
            "",
            ("copies_see();  // what was written here before; peers' copies may follow on it", ""),
        ),
        ("leaves without units", BACKWARD, "", ("Mailboxes(memory).open(); close();", "")),
    ),
    # To a block without units nobody sends anything; barriers of the cluster count only threads
    # that have not ended. Threads without a cell have rows past a group's: 48 units have groups of
    # 4 sequences at most.
    *of(
        "cluster_forward.cuh",
        "forward_resident(",
        (
            "threads without a cell",
            FORWARD_48,
            "",
            ("return Sum::has_cell(j) && sequence(j)", "return sequence(j)"),
        ),
    ),
    # The block has met since the last product read what it is overwritten by.
    *of(
        "cluster_backward.cuh",
        "backward_resident(",
        (
            "threads without a cell",
            BACKWARD_48,
            "",
            ("(kStride == kThreads || threadIdx.x < kStride) && ", ""),
        ),
        (
            "gradients of one step",
            BACKWARD_PARTS,
            "",
            ("own + (j + 1) % 2 * (kRows * kPitch)", "own"),
            ("own + (start + 1) % 2 * (kRows * kPitch)", "own"),
            ("own + box * (kRows * kPitch)", "own"),
        ),
    ),
]
