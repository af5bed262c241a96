"Images of 1, 4 and 13 channels: read, distorted, learned from, saved, evaluated, planned; or refused in a sentence."
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from PIL import Image
from torch.utils.data import TensorDataset

from simclr_nb.core.show import image_grid
from simclr_nb.data import clean_loader, image_channels, simclr_dls
from simclr_nb.evaluate.features import encoder_features, pixel_features, random_encoder
from simclr_nb.evaluate.frozen import knn_accuracy, linear_evaluation
from simclr_nb.images.arrays import ImageArrays
from simclr_nb.images.source import Source
from simclr_nb.learner import simclr_learner
from simclr_nb.methods.amdim import amdim_learner
from simclr_nb.model.encoder import create_encoder, encoder_stats, load_encoder, save_encoder
from simclr_nb.plan.cost import count_encoder
from simclr_nb.plan.plan import PlanConfig, run_plan
from simclr_nb.run.evaluate import open_encoder
from simclr_nb.views.compiled import compiled_policy
from simclr_nb.views.policy import bands_policy, cifar_policy
from simclr_nb.views.two_views import TwoViews


def bands(rng: np.random.Generator, label: int, n: int, side: int = 24) -> np.ndarray:
    "An image `(side, side, n)`, uint16, whose last band alone tells the class."
    values = rng.integers(0, 3000, (side, side, n)).astype(np.uint16)
    values[..., -1] = 200 + 2000 * label + values[..., -1] // 10
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "24 images of two classes with 13 bands of 16 bits, half of them planes."
    root, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for label, name in enumerate(["field", "forest"]):
        (root / name).mkdir()
        for i in range(12):
            values = bands(rng, label, 13)
            np.save(root / name / f"{i}.npy", values if i % 2 else values.transpose(2, 0, 1))
    return root


def loaders(folder: Path, **kwargs):
    kwargs = dict(progress=False) | kwargs
    return simclr_dls(folder, bs=8, seed=0, num_workers=0, device="cpu", channels=13, **kwargs)


def test_thirteen_bands_from_files_to_a_saved_encoder(folder, tmp_path, capsys):
    "No way to say so before; the encoder file remembers the channels, the last band is used."
    dls = loaders(folder, progress=True)
    printed = capsys.readouterr().out
    assert "24 files hold uint16" in printed and "2 classes" in printed and "; 13 channels" in printed
    assert (dls.info["channels"], image_channels(dls), dls.policy.name) == (13, 13, "bands")
    x, _ = dls.train.one_batch()
    assert (x.shape, x.dtype) == ((8, 13, 24, 24), torch.uint8)
    low, high = dls.info["pixel_range"]["uint16"]  # one scale for all files and bands
    assert low < 5 and 2990 < high < 3100 and dls.train.dataset.images.unique().numel() > 250
    learn = simclr_learner(dls, "resnet18", width=0.125)
    learn.fit(1)
    assert learn.model.encoder.in_channels == 13
    assert [t.get_text() for t in learn.show_views(4).texts] == ["shown: channels 0, 1, 2 of 13"]
    file = learn.save_encoder(tmp_path / "e.safetensors")
    again = load_encoder(file)
    assert again.config["in_channels"] == 13
    clean = next(iter(clean_loader(dls)))[0] / 255
    with torch.no_grad(): torch.testing.assert_close(again(clean), learn.model.encoder.eval()(clean))
    learn.load_encoder(file)
    features = encoder_features(again, dls)
    assert features.h_train.shape == (22, again.out_dim)
    assert knn_accuracy(pixel_features(dls), k=3).value == 1  # the last band tells the class
    assert random_encoder(again.config).in_channels == 13
    assert linear_evaluation(again, dls, epochs=1, bs=8).value >= 0


def test_bands_as_files_are_cropped_by_workers(folder, tmp_path):
    "Of two sizes, so that they stay files."
    for i in range(6): np.save(tmp_path / f"{i}.npy", np.full((30 + i, 40, 4), 40 * i, np.uint8))
    dls = simclr_dls(tmp_path, size=32, bs=2, num_workers=1, channels=4, device="cpu")
    x, _ = dls.train.one_batch()
    assert (x.shape, dls.info["in_memory"]) == ((2, 2, 4, 32, 32), False)
    views = TwoViews(dls.policy)(x)
    assert views.shape == (4, 4, 32, 32)
    assert next(iter(clean_loader(dls)))[0].shape[1:] == (4, 32, 32)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_one_channel_stays_one_channel(tmp_path, suffix):
    gray = np.linspace(0, 255, 24 * 24).astype(np.uint8).reshape(24, 24)
    for i in range(6): Image.fromarray(np.roll(gray, i)).save(tmp_path / f"{i}.{suffix}")
    options = dict(bs=2, seed=0, num_workers=0, progress=False, device="cpu")
    one = simclr_dls(tmp_path, channels=1, **options)
    rgb = simclr_dls(tmp_path, **options)
    assert one.train.dataset.images.shape[1:] == (1, 24, 24)
    assert torch.equal(one.train.dataset.images.expand(-1, 3, -1, -1), rgb.train.dataset.images)
    assert "channels" not in rgb.info and rgb.policy.name == "cifar"
    learn = simclr_learner(one, "resnet18", width=0.125)
    learn.fit(1)
    assert learn.model.encoder.conv1.in_channels == 1


