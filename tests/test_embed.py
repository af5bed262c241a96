"Files of representations: any data alike, killed and gone on with, shared among processes, bounded in memory."
import json
import os
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import processes
from simclr_nb.cli import embed as command
from simclr_nb.evaluate.features import encoder_features
from simclr_nb.model.encoder import create_encoder, load_encoder, save_encoder
from simclr_nb.data import simclr_dls
from simclr_nb.run.embedding import embed
from simclr_nb.run.evaluate import EvaluationConfig, _loaders
from simclr_nb.run.vector_files import read_vectors
from simclr_nb.train.parts import view_size
from simclr_nb.views.two_views import TwoViews

QUIET = dict(progress=False, workers=0)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_encoder("resnet18", 0.125, "cifar", zero_init_last=False).eval()


def noise(folder: Path, n: int, side: int = 16) -> list[Path]:
    "Images of noise in folders of three classes; in the order of their names."
    rng = np.random.default_rng(0)
    for i in range(n):
        file = folder / f"class {i % 3}" / f"{i:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file)
    return sorted(folder.rglob("*.png"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    noise(folder, 60)
    return folder


def test_every_kind_of_data_gives_the_same_rows(pictures, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = sorted(pictures.rglob("*.png"))
    labels = [f.parent.name for f in files]
    pixels = np.stack([np.asarray(Image.open(f)) for f in files])
    table = tmp_path / "table.csv"
    pd.DataFrame(dict(path=files, label=labels)).to_csv(table, index=False)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in files: archive.write(file, file.relative_to(pictures))
    numbers = [int(label[-1]) for label in labels]
    hugging = datasets.Dataset.from_dict(dict(image=list(map(str, files)), label=labels))
    kinds = dict(folder=pictures, table=table, zip=tmp_path / "pictures.zip", files=files,
                 frame=pd.read_csv(table), array=(pixels, numbers),
                 dataset=[(Image.fromarray(x), y) for x, y in zip(pixels, numbers)],
                 hugging=hugging.cast_column("image", datasets.Image()))
    rows = {kind: embed(network(), data, tmp_path / f"{kind}.npy", **QUIET).read()
            for kind, data in kinds.items()}
    first = rows["folder"]
    assert first.names == [f.relative_to(pictures).as_posix() for f in files]
    assert first.labels == labels and rows["table"].labels == labels
    assert rows["files"].names == [f.as_posix() for f in files]
    assert rows["array"].labels == [label[-1] for label in labels]
    for kind, each in rows.items(): assert np.array_equal(each.h, first.h), kind


def test_images_have_the_size_of_the_pretraining(pictures, tmp_path):
    "By a command that says nothing, for h and for another layer; an option goes before."
    file = save_encoder(network(), tmp_path / "encoder.safetensors", size=24)
    out = tmp_path / "h.npy"
    for options, size in ((dict(), 24), (dict(layer="layer1"), 24), (dict(size=20), 20)):
        found = embed(file, pictures, out, **options, **QUIET)
        assert found.card["preprocessing"]["size"] == size
        for path in tmp_path.glob("h*"): path.unlink()
    evaluated = _loaders(EvaluationConfig(str(file), str(pictures)), load_encoder(file))
    assert view_size(evaluated, TwoViews(evaluated.policy)) == 24


def test_rows_are_those_of_the_evaluation(pictures, tmp_path):
    "The same h, images and labels as the protocols see."
    dls = simclr_dls(pictures, bs=20, device="cpu", progress=False)
    expected = encoder_features(network(), dls)
    found = embed(network(), pictures, tmp_path / "x.csv", **QUIET).read()
    for part, h, y in (("train", expected.h_train, expected.y_train),
                       ("valid", expected.h_test, expected.y_test)):
        rows = [i for i, each in enumerate(found.parts) if each == part]
        assert len(rows) == len(h)
        names = [path.relative_to(pictures).as_posix() for path in dls[part == "valid"].dataset.paths]
        place = {name: k for k, name in enumerate(names)}
        for i in rows:
            k = place[found.names[i]]
            torch.testing.assert_close(torch.from_numpy(found.h[i]), h[k], atol=1e-5, rtol=1e-5)
            assert found.labels[i] == dls.classes[int(y[k])]


class Slow(nn.Module):
    "An encoder that takes its time, so that a kill meets it at work; has the weights of the other."
    def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.arange(12.).view(3, 4))
    def forward(self, x):
        time.sleep(float(os.environ.get("PATIENCE", 0)))
        return x.mean((2, 3)) @ self.weight


def images(n: int = 10_000) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def slowly(out: str, seconds: float):
    os.environ["PATIENCE"] = str(seconds)
    embed(Slow(), images(), out, bs=256, size=8, **QUIET)


def together(rank: int, world: int):
    "The file that the folder names, in which processes begin."
    return [str(embed(Slow(), images(), Path("out.txt").read_text(), bs=256, size=8, **QUIET))]


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path, monkeypatch):
    "SIGKILL in the middle, three times; then two processes end it."
    whole = tmp_path / "whole.npy"
    embed(Slow(), images(), whole, bs=256, size=8, **QUIET)
    out = tmp_path / "killed.npy"
    folder, counts = out.with_name(f".{out.name}.pieces"), []
    for kill in range(3):
        process = processes.start(tmp_path / "log", slowly, str(out), 0.2)
        end = time.monotonic() + 120
        while len(list(folder.glob("*.safetensors"))) <= kill and process.is_alive():
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        counts.append(len(list(folder.glob("*.safetensors"))))
        assert process.exitcode == -signal.SIGKILL and not out.exists()
    assert counts == sorted(counts) and 0 < counts[0] < counts[2] < 10
    monkeypatch.chdir(tmp_path)
    Path("out.txt").write_text(str(out))
    said = processes.run(together, 2, tmp_path / "two")
    assert said[0] == said[1]
    for file in tmp_path.glob("whole*"):
        if file.name.endswith(".card.json"): continue
        assert file.read_bytes() == (tmp_path / file.name.replace("whole", "killed")).read_bytes()
    assert not folder.exists()


def test_a_million_values_are_not_held(tmp_path):
    "40,000 rows of 2,048 values are 328 MB; the process grows by less than half of that."
    script = tmp_path / "big.py"
    script.write_text(BIG)
    status, log = processes.script(script, tmp_path / "big.npy", log=tmp_path / "log")
    assert status == 0, log
    assert int(log.split()[-1]) < 164 * 2**20, log
    assert np.load(tmp_path / "big.npy", mmap_mode="r").shape == (40_000, 2048)


BIG = """
import resource, sys
import numpy as np, torch
from torch import nn
from simclr_nb.run.embedding import embed

encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 2048))
pixels = np.zeros((40_000, 8, 8, 3), np.uint8)
options = dict(size=8, progress=False)
embed(encoder, pixels[:2048], sys.argv[1] + ".warm.npy", **options)
def peak(): return int(next(s for s in open("/proc/self/status") if s.startswith("VmHWM")).split()[1]) * 1024
before = peak()
embed(encoder, pixels, sys.argv[1], **options)
print(peak() - before)
"""


def damaged(folder: Path):
    files = noise(folder, 9, 40)
    files[4].write_bytes(files[4].read_bytes()[:300])
    return files[4]


def stopped(rank: int, world: int):
    try: embed(Slow(), Path("data"), "x.csv", size=8, **QUIET)
    except ValueError as error: return [str(error)]


def test_a_damaged_image_is_named_on_all_processes_and_may_be_skipped(tmp_path, monkeypatch):
    bad = damaged(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    first, second = processes.run(stopped, 2, tmp_path / "two")
    assert first == second and bad.name in first[0] and "--skip-bad" in first[0]
    done = embed(Slow(), Path("data"), "x.csv", size=8, skip_bad=True, **QUIET)
    assert len(done.read()) == 8 and bad.name in done.card["skipped"][0]
    assert all(bad.name not in name for name in done.read().names)


def test_workers_change_nothing(tmp_path):
    noise(tmp_path / "data", 20, 40)
    some = [embed(Slow(), tmp_path / "data", tmp_path / f"{n}.csv", size=32, bs=4, progress=False,
                  workers=n).path.read_bytes() for n in (0, 2)]
    assert some[0] == some[1]


HEAD = {"projection_head.layers.0.weight": torch.zeros(128, 512),
        "projection_head.layers.0.bias": torch.zeros(128)}
LIGHTLY = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def test_weights_of_other_libraries(pictures, tmp_path):
    "A file as lightly saves it, and torchvision's own names with --arch, give what PyTorch gives."
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18().eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("fc")}
    torch.save({"state_dict": {f"backbone.{LIGHTLY[k.split('.')[0]]}.{k.partition('.')[2]}": v
                               for k, v in state.items()} | HEAD}, tmp_path / "lightly.ckpt")
    torch.save(model.state_dict(), tmp_path / "torchvision.pth")
    argv = [pictures, "--size", 32, "--workers", 0, "--out"]
    assert command(list(map(str, [tmp_path / "lightly.ckpt", *argv, tmp_path / "a.npy"]))) == 0
    arch = ["--arch", "torchvision/resnet18"]
    assert command(list(map(str, [tmp_path / "torchvision.pth", *argv, tmp_path / "b.npy", *arch]))) == 0
    x = torch.stack([torch.from_numpy(np.array(Image.open(f).resize((16, 16)))).permute(2, 0, 1)
                     for f in sorted(pictures.rglob("*.png"))]) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    model.fc = nn.Identity()
    cards = [json.loads((tmp_path / f"{n}.npy.card.json").read_text()) for n in "ab"]
    for card in cards: assert card["preprocessing"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert np.allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"), atol=1e-4)
    exact = embed(model, pictures, tmp_path / "c.npy", size=16, **QUIET).read().h
    normal = embed(tmp_path / "lightly.ckpt", pictures, tmp_path / "d.npy", size=16, **QUIET).read().h
    with torch.no_grad():
        assert np.allclose(exact, model(x), atol=1e-4)
        assert np.allclose(normal, model((x - mean) / std), atol=1e-3)


def test_the_command_says_what_is_wrong_in_one_line(call, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = save_encoder(network(), tmp_path / "encoder.safetensors")
    cases = {("nothing.pt", "digits"): "nothing.pt", (saved, "nowhere"): "no such folder or data set",
             (saved, "digits", "--out", "x.pt"): "unknown kind of file '.pt'",
             (saved, "digits", "--out", "none/x.npy"): "no folder",
             (saved, "digits", "--out", "x.npy", "--layer", "layer9"): "unknown layer 'layer9'",
             (saved, "digits", "--out", "x.npy", "--bs", "0"): "bs must be 1 to 1024",
             (saved, "digits", "--out", "x.npy", "--crop", "left"): "unknown crop 'left'",
             (saved,): "required: data"}
    for argv, words in cases.items():
        code, _, error = call(command, *argv)
        assert (code, error.count("\n")) == (2, 1) and words in error, error
    code, said, _ = call(command, tmp_path, pictures, "--out", "x.npy")  # the folder of a run
    assert code == 0 and "60 embedded" in said and "x.npy: 60 x 64 values of h" in said
    assert list(tmp_path.glob(".*")) == []


def test_files_can_be_read_by_others(pictures, tmp_path):
    pytest.importorskip("pyarrow")
    done = embed(network(), pictures, tmp_path / "x.parquet", **QUIET)
    frame = pd.read_parquet(tmp_path / "x.parquet")
    assert np.array_equal(np.stack(frame.h), done.read().h)
    import pyarrow.parquet as pq
    about = json.loads(pq.read_schema(tmp_path / "x.parquet").metadata[b"simclr_nb"])
    assert about["preprocessing"]["size"] == 16 and about["feature"] == "h"
    card = read_vectors(tmp_path / "x.parquet").card
    assert {"encoder", "data", "software", "hardware", "images_per_second"} <= card.keys()
