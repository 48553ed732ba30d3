"""Mutants of the cluster kernels; see mutants.py."""

from emulator.mutant import DEADLOCK, OVERRUN, RACE, WRONG, of

# Arguments of lstm_driver for few_cluster_kernels.cu. Three slices of four blocks, so that one of
# them has no units; rows past the group's; a slice that is not full.
FORWARD = "forward bfloat16 cluster 4x2 4+0 2 1 4 13 37 37 lengths"
FORWARD_48 = "forward bfloat16 cluster 12x1 5+0 1 1 3 7 90 90 lengths"  # 48 units do not divide 256
FORWARD_SHARED = "forward bfloat16 cluster 12x1 5+1 1 1 2 3 321 321 dense"
BACKWARD = "backward bfloat16 cluster 1x2 2+0 2 1 3 13 37 37 lengths"
BACKWARD_48 = "backward bfloat16 cluster 3x1 3+0 1 1 3 7 90 90 lengths"
BACKWARD_32 = "backward tf32 cluster 2x1 2+0 2 1 3 9 35 35 lengths"  # one m-tile of the last two
BACKWARD_EIGHTS = "backward bfloat16 cluster 1x2 2+0 1 1 2 9 40 40 dense"  # whole 16-byte loads
BACKWARD_SHARED = "backward tf32 cluster 2x1 2+1 1 1 2 3 275 275 dense"
# Three launches.
FORWARD_PARTS = "forward bfloat16 cluster 4x2 4+0 2 1 4 13 37 37 lengths+parts"
BACKWARD_PARTS = "backward bfloat16 cluster 1x2 2+0 2 1 4 13 37 37 lengths+parts"
CONTROL = [
    *(FORWARD, FORWARD_48, FORWARD_SHARED),
    *(BACKWARD, BACKWARD_48, BACKWARD_32, BACKWARD_EIGHTS, BACKWARD_SHARED),
    *(FORWARD_PARTS, BACKWARD_PARTS),
]

# A block that does not wait is a step ahead.
AHEAD = f"{RACE}|more arrivals than the phase expects"
NOT_INITIALISED = "used before it is initialised"
# A peer's block that has not begun, or that has: its mbarriers are not there yet, or half.
TOO_EARLY = f"does not run|{NOT_INITIALISED}|data race"

