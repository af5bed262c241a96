"The twelve transfer data sets, read from miniature copies in their own formats."
import pickle
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torchvision.datasets as tv

from simclr_nb.transfer import datasets
from simclr_nb.transfer.datasets import TRANSFER_DATASETS, VOC_CLASSES, TransferData, load_transfer

sys.path.insert(0, str(Path(__file__).resolve().parent))
import miniatures
from miniatures import MINIATURES, label_of

NAMES = list(TRANSFER_DATASETS)
SINGLE = [name for name in NAMES if name != "voc2007"]
HELD_OUT = [name for name in NAMES if TRANSFER_DATASETS[name].held_out]
PARTS = ("train", "valid", "test")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args): raise AssertionError("a test must not use the network")
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def minis(tmp_path_factory) -> dict:
    "Root and expectation of each miniature."
    roots = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    return {name: (root, MINIATURES[name](root)) for name, root in roots.items()}


@pytest.fixture
def mini(minis, tmp_path) -> Callable:
    "A miniature of one's own, to be damaged."
    def copy(name):
        shutil.copytree(minis[name][0], tmp_path / "data")
        return tmp_path / "data"
    return copy


def parts(data: TransferData) -> list: return [data.train, data.valid, data.test]


def fingerprints(split) -> list:
    "Mark that tells the images of a split apart: the file, or the colour where there is none."
    if isinstance(split.images, list): return [str(path) for path in split.images]
    return [tuple(image[:, 0, 0].tolist()) for image in split.images]


def test_every_data_set_has_a_miniature():
    assert NAMES == list(MINIATURES)
    assert [spec.title for spec in TRANSFER_DATASETS.values()] == [
        "Food-101", "CIFAR-10", "CIFAR-100", "Birdsnap", "SUN397", "Stanford Cars", "FGVC Aircraft",
        "PASCAL VOC 2007", "DTD", "Oxford-IIIT Pets", "Caltech-101", "Oxford Flowers 102"]


# What every data set has in common

@pytest.mark.parametrize("name", NAMES)
def test_sizes_classes_and_metric(minis, name):
    root, expected = minis[name]
    data, spec = load_transfer(name, root), TRANSFER_DATASETS[name]
    assert tuple(map(len, parts(data))) == expected.sizes
    assert (data.name, data.classes, data.metric) == (name, expected.classes, spec.metric)
    assert len(data.fit) == expected.sizes[0] + expected.sizes[1]
    info = data.info
    assert (info["n_train"], info["n_valid"], info["n_test"]) == expected.sizes
    assert info["data"] == spec.title and info["metric"] == spec.metric
    assert info["complete"] is False  # a miniature cannot stand beside a published number
    assert ("held out" in info["split"]) == spec.held_out


