"""A run in which every part is the user's: data set, transform, encoder, head and loss.

Run as a program: `own_parts.py FOLDER [STEP]` trains in FOLDER, resumes what is there, and, given a
step, kills the process of rank 0 in the middle of it. Imported by `test_own_parts`.
"""
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from torch import nn

from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.train.checkpoint import CheckpointCallback

EPOCHS = 3
FADE = np.random.default_rng()  # of the transform; no seed of its own


class Blobs(torch.utils.data.Dataset):
    "96 pictures of a bright spot, in four classes by its quarter."

    def __len__(self): return 96

    def __getitem__(self, i):
        pixels = np.random.default_rng(i).integers(0, 80, (16, 16, 3), dtype=np.uint8)
        row, column = 8 * (i % 4 // 2) + 4, 8 * (i % 2) + 4
        pixels[row - 2:row + 2, column - 2:column + 2] += 120
        return pixels, f"quarter {i % 4}"


def transform(image):
    "A shift by torch's generator and a fade by one of NumPy's."
    shift = torch.randint(-3, 4, (2,)).tolist()
    return (image.roll(shift, (1, 2)) / 255) * float(FADE.uniform(0.5, 1))


class Encoder(nn.Module):
    "Two convolutions; it has BatchNorm, and knows its width."
    out_dim = 12

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2))

    def forward(self, x): return self.layers(x).mean((2, 3))


def head(): return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 6))


def loss(z1, z2, temperature):
    "InfoNCE from first to second views."
    logits = F.normalize(z1) @ F.normalize(z2).T / temperature
    return F.cross_entropy(logits, torch.arange(len(z1)))


def own_learner(micro_batch=None):
    dls = simclr_dls(Blobs(), bs=16, policy=transform, seed=0, device="cpu", valid_part=None, progress=False)
    torch.manual_seed(0)
    return simclr_learner(dls, Encoder(), head=head(), loss=loss, temperature=0.2, precision="fp32",
                          optimizer="adam", micro_batch=micro_batch)


class Die(Callback):
    "An end without notice, in the middle of a step."
    order = 4

    def __init__(self, step, end): self.step, self.end = step, end

    def after_loss(self):
        if self.training and self.train_iter == self.step: self.end()


def fit(learn, folder, *cbs):
    saving = CheckpointCallback(folder, every_steps=1, resume=True)
    with learn.no_bar(), learn.no_logging():
        learn.pretrain(EPOCHS, lr=0.01, scaling="none", cbs=[saving, *cbs])
    return learn


def outcome(learn) -> dict:
    "Everything that a run ends with."
    columns = {f"column {name}": torch.tensor(values) for name, values in learn.history().items()}
    return {**learn.model.state_dict(), **columns, "random": torch.get_rng_state(),
            "probe": learn.probe.classifier[1].weight.detach()}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    rank = int(os.environ.get("RANK", 0))
    deaths = []
    if len(sys.argv) > 2 and rank == 0:
        deaths.append(Die(int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL)))
    torch.save(outcome(fit(own_learner(), out / "state", *deaths)), out / f"end{rank}.pt")
