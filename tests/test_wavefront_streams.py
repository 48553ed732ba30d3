"""The streams of a wavefront: every read after its write, and no memory given back too early.

No GPU: a watch (streams.py) stands in for torch's streams, and is told what the kernels of the
emulated core read and write.
"""

import emulated
import pytest
import torch
from streams import Stream, Unordered, Watch
from test_wavefront import Engine, H, I

import lstm_ext
from lstm_ext import ops
from lstm_ext.cuda import lanes
from lstm_ext.cuda.lanes import Lanes

pytestmark = pytest.mark.cpu_only(reason="brings the emulated device along")

T, B, LAYERS = 6, 3, 3


class Core:
    """The emulated core, whose launches tell the watch what they use."""

    def __init__(self, core, watch, dtype):
        self._core, self.watch, self.facts = core, watch, {}
        self.size = dtype.itemsize

    def __getattr__(self, name):
        return getattr(self._core, name)

    def _direction(self, kind, facts):
        made = getattr(self._core, kind)(**facts)
        self.facts[id(made)] = made, facts
        return made

    def CudaForwardDirection(self, **facts):
        return self._direction("CudaForwardDirection", facts)

    def CudaBackwardDirection(self, **facts):
        return self._direction("CudaBackwardDirection", facts)

    def cuda_forward_workspace(self, *arguments):
        return self._remembered(self._core.cuda_forward_workspace(*arguments))

    def cuda_backward_workspace(self, *arguments):
        return self._remembered(self._core.cuda_backward_workspace(*arguments))

    def _remembered(self, size):
        self.workspace = size
        return size

    def _teller(self, d):
        """rows(name, first, last, width, size, write), whole(name, count, write)."""

        def rows(name, first, last, width, size, write):
            if d[name]:
                at = d[name] + first * B * width * size
                self.watch.use_address(at, (last - first) * B * width * size, name, write)

        def whole(name, count, write):
            self.watch.use_address(d[name], count * self.size, name, write)

        return rows, whole

    def cuda_forward(self, layer, directions, workspace, stream, steps):
        self._core.cuda_forward(layer, directions, workspace, stream, steps)
        (first, last), size = steps, self.size
        d = self.facts[id(directions[0])][1]
        rows, whole = self._teller(d)
        for name, count in (("w_hh", 4 * H * H), ("b_ih", 4 * H), ("b_hh", 4 * H)):
            whole(name, count, False)
        if first:
            rows("y", first - 1, first, H, size, False)
            self.watch.use_address(workspace, self.workspace, "workspace", False)
        for name in ("h0", "c0"):
            whole(name, B * H, False)
        rows("gx", first, last, 4 * H, 4, False)
        rows("gates", first, last, 4 * H, 4, True)
        rows("c_seq", first, last, H, 4, True)
        rows("y", first, last, H, size, True)
        for name in ("h_n", "c_n"):
            whole(name, B * H, True)
        self.watch.use_address(workspace, self.workspace, "workspace", True)

    def cuda_backward(self, layer, directions, workspace, stream, steps):
        self._core.cuda_backward(layer, directions, workspace, stream, steps)
        (first, last), size = steps, self.size
        d = self.facts[id(directions[0])][1]
        rows, whole = self._teller(d)
        begin, end = T - last, T - first  # of the sequence
        whole("w_hh", 4 * H * H, False)
        for name in ("h0", "c0", "dh_n", "dc_n"):
            whole(name, B * H, False)
        if first:
            rows("dgates", end, end + 1, 4 * H, size, False)
            self.watch.use_address(workspace, self.workspace, "workspace", False)
        elif d["h_prev"]:
            rows("y", 0, T, H, size, False)
            rows("h_prev", 0, T, H, size, True)
        rows("gates", begin, end, 4 * H, 4, False)
        rows("c_seq", max(begin - 1, 0), end, H, 4, False)
        rows("dy", begin, end, H, size, False)
        rows("dcells", begin, end, H, size, False)
        rows("dgates", begin, end, 4 * H, size, True)
        if last == T:
            for name in ("dh0", "dc0"):
                whole(name, B * H, True)
        self.watch.use_address(workspace, self.workspace, "workspace", True)

    # --- what is before and after the recurrence

    def use(self, address, count, name, write):
        self.watch.use_address(address, count * self.size, name, write)

    def cuda_arrange(self, dtype, transposed, rows, columns, width, matrix, out, stream):
        self._core.cuda_arrange(dtype, transposed, rows, columns, width, matrix, out, stream)
        self.use(matrix, rows * columns, "matrix", False)
        self.use(out, (columns if transposed else rows) * width, "arranged", True)

    def cuda_sum_rows(self, dtype, matrix, rows, columns, first, second, stream):
        self._core.cuda_sum_rows(dtype, matrix, rows, columns, first, second, stream)
        self.use(matrix, rows * columns, "rows", False)
        self.use(first, columns, "sums", True)
        self.use(second, columns, "sums", True)

    def CudaProduct(self, **facts):
        return Product(self, facts, self._core.CudaProduct(**facts))


