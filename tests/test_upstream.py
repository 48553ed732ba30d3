"""What PyTorch checks of each of its modules (its test_modules.py), on ours.

The cases are PyTorch's own: the entries of its module_db for nn.LSTM and nn.LSTMCell, which ship
in torch.testing._internal. Nothing is skipped or expected to fail: what the entries excuse nn.LSTM
from, derivatives and strided input of cuDNN, ours can. More of PyTorch's in test_upstream_rnn.py.
"""

import io
import itertools
from unittest import mock

import pytest
import torch
from device import DEVICE, NAME
from tolerances import assert_as_good, tol
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils import swap_tensors
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import lstm_ext

try:
    # The import would freeze the flags of torch.backends, which other tests set.
    with mock.patch.object(torch.backends, "disable_global_flags"):
        from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

    ENTRIES = {
        i.module_cls.__name__: i for i in module_db if i.module_cls in (nn.LSTM, nn.LSTMCell)
    }
    KINDS = {"LSTM": ENTRIES["LSTM"], "LSTMCell": ENTRIES["LSTMCell"]}
except (ImportError, AttributeError, KeyError) as error:  # private, or without expecttest
    reason = f"torch.testing._internal has no module_db as expected here: {error!r}"
    pytest.skip(reason, allow_module_level=True)

BITS = {"rtol": 0, "atol": 0}
TOL = tol(torch.float64)
EXACT = [torch.float32, torch.float64]
DTYPES = [*EXACT, torch.bfloat16, torch.float16]

