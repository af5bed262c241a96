"A transform of another library, or any function, as policy: the package's own images, one seed one run, resumable."
import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from fastai.callback.core import Callback
from torch import nn
from torchvision.transforms import v2

from simclr_nb.data import simclr_dls
from simclr_nb.images.files import read_pixels
from simclr_nb.learner import contrastive_learner, simclr_learner
from simclr_nb.loss.tiled import NTXent
from simclr_nb.model.encoder import create_encoder
from simclr_nb.model.head import SimCLR, projection_head
from simclr_nb.train.checkpoint import CheckpointCallback
from simclr_nb.train.optim import create_optimizer
from simclr_nb.views.two_views import TwoViews

A = pytest.importorskip("albumentations")
K = pytest.importorskip("kornia.augmentation")
DIGITS = dict(n_train=64, n_valid=32, bs=32, seed=0, device="cpu")


def of_torchvision(size): return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.ColorJitter(0.4, 0.4)])


def of_albumentations(size): return A.Compose([A.RandomResizedCrop((size, size)), A.HorizontalFlip(), A.GaussNoise(p=1)])


def of_kornia(size):
    return K.ImageSequential(K.RandomResizedCrop((size, size)), K.ColorJitter(0.4, 0.4, 0.0, 0.0, p=1.0))


def of_a_function(size):
    "Draws from four generators, two of which nobody but it knows, through an Albumentations transform too."
    hidden, crop = np.random.default_rng(), of_albumentations(size)

    def change(image, own=random.Random()):
        pixels = crop(image=image.permute(1, 2, 0).numpy())["image"].astype(np.float32) / 255
        shade = own.random() + hidden.random() + np.random.rand() + random.random() + torch.rand(()).item()
        return torch.from_numpy(pixels).permute(2, 0, 1) * shade / 5
    return change


KINDS = dict(torchvision=of_torchvision, albumentations=of_albumentations, kornia=of_kornia, function=of_a_function)
LINES = dict(torchvision="torchvision Compose of 2", albumentations="Albumentations Compose of 3",
             kornia="kornia ImageSequential of 2", function="change")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "24 noisy pictures of many sizes, in two classes."
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(24):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (140 + i, 150, 3), dtype=np.uint8)).save(root / "ab"[i % 2] / f"{i}.png")
    return root


def learner(kind, **kwargs):
    dls = simclr_dls("digits", policy=KINDS[kind](16), progress=False, **DIGITS)
    torch.manual_seed(0)
    return simclr_learner(dls, width=0.0625, precision="fp32", **kwargs)


def fit(learn, cbs=None):
    with learn.no_bar(), learn.no_logging(): learn.pretrain(2, cbs=cbs)
    return learn


def same_weights(a, b):
    for name, value in a.model.state_dict().items(): assert torch.equal(b.model.state_dict()[name], value), name
    assert a.history() == b.history()


# What the package gives when it is called by hand

def by_hand(kind, transform, images, seed):
    "Views of `images`, uint8, by the package alone, from a seed."
    if kind == "albumentations":
        transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        out = [transform(image=x.permute(1, 2, 0).numpy())["image"] for x in images]
        return torch.stack([torch.from_numpy(x.copy()).permute(2, 0, 1) for x in out]).float() / 255
    torch.manual_seed(seed)
    if kind == "kornia": return transform(images.float() / 255)
    return torch.stack([transform(x) for x in images]).float() / 255


@pytest.mark.parametrize("kind", ["torchvision", "albumentations", "kornia"])
def test_both_views_are_those_of_the_package(kind):
    "Through data and learner: two draws, image by image, none like another."
    learn = learner(kind)
    images = learn.dls.train.dataset.images[:8]
    torch.manual_seed(5)
    views = learn.views.two_views(images)
    torch.manual_seed(5)
    seeds = [torch.randint(2**62, (1,)).item() for _ in range(2)]
    transform = KINDS[kind](16)
    expected = torch.cat([by_hand(kind, transform, images, seed) for seed in seeds]).clamp(0, 1)
    assert torch.equal(views, expected)
    alike = learn.views.two_views(images[:1].expand(8, -1, -1, -1))
    assert len({view.numpy().tobytes() for view in alike}) == 16


