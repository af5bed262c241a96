"A run from the outside: a quiet import, the same result twice, fastai's verbs, errors that help."
import copy
import random
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import lr_find  # noqa: F401, adds `lr_find` to Learner
from fastai.data.transforms import Normalize
from fastai.learner import load_learner
from fastai.optimizer import Adam
from fastai.vision.augment import Resize
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

from simclr_nb.cli import pretrain
from simclr_nb.data import simclr_dls
from simclr_nb.model.encoder import load_encoder
from simclr_nb.learner import simclr_learner
from simclr_nb.run.config import METHODS, RunConfig, complete_config
from simclr_nb.run.pretrain import run_pretraining

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    "Two classes of photographs of several sizes."
    folder = tmp_path_factory.mktemp("photos")
    for label, photo in zip(["palace", "flower"], load_sample_images().images, strict=True):
        (folder / label).mkdir()
        for i in range(12):
            Image.fromarray(photo).resize((60 + i, 40)).save(folder / label / f"{i}.png")
    return folder


def quiet(learn, fit, *args, **kwargs):
    "Fit without a word."
    with learn.no_bar(), learn.no_logging(): fit(*args, **kwargs)
    return learn


def digits_learner(n_train=256, **kwargs):
    torch.manual_seed(0)
    dls = simclr_dls("digits", bs=64, n_train=n_train, n_valid=64, seed=0)
    return simclr_learner(dls, width=0.125, **kwargs)


def weights(model): return {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}


def differing(first: dict, second: dict) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.fixture
def autocast_off():
    "Keeps what a test leaves switched on from the tests that follow."
    yield
    torch.set_autocast_enabled("cpu", False)
    for _ in range(torch.autocast_increment_nesting()): torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


# Import

PROBE = """
import sys
sys.modules.update(dict.fromkeys(["IPython", "ipykernel", "nbdev"]))  # importing them fails
import numpy, torch  # not Python's random: spaCy, which fastai imports, draws from it
before = str(numpy.random.get_state()), torch.get_rng_state().tolist()
from simclr_nb.learner import simclr_learner
after = str(numpy.random.get_state()), torch.get_rng_state().tolist()
assert after == before, "the import draws random numbers"
assert not torch.cuda.is_initialized(), "the import starts CUDA"
import matplotlib
pyplot = sys.modules.get("matplotlib.pyplot")
assert not pyplot or not pyplot.get_fignums(), "the import opens figures"
backend = dict.__getitem__(matplotlib.rcParams, "backend")
assert not isinstance(backend, str), f"the import chooses the backend {backend}"
"""


def test_import_of_the_learner_is_quiet(tmp_path):
    "Without Jupyter, display or GPU; in a home where nothing may appear."
    (home := tmp_path / "home").mkdir()
    env = dict(HOME=str(home), PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1",
               CUDA_VISIBLE_DEVICES="", MPLCONFIGDIR=str(tmp_path))
    capture = dict(capture_output=True, text=True, timeout=120)
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=home, env=env, **capture)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(home.rglob("*")) == []


# Same seed, same result

def command_run(folder: Path, data: Path, seed: int) -> tuple[dict, str]:
    "Weights, and history without the times."
    random.seed(); np.random.seed(); torch.seed()  # what came before must not matter
    options = f"--width 0.125 --epochs 2 --size 32 --bs 5 --workers 2 --seed {seed} --out".split()
    assert pretrain([str(data), *options, str(folder)]) == 0
    history = re.sub(r",[\d:]+$", "", (folder / "history.csv").read_text(), flags=re.M)
    return weights(load_encoder(folder / "encoder.safetensors")), history


def test_same_seed_same_files(tmp_path, photos):
    "Files decoded and cropped by two workers."
    seeds, data = dict(first=1, again=1, other=2), photos / "flower"
    first, again, other = (command_run(tmp_path / k, data, seed) for k, seed in seeds.items())
    assert differing(first[0], again[0]) == [] and first[1] == again[1]
    assert differing(first[0], other[0]) and first[1] != other[1]


# fastai's verbs; `nbs/10_learner.ipynb` shows the rest

def test_lr_find_restores_everything():
    learn = digits_learner()
    before = weights(learn.model)
    with learn.no_bar(): suggestion = learn.lr_find(num_it=20, show_plot=False)
    assert suggestion.valley > 0
    assert differing(weights(learn.model), before) == []
    quiet(learn, learn.pretrain, 1)
    assert len(learn.history()["knn"]) == 1


def test_lr_find_ends_where_the_loss_is_nan(autocast_off):
    "It is meant to go too far."
    learn = digits_learner(opt_func=Adam)
    before = weights(learn.model)
    with learn.no_bar(): learn.lr_find(end_lr=1e30, num_it=30, show_plot=False)
    assert differing(weights(learn.model), before) == []


