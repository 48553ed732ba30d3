"""The benchmark's problem lists and their arithmetic."""

import dataclasses
import itertools

import pytest

from bench.suites import MODES, SCALING_BASE, SECOND, SUITES, Problem, modes_of, spread, square

pytestmark = pytest.mark.cpu_only(reason="no layer runs")

# The design's lists: (T, B, H) of every problem whose input is as wide as its state and which has
# one layer and direction, no projection and a padded batch.
PLAIN = {
    "deepbench-train": {
        *((25, b, h) for h in (512, 1024, 2048, 4096) for b in (16, 32, 64, 128)),
        *((50, b, 1536) for b in (8, 16, 32)),
        *((150, b, 256) for b in (16, 32, 64)),
    },
    "deepbench-infer": {
        *((25, b, h) for h in (512, 1024, 2048) for b in (1, 2, 4)),
        *((50, b, 1536) for b in (1, 2, 4)),
        *((150, b, 256) for b in (1, 2, 4)),
    },
    "flashrnn": {
        *((1024, b, 768) for b in (2, 4, 8, 16, 32, 64, 128, 256)),
        *((t, 16, 768) for t in (256, 512, 1024, 2048)),
    },
    "classic": {(100, 64, 512)},
    "edges": {(100, b, 128) for b in (7, 8, 9, 128, 136)},
    "cpu": {
        (50, 1, 64),
        (50, 1, 128),
        (100, 1, 256),
        (25, 1, 512),
        (25, 4, 512),
        (25, 1, 1024),
        (150, 4, 256),
        (100, 16, 256),
        (50, 64, 128),
        (50, 64, 512),
    },
}


def is_plain(problem):
    return problem == square(problem.steps, problem.batch, problem.hidden_size, label=problem.label)


def others(suite):
    return [problem for problem in SUITES[suite] if not is_plain(problem)]


@pytest.mark.parametrize("suite", PLAIN)
def test_suite_holds_the_plain_problems_of_the_design(suite):
    plain = [p for p in SUITES[suite] if is_plain(p)]
    assert {(p.steps, p.batch, p.hidden_size) for p in plain} == PLAIN[suite]
    assert len(plain) == len(PLAIN[suite])


@pytest.mark.parametrize(
    "suite, count",
    [
        ("deepbench-train", 22),
        ("deepbench-infer", 15),
        ("flashrnn", 11),
        ("classic", 3),
        ("edges", 12),
        ("cpu", 13),
        ("host", 4),
        ("one-step", 20),
        ("cell", 16),
        ("decoder", 12),
        ("random", 60),
        ("second", 11),
        ("quantized", 17),
        ("scaling", 16),
        ("gate", 6),
    ],
)
def test_suite_is_complete(suite, count):
    assert len(SUITES[suite]) == count
    assert len({p.name for p in SUITES[suite]}) == count, "names must tell the rows apart"


def test_suites_are_those_of_the_design():
    own = {"host", "one-step", "cell", "decoder", "random", "second", "quantized"}
    assert set(SUITES) == PLAIN.keys() | own | {"scaling", "gate"}
    assert not others("deepbench-train") + others("deepbench-infer") + others("flashrnn")


def test_classic_problems():
    appleyard, gnmt = others("classic")
    assert appleyard == square(100, 64, 512, num_layers=4, label="appleyard")
    assert (gnmt.batch, gnmt.input_size, gnmt.hidden_size, gnmt.num_layers) == (128, 1024, 1024, 4)
    assert gnmt.first_bidirectional and not gnmt.bidirectional
    assert len(gnmt.lengths) == 128


def test_edges_change_one_thing_at_a_time():
    base = Problem(100, 8, 128, 128)
    assert base in SUITES["edges"]
    changes = []
    for problem in SUITES["edges"]:
        fields = dataclasses.asdict(problem).items()
        changes.append([(k, v) for k, v in fields if v != getattr(base, k)])
    assert sorted(map(len, changes)) == [0] + [1] * 11
    (lengths,) = [v for change in changes for k, v in change if k == "lengths"]
    assert max(lengths) == 100 and len(lengths) == 8
    expected = {
        *(("hidden_size", h) for h in (129, 192, 193)),
        *(("batch", b) for b in (7, 9, 128, 136)),
        ("input_size", 100),
        ("num_layers", 2),
        ("bidirectional", True),
        ("lengths", lengths),
    }
    assert {change[0] for change in changes if change} == expected