@pytest.mark.parametrize("name", SINGLE)
def test_labels_are_those_of_the_images(minis, name):
    data = load_transfer(name, minis[name][0])
    for split in [*parts(data), data.fit]:
        assert split.labels.dtype == torch.int64 and split.labels.shape == (len(split),)
        assert split.difficult is None
        for i in range(len(split)):
            image, label = split[i]
            assert image.mode == "RGB" and label == split.labels[i] == label_of(image)
    for split in parts(data): assert set(split.labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("name", NAMES)
def test_no_image_in_two_parts(minis, name):
    data = load_transfer(name, minis[name][0])
    seen = [fingerprints(split) for split in parts(data)]
    assert all(len(set(keys)) == len(keys) for keys in seen)
    assert all(not set(a) & set(b) for a, b in combinations(seen, 2))
    assert fingerprints(data.fit) == seen[0] + seen[1]
    assert torch.equal(data.fit.labels, torch.cat([data.train.labels, data.valid.labels]))


@pytest.mark.parametrize("name", NAMES)
def test_seed(minis, name):
    "Same seed, same parts; another seed changes what is drawn and never the creators' test set."
    root = minis[name][0]
    one, same, other = (load_transfer(name, root, seed=s) for s in (3, 3, 4))
    for a, b in zip(parts(one), parts(same), strict=True):
        assert fingerprints(a) == fingerprints(b) and torch.equal(a.labels, b.labels)
    drawn = TRANSFER_DATASETS[name].held_out
    assert (fingerprints(one.valid) != fingerprints(other.valid)) == drawn
    drawn_test = name == "caltech101"
    assert (fingerprints(one.test) != fingerprints(other.test)) == drawn_test
    if drawn and not drawn_test:
        assert sorted(fingerprints(one.fit)) == sorted(fingerprints(other.fit))


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_images_are_a_tenth_of_each_class(minis, name):
    data = load_transfer(name, minis[name][0])
    whole = data.fit.labels.bincount()
    assert len(data.valid) == round(0.1 * len(data.fit))
    assert ((data.valid.labels.bincount(minlength=3) - 0.1 * whole).abs() < 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_loading_decodes_no_image(minis, name, monkeypatch):
    def refuse(*args): raise AssertionError("an image was decoded")
    monkeypatch.setattr(datasets, "read_image", refuse)
    monkeypatch.setattr("PIL.Image.open", refuse)
    assert len(load_transfer(name, minis[name][0]).test.labels)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_files_on_disk_does_not_matter(minis, name, monkeypatch):
    root = minis[name][0]
    before = [fingerprints(split) for split in parts(load_transfer(name, root))]
    listdir, walk = datasets.os.listdir, datasets.os.walk

    def backwards(*args, **kwargs):
        for folder, folders, files in walk(*args, **kwargs):
            folders.sort(reverse=True)
            yield folder, folders, sorted(files, reverse=True)
    monkeypatch.setattr("os.listdir", lambda *a: sorted(listdir(*a), reverse=True))
    monkeypatch.setattr("os.walk", backwards)
    assert [fingerprints(split) for split in parts(load_transfer(name, root))] == before


# What is missing

@pytest.mark.parametrize("name", NAMES)
def test_nothing_there(name, tmp_path):
    with pytest.raises(FileNotFoundError) as error: load_transfer(name, tmp_path)
    text, spec = str(error.value), TRANSFER_DATASETS[name]
    assert f"{spec.title} is not complete in {tmp_path}" in text
    assert spec.layouts[0][0] in text and spec.advice.format(root=tmp_path) in text
    assert str(tmp_path) in text.split("Needed")[1]  # where to put it
    assert "{" not in text and ("download=True" in text) == bool(spec.fetch)
    assert any(suffix in text for suffix in (".tar", ".tgz", ".zip"))  # the file to get


def needed() -> list:
    return [(name, path) for name, spec in TRANSFER_DATASETS.items() for path in spec.layouts[0]]


@pytest.mark.parametrize("name, path", needed(), ids=lambda v: v.replace("/", "-"))
def test_each_file_that_is_missing_is_named(mini, name, path):
    root = mini(name)
    victim = root / path
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    with pytest.raises(FileNotFoundError, match="is not complete in") as error:
        load_transfer(name, root)
    assert f": no {path}. Needed" in str(error.value)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("cifar10", "cifar100", "caltech101",
                                                                "birdsnap")])
def test_a_listed_image_that_is_missing_is_named(mini, name):
    "Not for data sets whose images are not listed."
    root = mini(name)
    victim = load_transfer(name, root).test.images[1]
    victim.unlink()
    with pytest.raises(FileNotFoundError, match="lists 1 images that are not there") as error:
        load_transfer(name, root)
    assert str(victim) in str(error.value)
    shutil.rmtree(victim.parent)
    if name in ("dtd", "sun397", "food101"):
        with pytest.raises(FileNotFoundError, match="images that are not there"):
            load_transfer(name, root)


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown data set 'imagenet': choose from food101, "):
        load_transfer("imagenet", "anywhere")


def test_home_folder_is_expanded(minis, monkeypatch):
    monkeypatch.setenv("HOME", str(minis["pets"][0].parent))
    assert len(load_transfer("pets", f"~/{minis['pets'][0].name}").test) == 12


# Downloads: torchvision is asked, and only then

FETCHED = [name for name in NAMES if TRANSFER_DATASETS[name].fetch]