@pytest.mark.parametrize("verb", ["fit", "fit_one_cycle", "fit_flat_cos"])
def test_fits_of_fastai_learn(verb):
    learn = digits_learner(n_train=1280, opt_func=Adam)
    loss = quiet(learn, getattr(learn, verb), 3, 3e-3).history()["train_loss"]
    assert len(loss) == 3 and loss[-1] < loss[0]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_precision(precision):
    learn = digits_learner().to_precision("fp32")
    quiet(learn, getattr(learn, f"to_{precision}")().pretrain, 2)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in learn.model.parameters())
    assert learn.history()["train_loss"][-1] < np.log(2 * 64 - 1)  # below chance


def test_export_and_load(tmp_path, photos):
    "Of a learner whose images come from files."
    dls = simclr_dls(photos, size=32, bs=5, num_workers=0)
    learn = simclr_learner(dls, width=0.125, path=tmp_path)
    quiet(learn, learn.pretrain, 1).export("learner.pkl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fastai warns of pickle: ours to trust here
        again = load_learner(tmp_path / "learner.pkl")
    assert differing(weights(again.model), weights(learn.model)) == []
    assert (again.dls.classes, again.dls.policy.size) == (["flower", "palace"], 32)
    assert len(again.dls.train.dataset) == 0


def test_save_load_and_validate(tmp_path):
    learn = digits_learner(path=tmp_path)
    quiet(learn, learn.pretrain, 1)
    saved = weights(learn.model)
    learn.save("model")
    quiet(learn, learn.pretrain, 1)
    assert differing(weights(learn.model), saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.load("model")
    assert differing(weights(learn.model), saved) == []
    with learn.no_bar(): loss, top1, *_ = learn.validate()
    assert 0 < loss < 2 * np.log(127) and 0 <= top1 <= 1


# Errors

def test_normalized_images_are_refused(photos):
    transforms = dict(item_tfms=Resize(32), batch_tfms=Normalize.from_stats(*imagenet_stats))
    dls = ImageDataLoaders.from_folder(photos, valid_pct=0.25, bs=6, num_workers=0, **transforms)
    learn = simclr_learner(dls, width=0.125)
    with pytest.raises(ValueError, match=r"images in \[0, 1\], got -.*: take Normalize out"):
        quiet(learn, learn.pretrain, 1)


def test_nan_loss_stops_with_advice(autocast_off):
    learn = digits_learner()
    with torch.no_grad(): learn.model.encoder.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite at epoch 0, step 0.*: lower the learning"):
        quiet(learn, learn.pretrain, 1)


class Stop(Callback):
    "Interrupt in the middle of a batch."
    order = 100
    def after_pred(self): raise KeyboardInterrupt


@pytest.mark.parametrize("fault", ["nan", "interrupt"])
def test_mixed_precision_ends_with_an_error(autocast_off, fault):
    "Else all that follows in this process computes in bf16, with weights of before the error."
    learn = digits_learner(precision="bf16", cbs=[Stop()] if fault == "interrupt" else None)
    good = copy.deepcopy(learn.model.state_dict())
    with torch.no_grad(): learn.model.encoder.conv1.weight.fill_(float("nan"))
    with pytest.raises((FloatingPointError, KeyboardInterrupt)): quiet(learn, learn.pretrain, 1)
    assert not torch.is_autocast_enabled("cpu")
    learn.model.load_state_dict(good)
    learn.remove_cbs(learn._grab_cbs(Stop))
    quiet(learn, learn.pretrain, 1)
    assert np.isfinite(learn.history()["train_loss"]).all()


def test_a_run_killed_before_its_first_state_begins_alike(tmp_path):
    "All that is there is `config.json`; comparing it draws no random numbers."
    config = RunConfig("digits", epochs=1, n_train=64, n_valid=32, bs=32, width=0.125, precision="fp32",
                       out=str(tmp_path / "whole"))
    run_pretraining(config)
    (tmp_path / "again").mkdir()
    text = (tmp_path / "whole/config.json").read_text().replace("whole", "again")
    (tmp_path / "again/config.json").write_text(text)
    run_pretraining(replace(config, out=str(tmp_path / "again"), resume=True))
    first, second = (load_file(tmp_path / run / "encoder.safetensors") for run in ("whole", "again"))
    assert not differing(first, second)


@pytest.mark.parametrize("method", METHODS)
def test_completing_settings_draws_nothing(method):
    "Parts of the model are tried without weights, so that a resumed run begins with the same ones."
    state = torch.get_rng_state()
    complete_config(RunConfig(method=method))
    assert torch.equal(torch.get_rng_state(), state)
