"Data workers that are slow, that hang, that are spawned: time counts since the last sign of life."
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_nb.images.epochs import EpochLoader

CODE = """
import sys
import torch.multiprocessing
from simclr_nb.data import simclr_dls
if __name__ == "__main__":
    torch.multiprocessing.set_start_method(sys.argv[1])
    seen = []
    for workers in (1, 0):
        dls = simclr_dls("photos", 16, 4, seed=0, num_workers=workers, progress=False, device="cpu",
                         worker_timeout=45)
        seen.append([x.sum().item() for x, y in dls.train])
    assert len(seen[0]) == 2 and seen[0] == seen[1], seen
"""


class Slow:
    "Items that take a while, the batch of them longer than the limit."
    def __len__(self): return 8
    def __getitem__(self, i):
        time.sleep(0.3)
        return torch.tensor([i])


class Stuck(Slow):
    "Storage that answers three times."
    def __getitem__(self, i):
        if i > 2: time.sleep(60)
        return torch.tensor([i])


def test_slow_batch_is_waited_for():
    "8 items of 0.3 s in one batch, a limit of 1 s: the fixed limit on a batch ended this."
    batch, = EpochLoader(Slow(), 8, num_workers=1, timeout=1.0)
    assert sorted(torch.cat(list(batch)).tolist()) == list(range(8))


def test_no_sign_of_life_ends_the_run():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"none has finished an image for 1 s.*worker_timeout"):
        for _ in EpochLoader(Stuck(), 4, num_workers=1, timeout=1.0): pass
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_limit_must_be_positive(timeout):
    with pytest.raises(ValueError, match="worker_timeout must be above 0 s"):
        EpochLoader(Slow(), timeout=timeout)


def test_a_slow_training_step_is_no_sign_of_death():
    "The clock runs only while somebody waits."
    for _ in EpochLoader(Slow(), 2, num_workers=1, timeout=0.8): time.sleep(1.0)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_workers(tmp_path, method):
    "Files of several sizes: the same crops by a worker as without one, and signs of life."
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = rng.integers(0, 256, (40, 40 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    (script := tmp_path / "train.py").write_text(CODE)
    done = subprocess.run([sys.executable, script, method], cwd=tmp_path, capture_output=True,
                          text=True, timeout=180)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_a_long_temporary_folder(tmp_path):
    "Its sockets cannot be made, and the workers were waited for in vain: one line, at once."
    long = tmp_path / ("x" * 90)
    long.mkdir()
    (tmp_path / "photos").mkdir()
    for i in range(6): Image.new("RGB", (40, 41 + i), (i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    done = subprocess.run([sys.executable, "-m", "simclr_nb.cli", "photos", "--workers", "1", "--bs", "2",
                           "--epochs", "1", "--width", "0.0625", "--size", "16"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=180,
                          env=os.environ | dict(TMPDIR=str(long)))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "set TMPDIR to a shorter one, or take 0 workers" in done.stderr.splitlines()[-1]
