"""InstDisc: a learner over processes, micro-batches, and runs that are killed.

The authors' numbers of its loss and bank are in `test_memory.py`.
"""
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from processes import run
from simclr_nb.data import simclr_dls
from simclr_nb.methods.instdisc import InstDisc, InstDiscLoss, instdisc_learner
from simclr_nb.parallel.microbatch import replace_norms
from test_parallel import Rounded, close


def small(**options):
    torch.manual_seed(0)
    dls = simclr_dls("digits", bs=32, n_train=128, n_valid=64, seed=0, device="cpu", progress=False)
    return instdisc_learner(dls, width=0.0625, temperature=0.1, precision="fp32", **options)


def train(learn, epochs: int = 2, **options) -> dict:
    with learn.no_bar(), learn.no_logging(): learn.pretrain(epochs, lr=0.1, **options)
    columns = {k: v for k, v in learn.history().items() if k != "valid_loss"}  # that is NaN
    history = {f"history {k}": torch.tensor(v) for k, v in columns.items()}
    weights = {k: v for k, v in learn.model.state_dict().items() if v.is_floating_point()}
    return {**weights, **history}


def learner_in_processes(rank: int, world: int) -> dict:
    learn = small(cbs=[Rounded()])
    learn.model.double()
    learn.model.memory.rows.add_(rank)  # rank 0 decides
    learn.model.encoder.register_forward_pre_hook(lambda m, x: x[0].double())
    learn.views.two_views = lambda x: x.double() / 255
    learn.probe._start(torch.empty(0, learn.model.encoder.out_dim))  # equal in all runs
    found = train(learn)
    assert type(learn.loss_func) is InstDiscLoss and type(learn.model) is InstDisc
    return found


def test_learner_is_that_of_one_process(tmp_path):
    "Weights, bank, losses, accuracies, on both ranks."
    expected = run(learner_in_processes, 1, tmp_path / "one")[0]
    assert "memory.rows" in expected
    for found in run(learner_in_processes, 2, tmp_path / "two"): close(found, expected)


def test_micro_batches_are_the_whole_batch_without_batch_norm():
    "One step of the loss against the bank needs no other image."
    ends = []
    for micro_batch in (None, 5):
        learn = small(micro_batch=micro_batch)
        replace_norms(learn.model, "group")
        learn.model.double()
        learn.model.encoder.register_forward_pre_hook(lambda m, x: x[0].double())
        learn.views.two_views = lambda x: x.double() / 255
        with learn.no_bar(), learn.no_logging(): learn.pretrain(1, lr=0.1)
        ends.append({k: v for k, v in learn.model.state_dict().items() if v.is_floating_point()})
    for name, value in ends[0].items():
        assert torch.allclose(ends[1][name], value, rtol=0, atol=1e-9), name
    assert ends[0]["memory.rows"].norm(dim=1).sub(1).abs().max() < 1e-9  # every row was renewed


PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
from fastai.callback.core import Callback
from safetensors.torch import save_file
from simclr_nb.data import simclr_dls
from simclr_nb.methods.cmc import cmc_learner
from simclr_nb.methods.cpc import cpc_learner
from simclr_nb.methods.instdisc import instdisc_learner
from simclr_nb.methods.moco import moco_learner
from simclr_nb.train.checkpoint import CheckpointCallback


class Kill(Callback):
    order = 90
    def after_batch(self):
        if self.training and self.train_iter == at: os.kill(os.getpid(), signal.SIGKILL)


method, out, at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
size = 32 if method == "cpc" else None
dls = simclr_dls("digits", size=size, bs=32, n_train=96, n_valid=64, seed=0, device="cpu",
                 progress=False)
options = dict(width=0.0625, precision="fp32")
if method == "cpc": learn = cpc_learner(dls, "cpc/4-1", blocks=1, precision="fp32")
elif method == "cmc":
    for loader in dls: loader.dataset.images[:, 2] = 100  # no longer grey
    learn = cmc_learner(dls, negatives=20, width=0.125, precision="fp32")
elif method == "moco": learn = moco_learner(dls, negatives=64, version="v1", **options)
else: learn = instdisc_learner(dls, negatives=20, **options)
torch.manual_seed(1)
resume = out.is_dir()
with learn.no_bar(), learn.no_logging():
    saving = CheckpointCallback(out, every_steps=2, resume=resume)
    learn.pretrain(4, cbs=[saving, Kill()])
save_file({k: v.contiguous() for k, v in learn.model.state_dict().items()}, f"{out}.safetensors")
"""


def call(program: Path, method: str, out: Path, at: int) -> int:
    done = subprocess.run([sys.executable, program, method, out, str(at)], timeout=200,
                          capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def killed_runs_end_alike(method: str, steps: list[int], folder: Path):
    "One SIGKILL after each of these steps of a run of its own; the end is bit-identical."
    program = folder / "program.py"
    program.write_text(PROGRAM)
    assert call(program, method, folder / "whole", -1) == 0
    whole = load_file(folder / "whole.safetensors")
    for at in steps:
        out = folder / f"killed at {at}"
        assert call(program, method, out, at) == -signal.SIGKILL
        assert call(program, method, out, -1) == 0
        again = load_file(f"{out}.safetensors")
        assert again.keys() == whole.keys()
        for name, value in whole.items(): assert torch.equal(again[name], value), (at, name)
    memory = dict(instdisc={"memory.rows", "memory.normalizer"},
                  moco={"queue.keys", "queue.pointer"},
                  cmc={"memories.0.rows", "memories.1.rows", "memories.0.normalizer"}, cpc=set())
    assert memory[method] < whole.keys()


@pytest.mark.parametrize("method", ["instdisc", "moco"])
def test_one_kill(method, tmp_path):
    "In the middle of the second epoch, one step after a state was saved."
    killed_runs_end_alike(method, [5], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["instdisc", "moco"])
def test_ten_kills(method, tmp_path):
    "After each of the first ten of twelve steps: states are saved at some, epochs end at others."
    killed_runs_end_alike(method, list(range(1, 11)), tmp_path)
