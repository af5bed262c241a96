"The transfer protocols: grids of the paper, choices that cannot see the test set, kill and resume."
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from processes import start
from simclr_nb.transfer import transfer
from simclr_nb.images.source import digits_source
from simclr_nb.transfer.datasets import (
    TRANSFER_DATASETS,
    TransferData,
    TransferSplit,
    load_transfer,
)
from simclr_nb.model.encoder import create_encoder
from simclr_nb.transfer.search import Grid, transfer_grid
from simclr_nb.evaluate.journal import Journal
from simclr_nb.evaluate.classifier import bn_momentum
from simclr_nb.transfer.table import transfer_table
from simclr_nb.transfer.transfer import finetune_transfer, linear_transfer, transfer_result

sys.path.insert(0, str(Path(__file__).resolve().parent))
from miniatures import MINIATURES

TINY = Grid((0.003, 0.03, 0.3), (0.0, 1e-3), steps=3, bs=16, name="tiny")
QUIET = dict(size=8, progress=False)


@pytest.fixture(scope="module")
def minis(tmp_path_factory) -> dict:
    "A root for each miniature."
    roots = {name: tmp_path_factory.mktemp(name) for name in TRANSFER_DATASETS}
    for name, root in roots.items(): MINIATURES[name](root)
    return roots


def some_digits() -> TransferData:
    "64 digits for each part."
    source = digits_source()
    whole = TransferSplit(source.train.images, source.train.labels)
    parts = (whole.select(torch.arange(64 * i, 64 * i + 64)) for i in range(3))
    return TransferData("digits", source.classes, *parts, "top-1")


@pytest.fixture(scope="module")
def digits() -> TransferData: return some_digits()


def several_answers(digits: TransferData) -> TransferData:
    "The digits as a task of several answers: even, large, a multiple of three; some difficult."
    def turn(split):
        y = split.labels
        labels = torch.stack([y % 2 == 0, y > 4, y % 3 == 0], 1).long()
        difficult = (torch.arange(len(y))[:, None] % 7 == torch.arange(3)) & (labels == 0)
        return TransferSplit(split.images, labels, difficult)
    parts = (turn(split) for split in (digits.train, digits.valid, digits.test))
    return TransferData("answers", ["even", "large", "three"], *parts, "11-point mAP")


def small_encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_encoder("resnet18", width=0.125, stem="cifar").eval()


class Redness(nn.Module):
    "An encoder that sees how red an image is; miniatures say their labels so."
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        red = x[:, 0].mean((1, 2))[:, None] * self.scale
        return torch.cat([red, red.square()], 1)


PROTOCOLS = {
    "linear": lambda encoder, data, **how: linear_transfer(encoder, data, **QUIET, **how),
    "fine-tuning": lambda encoder, data, **how: finetune_transfer(
        encoder, data, TINY, **QUIET, **how),
    "random": lambda encoder, data, **how: finetune_transfer(
        encoder, data, TINY, **QUIET, random_init=True, **how),
}


# The paper's grids

def test_grids_have_the_sizes_and_ends_of_the_paper():
    tuned, scratch = transfer_grid(), transfer_grid(random_init=True)
    assert (len(tuned.lrs), min(tuned.lrs), max(tuned.lrs)) == (7, 1e-4, 0.1)
    assert (len(tuned.decays), tuned.decays[:2], tuned.decays[-1]) == (8, (0.0, 1e-6), 1e-3)
    assert (len(scratch.lrs), min(scratch.lrs), max(scratch.lrs)) == (7, 1e-3, 1.0)
    assert (len(scratch.decays), min(scratch.decays)) == (8, 1e-5)
    assert max(scratch.decays) == pytest.approx(10**-1.5, rel=1e-5)
    assert (tuned.steps, scratch.steps, tuned.bs, scratch.bs) == (20_000, 40_000, 256, 256)
    assert len(tuned.points) == len(scratch.points) == 56


@pytest.mark.parametrize("random_init", [False, True])
@pytest.mark.parametrize("budget", ["paper", "medium", "small"])
def test_weight_decay_is_divided_by_the_learning_rate(budget, random_init):
    grid = transfer_grid(budget, random_init)
    found = {(p["lr"], round(p["lr"] * p["weight_decay"], 12)) for p in grid.points}
    wanted = {(lr, round(decay, 12)) for lr in grid.lrs for decay in grid.decays}
    assert len(found) == len(wanted)
    for (lr, product), (other, decay) in zip(sorted(found), sorted(wanted), strict=True):
        assert lr == other and product == pytest.approx(decay, rel=1e-5)


