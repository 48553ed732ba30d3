import pytest
import torch

from lstm_ext import ops


@pytest.fixture(autouse=True)
def _fixed_state():
    """Same seed for every test; one thread unless a test asks for more, so that thousands of tiny
    torch products do not wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ops.cpu_isas())
def isa(request):
    """Every CPU kernel set that this machine can run."""
    before = ops.cpu_isa()
    ops.select_cpu_isa(request.param)
    yield request.param
    ops.select_cpu_isa(before)
