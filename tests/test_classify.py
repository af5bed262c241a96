"From a table of labels to a saved classifier to answers for new images, by the commands and from Python."
import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, classification_report, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from simclr_nb.cli import evaluate, predict
from simclr_nb.data import clean_loader, simclr_dls
from simclr_nb.evaluate import image_classifier, readout
from simclr_nb.evaluate.image_classifier import fit_classifier
from simclr_nb.evaluate.prediction import load_classifier, save_classifier
from simclr_nb.evaluate.prediction import predict as predict_images
from simclr_nb.measure.representations import represent
from simclr_nb.model.encoder import create_encoder, load_encoder, save_encoder

SIDE = 16


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An encoder, 240 digits as files, and a table with their class, their labels, patient and split."
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    encoder = create_encoder("resnet18", 0.125, "cifar", zero_init_last=False)
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    (tmp_path / "photos").mkdir()
    digits = load_digits()
    rows = []
    for i in range(240):
        pixels = (digits.images[i] * 255 / 16).round().astype(np.uint8)
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(tmp_path / f"photos/{i:03}.png")
        digit = int(digits.target[i])
        names = ["even"] * (digit % 2 == 0) + ["loop"] * (digit in (0, 6, 8, 9))
        rows.append(dict(path=f"photos/{i:03}.png", digit=digit, label="low" if digit < 5 else "high",
                         labels=";".join(names) or ";", patient=f"p{i // 6}",
                         split="test" if i % 4 == 0 else "train"))
    table = pd.DataFrame(rows)
    table.drop(columns=["labels", "digit", "patient"]).to_csv("labels.csv", index=False)
    several = table.drop(columns=["label", "digit", "split"]).rename(columns=dict(labels="label"))
    several.to_csv("several.csv", index=False)
    return tmp_path, table


def test_from_a_table_to_answers(folder, call):
    path, table = folder
    options = ["--data", "labels.csv", "--size", str(SIDE), "--out", "run", "--workers", "0"]
    code, out, err = call(evaluate, "encoder.safetensors", *options, "--save", "digits.safetensors")
    assert code == 0, err
    assert "classifier: digits.safetensors" in out
    code, out, err = call(predict, "digits.safetensors", "photos", "--every-class")
    assert code == 0, err
    assert "240 images: predictions.csv" in out
    answers = pd.read_csv("predictions.csv")
    assert answers["name"].tolist() == [f"{i:03}.png" for i in range(240)]

    # the reported accuracy is that of these answers on the test images of the table
    saved = load_classifier("digits.safetensors").result
    test = table["split"] == "test"
    right = answers["class"][test] == table["label"][test]
    assert saved.value == pytest.approx(right.mean()) and saved.card["n_test"] == 60
    theirs = classification_report(table["label"][test], answers["class"][test], output_dict=True)
    for row in saved.card["per_class"]:
        for ours, name in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert row[ours] == pytest.approx(theirs[row["class"]][name])
    assert (answers[["p: high", "p: low"]].sum(axis=1) - 1).abs().max() < 1e-4


def test_the_probabilities_are_scikit_learns_with_a_temperature(folder):
    path, table = folder
    encoder = load_encoder("encoder.safetensors")
    dls = simclr_dls("labels.csv", size=SIDE, progress=False, device="cpu")
    classifier = fit_classifier(encoder, dls, l2=[3.0])
    (h, y), (h_test, _) = (represent(encoder, clean_loader(dls, i)) for i in (0, 1))
    # one penalty for the weights of both classes is half of that for their difference
    logistic = LogisticRegression(C=2 / 3.0, max_iter=5000, tol=1e-8)
    theirs = make_pipeline(StandardScaler(), logistic)
    logit = theirs.fit(h.double(), y).decision_function(h_test.double())
    expected = 1 / (1 + np.exp(-logit / classifier.readout.temperature))
    ours = classifier.readout.probabilities(h_test)[:, 1].numpy()
    assert abs(ours - expected).max() < 2e-3