def test_every_training_gets_the_grid_and_the_momentum_of_its_own_images(monkeypatch):
    calls = []

    def record(encoder, train, n_classes, recipe, policy, bn_decay, **kwargs):
        calls.append((len(train), recipe, bn_decay, policy.size))
        return nn.Sequential(encoder, nn.Linear(encoder.out_dim, n_classes)).eval()
    monkeypatch.setattr(transfer, "train_classifier", record)
    n = dict(train=40_000, valid=64, test=64)
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    parts = {k: TransferSplit(pixels.expand(v, -1, -1, -1), torch.arange(v) % 4)
             for k, v in n.items()}
    data = TransferData("zeros", list("abcd"), **parts, metric="top-1")
    result = finetune_transfer(small_encoder(), data, **QUIET)           # the paper's grid
    assert [size for size, *_ in calls] == [40_000] * 56 + [40_064]
    for size, recipe, kept, pixels in calls:
        assert kept == pytest.approx(max(1 - 10 / (size / 256), 0.9), abs=1e-9)
        assert (recipe.steps, recipe.bs, recipe.optimizer, pixels) == (20_000, 256, "sgd", 8)
    points = [dict(lr=r.lr, weight_decay=r.weight_decay) for _, r, *_ in calls]
    assert points[:56] == transfer_grid().points
    assert points[56] == result.card["selected"]
    assert result.card["budget"] == "paper"
    assert result.card["grid"] == "7 learning rates x 8 weight decays"
    assert result.card["bn_momentum"] == bn_momentum(40_064)


@pytest.mark.parametrize("protocol", ["linear", "fine-tuning"])
def test_what_is_difficult_to_see_teaches_nothing(digits, protocol):
    data = several_answers(digits)
    def other(split): return replace(split, labels=split.labels | split.difficult.long())
    changed = replace(data, train=other(data.train), valid=other(data.valid))
    assert not torch.equal(changed.fit.labels, data.fit.labels)
    first, second = (PROTOCOLS[protocol](small_encoder(), d) for d in (data, changed))
    assert first.value == second.value and torch.equal(first.correct, second.correct)
    plain = replace(data, train=replace(changed.train, difficult=None),
                    valid=replace(changed.valid, difficult=None))
    assert PROTOCOLS[protocol](small_encoder(), plain).value != first.value


def test_the_optimiser_is_nesterov_momentum():
    opt = transfer.Recipe(10, 16, 0.1, 1e-3).create_optimizer([nn.Parameter(torch.ones(2, 2))])
    group = opt.param_groups[0]
    assert isinstance(opt, torch.optim.SGD) and group["nesterov"]
    assert (group["momentum"], group["weight_decay"], group["lr"]) == (0.9, 1e-3, 0.1)


# No choice sees the test set

class Poisoned(TransferSplit):
    "Test images whose labels are false until they are released."
    released = False

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if name not in ("labels", "difficult") or type(self).released or value is None: return value
        return torch.full_like(value, 1 if name == "difficult" else -999)


