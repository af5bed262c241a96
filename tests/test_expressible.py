"Every setting that an experiment needs: heads, losses, optimisers, splits; by the command and in Python."
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from simclr_nb.cli import pretrain
from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.model.encoder import load_encoder
from simclr_nb.model.head import SimCLR, load_head
from simclr_nb.studies.composition import composition_policy
from simclr_nb.views.policy import create_policy

SMALL = "--epochs 1 --width 0.125 --n-train 200 --n-valid 100".split()


@pytest.fixture
def command(call, tmp_path, monkeypatch):
    "Runs the command in an empty folder: its exit code, standard output and standard error."
    monkeypatch.chdir(tmp_path)
    return partial(call, pretrain)


@pytest.fixture(scope="module")
def dls(): return simclr_dls("digits", bs=64, n_train=128, n_valid=64, seed=0, progress=False)


def fit(learn, epochs: int = 1):
    with learn.no_bar(), learn.no_logging(): learn.pretrain(epochs)
    return learn


def test_command_takes_every_part(command, tmp_path):
    options = ("--loss nt_logistic --similarity dot --head linear --out-dim 32 --batch-norm --stem imagenet"
               " --optimizer adam --lr 0.0001 --scaling none --weight-decay 0.001 --warmup-epochs 0.5"
               " --second-policy paper --policy paper --size 16 --temperature 1 --out run").split()
    code, _, err = command("digits", *SMALL, *options)
    assert (code, err) == (0, "")
    config = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert (config["head"], config["optimizer"], config["similarity"]) == ("linear", "adam", "dot")
    head = load_head(tmp_path / "run/head.safetensors")
    assert head.config["out_dim"] == 32 and len([m for m in head if isinstance(m, nn.Linear)]) == 1


@pytest.mark.parametrize("option, value, word", [
    ("loss", "nt_xnt", "nt_xent"), ("head", "mpl", "mlp"), ("optimizer", "larz", "lars"),
    ("similarity", "euclid", "cosine"), ("stem", "cifer", "cifar"), ("second-policy", "papr", "paper"),
    ("weight-decay", "-1", "at least 0"), ("weight-decay", "nan", "finite"), ("warmup-epochs", "-1", "0"),
    ("warmup-epochs", "7", "0 to 1"), ("hidden-layers", "-1", "0 or more"), ("out-dim", "0", "at least 1"),
    ("optimizer", "adam", "give lr"), ("valid-part", "1", "(0, 1)")])
def test_what_cannot_be_is_refused_at_once(command, tmp_path, option, value, word):
    code, out, err = command("digits", *SMALL, f"--{option}={value}")
    assert (code, err.count("\n")) == (2, 1) and word in err, err
    assert list(tmp_path.iterdir()) == []


def test_saved_head_gives_the_same_z(dls, tmp_path):
    learn = fit(simclr_learner(dls, width=0.125, out_dim=16))
    learn.save_encoder(tmp_path / "encoder.safetensors")
    learn.save_head(tmp_path / "head.safetensors", epochs=1)
    model = SimCLR(load_encoder(tmp_path / "encoder.safetensors"), load_head(tmp_path / "head.safetensors"))
    x = torch.rand(4, 3, 16, 16)
    with torch.no_grad(): torch.testing.assert_close(model(x).z, learn.model.eval().cpu()(x).z)


@pytest.mark.parametrize("head, width", [("identity", 64), ("linear", 128), ("mlp", 128), (nn.Linear(64, 7), 7)])
def test_heads_train(dls, head, width):
    learn = fit(simclr_learner(dls, width=0.125, head=head))
    with torch.no_grad(): assert learn.model(torch.rand(2, 3, 16, 16)).z.shape == (2, width)


def test_policy_without_crop(dls, tmp_path):
    "Figure 5's single operators: a raw TypeError before."
    learn = fit(simclr_learner(dls, width=0.125, policy=composition_policy(["color"], 16)))
    learn.save_encoder(tmp_path / "e.safetensors")
    assert load_encoder(tmp_path / "e.safetensors").metadata["size"] == dls.valid.dataset.images.shape[-1]


def test_shared_crop_of_figure_5(dls):
    "One crop for both branches, the operator on one branch."
    nothing = composition_policy([], 16)
    learn = simclr_learner(dls, width=0.125, policy=nothing, second_policy=composition_policy(["color"], 16),
                           shared=composition_policy(["crop"], 16))
    fit(learn)
    x = learn.views.two_views(dls.train.one_batch()[0])
    assert x.shape[-1] == 16 and not torch.equal(*x.chunk(2))
    same = simclr_learner(dls, width=0.125, policy=nothing, shared=composition_policy(["crop"], 16))
    assert torch.equal(*same.views.two_views(dls.train.one_batch()[0]).chunk(2))