@kinds
def test_one_seed_one_run_and_a_resumed_one(kind, tmp_path):
    class Stop(Callback):
        order = 100
        def after_batch(self):
            if self.training and self.train_iter == 3: raise KeyboardInterrupt
    whole = fit(learner(kind))
    same_weights(whole, fit(learner(kind)))
    saving = dict(folder=tmp_path, every_steps=1)
    with pytest.raises(KeyboardInterrupt): fit(learner(kind), [Stop(), CheckpointCallback(**saving)])
    for seed in (random.seed, np.random.seed, torch.seed): seed()  # as in a new process
    same_weights(whole, fit(learner(kind), CheckpointCallback(resume=True, **saving)))


@kinds
def test_one_line_says_what_was_understood(kind, capsys):
    dls = simclr_dls("digits", policy=KINDS[kind](16), **DIGITS)
    how = "on whole batches" if kind == "kornia" else "image by image on the CPU"
    line = f"policy: {LINES[kind]}, {how}\n"
    assert capsys.readouterr().out == line and dls.policy.size == 16
    learn = simclr_learner(dls, width=0.0625)  # it says nothing twice
    assert learn.views.two_views.policy is dls.policy and "policy" not in capsys.readouterr().out
    plain = simclr_dls("digits", progress=False, **DIGITS)
    learn = simclr_learner(plain, width=0.0625, policy=KINDS[kind](24), second_policy=KINDS[kind](24))
    assert capsys.readouterr().out.count(line) == 2 and learn.views.two_views.size == 24
    assert learn.show_views(3).axes


@pytest.mark.parametrize("workers", [0, 2])
@kinds
def test_files_are_read_by_workers(kind, workers, pictures, capsys):
    "The same batches by any number of workers; whole images go in."
    def loaders(num_workers):
        return simclr_dls(pictures, policy=KINDS[kind](24), bs=8, seed=0, device="cpu", num_workers=num_workers)
    dls = loaders(workers)
    assert f"policy: {LINES[kind]}, image by image in the workers\n" in capsys.readouterr().out
    pairs, again = dls.train.one_batch()[0], loaders(0).train.one_batch()[0]
    assert pairs.shape == (8, 2, 3, 24, 24) and torch.equal(pairs, again)
    assert not torch.equal(pairs[:, 0], pairs[:, 1])
    learn = simclr_learner(dls, width=0.0625)
    views = learn.views.two_views(pairs)
    assert torch.equal(views, pairs.transpose(0, 1).flatten(0, 1) / 255)  # nothing happens twice


def test_a_transform_without_a_crop_comes_after_ours(pictures, capsys):
    jitter = A.ColorJitter(p=1)
    dls = simclr_dls(pictures, policy=jitter, size=32, bs=8, seed=0, device="cpu", num_workers=0)
    assert "Albumentations ColorJitter, image by image on the CPU, after a random crop to 32 px" in capsys.readouterr().out
    fit(simclr_learner(dls, width=0.0625))
    with pytest.raises(ValueError, match="give Albumentations Compose of 3 to simclr_dls"):
        simclr_learner(dls, width=0.0625, policy=of_albumentations(32))
    fit(simclr_learner(dls, width=0.0625, policy=K.RandomVerticalFlip()))


WRONG = {  # a slip: what the line says
    "normalised": (v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.1] * 3)]), "leave out Normalize"),
    "none": (lambda x: None, "gave None"), "text": (lambda x: "view", "gave a str"),
    "gray": (v2.Grayscale(1), r"shape \(1, 8, 8\)"), "int": (lambda x: x.long(), "int64"),
    "error": (lambda x: x.nothing, "AttributeError"), "no call": ([v2.RandomHorizontalFlip()], "can be called"),
    "random size": (lambda x: x[:, :, :4], "one square size"),
    "name": (v2.RandomResizedCrop(24, antialias=True), "gives views of 24 px, and size is 16")}


