"""AMDIM's evaluation: numbers of the original, a frozen encoder, an untouched test set, bad input.

`golden/amdim.json` was made by running the authors' public code (float32); its `meta` says how.
"""
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_frozen import assert_same, digits, encoder, photos, state  # noqa: F401 (two are fixtures)
from torch import nn

from simclr_nb.evaluate import amdim as amdim_evaluate
from simclr_nb.evaluate.amdim import (
    AMDIMClassifiers,
    AMDIMRecipe,
    amdim_evaluation,
    amdim_recipe,
    clipped_cross_entropy,
)
from simclr_nb.images.arrays import ImageArrays
from simclr_nb.evaluate.classifier import train_steps
from simclr_nb.images.source import Source
from simclr_nb.data import simclr_dls
from simclr_nb.evaluate.features import random_encoder

GOLDEN = json.loads((Path(__file__).parent / "golden" / "amdim.json").read_text())
QUICK = dict(epochs=2, bs=64, progress=False)


def sin_t(*shape):
    "The file's formula, float64."
    n = torch.Size(shape).numel()
    return (0.01 * torch.arange(n, dtype=torch.float64)).sin().view(shape)


# The original's numbers

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss(dtype):
    golden = GOLDEN["loss_xent"]
    assert golden["logits"] == "12*sin_t((3,5),f=0.01)"
    loss = clipped_cross_entropy((12 * sin_t(3, 5)).to(dtype), torch.tensor(golden["labels"]))
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(golden["value"], rel=3e-7)  # two units of float32


def test_number_of_parameters():
    n = sum(p.numel() for p in AMDIMClassifiers(1024, 10).parameters())
    assert n == GOLDEN["evaluator_params_dim1024_10cls"]


def test_golden_loss_sees_each_part():
    "Without clip, without penalty, or with the penalty on labelled rows alone it is another number."
    logits, y = 12 * sin_t(3, 5), torch.tensor(GOLDEN["loss_xent"]["labels"])
    known = y >= 0
    for other in (clipped_cross_entropy(logits, y, clip=None),
                  clipped_cross_entropy(logits, y, penalty=0),
                  clipped_cross_entropy(logits[known], y[known])):
        assert abs(other.item() - GOLDEN["loss_xent"]["value"]) > 1e-4


# The loss

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), n_classes=st.integers(2, 7),
       clip=st.sampled_from([None, 1.0, 10.0]), penalty=st.sampled_from([0.0, 1e-3, 1.0]))
def test_loss_row_by_row(seed, n, n_classes, clip, penalty):
    "The formula as loops; unlabelled rows count in the penalty alone."
    g = torch.Generator().manual_seed(seed)
    x = 20 * torch.randn(n, n_classes, generator=g, dtype=torch.float64)
    y = torch.randint(-1, n_classes, (n,), generator=g)
    costs = []
    for row, label in zip(x, y.tolist(), strict=True):
        if label < 0: continue
        t = row if clip is None else clip * (torch.exp(2 * row / clip) - 1) / (
            torch.exp(2 * row / clip) + 1)
        costs.append(-(t[label] - t.exp().sum().log()))
    expected = sum(costs) / len(costs) if costs else 0.0
    expected = expected + penalty * sum(v**2 for v in x.flatten().tolist()) / x.numel()
    loss = clipped_cross_entropy(x, y, clip, penalty)
    assert loss.item() == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


def test_gradient():
    x = (3 * sin_t(4, 5)).requires_grad_()
    y = torch.tensor([0, -1, 4, 2])
    assert torch.autograd.gradcheck(lambda x: clipped_cross_entropy(x, y), x)


def test_batch_without_labels_is_finite():
    "The mean over no image is 0, not NaN."
    x = torch.randn(4, 3, requires_grad=True)
    loss = clipped_cross_entropy(x, torch.full((4,), -1), penalty=0)
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


# The classifiers

def test_unlabelled_rows_teach_batchnorm_but_no_class():
    torch.manual_seed(0)
    both, h = AMDIMClassifiers(6, 3, hidden=8, dropout=0), torch.randn(4, 6)
    loss = AMDIMClassifiers.loss(both(h), torch.full((4,), -1), penalty=0)
    loss.backward()
    assert all((p.grad == 0).all() for p in both.parameters())