def test_four_bands_of_a_tiff_keep_the_fourth(tmp_path):
    "Opened as RGBA, near infra-red was dropped silently; 13 bands `cannot be identified, remove it`."
    tifffile = pytest.importorskip("tifffile")
    rng = np.random.default_rng(0)
    for i in range(6):
        values = rng.integers(0, 3000, (20, 20, 4), dtype=np.uint16)
        tifffile.imwrite(tmp_path / f"{i}.tif", values, photometric="minisblack",
                         planarconfig="contig")
    dls = simclr_dls(tmp_path, bs=2, channels=4, progress=False, device="cpu")
    assert dls.train.dataset.images.shape == (4, 4, 20, 20)
    assert dls.train.dataset.images[:, 3].unique().numel() > 200
    with pytest.raises(ValueError, match=r"4 channels of uint16.*channels=4 \(--channels 4\)"):
        simclr_dls(tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"its shape is \(20, 20, 4\), and .* channels=13"):
        simclr_dls(tmp_path, channels=13, progress=False)


def test_arrays_of_any_channels_in_memory():
    images = torch.randint(0, 256, (16, 4, 16, 16), dtype=torch.uint8)
    parts = [ImageArrays(images[rows], torch.zeros(8).long()) for rows in (slice(8), slice(8, 16))]
    dls = simclr_dls(Source("four", *parts), bs=4, device="cpu")
    assert image_channels(dls) == 4
    simclr_learner(dls, "resnet18", width=0.125).fit(1)
    with pytest.raises(ValueError, match="images in memory have 4 channels, and channels is 13"):
        simclr_dls(Source("four", *parts), channels=13)


@pytest.mark.parametrize("arch", ["resnet18", "torchvision/mobilenet_v3_small", "timm/resnet10t"])
def test_learner_takes_the_channels_of_any_loaders(arch):
    if "timm" in arch: pytest.importorskip("timm")
    data = TensorDataset(torch.rand(8, 5, 32, 32), torch.zeros(8).long())
    dls = DataLoaders(*(DataLoader(data, bs=4) for _ in range(2)))
    state = torch.get_rng_state()
    assert image_channels(dls) == 5 and torch.equal(torch.get_rng_state(), state)
    learn = simclr_learner(dls, arch)
    assert (learn.model.encoder.in_channels, learn.views.two_views.policy.name) == (5, "bands")
    learn.fit(1)


def test_a_module_is_tried_on_as_many_channels():
    data = TensorDataset(torch.rand(8, 5, 16, 16), torch.zeros(8).long())
    dls = DataLoaders(*(DataLoader(data, bs=4) for _ in range(2)))
    net = torch.nn.Sequential(torch.nn.Conv2d(5, 6, 3), torch.nn.Flatten())
    assert simclr_learner(dls, net, policy=bands_policy(16)).model.encoder.in_channels == 5


@pytest.mark.parametrize("policy, names", [
    ("paper", "colour jitter and colour drop"), ("digits", "colour jitter"),
    ("amdim", "colour jitter and colour drop"), ("official_v2", r"colour jitter \(official_v2\)"),
    ("broad", "colour jitter and colour drop and solarize"), ("randaugment", "image by image"),
])
def test_colour_operators_are_refused_by_name(folder, policy, names):
    with pytest.raises(ValueError, match=f"the {policy} policy has {names}.* RGB images.*'bands'"):
        loaders(folder, policy=policy)


def test_bands_policy_draws_the_same_compiled():
    x = torch.randint(0, 256, (6, 13, 40, 40), dtype=torch.uint8)
    policy = bands_policy(32)
    views = policy(x, torch.Generator().manual_seed(0))
    assert views.shape == (6, 13, 32, 32)
    fast = compiled_policy(policy)(x, torch.Generator().manual_seed(0))
    assert torch.allclose(views, fast, atol=1e-5)  # crop and blur compiled, the jitter as it is
    assert (policy(x[:, :1].repeat(1, 13, 1, 1)).std(1) > 0).any()  # each channel apart


def test_files_of_rgb_encoders_stay_as_they_were(tmp_path):
    torch.manual_seed(0)
    before = create_encoder("resnet18", 0.125)
    torch.manual_seed(0)
    same = create_encoder("resnet18", 0.125, in_channels=3)
    assert before.config == same.config and "in_channels" not in before.config
    assert all(map(torch.equal, before.state_dict().values(), same.state_dict().values()))
    file = save_encoder(create_encoder("torchvision/resnet18", in_channels=2, size=32),
                        tmp_path / "two.safetensors")
    assert load_encoder(file)(torch.rand(2, 2, 32, 32)).shape == (2, 512)


