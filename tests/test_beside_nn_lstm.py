"""docs/nn_lstm.md's table of what works here and not with nn.LSTM, and the tests that it names."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.func import functional_call, hessian, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext

ROOT = Path(__file__).parent.parent
T, B, I, H = 5, 2, 3, 4
SIZES = ({0: Dim("T"), 1: Dim("B")},)


def x():
    return torch.randn(T, B, I)


def compiled(kind):
    torch._dynamo.reset()
    return torch.compile(kind(I, H), fullgraph=True, backend="eager")(x())


def exported(kind):
    return export(kind(I, H), (x(),), dynamic_shapes=SIZES).module()(torch.randn(7, 4, I))


def ensemble(kind):
    parameters, _ = stack_module_state([kind(I, H) for _ in range(3)])
    base = kind(I, H)
    run = lambda p, x: functional_call(base, p, (x,))[0]  # noqa: E731
    return vmap(run, in_dims=(0, None))(parameters, x())


def mapped(kind):
    module = kind(I, H)
    return vmap(lambda x: module(x)[0])(torch.randn(6, T, B, I))


def forward_mode(kind):
    module = kind(I, H)
    return jvp(lambda x: module(x)[0], (x(),), (x(),))


def second(kind):
    module = kind(I, H)
    return hessian(lambda x: module(x)[0].sum())(x())


def no_steps(kind):
    return kind(I, H)(torch.randn(0, B, I))


def half_precision(kind):
    module = kind(I, H)
    with torch.autocast("cpu", dtype=torch.float16):
        return module(x())[0].float().sum().backward()


def zero_length(kind):
    lengths = torch.tensor([0, 5])
    if kind is lstm_ext.LSTM:
        return kind(I, H)(x(), lengths=lengths)
    return kind(I, H)(pack_padded_sequence(x(), lengths, enforce_sorted=False))


#: What is run, and nn.LSTM's words.
RUNS = {
    compiled: "does not support RNN, GRU, or LSTM",
    exported: "marked T as dynamic but your code specialized it",
    mapped: "Batching rule not implemented for aten::lstm",
    ensemble: "Batching rule not implemented for aten::lstm",
    forward_mode: "forward AD with mkldnn_rnn_layer",
    second: "forward AD with mkldnn_rnn_layer",
    no_steps: "Expected sequence length to be larger than 0",
    zero_length: "greater than 0",
    half_precision: "could not create a primitive",
}


@pytest.mark.cpu_only(reason="quotes nn.LSTM on oneDNN")
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_works_here_and_not_with_nn_lstm(run):
    """The numbers are other tests' matter."""
    run(lstm_ext.LSTM)
    if torch.backends.mkldnn.is_available():
        with pytest.raises(Exception, match=RUNS[run]):
            run(nn.LSTM)


def test_the_tests_that_the_table_names_exist():
    named = re.findall(r"`(test_\w+)::(test_\w+)`", (ROOT / "docs" / "nn_lstm.md").read_text())
    assert len(named) > 20
    for file, test in named:
        source = (ROOT / "tests" / f"{file}.py").read_text()
        assert re.search(rf"^def {test}\(", source, re.M), f"{file}::{test}"
