"""The benchmarks for a GPU, on a CPU and very small: pieces of a run add up to the run.

Nothing here looks at a speed. Nothing that needs a GPU to be shown is tested or stated.
"""
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

from processes import script

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
AGAIN = 75  # exit status of a piece that is not the last
CIFAR = dict(data="digits", device="cpu", width=0.0625, batch=64, n_train=320, n_valid=128,
             epochs=2, interval=2, k=20, linear_epochs=1, precision="fp32")
STEP = dict(device="cpu", arch="resnet18", width=0.0625, size=32, micro=2, repeats=2, workers=0,
            precision="fp32")


def call(name: str, out: Path, log: Path, **options) -> tuple[int, str]:
    "Exit status, and what was printed, of one piece, which is a process of its own."
    options |= dict(out=out, output=out.with_suffix(".json"))
    argv = []
    for option, value in options.items():
        argv += [f"--{option}", *(value if isinstance(value, list) else [value])]
    code, printed = script(BENCHMARKS / name, *argv, log=log)
    assert code in (0, AGAIN), printed
    return code, printed


def pieces(name: str, out: Path, most: int = 12, **options) -> int:
    "Call the same command until all is done; how often it took."
    for i in range(1, most + 1):
        code, printed = call(name, out, out.with_suffix(f".{i}.log"), **options)
        if not code: return i
        assert "the same command goes on" in printed
    raise AssertionError(f"not done after {most} pieces")


def card(out: Path) -> dict:
    own = json.loads((out / "card.json").read_text())
    published = json.loads(out.with_suffix(".json").read_text())
    assert own == published.get("runs", {"own-0": published})["own-0"]
    return own


# gpu_cifar.py

@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    "An uninterrupted run."
    out = tmp_path_factory.mktemp("gpu") / "whole"
    assert pieces("gpu_cifar.py", out, **CIFAR) == 1
    return out


def test_cifar_in_pieces_is_one_run(whole, tmp_path):
    assert pieces("gpu_cifar.py", tmp_path / "parts", **CIFAR, steps=4) == 3
    one, parts = card(whole), card(tmp_path / "parts")
    weights, again = (load_file(out / "encoder.safetensors") for out in (whole, tmp_path / "parts"))
    assert weights.keys() == again.keys()
    assert all((weights[k] == again[k]).all() for k in weights)
    assert one["history"] == parts["history"] and len(one["history"]["train_loss"]) == 2
    for how in ("knn", "linear"):
        assert one["accuracy"][how]["value"] == parts["accuracy"][how]["value"]
    assert [piece[:2] for piece in one["pieces"]] == [[0, 10]]
    assert [piece[:2] for piece in parts["pieces"]] == [[0, 4], [4, 8], [8, 10]]
    assert one["steps"] == parts["steps"] == 10


def test_cifar_card_agrees_with_itself(whole):
    own = card(whole)
    assert {"torch", "torchvision", "fastai", "simclr_nb", "python"} <= set(own["versions"])
    assert {"cpu", "cores", "load_before", "gpu"} <= set(own["hardware"])
    assert {**CIFAR, "k": 20}.items() <= own["settings"].items()
    rate, peak = own["images_per_s"]["median"], own["bf16_product_flop_per_s"]
    assert own["share_of_peak"] == round(rate * own["flop_per_image"] / peak, 4)
    views = own["views_seconds"]["median"]
    assert own["share_of_augmentation"] == round(views * rate / 64, 4)
    assert len(own["first_images_per_s"]) == 1 and len(own["images_per_s"]["runs"]) == 3
    assert own["training_seconds"] == round(sum(s for *_, s in own["pieces"]), 1)
    assert (own["data"]["n_train"], own["data"]["n_valid"]) == (320, 128)


def test_cifar_recipe_is_that_of_the_study(monkeypatch):
    "Its settings are options, and what is given beside it counts more; other runs stay in a card."
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_cifar
    from simclr_nb.studies.speedrun import SPEED_RUNS

    run, seen = dict(settings={}), []
    monkeypatch.setattr(gpu_cifar, "measure", lambda args, piece: seen.append(args) or run)
    monkeypatch.setattr(gpu_cifar, "publish", lambda name, run, args: seen.append(name))
    monkeypatch.setattr(Path, "write_text", lambda *args, **kwargs: None)
    for name, recipe in SPEED_RUNS.items():
        monkeypatch.setattr(sys, "argv", f"x --recipe {name} --epochs 3 --seed 7".split())
        gpu_cifar.main()
        *_, args, key = seen
        assert vars(args) | recipe | dict(epochs=3, seed=7) == vars(args)
        assert (key, str(args.out)) == (f"{name}-7", f"runs/gpu_cifar-{name}-7")


