"Does it learn? The two promised experiments; and a wheel far from the repository. For `make slow`."
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simclr_nb.run.pretrain import run_pretraining
from simclr_nb.run.config import RunConfig

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
CIFAR10 = dict(n_train=10_000, n_valid=2_000, arch="resnet18", width=0.25, epochs=12, bs=256)


def points(folder: Path, protocol: str) -> dict[str, float]:
    "Accuracy in percent of each feature, from the file that a run leaves."
    column = json.loads((folder / "results.json").read_text())[protocol]
    return {name: 100 * result["value"] for name, result in column.items()}


@pytest.mark.parametrize("seed", range(3))
def test_digits(tmp_path, seed):
    "With 10 labels per class: 10 points above the untrained encoder, 3 above raw pixels."
    run = run_pretraining(RunConfig("digits", seed=seed, out=str(tmp_path / "run")))
    accuracy = points(run.folder, "10 labels per class")
    print(f"digits, seed {seed}: {accuracy}")
    assert accuracy["pretrained"] >= accuracy["random"] + 10
    assert accuracy["pretrained"] >= accuracy["pixels"] + 3


@pytest.mark.parametrize("seed", range(3))
def test_cifar10(tmp_path, cifar10, seed):
    "k-NN 10 points above the untrained encoder, with the whole run in under ten minutes."
    start = time.perf_counter()
    run = run_pretraining(RunConfig("cifar10", seed=seed, out=str(tmp_path / "run"), **CIFAR10))
    seconds = time.perf_counter() - start
    accuracy = points(run.folder, "k-NN")
    print(f"CIFAR-10, seed {seed}: {accuracy}, {seconds:.0f} s")
    assert accuracy["pretrained"] >= accuracy["random"] + 10
    assert seconds < 600


def run_command(*command, cwd: Path) -> str:
    capture = dict(capture_output=True, text=True, timeout=1800)
    done = subprocess.run([str(c) for c in command], cwd=cwd, **capture)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel(tmp_path):
    "Built from the tree, installed into a fresh environment, run in a folder of its own."
    (tree := tmp_path / "tree").mkdir()
    for name in "settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE".split():
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "simclr_nb", tree / "simclr_nb")
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path]
    run_command(*build, tree, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    run_command(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    programs = tmp_path / "venv" / "bin"
    run_command(programs / "python", "-m", "pip", "install", "-q", wheel, cwd=tmp_path)
    (away := tmp_path / "away").mkdir()
    where = "import simclr_nb; print(simclr_nb.__file__)"
    origin = run_command(programs / "python", "-c", where, cwd=away)
    assert Path(origin.strip()).is_relative_to(tmp_path / "venv")
    run_command(programs / "simclr-pretrain", "--epochs", "2", "--width", "0.125", cwd=away)
    (folder,) = (away / "runs").iterdir()
    assert set(points(folder, "10 labels per class")) == {"pixels", "random", "pretrained"}
    page = (folder / "report.html").read_text()
    assert page.count("<figure><img") == 4 and "://" not in page