def test_costs_are_counted_for_the_channels():
    rgb, many = (create_encoder("resnet18", 0.125, "cifar", in_channels=n) for n in (3, 13))
    assert encoder_stats(many, 32)["macs"] - encoder_stats(rgb, 32)["macs"] == 10 * 9 * 8 * 32**2
    extra = count_encoder("resnet18", 0.125, 32, channels=13).params
    assert extra - count_encoder("resnet18", 0.125, 32).params == 10 * 9 * 8
    few, more = (run_plan(PlanConfig("50000x64", "resnet18", batch=512, channels=n)) for n in (3, 13))
    assert str(few) != str(more)


def test_wrong_channels_are_a_sentence(folder, tmp_path):
    encoder = create_encoder("resnet18", 0.125, in_channels=13)
    with pytest.raises(ValueError, match=r"expected images \(N, 13, H, W\), got \(2, 3, 32, 32\)"):
        encoder(torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match="AMDIM's encoders take RGB images, got 13 channels"):
        amdim_learner(loaders(folder, size=32), "amdim/8-64-2")
    with pytest.raises(ValueError, match=r"\.npy files are read with channels \(--channels\)"):
        simclr_dls(folder, progress=False)
    with pytest.raises(ValueError, match="the device decodes RGB alone"):
        loaders(folder, decode="device")
    with pytest.raises(ValueError, match="got 13 channels: choose three"):
        cifar_policy()(torch.rand(2, 13, 32, 32))
    np.save(tmp_path / "objects.npy", np.array([{}] * 4), allow_pickle=True)
    for i in range(4): np.save(tmp_path / f"{i}.npy", np.zeros((8, 8, 13), np.uint8))
    with pytest.raises(ValueError, match="cannot read image .*objects.npy: .*Python objects"):
        simclr_dls(tmp_path, channels=13, progress=False)
    dls = simclr_dls(tmp_path, bs=2, channels=13, skip_bad=True, progress=False, device="cpu")
    assert len(dls.info["skipped"]) == 1


def test_pictures_of_many_channels_say_what_they_show():
    texts = [[t.get_text() for t in image_grid(torch.rand(3, c, 8, 8)).texts] for c in (1, 2, 3, 4)]
    assert texts == [[], ["shown: channel 0 of 2"], [], ["shown: channels 0, 1, 2 of 4"]]


def test_commands(folder, tmp_path):
    "In fresh processes: pretrain, then evaluate the file, which knows its channels; plan."
    def run(name, *args):
        code = f"import sys; from simclr_nb.cli import {name}; sys.exit({name}(sys.argv[1:]))"
        return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True,
                              text=True, cwd=tmp_path, env=os.environ | dict(MPLBACKEND="agg"))
    options = ["--epochs", 1, "--width", 0.125, "--bs", 8, "--workers", 0, "--precision", "fp32"]
    done = run("pretrain", folder, "--channels", 13, "--out", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout
    done = run("evaluate", tmp_path / "run" / "encoder.safetensors", "--data", folder, "--protocol",
               "knn", "--k", 3, "--workers", 0, "--out", tmp_path / "evaluation")
    assert done.returncode == 0, done.stderr
    done = run("pretrain", folder, *options)
    assert done.returncode == 2 and "read with channels (--channels)" in done.stderr


def test_bands_in_shards(tmp_path):
    "TIFFs of four bands in a tar, as others write them."
    tifffile = pytest.importorskip("tifffile")
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for i in range(6):
            buffer = io.BytesIO()
            tifffile.imwrite(buffer, np.full((20, 20, 4), i * 300, np.uint16), planarconfig="contig",
                             photometric="minisblack")
            member = tarfile.TarInfo(f"{i}.tif")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
    dls = simclr_dls(tmp_path / "shard-0.tar", size=16, bs=2, num_workers=0, channels=4,
                     progress=False, device="cpu")
    x, _ = dls.train.one_batch()
    assert x.shape == (2, 2, 4, 16, 16) and dls.info["pixel_range"] == {"uint16": (0, 1500)}


def test_weights_of_others_for_bands(folder, tmp_path):
    net = create_encoder("torchvision/resnet18", in_channels=13, size=32).model
    torch.save(net.state_dict(), tmp_path / "w.pth")
    encoder = open_encoder(tmp_path / "w.pth", "torchvision/resnet18", in_channels=13, size=32)
    x = torch.rand(2, 13, 32, 32)
    with torch.no_grad(): torch.testing.assert_close(encoder(x), net.eval()(x))  # not normalised
    with pytest.raises(ValueError, match="of 13 channels"):
        open_encoder(tmp_path / "w.pth", "torchvision/resnet18", "imagenet", in_channels=13, size=32)
