"`simclr-pretrain`: what it refuses, what it converts, what it leaves behind."
import base64
import csv
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from simclr_nb.cli import pretrain
from simclr_nb.images.source import folder_source
from simclr_nb.model.encoder import load_encoder

TINY = ["--width", "0.125", "--epochs", "1", "--size", "16", "--workers", "1"]
SCRIPT = shutil.which("simclr-pretrain", path=str(Path(sys.executable).parent))
CODE = "from simclr_nb.cli import pretrain; raise SystemExit(pretrain())"
COMMAND = [SCRIPT] if SCRIPT else [sys.executable, "-c", CODE]
FLOWER = Image.fromarray(load_sample_images().images[1])
CAPTURE = dict(capture_output=True, text=True, timeout=120)
ROTATED = 6  # EXIF orientation: turn by 90 degrees to look at


def photos(folder: Path, n: int = 12, sizes=((40, 32),)) -> Path:
    "Folder of `n` different parts of a photograph."
    folder.mkdir(parents=True)
    for i in range(n):
        part = FLOWER.crop((20 * i, 10 * i, 20 * i + 300, 10 * i + 240))
        part.resize(sizes[i % len(sizes)]).save(folder / f"{i}.jpg")
    return folder


def truncate(path: Path): path.write_bytes(path.read_bytes()[:-200])


@pytest.fixture
def command(call, tmp_path, monkeypatch):
    "Runs the command in an empty folder: its exit code, standard output and standard error."
    (home := tmp_path / "home").mkdir()
    monkeypatch.chdir(home)
    return partial(call, pretrain)


@pytest.fixture
def refused(command):
    "Asserts that a command is refused by one line with the given words, and leaves nothing behind."
    def check(*argv, words=()):
        code, out, err = command(*argv)
        assert (code, out, err.count("\n")) == (2, "", 1), out + err
        assert err.startswith("simclr-pretrain: error: ")
        for word in words: assert str(word) in err
        assert list(Path.cwd().rglob("*")) == []
        return err
    return check


# Refused

@pytest.mark.parametrize("option, value, advice", [
    ("--bs", "1", "at least 2"), ("--bs", "0", "at least 2"), ("--bs", "1348", "at most 1347"),
    ("--size", "0", "8 to 1024"), ("--size", "2", "8 to 1024"), ("--size", "5000", "8 to 1024"),
    ("--temperature", "-0.5", "positive"), ("--temperature", "0", "positive"),
    ("--temperature", "nan", "finite"), ("--temperature", "warm", "float"),
    ("--arch", "vgg16", "resnet18"), ("--policy", "moco", "cifar"), ("--precision", "fp8", "bf16"),
    ("--scaling", "cubic", "sqrt"), ("--scaling", "none", "lr"),
    ("--lr", "-1", "at least 0"), ("--lr", "inf", "finite"), ("--strength", "3", "1.25"),
    ("--epochs", "many", "int"), ("--epochs", "1.5", "int"), ("--epochs", "0", "at least 1"),
    ("--n-train", "-5", "at least 1"), ("--n-train", "0", "at least 1"),
    ("--n-valid", "1", "at least 2"), ("--workers", "-1", "at least 0"), ("--seed", "x", "int"),
    ("--width", "-1", "> 0"), ("--width", "0.3", "whole number"), ("--width", "65", "at most 64"),
    ("--colour", "red", "--help"), ("--temprature", "0.1", "did you mean '--temperature'?"),
    ("--method", "simclrr", "did you mean 'simclr'?"),
])
def test_bad_option(refused, option, value, advice):
    refused(f"{option}={value}", words=[value, advice])


def test_bad_option_leaves_the_given_folder_alone(refused):
    refused("--bs", "1", "--out", "deep/run")


def test_missing_folder(refused):
    refused("no/such/folder", words=["no/such/folder", "no such folder", "digits, cifar10"])


def test_file_instead_of_a_folder(refused, tmp_path):
    (file := tmp_path / "photo.jpg").write_bytes(b"")
    refused(file, words=[file])


def test_empty_folder(refused, tmp_path):
    (folder := tmp_path / "nothing").mkdir()
    refused(folder, words=[folder, "empty"])


def test_folder_of_text_files(refused, tmp_path):
    (folder := tmp_path / "letters").mkdir()
    for i in range(3): (folder / f"{i}.txt").write_text("Dear")
    refused(folder, words=[folder, "no image", "0.txt"])


