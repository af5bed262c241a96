"Files of a run or a search that someone has damaged: one line that names the file, and no traceback."
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from simclr_nb.cli import evaluate, pretrain
from simclr_nb.evaluate.journal import Journal
from simclr_nb.evaluate.result import Result, accuracy_result, load_result
from simclr_nb.model.encoder import create_encoder, save_encoder

DAMAGED = {
    "empty": b"", "torn": b'{"value": 0.5, "low', "no UTF-8": b"\xff\xfe{}", "a list": b"[]",
    "a number": b"3", "other keys": b'{"a": 1}', "nested": b"[" * 200_000,
    "wrong types": b'{"value": {}, "low": [], "high": null, "card": 3}',
    "huge": b'{"value": 1' + b"0" * 400 + b', "low": 0, "high": 1, "card": {}}',
}
EVERY = pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
TINY = "--width 0.125 --epochs 1 --size 8 --bs 8 --workers 0".split()


@EVERY
def test_result(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.json"): load_result(path)


@pytest.mark.parametrize("field", ["correct", "y"])
@pytest.mark.parametrize("packed", [3, {}, dict(dtype="bool", shape=[10**15], data=""),
                                    dict(dtype="object", shape=[1], data="AAAAAAAAAAA="),
                                    dict(dtype="int8", shape="x", data="AA=="),
                                    dict(dtype=None, shape=[1], data="AA==")])
def test_test_examples_of_a_result(field, packed, tmp_path):
    saved = accuracy_result(torch.arange(8) < 5, torch.arange(8) % 2).to_dict()
    path = tmp_path / "a.json"
    path.write_text(json.dumps(saved | {field: packed}))
    with pytest.raises(ValueError, match="a.json"): load_result(path)


POINT = json.dumps(dict(point=dict(lr=1), valid=0.5, seconds=1.0)).encode()
ENTRIES = {
    "torn": b'{"point": {"lr"', "no UTF-8": b"\xff", "nested": b"[" * 200_000,
    "no score": b'{"point": {"lr": 1}}', "a word": b'{"point": {"lr": 1}, "valid": "x", "seconds": 1}',
    "point is a number": b'{"point": 1, "valid": 1, "seconds": 1}',
    "result is none": b'{"result": {"value": 2}}', "settings again": b'{"settings": {}}',
}


@pytest.mark.parametrize("line", ENTRIES.values(), ids=ENTRIES)
def test_journal(line, tmp_path):
    path = tmp_path / "search.jsonl"
    path.write_bytes(b'{"settings": {"a": 1}}\n' + POINT + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match="search.jsonl, line 3 is damaged"): Journal(path, dict(a=1))


@pytest.mark.parametrize("line", [b"3", b'{"settings": 3}', b'{"settings": {"a"', POINT, b"\xff"])
def test_first_line_of_a_journal(line, tmp_path):
    path = tmp_path / "search.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(ValueError, match="search.jsonl, line 1 is damaged"): Journal(path, dict(a=1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[str]]:
    "Folder of a run that has ended, and the arguments that end it again."
    folder = tmp_path_factory.mktemp("run")
    flower = Image.fromarray(load_sample_images().images[1])
    for i in range(24):
        part = folder / f"photos/{'ab'[i % 2]}"
        part.mkdir(parents=True, exist_ok=True)
        flower.crop((9 * i, 5 * i, 9 * i + 40, 5 * i + 40)).save(part / f"{i}.png")
    argv = [str(folder / "photos"), *TINY, "--out", str(folder / "out")]
    assert pretrain(argv) == 0
    return folder / "out", [*argv, "--resume"]


def refused(command, argv: list[str], name: str, capsys) -> str:
    "The one line of an error that names a file."
    with pytest.raises(SystemExit) as end: command(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and name in error and "Traceback" not in error, error
    return error


@EVERY
@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_files_of_a_run(name, content, finished, capsys):
    folder, argv = finished
    sound = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(content)
        refused(pretrain, argv, name, capsys)
    finally: (folder / name).write_bytes(sound)
    assert pretrain(argv) == 0


@pytest.mark.parametrize("content", [b"epoch,loss\nx,1\n", b"epoch\n\n", b"\xff\xfe\n\xff"])
def test_history_of_a_run(content, finished, capsys):
    "The run checks it before the first step, not after the first epoch."
    folder, argv = finished
    sound = {name: (folder / name).read_bytes() for name in ("history.csv", "report.html")}
    try:
        (folder / "history.csv").write_bytes(content)
        (folder / "report.html").unlink()
        refused(pretrain, argv, "history.csv", capsys)
    finally:
        for name, data in sound.items(): (folder / name).write_bytes(data)


@EVERY
@pytest.mark.parametrize("name", ["evaluation.json", "knn.json"])
def test_files_of_an_evaluation(name, content, finished, tmp_path, capsys):
    torch.manual_seed(0)
    encoder = save_encoder(create_encoder("resnet18", 0.125, "cifar"), tmp_path / "e.safetensors")
    (tmp_path / "run").mkdir()
    options = ["--data", "digits", "--protocol", "knn", "--out", str(tmp_path / "run")]
    (tmp_path / "run" / name).write_bytes(content)
    refused(evaluate, [str(encoder), *options], name, capsys)


CARDS = {}, dict(dataset=["of", "a", "list"]), dict(metric="top-1", dataset="flowers102")


@pytest.mark.parametrize("card", CARDS)
def test_a_result_without_its_card(card, finished, tmp_path, capsys):
    "A sound result of something else: the report cannot be made of it."
    torch.manual_seed(0)
    encoder = save_encoder(create_encoder("resnet18", 0.125, "cifar"), tmp_path / "e.safetensors")
    (tmp_path / "run").mkdir()
    Result(0.5, 0.4, 0.6, card).save(tmp_path / "run/knn.json")
    options = ["--data", "digits", "--protocol", "knn", "--out", str(tmp_path / "run")]
    refused(evaluate, [str(encoder), *options], "knn.json", capsys)
