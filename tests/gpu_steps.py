"Steps that a GPU must take without a wait: for `test_cuda.py`, on one, and `test_fake_cuda.py`, on none."
from collections.abc import Callable
from functools import partial

import torch
from fastai.callback.core import Callback

from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.loss.alternatives import LOSSES
from simclr_nb.methods.amdim import amdim_learner
from simclr_nb.methods.cmc import cmc_learner
from simclr_nb.methods.cpc import cpc_learner
from simclr_nb.methods.instdisc import instdisc_learner
from simclr_nb.methods.moco import moco_learner
from simclr_nb.methods.pirl import pirl_learner
from simclr_nb.train.optim import OPTIMIZERS

WAITING = "autoaugment", "randaugment"  # torchvision's operators, image by image
METHODS = dict(  # the learner, and options that suit digits
    simclr=(simclr_learner, {}), instdisc=(instdisc_learner, {}),
    moco=(partial(moco_learner, version="v1"), dict(negatives=256)),
    moco_v2=(moco_learner, dict(negatives=256)),
    pirl=(pirl_learner, dict(negatives=None, kind="softmax")), cmc=(cmc_learner, {}),
    cpc=(partial(cpc_learner, arch="cpc/4-1"), {}),
    amdim=(partial(amdim_learner, arch="amdim/16-64-1"), dict(sampled=False)))
NO_WIDTH = "amdim", "cpc"


def digits(device: str | None, **kwargs):
    "Loaders of digits; CMC's second view needs colours, so blue is the same everywhere."
    options = dict(bs=64, n_train=320, n_valid=128, size=32, seed=0, policy="cifar", progress=False)
    dls = simclr_dls("digits", device=device, **options | kwargs)
    for loader in dls:
        loader.dataset.images[:, 2] = 100
        loader.dataset.keep_on(dls.device)
    return dls


def train(device: str, method: str = "simclr", epochs: int = 1, cbs=None, width: float = 0.25,
          data: dict | None = None, **kwargs):
    "A learner after a run that is the same on every device but for rounding."
    torch.manual_seed(0)
    learner, options = METHODS[method]
    if method not in NO_WIDTH: kwargs["width"] = width
    learn = learner(digits(device, **data or {}), **options | kwargs)
    with learn.no_bar(), learn.no_logging(): learn.pretrain(epochs, cbs=cbs)
    return learn


class StepLosses(Callback):
    "The loss of each step, and whether gradients were scaled. fastai's recorder has means of them."
    def before_fit(self): self.values, self.is_scaled = [], False
    def after_loss(self):
        if self.training: self.values.append(self.learn.loss.detach().float())
    def after_batch(self):
        self.is_scaled |= getattr(self.learn, "scaler", None) is not None and self.scaler.is_enabled()


def losses_of(*args, **kwargs) -> torch.Tensor:
    "Of the steps of a run."
    notes = StepLosses()
    train(*args, cbs=[notes], **kwargs)
    return torch.stack(notes.values)


class _End(Callback):
    order = 200  # after all that a step does

    def __init__(self, leave: Callable): self.leave = leave
    def after_batch(self): self.leave()
    def after_cancel_fit(self): self.leave()


class _Begin(Callback):
    order = -200  # before the views are made

    def __init__(self, enter: Callable): self.enter = enter
    def before_batch(self):
        if self.training and self.iter > 1: self.enter()


def within_steps(enter: Callable, leave: Callable) -> list[Callback]:
    "Callbacks for each training step once all is warm: from the batch to the end, probes included."
    return [_Begin(enter), _End(leave)]


STEPS = [*((name, {}) for name in METHODS),
         *((name, dict(precision="bf16")) for name in METHODS),
         *((name, dict(micro_batch=16)) for name in METHODS if not name.startswith("moco")),
         ("moco_v2", dict(symmetric=True)), ("instdisc", dict(negatives=20)),
         ("pirl", dict(negatives=20, kind="nce")), ("cmc", dict(negatives=20)),
         ("amdim", dict(sampled=True)),
         *(("simclr", dict(optimizer=name)) for name in OPTIMIZERS if name != "lars"),
         *(("simclr", dict(loss=name)) for name in LOSSES if name != "nt_xent")]
