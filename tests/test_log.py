"""The logs of `log_cases.py`, in a process of their own.

Weights & Biases and MLflow leave threads behind. A process that has such threads must not fork, and
later tests of this process do.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from simclr_nb.core.processes import launch
from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.train.log import LogCallback

CASES = Path(__file__).with_name("log_cases.py")


def test_cases():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    env = {name: value for name, value in os.environ.items() if name != "SIMCLR_NB_REQUIRE_DATA"}
    done = subprocess.run(command, cwd=CASES.parent.parent, env=env, capture_output=True, text=True,
                          timeout=900)  # the logs need no real images
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed, = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 15, done.stdout


def on_two_ranks(folder: str) -> int:
    torch.manual_seed(0)
    dls = simclr_dls("digits", bs=64, n_train=128, n_valid=64, seed=0, device="cpu")
    learn = simclr_learner(dls, width=0.125)
    logger = LogCallback("csv", folder, every=1)
    with learn.no_bar(), learn.no_logging(): learn.pretrain(1, cbs=logger)
    return len(logger.run_log.trackers)


def test_only_the_first_process_writes(tmp_path):
    launch(on_two_ranks, str(tmp_path / "log"))
    rows = (tmp_path / "log/log.csv").read_text().splitlines()
    steps = [row.split(",")[0] for row in rows if ",step/loss," in row]
    assert steps == ["0", "1"] and [p.name for p in (tmp_path / "log").iterdir()] == ["log.csv"]
