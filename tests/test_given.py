"Data in every form that people have: same images, same order, same weights as from the folder they came from."
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor

from simclr_nb.cli import evaluate, pretrain
from simclr_nb.data import simclr_dls
from simclr_nb.images.find import find_source
from simclr_nb.images.tables import group_rows, table_source
from simclr_nb.learner import simclr_learner


def fill(folder: Path, side: int) -> Path:
    "30 pictures of three classes, each unlike the others."
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path: return fill(tmp_path_factory.mktemp("given") / "pictures", 16)


@pytest.fixture
def cache(tmp_path, monkeypatch): monkeypatch.setenv("SIMCLR_NB_CACHE", str(tmp_path / "cache"))


def frame_of(root: Path) -> pd.DataFrame:
    files = sorted(root.rglob("*.png"))
    return pd.DataFrame(dict(path=[str(f.relative_to(root)) for f in files],
                             label=[f.parent.name for f in files]))


def a_list(root: Path): return table_source(frame_of(root).sample(frac=1, random_state=0), root=root)


def a_csv(root: Path) -> Path:
    frame_of(root).sample(frac=1, random_state=1).to_csv(root / "all.csv", index=False)
    return root / "all.csv"


def a_tsv(root: Path) -> str:
    frame_of(root).rename(columns=dict(path="File_Name", label="Class")).to_csv(root / "all.tsv", sep="\t")
    return str(root / "all.tsv")


def a_parquet(root: Path) -> Path:
    pytest.importorskip("pyarrow")
    frame_of(root).to_parquet(root / "all.parquet")
    return root / "all.parquet"


def a_torch_dataset(root: Path): return ImageFolder(str(root))


class Tensors(torch.utils.data.Dataset):
    "uint8 tensors with their labels, of a folder."
    def __init__(self, root): self.images = ImageFolder(str(root))
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return pil_to_tensor(self.images[i][0]), self.images.classes[self.images[i][1]]


def a_hugging_face_dataset(root: Path):
    datasets = pytest.importorskip("datasets")
    frame = frame_of(root)
    names = sorted(set(frame["label"]))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    columns = dict(image=[str(root / path) for path in frame["path"]],
                   label=[names.index(label) for label in frame["label"]])
    return datasets.Dataset.from_dict(columns, features)


def some_arrays(root: Path):
    frame = frame_of(root)
    images = np.stack([np.array(Image.open(root / path)) for path in frame["path"]])
    return images, frame["label"].to_numpy()


def a_zip(root: Path) -> str:
    return shutil.make_archive(str(root.parent / "pictures"), "zip", root.parent, "pictures")


def a_home_path(root: Path) -> str: return f"~/{root.name}"


KINDS = [a_list, a_csv, a_tsv, a_parquet, a_torch_dataset, Tensors, a_hugging_face_dataset, some_arrays, a_zip,
         a_home_path]


def trained(data) -> tuple:
    "Loaders, and weights after one epoch, from one seed."
    dls = simclr_dls(data, 16, 9, seed=0, progress=False, device="cpu")
    torch.manual_seed(0)
    learn = simclr_learner(dls, width=0.0625, precision="fp32")
    with learn.no_bar(), learn.no_logging(): learn.pretrain(1)
    return dls, learn.model.state_dict()


@pytest.fixture(scope="module")
def from_folder(root) -> tuple: return trained(root)