def test_several_labels_and_whole_groups(folder, call, monkeypatch):
    path, table = folder
    seen = []
    original = readout.held_out_parts
    monkeypatch.setattr(readout, "held_out_parts",
                        lambda y, groups, *a: seen.append(groups) or original(y, groups, *a))
    code, _, err = call(evaluate, "encoder.safetensors", "--data", "several.csv", "--size", str(SIDE),
                        "--out", "run", "--workers", "0", "--save", "labels.safetensors")
    assert code == 0, err
    classifier = load_classifier("labels.safetensors")
    assert classifier.classes == ["even", "loop"]
    test = simclr_dls("several.csv", size=SIDE, progress=False, device="cpu").valid.dataset
    names = [p.name for p in test.paths]
    patients = dict(zip(table["path"].str[7:], table["patient"], strict=True))
    held = {patients[name] for name in names}
    assert len(seen[0]) == 240 - len(names) and not held & set(seen[0])

    truth = {row.path[7:]: [label in row.labels.split(";") for label in classifier.classes]
             for row in table.itertuples()}
    answers = {a.name: a for a in predict_images(classifier, "photos")}
    y = np.array([truth[name] for name in names])
    p = np.array([list(answers[name].every.values()) for name in names])
    called = np.array([[c in answers[name].labels for c in classifier.classes] for name in names])
    card = classifier.result.card
    assert classifier.result.value == pytest.approx(average_precision_score(y, p), abs=1e-4)
    assert card["macro_f1"][0] == pytest.approx(f1_score(y, called, average="macro"))
    assert card["micro_f1"][0] == pytest.approx(f1_score(y, called, average="micro"))
    code, _, err = call(predict, "labels.safetensors", "photos", "--out", "several_out.csv")
    assert code == 0, err
    rows = list(csv.DictReader(open("several_out.csv")))
    assert [row["class"] for row in rows] == [";".join(answers[row["name"]].labels) for row in rows]


def test_the_test_images_choose_nothing(folder, monkeypatch):
    "The readout is the same whatever the test images and their labels are."
    path, table = folder
    first = fit_classifier("encoder.safetensors", "labels.csv", size=SIDE)
    labels = pd.read_csv("labels.csv")
    test = labels["split"] == "test"
    labels.loc[test, "label"] = labels["label"][test].sample(frac=1, random_state=0).tolist()
    labels.to_csv("shuffled.csv", index=False)
    second = fit_classifier("encoder.safetensors", "shuffled.csv", size=SIDE)
    assert torch.equal(first.readout.weight, second.readout.weight)
    assert first.readout.temperature == second.readout.temperature
    assert first.result.value > second.result.value + 0.1


def test_the_encoder_stays_as_it_is(folder):
    encoder = load_encoder("encoder.safetensors")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    fit_classifier(encoder, "labels.csv", size=SIDE)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_damaged_and_missing_images(folder, call):
    path, table = folder
    call(evaluate, "encoder.safetensors", "--data", "labels.csv", "--size", str(SIDE), "--out", "run",
         "--workers", "0", "--save", "digits.safetensors")
    (path / "photos/100a.png").write_bytes((path / "photos/100.png").read_bytes()[:60])
    code, out, err = call(predict, "digits.safetensors", "photos")
    assert code == 0 and "1 of them could not be read" in out, err
    rows = list(csv.DictReader(open("predictions.csv")))
    assert [row["name"] for row in rows if row["problem"]] == ["100a.png"]
    assert rows[101]["class"] == "" and rows[102]["class"]
    before = (path / "predictions.csv").read_bytes()
    for argv, message in {("digits.safetensors", "photos/100a.png"): "none of the 1 images",
                          ("digits.safetensors", "gone.png"): "no image file or folder gone.png",
                          ("encoder.safetensors", "photos"): "no classifier",
                          ("labels.csv", "photos"): "damaged or no safetensors",
                          ("gone.safetensors", "photos"): "no classifier file"}.items():
        code, _, err = call(predict, *argv)
        assert (code, err.count("\n")) == (2, 1) and message in err, err
        assert (path / "predictions.csv").read_bytes() == before


