"""The team of threads of the CPU kernels beside others: processes, threads, forks, few cores.

What could hang runs in a process of its own, with a limit.
"""

import os
import subprocess
import sys

import pytest
import torch
from tolerances import tol

import lstm_ext
from lstm_ext import _C, layer, plain
from lstm_ext.cpu import calls as cpu_calls
from lstm_ext.cpu import engine as cpu_engine
from lstm_ext.engine import Direction, LayerWeights
from lstm_ext.steps import Steps

pytestmark = pytest.mark.cpu_only(reason="OpenMP threads")

LIMIT = 120  # seconds; each takes a few

# Layers big enough for eight threads, their outputs and gradients; and what they are on one thread.
# The threads share the units of one, except in backward, where there are two groups of sequences of
# four threads each; of the second there are more groups, of the third each direction has half of
# the threads.
LAYER = """
import os, sys, threading
import torch
import lstm_ext

torch.manual_seed(0)
torch.set_num_threads(1)
two = lstm_ext.LSTM(40, 64, bidirectional=True)
modules = lstm_ext.LSTM(40, 256), lstm_ext.LSTM(40, 64), two
x = torch.randn(20, 8, 40)

def run():
    results = []
    for module in modules:
        y, (_, c_n) = module(x)
        gradients = torch.autograd.grad(y.sum() + c_n.sum(), list(module.parameters()))
        results += [y, c_n, *gradients]
    return results

def check(results, expected):
    for ours, theirs in zip(results, expected, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * scale)

expected = run()
"""

SEVERAL_PYTHON_THREADS = """
torch.set_num_threads(4)
errors = []

def work():
    torch.set_num_threads(4)  # torch's number is a thread's own
    try:
        for _ in range(20):
            check(run(), expected)
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors
"""

MORE_THREADS_THAN_CORES = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(8)
for _ in range(3):
    check(run(), expected)
"""

INSIDE_A_PARALLEL_REGION = """
import ctypes
with open("/proc/self/maps") as maps:
    libraries = {line.split()[-1] for line in maps if "gomp" in line}
assert libraries
errors, seen = [], []

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def body(_):
    torch.set_num_threads(4)
    try:
        check(run(), expected)
        seen.append(threading.get_ident())
    except BaseException as error:
        errors.append(error)

for library in libraries:
    seen.clear()
    ctypes.CDLL(library).GOMP_parallel(body, None, 3, 0)
    assert not errors, errors
    assert len(seen) == 3
"""

FORKED = """
torch.set_num_threads(4)
check(run(), expected)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as a DataLoader's worker does; OpenMP does not outlive a fork
    try:
        check(run(), expected)
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
check(run(), expected)
"""


def _run(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("environment", ["", "OMP_THREAD_LIMIT=3", "OMP_DYNAMIC=true"])
def test_several_python_threads(environment):
    """Each has a team of its own, or fewer threads than it asked for."""
    _run(LAYER + SEVERAL_PYTHON_THREADS, **dict([environment.split("=")] if environment else []))


def test_more_threads_than_cores():
    """Eight threads that share one core meet at every step."""
    _run(LAYER + MORE_THREADS_THAN_CORES)


def test_inside_a_parallel_region():
    """OpenMP then gives each caller one thread."""
    _run(LAYER + INSIDE_A_PARALLEL_REGION)


def test_training_in_a_forked_process():
    _run(LAYER + FORKED)


@pytest.mark.parametrize("forward, backward", [(4, 1), (1, 4), (2, 7)])
def test_other_number_of_threads_in_backward(forward, backward):
    module = lstm_ext.LSTM(40, 256)
    x = torch.randn(20, 8, 40)
    wanted = list(module.parameters())
    expected = torch.autograd.grad(module(x)[0].sum(), wanted)
    torch.set_num_threads(forward)
    loss = module(x)[0].sum()
    torch.set_num_threads(backward)
    for ours, theirs in zip(torch.autograd.grad(loss, wanted), expected, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours / scale, theirs / scale, **tol(torch.float32))


PEAK = """
import sys
import torch
import lstm_ext

