"""Mutants of the layer norm's kernels; see mutants.py."""

from emulator.mutant import OVERRUN, RACE, WRONG, of

# Arguments of lstm_driver for few_kernels.cu.
FORWARD = "forward float32 step 2x1 0+0 1 1 3 3 21 21 norm"
FORWARD_LENGTHS = "forward bfloat16 step 2x1 0+0 1 2 3 3 21 21 norm+lengths"
BACKWARD = "backward float32 step 1x1 0+0 1 1 3 3 21 21 norm"
BACKWARD_LENGTHS = "backward float32 step 1x1 0+0 1 2 3 3 21 21 norm+lengths"
BACKWARD_PACKED = "backward bfloat16 step 1x1 0+0 1 1 3 3 21 21 norm+packed"
CONTROL = [FORWARD, FORWARD_LENGTHS, BACKWARD, BACKWARD_LENGTHS, BACKWARD_PACKED]

MUTANTS = [
    *of(
        "norm.cuh",
        "Pair<Acc> block_sums(",
        (
            "sums overwritten too early",
            FORWARD,
            RACE,
            ("__syncthreads();  // the sums before these have been read", ""),
        ),
        (
            "sums read too early",
            FORWARD,
            RACE,
            ("__syncthreads();  // all warps' sums are there", ""),
        ),
        ("every lane writes", FORWARD, RACE, ("if (threadIdx.x % 32 == 0) {", "{")),
        ("sums of one warp", FORWARD, WRONG, ("warp < kWarps", "warp < 1")),
    ),
    *of(
        "norm.cuh",
        "struct RowMoments",
        ("no epsilon", FORWARD_LENGTHS, WRONG, ("variance + Acc(epsilon)", "variance")),
        ("squares of what is not centred", FORWARD, WRONG, ("value(k) - mean", "value(k)")),
    ),
    *of(
        "norm.cuh",
        "forward_norm(",
        ("state not handed on", FORWARD, WRONG, ("int64_t((i + 1) % 2) * B * K", "0")),
        (
            "steps not taken are taken",
            FORWARD_LENGTHS,
            WRONG,
            ("if (!turn.active) {", "if (false) {"),
        ),
        (
            "state not kept over a step not taken",
            FORWARD_LENGTHS,
            WRONG,
            ("return state[at(b, K, unit)];", "return from_acc<T>(Acc(0));"),
        ),
        (
            "cell not kept over a step not taken",
            FORWARD_LENGTHS,
            WRONG,
            (
                "as<Acc>(d.cells)[at(b, H, unit)] = c; hand_on(unit, result);",
                "hand_on(unit, result);",
            ),
        ),
        (
            "one product for all sequences",
            FORWARD,
            f"{RACE}|{WRONG}",
            ("as<Acc>(d.product) + at(b, 4 * H, 0)", "as<Acc>(d.product)"),
        ),
    ),
    *of(
        "norm.cuh",
        "backward_norm(",
        ("gradients not handed on", BACKWARD, WRONG, ("int64_t(j % 2) * B * K", "0")),
        (
            "gradient of the cell not handed on",
            BACKWARD,
            WRONG,
            (
                "cell.put_dc0(j, turn, dc); as<Acc>(d.cells)[at(b, H, unit)] = dc;",
                "cell.put_dc0(j, turn, dc);",
            ),
        ),
        (
            "steps not taken are taken",
            BACKWARD_LENGTHS,
            WRONG,
            ("if (!turn.active) {", "if (j == walk.T()) {"),
        ),
        (
            "gradients of steps not taken not zeroed",
            BACKWARD_LENGTHS,
            WRONG,
            ("as<Acc>(d.dgates)[at(row, 4 * H, k)] = 0;", ""),
        ),
        (
            "gradients of their products not zeroed",
            BACKWARD_LENGTHS,
            WRONG,
            ("if (d.dproduct) as<T>(d.dproduct)[at(row, 4 * H, k)] = from_acc<T>(Acc(0));", ""),
        ),
        (
            "rows that a packed batch does not have",
            BACKWARD_PACKED,
            OVERRUN,
            ("if (j == walk.T() || walk.packed()) return;", "if (j == walk.T()) return;"),
        ),
        ("carry not kept", BACKWARD_LENGTHS, WRONG, ("if (carried) as<Acc>", "if (false) as<Acc>")),
        ("reset ignored", BACKWARD_LENGTHS, WRONG, ("turn.reset ? from_acc<T>(Acc(0)) : ", "")),
        (
            "one product for all sequences",
            BACKWARD,
            f"{RACE}|{WRONG}",
            ("as<Acc>(d.product) + at(b, 6 * H, 0)", "as<Acc>(d.product)"),
        ),
        (
            "sums of all sequences in one",
            BACKWARD,
            f"{RACE}|{WRONG}",
            ("as<Acc>(d.dnorm) + at(b, 6 * H, 0)", "as<Acc>(d.dnorm)"),
        ),
    ),
]