def test_validation_part_of_the_training_images(command, tmp_path):
    "Choices never see the test images; the card says so."
    code, out, err = command("digits", *SMALL, "--valid-part=0.2", "--out=run")
    assert (code, err) == (0, "") and "of the training images, for choices" in out
    split = "269 of the training images, for choices; the test images stay unseen"
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["split"] == split
    card = json.loads((tmp_path / "run/results.json").read_text())["k-NN"]["pretrained"]["card"]
    assert card["data"]["split"] == split
    test = simclr_dls("digits", progress=False).valid.dataset.images.flatten(1)
    part = simclr_dls("digits", valid_part=0.2, progress=False)
    rows = {tuple(x.tolist()) for x in test}
    train = simclr_dls("digits", progress=False).train.dataset.images.flatten(1)
    known = {tuple(x.tolist()) for x in train}
    held = [tuple(x.tolist()) for x in part.valid.dataset.images.flatten(1)]
    assert set(held) <= known and not set(held) & (rows - known)


# Notices

def test_notice_of_identical_views(dls, capsys):
    learn = simclr_learner(dls, width=0.125, policy=composition_policy([], 16))
    learn.pretrain(2)
    assert capsys.readouterr().out.count("notice: both views of each image are identical") == 1


def test_notice_of_a_loss_of_guessing(dls, capsys):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.ones(1, 8))
        def forward(self, h): return self.shift + 0 * h[:, :8]
    learn = simclr_learner(dls, width=0.125, head=Constant())
    learn.pretrain(3)
    assert capsys.readouterr().out.count("is still that of guessing, log(2N - 1) = 4.844") == 1


def test_no_notice_of_a_run_that_learns(capsys):
    dls = simclr_dls("digits", bs=128, seed=0, progress=False)
    simclr_learner(dls, width=0.125).pretrain(4)
    assert "notice" not in capsys.readouterr().out


# More epochs for a finished run

def test_run_that_begins_with_a_finished_one(command, tmp_path):
    "Encoder, head and momentum go on; without the state it is said."
    options = ["digits", *SMALL, "--lr=0", "--warmup-epochs=0"]  # nothing moves but running averages
    assert command("digits", *SMALL, "--keep-state", "--out=first")[0] == 0
    code, out, err = command(*options, "--init=first", "--out=second")
    assert (code, err) == (0, "") and "beginning with encoder, head and optimiser of first" in out
    first, second = (load_head(tmp_path / name / "head.safetensors")[0].weight for name in ("first", "second"))
    assert (first - second).abs().max() > 0  # the momentum of the first run moves it
    assert command("digits", *SMALL, "--out=first", "--resume", "--keep-state")[0] == 0
    assert (tmp_path / "first/state").is_dir() and not (tmp_path / "second/state").exists()
    code, out, err = command(*options, "--init=second", "--out=third")
    assert (code, err) == (0, "") and "its optimiser was not kept, see --keep-state" in out
    third = load_head(tmp_path / "third/head.safetensors")[0].weight
    assert torch.equal(second, third)


@pytest.mark.parametrize("change, word", [
    (["--init=nowhere"], "no encoder file 'nowhere/encoder.safetensors'"),
    (["--init=first", "--optimizer=sgd", "--lr=0.1"], "was trained by LARS, this one by SGD"),
    (["--init=first", "--out-dim=16"], "does not fit")])
def test_init_that_does_not_fit(command, tmp_path, change, word):
    assert command("digits", *SMALL, "--keep-state", "--out=first")[0] == 0
    code, _, err = command("digits", *SMALL, *change, "--out=second")
    assert (code, err.count("\n")) == (2, 1) and word in err, err


def test_run_of_an_older_version_goes_on(command, tmp_path):
    "Its config.json knows none of the newer settings."
    import simclr_nb.run.pretrain as runs
    assert command("digits", *SMALL, "--out=run")[0] == 0
    path = tmp_path / "run/config.json"
    saved = json.loads(path.read_text())
    newer = "loss similarity head batch_norm stem init keep_state valid_part worker_timeout second_policy".split()
    for name in newer: del saved["config"][name]
    path.write_text(json.dumps(saved))
    (tmp_path / "run/report.html").unlink()
    code, _, err = command("digits", *SMALL, "--out=run", "--resume")
    assert (code, err) == (0, "") and runs.RunConfig().keep_state is False