@pytest.mark.parametrize("slip", WRONG)
def test_a_wrong_transform_fails_in_one_line(slip):
    transform, words = WRONG[slip]
    size = 16 if slip == "name" else None
    with pytest.raises((ValueError, TypeError), match=words) as error:
        simclr_dls("digits", size=size, policy=transform, progress=False, **DIGITS)
    assert "\n" not in str(error.value)


def test_contrastive_learner_takes_views_of_a_transform():
    dls = simclr_dls("digits", progress=False, **DIGITS)
    encoder = create_encoder("resnet18", 0.0625, "cifar")
    model = SimCLR(encoder, projection_head(encoder.out_dim))
    views = TwoViews(of_albumentations(16), partial(of_kornia(16)))
    fit(contrastive_learner(dls, model, NTXent(), views, partial(create_optimizer, "lars")))


CROPS = {  # kornia transforms batches; these share draws within one, some by default
    "plain": lambda: K.RandomResizedCrop((24, 24)),
    "same_on_batch": lambda: K.RandomResizedCrop((24, 24), same_on_batch=True),
    "sequential": lambda: nn.Sequential(K.SmallestMaxSize(80), K.RandomCrop((24, 24)), K.RandomHorizontalFlip()),
    "augmentations": lambda: K.AugmentationSequential(K.RandomResizedCrop((24, 24)), data_keys=["input"])}


@pytest.mark.parametrize("crop", CROPS)
def test_kornia_crops_files_of_many_sizes_one_by_one(crop, pictures, capsys):
    "Each view is what kornia makes of that file alone, with a draw of its own."
    dls = simclr_dls(pictures, policy=CROPS[crop](), bs=8, seed=0, device="cpu", num_workers=0)
    out = capsys.readouterr().out
    assert "image by image in the workers\n" in out and "same_on_batch" not in out
    files, theirs = dls.train.dataset, CROPS[crop]()
    assert len({tuple(read_pixels(path).shape) for path in files.paths}) > 8
    for i in range(6):
        torch.manual_seed(i)
        pair, _ = files[i]
        torch.manual_seed(i)
        seeds = [torch.randint(2**62, (1,)).item() for _ in range(2)]
        image = read_pixels(files.paths[i])[None].float() / 255
        for view, seed in zip(pair, seeds, strict=True):
            torch.manual_seed(seed)
            assert torch.equal(view, theirs(image)[0].clamp(0, 1).mul(255).round().byte())
        assert not torch.equal(*pair)
    learn = simclr_learner(dls, width=0.0625)
    with learn.no_bar(), learn.no_logging(): learn.pretrain(1)
    assert np.isfinite(learn.history()["train_loss"][0])


def test_a_crop_that_files_do_not_bear(pictures, tmp_path):
    "One sentence with the way out: at once, or with the name of the file that is too small."
    options = dict(size=None, bs=8, seed=0, device="cpu", num_workers=0, progress=False)
    for crop in (K.RandomResizedCrop((24, 24), p=0.5), v2.RandomApply([v2.RandomResizedCrop(24)], p=0.5)):
        with pytest.raises(ValueError, match=r"let it crop always \(p=1\)$") as error:
            simclr_dls(pictures, policy=crop, **options)
        assert "\n" not in str(error.value)
    for i, file in enumerate(pictures.rglob("*.png")): Image.open(file).save(tmp_path / f"{i}.png")
    dls = simclr_dls(tmp_path, policy=K.CenterCrop((100, 100)), **options)
    Image.new("RGB", (90, 120)).save(dls.train.dataset.paths[0])
    name = dls.train.dataset.paths[0].name
    with pytest.raises(ValueError, match=f"{name}: the policy kornia CenterCrop failed on an image .*smaller"):
        dls.train.dataset[0]
