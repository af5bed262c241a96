"Evaluation leaves the encoder as it was: every parameter, buffer, gradient and training flag."
import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from simclr_nb.train.probes import RepresentCallback
from simclr_nb.data import clean_loader, simclr_dls
from simclr_nb.measure.representations import represent
from simclr_nb.model.encoder import create_encoder
from simclr_nb.evaluate.features import encoder_features
from simclr_nb.evaluate.frozen import knn_accuracy, linear_evaluation, logistic_accuracy
from simclr_nb.learner import simclr_learner
from simclr_nb.run.pretrain import compare_with_baselines


def state(module: nn.Module) -> tuple[dict, dict]:
    "Copies of tensors, and flags."
    tensors = {k: v.detach().clone() for k, v in module.state_dict(keep_vars=True).items()}
    parameters = dict(module.named_parameters())
    tensors |= {f"{k}.grad": p.grad.clone() for k, p in parameters.items() if p.grad is not None}
    flags = {name: m.training for name, m in module.named_modules()}
    return tensors, flags | {k: p.requires_grad for k, p in parameters.items()}


def assert_same(after, before):
    (tensors, flags), (old_tensors, old_flags) = after, before
    assert flags == old_flags and tensors.keys() == old_tensors.keys()
    changed = [name for name, value in tensors.items() if not torch.equal(value, old_tensors[name])]
    assert not changed


def digits(): return simclr_dls("digits", bs=50, n_train=200, n_valid=100, seed=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Two classes of photographs, read by a worker."
    folder = tmp_path_factory.mktemp("photos")
    for label, photo in zip("ab", load_sample_images().images, strict=True):
        (folder / label).mkdir()
        for i in range(8):
            Image.fromarray(photo).resize((60 + i, 40)).save(folder / label / f"{i}.png")
    return simclr_dls(folder, size=16, bs=4, num_workers=1)


@pytest.fixture(params=["train", "eval", "mixed"])
def encoder(request):
    "With statistics and gradients to lose; training, evaluating, or BatchNorm alone frozen."
    torch.manual_seed(0)
    encoder = create_encoder("resnet18", 0.125, "cifar", zero_init_last=False)
    encoder(torch.rand(8, 3, 16, 16)).square().sum().backward()
    encoder.train(request.param != "eval")
    if request.param == "mixed":
        encoder.conv1.weight.requires_grad_(False)
        for m in encoder.modules():
            if isinstance(m, nn.BatchNorm2d): m.eval()
    return encoder


def linear(encoder, dls, augment):
    return linear_evaluation(encoder, dls, epochs=2, bs=64, augment=augment, progress=False)


EVALUATIONS = {
    "represent": lambda e, dls: represent(e, clean_loader(dls)),
    "k-NN": lambda e, dls: knn_accuracy(encoder_features(e, dls)),
    "logistic": lambda e, dls: logistic_accuracy(encoder_features(e, dls), per_class=5, draws=2),
    "linear, augmented": lambda e, dls: linear(e, dls, True),
    "linear, not augmented": lambda e, dls: linear(e, dls, False),
    "baselines": lambda e, dls: compare_with_baselines(dict(random=e), dls, per_class=1000),
}


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)
def test_evaluation(encoder, evaluate):
    before = state(encoder)
    evaluate(encoder, digits())
    assert_same(state(encoder), before)


@pytest.mark.parametrize("augment", [True, False])
def test_evaluation_on_files(encoder, photos, augment):
    before = state(encoder)
    linear(encoder, photos, augment)
    assert_same(state(encoder), before)


def test_failed_evaluation(encoder):
    "A loader that breaks in the middle."
    def batches():
        yield torch.zeros(4, 3, 16, 16), torch.zeros(4)
        raise RuntimeError("disk on fire")
    before = state(encoder)
    with pytest.raises(RuntimeError, match="on fire"): represent(encoder, batches())
    assert_same(state(encoder), before)


def test_the_test_sees_a_change(encoder):
    "A pass in training mode moves the statistics of BatchNorm."
    before = state(encoder)
    encoder.train()(torch.rand(8, 3, 16, 16))
    with pytest.raises(AssertionError): assert_same(state(encoder), before)


class Remember(Callback):
    "State of the encoder at one place of the loop."
    def __init__(self, order): self.order, self.states = order, []
    def after_batch(self): self.states.append(state(self.model.encoder))
    def after_validate(self): self.states.append(state(self.model.encoder))


def test_callbacks_that_evaluate():
    "RepresentCallback, probe and k-NN change nothing, neither after a batch nor after validation."
    first, last = Remember(RepresentCallback.order - 1), Remember(100)
    learn = simclr_learner(digits(), width=0.125, cbs=[first, last])
    with learn.no_bar(), learn.no_logging(): learn.pretrain(2)
    assert len(first.states) == 2 * (4 + 2 + 1)  # training batches, validation batches, validation
    for after, before in zip(last.states, first.states, strict=True): assert_same(after, before)


def test_labels_do_not_reach_the_encoder():
    "The probe learns from h, and no gradient comes back: other labels, same weights."
    def train(shift):
        torch.manual_seed(0)
        dls = digits()
        dls.train.dataset.labels = (dls.train.dataset.labels * shift) % 10
        learn = simclr_learner(dls, width=0.125)
        with learn.no_bar(), learn.no_logging(): learn.pretrain(2)
        return state(learn.model), learn.probe.classifier[1].weight
    (first, probe), (second, other_probe) = train(1), train(3)
    assert not torch.equal(probe, other_probe)
    assert_same(second, first)
