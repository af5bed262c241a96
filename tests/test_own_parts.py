"Data set, transform, encoder, head and loss of the user together: killed and resumed, over processes, evaluated."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import own_parts
from own_parts import Blobs, Die, Encoder, fit, outcome, own_learner
from processes import run
from simclr_nb.data import simclr_dls
from simclr_nb.evaluate.features import encoder_features
from simclr_nb.evaluate.frozen import knn_accuracy, linear_evaluation, logistic_accuracy
from simclr_nb.evaluate.tuning import finetune
from simclr_nb.learner import simclr_learner
from simclr_nb.model.encoder import load_encoder
from simclr_nb.model.head import load_head


def die(): raise KeyboardInterrupt  # stands for a kill; fastai catches nothing of it


def same(first: dict, second: dict):
    assert first.keys() == second.keys()
    for name in first: assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("step", [2, 7])
def test_killed_and_resumed(tmp_path, step, micro_batch):
    "In the first epoch and in the second; bit for bit as a run that nobody stopped."
    whole = fit(own_learner(micro_batch), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt): fit(own_learner(micro_batch), tmp_path / "cut", Die(step, die))
    torch.seed()  # as in a new process
    again = fit(own_learner(micro_batch), tmp_path / "cut")
    same({**whole.model.state_dict(), **{k: torch.tensor(v) for k, v in whole.history().items()}},
         {**again.model.state_dict(), **{k: torch.tensor(v) for k, v in again.history().items()}})


def test_it_learns_and_is_evaluated(tmp_path, capsys):
    learn = own_learner()
    assert "loss: loss(z1, z2, temperature=0.2), of all images of a batch" in capsys.readouterr().out
    fit(learn, tmp_path / "state")
    history = learn.history()
    assert history["train_loss"][-1] < 0.9 * history["train_loss"][0] and history["probe"][-1] > 0.25
    encoder = load_encoder(learn.save_encoder(tmp_path / "e.safetensors"), module=Encoder())
    head = load_head(learn.save_head(tmp_path / "h.safetensors"), own_parts.head())
    x = torch.rand(3, 3, 16, 16)
    with torch.no_grad(): assert torch.allclose(head(encoder(x)), learn.model.eval()(x).z, atol=1e-6)
    features = encoder_features(encoder, learn.dls)
    results = [knn_accuracy(features, k=5), logistic_accuracy(features)]
    results += [evaluate(encoder, learn.dls, epochs=2, progress=False) for evaluate in (linear_evaluation, finetune)]
    assert all(result.card["encoder"] and 0 <= result.value <= 1 for result in results)
    assert results[1].value > 0.25, results


def gradients(rank: int, world: int) -> dict:
    "Loss and gradients of one step, in float64, of the function as a loss."
    from simclr_nb.core.processes import shard_rows
    from simclr_nb.loss.functions import FunctionLoss
    from simclr_nb.model.head import Projection
    from simclr_nb.parallel.loss import global_loss
    z = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = list(shard_rows(8, rank, world))
    mine = z[:, rows].flatten(0, 1).requires_grad_()
    value = global_loss(FunctionLoss(own_parts.loss, 0.2))(Projection(mine, mine))
    value.backward()
    return dict(value=value.detach(), rows=torch.tensor(rows), grad=mine.grad.view(2, -1, 5) / world)


def test_a_function_sees_the_views_of_all_processes(tmp_path):
    "Value on every rank, and gradient, as in one process."
    expected = run(gradients, 1, tmp_path / "one")[0]
    for found in run(gradients, 2, tmp_path / "two"):
        assert torch.allclose(found["value"], expected["value"], atol=1e-12, rtol=0)
        assert torch.allclose(found["grad"], expected["grad"][:, found["rows"]], atol=1e-12, rtol=0)


def launched(folder: Path, *argv) -> tuple[int, str]:
    "Exit status of two processes under torchrun, and what they printed."
    folder.mkdir(exist_ok=True)
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            own_parts.__file__, folder, *argv]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(list(map(str, call)), env=env, capture_output=True, text=True, timeout=400)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="torchrun kills by signals")
def test_two_processes_killed_and_resumed(tmp_path):
    "Rank 0 is killed in the middle of steps 2 and 9; both ranks end as if nothing had happened."
    code, told = launched(tmp_path / "whole")
    assert code == 0, told
    for step in (2, 9):
        code, told = launched(tmp_path / "cut", step)
        assert code and not (tmp_path / "cut/end0.pt").exists(), told
    code, told = launched(tmp_path / "cut")
    assert code == 0, told
    for r in (0, 1):
        same(*(torch.load(tmp_path / name / f"end{r}.pt", weights_only=True) for name in ("whole", "cut")))


def test_slips_are_said_in_one_line():
    dls = simclr_dls(Blobs(), bs=16, seed=0, device="cpu", progress=False)
    with pytest.raises(TypeError, match="takes 3 arguments"): simclr_learner(dls, Encoder(), loss=lambda a, b, c: a)
    with pytest.raises(ValueError, match="similarity is for losses by name"):
        simclr_learner(dls, Encoder(), loss=own_parts.loss, similarity="dot")
    with pytest.raises(ValueError, match="does not take h of width 12"):
        simclr_learner(dls, Encoder(), head=nn.Linear(5, 3))
    learn = simclr_learner(dls, Encoder(), loss=lambda z1, z2: (z1 - z2).square().sum(1))
    with pytest.raises(TypeError, match="take the mean"), learn.no_bar(), learn.no_logging(): learn.pretrain(1)
