"A score that cannot be anything else is refused, by every protocol, command and probe; half of one is a warning."
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from simclr_nb.cli import evaluate, pretrain
from simclr_nb.data import simclr_dls
from simclr_nb.evaluate.amdim import amdim_evaluation
from simclr_nb.evaluate.features import encoder_features
from simclr_nb.evaluate.frozen import knn_accuracy, linear_evaluation, logistic_accuracy
from simclr_nb.evaluate.tuning import finetune
from simclr_nb.images.arrays import ImageArrays
from simclr_nb.images.source import Source
from simclr_nb.learner import simclr_learner
from simclr_nb.model.encoder import create_encoder, save_encoder
from simclr_nb.transfer.datasets import TransferData, TransferSplit
from simclr_nb.transfer.transfer import finetune_transfer, linear_transfer
from simclr_nb.transfer.search import Grid

FLOWER = Image.fromarray(load_sample_images().images[1])
QUICK = dict(epochs=1, bs=16, progress=False)
NOTHING = "none of the 12 test images is of a class with a labelled training image"
ONE_CLASS = "training images are of one class"
SOME = "6 of 12 test images are of classes without a labelled training image: at most 50.0%"


def loaders(train: list[int], test: list[int]):
    "Random images with these labels."
    torch.manual_seed(0)
    parts = [ImageArrays(torch.randint(256, (len(y), 3, 8, 8), dtype=torch.uint8), torch.tensor(y))
             for y in (train, test)]
    classes = [str(c) for c in range(max(train + test) + 1)]
    return simclr_dls(Source("made up", *parts, classes), size=8, bs=16, num_workers=0)


def transfer(protocol, encoder, dls):
    "The same images as a transfer data set."
    train, test = (TransferSplit(loader.dataset.images, loader.dataset.labels) for loader in dls)
    data = TransferData("made up", dls.classes, train, train, test, "top-1")
    return protocol(encoder, data)


def tune_transfer(encoder, data):
    grid = Grid((0.01,), (0.0,), steps=1, bs=8)
    return finetune_transfer(encoder, data, grid, size=8, progress=False)


PROTOCOLS = {
    "k-NN": lambda e, dls: knn_accuracy(encoder_features(e, dls), k=3),
    "logistic": lambda e, dls: logistic_accuracy(encoder_features(e, dls), l2=(0.1, 1.0)),
    "linear": lambda e, dls: linear_evaluation(e, dls, **QUICK),
    "fine-tuning": lambda e, dls: finetune(e, dls, **QUICK),
    "AMDIM": lambda e, dls: amdim_evaluation(e, dls, **QUICK)["linear"],
    "transfer": lambda e, dls: transfer(
        lambda e, data: linear_transfer(e, data, size=8, l2=(0.1, 1.0), progress=False), e, dls),
    "transfer, fine-tuning": lambda e, dls: transfer(tune_transfer, e, dls),
}
EVERY = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create_encoder("resnet18", 0.125, "cifar", zero_init_last=False).eval()


@EVERY
def test_every_protocol_refuses_classes_that_were_never_shown(protocol, encoder):
    "It was 0.0% (0.0% to 24.3%)."
    with pytest.raises(ValueError, match=NOTHING):
        protocol(encoder, loaders([0, 1] * 12, [2, 3] * 6))


@EVERY
def test_every_protocol_refuses_a_single_class(protocol, encoder):
    "It was 50.0%, of every encoder."
    with pytest.raises(ValueError, match=f"{ONE_CLASS}|at least 2 classes"):
        protocol(encoder, loaders([0] * 24, [0, 1] * 6))


@EVERY
def test_every_protocol_warns_of_some_such_classes(protocol, encoder):
    with pytest.warns(UserWarning, match=re.escape(SOME)):
        result = protocol(encoder, loaders([0, 1, 2] * 8, [0, 3] * 6))
    assert result.value <= 0.5 and result.card["unanswerable"] == SOME.partition(":")[0]


@EVERY
def test_a_sound_split_is_not_mentioned(protocol, encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = protocol(encoder, loaders([0, 1] * 12, [0, 1] * 6))
    assert "unanswerable" not in result.card


def test_few_labels_show_few_classes(encoder):
    "The labels that are used count, and not those that are there."
    dls = loaders([0, 1, 2, 3] * 6, [0, 1, 2, 3] * 3)
    rows = torch.tensor([0, 1, 4, 5])  # of two classes
    for protocol in (linear_evaluation, finetune):
        with pytest.warns(UserWarning, match="6 of 12 test images"):
            protocol(encoder, dls, train_rows=rows, **QUICK)


def test_the_probes_are_not_a_number(encoder):
    "Both columns were 0.000000 in every epoch."
    learn = simclr_learner(loaders([0, 1] * 16, [2, 3] * 6), width=0.125)
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match="no accuracy of the probes"):
        learn.fit(1)
    names = learn.recorder.metric_names
    row = dict(zip(names[1:], learn.recorder.values[-1], strict=False))
    assert math.isnan(row["probe"]) and math.isnan(row["knn"])


@pytest.fixture(scope="module")
def one_each(tmp_path_factory) -> Path:
    "20 classes of one image: what is held out is of no class that stays."
    folder = tmp_path_factory.mktemp("data") / "one_each"
    for i in range(20):
        (folder / f"class_{i:02}").mkdir(parents=True)
        FLOWER.crop((9 * i, 5 * i, 9 * i + 40, 5 * i + 40)).save(folder / f"class_{i:02}/0.png")
    return folder


def test_the_command_refuses_before_it_computes(one_each, encoder, tmp_path, capsys):
    "It printed 0.0% (0.0% to 65.8%)."
    path = save_encoder(encoder, tmp_path / "e.safetensors")
    options = ["--data", str(one_each), "--size", "8", "--workers", "0", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end: evaluate([str(path), *options, "--protocol", "knn"])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not re.search(r"\d%\s*\(", out)
    assert "none of the 2 test images is of a class with a labelled training image" in err


def test_pretraining_goes_on_without_accuracies(one_each, tmp_path, capsys):
    "A measure that is impossible costs no run: the error comes before the run begins."
    options = ["--width", "0.125", "--epochs", "1", "--size", "8", "--bs", "8", "--workers", "0"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert pretrain([str(one_each), *options, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "no accuracies of this run: none of the 2 test images" in out
    assert json.loads((tmp_path / "run/results.json").read_text()) == {}
    assert (tmp_path / "run/report.html").is_file()