@pytest.mark.parametrize("kind", KINDS)
def test_as_from_the_folder(kind, root, from_folder, cache, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    dls, weights = trained(kind(root))
    expected, expected_weights = from_folder
    for ours, theirs in zip(dls.loaders, expected.loaders, strict=True):
        assert torch.equal(ours.dataset.images, theirs.dataset.images)
        assert torch.equal(ours.dataset.labels, theirs.dataset.labels)
    assert dls.classes == expected.classes == ["ant", "bee", "cat"]
    assert all(torch.equal(weights[k], expected_weights[k]) for k in weights)


@pytest.mark.parametrize("kind", [a_csv, a_torch_dataset, a_hugging_face_dataset])
def test_photographs_in_workers(kind, tmp_path, cache):
    "Images too large for memory: the same crops, from files in memory as from files on disk."
    root = fill(tmp_path / "photos", 140)
    options = dict(size=32, bs=9, seed=0, num_workers=1, progress=False, device="cpu")
    ours, theirs = (simclr_dls(data, **options) for data in (kind(root), root))
    torch.manual_seed(1)
    batches = list(ours.train)
    torch.manual_seed(1)
    for (x, y), (x2, y2) in zip(batches, theirs.train, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_groups_are_never_split():
    rng = np.random.default_rng(0)
    for _ in range(100):
        groups = rng.integers(0, rng.integers(2, 30), rng.integers(10, 200)).tolist()
        if len(set(groups)) < 2: continue
        held = set(group_rows(groups, 0.1))
        inside = {group for row, group in enumerate(groups) if row in held}
        outside = {group for row, group in enumerate(groups) if row not in held}
        assert inside and outside and not inside & outside
    with pytest.raises(ValueError, match="all rows are of one group"): group_rows(["a"] * 5, 0.5)


def test_a_table_through_the_command(root, tmp_path, capsys):
    "The layout that was understood is printed; a run resumes with the same table, and not with another."
    table = a_csv(root)
    options = [str(table), "--epochs", "1", "--bs", "9", "--width", "0.0625", "--precision", "fp32",
               "--out", str(tmp_path / "run")]
    assert pretrain(options) == 0
    assert "all: 27 training and 3 validation images" in capsys.readouterr().out
    frame_of(root).iloc[:-1].to_csv(table, index=False)
    with pytest.raises(SystemExit) as stop: pretrain([*options, "--resume", "--epochs", "2"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("images" in error or "n_train" in error), error


@pytest.mark.parametrize("name, content, said", [
    ("a.csv", b"", "cannot read table"), ("a.csv", b"\xff\xfe\x00", "cannot read table"),
    ("a.csv", b'path\n"a', "cannot read table"), ("a.parquet", b"PAR1", "cannot read table"),
    ("a.csv", b"path\n\n,\n", "do not exist|has no path|cannot read"), ("a.csv", b"name\nx.png\n", "no column for paths"),
    ("a.zip", b"PK\x05\x06", "cannot unpack"), ("a.zip", b"", "cannot unpack")])
def test_damaged_tables_and_zips(name, content, said, tmp_path, cache, capsys):
    "One line that names the file."
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stop: pretrain([str(tmp_path / name), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert any(part in error for part in said.split("|")) and name[:1] in error, error


def test_a_zip_cannot_lead_outside(tmp_path, cache):
    import zipfile

    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for name in ("../../out.png", "/abs.png", "in/a.png"): archive.writestr(name, b"x")
    source = find_source(tmp_path / "bad.zip")
    assert len(source.train) + len(source.valid) == 3
    inside = Path(os.environ["SIMCLR_NB_CACHE"])
    assert all(inside in file.parents for file in [*source.train, *source.valid])


def test_stray_objects_are_refused():
    for data in (3, None, object()):
        with pytest.raises(ValueError, match="expected a folder, files, a table"): simclr_dls(data)


# Several labels for an image

def tagged_frame(root: Path) -> pd.DataFrame:
    "The pictures of `root`, each with none, one or two of two labels."
    frame = frame_of(root)
    tags = [["even"] * (i % 2 == 0) + ["third"] * (i % 3 == 0) for i in range(len(frame))]
    return frame.assign(label=tags)


def as_text(tags: list[str]) -> str: return ";".join(tags) + ";" * (len(tags) < 2)


def test_several_labels_through_the_command(root, tmp_path, call, monkeypatch):
    "Pretraining works, without probe and k-NN; the card keeps the labels; the next step is named."
    monkeypatch.chdir(tmp_path)
    frame = tagged_frame(root)
    frame["path"] = [str(root / name) for name in frame["path"]]
    text = frame.assign(label=[as_text(tags) for tags in frame["label"]])
    text.to_csv("tags.csv", index=False)
    argv = "--epochs 1 --width 0.0625 --bs 8 --size 16 --workers 0 --out run".split()
    code, out, err = call(pretrain, "tags.csv", *argv)
    assert code == 0, err
    assert "2 labels of its rows, several for an image\n" in out
    assert out.count("several labels for an image: no probe and no k-NN; simclr-evaluate --save fits") == 1
    history = pd.read_csv("run/history.csv")
    assert list(history) == ["epoch", "train_loss", "valid_loss", "contrastive_top1", "time"]
    assert np.isfinite(history["train_loss"][0]) and json.loads(Path("run/results.json").read_text()) == {}
    assert "simclr-evaluate run/encoder.safetensors --data tags.csv --save" in Path("run/report.html").read_text()
    info = json.loads(Path("run/config.json").read_text())["data"]
    dls = simclr_dls("tags.csv", progress=False, device="cpu")
    tags = dict(zip(frame["path"], frame["label"], strict=True))
    train = [tags[str(path)] for path in dls.train.dataset.paths]
    assert info["labels"] == {label: sum(label in names for names in train) for label in ("even", "third")}

    for protocol in ("knn", "logistic", "linear", "finetune"):
        code, _, err = call(evaluate, "run/encoder.safetensors", "--data", "tags.csv", "--protocol", protocol,
                            "--size", "16", "--workers", "0", "--out", f"of-{protocol}")
        assert code == 2 and "fit_classifier (--save) scores them" in err, err


@pytest.mark.parametrize("kind", ["text", "lists", "parquet", "arrays"])
def test_cells_with_several_labels(kind, root, tmp_path, capsys):
    "Text with semicolons and lists are read alike, and pretraining sees the images of the folder."
    frame = tagged_frame(root)
    plain = frame.assign(label=[as_text(tags) for tags in frame["label"]])
    if kind == "text": frame = plain
    if kind == "arrays": frame["label"] = [np.array(tags, object) for tags in frame["label"]]
    table = table_source(frame, root=root, name="tags")
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet(tmp_path / "tags.parquet")
        table = table_source(tmp_path / "tags.parquet", root=root)
    expected = table_source(plain, root=root, name="tags")
    assert (table.classes, table.found) == (expected.classes, expected.found)
    assert list(table.train) == list(expected.train) and list(table.valid) == list(expected.valid)
    assert table.labels(table.train) == expected.labels(expected.train)
    dls = simclr_dls(table, bs=8, seed=0, device="cpu", num_workers=0, progress=False)
    assert dls.classes == [] and set(dls.label_sets) == {"even;", "third;", "even;third", ";"}
    learn = simclr_learner(dls, width=0.0625)
    with learn.no_bar(), learn.no_logging(): learn.pretrain(1)
    assert list(learn.history()) == ["train_loss", "valid_loss", "contrastive_top1"]