@pytest.fixture
def torchvision_brings(monkeypatch) -> Callable:
    "Let torchvision's downloads make a miniature; gives the list of what it asked for."
    def patch(name, root) -> list:
        asked = []

        def arrive(url, *args, **kwargs):
            if not asked: MINIATURES[name](root)
            asked.append(url)
        for module in """food101 cifar sun397 fgvc_aircraft voc dtd oxford_iiit_pet
                         flowers102""".split():
            function = f"torchvision.datasets.{module}.download_and_extract_archive"
            monkeypatch.setattr(function, arrive)
        monkeypatch.setattr("torchvision.datasets.flowers102.download_url", arrive)
        for cls in (tv.CIFAR10, tv.Flowers102):  # a miniature has other checksums
            monkeypatch.setattr(cls, "_check_integrity", lambda self: bool(asked))
        monkeypatch.setattr(tv.CIFAR10, "_load_meta", lambda self: None)
        return asked
    return patch


@pytest.mark.parametrize("name", [n for n in FETCHED if n != "caltech101"])
def test_download(torchvision_brings, tmp_path, name):
    asked = torchvision_brings(name, tmp_path)
    with pytest.raises(FileNotFoundError): load_transfer(name, tmp_path)
    assert asked == []  # not without being told
    assert len(load_transfer(name, tmp_path, download=True).test)
    assert asked and all(url.startswith("http") for url in asked)
    n = len(asked)
    load_transfer(name, tmp_path, download=True)
    assert len(asked) == n  # it is there


def test_download_of_caltech101(tmp_path, monkeypatch):
    "torchvision takes this one apart in steps that a miniature does not have."
    def download(self): miniatures.caltech101(tmp_path)
    monkeypatch.setattr(tv.Caltech101, "download", download)
    assert len(load_transfer("caltech101", tmp_path, download=True).test) == 9


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FETCHED])
def test_what_torchvision_cannot_download_is_told(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="Needed: "):
        load_transfer(name, tmp_path, download=True)


def test_download_of_sun397_still_needs_the_lists(tmp_path, monkeypatch):
    "torchvision gets the images alone."
    def images(*args, **kwargs):
        miniatures.sun397(tmp_path)
        for path in (tmp_path / "SUN397").glob("T*_0?.txt"): path.unlink()
    monkeypatch.setattr("torchvision.datasets.sun397.download_and_extract_archive", images)
    with pytest.raises(FileNotFoundError, match="no SUN397/Training_01.txt.*Partitions.zip"):
        load_transfer("sun397", tmp_path, download=True)


# Each format

def test_voc_says_what_the_creators_lists_say(minis):
    root, _ = minis["voc2007"]
    data = load_transfer("voc2007", root)
    assert data.classes == VOC_CLASSES == sorted(VOC_CLASSES) and len(VOC_CLASSES) == 20
    seen = Counter()
    for part, split in zip(("train", "val", "test"), parts(data), strict=True):
        assert split.labels.shape == split.difficult.shape == (len(split), 20)
        assert split.labels.dtype == torch.int64 and split.difficult.dtype == torch.bool
        for c, name in enumerate(VOC_CLASSES):
            lists = root / "VOCdevkit/VOC2007/ImageSets/Main" / f"{name}_{part}.txt"
            rows = [line.split() for line in lists.read_text().splitlines()]
            assert [key for key, _ in rows] == [path.stem for path in split.images]
            ours = [0 if d else 2 * y - 1 for y, d in
                    zip(split.labels[:, c].tolist(), split.difficult[:, c].tolist(), strict=True)]
            assert ours == [int(answer) for _, answer in rows]
            seen.update(ours)
    assert min(seen[answer] for answer in (-1, 0, 1)) > 5  # each answer was tried
    assert torch.equal(data.fit.difficult, torch.cat([data.train.difficult, data.valid.difficult]))
    some = torch.tensor([2, 0])
    assert torch.equal(data.test.select(some).difficult, data.test.difficult[some])


def test_voc_unknown_class_is_refused(mini):
    root = mini("voc2007")
    victim = sorted((root / "VOCdevkit/VOC2007/Annotations").iterdir())[0]
    victim.write_text(victim.read_text().replace("<name>person</name>", "<name>yeti</name>"))
    with pytest.raises(ValueError, match=f"{victim.name} has an object of the unknown class 'yet"):
        load_transfer("voc2007", root)


