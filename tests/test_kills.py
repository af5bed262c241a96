"""Twenty kills at random moments of the whole command, and of two processes with a loss that has state.

Nothing chooses the moment: a kill may meet an import, a step, a write, the evaluation, the last
clean-up. Runs that end before their kill begin anew, until there were as many kills as asked for.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simclr_nb.data import simclr_dls
from torchvision.io import write_png

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")]
KILLS = 20
EPOCHS = 5


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    "Digits as PNG files, `train/CLASS` and `test/CLASS`."
    root = tmp_path_factory.mktemp("pictures")
    dls = simclr_dls("digits", n_train=240, n_valid=80, bs=40, seed=0, device="cpu", progress=False)
    for part, loader in zip(("train", "test"), dls, strict=True):
        for i, (x, y) in enumerate(zip(loader.dataset.images, loader.dataset.labels, strict=True)):
            folder = root / part / f"digit {int(y)}"
            folder.mkdir(parents=True, exist_ok=True)
            write_png(x.repeat_interleave(2, 1).repeat_interleave(2, 2), str(folder / f"{i:04}.png"))
    return root


def begin(call: list, log: Path) -> subprocess.Popen:
    env = dict(os.environ, OMP_NUM_THREADS="1")
    with log.open("a") as file:
        return subprocess.Popen(list(map(str, call)), stdout=file, stderr=subprocess.STDOUT, env=env)


def family(pid: int) -> list[int]:
    "A process and all that came from it; torchrun's ranks are in groups of their own."
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try: own = task.read_text().split()
        except OSError: continue  # it has just ended
        for child in own: found += family(int(child))
    return found


def kill_after(process: subprocess.Popen, seconds: float) -> bool:
    "Whether it was killed then, with all its processes; it may have ended before."
    try: process.wait(seconds)
    except subprocess.TimeoutExpired: pass
    was_running = process.poll() is None
    for pid in family(process.pid) if was_running else []:
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
    process.wait()
    return was_running


def finish(call: list, log: Path) -> float:
    "Seconds until it ended with exit code 0."
    start = time.monotonic()
    process = begin(call, log)
    try: process.wait(300)
    finally: kill_after(process, 0)
    assert process.returncode == 0, log.read_text()[-3000:]
    return time.monotonic() - start


def campaign(call: Callable, same_end: Callable, folder: Path, seed: int) -> int:
    "Kill runs until there were enough kills; how many runs that took. Each ends as the first did."
    draws = random.Random(seed)
    log = folder / "log"
    whole = folder / "whole"
    seconds = finish(call(whole, False), log)
    runs = kills = 0
    while kills < KILLS:
        runs += 1
        out = folder / f"run {runs}"
        process = begin(call(out, False), log)
        while kill_after(process, draws.uniform(0.2, 1) * seconds):
            kills += 1
            if kills >= KILLS: break
            process = begin(call(out, True), log)
        if process.returncode: finish(call(out, True), log)
        same_end(whole, out)
        left = [p.name for p in out.rglob("*") if p.name.endswith((".tmp", ".part")) or p.name == "lock"]
        assert not left, left
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
    return runs


def same_weights(a: Path, b: Path):
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    for name in first: assert torch.equal(first[name], second[name]), name


def same_run(a: Path, b: Path):
    "Weights, curves, every accuracy; times of day differ."
    same_weights(a / "encoder.safetensors", b / "encoder.safetensors")
    curves = [[row.split(",")[:-1] for row in (p / "history.csv").read_text().splitlines()]
              for p in (a, b)]
    assert curves[0] == curves[1]
    results = [[(r["value"], r["low"], r["high"]) for r in accuracies(p)] for p in (a, b)]
    assert results[0] == results[1] and results[0]
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())


def accuracies(run: Path) -> list[dict]:
    "All results in `results.json`, in order."
    found = []

    def look(value):
        if isinstance(value, dict):
            if {"value", "low", "high"} <= value.keys(): found.append(value)
            value = list(value.values())
        if isinstance(value, list):
            for v in value: look(v)
    look(json.loads((run / "results.json").read_text()))
    return found


def test_command(pictures, tmp_path):
    def call(out: Path, resume: bool) -> list:
        options = f"--epochs {EPOCHS} --bs 40 --width 0.125 --size 16 --workers 0".split()
        return [sys.executable, "-m", "simclr_nb.cli", pictures, "--out", out, *options,
                *(["--resume"] if resume else [])]
    runs = campaign(call, same_run, tmp_path, seed=0)
    print(f"{KILLS} kills, {runs} runs")


STATEFUL = """
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from simclr_nb.core.processes import is_main
from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.loss.tiled import NTXent
from torch import nn


class Learned(nn.Module):
    "NT-Xent whose temperature is learned, and that counts its calls."

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, out, *labels):
        if self.training: self.calls += 1
        z = out.z if hasattr(out, "z") else out
        return NTXent(1.0, normalize=False)(nn.functional.normalize(z, dim=1) * self.log_scale.exp())


out = Path(sys.argv[1])
torch.manual_seed(0)
dls = simclr_dls("digits", bs=40, n_train=240, n_valid=80, seed=0, device="cpu", progress=False)
learn = simclr_learner(dls, width=0.125, loss=Learned(), precision="fp32")
torch.manual_seed(1)
with learn.no_bar(): learn.pretrain(EPOCHS, checkpoints=out / "state", resume="--resume" in sys.argv)
if is_main():
    state = {f"model.{k}": v for k, v in learn.model.state_dict().items()}
    state |= {f"loss.{k}": v for k, v in learn.loss_func.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, out / "end.safetensors")
"""


def test_two_processes_and_a_loss_with_state(tmp_path):
    (tmp_path / "program.py").write_text(STATEFUL.replace("EPOCHS", str(EPOCHS)))

    def call(out: Path, resume: bool) -> list:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                tmp_path / "program.py", out, *(["--resume"] if resume else [])]

    def same_end(a: Path, b: Path):
        same_weights(a / "end.safetensors", b / "end.safetensors")
        end = load_file(a / "end.safetensors")
        names = [name for name in end if name.startswith("loss.")]
        assert len(names) >= 2, names
        assert any(name.endswith("log_scale") and end[name] != 0.7 for name in names)
        assert any(name.endswith("calls") and end[name] > 0 for name in names)
    campaign(call, same_end, tmp_path, seed=1)