class Product:
    """A CudaProduct of a `Core`."""

    def __init__(self, core, facts, made):
        self.core, self.facts, self.made = core, facts, made
        self.workspace = made.workspace

    def run(self, a, b, out, workspace, stream):
        self.made.run(a, b, out, workspace, stream)
        d, use = self.facts, self.core.use
        for address, name, rows in (
            (a, "a", d["K"] if d["a_transposed"] else d["M"]),
            (b, "b", d["N"] if d["b_transposed"] else d["K"]),
        ):
            use(address, rows * d[f"ld{name}"], name, False)
        size = 4 if d["wide"] else self.core.size
        self.core.watch.use_address(out, d["M"] * d["ldout"] * size, "out", True)
        self.core.watch.use_address(workspace, self.workspace, "workspace", True)


class Watched(Engine):
    def lanes(self, device, count):
        return Lanes(device, count) if count else super().lanes(device, count)


@pytest.fixture
def watched(monkeypatch):
    """Runs a module's forward and backward under the watch; returns it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True

    def run(dtype, parts, grad=True, **kwargs):
        watch = Watch()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: watch.current)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(watch))
        monkeypatch.setattr(torch.cuda, "stream", watch.on)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *a: watch.record_stream(*a))
        lanes._kept_streams.cache_clear()
        engine = Watched(Core(emulated.load(), watch, dtype), emulated.only("cluster"))
        engine.parts, engine.wavefront = parts, True
        monkeypatch.setitem(ops._engines, "cpu", engine)
        torch.manual_seed(0)
        module = lstm_ext.LSTM(I, H, LAYERS, dtype=dtype, return_cell_sequence=True, **kwargs)
        for parameter in module.parameters():
            watch.block_of(parameter.untyped_storage(), True)
        with watch, torch.set_grad_enabled(grad):
            for _ in range(2):  # memory of the first call is the second's
                x = torch.randn(T, B, I, dtype=dtype).requires_grad_(grad)
                y, (h, c), cells = module(x)
                if grad:
                    loss = y.sum() + h.sum() + c.sum() + cells.sum()
                    inputs = [x, *module.parameters()]
                    grads = torch.autograd.grad(loss, inputs)
                    for tensor in grads:  # as an optimizer would
                        tensor.mul_(2)
                    del grads, loss, inputs
                (y + 1), (h + 1), (c + 1), (cells + 1)
                del x, y, h, c, cells
        return watch

    yield run
    lanes._kept_streams.cache_clear()
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_use_is_ordered(watched, dtype, grad, dropout):
    for parts in (2, 3, 6):
        watch = watched(dtype, parts, grad, dropout=dropout)
        assert len(watch.streams) == 1 + LAYERS
        assert all(stream.clock[stream.index] > 10 for stream in watch.streams)
        assert watch.uses > 200


def without(monkeypatch, what):
    """Lanes with one of their precautions missing."""
    if what == "fork":
        monkeypatch.setattr(Lanes, "__enter__", lambda self: self)
    elif what == "join":
        monkeypatch.setattr(Lanes, "__exit__", lambda self, *_: None)
    elif what == "join of the first":
        right = Lanes.__exit__

        def join(self, *_):
            self._lanes = self._lanes[1:]
            right(self)

        monkeypatch.setattr(Lanes, "__exit__", join)
    elif what == "wait for the lane before":
        right = Lanes.cell
        monkeypatch.setattr(
            Lanes, "cell", lambda self, lane, part, _: right(self, lane, part, False)
        )
    elif what == "wait for the same part":
        right = Lanes.cell

        def cell(self, lane, part, below):
            key = (lane - 1, part)
            if below and part:  # the part before: its event was kept
                self._done[key], self.kept = self.kept, self._done[key]
            elif below:
                self.kept = self._done[key]
            return right(self, lane, part, below)

        monkeypatch.setattr(Lanes, "cell", cell)
    else:
        assert what == "hand_over"
        monkeypatch.setattr(Lanes, "hand_over", lambda self, tensor: None)


@pytest.mark.parametrize(
    "what, message",
    [
        ("fork", "does not wait for what stream 0"),
        ("join", "does not wait for|may still use it"),
        ("join of the first", "does not wait for|may still use it"),
        ("wait for the lane before", "does not wait for what stream"),
        ("wait for the same part", "does not wait for what stream"),
        ("hand_over", "may still use it"),
    ],
)
def test_every_precaution_is_needed(watched, monkeypatch, what, message):
    without(monkeypatch, what)
    with pytest.raises(Unordered, match=message):
        watched(torch.bfloat16, 3)


def test_streams_are_kept(watched):
    watched(torch.bfloat16, 3)
    device = torch.device("cpu")
    assert lanes._streams(device, 2) == lanes._streams(device, LAYERS)[:2]
    assert len(lanes._kept_streams(device)) == LAYERS
