"""The short way of a plain layer or cell on the CUDA engine, emulated unless there is a GPU: when
it is taken, and what it asks of the engine and of torch. What it gives: test_cuda_plain.py."""

import contextlib
import itertools

import device
import emulated
import pytest
import torch
from cases import HALF, Case, compare
from device import here, leaf
from emulated import installed
from short_way import EMULATOR, H, I, both_ways, calls_of_torch, draw, engine, lstm

from lstm_ext import ops
from lstm_ext.cuda.engine import CudaEngine

pytestmark = pytest.mark.usefixtures("exact_float32")


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.double(),
        lambda t: t[:-1],
        lambda t: torch._neg_view(-t),
        lambda t: t.to("meta"),
    ],
)
@pytest.mark.parametrize("directions, index", [(D, k) for D in (1, 2) for k in range(6 + 4 * D)])
def test_saved_tensors_that_are_others(directions, index, change, given, short):
    """As forward saved them: x, h_0, c_0, the weights, gates, c_seq and y."""
    module = lstm(I, H, bidirectional=directions == 2)
    x = leaf(draw(4, 3, I))
    hx = tuple(leaf(draw(directions, 3, H)) for _ in range(2)) if given else None
    count = itertools.count()

    def pack(tensor):
        return tensor, next(count) == index

    def unpack(packed):
        tensor, changed = packed
        return change(tensor) if changed else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y, _ = module(x, hx)
    saved = next(count)
    assert saved == 4 + 4 * directions + (2 if given else 0)
    expected = contextlib.nullcontext()
    if index < saved:
        expected = pytest.raises((RuntimeError, TypeError, ValueError))
    with expected:
        torch.autograd.grad(y.sum(), [x, *(hx or ()), *module.parameters()])
    assert short.forwards == [True] and any(short.backwards) == (index >= saved)


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 2, 3])])
def test_saved_tensors_on_another_device(lengths, short):
    """All of them, so that they agree with each other."""
    module, x = lstm(I, H), leaf(draw(4, 3, I))
    other = "cpu" if device.NAME == "cuda" else "meta"
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to(other), lambda t: t):
        y, _ = module(x, lengths=lengths)
    with pytest.raises((RuntimeError, ValueError), match=f"{other}"):
        torch.autograd.grad(y.sum(), x)
    assert short.forwards == [True] and not any(short.backwards)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
def test_saved_tensors_laid_out_anew(directions, given, short):
    module, x = lstm(I, H, bidirectional=directions == 2), leaf(draw(4, 3, I))
    hx = tuple(leaf(draw(directions, 3, H)) for _ in range(2)) if given else None

    def run():
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t, lambda t: torch.stack([t, t], -1)[..., 0]
        ):
            y, _ = module(x, hx)
        return torch.autograd.grad(y.sum(), [x, *(hx or ()), *module.parameters()])

    both_ways(short, run, torch.float32)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("directions, index", [(D, k) for D in (1, 2) for k in range(3 + 4 * D)])
@pytest.mark.parametrize("kind", ["negated", "subclass", "dtype", "size", "meta"])
def test_tensors_for_the_layer(kind, directions, index, short):
    """Its results, or its errors."""
    module = lstm(I, H, bidirectional=directions == 2)
    tensors = [draw(4, 3, I), *(draw(directions, 3, H) for _ in range(2))]
    tensors += [p.detach() for p in module.parameters()]

    def run():
        x, h, c, *weights = tensors
        # Set, so that they are the module's parameters still.
        for name, weight in zip(list(module._parameters), weights, strict=True):
            module._parameters[name] = weight
        return module(x, (h, c))[0]

    expected = run()
    assert short.forwards == [True]
    changes = {
        "negated": lambda t: torch._neg_view(-t),
        "subclass": lambda t: t.as_subclass(Subclass),
        "dtype": torch.Tensor.double,
        "size": lambda t: t[..., :-1],
        "meta": lambda t: t.to("meta"),
    }
    tensors[index] = changes[kind](tensors[index])
    if kind in ("negated", "subclass"):
        assert torch.equal(run(), expected)
    else:
        with pytest.raises((RuntimeError, TypeError, ValueError)) as ours:
            run()
        short.refuses = True
        with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
            run()
        assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))
    assert short.forwards.count(True) == 1


