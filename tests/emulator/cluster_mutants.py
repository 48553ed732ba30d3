"""Mutants of the cluster kernels; see mutants.py."""

from emulator.mutant import DEADLOCK, OVERRUN, RACE, WRONG, of

# Arguments of lstm_driver for few_cluster_kernels.cu. Three slices of four blocks, so that one of
# them has no units; rows past the group's, of which the last has fewer; a slice that is not full.
FORWARD = "forward bfloat16 cluster 4x1 4+0 2 1 4 13 37 37 lengths"
FORWARD_PACKED = "forward bfloat16 cluster 4x1 4+0 2 1 4 13 37 37 packed"
FORWARD_TWO = "forward bfloat16 cluster 8x2 8+0 1 1 3 13 70 70 lengths"  # two cells a thread
FORWARD_48 = "forward bfloat16 cluster 12x1 6+0 1 1 3 3 90 90 lengths"  # 48 units do not divide 256
FORWARD_SHARED = "forward bfloat16 cluster 12x1 6+1 1 1 2 3 385 385 dense"  # nine blocks of sixteen
BACKWARD = "backward bfloat16 cluster 1x2 2+0 2 1 3 17 37 37 lengths"
BACKWARD_PACKED = "backward bfloat16 cluster 1x2 2+0 2 1 3 17 37 37 packed"
BACKWARD_48 = "backward bfloat16 cluster 3x1 3+0 1 1 3 3 90 90 lengths"
BACKWARD_32 = "backward tf32 cluster 2x1 2+0 2 1 3 9 35 35 lengths"  # one m-tile of the last two
BACKWARD_EIGHTS = "backward bfloat16 cluster 1x2 2+0 1 1 2 9 40 40 dense"  # whole 16-byte loads
BACKWARD_SHARED = "backward tf32 cluster 2x1 2+1 1 1 2 3 275 275 dense"
# Three launches.
FORWARD_PARTS = "forward bfloat16 cluster 4x1 4+0 2 1 4 13 37 37 lengths+parts"
BACKWARD_PARTS = "backward bfloat16 cluster 1x2 2+0 2 1 4 17 37 37 lengths+parts"
CONTROL = [
    *(FORWARD, FORWARD_PACKED, FORWARD_TWO, FORWARD_48, FORWARD_SHARED),
    *(BACKWARD, BACKWARD_PACKED, BACKWARD_48, BACKWARD_32, BACKWARD_EIGHTS, BACKWARD_SHARED),
    *(FORWARD_PARTS, BACKWARD_PARTS),
]