@pytest.mark.parametrize("several", [False, True], ids=["one label", "several"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_labels_of_test_images_are_read_at_the_end_alone(protocol, several, digits, monkeypatch,
                                                         tmp_path):
    data = several_answers(digits) if several else digits
    honest = PROTOCOLS[protocol](small_encoder(), data, folder=tmp_path / "honest")
    test = data.test
    poisoned = replace(data, test=Poisoned(test.images, test.labels, test.difficult))

    def release(*args):
        monkeypatch.setattr(Poisoned, "released", True)
        return transfer_result(*args)
    monkeypatch.setattr(transfer, "transfer_result", release)
    assert poisoned.test.labels.unique().tolist() == [-999]
    result = PROTOCOLS[protocol](small_encoder(), poisoned, folder=tmp_path / "poisoned")
    assert result.value == honest.value and torch.equal(result.correct, honest.correct)
    journals = [next((tmp_path / d).glob("*.jsonl")).read_text() for d in ("honest", "poisoned")]
    scores = [[json.loads(line).get("valid") for line in text.splitlines()] for text in journals]
    assert scores[0] == scores[1] and len(scores[0]) > 6


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shuffled_test_labels_change_the_result_and_nothing_else(protocol, digits):
    shuffled = TransferSplit(digits.test.images, digits.test.labels.roll(7))
    results = [PROTOCOLS[protocol](small_encoder(), d)
               for d in (digits, replace(digits, test=shuffled))]
    assert results[0].card["selected"] == results[1].card["selected"]
    assert not torch.equal(results[0].correct, results[1].correct)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_encoder_stays_bit_identical_and_so_does_the_random_state(protocol, digits):
    encoder = small_encoder().train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    state = torch.get_rng_state()
    PROTOCOLS[protocol](encoder, digits)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert encoder.training and torch.equal(torch.get_rng_state(), state)


def test_random_initialisation_takes_nothing_from_the_encoder(digits):
    a, b = (PROTOCOLS["random"](small_encoder(seed), digits) for seed in (0, 1))
    assert torch.equal(a.correct, b.correct) and a.card["random_init"] is True
    c, d = (PROTOCOLS["fine-tuning"](small_encoder(seed), digits) for seed in (0, 1))
    assert not torch.equal(c.correct, d.correct)


def test_a_training_that_diverges_is_not_chosen(digits, monkeypatch):
    train = transfer.train_classifier

    def diverge(encoder, split, n_classes, recipe, *args, **kwargs):
        if recipe.lr > 0.01: raise FloatingPointError("the loss is not finite")
        return train(encoder, split, n_classes, recipe, *args, **kwargs)
    monkeypatch.setattr(transfer, "train_classifier", diverge)
    assert PROTOCOLS["fine-tuning"](small_encoder(), digits).card["selected"]["lr"] == 0.003


# Kill and resume

@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_resumed_equals_uninterrupted(protocol, digits, tmp_path):
    whole = PROTOCOLS[protocol](small_encoder(), digits, folder=tmp_path / "whole")
    journal = next((tmp_path / "whole").glob("*.jsonl"))
    lines = journal.read_text().splitlines(keepends=True)
    for kept in (1, 3, len(lines) - 1, len(lines)):
        cut = tmp_path / f"cut{kept}"
        cut.mkdir()
        (cut / journal.name).write_text("".join(lines[:kept]))
        resumed = PROTOCOLS[protocol](small_encoder(), digits, folder=cut)
        assert torch.equal(resumed.correct, whole.correct) and torch.equal(resumed.y, whole.y)
        assert resumed.card["selected"] == whole.card["selected"]
        points = [[(e["point"], e["valid"]) for e in map(json.loads, path.read_text().splitlines())
                   if "point" in e] for path in (journal, cut / journal.name)]
        assert points[0] == points[1]


def tune_digits(folder: str):
    finetune_transfer(small_encoder(), some_digits(), TINY, 8, folder, progress=False)


def test_killed_by_the_system_and_called_again(digits, tmp_path):
    child = start(tmp_path / "log", tune_digits, str(tmp_path))
    journal, deadline = tmp_path / "digits-finetune.jsonl", time.monotonic() + 120
    while not (journal.is_file() and len(journal.read_text().splitlines()) > 2):
        assert child.is_alive() and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.001)
    child.kill()
    child.join(60)
    found = len(journal.read_text().splitlines())
    resumed = finetune_transfer(small_encoder(), digits, TINY, 8, tmp_path, progress=False)
    whole = finetune_transfer(small_encoder(), digits, TINY, 8, progress=False)
    assert found > 2 and torch.equal(resumed.correct, whole.correct)
    assert resumed.card["selected"] == whole.card["selected"]


CHANGES = {
    "size 8, now 16": dict(size=16),
    "seed 0, now 1": dict(seed=1),
    "steps 3, now 4": dict(budget=replace(TINY, steps=4)),
    "decays [0.0, 0.001], now [0.0]": dict(budget=replace(TINY, decays=(0.0,))),
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_journal_of_other_settings_is_refused(words, digits, tmp_path):
    how = dict(budget=TINY, size=8, seed=0)
    settings = dict(protocol="finetune", size=8, seed=0, **transfer.asdict(TINY))
    path = tmp_path / "digits-finetune.jsonl"
    encoder = small_encoder()
    Journal(path, transfer._settings(encoder, digits, **settings)).add(
        point=TINY.points[0], valid=0.5, seconds=1.0)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="begun with other settings") as error:
        finetune_transfer(encoder, digits, folder=tmp_path, progress=False, **how | CHANGES[words])
    assert words in str(error.value) and "another folder" in str(error.value)
    assert path.read_bytes() == before


def test_other_weights_labels_or_images_are_other_settings(digits, tmp_path):
    encoder = small_encoder()
    linear_transfer(encoder, digits, folder=tmp_path, **QUIET)
    swapped = replace(digits, train=digits.valid, valid=digits.train)
    relabelled = replace(digits, train=TransferSplit(digits.train.images,
                                                     digits.train.labels.roll(1)))
    for data, word in ((swapped, "images"), (relabelled, "images"), (digits, "encoder")):
        with pytest.raises(ValueError, match=f"{word} '"):
            linear_transfer(small_encoder(word == "encoder"), data, folder=tmp_path, **QUIET)
    with torch.no_grad(): next(encoder.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="encoder '"):
        linear_transfer(encoder, digits, folder=tmp_path, **QUIET)


def test_cached_features_are_those_of_the_encoder(digits, tmp_path):
    encoder, other = small_encoder(), small_encoder(1)
    transfer.transfer_features(encoder, digits, 8, tmp_path, progress=False)
    for network in (encoder, other):
        cached, fresh = (transfer.transfer_features(network, digits, 8, folder, progress=False)
                         for folder in (tmp_path, None))
        assert all(torch.equal(cached[part], fresh[part]) for part in fresh)


# Every data set

@pytest.mark.parametrize("name", [k for k in TRANSFER_DATASETS if k != "voc2007"])
def test_linear_transfer_solves_every_miniature(name, minis):
    data = load_transfer(name, minis[name])
    result = linear_transfer(Redness(), data, 8, progress=False)
    assert result.value == 1 and result.card["metric"] == TRANSFER_DATASETS[name].metric
    assert result.missing() == [] and result.card["data"]["complete"] is False
    assert torch.equal(result.y, data.test.labels)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_voc_has_twenty_answers(protocol, minis):
    data = load_transfer("voc2007", minis["voc2007"])
    result = PROTOCOLS[protocol](small_encoder(), data)
    assert (result.card["metric"], result.y.shape) == ("11-point mAP", (8, 20))
    assert result.y.dtype == torch.bool and result.correct.dtype == torch.float64
    assert 0 < result.value < 1 and result.missing() == []


def test_finetuning_from_files_does_not_depend_on_the_workers(minis):
    data = load_transfer("pets", minis["pets"])
    grid = Grid((0.03,), (0.0,), 3, 16, "one point")
    a, b = (finetune_transfer(small_encoder(), data, grid, 8, num_workers=n, progress=False)
            for n in (0, 2))
    assert torch.equal(a.correct, b.correct) and a.value == b.value
    assert a.missing() == [] and a.card["metric"] == "mean per class"


def test_finetuning_solves_a_miniature_and_chooses_what_learns(minis):
    data = load_transfer("pets", minis["pets"])
    grid = Grid((1e-6, 0.1), (0.0,), 100, 16, "two points")
    result = finetune_transfer(Redness(), data, grid, 8, progress=False)
    assert result.value == 1 and result.card["selected"]["lr"] == 0.1


# The table

def test_table_sets_ours_beside_the_papers(digits):
    encoder = small_encoder()
    data = replace(digits, name="cifar10", info=dict(data="CIFAR-10", complete=True))
    results = [linear_transfer(encoder, data, name=name, **QUIET) for name in ("one", "two")]
    results.append(finetune_transfer(encoder, data, TINY, name="one", **QUIET))
    lines = transfer_table(results, width=4).splitlines()
    assert lines[0] == ("| setting | data set | metric | one | two | paper, table 8: SimCLR | "
                        "paper, table 8: supervised | paper, table 8: random |")
    value = f"{100 * results[0].value:.1f}"
    assert lines[2] == (f"| linear | CIFAR-10 | top-1 | **{value}** | **{value}** | 95.3 | 95.7 |"
                        "  |")
    assert lines[3].endswith("|  | 98.6 | 98.3 | 96.0 |")
    html = transfer_table(results, html=True)
    assert html.count("<tr>") == 3 and html.count(f"<b>{value}</b>") == 2 and "90.6" in html