DAMAGES = {"truncated": truncate, "no bytes": lambda p: p.write_bytes(b""),
           "text": lambda p: p.write_text("text")}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_jpeg_is_named(refused, tmp_path, damage):
    damage(photos(tmp_path / "photos") / "7.jpg")
    refused(tmp_path / "photos", words=[tmp_path / "photos/7.jpg", "--skip-bad"])


def test_only_damaged_files(refused, tmp_path):
    for path in photos(tmp_path / "photos", 4).iterdir(): truncate(path)
    refused(tmp_path / "photos", "--skip-bad", words=["all 4", ".jpg"])


def test_batch_larger_than_the_folder(refused, tmp_path):
    refused(photos(tmp_path / "photos"), "--bs", "11", words=["11", "at most 10"])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_too_few_images(refused, tmp_path, n):
    "No advice that would be refused again, such as a batch of one."
    error = refused(photos(tmp_path / "photos", n))
    assert not re.search(r"at most [01]\b", error), error


def test_folder_with_another_run(command, tmp_path):
    (out := tmp_path / "old").mkdir()
    (out / "report.html").write_text("precious")
    code, _, err = command(photos(tmp_path / "photos"), *TINY, "--out", out)
    assert (code, err.count("\n")) == (2, 1)
    assert str(out) in err and "not an empty folder" in err
    assert [p.name for p in out.iterdir()] == ["report.html"]
    assert (out / "report.html").read_text() == "precious"


def test_class_without_training_images_is_no_late_surprise(command, tmp_path):
    "Either the run works, or it is refused before the training."
    for part in "train/a train/b test/a test/b test/c".split(): photos(tmp_path / "data" / part, 6)
    code, _, err = command(tmp_path / "data", *TINY, "--out", "run")
    assert (code, Path("run/report.html").exists()) == (0, True) or not Path("run").exists(), err


def test_diverged_run_says_what_to_try(command, tmp_path):
    options = [*TINY, "--bs=4", "--lr=1e30", "--precision=fp32"]
    code, _, err = command(photos(tmp_path / "photos"), *options)
    assert (code, err.count("\n")) == (2, 1)
    assert "lower the learning rate" in err


@pytest.mark.parametrize("argv, word", [(["--temperature", "-1"], "-1.0"), (["photos"], "7.jpg")])
def test_refused_by_the_process(tmp_path, argv, word):
    truncate(photos(tmp_path / "photos") / "7.jpg")
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run([*COMMAND, *argv], cwd=tmp_path, **CAPTURE)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert word in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_interrupt(tmp_path):
    "Ctrl-C in the middle of the training: code 130 and no traceback."
    env = os.environ | dict(PYTHONUNBUFFERED="1")
    argv = [*COMMAND, "--epochs", "500", "--width", "0.125"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
    process = subprocess.Popen(argv, cwd=tmp_path, env=env, preexec_fn=heed, **pipes)
    patience = threading.Timer(120, process.kill)
    patience.start()
    try:
        for line in process.stdout:
            if re.match(r"0 +\d", line): break  # the first epoch
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        patience.cancel()
        process.kill()
    assert (process.returncode, err) == (130, "interrupted\n")


# Accepted

def save_kinds(folder: Path) -> Path:
    "Every kind of image that is not 8-bit RGB."
    folder.mkdir()
    photo = FLOWER.resize((40, 32))
    deep = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    for name in "L.jpg CMYK.jpg P.png RGBA.png LA.png 1.png P.gif".split():
        photo.convert(name.split(".")[0]).save(folder / name)
    photo.convert("P").save(folder / "transparent.png", transparency=bytes(range(256)))
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep).save(folder / "deep.tif")
    for suffix in ("gif", "webp", "png"):
        photo.save(folder / f"animated.{suffix}", save_all=True, append_images=[photo.rotate(180)])
    return folder


def test_converted_kinds(tmp_path):
    "In a process of its own, where Pillow's warnings would show."
    n = len(list(save_kinds(tmp_path / "kinds").iterdir()))
    done = subprocess.run([*COMMAND, "kinds", *TINY, "--out", "run"], cwd=tmp_path, **CAPTURE)
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads((tmp_path / "run/config.json").read_text())["data"]
    assert (data["n_train"] + data["n_valid"], data["in_memory"], data["skipped"]) == (n, True, [])


def test_converted_kinds_of_many_sizes(command, tmp_path):
    "The way of large images: workers that decode and crop."
    photos(save_kinds(tmp_path / "kinds") / "more", 4, sizes=((200, 150), (40, 200)))
    code, _, err = command(tmp_path / "kinds", *TINY, "--out", "run")
    assert (code, err) == (0, "")
    assert json.loads(Path("run/config.json").read_text())["data"]["in_memory"] is False