pytestmark = [
    pytest.mark.parametrize("kind", KINDS),
    pytest.mark.parametrize("training", [True, False], ids=["train", "eval"]),
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Sample:
    """One of an entry's inputs: the module, ours, and what it is called with."""

    def __init__(self, kind, made, dtype, training, device):
        call = made.constructor_input
        self.construct = lambda home=lstm_ext, **more: getattr(home, kind)(
            *call.args, **call.kwargs, **more
        )
        self.module = self.construct().to(device).to(dtype).train(training)
        self.args, self.kwargs = made.forward_input.args, made.forward_input.kwargs
        self.reference = made.reference_fn

    def __call__(self, module=None, args=None):
        return (module or self.module)(*(self.args if args is None else args), **self.kwargs)

    @property
    def inputs(self):
        return tree_leaves(self.args)

    def gradients(self, outputs, cotangents, args=None):
        """Of all inputs and parameters."""
        wanted = [*(self.inputs if args is None else tree_leaves(args)), *self.module.parameters()]
        return torch.autograd.grad(tree_leaves(outputs), wanted, cotangents)


def samples(kind, training, dtype=torch.float64, requires_grad=False, device=DEVICE):
    entry = KINDS[kind]
    made = entry.module_inputs_func(
        entry, device=device, dtype=dtype, requires_grad=requires_grad, training=training
    )
    assert len(made) > 1
    for one in made:
        yield Sample(kind, one, dtype, training, device)


def spread(value):
    """The same numbers, every other one in memory."""

    def wide(tensor):
        made = tensor.repeat_interleave(2, dim=-1)[..., ::2].detach()
        assert not made.is_contiguous()
        return made.requires_grad_(tensor.requires_grad)

    return tree_map_only(torch.Tensor, wide, value)


def draw_like(outputs):
    return [torch.randn_like(t) for t in tree_leaves(outputs)]


# --- values ---------------------------------------------------------------------------------------


@every_dtype
def test_forward(kind, training, dtype):
    """Beside the entry's reference, a batch of one, and beside nn's module; then converted."""
    for sample in samples(kind, training, dtype):
        made = sample()
        assert all(t.dtype == dtype for t in tree_leaves(made))
        assert_close(made, sample.reference(sample.module, *sample.args, **sample.kwargs), **BITS)
        theirs = sample.construct(nn, device=DEVICE, dtype=dtype).train(training)
        theirs.load_state_dict(sample.module.state_dict())
        expected = sample(theirs)
        if dtype in EXACT:
            assert_close(made, expected, **tol(dtype))
        else:
            doubles = tree_map_only(torch.Tensor, torch.Tensor.double, sample.args)
            truth = sample(theirs.double(), doubles)
            for tensors in zip(*map(tree_leaves, (made, expected, truth)), strict=True):
                assert_as_good(*tensors)
        for other in EXACT:
            sample.module.to(other)
            sample(args=tree_map_only(torch.Tensor, lambda t, to=other: t.to(to), sample.args))


@every_dtype
def test_non_contiguous(kind, training, dtype):
    """Inputs and cotangents, each contiguous or not, give the same numbers and gradients."""
    for sample in samples(kind, training, dtype, requires_grad=True):
        outputs = sample()
        cotangents = draw_like(outputs)
        gradients = sample.gradients(outputs, cotangents)
        for args in (sample.args, spread(sample.args)):
            for gs in (cotangents, spread(cotangents)):
                made = sample(args=args)
                assert_close(made, outputs, **BITS)
                assert_close(sample.gradients(made, gs, args), gradients, **BITS)


@every_dtype
def test_memory_format(kind, training, dtype):
    for sample in samples(kind, training, dtype, requires_grad=True):
        outputs = sample()
        cotangents = draw_like(outputs)
        gradients = sample.gradients(outputs, cotangents)
        for memory_format in (torch.contiguous_format, torch.preserve_format):
            sample.module.to(memory_format=memory_format)
            made = sample()
            again = sample.gradients(made, cotangents)
            assert_close((made, again), (outputs, gradients), **BITS)
            assert all(t.is_contiguous() for t in tree_leaves((made, again)))


# --- derivatives ----------------------------------------------------------------------------------


def checks(sample):
    """What gradcheck takes: with all parameters as arguments, then, in training mode, with each
    of them alone."""
    parameters = dict(sample.module.named_parameters())
    inputs, structure = tree_flatten(sample.args)

    def run(names, *tensors):
        args = tree_unflatten(tensors[: len(inputs)], structure)
        replaced = dict(zip(names, tensors[len(inputs) :], strict=True))
        call = (sample.module, {**parameters, **replaced}, args, sample.kwargs)
        return tuple(tree_leaves(torch.func.functional_call(*call)))

    alone = [[name] for name in parameters] if sample.module.training else []
    for names in (list(parameters), *alone):
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        leaves = [parameters[name].detach().requires_grad_() for name in names]
        yield lambda *tensors, n=names: run(n, *tensors), (*inputs, *leaves)


@pytest.mark.cpu_only(reason="thousands of tiny calls")
def test_grad(kind, training):
    """Backward and forward mode, batched too, as PyTorch asks of its modules and more. Of every
    sample when training; of the first in eval mode, whose derivatives are the same."""
    entry = KINDS[kind]
    every = samples(kind, training, requires_grad=True)
    for sample in itertools.islice(every, None if training else 4):
        for k, (function, inputs) in enumerate(checks(sample)):
            options = (
                {"check_forward_ad": True, "check_batched_forward_grad": True} if not k else {}
            )
            fast = entry.gradcheck_fast_mode is not False
            assert gradcheck(function, inputs, fast_mode=fast, check_batched_grad=True, **options)


@pytest.mark.cpu_only(reason="thousands of tiny calls")
def test_gradgrad(kind, training):
    """As test_grad."""
    assert KINDS[kind].supports_gradgrad
    every = samples(kind, training, requires_grad=True)
    for k, sample in enumerate(itertools.islice(every, None if training else 4)):
        options = {"fast_mode": True, "check_batched_grad": k < 4}
        for function, inputs in [*checks(sample)][: None if k < 2 else 1]:
            assert gradgradcheck(function, inputs, **options)


# --- the module -----------------------------------------------------------------------------------


def check_placed(module, device, dtype):
    tensors = [*module.parameters(), *module.buffers()]
    assert tensors
    assert {(t.device, t.dtype) for t in tensors} == {(torch.device(device), dtype)}


@every_dtype
@pytest.mark.parametrize("device", [DEVICE, torch.device("meta")], ids=str)
def test_factory_kwargs(kind, training, dtype, device):
    for sample in samples(kind, training, dtype):
        check_placed(sample.construct(device=device, dtype=dtype), device, dtype)


def test_repr(kind, training):
    for sample in samples(kind, training):
        assert repr(sample.module) == str(sample.module) == repr(sample.construct(nn))


@every_dtype
def test_pickle(kind, training, dtype):
    for sample in samples(kind, training, dtype):
        file = io.BytesIO()
        torch.save(sample.module, file)
        file.seek(0)
        copy = torch.load(file, weights_only=False)
        assert copy.training == training
        assert_close(sample(copy), sample(), **BITS)


def test_without_the_training_flag(kind, training):
    """The forward of an entry whose modes do not differ never reads it."""
    for sample in samples(kind, training):
        expected = sample()
        del sample.module.training
        if KINDS[kind].train_and_eval_differ:
            continue
        assert_close(sample(), expected, **BITS)


@every_dtype
def test_on_the_meta_device(kind, training, dtype):
    """Made under it: the metadata of parameters and results."""
    for sample in samples(kind, training, dtype):
        with torch.device("meta"):
            meta = sample.construct(dtype=dtype).train(training)
        for ours, real in zip(meta.parameters(), sample.module.parameters(), strict=True):
            assert_same_metadata(ours, real)
        results = sample(meta, tree_map_only(torch.Tensor, lambda t: t.to("meta"), sample.args))
        for ours, real in zip(tree_leaves(results), tree_leaves(sample()), strict=True):
            assert_same_metadata(ours, real)


def assert_same_metadata(meta, real):
    assert meta.is_meta
    described = [(t.shape, t.stride(), t.dtype, t.requires_grad) for t in (meta, real)]
    assert described[0] == described[1]


@pytest.fixture(params=[False, True], ids=["set_data", "swap"])
def swapping(request):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize("with_grad", [False, True])
def test_to(kind, training, swapping, with_grad):
    """Conversions keep the Parameters, as objects, with their gradients, where memory is kept."""
    for sample in samples(kind, training, torch.float32):
        parameters = list(sample.module.parameters())
        if with_grad:
            sum(t.sum() for t in tree_leaves(sample())).backward()
            assert all(p.grad is not None for p in parameters)
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            sample.module.to(DEVICE, dtype)
            check_placed(sample.module, DEVICE, dtype)
            sample(args=tree_map_only(torch.Tensor, lambda t, to=dtype: t.to(to), sample.args))
            for before, after in zip(parameters, sample.module.parameters(), strict=True):
                assert before is after
                assert (after.grad is not None) == with_grad
                assert after.grad is None or after.grad.dtype == dtype
        sample.module.to("meta")
        assert all(p.is_meta for p in sample.module.parameters())


def test_to_empty(kind, training, swapping):
    for sample in samples(kind, training, torch.float32):
        with torch.device("meta"):
            module = sample.construct().train(training)
        before = list(module.parameters())
        module.to_empty(device=DEVICE)
        check_placed(module, DEVICE, torch.float32)
        assert all((a is b) == swapping for a, b in zip(before, module.parameters(), strict=True))
        module.load_state_dict(sample.module.state_dict())
        assert_close(sample(module), sample(), **BITS)


def test_swapped_parameters(kind, training):
    """torch.utils.swap_tensors, which nn.LSTM refuses for its weak references to its weights."""
    for sample in samples(kind, training):
        other = sample.construct(device=DEVICE, dtype=torch.float64).train(training)
        with torch.no_grad():  # a graph would hold the parameters too
            expected = sample(other)
        for mine, theirs in zip(sample.module.parameters(), other.parameters(), strict=True):
            swap_tensors(mine, theirs)
        assert_close(sample(), expected, **BITS)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_errors(kind, training, dtype):
    """The entry's bad constructions and calls: its error types and words."""
    entry = KINDS[kind]
    made = entry.module_error_inputs_func(
        entry, device=str(DEVICE), dtype=dtype, requires_grad=False, training=training
    )
    seen = 0
    for case in made:
        call = case.module_error_input.constructor_input
        construct = lambda c=call: getattr(lstm_ext, kind)(*c.args, **c.kwargs)  # noqa: E731
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                construct()
        else:
            module = construct().to(DEVICE)
            call = case.module_error_input.forward_input
            with pytest.raises(case.error_type, match=case.error_regex):
                module(*call.args, **call.kwargs)
        seen += 1
    assert seen > 3


@pytest.mark.skipif(DEVICE.type != "cuda" or NAME == "emulated", reason="needs a GPU")
def test_devices_agree(kind, training):
    """There and back: the same numbers and gradients on the CPU and on the GPU."""
    for sample in samples(kind, training, requires_grad=True, device="cpu"):
        results = []
        for device in ("cpu", DEVICE, "cpu"):
            sample.module.to(device)
            check_placed(sample.module, device, torch.float64)
            args = tree_map_only(
                torch.Tensor, lambda t, to=device: t.detach().to(to).requires_grad_(), sample.args
            )
            outputs = sample(args=args)
            torch.manual_seed(1)
            cotangents = [torch.randn(t.shape, dtype=t.dtype).to(t) for t in tree_leaves(outputs)]
            results.append((outputs, sample.gradients(outputs, cotangents, args)))
        assert_close(results[2], results[0], **BITS)
        assert_close(results[1], results[0], check_device=False, **TOL)
