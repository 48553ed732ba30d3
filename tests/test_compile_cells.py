"""LSTMCell under torch.compile: an operator, or operations that the compiler fuses."""

import device
import pytest
import torch
from device import here
from second_order import assert_near
from test_compile import BITS, H, I, compiled, inputs, run
from torch import nn
from torch.testing import assert_close

import lstm_ext


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()


def in_a_loop(cell):
    def steps(x):
        hx = None
        for t in range(3):
            hx = cell(x[t], hx)
        return hx

    return steps


@pytest.mark.parametrize("options", [{}, {"peephole": True, "zoneout": 0.2}, {"layer_norm": True}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cells_in_a_loop(dtype, options):
    cell = here(lstm_ext.LSTMCell(I, H, dtype=dtype, **options))
    steps, x, parameters = in_a_loop(cell), inputs(dtype), list(cell.parameters())
    found, expected = run(compiled(steps), x, parameters), run(steps, x, parameters)
    if dtype == torch.bfloat16:
        assert_close(found, expected, **BITS)
    else:
        assert_near(found, expected)


@pytest.mark.parametrize(
    "size, options, train, operators",
    [
        (H, {}, False, 0),
        (H, {}, True, 0),
        (H, {"peephole": True}, True, 0),
        (256, {}, False, 3),
        (256, {}, True, 0),
        (H, {"dtype": torch.bfloat16}, False, 3),
        (H, {"dtype": torch.bfloat16}, True, 3),
    ],
)
def test_which_cells_are_operators(size, options, train, operators):
    """Else the compiler sees the operations, and fuses them."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    cell = here(lstm_ext.LSTMCell(I, size, **options)).requires_grad_(train)
    compiled(in_a_loop(cell), backend)(inputs(options.get("dtype", torch.float32)))
    (graph,) = graphs
    found = [str(n.target) for n in graph.graph.nodes].count("lstm_ext.lstm_layer")
    assert found == operators


@pytest.mark.parametrize(
    "options, name, size",
    [
        ({}, "bias_ih", (1,)),
        ({}, "bias_hh", (4, 4 * H)),
        ({}, "weight_hh", (4 * H, 1)),
        ({"peephole": True}, "weight_ch", (3,)),
    ],
)
def test_a_compiled_cell_refuses_wrong_parameters(options, name, size):
    """As in eager mode; torch's operations would broadcast some."""
    cell = here(lstm_ext.LSTMCell(I, H, **options))
    setattr(cell, name, nn.Parameter(here(torch.randn(size))))
    for module in (cell, torch.compile(cell, backend="eager")):
        with pytest.raises(RuntimeError, match=f"Expected {name} of size"):
            module(inputs()[0])


def test_an_autocast_cell_is_an_operator():
    cell = here(lstm_ext.LSTMCell(I, H))

    def step(x):
        with torch.autocast(device.DEVICE.type, torch.bfloat16):
            return cell(x[0])

    x, parameters = inputs(), list(cell.parameters())
    assert_close(run(compiled(step), x, parameters), run(step, x, parameters), **BITS)