@pytest.mark.parametrize("sizes", [[(40, 32)], [(40, 32), (60, 40)]], ids=["one size", "more"])
def test_rotated_by_exif(command, tmp_path, sizes):
    "A photograph held upright is stored as wide as the others."
    path = photos(tmp_path / "photos", sizes=sizes) / "4.jpg"
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = ROTATED
        image.save(path, exif=exif)
    code, _, err = command(tmp_path / "photos", *TINY)
    assert (code, err) == (0, "")


@pytest.mark.parametrize("size", [8, 33])
def test_odd_and_small_sizes(command, tmp_path, size):
    code, _, err = command(photos(tmp_path / "photos"), *TINY, "--size", size, "--out", "run")
    assert (code, err) == (0, "")
    assert load_encoder("run/encoder.safetensors").metadata["size"] == size


def test_skip_bad_counts_and_lists(command, tmp_path):
    folder = photos(tmp_path / "photos", 40)
    truncate(folder / "7.jpg")
    (folder / "9.jpg").write_bytes(b"")
    code, out, err = command(folder, *TINY, "--skip-bad", "--out", "run")
    assert (code, err) == (0, "")
    assert "skipped 2 " in out
    data = json.loads(Path("run/config.json").read_text())["data"]
    assert data["n_train"] + data["n_valid"] == 38
    skipped = sorted(line.split(": ")[0] for line in data["skipped"])
    assert skipped == [str(folder / "7.jpg"), str(folder / "9.jpg")]
    assert str(folder / "7.jpg") in Path("run/report.html").read_text()


def test_damaged_held_out_image_is_skipped_too(command, tmp_path):
    "The split is made of the images that can be read."
    folder = photos(tmp_path / "photos")
    truncate(folder_source(folder).valid[0])
    code, _, err = command(folder, *TINY, "--skip-bad")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("other", "a.txt paper.pdf data.h5 .hidden.jpg .hidden/1.jpg".split())
def test_other_files_are_left_alone(command, tmp_path, other):
    path = photos(tmp_path / "photos") / other
    path.parent.mkdir(exist_ok=True)
    path.write_text("no image")
    code, _, err = command(tmp_path / "photos", *TINY, "--out", "run")
    assert (code, err) == (0, "")
    data = json.loads(Path("run/config.json").read_text())["data"]
    assert data["n_train"] + data["n_valid"] == 12


def test_few_labelled_images(command, tmp_path):
    "Too few for 10 labels per class or five folds; still evaluated."
    for label in "ab": photos(tmp_path / "photos" / label, 4)
    code, _, err = command(tmp_path / "photos", *TINY, "--out", "run")
    assert (code, err) == (0, "")
    results = json.loads(Path("run/results.json").read_text())
    assert set(results["k-NN"]) == {"pixels", "random", "pretrained"}


def test_photographs(command, imagenet_sample):
    "A hundred photographs, each of another class."
    code, _, err = command(imagenet_sample, *TINY, "--size", "33", "--workers", "2", "--out", "run")
    assert (code, err) == (0, "")
    assert Path("run/report.html").exists()


def test_runs_get_folders_of_their_own(command, tmp_path):
    folder = photos(tmp_path / "photos", 6)
    assert [command(folder, *TINY)[0] for _ in range(2)] == [0, 0]
    assert sorted(p.name for p in Path("runs").iterdir()) == ["photos-1", "photos-2"]


# What a run leaves behind

class Page(HTMLParser):
    "Elements of a page with their attributes, and the text of its table; each must be closed."
    VOID = {"meta", "img", "br", "hr", "link", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.rows = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID: self.open.append(tag)
        if tag == "tr": self.rows.append([])
        if tag in ("td", "th"): self.rows[-1].append("")

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open): self.rows[-1][-1] += data


