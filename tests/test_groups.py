"Images of one group are no negatives of each other: the loss, over processes, in a learner, in every split."
import json
import math
import re
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image

from processes import run
from simclr_nb.cli import pretrain
from simclr_nb.core.processes import shard_rows
from simclr_nb.data import simclr_dls
from simclr_nb.evaluate import frozen
from simclr_nb.learner import simclr_learner
from simclr_nb.loss.contrastive import nt_xent
from simclr_nb.loss.tiled import tiled_nt_xent
from simclr_nb.parallel.loss import GroupedNTXent
from simclr_nb.train.checkpoint import CheckpointCallback
from simclr_nb.views.policy import Policy


def reference(z: np.ndarray, groups: list, temperature: float) -> float:
    "Equation 1 in NumPy: the sum in the denominator runs over the images of other groups."
    u, n = z / np.linalg.norm(z, axis=1, keepdims=True), len(groups)
    sim = np.exp(u @ u.T / temperature)
    losses = []
    for row in range(2 * n):
        pair = sim[row, (row + n) % (2 * n)]
        others = sum(sim[row, k] for k in range(2 * n)
                     if k % n != row % n and (groups[k % n] != groups[row % n] or groups[row % n] < 0))
        losses.append(math.log((pair + others) / pair))
    return float(np.mean(losses))


@pytest.mark.parametrize("n, groups", [(12, 5), (40, 3), (300, 60)])
def test_dense_tiled_and_reference(n, groups):
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(2 * n, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, groups, (n,), generator=generator)
    dense = nt_xent(z, 0.2, groups=labels)
    assert abs(dense.item() - reference(z.detach().numpy(), labels.tolist(), 0.2)) < 1e-10
    gradient, = torch.autograd.grad(dense, z)
    for tile in (7, 64, None):
        tiled = tiled_nt_xent(z, 0.2, tile=tile, groups=labels)
        assert abs((tiled - dense).item()) < 1e-10
        assert torch.allclose(torch.autograd.grad(tiled, z)[0], gradient, atol=1e-12, rtol=0)
    single = tiled_nt_xent(z.float(), 0.2, groups=labels)
    assert abs(single.item() - dense.item()) < 1e-4
    size = (labels[:, None] == labels).sum(1).where(labels >= 0, 1)
    collapsed = nt_xent(torch.ones(2 * n, 3, dtype=torch.float64), groups=labels)
    assert abs(collapsed.item() - (2 * n + 1 - 2 * size.double()).log().mean().item()) < 1e-12


def loss_of_a_rank(rank: int, world: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    groups = torch.tensor([0, 1, -1, 0, 2, 1, -1, 0])
    rows = list(shard_rows(8, rank, world))
    mine = z[:, rows].flatten(0, 1).requires_grad_()
    loss = GroupedNTXent(0.3)
    loss.groups = groups[rows]
    value = loss(mine)
    (value / world).backward()
    return dict(value=value.detach(), rows=torch.tensor(rows), grad=mine.grad.view(2, -1, 5))


def test_it_is_the_same_over_processes(tmp_path):
    one = run(loss_of_a_rank, 1, tmp_path / "one")[0]
    found = run(loss_of_a_rank, 2, tmp_path / "two")
    assert abs((sum(f["value"] for f in found) / 2 - one["value"]).item()) < 1e-12
    for f in found: assert torch.allclose(f["grad"], one["grad"][:, f["rows"]], atol=1e-12, rtol=0)


def patients(root: Path) -> Path:
    "40 pictures of ten patients, who are also their classes."
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / f"{i:02}.png")
        rows.append(dict(path=f"{i:02}.png", label=f"{i % 10}", patient=f"{i % 10}"))
    pd.DataFrame(rows).sample(frac=1, random_state=0).to_csv(root / "all.csv", index=False)
    return root / "all.csv"


@pytest.fixture(scope="module")
def table(tmp_path_factory): return patients(tmp_path_factory.mktemp("patients"))


class Compare(Callback):
    "The loss of each batch beside that with the labels of the batch as groups."
    order = 7

    def before_fit(self): self.steps = {True: 0, False: 0}

    def after_loss(self):
        expected = nt_xent(self.pred.z.detach(), 0.5, groups=self.yb[0].cpu())
        plain = nt_xent(self.pred.z.detach(), 0.5)
        assert torch.allclose(self.loss.detach(), expected, atol=1e-6)
        if self.training: assert abs(plain - expected) > 1e-4  # it makes a difference
        self.steps[self.training] += 1


def learner(table, **options):
    dls = simclr_dls(table, bs=16, seed=0, device="cpu", num_workers=0, progress=False)
    torch.manual_seed(0)
    return simclr_learner(dls, width=0.0625, precision="fp32", groups=True, **options)


def fit(learn, cbs=None, epochs=3):
    with learn.no_bar(), learn.no_logging(): learn.pretrain(epochs, cbs=cbs)
    return learn


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_learner_tells_the_loss(table, micro_batch, capsys):
    learn = fit(learner(table, cbs=Compare(), micro_batch=micro_batch))
    assert "groups: 9, whose images are no negatives of each other" in capsys.readouterr().out
    assert learn.compare.steps[True] == 6 and learn.compare.steps[False] == 3
    assert learn.loss_func.groups is None


def test_resumed_in_the_middle_of_an_epoch(table, tmp_path):
    class Stop(Callback):
        order = 100
        def after_batch(self):
            if self.training and self.train_iter == 3: raise KeyboardInterrupt
    saving = partial(CheckpointCallback, tmp_path, every_steps=1)
    whole = fit(learner(table))
    with pytest.raises(KeyboardInterrupt): fit(learner(table), [Stop(), saving()])
    again = fit(learner(table), [saving(resume=True)])
    for name in ("train_loss", "valid_loss"): assert whole.history()[name] == again.history()[name]
    for name, value in whole.model.state_dict().items(): assert torch.equal(value, again.model.state_dict()[name])


