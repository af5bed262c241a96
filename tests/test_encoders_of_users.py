"An encoder that the user built is saved after training, and comes back into a module of its kind."
import pytest
import torch
import torchvision
from torch import nn

from simclr_nb.cli import evaluate
from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.model.adapt import adapt_encoder
from simclr_nb.model.encoder import load_encoder, save_encoder


class Own(nn.Module):
    "An encoder as it should be: gives h, knows its width. Two layers share their weights."
    out_dim = 8

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.third = nn.Conv2d(8, 8, 1, bias=False)
        self.third.weight = self.second.weight

    def forward(self, x): return self.third(self.second(self.first(x).relu())).mean((2, 3))


def classifier() -> nn.Module:
    "A network with a classifier, which the adapter cuts off."
    return torchvision.models.squeezenet1_1(num_classes=7)


def cut_early() -> nn.Module: return adapt_encoder(classifier(), "features.5", 32, [0.5] * 3, [0.2] * 3)


KINDS = dict(own=(Own, Own), classifier=(classifier, classifier), adapted=(cut_early, classifier))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_saved_after_training_and_loaded_again(tmp_path, kind):
    make, plain = kind
    torch.manual_seed(0)
    dls = simclr_dls("digits", size=32, n_train=32, n_valid=16, bs=8, seed=0, device="cpu")
    learn = simclr_learner(dls, make())
    with learn.no_bar(), learn.no_logging(): learn.pretrain(1)
    path = learn.save_encoder(tmp_path / "e.safetensors", note="mine")
    again = load_encoder(path, module=plain())
    assert again.metadata["note"] == "mine"
    other = simclr_learner(dls, make()).load_encoder(path)
    trained, x = learn.model.encoder.eval(), torch.rand(2, 3, 32, 32)
    for encoder in (again, other.model.encoder.eval()):
        for name, value in trained.state_dict().items():
            assert torch.equal(encoder.state_dict()[name], value), name
        with torch.no_grad(): assert torch.allclose(encoder(x), trained(x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_built_is_said(tmp_path, capsys):
    path = save_encoder(Own(), tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match=r"weights of your own Own.*load_encoder\(path, module=...\)"):
        load_encoder(path)
    with pytest.raises(ValueError, match="does not fit Linear"): load_encoder(path, module=nn.Linear(2, 2))
    with pytest.raises(SystemExit) as end: evaluate([str(path), "--data", "digits"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "weights of your own Own" in error and "Traceback" not in error