def test_classifiers_learn_as_if_alone():
    def train(linear):
        torch.manual_seed(0)
        both = AMDIMClassifiers(6, 3)
        h, y = torch.randn(40, 6), torch.randint(3, (40,))
        batches = [(h, y)] * 12
        loss = (lambda out, y: clipped_cross_entropy(out[0], y)) if linear else both.loss
        train_steps(both, batches, AMDIMRecipe(12, 40, 0.01), loss_func=loss)
        return both.linear
    together, alone = train(False), train(True)
    assert torch.equal(together.weight, alone.weight) and torch.equal(together.bias, alone.bias)


def test_start():
    "Every weight and bias within 1 / sqrt(inputs), and BatchNorm's scale at 1."
    torch.manual_seed(0)
    both = AMDIMClassifiers(256, 10)
    for layer in (m for m in both.modules() if isinstance(m, nn.Linear)):
        bound = layer.in_features**-0.5
        for p in layer.parameters(): assert p.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    norm = both.mlp[2]
    assert (norm.weight == 1).all() and (norm.bias == 0).all()


def test_recipe():
    recipe = amdim_recipe(50_000)
    assert (recipe.steps, recipe.bs) == (12_500, 480)
    lr = [recipe.lr_at(k) for k in range(recipe.steps)]
    assert lr[0] == 2e-4 and lr == sorted(lr, reverse=True)  # no warm-up
    drops = [k for k in range(1, len(lr)) if lr[k] != lr[k - 1]]
    assert drops == [8333, 11458]  # after 80 and 110 of 120 epochs
    assert lr[-1] == pytest.approx(2e-4 / 25)
    opt = recipe.create_optimizer(AMDIMClassifiers(4, 2).parameters())
    assert type(opt) is torch.optim.Adam
    for group in opt.param_groups:
        assert (group["weight_decay"], group["betas"], group["eps"]) == (1e-5, (0.8, 0.999), 1e-8)
    with pytest.raises(TypeError): AMDIMRecipe(10, optimizer="sgd")


# The evaluation

@pytest.mark.parametrize("augment", [True, False])
def test_frozen(encoder, augment):  # noqa: F811
    before = state(encoder)
    amdim_evaluation(encoder, digits(), augment=augment, **QUICK)
    assert_same(state(encoder), before)


@pytest.mark.parametrize("augment", [True, False])
def test_frozen_on_files(encoder, photos, augment):  # noqa: F811
    before = state(encoder)
    results = amdim_evaluation(encoder, photos, augment=augment, **QUICK)
    assert_same(state(encoder), before)
    for r in results.values(): assert r.missing() == []


def test_frozen_after_a_failure(encoder):  # noqa: F811
    before = state(encoder)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        amdim_evaluation(encoder, digits(), lr=1e20, augment=False, **QUICK)
    assert_same(state(encoder), before)


@pytest.fixture(scope="module")
def frozen():
    return random_encoder(dict(arch="resnet18", width=0.125, stem="cifar"))


@pytest.fixture
def scored(monkeypatch):
    "Scores of the test images, as they reach the count of each classifier."
    seen = []
    original = amdim_evaluate.score_result

    def score(scores, y, **card):
        seen.append((scores.clone(), y.clone()))
        return original(scores, y, **card)
    monkeypatch.setattr(amdim_evaluate, "score_result", score)
    return seen


@pytest.mark.parametrize("augment", [True, False])
def test_labels_of_test_images_decide_nothing(frozen, scored, augment):
    for shift in (0, 3):
        dls = digits()
        dls.valid.dataset.labels = (dls.valid.dataset.labels + shift) % 10
        amdim_evaluation(frozen, dls, augment=augment, **QUICK)
    (linear, y), (mlp, _), (linear2, y2), (mlp2, _) = scored
    assert torch.equal(linear, linear2) and torch.equal(mlp, mlp2)
    assert not torch.equal(y, y2)


