"""What streams guarantee, told from what they ran: for tests of code that uses several.

Work that was handed to streams may run in any order that their waits allow. ``Watch`` gives each
piece of work a time on its stream, and to each stream a vector clock: the work of every stream that
is certain to be done by then. It follows every byte of torch's memory, and raises `Unordered`
where a read is not certain to come after the last write, or a write after what was read or written
before, and where memory goes back to the allocator while it may still be in use: the allocator
gives it to the next tensor of the stream that it was allocated on.
"""

from __future__ import annotations

import contextlib
import weakref

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

MOST = 16  # streams
UNWRITTEN = -1


class Unordered(AssertionError):
    """Nothing guarantees the order of two uses of a byte."""


class Event:
    def __init__(self, clock):
        self.clock = clock


class Stream:
    """As torch.cuda.Stream, of a Watch."""

    def __init__(self, watch):
        assert len(watch.streams) < MOST
        self.index = len(watch.streams)
        self.clock = np.zeros(MOST, np.int64)
        watch.streams.append(self)

    def record_event(self):
        return Event(self.clock.copy())

    def wait_event(self, event):
        self.clock = np.maximum(self.clock, event.clock)

    def wait_stream(self, stream):
        self.wait_event(stream.record_event())


class Block:
    """Memory of one tensor or of several: who wrote each byte last and when, who has read it."""

    def __init__(self, stream, size, written):
        self.stream = stream
        self.writer = np.full(size, 0 if written else UNWRITTEN)
        self.written = np.zeros(size, np.int64)
        self.read = np.zeros((MOST, size), np.int64)
        self.told = set()  # streams that record_stream named


class Watch(TorchDispatchMode):
    """``with Watch() as watch:``; ``watch.main`` is the stream that is current at first."""

    def __init__(self):
        super().__init__()
        self.streams = []
        self.main = self.current = Stream(self)
        self.blocks = {}  # by address
        self.uses = 0
        self.given_back = []  # too early

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    # --- memory

    def block_of(self, storage, written):
        """Its record; one that is not known yet was there before, unless it is ``written`` now."""
        block = self.blocks.get(storage.data_ptr())
        if block is None:
            stream = self.main if written else self.current
            block = self.blocks[storage.data_ptr()] = Block(stream, storage.nbytes(), written)
            weakref.finalize(storage, self.free, storage.data_ptr(), block)
        return block

    def free(self, address, block):
        del self.blocks[address]
        by_then = block.stream.clock
        for stream in self.streams:
            mine = block.written[block.writer == stream.index]
            last = max(block.read[stream.index].max(initial=0), mine.max(initial=0))
            if last > by_then[stream.index] and stream.index not in block.told:
                self.given_back.append(
                    f"memory of stream {block.stream.index} goes back to it while stream "
                    f"{stream.index} may still use it"
                )

    def __exit__(self, kind, *rest):
        super().__exit__(kind, *rest)
        if kind is None and self.given_back:  # found where no error can be raised
            raise Unordered(self.given_back[0])

    def record_stream(self, tensor, stream):
        """As Tensor.record_stream."""
        self.block_of(tensor.untyped_storage(), True).told.add(stream.index)

    def use(self, block, at, what, write):
        """The current stream reads or writes the bytes ``at``."""
        stream = self.current
        stream.clock[stream.index] += 1
        now, clock = stream.clock[stream.index], stream.clock
        self.uses += 1
        writer = block.writer[at]
        if not write and (writer == UNWRITTEN).any():
            raise Unordered(f"{what}: stream {stream.index} reads what nobody has written")
        late = (writer != UNWRITTEN) & (clock[writer.clip(0)] < block.written[at])
        if late.any():
            raise Unordered(
                f"{what}: stream {stream.index} does not wait for what stream "
                f"{int(writer[late][0])} writes"
            )
        if write:
            if (block.read[:, at] > clock[:, None]).any():
                raise Unordered(f"{what}: stream {stream.index} writes what may not be read yet")
            block.writer[at], block.written[at] = stream.index, now
        else:
            block.read[stream.index, at] = now

    def use_tensor(self, tensor, what, write):
        block, size = self.block_of(tensor.untyped_storage(), True), tensor.element_size()
        elements = np.full(tensor.shape, tensor.storage_offset())
        for axis, stride in enumerate(tensor.stride()):
            place = np.arange(tensor.size(axis)) * stride
            elements += place.reshape(-1, *[1] * (tensor.dim() - axis - 1))
        if tensor.numel():
            at = elements.reshape(-1, 1) * size + np.arange(size)
            self.use(block, at.ravel(), what, write)

    def use_address(self, address, size, what, write):
        """The same by address, as the native core knows memory."""
        if not address or not size:
            return
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + block.writer.size:
                first = address - start
                return self.use(block, slice(first, first + size), what, write)
        raise Unordered(f"{what}: {size} bytes at {address:x} are no tensor's")

    # --- torch's operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func)
        arguments = [*zip(func._schema.arguments, args, strict=False)]
        arguments += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        aliases = [a.alias_info for a in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        writes, reads = [], []
        for argument, value in arguments:
            mutated = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in torch.utils._pytree.tree_leaves(value):
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                    (writes if mutated else reads).append(tensor)
                    if mutated and not name.endswith("out") and "copy_" not in name:
                        reads.append(tensor)
        if not is_view and "empty" not in name:
            for tensor in reads:
                self.use_tensor(tensor, name, False)
        result = func(*args, **kwargs)
        known = {t.untyped_storage().data_ptr() for t in (*reads, *writes)}
        for tensor in writes:
            self.use_tensor(tensor, name, True)
        if not is_view:
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() in known:
                        continue
                    self.block_of(storage, False)
                    if "empty" not in name:
                        self.use_tensor(tensor, name, True)
        return result
