"Layouts that folders have, names that files have: what is understood, said, left out or refused."
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_nb.data import simclr_dls
from simclr_nb.images.labels import match_list, save_label_list
from simclr_nb.images.listing import index_images
from simclr_nb.images.pack import write_shards
from simclr_nb.images.shards import open_shards
from simclr_nb.images.source import is_built_in
from simclr_nb.images.find import find_source

HOSTILE = "a\n\x1b[31mred\x07\u202egpj"  # hides what stands before it, colours, rings, turns round


def fill(root: Path, *places: str, n: int = 4) -> Path:
    "Images of 16 pixels in each place; those of a class have its colour."
    for k, place in enumerate(places):
        (root / place).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            pixels = np.full((16, 16, 3), 20 * k + i, np.uint8)
            Image.fromarray(pixels).save(root / place / f"{i}.png")
    return root


def load(folder, **options):
    return simclr_dls(folder, bs=2, seed=0, device="cpu", num_workers=0, **options)


def by_class(folder) -> dict[str, int]:
    "Images of each class, of both sets, as loaded."
    dls = load(folder)
    labels = torch.cat([dls.train.dataset.labels, dls.valid.dataset.labels])
    return {name: (labels == i).sum().item() for i, name in enumerate(dls.classes)}


# Classes

@pytest.mark.parametrize("places, expected", [
    (["cat/2020", "cat/2021", "dog/2020", "dog/2021"], dict(cat=8, dog=8)),
    (["cat/images", "dog/images"], dict(cat=4, dog=4)),
    (["cat", "dog/old/er"], dict(cat=4, dog=4)),  # one class flat, one nested
    (["cat", "cat/more", "dog"], dict(cat=8, dog=4)),
    (["archive/images/cat", "archive/images/dog/1"], dict(cat=4, dog=4)),
    (["train/x/cat/1", "train/x/dog/1"], dict(cat=4, dog=4)),
    (["only"], {}),
])
def test_classes_are_the_first_level_with_several_folders(tmp_path, places, expected):
    assert by_class(fill(tmp_path / "data", *places)) == expected


def test_a_folder_without_images_is_no_class(tmp_path):
    (fill(tmp_path / "data", "cat", "dog") / "emu" / "old").mkdir(parents=True)
    assert find_source(tmp_path / "data").classes == ["cat", "dog"]