@pytest.mark.parametrize("name, images, lists", [
    ("dtd", "dtd/dtd/images", [f"dtd/dtd/labels/{part}1.txt" for part in ("train", "val", "test")]),
    ("sun397", "SUN397", ["SUN397/Training_01.txt", "SUN397/Testing_01.txt"]),
])
def test_first_split_is_used(minis, name, images, lists):
    root = minis[name][0]
    data = load_transfer(name, root)
    splits = parts(data) if len(lists) == 3 else [data.fit, data.test]
    for path, split in zip(lists, splits, strict=True):
        keys = sorted(line.lstrip("/") for line in (root / path).read_text().split())
        assert sorted(p.relative_to(root / images).as_posix() for p in split.images) == keys


def test_caltech101_trains_on_30_images_a_class(minis):
    data = load_transfer("caltech101", minis["caltech101"][0])
    assert data.fit.labels.bincount().tolist() == [30, 30, 30]
    assert data.test.labels.bincount().tolist() == [5, 3, 1]
    assert data.classes[0] == "BACKGROUND_Google"


def test_caltech101_class_that_is_too_small(mini):
    root = mini("caltech101")
    for i in (1, 2): (root / f"caltech101/101_ObjectCategories/accordion/image_000{i}.jpg").unlink()
    with pytest.raises(ValueError, match="class 2 has 29 images, fewer than the 30"):
        load_transfer("caltech101", root)


