import gc

import device
import pytest
import torch

from lstm_ext import ops
from lstm_ext.cpu import products as cpu_products
from lstm_ext.cpu import second as cpu_second
from lstm_ext.derivatives import BackwardTangents, ForwardTangents, SecondDerivative


def pytest_addoption(parser):
    group = parser.getgroup("lstm_ext")
    group.addoption(
        "--device", default="cpu", help="where the layers run: cpu (default), cuda or emulated"
    )
    group.addoption(
        "--tf32",
        choices=("on", "off"),
        default="off",
        help="on CUDA: float32 products in TF32, judged by nn.LSTM's own error (default: off)",
    )


def pytest_configure(config):
    lines = (
        "cpu_only(reason): not run with another --device",
        "tf32: also judges float32 rightly where products run in TF32 (--tf32=on)",
        "sanitizer: small enough for compute-sanitizer (tools/gpu.py)",
    )
    for line in lines:
        config.addinivalue_line("markers", line)
    # nn.LSTM says so on CUDA of copies of a module, which share no flat buffer.
    ignored = "ignore:RNN module weights are not part of single contiguous chunk:UserWarning"
    config.addinivalue_line("filterwarnings", ignored)
    try:
        device.choose(config.getoption("--device"), config.getoption("--tf32") == "on")
    except (RuntimeError, AssertionError) as error:
        name, line = config.getoption("--device"), str(error).splitlines()[0]
        raise pytest.UsageError(f"--device={name}: {line}") from None


def pytest_report_header(config):
    tf32 = f", TF32 {config.getoption('--tf32')}" if device.DEVICE.type == "cuda" else ""
    return f"lstm_ext: layers on {device.NAME}{tf32}"


def pytest_collection_modifyitems(config, items):
    for item in items:
        mark = item.get_closest_marker("cpu_only")
        if mark and device.NAME != "cpu":
            item.add_marker(pytest.mark.skip(reason=f"CPU only: {mark.kwargs['reason']}"))
        if device.tf32() and not item.get_closest_marker("tf32"):
            reason = "compares float32 more closely than TF32 allows; runs with --tf32=off"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session):
    """What is there by now stays: the collector need not walk through torch's objects again and
    again: 6 to 8 % of the time of CPU tests, measured."""
    gc.freeze()


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        isas = getattr(metafunc.module, "ISAS", device.ISAS)
        metafunc.parametrize("isa", isas, indirect=True)


@pytest.fixture(autouse=True)
def _fixed_state():
    """Same seed for every test; one thread unless a test asks for more, so that thousands of tiny
    torch products do not wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def isa(request):
    """Every CPU kernel set that this machine can run; on another device, its name."""
    before = ops.cpu_isa()
    if device.NAME == "cpu":
        ops.select_cpu_isa(request.param)
    yield request.param
    ops.select_cpu_isa(before)


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that torch allocates without a value starts as NaN, workspaces as 0xff."""
    monkeypatch.setattr(
        cpu_products, "workspace", lambda size: torch.empty(size, dtype=torch.uint8)
    )
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3, device=device.DEVICE).isnan().all()
    assert (torch.empty(3, dtype=torch.uint8, device=device.DEVICE) == 255).all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def exact_float32():
    from short_way import exact_float32  # here, because modules are imported after the device

    with exact_float32():
        yield


@pytest.fixture
def short(monkeypatch):
    """What goes the CUDA engine's short way; layers run on that engine, emulated without a GPU."""
    from short_way import Short, engine  # here, as above

    with engine() as own:
        monkeypatch.setattr(own, "plain", Short(own.plain))
        yield own.plain


@pytest.fixture
def recorder(monkeypatch):
    """What modules run from here on."""
    from variants import Recorder  # here, because modules are imported after the device is chosen

    return Recorder(monkeypatch)


@pytest.fixture
def ways(monkeypatch):
    """Which ways the second derivatives went: "core", "torch"."""
    found = []

    def noted(owner, name, way):
        function = getattr(owner, name)

        def run(*args, **kwargs):
            found.append(way)
            return function(*args, **kwargs)

        is_class = isinstance(owner, type)
        monkeypatch.setattr(owner, name, staticmethod(run) if is_class else run)

    noted(ops, "layer_second", "core")
    noted(cpu_second, "step_second", "core")
    for what in (ForwardTangents, BackwardTangents, SecondDerivative):
        noted(what, "in_torch", "torch")
    return found


@pytest.fixture
def inference():
    with torch.no_grad():
        yield