# A block that does not wait is a step ahead.
AHEAD = f"{RACE}|more arrivals than the phase expects"
NOT_INITIALISED = "used before it is initialised"
# A peer's block that has not begun, or that has: its mbarriers are not there yet, or half.
TOO_EARLY = f"does not run|{NOT_INITIALISED}|data race"
# What it has sent may not have been read yet.
LEAVES = ("mailboxes.close(); #endif", "\n#endif")

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
        ("waits for the time before", FORWARD, AHEAD, ("count % 2", "(count + 1) % 2")),
        ("waits for the first time only", FORWARD, RACE, ("count % 2", "0")),
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
            "still on their way",
            ("< unsigned(slices)", "< cluster_size()"),
        ),
    ),
    *of(
        "cluster_block.cuh",
        "class Ahead",
        ("nobody waits", FORWARD, WRONG, ("async_wait<1>();", "")),
        ("waits for the step before", FORWARD, WRONG, ("async_wait<1>()", "async_wait<2>()")),
        ("steps do not end", FORWARD, WRONG, ("async_commit();", "")),
        (
            "one place for all steps",
            FORWARD,
            WRONG,
            ("(step % 2 * kWords + word)", "word"),
        ),
        (
            "one place for all cells",
            FORWARD_TWO,
            WRONG,
            ("* kCells + cell) * kThreads", "* kCells) * kThreads"),
        ),
        (
            "one place for all threads",
            FORWARD,
            RACE,
            ("reinterpret_cast<float*>(memory) + threadIdx.x", "reinterpret_cast<float*>(memory)"),
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
            ("reinterpret_cast<uint4*>(states)[v] = make_uint4(0, 0, 0, 0);", ";"),
        ),
        (
            "padding of one state not zeroed",
            FORWARD,
            WRONG,
            ("v < 2 * (box_bytes + slice_bytes) / 16", "v < box_bytes / 16"),
        ),
        (
            "padding of its own part not zeroed",
            FORWARD,
            WRONG,
            ("v < 2 * (box_bytes + slice_bytes) / 16", "v < 2 * box_bytes / 16"),
        ),
        (
            "padding of its own part's copy not zeroed",
            FORWARD,
            WRONG,
            ("v < 2 * (box_bytes + slice_bytes) / 16", "v < (2 * box_bytes + slice_bytes) / 16"),
        ),
        (
            "fewer rows than sequences",
            FORWARD,
            f"{RACE}|{WRONG}",
            (
                "lstm_ext::state_rows(args.shape.group_rows)",
                "lstm_ext::state_rows(args.shape.group_rows) / 2",
            ),
        ),
        (
            "first step's reset ignored",
            FORWARD,
            WRONG,
            ("if (walk.resets(walk.step_at(first), b)) continue;", ""),
        ),
        (
            "results of an empty sequence not made",
            FORWARD,
            WRONG,
            ("if (length[j]) continue;", "continue;"),
        ),
        ("sequences past the end", FORWARD, OVERRUN, ("sequence(j) < place.row_end && ", "")),
        ("units past the end", FORWARD, OVERRUN, ("place.row_end && unit < H", "place.row_end")),
        (
            "ready before the first state is",
            FORWARD,
            RACE,
            ("mailboxes.open(); // Rows of the next step", "// Rows of the next step"),
            (
                "for (int row = threadIdx.x / 32;",
                "mailboxes.open(); for (int row = threadIdx.x / 32;",
            ),
        ),
        ("first step's operands not fetched", FORWARD, WRONG, ("fetch(first, turn);", "")),
        ("operands not closed", FORWARD, WRONG, ("ahead.close();", "")),
        ("operands not waited for", FORWARD, WRONG, ("ahead.wait();", "")),
        (
            "operands of the step before",
            FORWARD,
            WRONG,
            ("ahead.get(i, gate, j)", "ahead.get(i + 1, gate, j)"),
        ),
        (
            "rows of the step before",
            FORWARD_PACKED,
            WRONG,
            ("walk.step_at(i + 2)", "walk.step_at(i + 1)"),
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
            ("if (goes_on) mailboxes.expect(next, slices * slice_bytes);", ""),
        ),
        (
            "less is expected",
            FORWARD,
            RACE,
            ("slices * slice_bytes);", "slices * slice_bytes - 16);"),
        ),
        (
            "one letter less is expected",
            FORWARD,
            RACE,
            ("slices * slice_bytes);", "(slices - 1) * slice_bytes);"),
        ),
        (
            "one state for all steps",
            FORWARD,
            f"{RACE}|more arrivals",
            ("box = i % 2, next = (i + 1) % 2", "box = 0, next = 0"),
            ("(i - first - 1) / 2", "i - first - 1"),
        ),
        (
            "one letter for all steps",
            FORWARD,
            RACE,
            ("reinterpret_cast<T*>(own + next * slice_bytes)", "reinterpret_cast<T*>(own)"),
            ("letter.send(next, own + next * slice_bytes", "letter.send(next, own"),
        ),
        (
            "sent before it is there",
            FORWARD,
            RACE,
            ("__syncthreads();  // all of this block's part is there", ""),
        ),
        ("sent unseen", FORWARD, RACE, ("copies_see();", "")),
        (
            "sent after the last step",
            FORWARD,
            "still on their way",
            ("if (goes_on) { copies_see();", "{ copies_see();"),
        ),
        (
            "not sent",
            FORWARD,
            DEADLOCK,
            ("letter.send(next, own + next * slice_bytes, 0, slice_bytes);", ""),
        ),
        (
            "less is sent",
            FORWARD,
            DEADLOCK,
            ("0, slice_bytes);", "0, slice_bytes - 16);"),
        ),
        (
            "every peer is sent another part",
            FORWARD,
            f"{RACE}|{WRONG}",
            ("0, slice_bytes);", "slice_bytes, slice_bytes);"),
        ),
        (
            "states of all blocks in one place",
            FORWARD,
            f"{RACE}|{WRONG}",
            ("states + place.slice * slice_bytes", "states"),
        ),
        (
            "the second state lies elsewhere",
            FORWARD,
            f"{RACE}|{WRONG}",
            ("slice_bytes, box_bytes);", "slice_bytes, slice_bytes);"),
        ),
        (
            "all cells of a thread in one place",
            FORWARD_TWO,
            WRONG,
            ("j ? place_of(unit, row_of(j)) - own_start : first_own_cell", "first_own_cell"),
        ),
        (
            "its own part counts from the first unit",
            FORWARD,
            f"{RACE}|{WRONG}|past the end",
            ("pinned(place_of(unit, row_of(0)) - own_start)", "pinned(place_of(unit, row_of(0)))"),
        ),
        (
            "goes on from h0",
            FORWARD_PARTS,
            WRONG,
            ("if (first > 0) // h0 for", "if (false) // h0 for"),
        ),
        ("leaves when it is done", FORWARD, RACE, LEAVES),
        ("c is not left", FORWARD_PARTS, WRONG, ("if (last < walk.T())", "if (false)")),
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
        (
            "sums over what is fetched",
            FORWARD,
            f"{RACE}|{WRONG}",
            ("(fetched + ahead_bytes(kForwardWords, kCells))", "(fetched)"),
        ),
        (
            "fetched over its own part",
            FORWARD,
            f"{RACE}|{WRONG}",
            ("own + 2 * slice_bytes", "own + slice_bytes"),
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
            "fetched over gradients",
            BACKWARD,
            f"{RACE}|{WRONG}",
            ("fetched = own + 2 * kRows * kPitch", "fetched = own + kRows * kPitch"),
        ),
        (
            "weights over what is fetched",
            BACKWARD_SHARED,
            f"{RACE}|{WRONG}",
            ("(fetched + ahead_bytes(kBackwardWords, kCells))", "(fetched)"),
        ),
        ("sequences past the end", BACKWARD, OVERRUN, ("sequence(j) < place.row_end && ", "")),
        ("units past the end", BACKWARD, OVERRUN, ("place.row_end && unit < H", "place.row_end")),
        (
            "columns past the end are written",
            BACKWARD,
            f"{RACE}|{WRONG}",
            ("if (n * 4 + pair >= pairs) return;", ""),
        ),
        (
            "the last of an odd number of sequences is not sent",
            BACKWARD,
            WRONG,
            ("pairs = (place.rows() + 1) / 2", "pairs = place.rows() / 2"),
        ),
        (
            "less is expected",
            BACKWARD,
            RACE,
            (
                "mailboxes.expect(j % 2, slices * bytes)",
                "mailboxes.expect(j % 2, slices * bytes - 16)",
            ),
        ),
        (
            "one letter less is expected",
            BACKWARD,
            RACE,
            (
                "mailboxes.expect(j % 2, slices * bytes)",
                "mailboxes.expect(j % 2, (slices - 1) * bytes)",
            ),
        ),
        (
            "nothing is expected",
            BACKWARD,
            DEADLOCK,
            ("mailboxes.expect(j % 2, slices * bytes);", ""),
        ),
        (
            "sent before they are there",
            BACKWARD,
            RACE,
            ("__syncthreads();  // all warps have written", ""),
        ),
        ("sent unseen", BACKWARD, RACE, ("copies_see();", "")),
        ("not sent", BACKWARD, DEADLOCK, ("letter.send(j % 2, parts, part_bytes, bytes);", "")),
        (
            "less is sent",
            BACKWARD,
            DEADLOCK,
            (
                "letter.send(j % 2, parts, part_bytes, bytes)",
                "letter.send(j % 2, parts, part_bytes, bytes - 16)",
            ),
        ),
        (
            "parts lie closer in a group of fewer",
            BACKWARD,
            f"{RACE}|{WRONG}",
            (
                "letter.send(j % 2, parts, part_bytes, bytes)",
                "letter.send(j % 2, parts, bytes, bytes)",
            ),
        ),
        (
            "one letter for all steps",
            BACKWARD,
            RACE,
            ("letters + j % 2 * parts_bytes", "letters"),
        ),
        (
            "letters over gradients",
            BACKWARD,
            f"{RACE}|{WRONG}",
            ("own = letters + 2 * parts_bytes", "own = letters + parts_bytes"),
        ),
        (
            "the second box lies elsewhere",
            BACKWARD,
            f"{RACE}|{WRONG}",
            ("part_bytes, parts_bytes);", "part_bytes, part_bytes);"),
        ),
        (
            "boxes of all blocks in one place",
            BACKWARD,
            RACE,
            ("boxes + place.slice * part_bytes", "boxes"),
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
            ("part_bytes, parts_bytes);", "part_bytes, 0);"),
            ("boxes + j % 2 * parts_bytes", "boxes"),
        ),
        ("first step's operands not fetched", BACKWARD, WRONG, ("fetch(start);", "")),
        ("operands not closed", BACKWARD, WRONG, ("ahead.close();", "")),
        ("operands not waited for", BACKWARD, WRONG, ("ahead.wait();", "")),
        (
            "operands of the step before",
            BACKWARD,
            WRONG,
            ("in.c = ahead.get(j, 4, i)", "in.c = ahead.get(j + 1, 4, i)"),
        ),
        (
            "gradients of the next step's outputs",
            BACKWARD,
            WRONG,
            ("in.dy = to_acc(dy[i])", "in.dy = to_acc(next_dy[i])"),
        ),
        (
            "c before the first step from a step",
            BACKWARD,
            WRONG,
            ("turn[i].first ? cell.first_c(turn[i]) : ahead", "ahead"),
        ),
        (
            "rows of the step before",
            BACKWARD_PACKED,
            WRONG,
            ("rows_after = rows_at(j + 2)", "rows_after = rows_at(j + 1)"),
        ),
        (
            "gradients stored as the next step's",
            BACKWARD,
            WRONG,
            ("store(j - 1, before);", "store(j - 1, turn);"),
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
            ("if (!turn.active || turn.reset)", "if (!turn.active)"),
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
        ("leaves when it is done", BACKWARD, RACE, LEAVES),
        (
            "gradients of c not left",
            BACKWARD_PARTS,
            WRONG,
            ("as<Acc>(d.cells)[at(sequence(j), H, unit)] = dc[j];", ""),
        ),
        (
            "gradients that wait not left",
            BACKWARD_PARTS,
            WRONG,
            ("as<Acc>(d.carry)[at(sequence(j), H, unit)] = carry[j];", ""),
        ),
        (
            "a step before the launch's first stored",
            BACKWARD_PARTS,
            f"{RACE}|{WRONG}",
            ("if (j > start) store(j - 1, before);", "store(j - 1, before);"),
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
LEAVES_AT_ONCE = ("mailboxes.open(); mailboxes.close(); return;", "return;")
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
    ),
    # To a block without units nobody sends anything; barriers of the cluster count only threads
    # that have not ended. Threads without a cell have rows past a group's: 48 units have groups of
    # 4 sequences at most.
    *of(
        "cluster_forward.cuh",
        "forward_cluster(",
        ("leaves without units", FORWARD, "", LEAVES_AT_ONCE),
        ("threads without a cell", FORWARD_48, "", ("Sum::has_cell(j) && ", "")),
    ),
    # The block has met since the last product read what it is overwritten by.
    *of(
        "cluster_backward.cuh",
        "backward_cluster(",
        ("leaves without units", BACKWARD, "", LEAVES_AT_ONCE),
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
            ("own + j % 2 * (kRows * kPitch) + row", "own + row"),
        ),
    ),
]