ZEROS = here(torch.zeros(3, 3, H))
STATES = {
    "none of them": (None, None),
    "one": (ZEROS[:1], None),
    "a tensor": ZEROS[:2],
    "a number": 1,
    "of another count of directions": (ZEROS, ZEROS),
    "of each direction": (ZEROS[0],) * 4,
    "too many": (ZEROS[:1],) * 3,
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_states_for_the_layer(name, bidirectional, short):
    """Its errors."""
    module, x = lstm(I, H, bidirectional=bidirectional), draw(4, 3, I)
    with pytest.raises((RuntimeError, TypeError, ValueError, AttributeError)):
        module(x, STATES[name])
    assert not any(short.forwards)


LAYERS = {
    "peephole": {"peephole": True},
    "cells": {"return_cell_sequence": True},
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_for_the_layer(name, short):
    y = lstm(I, H, bidirectional=True, **LAYERS[name])(draw(4, 3, I))[0]
    y.sum().backward()
    assert not any(short.forwards + short.backwards)


@pytest.mark.parametrize("size", [(0, 3, I), (4, 0, I)])
@pytest.mark.parametrize("directions", [1, 2])
def test_no_rows(size, directions, short):
    module = lstm(I, H, bidirectional=directions == 2)
    y, _ = module(draw(size))
    assert y.shape == (*size[:2], directions * H) and not any(short.forwards)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_autocast_of_backward(bidirectional, short):
    module, x = lstm(I, H, bidirectional=bidirectional), leaf(draw(4, 3, I))
    y, _ = module(x)
    expected = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    with torch.autocast(device.DEVICE.type, torch.bfloat16):
        got = torch.autograd.grad(y.sum(), x)[0]
    torch.testing.assert_close(got, expected)


@EMULATOR
def test_without_the_vendor_s_library():
    """By torch's products."""
    with installed() as emulator:
        emulator._use_vendor(False)
        assert emulator.plain is None
        for dtype in (torch.float64, *HALF):
            compare(Case(T=4, B=3, bidirectional=True, layers=2, proj=3, dtype=dtype))


# --- what is asked, and how often -----------------------------------------------------------------


@EMULATOR
def test_a_plan_is_asked_for_once_a_shape():
    with installed() as emulator:
        module, two = lstm(I, H), lstm(I, H, bidirectional=True)
        shapes = ((module, 4, 3, 2), (module, 4, 3, 2), (module, 7, 3, 2), (module, 4, 5, 4))
        shapes += ((module, 1, 3, 6), (two, 4, 3, 8), (two, 4, 3, 8), (module, 4, 3, 8))
        for of, steps, batch, plans in shapes:
            of(draw(steps, batch, I))[0].sum().backward()
            assert len(emulator.picked) == plans


@EMULATOR
def test_the_device_is_made_current_if_it_is_not():
    entered = []

    class Elsewhere(emulated.EmulatedEngine):
        current = False

        def is_current(self, index):
            assert index == -1
            return self.current

        @contextlib.contextmanager
        def guard(self, device):
            entered.append(device)
            yield
            entered.append("left")

    other = Elsewhere(emulated.load(), None)
    module, x = lstm(I, H), draw(4, 3, I)
    with installed(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops._engines, "cpu", other)
        y = module(x)[0]
        assert entered == [x.device, "left"]
        y.sum().backward()
        assert entered == [x.device, "left"] * 2
        other.current = True
        module(x)[0].sum().backward()
        assert len(entered) == 4


@EMULATOR
def test_a_call_that_fails_leaves_the_device():
    left = []

    class Elsewhere(emulated.EmulatedEngine):
        def is_current(self, index):
            return False

        @contextlib.contextmanager
        def guard(self, device):
            yield
            left.append(device)

        def choose(self, problem, device):
            raise ZeroDivisionError

    other = Elsewhere(emulated.load(), None)
    with installed(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops._engines, "cpu", other)
        with pytest.raises(ZeroDivisionError):
            lstm(I, H)(draw(4, 3, I))
    assert len(left) == 1


@pytest.mark.parametrize("directions", [1, 2])
def test_what_torch_does(directions):
    """Memory for each result, and one piece of scratch; no product, no copy, no zeros."""
    with engine():
        module, x = lstm(I, H, bidirectional=directions == 2), draw(4, 3, I)
        for hx in (None, (ZEROS[:directions], ZEROS[:directions])):
            with torch.no_grad():
                names = calls_of_torch(lambda hx=hx: module(x, hx))
            assert set(names) <= {"aten::new_empty", "aten::empty", "aten::empty_strided"}
            assert names.count("aten::new_empty") == 4  # y, h_n, c_n
            names = calls_of_torch(lambda hx=hx: module(x, hx))
            assert names.count("aten::new_empty") == 6  # and gates, c_seq
        y, cotangent = module(x)[0], here(torch.ones(4, 3, directions * H))
        names = calls_of_torch(
            lambda: torch.autograd.grad(y, list(module.parameters()), cotangent, retain_graph=True)
        )
        assert names.count("aten::new_empty") == 1 + 4 * directions  # a gradient each
        assert not [n for n in names if "mm" in n or "copy" in n or "zero" in n or "sum" in n]


@EMULATOR
def test_a_devices_properties_are_asked_for_there():
    """What the core makes current again afterwards is that device, not the thread's first one."""
    entered, core = [], emulated.load()

    class Core:
        def cuda_properties(self, index, untimed):
            assert entered == [torch.device("cuda", 1)]
            return index

        def __getattr__(self, name):
            return getattr(core, name)

    class Entering(CudaEngine):
        device_type = "cpu"

        @contextlib.contextmanager
        def guard(self, device):
            entered.append(device)
            yield
            entered.remove(device)

    assert Entering(Core()).properties(torch.device("cuda", 1)) == 1
    assert not entered
