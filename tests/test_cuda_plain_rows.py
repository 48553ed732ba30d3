"""As test_cuda_plain.py, of sequences that differ: lengths, packed and reset, which the short way
takes as a layer."""

import contextlib
import itertools

import pytest
import torch
from cases import Case, compare
from device import here, leaf
from emulated import families_of, installed, only
from short_way import DTYPES, EMULATOR, H, I, Short, both_ways, draw, gradients, lstm
from tolerances import tol
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lstm_ext.cuda import engine as cuda_engine

pytestmark = pytest.mark.usefixtures("exact_float32")

LENGTHS = [4, 0, 6, 1, 6, 3, 2]


def called(module, kind, x, hx=None):
    """y, h_n and c_n; x: padded. Padding holds NaN."""
    B, T = x.shape[:2] if module.batch_first else x.shape[1::-1]
    lengths = torch.tensor((LENGTHS * B)[:B]).clamp(max=T)
    if kind == "packed":
        packed = pack_padded_sequence(
            x, lengths.clamp(min=1), module.batch_first, enforce_sorted=False
        )
        y, states = module(packed, hx)
        return y.data, *states
    options = {}
    if "lengths" in kind:
        options["lengths"] = here(lengths)
        padding = here(torch.arange(T).unsqueeze(1) >= lengths)
        padding = padding.T if module.batch_first else padding
        x = x.masked_fill(padding.unsqueeze(2), torch.nan)
    if "resets" in kind:
        torch.manual_seed(5)
        options["reset_mask"] = here(torch.rand(x.shape[:2]) < 0.4)
    y, states = module(x, hx, **options)
    return y, *states


KINDS = ["lengths", "packed", "resets", "lengths and resets"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("directions, layers", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("steps, batch", [(1, 3), (6, 7)])
def test_both_ways(steps, batch, directions, layers, batch_first, dtype, kind, short, poisoned):
    module = lstm(I, H, layers, batch_first=batch_first, bidirectional=directions == 2, dtype=dtype)
    x = leaf(draw(*((batch, steps) if batch_first else (steps, batch)), I, dtype=dtype))
    for given in (False, True):
        hx = None
        if given:
            size = (directions * layers, batch, H)
            hx = tuple(leaf(draw(*size, dtype=dtype)) for _ in range(2))
        inputs = [x, *(hx or ()), *module.parameters()]

        def run(hx=hx, inputs=inputs):
            outputs = called(module, kind, x, hx)
            with torch.no_grad():
                alone = called(module, kind, x, hx)
            results = [*outputs, *alone, *gradients(list(outputs), inputs)]
            for k in range(1, 3):  # the other gradients are None then
                output = called(module, kind, x, hx)[k]
                results += torch.autograd.grad(output.sum(), inputs)
            assert not any(t.isnan().any() for t in results)
            return results

        both_ways(short, run, dtype)
        # Those of the call that was refused too.
        assert short.forwards.count(True) == 4 * layers
        assert short.backwards.count(True) == 3 * layers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_as_nn_lstm(batch_first, bidirectional, dtype, short):
    lengths = [5, 2, 7, 7, 1]
    size = {"T": 7, "B": 5, "I": 6, "H": 20, "layers": 2}
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "dtype": dtype}
    compare(Case(**size, **options, lengths=lengths))
    assert short.forwards == [True] * 2 and short.backwards == [True] * 2


@EMULATOR
@pytest.mark.parametrize("family", cuda_engine.FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_family(kind, family):
    with installed(only(family)) as engine:
        engine.plain = Short(engine.plain)
        module = lstm(I, 64, dtype=torch.bfloat16)
        x = leaf(draw(4, 9, I, dtype=torch.bfloat16))

        def run():
            outputs = called(module, kind, x)
            return [*outputs, *gradients(list(outputs), [x, *module.parameters()])]

        both_ways(engine.plain, run, torch.bfloat16)
        assert families_of(engine) == {family}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_any_inputs_may_be_wanted(bias, kind, short):
    module = lstm(I, H, bias=bias)
    tensors = [draw(4, 3, I), *(draw(1, 3, H) for _ in range(2)), *module.parameters()]
    for flags in itertools.product([False, True], repeat=len(tensors)):
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)
        wanted = [t for t in tensors if t.requires_grad]

        def run(wanted=wanted):
            y, _, c_n = called(module, kind, tensors[0], tuple(tensors[1:3]))
            assert y.requires_grad == bool(wanted)
            return torch.autograd.grad(y.sum() + c_n.sum(), wanted) if wanted else []

        both_ways(short, run, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_and_batched_gradients(kind, short):
    module = lstm(2, 3, dtype=torch.float64, batch_first=True)
    x = leaf(draw(3, 4, 2, dtype=torch.float64))

    def run():
        y, h, c = called(module, kind, x)
        (first,) = torch.autograd.grad((y.sum() * h * c).sum(), x, create_graph=True)
        batched = torch.autograd.functional.jacobian(
            lambda x: called(module, kind, x)[0], x, vectorize=True
        )
        return [batched, *torch.autograd.grad(first.pow(2).sum(), [x, *module.parameters()])]

    ours = run()
    assert short.forwards == [True, True]
    short.refuses = True
    torch.testing.assert_close(ours, run(), **tol(torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", range(11))
@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t[:-1], lambda t: t.to("meta")])
def test_saved_tensors_that_are_others(change, index, kind, short):
    """x, the states, the weights, gates, c_seq, y; at the last index none is."""
    module, x = lstm(I, H), leaf(draw(4, 3, I))
    hx = tuple(leaf(draw(1, 3, H)) for _ in range(2))
    count = itertools.count()
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor, next(count)

    def is_of_the_layer(tensor):
        # Indexing, masking and packing save tensors of their own.
        return tensor.dtype == torch.float32

    def unpack(packed):
        tensor, number = packed
        of_layer = [k for k, t in enumerate(saved) if is_of_the_layer(t)]
        changed = index < len(of_layer) and of_layer[index] == number
        return change(tensor) if changed else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = called(module, kind, x, hx)[0]
    assert sum(map(is_of_the_layer, saved)) == 10
    expected = contextlib.nullcontext()
    if index < 10:
        expected = pytest.raises((RuntimeError, TypeError, ValueError))
    with expected:
        torch.autograd.grad(y.sum(), [x, *hx, *module.parameters()])
    assert short.forwards == [True] and any(short.backwards) == (index == 10)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_state_that_no_step_reads_may_be_nan(steps, short):
    module, x = lstm(I, H), draw(steps, 3, I)
    h = draw(1, 3, H)
    h[:, 1] = torch.nan

    def run():
        y, _ = module(x, (h, draw(1, 3, H).zero_()), lengths=torch.tensor([steps, 0, 1]))
        return torch.autograd.grad(y.sum(), list(module.parameters()))

    assert not any(g.isnan().any() for g in both_ways(short, run, torch.float32))


def test_lengths_may_change_after_forward(short):
    module, x, lengths = lstm(I, H), leaf(draw(4, 3, I)), here(torch.tensor([4, 2, 3]))

    def run(changes):
        given = lengths.clone()
        y, _ = module(x, lengths=given)
        if changes:
            given.zero_()
        return torch.autograd.grad(y.sum(), x)[0]

    assert torch.equal(run(True), run(False)) and short.backwards == [True, True]


def test_a_packed_sequence_that_is_none(short):
    """Its errors are the layer's."""
    module = lstm(I, H)
    with pytest.raises((RuntimeError, ValueError)):
        module(PackedSequence(draw(4, I), torch.tensor([3, 2])))
    assert not any(short.forwards)