@pytest.mark.parametrize("part", [None, 0.2, 0.5])
def test_no_split_divides_a_group(table, part):
    dls = simclr_dls(table, bs=8, valid_part=part, seed=0, device="cpu", num_workers=0, progress=False)
    train, valid = (set(groups.tolist()) for groups in dls.groups)
    assert train and valid and not train & valid
    assert all(len(groups) % 4 == 0 for groups in dls.groups)  # four pictures of each


@pytest.mark.parametrize("options, words", [
    (dict(loss="nt_logistic"), "for the loss 'nt_xent'"), (dict(loss=lambda z: z.mean()), "for the loss 'nt_xent'")])
def test_other_losses_are_refused(table, options, words):
    with pytest.raises(ValueError, match=words): learner(table, **options)
    dls = simclr_dls("digits", n_train=64, n_valid=32, progress=False)
    with pytest.raises(ValueError, match="needs a table with a column of groups"): simclr_learner(dls, groups=True)


# The command

COMMAND = "--epochs 1 --bs 16 --width 0.0625 --size 16 --workers 0 --precision fp32".split()


@pytest.fixture
def clinic(table, tmp_path, monkeypatch):
    "The pictures of the ten patients, who are of two classes; runs start in an empty folder."
    monkeypatch.chdir(tmp_path)
    frame = pd.read_csv(table, dtype=str)
    frame["path"] = [str(table.parent / name) for name in frame["path"]]
    frame["label"] = ["sick" if int(patient) % 2 else "well" for patient in frame["patient"]]
    frame.to_csv("clinic.csv", index=False)
    return frame


def test_the_command_keeps_groups_apart(clinic, call, monkeypatch):
    losses, parts = [], []
    forward, held_out_parts = GroupedNTXent.forward, frozen.held_out_parts

    def recorded(self, z, *labels):
        loss = forward(self, z, *labels)
        z = getattr(z, "z", z).detach()
        expected = reference(z.double().numpy(), self.groups.tolist(), 0.2)
        losses.append((len(z), loss.item(), expected))
        return loss

    def seen(y, groups, **kwargs):
        found = held_out_parts(y, groups, **kwargs)
        parts.extend((groups, *part) for part in found)
        return found
    monkeypatch.setattr(GroupedNTXent, "forward", recorded)
    monkeypatch.setattr(frozen, "held_out_parts", seen)
    code, out, err = call(pretrain, "clinic.csv", "--groups", "--out", "run", *COMMAND)
    assert code == 0, err
    assert out.count("groups: 9, whose images are no negatives of each other\n") == 1
    assert len(losses) == 3 and all(abs(loss - expected) < 1e-4 for _, loss, expected in losses)
    history = pd.read_csv("run/history.csv")
    assert history["train_loss"][0] == pytest.approx(np.mean([x[1] for x in losses[:2]]), abs=1e-3)

    assert len(parts) >= 6  # at least two parts for pixels, the untrained and the trained encoder
    for groups, fitted, held_out in parts:
        fitted, held_out = ({groups[row] for row in rows.tolist()} for rows in (fitted, held_out))
        assert fitted and held_out and not fitted & held_out
    names = {path.name: patient for path, patient in zip(map(Path, clinic["path"]), clinic["patient"])}
    dls = simclr_dls("clinic.csv", size=16, bs=16, device="cpu", progress=False)
    train, valid = ({names[path.name] for path in dl.dataset.paths} for dl in dls)
    assert len(train) == 9 and len(valid) == 1 and not train & valid
    results = json.loads(Path("run/results.json").read_text())
    assert results["all labels"]["pretrained"]["card"]["selection"].endswith(", no group split")

    assert call(pretrain, "clinic.csv", "--groups", "--out", "run", "--resume", *COMMAND)[0] == 0
    code, _, err = call(pretrain, "clinic.csv", "--out", "run", "--resume", *COMMAND)
    assert code == 2 and "groups True, now None" in err
    assert re.search("<pre>simclr-pretrain clinic.csv [^<]*--groups", Path("run/report.html").read_text())


@pytest.mark.parametrize("data, options, words", [
    ("digits", ["--groups"], "(--groups) needs a table with a column of groups"),
    ("plain.csv", ["--groups"], "name one group or patient or patient_id or video or place"),
    ("clinic.csv", ["--groups", "--loss", "nt_logistic"], "(--groups) is for the loss 'nt_xent'"),
    ("clinic.csv", ["--groups", "--method", "moco"], "moco has no groups, got True")])
def test_the_command_refuses_groups(clinic, call, data, options, words):
    clinic.drop(columns="patient").to_csv("plain.csv", index=False)
    code, _, err = call(pretrain, data, *options, "--out", "run", *COMMAND)
    assert (code, err.count("\n")) == (2, 1) and words in err, err
    assert not Path("run").exists()


def epoch_of_a_rank(rank: int, world: int) -> dict:
    with TemporaryDirectory() as folder:
        learn = learner(patients(Path(folder)), policy=Policy("as they are", [], size=16))
        losses = fit(learn, epochs=1).history()
    return {name: torch.tensor(losses[name]) for name in ("train_loss", "valid_loss")}


def test_a_learner_over_processes(tmp_path):
    one, two = (run(epoch_of_a_rank, world, tmp_path / str(world))[0] for world in (1, 2))
    for name, value in one.items(): assert torch.allclose(value, two[name], atol=1e-3), name
