"""The native calls have names in torch.profiler."""

import device
import torch
from device import here

import lstm_ext
from lstm_ext.profiling import recorded

KIND = "cpu" if device.NAME == "cpu" else "cuda"


def counted(run):
    """How often each of the package's ranges is in a profile of a function."""
    with torch.profiler.profile() as profile:
        run()
    names = {e.key: e.count for e in profile.key_averages()}
    return {name: count for name, count in names.items() if name.startswith("lstm_ext::")}


def test_every_call_of_the_core_is_named():
    module, x = here(lstm_ext.LSTM(3, 4, 2)), here(torch.randn(5, 2, 3))
    with torch.no_grad():
        assert counted(lambda: module(x)) == {f"lstm_ext::{KIND}_forward": 2}
    names = counted(module(x)[0].sum().backward)
    assert names == {f"lstm_ext::{KIND}_backward": 2}
    names = counted(module(x, lengths=torch.tensor([5, 4]))[0].sum().backward)
    # The products of backward are the core's on the CPU, torch's on CUDA: one of each layer for all
    # its weights, and one for the gradient of what the second reads.
    assert names.pop("lstm_ext::cpu_matmul", 0) == (3 if KIND == "cpu" else 0)
    assert names == {f"lstm_ext::{KIND}_backward": 2}


def test_a_range_lies_inside_the_module_s_own_range():
    module = here(lstm_ext.LSTM(3, 4, return_cell_sequence=True))  # not for the short way
    x = here(torch.randn(5, 2, 3))
    with torch.profiler.profile() as profile, torch.profiler.record_function("mine"):
        module(x)
    (event,) = [e for e in profile.events() if e.name == f"lstm_ext::{KIND}_forward"]
    parents = []
    while event := event.cpu_parent:
        parents.append(event.name)
    assert parents[-1] == "mine" and "LSTMLayer" in parents


def test_without_a_profiler_the_call_is_the_function_itself():
    assert recorded(len) is len
    with torch.profiler.profile():
        ranged = recorded(len)
        assert ranged is not len and ranged([1, 2]) == 2
    assert recorded(len) is len
