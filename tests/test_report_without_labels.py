"The report of a run without labels: what it says is true of the run, and its commands run as they stand."
import re
import shlex
import shutil
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from simclr_nb.cli import embed, evaluate, predict, pretrain
from simclr_nb.data import clean_loader, simclr_dls
from simclr_nb.evaluate.features import random_encoder
from simclr_nb.learner import simclr_learner
from simclr_nb.measure.geometry import effective_rank, uniformity
from simclr_nb.measure.representations import represent
from simclr_nb.model.encoder import load_encoder
from simclr_nb.run.config import RunConfig
from simclr_nb.run.findings import collapse_finding, data_findings, image_names
from simclr_nb.run.pretrain import run_pretraining

COMMANDS = {"simclr-pretrain": pretrain, "simclr-embed": embed, "simclr-evaluate": evaluate,
            "simclr-predict": predict}
SMALL = "--width 0.125 --epochs 1 --bs 32 --workers 0".split()
DIGITS = load_digits()


def pictures(folder: Path, n: int = 120) -> Path:
    "Digits of 16 x 16 pixels as files in one folder, the first four twice."
    folder.mkdir()
    for i, image in enumerate(DIGITS.images[:n]):
        Image.fromarray((image * 15.9).astype("uint8")).resize((16, 16)).save(folder / f"{i:03}.png")
    for i in range(4): shutil.copy(folder / f"{i:03}.png", folder / f"copy-{i}.png")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    "Where a run without labels was begun, and its report."
    home = tmp_path_factory.mktemp("unlabelled")
    pictures(home / "my pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert pretrain(["my pictures", *SMALL, "--out", "a run"]) == 0
    return home, (home / "a run/report.html").read_text("utf-8")


def steps(page: str) -> list[str]:
    "The commands of a report."
    part = page[page.index("What to do next"):page.index("<h2>Settings")]
    return [unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", part, re.DOTALL)]


def test_the_numbers_are_those_of_the_encoder(finished):
    home, page = finished
    assert "could not be" not in page and "What was learned" not in page
    dls = simclr_dls(home / "my pictures", bs=32, device="cpu", num_workers=0, progress=False)
    encoder = load_encoder(home / "a run/encoder.safetensors")
    for net in (random_encoder(encoder.config, 0), encoder):
        h, _ = represent(net, clean_loader(dls, 1))
        assert f"<td>{effective_rank(h):.1f}</td>" in page
        assert f"<td>{uniformity(h).item():.2f}</td>" in page
    assert f"h of {len(h)} validation images" in page


def test_copies_are_named(finished):
    "Each of the four planted pairs is shown, wherever the split has put its images."
    home, page = finished
    dls = simclr_dls(home / "my pictures", bs=32, device="cpu", num_workers=0, progress=False)
    parts = [{Path(name).name for name in image_names(dls, i)} for i in (0, 1)]
    part = page[page.index("Near copies"):page.index("<h3>Neighbours")]
    for i in range(4): assert f"{i:03}.png" in part and f"copy-{i}.png" in part
    apart = [i for i in range(4) if (f"{i:03}.png" in parts[0]) != (f"copy-{i}.png" in parts[0])]
    found = int(re.search(r"([\d,]+) of the \d+ validation images have", part)[1])
    assert found >= len(apart) and ('class="advice"' in part) == (found > 0)


def test_every_command_runs_as_it_stands(finished, monkeypatch, call):
    home, page = finished
    monkeypatch.chdir(home)
    commands = steps(page)
    assert [command.split()[0] for command in commands] == [
        "simclr-embed", "python", "simclr-evaluate", "simclr-predict", "simclr-pretrain"]
    for command in commands:
        first, *rest = command.split("\n")
        if rest:
            exec("\n".join(rest[:-1]), {})
            table = pd.read_csv("a run/to_label.csv")
            assert len(table) == 100 and all(Path(path).is_file() for path in table.path)
            number = table.path.map(lambda path: int(Path(path).stem.removeprefix("copy-")))
            table.assign(label=[f"digit {DIGITS.target[i] % 2}" for i in number]).to_csv(
                "a run/to_label.csv", index=False)
            continue
        name, *words = shlex.split(first)
        words = ["my pictures" if word == "NEW_IMAGES" else word for word in words]
        code, out, err = call(COMMANDS[name], *words)
        assert code == 0, (command, err)
    assert len(pd.read_csv("predictions.csv")) == 124
    assert Path("a run/explore.html").stat().st_size > 10_000
    assert "beginning with encoder and head" in out  # the last command goes on with the run


def test_a_shortcut_is_printed_before_training(tmp_path, capsys):
    "Flat pictures of one colour each, cropped alone."
    (tmp_path / "flat").mkdir()
    for i in range(80):
        Image.new("RGB", (16, 16), (3 * i, 3 * i, 3 * i)).save(tmp_path / f"flat/{i}.png")
    config = dict(width=0.125, epochs=1, bs=16, workers=0, policy="supervised")
    run_pretraining(RunConfig(str(tmp_path / "flat"), out=str(tmp_path / "run"), **config))
    printed = capsys.readouterr().out
    line = next(row for row in printed.split("\n") if row.startswith("colour shortcut: "))
    assert "--policy paper" in line and printed.index(line) < printed.index("train_loss")
    assert "--policy paper" in (tmp_path / "run/report.html").read_text()


def test_the_checks_change_no_weight(tmp_path, monkeypatch):
    "The same run with and without the checks."
    pictures(tmp_path / "p", 40)
    weights = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr("simclr_nb.run.pretrain.data_findings", lambda *args: [])
        config = RunConfig(str(tmp_path / "p"), width=0.125, epochs=2, bs=16, workers=0,
                           out=str(tmp_path / name))
        run_pretraining(config)
        weights.append(load_file(tmp_path / name / "encoder.safetensors"))
    for key, value in weights[0].items(): assert torch.equal(value, weights[1][key]), key


def test_a_failing_check_costs_a_line(tmp_path, monkeypatch, capsys):
    def fail(*args, **options): raise MemoryError("no room")
    for name in ("near_duplicates", "nearest_neighbours", "color_shortcut"):
        monkeypatch.setattr(f"simclr_nb.run.findings.{name}", fail)
    pictures(tmp_path / "p", 40)
    run_pretraining(RunConfig(str(tmp_path / "p"), width=0.125, epochs=1, bs=16, workers=0,
                              out=str(tmp_path / "run")))
    page = (tmp_path / "run/report.html").read_text()
    assert page.count("could not be examined. MemoryError: no room") == 4
    assert capsys.readouterr().out.count("could not be examined (MemoryError: no room)") == 4
    assert "Signs of collapse" in page and "What to do next" in page


def test_a_collapsed_encoder_is_told_from_a_sound_one():
    dls = simclr_dls("digits", bs=64, n_train=256, n_valid=128, seed=0, device="cpu", progress=False)
    torch.manual_seed(0)
    learn = simclr_learner(dls, width=0.125)
    h, _ = represent(learn.model.encoder, clean_loader(dls, 1))
    assert collapse_finding(dict(random=h, pretrained=0 * h + 1)).advice.startswith("Nearly all")
    assert "not moved" in collapse_finding(dict(random=h, pretrained=h)).advice
    spread = torch.nn.functional.normalize(h - h.mean(0), dim=1)
    assert not collapse_finding(dict(random=h, pretrained=spread)).advice


def test_methods_of_one_view_have_no_shortcut_to_look_for():
    dls = simclr_dls("digits", bs=32, n_train=64, n_valid=32, seed=0, device="cpu", progress=False)
    batch = dls.train.one_batch()[0]
    assert data_findings(dls, batch, False) == []
