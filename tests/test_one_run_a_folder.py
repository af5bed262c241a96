"Two runs into one folder: the second is refused. Files that kills leave behind are no obstacle, and are removed."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from simclr_nb.cli import evaluate, pretrain
from simclr_nb.core.lock import locked_folder
from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.model.encoder import create_encoder, save_encoder

@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    "For a short run with 24 small pictures without labels, which are not evaluated."
    photos = tmp_path_factory.mktemp("photos")
    flower = Image.fromarray(load_sample_images().images[1])
    for i in range(24): flower.crop((9 * i, 5 * i, 9 * i + 16, 5 * i + 16)).save(photos / f"{i}.png")
    return [str(photos), *"--width 0.0625 --bs 8 --workers 0 --precision fp32 --epochs".split()]


def command(argv: list[str]) -> subprocess.Popen:
    "The command in a process of its own."
    argv = [sys.executable, "-m", "simclr_nb.cli", *argv]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def begun(out: Path, process: subprocess.Popen) -> dict:
    "Wait for a run's first checkpoint; who has the folder."
    deadline = time.monotonic() + 120
    while not list(out.glob("state/*.ckpt")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return json.loads((out / ".lock").read_text())


def refused(call, argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as end: call(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in error, error
    return error


def test_the_second_is_refused(tmp_path, options, capsys):
    """And killed, the first frees the folder and leaves nothing in the way: its lock file is there, half
    a file too; the run goes on, and in the end both are gone."""
    out = tmp_path / "out"
    argv = [*options, "9999", "--out", str(out)]
    first = command(argv)
    who = begun(out, first)
    assert who["pid"] == first.pid
    error = refused(pretrain, [*argv, "--resume"], capsys)
    assert f"out is in use by process {first.pid} on {who['host']}, since {who['time']}: wait" in error
    first.kill()
    first.communicate()
    assert (out / ".lock").exists()
    leftovers = [out / f".report.html.{'a' * 32}.tmp", out / f"state/.images.json.gz.{'b' * 32}.tmp"]
    for path in leftovers: path.touch()
    again = command([*argv, "--resume"])
    deadline = time.monotonic() + 120
    while any(path.exists() for path in leftovers):
        assert again.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    again.send_signal(signal.SIGTERM)
    assert "asked to stop" in again.communicate(timeout=120)[0] and again.returncode == 143
    assert not list(out.glob("**/.*"))  # a run that ends by itself removes its lock


def test_state_left_by_a_kill_in_the_last_moment(tmp_path, options):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").touch()  # of a run that was killed before it wrote anything
    (out / f".config.json.{'0' * 32}.tmp").touch()
    assert pretrain([*options, "1", "--out", str(out)]) == 0
    (out / "state").mkdir()
    (out / "state/step-000000001-0123456789abcdef.ckpt").write_bytes(b"rest")
    assert pretrain([*options, "1", "--out", str(out), "--resume"]) == 0
    assert (out / "report.html").exists() and not (out / "state").exists()
    assert not list(out.glob("**/.*"))


class Elsewhere:
    "Another process that has a folder."

    def __init__(self, folder):
        code = ("import sys; from simclr_nb.core.lock import locked_folder\n"
                "with locked_folder(sys.argv[1]): print(flush=True); sys.stdin.read()")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen([sys.executable, "-c", code, str(folder)], **pipes)
        self.process.stdout.readline()

    def __enter__(self): return self.process.pid

    def __exit__(self, *error): self.process.communicate()


def test_checkpoints_of_a_learner(tmp_path):
    "And after an error the same process may go on."
    dls = simclr_dls("digits", n_train=64, n_valid=32, bs=32, seed=0, device="cpu", progress=False)
    learn = simclr_learner(dls, width=0.0625)
    with learn.no_bar(), learn.no_logging():
        with Elsewhere(tmp_path) as pid:
            with pytest.raises(ValueError, match=f"is in use by process {pid} on"):
                learn.pretrain(1, checkpoints=tmp_path)
        learn.pretrain(1, checkpoints=tmp_path)
        with pytest.raises(ValueError, match="holds checkpoints of another run"):
            learn.pretrain(1, checkpoints=tmp_path)
        learn.pretrain(1, checkpoints=tmp_path, resume=True)
    assert not (tmp_path / ".lock").exists()


def test_an_evaluation(tmp_path, capsys):
    torch.manual_seed(0)
    encoder = save_encoder(create_encoder("resnet18", 0.0625, "cifar"), tmp_path / "e.safetensors")
    argv = [str(encoder), "--data", "digits", "--protocol", "knn", "--out", str(tmp_path / "run")]
    with Elsewhere(tmp_path / "run") as pid:
        assert f"run is in use by process {pid} on" in refused(evaluate, argv, capsys)
    assert evaluate(argv) == 0


def test_a_worker_does_not_keep_the_lock(tmp_path):
    "A forked child outlives its parent for a moment; it has no part in the lock."
    with locked_folder(tmp_path):
        pid = os.fork()
        if not pid:
            time.sleep(30)
            os._exit(0)
    try:
        with Elsewhere(tmp_path): pass
        with locked_folder(tmp_path): pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
