"""The floor of a step, from measurements written by hand."""

import json

import pytest

from bench import report, timing
from bench.limits import Floor, interpolate
from bench.suites import Problem

pytestmark = pytest.mark.cpu_only(reason="no layer runs")


def write(path, *entries):
    """A file of bench.floor: its environment, then what, blocks, per_group, bytes, us."""
    names = ("what", "blocks", "per_group", "bytes", "us")
    lines = [{"environment": {}}, *(dict(zip(names, e, strict=True)) for e in entries)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Floor(path)


L2, CLUSTER = "exchange through L2", "exchange through a cluster"


@pytest.fixture
def floor(tmp_path):
    return write(
        tmp_path / "floor.jsonl",
        ("launch", 128, 1, 0, 9.0),  # a stream's launches are not the floor: a graph's are
        ("launch in a graph", 128, 1, 0, 5.0),
        ("barrier through L2", 128, 128, 0, 1.0),
        (L2, 128, 128, 4096, 2.0),
        (L2, 128, 128, 8192, 3.0),
        ("barrier of a cluster", 128, 16, 0, 0.25),
        (CLUSTER, 128, 16, 1024, 0.5),
        (CLUSTER, 128, 16, 2048, 1.0),
    )


@pytest.mark.parametrize(
    "x, y", [(0, 1), (50, 1), (100, 1), (150, 2), (200, 3), (300, 3), (400, 3), (500, 3)]
)
def test_interpolation(x, y):
    assert interpolate([(100, 1), (200, 3), (400, 3)], x) == pytest.approx(y)


def test_past_the_last_point_it_goes_on():
    assert interpolate([(100, 1), (200, 3)], 300) == pytest.approx(5)
    assert interpolate([(100, 1)], 300) == 1


@pytest.mark.parametrize(
    "problem, mode, itemsize, expected",
    [
        # Eight clusters of 16: one sequence each, 1024 bytes.
        (Problem(9, 8, 512, 512), "inference", 2, 0.5),
        # Four for each direction: two sequences each, 2048 bytes.
        (Problem(9, 8, 512, 512, bidirectional=True), "inference", 2, 1.0),
        (Problem(9, 8, 512, 512, num_layers=3), "inference", 2, 1.5),
        # Backward: fp32 sums, 2048 bytes through a cluster.
        (Problem(9, 8, 512, 512), "training", 2, 0.5 + 1.0),
        (Problem(9, 8, 512, 512), "second", 2, 2 * (0.5 + 1.0)),
        # 8 MB of weights do not fit a cluster, 128 blocks keep them: 2 sequences, 4096 bytes.
        (Problem(9, 2, 1024, 1024), "inference", 2, 2.0),
        # Four gates back: 16384 bytes, on the line of the last two points.
        (Problem(9, 2, 1024, 1024), "training", 2, 2.0 + 5.0),
        # Nothing keeps 128 MB: a launch a step.
        (Problem(9, 2, 4096, 4096), "inference", 2, 5.0),
    ],
    ids=str,
)
def test_floor_of_a_step(floor, problem, mode, itemsize, expected):
    assert floor.us_per_step(problem, mode, itemsize) == pytest.approx(expected)


def test_words_with_their_step(tmp_path):
    """4 bytes an element, of a float16 too; backward has none of them."""
    words = ("exchange, words with their step", 128, 128)
    ways = [(*words, 4096, 0.5), (*words, 8192, 0.75), (L2, 128, 128, 4096, 2.0)]
    floor = write(tmp_path / "words.jsonl", *ways)
    problem = Problem(9, 1, 1024, 1024)
    assert floor.us_per_step(problem, "inference", 2) == pytest.approx(0.5)
    assert floor.us_per_step(problem, "training", 2) == pytest.approx(0.5 + 2.0)
    assert floor.us_per_step(Problem(9, 2, 1024, 1024), "inference", 2) == pytest.approx(0.75)


def test_a_row_is_held_against_it():
    timings = {"nn.LSTM": timing.Timing([1e-3], 1), "lstm_ext": timing.Timing([2e-4], 1)}
    row = timing.Row(Problem(10, 2, 5, 7), "inference", timings, floor_us=8.0)
    assert report.of_floor(row) == pytest.approx(20 / 8)
    written = report.row_json(row, "float32")
    assert written["of_floor"] == pytest.approx(2.5)
    assert " 2.50 " in report.table_row(written)
    row.floor_us = None
    assert report.of_floor(row) is None


def test_another_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no exchange of h"):
        write(tmp_path / "f", ("launch", 8, 1, 0, 9.0))
