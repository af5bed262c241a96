"Real photographs: what the loaders give, in what order, and what they say of a damaged file."
import json
import os
import shutil
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from simclr_nb import data
from simclr_nb.images import source as sources
from simclr_nb.images.arrays import is_resident
from simclr_nb.images.pixels import read_image
from simclr_nb.data import clean_loader, simclr_dls
from simclr_nb.images.find import find_source
from simclr_nb.images.files import JpegLoader

FLOWER = Image.fromarray(load_sample_images().images[1]).resize((60, 40))


def test_without_a_network_the_message_says_where_cifar10_belongs(tmp_path, monkeypatch):
    def refuse(url): raise URLError("no network")
    monkeypatch.setattr(sources, "untar_data", refuse)
    monkeypatch.setattr(sources, "fastai_path", lambda kind: tmp_path / kind)
    with pytest.raises(ConnectionError, match="no network") as told: simclr_dls("cifar10")
    assert f"CIFAR-10 is not in {tmp_path / 'data'}" in str(told.value)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# Reading

@pytest.mark.parametrize("mode, suffix, tolerance", [
    ("RGB", "png", 0), ("L", "png", 0), ("LA", "png", 0), ("RGBA", "png", 0), ("RGBA", "webp", 4),
    ("L", "jpg", 4), ("CMYK", "jpg", 4), ("P", "png", 15), ("P", "gif", 15),  # 15: dithered
])
def test_read_image_keeps_the_colours(tmp_path, mode, suffix, tolerance):
    FLOWER.convert(mode).save(tmp_path / f"image.{suffix}", quality=95)
    expected = FLOWER.convert("L").convert("RGB") if "L" in mode else FLOWER
    read = read_image(tmp_path / f"image.{suffix}")
    assert read.mode == "RGB"
    assert np.abs(np.asarray(read, dtype=int) - np.asarray(expected, dtype=int)).mean() <= tolerance


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bits_are_scaled(tmp_path, name):
    gray = np.asarray(FLOWER.convert("L"))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / name)
    assert np.array_equal(np.asarray(read_image(tmp_path / name))[..., 0], gray)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_read_upright(tmp_path, orientation):
    (exif := Image.Exif())[0x0112] = orientation
    FLOWER.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image: expected = ImageOps.exif_transpose(image)
    assert expected.size == ((60, 40) if orientation <= 4 else (40, 60))
    assert np.array_equal(read_image(tmp_path / "turned.png"), expected)


def test_animation_gives_its_first_frame(tmp_path):
    FLOWER.save(tmp_path / "moving.png", save_all=True, append_images=[ImageOps.invert(FLOWER)])
    assert np.array_equal(read_image(tmp_path / "moving.png"), FLOWER)


# CIFAR-10: small images of one size, in memory

@pytest.fixture(scope="module")
def source(cifar10):
    "CIFAR-10 by its name, without a download."
    def no_network(*args): raise AssertionError("a test must not use the network")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", no_network)
        return find_source("cifar10")


@pytest.fixture(scope="module")
def cifar_dls(source): return simclr_dls(source, bs=256, n_train=2000, n_valid=500, seed=0)


def test_cifar10_source(cifar10, source):
    assert (len(source.train), len(source.valid), len(source.classes)) == (50_000, 10_000, 10)
    assert {p.parent.parent for p in source.train} == {cifar10 / "train"}
    assert {p.parent.parent for p in source.valid} == {cifar10 / "test"}
    assert len(set(source.train)) == 50_000
    for paths, n in [(source.train, 5000), (source.valid, 1000), (source.train[:100], 10)]:
        assert torch.tensor(source.labels(paths)).bincount().tolist() == [n] * 10


