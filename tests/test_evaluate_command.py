"`simclr-evaluate`: encoders of other libraries, folders with a list of labels, a run that was killed."
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from processes import start
from simclr_nb.cli import evaluate
from simclr_nb.transfer.table import TRANSFER_RESULTS
from simclr_nb.model.encoder import create_encoder, save_encoder
from simclr_nb.run import evaluate as protocols
from simclr_nb.run.evaluate import EvaluationConfig, run_evaluation
from simclr_nb.evaluate.result import load_result

sys.path.insert(0, str(Path(__file__).resolve().parent))
from miniatures import MINIATURES

DIGITS = ["--data", "digits", "--n-train", "200", "--n-valid", "100", "--workers", "0"]


@pytest.fixture
def command(call, tmp_path, monkeypatch):
    "Runs the command in an empty folder: its exit code, standard output and standard error."
    monkeypatch.chdir(tmp_path)
    return partial(call, evaluate)


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    return save_encoder(create_encoder("resnet18", 0.125, "cifar", zero_init_last=False),
                        tmp_path / "encoder.safetensors")


def test_resnet50_of_torchvision(command, tmp_path):
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "theirs.pth")
    options = "--arch torchvision/resnet50 --size 32 --protocol knn,logistic --out run".split()
    code, out, err = command("theirs.pth", *options, *DIGITS)
    assert code == 0, err
    for name in ("knn", "logistic"):
        result = load_result(tmp_path / f"run/{name}.json")
        assert result.card["config"]["arch"] == "torchvision/resnet50" and result.missing() == []
        assert str(result) in out


def test_network_of_timm(command, tmp_path):
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "theirs.safetensors")
    options = "--arch timm/resnet10t --size 32 --protocol knn --out run".split()
    code, _, err = command("theirs.safetensors", *options, *DIGITS)
    assert code == 0, err
    assert load_result(tmp_path / "run/knn.json").card["config"]["arch"] == "timm/resnet10t"


def test_list_of_labels(command, encoder, tmp_path):
    "Files of a folder, of which a list names the labelled ones."
    for part, n in (("train", 12), ("test", 4)):
        for label, photo in enumerate(load_sample_images().images):
            (folder := tmp_path / f"photos/{part}/{'ab'[label]}").mkdir(parents=True)
            for i in range(n):
                box = (9 * i, 5 * i, 9 * i + 300, 5 * i + 300)
                Image.fromarray(photo).crop(box).save(folder / f"{'ab'[label]}{part}{i}.png")
    (tmp_path / "few.txt").write_text("".join(f"{c}_{c}train{i}.png\n" for c in "ab" for i in (1, 5)))
    options = "--data photos --size 32 --bs 8 --workers 0 --epochs 2 --labels few.txt --out run".split()
    code, _, err = command(encoder, *options, "--protocol", "semi")
    assert code == 0, err
    assert load_result(tmp_path / "run/semi-few.json").card["labels"].startswith("4 of 24")
    (tmp_path / "few.txt").write_text("a_nobody.png\n")
    assert command(encoder, *options[:-1], "other", "--protocol", "semi")[0] == 2


def evaluate_and_die(folder: str, argv: list[str]):
    "The command in a process that is killed when it comes to the second protocol."
    def kill(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
    protocols.logistic_accuracy = kill
    os.chdir(folder)
    evaluate(argv)


def test_goes_on_after_a_kill(command, encoder, tmp_path):
    options = [*DIGITS, "--out", "run", "--protocol", "knn,logistic"]
    process = start(tmp_path / "log", evaluate_and_die, str(tmp_path), [str(encoder), *options])
    process.join(120)
    assert process.exitcode == -9, (tmp_path / "log").read_text()
    written = {path.stem: path.read_bytes() for path in (tmp_path / "run").glob("*.json")}
    assert set(written) == {"evaluation", "knn"}
    assert command(encoder, *options)[0] == 0
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert found == {"evaluation.json", "images.json.gz", "knn.json", "logistic.json", "report.html"}
    for name, content in written.items():
        assert (tmp_path / f"run/{name}.json").read_bytes() == content
    assert json.loads(written["evaluation"])["weights_sha256"]


def test_report_shows_results_cards_and_the_papers_numbers(encoder, tmp_path):
    MINIATURES["flowers102"](tmp_path)
    config = EvaluationConfig(str(encoder), "digits", "knn,transfer", size=8, n_train=200,
                              n_valid=100, transfer="flowers102", root=str(tmp_path), workers=0,
                              out=str(tmp_path / "run"))
    run = run_evaluation(config)
    page = (run.folder / "report.html").read_text()
    for name, result in run.results.items():
        assert f"{name}, " in page and f"{result.value:.1%}" in page and "peak_memory_mib" in page
    paper = TRANSFER_RESULTS[1, "linear", "SimCLR"]["flowers102"]
    assert f"<td>{paper:.1f}</td>" in page
    assert str(run).endswith(f"report: {run.folder / 'report.html'}")


def test_other_settings_get_another_folder(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dict(data="digits", protocol="knn", n_train=200, n_valid=100)
    first = run_evaluation(EvaluationConfig(str(encoder), **config))
    again = run_evaluation(EvaluationConfig(str(encoder), **config))
    other = run_evaluation(EvaluationConfig(str(encoder), k=5, **config))
    assert first.folder == again.folder != other.folder and first.results == again.results
    with pytest.raises(ValueError, match=r"\(k \d+, now 7\): give another folder"):
        run_evaluation(EvaluationConfig(str(encoder), k=7, out=str(first.folder), **config))


def noise_folders(root: Path, per_class: dict[str, int]) -> None:
    "Folders of classes with so many training images each, and two test images."
    torch.manual_seed(0)
    for part, counts in (("train", per_class), ("test", dict.fromkeys(per_class, 2))):
        for name, n in counts.items():
            (folder := root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{name}{i}.png")


def test_more_images_are_measured_anew(command, encoder, tmp_path):
    "In another folder by default; a folder of other images says what is new."
    noise_folders(tmp_path / "photos", dict(a=4, b=4))
    options = "--data photos --workers 0 --protocol logistic".split()
    for out in ([], ["--out", "mine"]):
        code, _, err = command(encoder, *options, *out)
        assert code == 0, err
    first, = Path("runs").iterdir()
    assert "8 training images" in load_result(first / "logistic.json").card["labels"]
    noise_folders(tmp_path / "photos", dict(a=6, b=6))
    code, _, err = command(encoder, *options)
    assert code == 0, err
    second, = set(Path("runs").iterdir()) - {first}
    assert "12 training images" in load_result(second / "logistic.json").card["labels"]
    code, _, err = command(encoder, *options, "--out", "mine")
    assert code == 2 and "4 of 12 images new" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("counts", [dict(a=20, b=1), dict(a=3, b=1)])
def test_a_class_with_one_image(command, encoder, tmp_path, counts):
    "Cannot be in every part: the strength is chosen with the parts that have two classes."
    noise_folders(tmp_path / "photos", counts)
    code, out, err = command(encoder, "--data", "photos", "--workers", "0", "--protocol", "logistic")
    assert code == 0 and "logistic" in out, err