def peak():
    with open("/proc/self/status") as status:  # ru_maxrss would begin at the parent's
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

torch.set_num_threads(2)
cls = {"ours": lstm_ext.LSTM, "torch": torch.nn.LSTM}[sys.argv[1]]
cls(8, 8)(torch.randn(2, 2, 8))[0].sum().backward()
module, x = cls(256, 256), torch.randn(1000, 32, 256, requires_grad=True)
before = peak()
for _ in range(2):
    module(x)[0].sum().backward()
    module.zero_grad()
    x.grad = None
print(peak() - before)
"""


def test_peak_memory_of_training():
    """At T 1000, B 32, H 256 no more than nn.LSTM's."""
    ours, peer = (int(_run(PEAK, name)) for name in ("ours", "torch"))
    assert 0 < ours <= peer, f"{ours >> 10} MB, nn.LSTM {peer >> 10} MB"


class Core:
    """Stands before the core of the engine: notes whether two directions ran at once."""

    def __init__(self):
        self.at_once = []

    def __getattr__(self, name):
        function = getattr(_C, name)
        if name not in ("cpu_forward", "cpu_backward"):
            return function

        def call(first, second, workspace):
            self.at_once.append(second is not None and first.side_by_side())
            function(first, second, workspace)

        return call


@pytest.fixture
def core(monkeypatch):
    spy = Core()
    monkeypatch.setattr(cpu_engine, "_C", spy)
    return spy


@pytest.mark.parametrize("kind", ["packed", "projection", "peephole", "layer norm", "cells"])
def test_two_directions_at_once(kind, core, monkeypatch):
    """By the layer's way, each on half of the threads: outputs and dx are those of one thread."""
    options = {
        "projection": {"proj_size": 24},
        "peephole": {"peephole": True},
        "layer norm": {"layer_norm": True},
        "cells": {"return_cell_sequence": True},
    }
    for caller in (plain, layer):
        monkeypatch.setattr(caller, "plain_layer", lambda *args, **kwargs: None)
    module = lstm_ext.LSTM(20, 48, bidirectional=True, **options.get(kind, {}))
    x = torch.randn(30, 12, 20, requires_grad=True)
    lengths = torch.arange(30, 6, -2) if kind == "packed" else None

    def run():
        y, *more = module(x, lengths=lengths)
        loss = sum((t * torch.linspace(0, 1, t.numel()).view(t.shape)).sum() for t in (y, *more[0]))
        dx, *gradients = torch.autograd.grad(loss, [x, *module.parameters()])
        return [y, *more[0], *more[1:], dx], gradients

    def check(threads, at_once):
        torch.set_num_threads(threads)
        core.at_once.clear()
        outputs, gradients = run()
        assert core.at_once == ([True] * 2 if at_once else [False] * 4)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            scale = max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * scale)

    torch.set_num_threads(1)
    expected, expected_gradients = run()
    for threads in (1, 2, 3, 4):
        check(threads, at_once=threads % 2 == 0)
    monkeypatch.setattr(cpu_calls, "_AT_ONCE_BYTES", 1000)  # else twice the memory
    check(2, at_once=False)


@pytest.mark.parametrize("peepholes", [(False, True), (True, False)])
def test_two_directions_of_different_products(peepholes):
    """bfloat16 with a variant is multiplied in float32: never at once with one without."""
    T, B, I, H = 30, 8, 10, 48
    module = lstm_ext.LSTM(I, H, bidirectional=True, peephole=True, dtype=torch.bfloat16)
    own, directions = dict(module.named_parameters()), []
    for k, peephole in enumerate(peepholes):
        suffix = "_l0_reverse" if k else "_l0"
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = LayerWeights(*(own[name + suffix].detach() for name in names), None)
        if peephole:
            weights = weights._replace(w_ch=own["weight_ch" + suffix].detach())
        states = (torch.zeros(B, H, dtype=torch.bfloat16) for _ in range(2))
        directions.append(Direction(*states, weights, k == 1))
    x = torch.randn(T * B, I, dtype=torch.bfloat16)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(layer.lstm_layer(x, directions, Steps.padded(T, B)).y)
    assert torch.equal(*results)
