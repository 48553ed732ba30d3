"""Variants of the modules: parameters, masks, training and evaluation, merging, cells."""

import pytest
import torch
from tolerances import tol
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from variants import EVERYTHING, VARIANTS

import lstm_ext

F64 = {"dtype": torch.float64}
BITS = {"rtol": 0, "atol": 0}
RANDOM = [name for name, kwargs in VARIANTS.items() if str(kwargs).count("out")]
DETERMINISTIC = [name for name in VARIANTS if name not in RANDOM]


def run(module, *args, seed=None, **kwargs):
    if seed is not None:
        torch.manual_seed(seed)
    y, hn = module(*args, **kwargs)
    return [y, *hn]


# --- parameters ---------------------------------------------------------------------------------


def test_names_and_sizes():
    module = lstm_ext.LSTM(3, 8, 2, bidirectional=True, proj_size=5, **EVERYTHING)
    plain = nn.LSTM(3, 8, 2, bidirectional=True, proj_size=5)
    state = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    own = {"weight_ch": (24,), "gamma_ih": (32,), "gamma_hh": (32,), "gamma_ch": (8,)}
    own["beta_ch"] = (8,)
    expected = {name: tuple(p.shape) for name, p in plain.state_dict().items()}
    for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
        expected |= {name + suffix: size for name, size in own.items()}
    assert state == expected
    assert [len(weights) for weights in module.all_weights] == [10] * 4
    assert len(module._flat_weights) == len(list(module.parameters())) == 40