def test_cifar_runs_stay_beside_each_other(whole, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_cifar

    args = gpu_cifar.options().parse_args(["--output", str(tmp_path / "card.json")])
    for name in ("own-0", "sprint-1", "own-0"): gpu_cifar.publish(name, card(whole), args)
    published = json.loads((tmp_path / "card.json").read_text())
    assert list(published["runs"]) == ["own-0", "sprint-1"]
    text = gpu_cifar.table(published)
    assert text.count("| own-0: resnet18 x 0.0625, batch 64, 2 epochs") == 1
    assert text.count("| sprint-1: resnet18 x 0.0625, batch 64, 2 epochs") == 1


def test_cifar_from_the_official_archive(tmp_path, monkeypatch):
    "Each image with its label, rows of pixels in order: a colour plane after the other."
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    import gpu_cifar

    (folder := tmp_path / "cifar-10-batches-py").mkdir()
    rng, classes = np.random.default_rng(0), [f"class {i}" for i in range(10)]
    pixels = rng.integers(256, size=(24, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        part = dict(data=pixels[4 * i : 4 * i + 4], labels=[i, i + 1, i + 2, i + 3])
        (folder / name).write_bytes(pickle.dumps(part))
    (folder / "batches.meta").write_bytes(pickle.dumps(dict(label_names=classes)))
    source = gpu_cifar.read(str(tmp_path))
    both = [*source.train.images, *source.valid.images]
    assert (torch.stack(both).numpy() == pixels.reshape(24, 3, 32, 32)).all()
    assert source.valid.labels.tolist() == [5, 6, 7, 8] and source.classes == classes
    assert len(source.train) == 20


def test_cifar_refuses_another_run_in_its_folder(whole, tmp_path):
    options = ["--out", whole, "--device", "cpu", "--data", "digits"]
    code, told = script(BENCHMARKS / "gpu_cifar.py", *options, log=tmp_path / "log")
    assert code == 1 and "holds a run with" in told


def test_cifar_piece_without_time_makes_a_step(tmp_path):
    "However short a piece is, the run goes on; and the evaluations come one by one."
    options = CIFAR | dict(n_train=64, epochs=1, interval=1)
    done = pieces("gpu_cifar.py", tmp_path / "run", **options, minutes=0.001)
    own = card(tmp_path / "run")
    assert own["steps"] == 1 and len(own["pieces"]) == 2  # the last of them validates
    assert done == len(own["pieces"]) + 3  # k-NN, linear, peak


# gpu_step.py

@pytest.fixture
def photos(tmp_path) -> Path:
    (folder := tmp_path / "photos").mkdir()
    for i in range(12):
        image = Image.fromarray(load_sample_images().images[i % 2])
        image.resize((150 + 7 * i, 140)).save(folder / f"{i}.jpg")
    return folder


def test_step_cases(tmp_path, photos):
    options = dict(STEP, data=photos, batches=[2, 32])
    assert pieces("gpu_step.py", tmp_path / "whole", **options) == 1
    own = card(tmp_path / "whole")
    names = [f"{source}-{n}" for n in (2, 32) for source in ("random", "workers", "device")]
    assert list(own["cases"]) == names
    for found in own["cases"].values():
        if found["batch"] == 32 and found["source"] != "random":
            assert "larger than the 10 training images" in found["failed"]
            continue
        speed = found["batch"] / found["seconds"]["median"]
        assert len(found["seconds"]["runs"]) == 2 and found["images_per_s"] == round(speed, 1)
        share = found["flop"] / found["seconds"]["median"] / own["bf16_product_flop_per_s"]
        assert found["share_of_peak"] == round(share, 4)


def test_step_cases_add_up(tmp_path):
    "A piece without time measures one thing."
    assert pieces("gpu_step.py", tmp_path / "parts", **STEP, batches=[2, 4], minutes=0.0001) == 3
    cases = card(tmp_path / "parts")["cases"]
    assert list(cases) == ["random-2", "random-4"]
    small, large = (cases[f"random-{n}"]["flop"] / n for n in (2, 4))
    assert 1.25 < large / small < 1.4  # the first pass again, a third of the operations


def test_step_with_files_decodes_the_same(photos, monkeypatch):
    "Both decoders give the batches of one order, so that they are compared on the same work."
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_step

    args = gpu_step.options().parse_args(["--data", str(photos), "--size", "32", "--workers", "0",
                                          "--device", "cpu"])
    both = [gpu_step.batches(source, 4, args) for source in ("workers", "device")]
    for _ in range(3):
        x, y = map(next, both)
        assert x.shape == y.shape == (4, 2, 3, 32, 32)
        assert (x.int() - y.int()).abs().max() <= 2