def run_once(folder: Path, *argv) -> Path:
    assert pretrain([*map(str, argv), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    options = "--n-train 200 --n-valid 100 --epochs 2 --width 0.125 --temperature 0.4".split()
    return run_once(tmp_path_factory.mktemp("labelled") / "run", "digits", *options)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("unlabelled")
    return run_once(tmp / "run", photos(tmp / "<b>&photos"), *TINY)


def test_files_of_a_run(labelled):
    names = ("config.json encoder.safetensors head.safetensors history.csv images.json.gz report.html "
             "results.json")
    assert sorted(p.name for p in labelled.iterdir()) == names.split()


def test_results_of_a_labelled_run(labelled):
    results = json.loads((labelled / "results.json").read_text())
    assert list(results) == ["10 labels per class", "all labels", "k-NN"]
    for column in results.values():
        assert set(column) == {"pixels", "random", "pretrained"}
        for r in column.values():
            assert 0 <= r["low"] <= r["value"] <= r["high"] <= 1 and r["low"] < r["high"]
            assert r["card"]["n_test"] == 100 and r["card"]["data"]["n_train"] == 200


def test_accuracy_table_has_intervals(labelled):
    (_, *protocols), *rows = Page((labelled / "report.html").read_text()).rows[:4]
    results = json.loads((labelled / "results.json").read_text())
    assert protocols == list(results)
    assert [name for name, *_ in rows] == ["pixels", "random", "pretrained"]
    for name, *cells in rows:
        for protocol, cell in zip(protocols, cells, strict=True):
            r = results[protocol][name]
            assert cell == f"{r['value']:.1%} {r['low']:.1%} to {r['high']:.1%}"


def test_unlabelled_run_has_no_accuracy(unlabelled):
    assert json.loads((unlabelled / "results.json").read_text()) == {}
    page = (unlabelled / "report.html").read_text()
    before = page[:page.index("<h2>Checks that need no labels")]
    assert "What was learned" not in page and "On held-out images" not in page
    assert "<table" not in before and "interval" not in before  # those of the checks come after
    assert "&lt;b&gt;&amp;photos" in page


@pytest.mark.parametrize("run", ["labelled", "unlabelled"])
def test_report_opens_offline(request, run):
    text = (request.getfixturevalue(run) / "report.html").read_text()
    tags = Page(text).tags
    assert "://" not in text and "@import" not in text
    assert all(url.startswith("data:image/") for url in re.findall(r"url\(([^)]*)", text))
    assert not {"link", "script", "iframe", "base"} & {tag for tag, _ in tags}
    images = [attrs for tag, attrs in tags if tag == "img"]
    figures = [attrs for attrs in images if attrs.get("class") != "p"]  # p: in a table of pictures
    assert len(figures) == (4 if run == "labelled" else 3)  # t-SNE needs more than two images
    for attrs in images:
        kind, data = attrs["src"].split(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            assert kind == f"data:{image.get_format_mimetype()}"
            assert np.asarray(image).std() > 1, "a blank figure"
        assert len(attrs["alt"]) > (10 if attrs in figures else 5)  # a name, below as well
    links = [attrs[name] for _, attrs in tags for name in ("src", "href") if name in attrs]
    assert all(link.startswith("data:") for link in links)


@pytest.mark.parametrize("run, measured", [("labelled", ["probe", "knn"]), ("unlabelled", [])])
def test_history(request, run, measured):
    text = (request.getfixturevalue(run) / "history.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    losses = ["train_loss", "valid_loss", "contrastive_top1"]
    assert list(rows[0]) == ["epoch", *losses, *measured, "time"]
    assert [row.pop("epoch") for row in rows] == (["0", "1"] if run == "labelled" else ["0"])
    for row in rows:
        assert re.fullmatch(r"[\d:]+", row.pop("time"))
        assert all(math.isfinite(float(value)) for value in row.values())


def test_config_says_what_was_left_open(labelled):
    saved = json.loads((labelled / "config.json").read_text())
    config, data = saved["config"], saved["data"]
    assert (config["temperature"], config["bs"], config["seed"]) == (0.4, 100, 0)
    assert (data["n_train"], data["n_valid"], data["size"]) == (200, 100, 16)


def test_config_repeats_the_run(unlabelled, tmp_path):
    "The options of config.json give the same weights."
    saved = json.loads((unlabelled / "config.json").read_text())["config"]
    filled = {k: v for k, v in saved.items() if v not in (None, False) and k not in ("data", "out")}
    options = [f"--{k.replace('_', '-')}={v}" for k, v in filled.items()]
    again = run_once(tmp_path / "again", saved["data"], *options)
    assert same_weights(unlabelled, again)


def same_weights(*runs: Path) -> bool:
    first, second = (load_encoder(run / "encoder.safetensors").state_dict() for run in runs)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_saved_encoder(labelled):
    encoder = load_encoder(labelled / "encoder.safetensors")
    about = encoder.metadata
    assert (about["run"]["epochs"], about["run"]["seed"]) == (2, 0)
    assert (about["temperature"], about["size"]) == (0.4, 16)
    assert "digits policy" in about["policy"] and about["version"]
    h = encoder(torch.rand(2, 3, 16, 16))
    assert h.shape == (2, encoder.out_dim) and h.isfinite().all() and not torch.equal(h[0], h[1])
