"""Numbers of the losses that the paper compares with NT-Xent: `other_losses` and Table 2's example.

There is no official code of these losses. `golden/simclr.json` holds values from NumPy (float64),
whose definitions its `_about` states; we compute in float64 too, so values must agree as in
`test_golden.py`.
"""

import pytest
import torch
import torch.nn.functional as F
from test_golden import GOLDEN, approx, inputs

from simclr_nb.loss.alternatives import margin_triplet, nt_logistic, nt_xent_one_view

OTHER = GOLDEN["other_losses"]
KEYS = [(name, key) for name, cases in OTHER.items() for key in cases]
LOSSES = dict(ntxent_oneview=nt_xent_one_view, ntlogistic=nt_logistic, margin=margin_triplet)


def case(key):
    """Loss and options of a key such as `margin_sh_skip|m=0.4`."""
    name, setting = key.split("|")
    name, _, fallback = name.partition("_sh_")
    kind, value = setting.split("=")
    options = {dict(tau="temperature", m="margin")[kind]: float(value)}
    return LOSSES[name], options | (dict(semi_hard=True, fallback=fallback) if fallback else {})


def check(losses, expected):
    """Compare losses per anchor `(2N,)` with both directions and their mean; give what is left."""
    expected = dict(expected)
    first, second = losses.chunk(2)
    assert losses.mean().item() == approx(expected.pop("mean_both_dirs"))
    assert first.mean().item() == approx(expected.pop("dir_ab"))
    assert second.mean().item() == approx(expected.pop("dir_ba"))
    return expected


def test_both_inputs_and_all_losses_are_there():
    assert set(OTHER) == {"brief", "mixed"}
    names = {key.split("|")[0] for _, key in KEYS}
    mined = {f"{name}_sh_{how}" for name in ("ntlogistic", "margin") for how in ("skip", "easiest")}
    assert names == set(LOSSES) | mined
    assert len(KEYS) == 2 * 4 * 7  # inputs, values of the temperature or margin, losses


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_other_losses(name, key):
    z, (loss, options), expected = inputs(name), case(key), OTHER[name][key]
    if "neg_mean" not in expected:
        left = check(loss(z, **options, reduction="none"), expected)
    else:
        left = dict(expected)
        for how in ("mean", "sum"):
            losses = loss(z, **options, reduce_negatives=how, reduction="none")
            assert check(losses, left.pop(f"neg_{how}")) == {}
    if "active_triplets" in left:
        assert active_triplets(z, options["margin"]) == left.pop("active_triplets")
    if "anchors_without_semihard" in left:
        assert without_semi_hard(z, loss, options) == left.pop("anchors_without_semihard")
    assert left == {}, "a number that nothing compares"


def active_triplets(z, margin):
    """Count the open hinges: the slope of their sum over the margin."""
    sums = [
        margin_triplet(z, margin + step, reduce_negatives="sum", reduction="none").sum()
        for step in (0, 1e-6)
    ]
    slope = (sums[1] - sums[0]).item() / 1e-6
    assert slope == pytest.approx(round(slope), abs=1e-3)
    return round(slope)


def without_semi_hard(z, loss, options):
    """Count the anchors whose loss is what remains without a negative."""
    losses = loss(z, **options | dict(fallback="skip"), reduction="none")
    if loss is margin_triplet:
        return (losses == 0).sum().item()
    pairs = F.cosine_similarity(*z.chunk(2)).repeat(2) / options["temperature"]
    return (losses + F.logsigmoid(pairs)).abs().lt(1e-12).sum().item()


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", ["ntxent", "ntlogistic", "margin"])
def test_table_2_single_example(name):
    g = GOLDEN["table2_single_example"]
    assert set(g) == {"u", "v_pos", "v_neg", "tau", "m", "ntxent_neg_loss", "ntxent_grad"} | {
        "ntlogistic_neg_loss_single_neg", "ntlogistic_grad", "margin_neg_loss", "margin_grad"
    }  # fmt: skip
    negatives = tensor(g["v_neg"])[: None if name == "ntxent" else 1]
    second = torch.cat([tensor([g["v_pos"]]), negatives])
    first = tensor([g["u"]]).expand_as(second)  # only the first anchor counts
    z = torch.cat([first, second]).requires_grad_()
    options = dict(normalize=False, reduction="none")
    if name == "margin":
        loss = margin_triplet(z, g["m"], **options)[0]
        expected = g["margin_neg_loss"]
    elif name == "ntlogistic":
        loss = nt_logistic(z, g["tau"], **options)[0]
        expected = g["ntlogistic_neg_loss_single_neg"]
    else:
        loss = nt_xent_one_view(z, g["tau"], **options)[0]
        expected = g["ntxent_neg_loss"]
    assert -loss.item() == approx(expected)
    (gradient,) = torch.autograd.grad(-loss, z)
    assert gradient[0].tolist() == approx(g[f"{name}_grad"])


def table_2(name, setting, u, v_pos, v_neg):
    """Gradient of Table 2, column by column as printed, summed over the negatives."""
    s_pos, s_neg = v_pos @ u, v_neg @ u
    if name == "margin":
        return ((s_pos - s_neg < setting)[:, None] * (v_pos - v_neg)).sum(0)
    if name == "ntlogistic":
        push = torch.sigmoid(s_neg / setting)
        return (torch.sigmoid(-s_pos / setting) * v_pos - push @ v_neg) / setting
    total = (s_pos / setting).exp() + (s_neg / setting).exp().sum()
    pull, push = 1 - (s_pos / setting).exp() / total, (s_neg / setting).exp() / total
    return (pull * v_pos - push @ v_neg) / setting


@pytest.mark.parametrize("data", ["brief", "paired", "mixed"])
@pytest.mark.parametrize("key", [k for k in OTHER["brief"] if "_sh_" not in k])
def test_gradients_are_those_of_table_2(data, key):
    loss, options = case(key)
    name, ((_, setting),) = key.split("|")[0].removesuffix("_oneview"), options.items()
    z = F.normalize(inputs(data), dim=1).requires_grad_()
    more = {} if name == "ntxent" else dict(reduce_negatives="sum")
    losses = loss(z, **options, **more, normalize=False, reduction="none")[:8]
    (gradient,) = torch.autograd.grad(-losses.sum(), z)  # each first view is an anchor once
    u, v = z.detach().chunk(2)
    for i in range(8):
        negatives = torch.cat([v[:i], v[i + 1 :]])
        expected = table_2(name, setting, u[i], v[i], negatives)
        torch.testing.assert_close(gradient[i], expected, rtol=1e-10, atol=1e-10)