def test_cpu_problems():
    packed, projected, deep = others("cpu")
    assert packed == square(100, 32, 256, lengths=packed.lengths)
    assert (min(packed.lengths), max(packed.lengths)) == (5, 100)
    assert projected == square(100, 32, 256, proj_size=128)
    assert deep == square(100, 32, 128, num_layers=2, bidirectional=True)


def test_random_problems_are_of_every_kind():
    """Drawn from a seed: the same on every machine, so that records can be compared."""
    problems = SUITES["random"]
    for kind in ("bidirectional", "proj_size", "lengths"):
        assert 5 < sum(bool(getattr(p, kind)) for p in problems) < 30
    assert {p.num_layers for p in problems} == {1, 2, 3}
    assert problems[0].name == "T1 B8 H22 proj11 bi"
    assert problems[-1].name == "T33 B50 H256 I1 L3 proj128"


def test_scaling_changes_one_size_at_a_time():
    """T and B double, H too."""
    sizes = {(p.steps, p.batch, p.hidden_size) for p in SUITES["scaling"]}
    assert all(is_plain(problem) for problem in SUITES["scaling"])
    for axis, base in enumerate(SCALING_BASE):
        along = sorted(
            size[axis]
            for size in sizes
            if all(size[k] == SCALING_BASE[k] for k in range(3) if k != axis)
        )
        assert base in along and len(along) >= 5
        assert all(b == 2 * a for a, b in itertools.pairwise(along))


def test_the_gate_is_a_part_of_the_cpu_suite():
    assert set(SUITES["gate"]) <= set(SUITES["cpu"])


def test_modes():
    assert modes_of("cpu", None) == MODES
    assert modes_of("deepbench-train", None) == ("training",)
    assert modes_of("deepbench-infer", None) == ("inference",)
    assert modes_of("deepbench-infer", "both") == MODES
    assert modes_of("cpu", "training") == ("training",)
    assert modes_of("second", None) == modes_of("cpu", SECOND) == (SECOND,)


def test_spread_of_lengths():
    assert spread(5, 100, 2) == (5, 100)
    assert spread(2, 5, 4) == (2, 3, 4, 5)


def test_lengths_must_fit_the_batch():
    with pytest.raises(ValueError, match="lengths must name 2 sequences, the longest of 3 steps"):
        Problem(3, 2, 4, 4, lengths=(3, 2, 1))
    with pytest.raises(ValueError, match="the longest of 3 steps"):
        Problem(3, 2, 4, 4, lengths=(2, 1))


# By hand, 2 floating-point operations a multiply-add; a row is one step of one sequence.
#   T 3, B 2, I 5, H 7: 6 rows of 2·4·7·(5 + 7) = 672.
#   projection to 2: 6 rows of 2·4·7·(5 + 2) + 2·7·2 = 392 + 28.
#   packed, lengths 1 and 3: 4 rows of 672.
#   2 layers, bidirectional: 6 rows of 2·672 + 2·2·4·7·(14 + 7) = 1344 + 2352.
#   2 layers, the first bidirectional: 6 rows of 2·672 + 2·4·7·(14 + 7) = 1344 + 1176.
@pytest.mark.parametrize(
    "more, flop",
    [
        ({}, 6 * 672),
        ({"proj_size": 2}, 6 * 420),
        ({"lengths": (1, 3)}, 4 * 672),
        ({"num_layers": 2, "bidirectional": True}, 6 * 3696),
        ({"num_layers": 2, "first_bidirectional": True}, 6 * 2520),
    ],
)
def test_flop_by_hand(more, flop):
    problem = Problem(3, 2, 5, 7, **more)
    assert problem.flop("inference") == flop
    assert problem.flop("training") == 3 * flop
    assert problem.flop(SECOND) == 6 * flop