def test_nothing_in_the_file_can_run(folder, call):
    "The file is safetensors with JSON; it holds the encoder too, and goes on to be used as one."
    call(evaluate, "encoder.safetensors", "--data", "labels.csv", "--size", str(SIDE), "--out", "run",
         "--workers", "0", "--save", "digits.safetensors")
    with safe_open("digits.safetensors", "pt") as file: header = file.metadata()
    facts = json.loads(header["simclr_nb"])["metadata"]["classifier"]
    assert facts["classes"] == ["high", "low"] and facts["reading"]["size"] == SIDE
    ours, theirs = (load_encoder(name).state_dict() for name in ("digits.safetensors",
                                                                 "encoder.safetensors"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_bounded_memory(folder, monkeypatch):
    "When the first answer comes, no more than two batches have been read."
    fitted = fit_classifier("encoder.safetensors", "labels.csv", size=SIDE)
    read = []
    original = image_classifier.Reading.__call__
    monkeypatch.setattr(image_classifier.Reading, "__call__",
                        lambda self, path: read.append(path) or original(self, path))
    answers = predict_images(fitted, "photos", bs=10)
    next(answers)
    assert len(read) <= 20
    assert len(list(answers)) == 239 and len(read) == 240


@pytest.mark.parametrize("bs", [1, 7, 500])
def test_batches_change_nothing(folder, bs):
    fitted = fit_classifier("encoder.safetensors", "labels.csv", size=SIDE)
    one, other = (list(predict_images(fitted, "photos", bs=n)) for n in (64, bs))
    for a, b in zip(one, other, strict=True):
        assert a.name == b.name
        assert list(a.every.values()) == pytest.approx(list(b.every.values()), abs=1e-4)


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "frame"])
def test_a_table_is_predicted_in_its_order(folder, call, kind):
    "Paths in the order of the table, as they stand there; the answers are those for the folder."
    path, table = folder
    fitted = fit_classifier("encoder.safetensors", "labels.csv", size=SIDE)
    save_classifier(fitted, "digits.safetensors")
    expected = {f"photos/{a.name}": a for a in predict_images(fitted, "photos")}
    some = table[["path", "patient"]].sample(50, random_state=1).rename(columns=dict(path="File_Name"))
    (path / "photos/000.png").write_bytes(b"damaged")
    some = pd.concat([some[some["File_Name"] != "photos/000.png"],
                      pd.DataFrame(dict(File_Name=["photos/000.png"]))])
    if kind == "frame": answers = list(predict_images(fitted, some))
    else:
        if kind == "parquet": pytest.importorskip("pyarrow")
        writer = dict(csv=some.to_csv, tsv=lambda name: some.to_csv(name, sep="\t"), parquet=some.to_parquet)[kind]
        writer(f"new.{kind}")
        code, out, err = call(predict, "digits.safetensors", f"new.{kind}", "--out", "answers.csv")
        assert code == 0 and f"{len(some)} images: answers.csv" in out and "1 of them could not" in out, err
        rows = list(csv.DictReader(open("answers.csv")))
        assert [row["name"] for row in rows] == some["File_Name"].tolist()
        sound = [row for row in rows if not row["problem"]]
        assert len(sound) == len(some) - 1 and rows[-1]["problem"]
        for row in sound:
            assert row["class"] == expected[row["name"]].labels[0]
            assert float(row["probability"]) == pytest.approx(expected[row["name"]].probabilities[0], abs=1e-4)
        answers = list(predict_images(fitted, [f"new.{kind}", "photos/001.png"]))[:-1]
    assert [a.name for a in answers] == some["File_Name"].tolist()
    assert [a.labels for a in answers[:-1]] == [expected[a.name].labels for a in answers[:-1]]


def test_tables_that_cannot_be_predicted(folder, call):
    path, table = folder
    save_classifier(fit_classifier("encoder.safetensors", "labels.csv", size=SIDE), "digits.safetensors")
    table.rename(columns=dict(path="where"))[["where"]].to_csv("nameless.csv", index=False)
    table.assign(path="photos/gone.png").to_csv("missing.csv", index=False)
    table.head(0).to_csv("empty.csv", index=False)
    before = (path / "labels.csv").read_bytes()
    for argv, words in {("nameless.csv",): "nameless has no column for paths: it has where",
                        ("missing.csv",): "240 of 240 files of missing do not exist",
                        ("empty.csv",): "expected at least 1 image", ("gone.csv",): "no such table: gone.csv",
                        ("labels.csv", "--out", "labels.csv"): "labels.csv is among the images"}.items():
        code, _, err = call(predict, "digits.safetensors", *argv)
        assert (code, err.count("\n")) == (2, 1) and words in err, err
    assert (path / "labels.csv").read_bytes() == before and not (path / "predictions.csv").exists()