def test_our_readers_agree_with_torchvision(minis, monkeypatch):
    "Where we do not use torchvision's class, it still reads the same labels."
    monkeypatch.setattr(tv.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(tv.Flowers102, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    for name, cls in [("cifar10", tv.CIFAR10), ("cifar100", tv.CIFAR100)]:
        data = load_transfer(name, minis[name][0])
        for split, train in ((data.fit, True), (data.test, False)):
            theirs = cls(minis[name][0], train=train)
            assert theirs.classes == data.classes
            pixels = torch.from_numpy(theirs.data).permute(0, 3, 1, 2)
            a = sorted(zip(pixels.flatten(1).tolist(), theirs.targets, strict=True))
            b = sorted(zip(split.images.flatten(1).tolist(), split.labels.tolist(), strict=True))
            assert a == b
    data = load_transfer("flowers102", minis["flowers102"][0])
    for split, name in zip(parts(data), ("train", "val", "test"), strict=True):
        theirs = tv.Flowers102(minis["flowers102"][0], name)
        assert theirs._image_files == split.images and theirs._labels == split.labels.tolist()
    theirs = tv.SUN397(minis["sun397"][0])
    labels = dict(zip(theirs._image_files, theirs._labels, strict=True))
    data = load_transfer("sun397", minis["sun397"][0])
    assert theirs.classes == data.classes and len(labels) == 78 > len(data.fit) + len(data.test)
    for split in parts(data): assert [labels[p] for p in split.images] == split.labels.tolist()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("below", [True, False])
def test_cifar_from_folders(tmp_path, name, below):
    classes = ["bear", "cat", "worm"]
    miniatures.folders(tmp_path / name if below else tmp_path, classes, "png", train=20, test=4)
    data = load_transfer(name, tmp_path)
    assert (data.classes, tuple(map(len, parts(data)))) == (classes, (54, 6, 12))
    assert all(label_of(image) == label for split in parts(data) for image, label in split)


def test_cifar_prefers_whatever_is_complete(mini):
    root = mini("cifar10")
    miniatures.folders(root / "cifar10", ["cat", "dog"], "png", train=10, test=2)
    assert len(load_transfer("cifar10", root).classes) == 3
    (root / "cifar-10-batches-py" / "test_batch").unlink()
    assert load_transfer("cifar10", root).classes == ["cat", "dog"]


class Evil:
    def __reduce__(self): return (print, ("a pickle ran code",))


@pytest.mark.parametrize("protocol", range(6))
def test_cifar_pickle_that_runs_code_is_refused(mini, capsys, protocol):
    root = mini("cifar10")
    victim = root / "cifar-10-batches-py" / "data_batch_3"
    victim.write_bytes(pickle.dumps({"data": Evil()}, protocol=protocol))
    with pytest.raises(ValueError, match="data_batch_3: .*print has no place"):
        load_transfer("cifar10", root)
    assert capsys.readouterr().out == ""


def test_cifar_pickle_that_is_cut_short_is_named(mini):
    root = mini("cifar100")
    victim = root / "cifar-100-python" / "train"
    victim.write_bytes(victim.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot read .*train: "): load_transfer("cifar100", root)


def test_miniature_cifar_is_pickled_as_the_original(minis):
    "Python 2's strings and numpy's old module names, as in the files of 2009."
    text = (minis["cifar10"][0] / "cifar-10-batches-py" / "data_batch_1").read_bytes()
    assert text[:2] == b"\x80\x02" and b"cnumpy.core.multiarray\n_reconstruct\n" in text
    assert b"cnumpy\ndtype\n" in text and b"_codecs" not in text and b"U\x04data" in text


@pytest.mark.parametrize("layout", ["images", "folders", "valid folder", "valid list"])
def test_birdsnap_layouts(mini, layout):
    root = mini("birdsnap")
    base, names = root / "birdsnap", ["Acadian_Flycatcher", "Blue_Jay", "Zone_tailed_Hawk"]
    if layout == "images":
        shutil.move(base / "download" / "images", base / "images")
    elif layout == "valid list":
        listed = [f"{name}/{100 * i + 5:04d}.jpg" for i, name in enumerate(names)]
        miniatures.write(base / "valid_images.txt", ["path", *listed])
    else:
        shutil.rmtree(base)
        sizes = dict(train=20, test=4) if layout == "folders" else dict(train=20, valid=1, test=4)
        miniatures.folders(base, names, "jpg", **sizes)
    data = load_transfer("birdsnap", root)
    expected = {"valid folder": (60, 3, 12), "valid list": (57, 3, 12)}.get(layout, (54, 6, 12))
    assert (data.classes, tuple(map(len, parts(data)))) == (names, expected)
    assert all(label_of(image) == label for split in parts(data) for image, label in split)
    assert ("held out" in data.info["split"]) == ("valid" not in layout)


def test_class_without_training_images_is_refused(tmp_path):
    miniatures.folders(tmp_path / "birdsnap", ["Blue_Jay"], "jpg", train=5)
    miniatures.folders(tmp_path / "birdsnap", ["Blue_Jay", "Dodo"], "jpg", test=2)
    with pytest.raises(ValueError, match="no class for .*Dodo.* in training"):
        load_transfer("birdsnap", tmp_path)


def test_classes_are_the_folders_below_the_part(tmp_path):
    "Whatever folders lie below them; an image outside of all is named."
    base = tmp_path / "birdsnap"
    miniatures.folders(base, ["Blue_Jay", "Dodo"], "jpg", train=8, test=2)
    for i, image in enumerate(sorted(base.glob("*/*/*.jpg"))):
        inner = image.parent / f"year {i % 2}"
        inner.mkdir(exist_ok=True)
        image.rename(inner / image.name)
    data = load_transfer("birdsnap", tmp_path)
    assert data.classes == ["Blue_Jay", "Dodo"]
    shutil.copy(next(base.glob("test/*/*/*.jpg")), base / "test/stray.jpg")
    with pytest.raises(ValueError, match="stray.jpg lies in no class folder"):
        load_transfer("birdsnap", tmp_path)


def test_splits_with_other_classes_are_refused(mini):
    root = mini("dtd")
    labels = root / "dtd/dtd/labels/test1.txt"
    labels.write_text("".join(s for s in labels.read_text().splitlines(True) if "dotted" not in s))
    with pytest.raises(ValueError, match="test and train of DTD differ in their classes"):
        load_transfer("dtd", root)


# Real images

def test_cifar10_is_complete(cifar10):
    data = load_transfer("cifar10", cifar10.parent)
    assert tuple(map(len, parts(data))) == TRANSFER_DATASETS["cifar10"].sizes
    assert data.info["complete"] and len(data.classes) == TRANSFER_DATASETS["cifar10"].classes
    for split, n in zip(parts(data), (4500, 500, 1000), strict=True):
        assert split.labels.bincount().tolist() == [n] * 10
    image, label = data.valid[7]
    assert image.size == (32, 32) and data.valid.images[7].parent.name == data.classes[label]


def test_cifar100_sample(cifar100_sample):
    data = load_transfer("cifar100", cifar100_sample)
    assert tuple(map(len, parts(data))) == (3600, 400, 1000) and not data.info["complete"]
    assert data.valid.labels.bincount().tolist() == [4] * 100
