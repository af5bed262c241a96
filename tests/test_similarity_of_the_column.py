"The column `contrastive_top1` shows what the loss sees: cosine similarity, or dot products."
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.loss.alternatives import ContrastiveLoss
from simclr_nb.loss.contrastive import contrastive_accuracy
from simclr_nb.loss.tiled import NTXent

LOSSES = {
    "cosine": (NTXent(0.5), True), "dot": (NTXent(0.5, normalize=False), False),
    "nt_logistic": (ContrastiveLoss("nt_logistic"), True),
    "nt_logistic dot": (ContrastiveLoss("nt_logistic", normalize=False), False),
    "no option": (ContrastiveLoss("debiased_nt_xent"), True),
}


class Outputs(Callback):
    "Projections of validation batches."
    def __init__(self): self.z = []
    def after_pred(self):
        if not self.training: self.z.append(self.pred.z.detach())


class Longer(nn.Module):
    "z of very different lengths, so that both measures differ."
    def forward(self, h): return h * torch.linspace(1, 30, len(h))[:, None]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_similarity(loss, capsys):
    torch.manual_seed(0)
    dls = simclr_dls("digits", n_train=64, n_valid=32, bs=32, seed=0, device="cpu", progress=False)
    learn = simclr_learner(dls, width=0.0625, loss=loss[0])
    learn.model.head = Longer()
    learn.views.two_views = lambda x: torch.cat([x, x]).float() / 255  # the same view twice
    outputs = Outputs()
    with learn.no_bar(), learn.no_logging(): learn.pretrain(1, 1e-6, "none", cbs=[outputs])
    shown = learn.history()["contrastive_top1"][0]
    seen = [contrastive_accuracy(torch.cat(outputs.z), normalize=n).item() for n in (True, False)]
    assert seen[0] > seen[1]
    assert shown == pytest.approx(seen[0 if loss[1] else 1])
    assert ("compares by dot products" in capsys.readouterr().out) == (not loss[1])
