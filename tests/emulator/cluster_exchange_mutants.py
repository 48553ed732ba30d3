"""Mutants of how parts of the gradient of h travel between blocks; see mutants.py."""

from emulator.cluster_problems import (
    AHEAD,
    BACKWARD,
    BACKWARD_ODD,
    BACKWARD_SHARED,
    BACKWARD_TAGGED,
    BACKWARD_TAGGED_2,
    BACKWARD_TAGGED_BOTH,
    BACKWARD_TAGGED_LONG,
    NOT_INITIALISED,
    TOO_EARLY,
)
from emulator.mutant import DEADLOCK, RACE, WRONG, of

MUTANTS = [
    *of(
        "backward_exchange.cuh",
        "class PartsThroughCluster :",
        (
            "nobody opens",
            BACKWARD,
            f"{TOO_EARLY}|{NOT_INITIALISED}",
            ("{ mailboxes_.open(); }", "{}"),
        ),
        ("nobody closes", BACKWARD, RACE, ("{ mailboxes_.close(); }", "{}")),
        ("no wait", BACKWARD, AHEAD, ("{ mailboxes_.wait(j & 1, n >> 1); }", "{}")),
        (
            "columns past the end are written",
            BACKWARD,
            f"{RACE}|{WRONG}",
            ("if (n * 4 + pair >= pairs_) return;", ""),
        ),
        (
            "written for another peer",
            BACKWARD_SHARED,
            f"{RACE}|{WRONG}",
            ("q * (kWarps / kMTiles) * part_bytes_", "q * part_bytes_"),
        ),
        (
            "only the first part taken",
            BACKWARD,
            WRONG,
            ("sum_of_halves<kMostBlocksOfCluster>", "sum_of_halves<1>"),
        ),
        (
            "the last of an odd number of sequences is not sent",
            BACKWARD,
            WRONG,
            ("pairs_((place.rows() + 1) / 2)", "pairs_(place.rows() / 2)"),
        ),
        (
            "less is expected",
            BACKWARD,
            RACE,
            (
                "mailboxes_.expect(j & 1, slices_ * bytes())",
                "mailboxes_.expect(j & 1, slices_ * bytes() - 16)",
            ),
        ),
        (
            "one letter less is expected",
            BACKWARD,
            RACE,
            (
                "mailboxes_.expect(j & 1, slices_ * bytes())",
                "mailboxes_.expect(j & 1, (slices_ - 1) * bytes())",
            ),
        ),
        (
            "nothing is expected",
            BACKWARD,
            DEADLOCK,
            ("mailboxes_.expect(j & 1, slices_ * bytes());", ""),
        ),
        (
            "sent before they are there",
            BACKWARD,
            f"{RACE}|{WRONG}",
            ("__syncthreads();  // all warps have put theirs", ""),
        ),
        ("sent unseen", BACKWARD, RACE, ("copies_see();", "")),
        (
            "not sent",
            BACKWARD,
            DEADLOCK,
            ("letter_.send(j & 1, target(j), part_bytes_, bytes());", ""),
        ),
        (
            "less is sent",
            BACKWARD,
            DEADLOCK,
            (
                "letter_.send(j & 1, target(j), part_bytes_, bytes())",
                "letter_.send(j & 1, target(j), part_bytes_, bytes() - 16)",
            ),
        ),
        (
            "parts lie closer in a group of fewer",
            BACKWARD,
            f"{RACE}|{WRONG}",
            (
                "letter_.send(j & 1, target(j), part_bytes_, bytes())",
                "letter_.send(j & 1, target(j), bytes(), bytes())",
            ),
        ),
        (
            "one letter for all steps",
            BACKWARD,
            f"{RACE}|{WRONG}",
            ("letters_ + (j & 1) * parts_bytes_", "letters_"),
        ),
        (
            "letters over gradients",
            BACKWARD,
            f"{RACE}|{WRONG}",
            ("letters_ + 2 * parts_bytes_", "letters_ + parts_bytes_"),
        ),
        (
            "the second box lies elsewhere",
            BACKWARD,
            f"{RACE}|{WRONG}",
            ("part_bytes_, parts_bytes_)", "part_bytes_, part_bytes_)"),
        ),
        (
            "boxes of all blocks in one place",
            BACKWARD,
            RACE,
            ("boxes_ + place.slice * part_bytes_", "boxes_"),
        ),
        (
            "one box for all steps",
            BACKWARD,
            RACE,
            ("part_bytes_, parts_bytes_)", "part_bytes_, 0)"),
            ("boxes_ + (j & 1) * parts_bytes_", "boxes_"),
        ),
    ),
    *of(
        "backward_exchange.cuh",
        "class PartsInShared {",
        (
            "columns not as they are read",
            BACKWARD_ODD,
            WRONG,
            ("g ^ warp % kMTiles % 2 : g", "g : g"),
        ),
        (
            "columns of odd m-tiles not as they are read",
            BACKWARD_TAGGED_2,
            WRONG,
            ("(row % 2 ^ m % 2)", "row % 2"),
        ),
    ),
    *of(
        "backward_exchange.cuh",
        "class PartsThroughL2 :",
        (
            "other warps' sums are not waited for",
            BACKWARD_TAGGED,
            RACE,
            ("__syncthreads();  // all warps' sums are there", ""),
        ),
        (
            "the first gradients are not waited for",
            BACKWARD_TAGGED,
            RACE,
            ("{ __syncthreads(); }  // the block's first dgates are there", "{}"),
        ),
        (
            "nothing is waited for",
            BACKWARD_TAGGED,
            WRONG,
            (
                "take_words<kMTiles>( from_ + (j & 1) * box_, stride_, apart_, count_,",
                "take_words<kMTiles>( from_ + (j & 1) * box_, stride_, apart_, 0,",
            ),
        ),
        (
            "another step is waited for",
            BACKWARD_TAGGED,
            f"{DEADLOCK}|{WRONG}",
            ("expected = tag_of(j)", "expected = tag_of(j + 2)"),
        ),
        (
            "words have no step",
            BACKWARD_TAGGED,
            DEADLOCK,
            ("(__float_as_uint(x) & ~1u) | target.tag", "__float_as_uint(x)"),
        ),
        (
            "any word will do",
            BACKWARD_TAGGED,
            WRONG,
            ("return !(different & 1);", "return true;"),
        ),
        *(
            (
                f"any word {name} will do",
                BACKWARD_TAGGED,
                WRONG,
                (f"(words[m].{name} ^ expected)", "0"),
            )
            for name in "xyzw"
        ),
        (
            "what has no units is waited for",
            BACKWARD_TAGGED_2,
            DEADLOCK,
            ("if (m < m_tiles_)", ""),
        ),
        (
            "the first words are like none",
            BACKWARD_TAGGED,
            f"{DEADLOCK}|{WRONG}",
            ("return ~((j - 1) >> 1) & 1;", "return ((j - 1) >> 1) & 1;"),
        ),
        (
            "steps have one bit for two",
            BACKWARD_TAGGED,
            f"{DEADLOCK}|{WRONG}",
            ("~((j - 1) >> 1) & 1", "~(j - 1) & 1"),
        ),
        (
            "one buffer for all steps",
            BACKWARD_TAGGED_BOTH,
            f"{DEADLOCK}|{WRONG}",
            ("{to_ + (j & 1) * box_, tag_of(j)}", "{to_, tag_of(j)}"),
            ("from_ + (j & 1) * box_,", "from_,"),
        ),
        (
            "one place for all groups",
            BACKWARD_TAGGED,
            f"{DEADLOCK}|{WRONG}",
            (" + size_t(place.group) * 2 * box_", ""),
        ),
        (
            "for another block",
            BACKWARD_TAGGED_LONG,
            f"{DEADLOCK}|{WRONG}",
            ("kWarps / kMTiles * slices * part;", "slices * part;"),
        ),
        (
            "for the same block",
            BACKWARD_TAGGED_LONG,
            f"{DEADLOCK}|{WRONG}",
            ("store_words(target.to + q * put_stride_,", "store_words(target.to,"),
        ),
        (
            "columns past the end are waited for",
            BACKWARD_TAGGED,
            f"{DEADLOCK}|{WRONG}",
            ("if (here_) count_", "count_"),
            ("if (!here_) return;", ""),
        ),
        (
            "fewer parts than there are",
            BACKWARD_TAGGED_LONG,
            WRONG,
            ("(slices - warp + kWarps - 1)", "(slices - warp)"),
        ),
        (
            "only the first sum taken",
            BACKWARD_TAGGED_LONG,
            WRONG,
            ("sum_of_halves<kWarps>(part)", "sum_of_halves<1>(part)"),
        ),
        (
            "sums of all warps in one place",
            BACKWARD_TAGGED,
            f"{RACE}|{WRONG}",
            ("sums_ + warp * kWarpSums", "sums_"),
        ),
        (
            "gradients over sums",
            BACKWARD_TAGGED,
            f"{RACE}|{WRONG}",
            ("sums_ + kWarps * kWarpSums)", "sums_ + kWarpSums)"),
        ),
    ),
]
