"""What the mutants of the cluster kernels run, and what is said of them; see mutants.py."""

from emulator.mutant import RACE

# Arguments of lstm_driver for few_cluster_kernels.cu. Three slices of four blocks, so that one of
# them has no units; rows past the group's, of which the last has fewer; a slice that is not full.
FORWARD = "forward bfloat16 cluster 4x1 4+0 2 1 4 13 37 37 lengths"
FORWARD_PACKED = "forward bfloat16 cluster 4x1 4+0 2 1 4 13 37 37 packed"
FORWARD_TWO = "forward bfloat16 cluster 8x2 8+0 1 1 3 13 70 70 lengths"  # two cells a thread
FORWARD_48 = "forward bfloat16 cluster 12x1 6+0 1 1 3 3 90 90 lengths"  # 48 units do not divide 256
FORWARD_SHARED = "forward bfloat16 cluster 12x1 6+1 1 1 2 3 385 385 dense"  # nine blocks of sixteen
FORWARD_BOTH = "forward bfloat16 cluster 4x1 4+0 2 2 4 13 37 37 lengths"  # both directions
# Three slices, the last not full; the last group has a sequence less.
TAGGED = "forward bfloat16 tagged 4x1 8+0 2 1 4 9 37 37 lengths"
TAGGED_32 = "forward tf32 tagged 4x1 8+0 2 1 4 9 37 37 lengths"
TAGGED_BOTH = "forward bfloat16 tagged 4x1 8+0 1 2 4 5 21 21 lengths"
# Two pieces a thread, and five, four at a time; the last is too large for ThreadSanitizer.
TAGGED_LONG = "forward tf32 tagged 4x1 8+0 1 1 2 8 140 140 dense"
TAGGED_LARGE = "forward bfloat16 tagged 4x1 8+1 1 1 2 8 1100 1100 dense"
BACKWARD = "backward bfloat16 cluster 1x2 2+0 2 1 3 17 37 37 lengths"
BACKWARD_PACKED = "backward bfloat16 cluster 1x2 2+0 2 1 3 17 37 37 packed"
BACKWARD_48 = "backward bfloat16 cluster 3x1 3+0 1 1 3 3 90 90 lengths"
BACKWARD_BOTH = "backward bfloat16 cluster 1x2 2+0 2 2 3 17 37 37 lengths"
BACKWARD_ODD = "backward bfloat16 cluster 2x1 4+0 2 1 3 9 35 35 lengths"  # odd m-tiles of a warp
BACKWARD_32 = "backward tf32 cluster 2x1 2+0 2 1 3 9 35 35 lengths"  # one m-tile of the last two
BACKWARD_EIGHTS = "backward bfloat16 cluster 1x2 2+0 1 1 2 9 40 40 dense"  # whole 16-byte loads
BACKWARD_SHARED = "backward tf32 cluster 2x1 2+1 1 1 2 3 275 275 dense"
# Three slices, the last not full (2x1: with one m-tile); the last group has a sequence less.
BACKWARD_TAGGED = "backward bfloat16 tagged 1x1 8+0 2 1 4 9 37 37 lengths"
BACKWARD_TAGGED_2 = "backward bfloat16 tagged 2x1 4+0 2 1 4 9 75 75 lengths"
BACKWARD_TAGGED_BOTH = "backward bfloat16 tagged 1x1 8+0 1 2 4 5 21 21 lengths"
# Nine blocks: a warp adds up the parts of two.
BACKWARD_TAGGED_LONG = "backward bfloat16 tagged 1x1 8+0 1 1 3 1 137 137 dense"
# A warp adds up the parts of several blocks; weights in shared memory. Too large for TSan.
BACKWARD_TAGGED_SHARED = "backward tf32 tagged 1x1 4+1 1 1 2 1 530 530 dense"
# Nine pieces a thread, eight at a time; too large for ThreadSanitizer.
BACKWARD_TAGGED_LARGE = "backward bfloat16 tagged 1x1 8+1 1 1 2 3 1100 1100 dense"
# Three launches.
FORWARD_PARTS = "forward bfloat16 cluster 4x1 4+0 2 1 4 13 37 37 lengths+parts"
BACKWARD_PARTS = "backward bfloat16 cluster 1x2 2+0 2 1 4 17 37 37 lengths+parts"
CONTROL = [
    *(FORWARD, FORWARD_BOTH, FORWARD_PACKED, FORWARD_TWO, FORWARD_48, FORWARD_SHARED),
    *(TAGGED, TAGGED_32, TAGGED_BOTH, TAGGED_LONG),
    *(
        BACKWARD,
        BACKWARD_BOTH,
        BACKWARD_PACKED,
        BACKWARD_48,
        BACKWARD_ODD,
        BACKWARD_32,
        BACKWARD_EIGHTS,
    ),
    *(BACKWARD_SHARED, FORWARD_PARTS, BACKWARD_PARTS),
    *(BACKWARD_TAGGED, BACKWARD_TAGGED_2, BACKWARD_TAGGED_BOTH, BACKWARD_TAGGED_LONG),
]

# A block that does not wait is a step ahead.
AHEAD = f"{RACE}|more arrivals than the phase expects"
NOT_INITIALISED = "used before it is initialised"
# A peer's block that has not begun, or that has: its mbarriers are not there yet, or half.
TOO_EARLY = f"does not run|{NOT_INITIALISED}|data race"