def test_cifar10_subset_is_balanced_and_decoded(cifar_dls, source):
    for i, paths, n in [(0, source.train, 2000), (1, source.valid, 500)]:
        own = cifar_dls[i].dataset
        assert own.images.shape == (n, 3, 32, 32) and own.images.dtype == torch.uint8
        assert own.labels.bincount().tolist() == [n // 10] * 10
        for i in range(0, n, 97):
            with Image.open(paths[i]) as image: assert torch.equal(own.images[i], pixels(image))
            assert cifar_dls.classes[own.labels[i]] == paths[i].parent.name
    assert cifar_dls.info["in_memory"]
    assert (cifar_dls.policy.name, cifar_dls.policy.size) == ("cifar", 32)


def test_cifar10_epoch_shows_each_image_at_most_once(cifar_dls):
    own = cifar_dls.train.dataset
    number = {image.numpy().tobytes(): i for i, image in enumerate(own.images)}
    epochs = []
    for _ in range(2):
        batches = list(cifar_dls.train)
        assert [len(x) for x, _ in batches] == [256] * 7  # the ragged rest of 208 is left out
        x, y = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
        seen = [number[image.numpy().tobytes()] for image in x]
        assert len(set(seen)) == 7 * 256 and torch.equal(own.labels[seen], y)
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_cifar10_clean_loader_is_the_whole_set_in_order(cifar_dls):
    for i, n in [(0, 2000), (1, 500)]:
        x, y = (torch.cat(parts).cpu() for parts in zip(*clean_loader(cifar_dls, i), strict=True))
        own = cifar_dls[i].dataset
        assert torch.equal(x, own.images) and torch.equal(y, own.labels) and len(x) == n


MEMORY = """
import json, sys
from pathlib import Path
from simclr_nb.data import simclr_dls

def resident(field):
    line, = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) * 1024

def load(n, n_valid): return simclr_dls("cifar10", n_train=n, n_valid=n_valid, bs=512, seed=0,
                                        device="cpu", progress=False)
for _ in load(1024, 512).train: pass  # what libraries ask for once
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
dls = load(20_000, 10_000)
for _ in dls.train: pass
images = sum(loader.dataset.images.nbytes for loader in dls)
print(json.dumps([images, resident("VmHWM") - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_cifar10_is_held_once(cifar10):
    "While files are listed, checked and decoded, and in an epoch: hardly more than the images."
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY], capture_output=True,
                          text=True, env=dict(os.environ, OMP_NUM_THREADS="1"), timeout=300)
    assert done.returncode == 0, done.stderr
    images, peak = json.loads(done.stdout)
    assert images == 30_000 * 3 * 32 * 32
    assert peak <= 1.3 * images  # 1.06 to 1.12; a second copy of the smaller split would be 1.4


def test_copy_on_a_device_is_kept_and_used(source, monkeypatch):
    "As a GPU with room would be asked to, with a CPU in its place."
    options = dict(bs=64, n_train=256, n_valid=128, seed=3, device="cpu", progress=False)
    asked = []
    monkeypatch.setattr(data, "is_resident", lambda *args: asked.append(args) or True)
    kept = simclr_dls(source, **options)
    assert asked == [(384 * 3 * 32 * 32, torch.device("cpu"))]
    monkeypatch.setattr(data, "is_resident", is_resident)
    plain = simclr_dls(source, **options)
    for i in range(2):
        own = kept[i].dataset
        assert own.kept[0] is own.images and plain[i].dataset.kept is None
        own.kept = own.images, 255 - own.images  # so that we see where a batch comes from
    for (x, y), (x0, y0) in zip(kept.train, plain.train, strict=True):
        assert torch.equal(x, 255 - x0) and torch.equal(y, y0)
    for i in range(2):
        x, y = (torch.cat(parts) for parts in zip(*clean_loader(kept, i), strict=True))
        assert torch.equal(x, 255 - kept[i].dataset.images)
        assert torch.equal(y, kept[i].dataset.labels)


def test_cifar100_sample(cifar100_sample):
    dls = simclr_dls(cifar100_sample, n_train=1000)
    assert (len(dls.classes), dls.info["n_train"], dls.info["n_valid"]) == (100, 1000, 1000)
    assert dls.train.dataset.labels.bincount().tolist() == [10] * 100
    assert dls.info["split"] == "test folder"


# ImageNet: photographs of many sizes, by workers

def imagenet_dls(folder, seed=0, num_workers=2):
    torch.manual_seed(seed)
    return simclr_dls(folder, size=64, bs=16, num_workers=num_workers, seed=seed)


def test_photographs_come_as_pairs_of_crops(imagenet_sample):
    dls = imagenet_dls(imagenet_sample)
    assert (dls.info["n_train"], dls.info["n_valid"], len(dls.classes)) == (90, 10, 100)
    batches = list(dls.train)
    assert [tuple(x.shape) for x, _ in batches] == [(16, 2, 3, 64, 64)] * 5
    assert len(set(torch.cat([y for _, y in batches]).tolist())) == 80  # one image of each class
    for x, _ in batches:
        assert x.dtype == torch.uint8
        assert all(not torch.equal(first, second) for first, second in x)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_photographs_by_seed(imagenet_sample, num_workers):
    def epoch(seed):
        dls = imagenet_dls(imagenet_sample, seed, num_workers)
        return torch.cat([x for x, _ in dls.train])
    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))


def test_workers_draw_other_crops_in_every_epoch(imagenet_sample):
    dls = imagenet_dls(imagenet_sample)
    first, second = ({int(y): x for xs, ys in dls.train for x, y in zip(xs, ys)} for _ in range(2))
    common = set(first) & set(second)
    assert len(common) > 50 and all(not torch.equal(first[i], second[i]) for i in common)


def test_clean_photographs_in_order(imagenet_sample):
    dls = imagenet_dls(imagenet_sample)
    for i, n in [(0, 90), (1, 10)]:
        x, y = (torch.cat(parts).cpu() for parts in zip(*clean_loader(dls, i), strict=True))
        assert (tuple(x.shape), x.dtype) == ((n, 3, 64, 64), torch.uint8)
        assert torch.equal(y, dls[i].dataset.labels)
        for j in range(0, n, 9):  # the central square, up to the filter
            image = read_image(dls[i].dataset.paths[j])
            square = ImageOps.fit(image, (64, 64), Image.BOX, bleed=(1 - 224 / 256) / 2)
            assert (pixels(square).float() - x[j]).abs().mean() < 12


def test_grayscale_photographs_have_three_channels(imagenet_sample):
    dls = imagenet_dls(imagenet_sample)
    files, checked = dls.train.dataset, 0
    for i, path in enumerate(files.paths):
        with Image.open(path) as image: mode = image.mode
        if mode != "L": continue
        views, checked = files[i][0], checked + 1
        assert views.shape == (2, 3, 64, 64) and (views == views[:, :1]).all()
    assert checked, "no grayscale image in the sample"


# JPEGs, decoded on the device (here the CPU)

@pytest.mark.parametrize("num_workers", [0, 2])
def test_jpegs_on_the_device_are_those_of_the_workers(imagenet_sample, num_workers):
    "The same boxes; the pixels but for rounding to 8 bits, which Pillow does twice, and once here."
    options = dict(size=96, bs=16, seed=2, device="cpu", progress=False)
    workers = simclr_dls(imagenet_sample, num_workers=2, **options)
    device = simclr_dls(imagenet_sample, num_workers=num_workers, decode="device", **options)
    assert isinstance(device.train, JpegLoader)
    for _ in range(2):  # epochs: other crops
        for (x, y), (x0, y0) in zip(device.train, workers.train, strict=True):
            assert x.shape == (16, 2, 3, 96, 96) and x.dtype == torch.uint8 and torch.equal(y, y0)
            difference = (x.int() - x0.int()).abs()
            assert difference.max() <= 2 and difference.float().mean() < 0.5
    for (x, y), (x0, y0) in zip(device.valid, device.valid):  # by workers
        assert x.shape == x0.shape == (10, 2, 3, 96, 96) and torch.equal(y, y0)
    for i in range(2):
        for (x, y), (x0, y0) in zip(clean_loader(device, i), clean_loader(workers, i), strict=True):
            assert torch.equal(x, x0) and torch.equal(y, y0)


def test_jpegs_on_the_device_are_resumed(imagenet_sample):
    def loader(num_workers):
        return simclr_dls(imagenet_sample, size=32, bs=16, seed=2, num_workers=num_workers,
                          decode="device", device="cpu", progress=False).train
    whole = list(loader(0))
    stopped = loader(2)
    begun, state = list(islice(stopped, 2)), stopped.state_dict()
    assert (state["epoch"], state["position"]) == (0, 2)
    (after := loader(1)).load_state_dict(state)
    for (x, y), (x0, y0) in zip([*begun, *after], whole, strict=True):
        assert torch.equal(x, x0) and torch.equal(y, y0)


# Faults

@pytest.fixture
def photos(tmp_path, imagenet_sample) -> Path:
    "Some photographs, to be damaged."
    for i, path in enumerate(sorted(imagenet_sample.rglob("*.JPEG"))[:12]):
        shutil.copy(path, tmp_path / f"{i}.jpg")
    return tmp_path


@pytest.mark.parametrize("num_workers, clean", [(0, False), (2, False), (0, True)])
def test_file_damaged_during_the_training_is_named(photos, num_workers, clean):
    dls = simclr_dls(photos, size=32, bs=5, num_workers=num_workers)
    victim = dls.train.dataset.paths[3]
    victim.write_bytes(victim.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"cannot read image .*/{victim.name}"):
        for _ in range(2): list(clean_loader(dls, 0) if clean else dls.train)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_jpeg_damaged_during_the_training_is_named(photos, num_workers):
    dls = simclr_dls(photos, size=32, bs=5, num_workers=num_workers, decode="device")
    victim = dls.train.dataset.paths[3]
    victim.write_bytes(victim.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"cannot read image .*/{victim.name}: .*truncated"):
        for _ in range(2): list(dls.train)


def test_file_removed_during_the_training_is_named(photos):
    dls = simclr_dls(photos, size=32, bs=5, num_workers=0)
    (victim := dls.train.dataset.paths[3]).unlink()
    with pytest.raises(FileNotFoundError, match=f"/{victim.name}"): list(dls.train)


def test_every_damaged_file_is_listed(photos):
    victims = [photos / f"{i}.jpg" for i in (2, 5, 7)]
    for path in victims: path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"\d.jpg: .* and 2 more; .*--skip-bad"):
        simclr_dls(photos, bs=2, num_workers=0)
    dls = simclr_dls(photos, bs=2, n_valid=2, num_workers=0, skip_bad=True)
    assert sorted(line.split(": ")[0] for line in dls.info["skipped"]) == sorted(map(str, victims))