def test_test_images_decide_nothing_of_each_other(frozen, scored):
    "Each is scored by itself, all are counted, in order, whatever the batches of the loader."
    dls = digits()
    results = amdim_evaluation(frozen, dls, augment=False, **QUICK)
    for r in results.values():
        assert r.card["n_test"] == 100 and torch.equal(r.y, dls.valid.dataset.labels)
    few = simclr_dls(Source("few", dls.train.dataset,
                            ImageArrays(*dls.valid.dataset[torch.arange(7)]),
                            classes=dls.classes), bs=3, seed=0)
    amdim_evaluation(frozen, few, augment=False, **QUICK)
    (linear, _), (mlp, _), (linear7, y7), (mlp7, _) = scored
    assert len(y7) == 7  # the loader's batches of 3 would leave one out
    torch.testing.assert_close(linear7, linear[:7], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mlp7, mlp[:7], rtol=1e-4, atol=1e-5)


def test_seed(frozen, scored):
    rng = torch.get_rng_state()
    for seed, noise in ((0, 1), (0, 5), (1, 1)):
        torch.manual_seed(noise)  # must not matter
        amdim_evaluation(frozen, digits(), seed=seed, **QUICK)
    torch.set_rng_state(rng)
    first, again, other = ([s for s, _ in scored[i : i + 2]] for i in (0, 2, 4))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_global_random_state_is_left_alone(frozen):
    rng = torch.get_rng_state()
    amdim_evaluation(frozen, digits(), **QUICK)
    assert torch.equal(torch.get_rng_state(), rng)


def test_views_are_those_of_the_policy(frozen, monkeypatch):
    "By default the whole policy of `dls`, colours too, one view of each image."
    dls, calls = digits(), []
    original = type(dls.policy).__call__

    def call(self, x, generator=None):
        calls.append((self.name, len(x)))
        return original(self, x, generator)
    monkeypatch.setattr(type(dls.policy), "__call__", call)
    results = amdim_evaluation(frozen, dls, **QUICK)
    assert calls == [(dls.policy.name, 64)] * 7  # 400 images in batches of 64
    assert "jitter" in results["linear"].card["augmentation"]
    amdim_evaluation(frozen, dls, augment=False, **QUICK)
    assert len(calls) == 7


def test_card(frozen):
    r = amdim_evaluation(frozen, digits(), per_class=5, name="mine", pretraining=dict(epochs=7),
                         clip=None, **QUICK)
    assert list(r) == ["linear", "mlp"]
    assert [each.card["protocol"] for each in r.values()] == ["AMDIM linear", "AMDIM MLP"]
    card = r["mlp"].card
    assert (card["bs"], card["seed"], card["selection"], card["encoder"]) == (50, 0, "none", "mine")
    assert card["labels"] == "50 of 200 training images, 5 of each class"
    assert card["loss"].startswith("cross-entropy of logits; 0.001 times")
    assert card["pretraining"] == dict(epochs=7)
    for each in r.values(): assert each.missing() == [] and each.to_json()


def test_separable_features_are_learned():
    "Classes that a plane tells apart: both classifiers find it."
    g = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    images = torch.randint(60, (300, 3, 8, 8), generator=g, dtype=torch.uint8)
    images[torch.arange(300), y] += 180
    sets = ImageArrays(images[:210], y[:210]), ImageArrays(images[210:], y[210:])
    dls = simclr_dls(Source("channels", *sets, classes=["r", "g", "b"]), bs=32, seed=0)
    means = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    results = amdim_evaluation(means, dls, epochs=20, bs=32, lr=0.01, augment=False,
                               progress=False)
    for r in results.values(): assert r.value == 1


# Bad input

@pytest.mark.parametrize("bad, message", [
    (dict(epochs=0), "epochs must be above 0, got 0"), (dict(epochs=-1), "got -1"),
    (dict(bs=0), "bs must be at least 1"), (dict(bs=1), "needs 2 images"),
    (dict(lr=-1.0), "lr must be"), (dict(milestones=(80, 110)), "shares of the run"),
    (dict(clip=0.0), "clip must be above 0"), (dict(penalty=-1.0), "penalty must be"),
    (dict(train_rows=[500]), "0 to 199"), (dict(fraction=0.1, per_class=1), "give one of"),
])
def test_errors(frozen, bad, message):
    with pytest.raises(ValueError, match=message):
        amdim_evaluation(frozen, digits(), augment=False, **(QUICK | bad))


@pytest.mark.parametrize("part", ["train", "valid"])
def test_missing_labels(frozen, part):
    dls = digits()
    getattr(dls, part).dataset.labels[3] = -1
    with pytest.raises(ValueError, match="needs a label"):
        amdim_evaluation(frozen, dls, augment=False, **QUICK)