def test_nested_classes_survive_damaged_files(tmp_path):
    "Lists of the files that are left know their classes, also those that move to the other set."
    root = fill(tmp_path / "data", "train/cat/1", "train/dog/1", "test/cat/1", "test/dog/1")
    for path in [*(root / "test").rglob("*.png")][1:]: path.write_bytes(b"")
    dls = load(root, skip_bad=True)
    assert len(dls.valid.dataset) == 2 and len(dls.train.dataset) == 7
    labels = torch.cat([dls.train.dataset.labels, dls.valid.dataset.labels])
    assert labels.min() == 0
    colours = torch.cat([d.dataset.images[:, 0, 0, 0] for d in dls])
    assert torch.equal(labels, (colours // 20) % 2)


@pytest.mark.parametrize("places, words", [
    (["cat", "dog", "more/cat"], ["no clear level", "cat", "more/cat"]),
    (["cat/train", "cat/test", "dog/train"], ["cat/test", "inside of a class"]),
    (["test", "control"], ["test", "control", "none to train on"]),
    (["test"], ["test", "none to train on"]),
    (["train/cat", "train/dog", "val/cat", "valid/cat"], ["val", "valid", "two folders"]),
    (["train/cat", "train/dog", "Train/cat", "test/cat"], ["train", "Train", "two folders"]),
    (["train/cat", "train/dog", "extra"], ["train", "extra"]),
    (["train/cat", "train/dog", "test/emu", "test/cat"], ["emu", "no training images"]),
])
def test_two_meanings_are_refused(tmp_path, places, words):
    with pytest.raises(ValueError) as caught: find_source(fill(tmp_path / "data", *places))
    for word in words: assert word in str(caught.value)
    assert str(caught.value).count("\n") == 0


# Parts

@pytest.mark.parametrize("train, test", [
    ("train", "test"), ("Train", "Test"), ("Training", "Testing"), ("TRAIN", "Val"),
    ("training", "dev"), ("archive/train", "archive/validation")])
def test_parts_by_common_names(tmp_path, train, test):
    places = [f"{part}/{name}" for part in (train, test) for name in ("cat", "dog")]
    source = find_source(fill(tmp_path / "data", *places))
    assert source.classes == ["cat", "dog"]
    assert {p.parents[1] for p in source.train} == {tmp_path / "data" / train}
    assert {p.parents[1] for p in source.valid} == {tmp_path / "data" / test}
    assert source.split == f"{Path(test).name} folder"


def test_a_test_folder_validates_only_where_nothing_else_does(tmp_path):
    root = fill(tmp_path / "data", "train/cat", "train/dog", "Test/cat", "Test/dog")
    assert "Test validates, as no folder is named for that" in find_source(root).found
    source = find_source(fill(root, "val/cat", "val/dog"))
    assert {p.parents[1].name for p in source.valid} == {"val"}
    assert f"8 images of {root / 'Test'} (never trained on)" in source.found


def test_test_images_without_labels_are_left_out(tmp_path):
    source = find_source(fill(tmp_path / "data", "train/cat", "train/dog", "test"))
    assert source.classes == ["cat", "dog"] and len(source.train) + len(source.valid) == 8
    assert "4 images of" in source.found and "in no class folder" in source.found


def test_an_empty_part_is_refused(tmp_path):
    (fill(tmp_path / "data", "train/cat", "train/dog") / "val").mkdir()
    with pytest.raises(ValueError, match="no image in .*val"): find_source(tmp_path / "data")


# What is left out, and said

def test_one_line_says_what_was_understood(tmp_path, capsys):
    root = fill(tmp_path / "data", "cat/a", "dog/b")
    Image.new("RGB", (16, 16)).save(root / "preview.jpg")
    for name in ("1.heic", "2.HEIC", "notes.txt", "README"): (root / "cat" / name).touch()
    os.mkfifo(root / "dog/pipe.jpg")
    dls = load(root)
    out = capsys.readouterr().out
    for words in ("data: 6 training and 2 validation images", "2 classes (cat, dog)", str(root),
                  "each with its sub-folders", "2 images held out", "1 image outside", "preview.jpg",
                  "2 .heic", "1 .txt", "1 without", "1 special file"):
        assert words in out
    assert out.count("\n") == 1 and dls.classes == ["cat", "dog"]
    load(root, progress=False)
    assert capsys.readouterr().out == ""


def test_most_images_beside_the_folders_have_no_labels(tmp_path):
    source = find_source(fill(fill(tmp_path / "data", ".", n=20), "best", "old"))
    assert source.classes == [] and len(source.train) + len(source.valid) == 28
    assert "no labels (most images are not in the folders of" in source.found


def test_what_is_left_out_is_known_from_the_cache(tmp_path, monkeypatch):
    from simclr_nb.images import listing
    monkeypatch.setattr(listing, "_RACY", 0)
    (fill(tmp_path / "data", "cat") / "a.heic").touch()
    first, second = (index_images(tmp_path / "data", 0, tmp_path / "cache") for _ in range(2))
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    assert first.left_out == second.left_out == {".heic": 1}


def test_a_folder_wins_over_a_built_in_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    assert is_built_in("digits") and len(find_source("digits").train) == 1347
    assert "built-in data set" in find_source("digits").found
    dls = load(fill(Path("digits"), "cat", "dog") and "digits")
    assert not is_built_in("digits") and dls.info["n_train"] == 6
    assert dls.policy.name == "cifar"  # not that of the built-in digits
    assert "not the built-in data set digits" in capsys.readouterr().out


def test_a_tar_file_beside_images_is_no_data_set(tmp_path):
    root = fill(tmp_path / "data", "cat", "dog")
    subprocess.run(["tar", "cf", root / "backup.tar", "-C", root, "cat"], check=True)
    source = find_source(root)
    assert source.classes == ["cat", "dog"] and "1 .tar" in source.found
    assert len(open_shards(f"{root}/*.tar", cache=tmp_path)) == 4  # asked for by name


def test_shards_keep_nested_classes(tmp_path):
    root = fill(tmp_path / "data", "cat/2020", "dog/2020")
    write_shards(root, tmp_path / "out", progress=False)
    source = find_source(tmp_path / "out")
    assert source.classes == ["cat", "dog"] and "2 classes from 1 shard" in source.found
    assert sorted(source.labels(source.train)) == [0, 0, 0, 1, 1, 1]


def test_label_lists_of_nested_classes(tmp_path):
    root = fill(tmp_path / "data", "cat/2020", "dog/2020")
    train = find_source(root).train
    path = save_label_list(train[[0, 1]], tmp_path / "list.txt")
    assert {line[:4] for line in path.read_text().splitlines()} == {"cat_", "dog_"}
    assert match_list(path.read_text().split(), train).tolist() == [0, 1]


COMMAND = "from simclr_nb.cli import pretrain; raise SystemExit(pretrain())"


def test_the_command_understands_a_messy_folder(tmp_path):
    "In a fresh process: nested classes, a stray image, a tar file, a pipe, a photo of a telephone."
    root = fill(tmp_path / "data", "cat/2020", "cat/2021", "dog/2020", "dog/2021")
    Image.new("RGB", (16, 16)).save(root / "preview.jpg")
    (root / "cat" / "phone.heic").touch()
    subprocess.run(["tar", "cf", root / "backup.tar", "-C", root, "cat"], check=True)
    os.mkfifo(root / "dog" / "pipe.jpg")
    options = "--width 0.125 --epochs 1 --size 16 --workers 0 --out run".split()
    done = subprocess.run([sys.executable, "-c", COMMAND, "data", *options], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    line, = (line for line in done.stdout.splitlines() if line.startswith("data: "))
    for words in ("2 classes (cat, dog)", "1 image outside", "1 .tar", "1 .heic", "1 special file"):
        assert words in line
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert set(results["k-NN"]) == {"pixels", "random", "pretrained"}


# Files that are no files

def within(seconds: float, f):
    "Result of a call that may block for ever."
    result = []
    thread = threading.Thread(target=lambda: result.append(f()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, f"no answer within {seconds} s"
    return result[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("name", ["zz.jpg", "a.tar", "manifest.json"])
def test_a_pipe_blocks_nothing(tmp_path, name):
    root = fill(tmp_path / "data", "cat", "dog")
    os.mkfifo(root / name)
    os.mkfifo(root / "cat" / "zz.jpg")
    assert len(within(20, lambda: load(root)).train.dataset) == 6
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / name)
    with pytest.raises((ValueError, FileNotFoundError), match="pipes"):
        raise within(20, lambda: refusal(tmp_path / "pipes"))


def refusal(folder) -> Exception | None:
    try: find_source(folder)
    except (ValueError, FileNotFoundError) as error: return error


def test_links_to_nothing_and_to_themselves(tmp_path):
    root = fill(tmp_path / "data", "cat", "dog")
    (root / "cat/gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (root / "dog/self.jpg").symlink_to(root / "dog/self.jpg")
    source = find_source(root)
    assert len(source.train) + len(source.valid) == 8 and "2 special files" in source.found


def test_folders_1200_deep(tmp_path):
    deep = os.open(fill(tmp_path / "data", "cat", "dog"), os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=deep)
        below = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    assert find_source(tmp_path / "data").classes == ["cat", "dog"]
    subprocess.run(["rm", "-rf", tmp_path / "data"], check=True)  # too deep for shutil


# Names that hide a message

def shown(text: str) -> bool: return text.isprintable()


def test_hostile_names_are_quoted(tmp_path, capsys):
    root = fill(tmp_path / HOSTILE, "cat" + HOSTILE, "dog" + HOSTILE)
    for suffix in (f".{HOSTILE}", ".txt"): (root / f"x{suffix}").touch()
    Image.new("RGB", (16, 16)).save(root / f"{HOSTILE}.png")
    dls = load(root)
    out = capsys.readouterr().out
    assert shown(out.rstrip("\n")) and shown(dls.info["data"]) and all(map(shown, dls.classes))
    (root / f"{HOSTILE}.png").rename(root / ("cat" + HOSTILE) / "bad.png")
    (root / ("cat" + HOSTILE) / "bad.png").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot read image '") as caught: load(root)
    assert shown(str(caught.value))
    skipped = load(root, skip_bad=True).info["skipped"]
    assert len(skipped) == 1 and shown(skipped[0])


def refusals(folder: Path):
    "Calls that are refused, with the hostile name of a folder or file in the message."
    for name in ("empty", "texts", "test", "shards"): (folder / name).mkdir(parents=True)
    (folder / "texts" / f"{HOSTILE}.txt").touch()
    fill(folder / "test", "test")
    (folder / "shards" / f"{HOSTILE}.tar").write_bytes(b"no tar")
    (folder / "list.txt").write_bytes(b"\xff")
    (folder / "bad.jpg").write_bytes(b"")
    from simclr_nb.images.arrays import load_arrays
    from simclr_nb.images.files import read_pixels
    from simclr_nb.images.labels import load_label_list
    from simclr_nb.images.pack import verify_shards
    from simclr_nb.images.pixels import read_image
    yield from (lambda name=name: find_source(folder / name)
                for name in ("none", "empty", "texts", "test", "shards"))
    yield lambda: open_shards(folder / "none.tar")
    yield lambda: open_shards(f"{folder}-{{0..1}}.tar")
    yield lambda: load_label_list(folder / "list.txt")
    yield lambda: load_label_list(folder / "none.txt")
    yield lambda: read_image(folder / "bad.jpg")
    yield lambda: read_pixels(folder / "bad.jpg")
    yield lambda: load_arrays([folder / "bad.jpg"], [0], False)
    yield lambda: verify_shards(folder)
    yield lambda: write_shards(folder / "bad.jpg", folder / "out")
    yield lambda: match_list(["a_1.png"], [f"{folder}/a/1.png", f"{folder}/a/1.png"])


def test_every_refusal_can_be_printed(tmp_path):
    calls = list(refusals(tmp_path / HOSTILE))
    for call in calls:
        with pytest.raises((ValueError, FileNotFoundError)) as caught: call()
        assert shown(str(caught.value)), caught.value


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such name")
def test_names_that_are_no_utf8(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9")
    dls = load(fill(tmp_path / name, f"a{name}", f"b{name}"))
    assert len(dls.classes) == 2 and all(c.encode() for c in [*dls.classes, dls.info["data"]])
    assert capsys.readouterr().out.encode()