MUTANTS = [
    *of(
        "cluster_block.cuh",
        "class Mailboxes",
        (
            "no wait for what comes",
            BACKWARD,
            AHEAD,
            ("mbarrier_wait(&full_[box], count % 2);", ""),
        ),
        (
            "sent before all have begun",
            FORWARD,
            TOO_EARLY,
            ("fence_mbarrier_init(); } cluster_sync();", "fence_mbarrier_init(); }"),
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
        ("waits for the time before", FORWARD, AHEAD, ("count % 2", "(count + 1) % 2")),
        ("waits for the first time only", FORWARD, RACE, ("count % 2", "0")),
        (
            "counted in one mailbox",
            FORWARD,
            f"{DEADLOCK}|{RACE}|more arrivals",
            ("shared_address(&full_[box])", "shared_address(&full_[0])"),
        ),
        (
            "counted by the sender",
            FORWARD,
            "st.async|deadlock",
            (
                "map_to_rank(shared_address(&full_[box]), peer)",
                "shared_address(&full_[box])",
            ),
        ),
        (
            "sent to oneself",
            FORWARD,
            "st.async|deadlock",
            ("st_async(map_to_rank(place, peer)", "st_async(place"),
        ),
    ),
    *of(
        "cluster_block.cuh",
        "struct ClusterPlace",
        ("sequences of the next group", FORWARD, RACE, ("row_first + shape.group_rows", "B")),
        (
            "sequences past the end",
            FORWARD,
            OVERRUN,
            ("min(B, row_first + shape.group_rows)", "row_first + shape.group_rows"),
        ),
    ),
    *of(
        "cluster_forward.cuh",
        "forward_cluster(",
        (
            "sums read too early",
            FORWARD,
            RACE,
            (
                "__syncthreads();  // all warps' parts are there, and nobody reads this",
                "//",
            ),
        ),
        (
            "zeros written over the first state",
            FORWARD,
            f"{RACE}|{WRONG}",
            ("__syncthreads(); for (int row", "for (int row"),
        ),
        (
            "padding of the states not zeroed",
            FORWARD,
            WRONG,
            ("reinterpret_cast<uint4*>(states)[at_box] = make_uint4(0, 0, 0, 0);", ";"),
        ),
        (
            "padding of one state not zeroed",
            FORWARD,
            WRONG,
            ("at_box < 2 * box_bytes / 16", "at_box < box_bytes / 16"),
        ),
        (
            "first step's reset ignored",
            FORWARD,
            WRONG,
            ("if (resets(steps, steps.step_at(first), b)) continue;", ""),
        ),
        ("results of an empty sequence not made", FORWARD, WRONG, ("if (steps.lengths)", "if (0)")),
        (
            "threads without a cell",
            FORWARD_48,
            RACE,
            ("return Sum::has_cell(j) && sequence", "return sequence"),
        ),
        ("sequences past the end", FORWARD, OVERRUN, ("sequence(j) < place.row_end && ", "")),
        ("units past the end", FORWARD, OVERRUN, ("place.row_end && unit < H", "place.row_end")),
        (
            "ready before the first state is",
            FORWARD,
            RACE,
            ("mailboxes.open(); const int bytes", "const int bytes"),
            (
                "for (int row = threadIdx.x / 32;",
                "mailboxes.open(); for (int row = threadIdx.x / 32;",
            ),
        ),
        (
            "no wait",
            FORWARD,
            AHEAD,
            ("if (i > first) mailboxes.wait(box, (i - first - 1) / 2);", ""),
        ),
        (
            "wait for the time before",
            FORWARD,
            AHEAD,
            ("(i - first - 1) / 2", "(i - first + 1) / 2"),
        ),
        (
            "nothing is expected",
            FORWARD,
            DEADLOCK,
            ("if (goes_on) mailboxes.expect(next, bytes);", ""),
        ),
        (
            "less is expected",
            FORWARD,
            RACE,
            ("mailboxes.expect(next, bytes)", "mailboxes.expect(next, bytes - 16)"),
        ),
        (
            "one state for all steps",
            FORWARD,
            f"{RACE}|more arrivals",
            ("box = i % 2, next = (i + 1) % 2", "box = 0, next = 0"),
            ("(i - first - 1) / 2", "i - first - 1"),
        ),
        (
            "sender does not wait for its lanes",
            FORWARD,
            RACE,
            (
                "__syncwarp();  // the lane that sends speaks",
                "//",
            ),
        ),
        (
            "sent after the last step",
            FORWARD,
            "still on their way",
            ("if (goes_on) { const uint4 vector", "{ const uint4 vector"),
        ),
        (
            "sent by threads without a cell",
            FORWARD_48,
            f"{RACE}|{WRONG}|{DEADLOCK}",
            ("Sum::has_cell(j) && b < place", "b < place"),
        ),
        (
            "sent for the next group",
            FORWARD,
            DEADLOCK,
            ("b < place.row_end && unit / kVector", "unit / kVector"),
        ),
        (
            "units past the end are sent",
            FORWARD,
            f"{RACE}|still on their way|{DEADLOCK}",
            (" && unit / kVector * kVector < H", ""),
        ),
        ("not sent", FORWARD, DEADLOCK, ("mailboxes.send(peer, next, to, vector);", ";")),
        (
            "goes on from h0",
            FORWARD_PARTS,
            WRONG,
            ("if (first > 0) // h0 for", "if (false) // h0 for"),
        ),
        ("c is not left", FORWARD_PARTS, WRONG, ("if (last < steps.T)", "if (false)")),
        (
            "goes on from c0",
            FORWARD_PARTS,
            WRONG,
            ("first > 0 ? as<Acc>(d.cells)[at(b, H, unit)] :", ""),
        ),
        (
            "weights over the sums",
            FORWARD_SHARED,
            f"{RACE}|{WRONG}",
            ("Sum::kCells * 4 * (kWarps / kMWarps)", "Sum::kCells"),
        ),
    ),
    *of(
        "cluster_backward.cuh",
        "backward_cluster(",
        (
            "gradients read too early",
            BACKWARD,
            RACE,
            ("overwritten. __syncthreads();", "overwritten."),
        ),
        (
            "gradients past the end not zeroed",
            BACKWARD,
            WRONG,
            ("reinterpret_cast<uint4*>(own)[v] = make_uint4(0, 0, 0, 0);", ";"),
        ),
        (
            "gradients of one step not zeroed",
            BACKWARD,
            WRONG,
            ("v < 2 * kRows * kPitch / 16", "v < kRows * kPitch / 16"),
        ),
        (
            "zeros written over gradients",
            BACKWARD,
            f"{RACE}|{TOO_EARLY}",
            ("mailboxes.open(); for (int j", "for (int j"),
        ),
        (
            "rows of weights past the end",
            BACKWARD_EIGHTS,
            OVERRUN,
            ("if (row < H && unit < H && H", "if (unit < H && H"),
        ),
        (
            "rows of single weights past the end",
            BACKWARD,
            OVERRUN,
            ("} else if (row < H) {", "} else {"),
        ),
        (
            "warps write the same",
            BACKWARD_SHARED,
            f"{RACE}|{WRONG}",
            ("size_t(warp) * shared * kChunks * 64 + lane", "lane"),
        ),
        (
            "weights over gradients",
            BACKWARD_SHARED,
            f"{RACE}|{WRONG}",
            ("(own + 2 * kRows * kPitch)", "(own + kRows * kPitch)"),
        ),
        (
            "threads without a cell",
            BACKWARD_48,
            RACE,
            ("(kStride == kThreads || threadIdx.x < kStride) && ", ""),
        ),
        ("sequences past the end", BACKWARD, OVERRUN, ("sequence(j) < place.row_end && ", "")),
        ("units past the end", BACKWARD, OVERRUN, ("place.row_end && unit < H", "place.row_end")),
        (
            "columns past the end are sent",
            BACKWARD,
            DEADLOCK,
            ("if (n * 4 + pair >= pairs) return;", ""),
        ),
        (
            "m-tiles past the end are expected",
            BACKWARD_32,
            DEADLOCK,
            ("slices * own_tiles", "slices * kMTiles"),
        ),
        (
            "less is expected",
            BACKWARD,
            RACE,
            ("mailboxes.expect(j % 2, bytes);", "mailboxes.expect(j % 2, bytes - 16);"),
        ),
        ("nothing is expected", BACKWARD, DEADLOCK, ("mailboxes.expect(j % 2, bytes);", "")),
        (
            "not sent",
            BACKWARD,
            DEADLOCK,
            ("mailboxes.send(tile / kMTiles, box, shared_address(to), vector);", ""),
        ),
        (
            "no wait",
            BACKWARD,
            AHEAD,
            ("if (j > 0) mailboxes.wait(j % 2, (j - first_product) / 2);", ""),
        ),
        (
            "wait for the time before",
            BACKWARD,
            AHEAD,
            ("(j - first_product) / 2", "(j - first_product + 2) / 2"),
        ),
        (
            "one box for all steps",
            BACKWARD,
            RACE,
            ("boxes + box * box_vectors + ((place", "boxes + ((place"),
            ("boxes + j % 2 * box_vectors", "boxes"),
        ),
        (
            "gradients of one step",
            BACKWARD,
            RACE,
            ("own + (j + 1) % 2 * (kRows * kPitch)", "own"),
            ("own + j % 2 * (kRows * kPitch) + row", "own + row"),
        ),
        (
            "zeros written over the launch before's gradients",
            BACKWARD_PARTS,
            f"{RACE}|{WRONG}",
            ("__syncthreads(); // all of `own`", "// all of `own`"),
        ),
        (
            "the launch before's gradients not read",
            BACKWARD_PARTS,
            WRONG,
            ("Arithmetic::round_state(before[gate * H])", "from_acc<T>(Acc(0))"),
        ),
        (
            "gradients pass the reset of the launch before",
            BACKWARD_PARTS,
            WRONG,
            ("if (!steps.active(t, b) || resets(steps, t, b))", "if (!steps.active(t, b))"),
        ),
        (
            "gradients of c not gone on with",
            BACKWARD_PARTS,
            WRONG,
            ("dc[j] = as<Acc>(d.cells)[at(b, H, unit)];", ""),
        ),
        (
            "gradients that wait not gone on with",
            BACKWARD_PARTS,
            WRONG,
            ("carry[j] = as<Acc>(d.carry)[at(b, H, unit)];", ""),
        ),
        (
            "the launch before's last step stored again",
            BACKWARD_PARTS,
            WRONG,
            ("if (j > start) store(j - 1);", "store(j - 1);"),
        ),
        (
            "boxes of all blocks in one place",
            BACKWARD,
            RACE,
            ("(place.slice * kMTiles + m) * kNTiles", "m * kNTiles"),
        ),
    ),
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
]

# Precautions that no run can miss, and there all the same: sign "". A block has received all that
# its peers will ever send to it before it ends, and to one without units nobody sends anything;
# barriers of the cluster count only threads that have not ended.
LEAVES = ("mailboxes.close(); #endif", "\n#endif")
LEAVES_AT_ONCE = ("mailboxes.open(); mailboxes.close(); return;", "return;")
SPARE = [
    *of(
        "cluster_block.cuh",
        "class Mailboxes",
        ("nobody waits at the end", FORWARD, "", ("close() { cluster_sync(); }", "close() {}")),
    ),
    *of(
        "cluster_forward.cuh",
        "forward_cluster(",
        ("leaves when it is done", FORWARD, "", LEAVES),
        ("leaves without units", FORWARD, "", LEAVES_AT_ONCE),
    ),
    *of(
        "cluster_backward.cuh",
        "backward_cluster(",
        ("leaves when it is done", BACKWARD, "", LEAVES),
        ("leaves without units", BACKWARD, "", LEAVES_AT_ONCE),
    ),
]