@pytest.mark.parametrize("name", ["zoneout", "recurrent_dropout", "weight_dropout", "forget_bias"])
def test_without_parameters_the_state_dict_is_nn_lstms(name):
    ours = lstm_ext.LSTM(3, 4, 2, bidirectional=True, **VARIANTS[name])
    theirs = nn.LSTM(3, 4, 2, bidirectional=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("mode", ["sum", "mul", "ave"])
def test_deeper_layers_take_what_was_merged(mode):
    module = lstm_ext.LSTM(3, 8, 3, bidirectional=True, proj_size=5, merge_mode=mode)
    assert module.weight_ih_l0_reverse.shape == (32, 3)
    assert module.weight_ih_l1.shape == module.weight_ih_l2_reverse.shape == (32, 5)
    bound = 8**-0.5
    assert module.weight_ih_l1.abs().max() <= bound and module.weight_ih_l1.std() > bound / 4


def test_same_seed_gives_nn_lstms_weights_and_more():
    torch.manual_seed(3)
    theirs = nn.LSTM(3, 4, 2, bidirectional=True)
    torch.manual_seed(3)
    ours = lstm_ext.LSTM(3, 4, 2, bidirectional=True, **EVERYTHING)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(getattr(ours, name), parameter)
    assert 0 < ours.weight_ch_l1.abs().max() <= 0.5
    assert (ours.gamma_ih_l0 == 1).all() and (ours.gamma_ch_l1_reverse == 1).all()
    assert (ours.beta_ch_l0 == 0).all()


@pytest.mark.parametrize("cell", [False, True])
def test_forget_bias(cell):
    if cell:
        module, suffixes = lstm_ext.LSTMCell(3, 4, forget_bias=1.5), [""]
    else:
        module = lstm_ext.LSTM(3, 4, 2, bidirectional=True, forget_bias=1.5, layer_norm=True)
        suffixes = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    for again in (False, True):
        if again:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.fill_(9)
            module.reset_parameters()
        for suffix in suffixes:
            total = getattr(module, "bias_ih" + suffix) + getattr(module, "bias_hh" + suffix)
            assert (total[4:8] == 1.5).all()
            assert (total[:4].abs() <= 1).all() and (total[:4] != 0).all()
            if not cell:
                assert (getattr(module, "gamma_hh" + suffix) == 1).all()
                assert (getattr(module, "beta_ch" + suffix) == 0).all()


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_repeats_the_masks(name):
    module = lstm_ext.LSTM(3, 16, 2, bidirectional=True, **VARIANTS[name])
    x = torch.randn(5, 4, 3)
    first, again, other = (run(module, x, seed=seed) for seed in (1, 1, 2))
    assert_close(again, first, **BITS)
    assert not torch.equal(other[0], first[0])


@pytest.mark.parametrize("name", RANDOM)
def test_masks_do_not_depend_on_the_layout(name):
    module = lstm_ext.LSTM(3, 16, **VARIANTS[name], **F64)
    twin = lstm_ext.LSTM(3, 16, batch_first=True, **VARIANTS[name], **F64)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(5, 4, 3, **F64)
    first, second = run(module, x, seed=1), run(twin, x.transpose(0, 1), seed=1)
    second[0] = second[0].transpose(0, 1)
    assert_close(second, first, **tol(torch.float64))


@pytest.mark.parametrize("name", VARIANTS)
def test_evaluation_draws_nothing_and_differentiates(name):
    module = lstm_ext.LSTM(3, 8, 2, **VARIANTS[name]).eval()
    x, before = torch.randn(5, 4, 3, requires_grad=True), torch.get_rng_state()
    first = run(module, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(run(module, x), first, **BITS)
    first[0].sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_without_masks_training_is_evaluation(name):
    module = lstm_ext.LSTM(3, 8, 2, **VARIANTS[name])
    x = torch.randn(5, 4, 3)
    first = run(module, x)
    assert_close(run(module.eval(), x), first, **BITS)


def test_zero_probabilities_are_the_plain_lstm():
    zero = {"zoneout": (0, 0.0), "recurrent_dropout": 0, "weight_dropout": 0.0}
    module, plain = lstm_ext.LSTM(3, 8, **zero), lstm_ext.LSTM(3, 8)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(5, 4, 3)
    assert_close(run(module, x), run(plain, x), **BITS)


def test_certain_zoneout_keeps_the_state():
    x, hx = torch.randn(5, 4, 3), (torch.randn(1, 4, 8), torch.randn(1, 4, 8))
    for training in (True, False):
        module = lstm_ext.LSTM(3, 8, zoneout=1).train(training)
        y, (h_n, c_n) = module(x, hx)
        assert torch.equal(y, hx[0].expand_as(y))
        assert torch.equal(h_n, hx[0]) and torch.equal(c_n, hx[1])


@pytest.mark.parametrize("name", ["recurrent_dropout", "weight_dropout"])
def test_certain_dropout_cuts_the_recurrent_product(name):
    module, cut = lstm_ext.LSTM(3, 8, **{name: 1.0}, **F64), lstm_ext.LSTM(3, 8, **F64)
    cut.load_state_dict(module.state_dict())
    with torch.no_grad():
        cut.weight_hh_l0.zero_()
    x, hx = torch.randn(5, 4, 3, **F64), (torch.randn(1, 4, 8, **F64), torch.randn(1, 4, 8, **F64))
    assert_close(run(module, x, hx), run(cut, x, hx), **tol(torch.float64))


def test_frequencies_and_scales(recorder):
    """Each mask's share of hits, within five standard deviations."""
    p = {"zoneout": (0.3, 0.05), "recurrent_dropout": 0.4, "weight_dropout": 0.2}
    module = lstm_ext.LSTM(3, 64, **p)
    module(torch.randn(50, 60, 3))
    w = recorder.directions[0].w
    whole, survivors = module.weight_hh_l0, w.w_hh != 0
    assert_close(w.w_hh[survivors], whole[survivors] / 0.8)
    assert sorted(w.masks.h_dropout.unique().tolist()) == pytest.approx([0, 1 / 0.6])
    samples = [(w.masks.keep_h, 0.3), (w.masks.keep_c, 0.05), (w.masks.h_dropout == 0, 0.4)]
    for mask, probability in [*samples, (~survivors, 0.2)]:
        share, n = mask.double().mean().item(), mask.numel()
        assert abs(share - probability) < 5 * (probability * (1 - probability) / n) ** 0.5
    # No two steps, sequences or units are alike.
    flags = w.masks.keep_h.view(50, 60, 64)
    assert flags.any(0).all() and not flags.all(0).any()
    assert not torch.equal(flags[0], flags[1]) and not torch.equal(flags[:, 0], flags[:, 1])
    assert not torch.equal(w.masks.keep_h, w.masks.keep_c)


def test_every_direction_and_layer_has_masks_of_its_own(recorder):
    lstm_ext.LSTM(3, 32, 2, bidirectional=True, **EVERYTHING)(torch.randn(5, 4, 3))
    masks = [d.w.masks for d in recorder.directions]
    for a in range(4):
        for b in range(a):
            for one, other in zip(masks[a], masks[b], strict=True):
                assert not torch.equal(one, other)


def test_recurrent_dropout_is_one_mask_for_all_steps():
    """With an identity W_hh into g alone, a unit's h reaches the next step at every step or never:
    h of dropped units is what a layer without recurrence gives."""
    module = lstm_ext.LSTM(1, 32, recurrent_dropout=0.5, **F64)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_hh_l0[64:96] = torch.eye(32)
    x = torch.randn(6, 3, 1, **F64)
    y = module(x)[0]
    with torch.no_grad():
        module.weight_hh_l0.zero_()
    alone = module.eval()(x)[0]
    same = (y - alone).abs() < 1e-12
    dropped = same[1:].all(0)
    assert torch.equal(dropped, same[1])  # decided at the second step, the first that sees an h
    assert 0.3 < dropped.double().mean() < 0.7


# --- merge modes, unbatched and packed ------------------------------------------------------------


@pytest.mark.parametrize("mode", ["concat", "sum", "mul", "ave", None])
@pytest.mark.parametrize("proj", [0, 3])
def test_merge_modes(mode, proj):
    kwargs = {"bidirectional": True, "proj_size": proj, "return_cell_sequence": True, **F64}
    module = lstm_ext.LSTM(3, 5, merge_mode=mode, **kwargs)
    plain = lstm_ext.LSTM(3, 5, **kwargs)
    plain.load_state_dict(module.state_dict())
    x, lengths = torch.randn(6, 4, 3, **F64), torch.tensor([6, 4, 3, 1])
    packed = pack_padded_sequence(x, lengths)
    merges = {
        "concat": lambda f, b: torch.cat([f, b], -1),
        "sum": lambda f, b: f + b,
        "mul": lambda f, b: f * b,
        "ave": lambda f, b: (f + b) / 2,
        None: lambda f, b: (f, b),
    }
    for args, kwargs in (((x,), {}), ((x,), {"lengths": lengths}), ((x[:, 0],), {})):
        y, hn, cells = module(*args, **kwargs)
        whole, states, all_cells = plain(*args, **kwargs)
        assert_close(y, merges[mode](*whole.chunk(2, -1)), **tol(torch.float64))
        assert_close(hn, states, **BITS)
        expected = all_cells if mode is not None else tuple(all_cells.chunk(2, -1))
        assert_close(cells, expected, **BITS)
    y, whole = module(packed)[0], plain(packed)[0]
    expected = merges[mode](*whole.data.chunk(2, -1))
    for part, rows in zip(y, expected, strict=True) if mode is None else [(y, expected)]:
        assert_close(part.data, rows, **tol(torch.float64))
        assert torch.equal(part.batch_sizes, whole.batch_sizes)


@pytest.mark.parametrize("name", VARIANTS)
def test_unbatched_input_is_a_batch_of_one(name):
    module = lstm_ext.LSTM(3, 8, **VARIANTS[name], **F64)
    x = torch.randn(5, 3, **F64)
    many = run(module, x[:, None], seed=1)
    assert_close(run(module, x, seed=1), [t.squeeze(1) for t in many], **BITS)


# --- the cell -------------------------------------------------------------------------------------


ALIKE = [(name, False) for name in VARIANTS] + [(name, True) for name in DETERMINISTIC]


@pytest.mark.parametrize("name, training", ALIKE)
def test_a_sequence_of_cells_is_the_layer(name, training):
    """Without masks, which a cell draws step by step; or with zoneout's expectation."""
    cell = lstm_ext.LSTMCell(3, 8, **VARIANTS[name], **F64).train(training)
    layer = lstm_ext.LSTM(3, 8, **VARIANTS[name], **F64).train(training)
    layer.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
    x, hx = torch.randn(6, 5, 3, **F64), tuple(torch.randn(5, 8, **F64) for _ in range(2))
    y, (h_n, c_n) = layer(x, tuple(s[None] for s in hx))
    outputs = []
    for step in x:
        hx = cell(step, hx)
        outputs.append(hx[0])
    assert_close([torch.stack(outputs), *hx], [y, h_n[0], c_n[0]], **tol(torch.float64))


@pytest.mark.parametrize("name", RANDOM)
def test_a_cell_draws_at_every_call(name):
    cell = lstm_ext.LSTMCell(3, 32, **VARIANTS[name])
    x, hx = torch.randn(2, 3), (torch.randn(2, 32), torch.randn(2, 32))
    torch.manual_seed(1)
    first, second = cell(x, hx), cell(x, hx)
    torch.manual_seed(1)
    assert_close(cell(x, hx), first, **BITS)
    assert not torch.equal(first[0], second[0]) or not torch.equal(first[1], second[1])
