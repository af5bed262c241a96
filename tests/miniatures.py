"""Miniature copies of the twelve transfer data sets, each in the format its creators publish.

Every image has one colour: red says the label (`red`), green and blue are its own, so that a test
can tell from the pixels alone what an image is and whether it turns up twice. Names, headers and
extra columns, files and images that a reader must step over are there as in the originals.
"""
import json
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

import numpy as np
from PIL import Image
from scipy.io import savemat

VOC = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike
         person pottedplant sheep sofa train tvmonitor""".split()


@dataclass
class Expected:
    "Features that a reader should find."
    classes: list[str]
    sizes: tuple[int, int, int]  # Training, validation and test images


def red(label: int) -> int: return 20 + 40 * label


def label_of(image: Image.Image) -> int:
    "The label that the colour says; JPEG is off by a few levels, labels are 40 apart."
    return round((image.getpixel((image.width // 2, image.height // 2))[0] - 20) / 40)


class Painter:
    "Draws images of one colour, each another."
    def __init__(self): self.count = 0

    def colour(self, label: int) -> tuple[int, int, int]:
        self.count += 1
        return red(label), 4 * (self.count % 64), 16 * (self.count // 64)

    def __call__(self, path: Path, label: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), self.colour(label)).save(path, quality=95)


def write(path: Path, lines: list[str]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


# JSON and lists

def food101(root: Path) -> Expected:
    classes, paint, base = ["apple_pie", "baby_back_ribs", "waffles"], Painter(), root / "food-101"
    for part, n in (("train", 20), ("test", 5)):
        listed = {c: [f"{c}/{part == 'test':d}{i:05d}" for i in range(n)] for c in classes}
        for label, name in enumerate(classes):
            for key in listed[name]: paint(base / "images" / f"{key}.jpg", label)
        write(base / "meta" / f"{part}.txt", sum(listed.values(), []))
        (base / "meta" / f"{part}.json").write_text(json.dumps(listed))
    write(base / "meta" / "classes.txt", classes)
    write(base / "meta" / "labels.txt", [c.replace("_", " ").capitalize() for c in classes])
    return Expected(classes, (54, 6, 15))


def sun397(root: Path) -> Expected:
    "Two of the ten splits, and images that belong to none."
    classes, paint = ["abbey", "apartment_building/outdoor", "zoo"], Painter()
    base, lists = root / "SUN397", {}
    for label, name in enumerate(classes):
        keys = [f"/{name[0]}/{name}/sun_{letter}xyz.jpg" for letter in ascii_lowercase]
        for key in keys: paint(base / key[1:], label)
        for split, shift in (("01", 0), ("02", 3)):
            lists.setdefault(f"Training_{split}", []).extend(keys[shift:shift + 10])
            lists.setdefault(f"Testing_{split}", []).extend(keys[shift + 10:shift + 20])
    for name, lines in lists.items(): write(base / f"{name}.txt", lines)
    write(base / "ClassName.txt", [f"/{name[0]}/{name}" for name in classes])
    return Expected(classes, (27, 3, 30))


def aircraft(root: Path) -> Expected:
    "Names of variants have spaces and slashes."
    classes, paint = ["727-200", "Challenger 600", "F-16A/B"], Painter()
    base, keys = root / "fgvc-aircraft-2013b" / "data", {}
    for part, n in (("train", 5), ("val", 4), ("test", 3)):
        for i in range(n):
            for label, name in enumerate(classes):
                key = f"{1000000 + 7919 * paint.count:07d}"
                paint(base / "images" / f"{key}.jpg", label)
                keys.setdefault(part, []).append((key, name))
    keys["trainval"] = sorted(keys["train"] + keys["val"])
    for part, rows in keys.items():
        write(base / f"images_variant_{part}.txt", [f"{key} {name}" for key, name in rows])
        write(base / f"images_manufacturer_{part}.txt", [f"{key} Boeing" for key, _ in rows])
        write(base / f"images_{part}.txt", [key for key, _ in rows])
    write(base / "variants.txt", classes)
    write(base / "manufacturers.txt", ["Boeing"])
    return Expected(classes, (15, 12, 9))


def dtd(root: Path) -> Expected:
    "Two of the ten splits, which deal the same images otherwise."
    classes, paint, base = ["banded", "dotted", "zigzagged"], Painter(), root / "dtd" / "dtd"
    lists = {}
    for label, name in enumerate(classes):
        keys = [f"{name}/{name}_{2 * i + 1:04d}.jpg" for i in range(9)]
        for key in keys: paint(base / "images" / key, label)
        for split, order in (("1", keys), ("2", keys[::-1])):
            for j, part in enumerate(("train", "val", "test")):
                lists.setdefault(f"{part}{split}", []).extend(order[3 * j:3 * j + 3])
    for name, lines in lists.items(): write(base / "labels" / f"{name}.txt", lines)
    return Expected(classes, (9, 9, 9))


def pets(root: Path) -> Expected:
    "Names of cats are capitalised, of dogs not; files without a list, and masks."
    breeds, paint = ["Abyssinian", "american_bulldog", "yorkshire_terrier"], Painter()
    base, everything = root / "oxford-iiit-pet", []
    for part, n in (("trainval", 20), ("test", 4)):
        rows = []
        for label, breed in enumerate(breeds):
            for i in range(n):
                key = f"{breed}_{i + 100 * (part == 'test')}"
                paint(base / "images" / f"{key}.jpg", label)
                paint(base / "annotations" / "trimaps" / f"{key}.png", 0)
                rows.append(f"{key} {label + 1} {1 if breed[0].isupper() else 2} 1")
        write(base / "annotations" / f"{part}.txt", rows)
        everything += rows
    write(base / "annotations" / "list.txt", ["#Image CLASS-ID SPECIES BREED ID", *everything])
    (base / "images" / "Abyssinian_100.mat").write_bytes(b"")
    return Expected(["Abyssinian", "American Bulldog", "Yorkshire Terrier"], (54, 6, 12))


def caltech101(root: Path) -> Expected:
    "Classes of different sizes, the class of clutter, and a file in it that is no image."
    sizes, paint = dict(BACKGROUND_Google=35, Faces=33, accordion=31), Painter()
    base = root / "caltech101" / "101_ObjectCategories"
    for label, (name, n) in enumerate(sizes.items()):
        for i in range(n): paint(base / name / f"image_{i + 1:04d}.jpg", label)
    write(base / "BACKGROUND_Google" / "tmp", ["not an image"])
    return Expected(list(sizes), (81, 9, 9))


# MATLAB files

def cars(root: Path) -> Expected:
    classes = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"]
    base, paint = root / "stanford_cars", Painter()
    (base / "devkit").mkdir(parents=True)
    boxes = [f"bbox_{k}" for k in ("x1", "y1", "x2", "y2")]
    dtype = [(k, object) for k in (*boxes, "class", "fname")]
    places = dict(train=base / "devkit" / "cars_train_annos.mat",
                  test=base / "cars_test_annos_withlabels.mat")
    for part, n in (("train", 20), ("test", 4)):
        rows = np.zeros((1, 3 * n), dtype=dtype)
        for i in range(3 * n):
            name, label = f"{i + 1:05d}.jpg", (7 * i) % 3
            paint(base / f"cars_{part}" / name, label)
            rows[0, i] = (1.0, 2.0, 14.0, 10.0, np.uint8(label + 1), name)
        savemat(places[part], {"annotations": rows})
    names = np.empty((1, 3), dtype=object)
    names[0] = classes
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    return Expected(classes, (54, 6, 12))


def flowers102(root: Path) -> Expected:
    "Numbers of images, dealt at random over the three parts."
    base, paint = root / "flowers-102", Painter()
    labels = np.arange(36) % 3
    for i, label in enumerate(labels): paint(base / "jpg" / f"image_{i + 1:05d}.jpg", label)
    order = np.random.RandomState(0).permutation(36)
    parts = [np.concatenate([order[labels[order] == c][a:b] for c in range(3)]) + 1
             for a, b in ((0, 3), (3, 6), (6, 12))]
    savemat(base / "imagelabels.mat", {"labels": (labels + 1)[None].astype(np.uint8)})
    sets = zip(("trnid", "valid", "tstid"), parts, strict=True)
    savemat(base / "setid.mat", {k: v[None].astype(np.uint16) for k, v in sets})
    return Expected(["1", "2", "3"], (9, 9, 18))


# XML

def _object(name: str, difficult: bool) -> str:
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    part = f"<part><name>head</name>{box}</part>" if name == "person" else ""
    return (f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated>"
            f"<difficult>{difficult:d}</difficult>{box}{part}</object>")


def voc2007(root: Path) -> Expected:
    "Several objects an image, some difficult; the creators' answers per class beside them."
    base, paint, rng = root / "VOCdevkit" / "VOC2007", Painter(), np.random.RandomState(0)
    answers = {}
    for part, n in (("train", 6), ("val", 5), ("test", 8)):
        for _ in range(n):
            key = f"{paint.count + 1:06d}"
            paint(base / "JPEGImages" / f"{key}.jpg", 0)
            shown = [(VOC[rng.randint(20)], rng.rand() < 0.4) for _ in range(rng.randint(1, 6))]
            shown += [("person", True)] + [("person", False)] * int(rng.rand() < 0.5)
            text = "".join(_object(name, hard) for name, hard in shown)
            xml = f"<annotation><filename>{key}.jpg</filename>{text}</annotation>"
            write(base / "Annotations" / f"{key}.xml", [xml])
            row = {name: -1 for name in VOC}
            for name, hard in shown: row[name] = max(row[name], 0 if hard else 1)
            answers.setdefault(part, []).append((key, row))
    answers["trainval"] = sorted(answers["train"] + answers["val"], key=lambda item: item[0])
    lists = base / "ImageSets" / "Main"
    for part, rows in answers.items():
        write(lists / f"{part}.txt", [key for key, _ in rows])
        for name in VOC:
            write(lists / f"{name}_{part}.txt", [f"{key} {row[name]:2d}" for key, row in rows])
    return Expected(VOC, (6, 5, 8))


# Pickles

class _Python2Pickler(pickle._Pickler):
    "Writes text, bytes and numpy's names as Python 2 did, in which CIFAR was pickled."
    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, file): super().__init__(file, protocol=2)

    def save_text(self, text):
        raw = text.encode("latin1") if isinstance(text, str) else bytes(text)
        short = len(raw) < 256
        head = pickle.SHORT_BINSTRING if short else pickle.BINSTRING
        self.write(head + struct.pack("<B" if short else "<i", len(raw)) + raw)
        self.memoize(text)

    def save_name(self, thing, name=None):
        module = "numpy.core.multiarray" if thing.__name__ == "_reconstruct" else "numpy"
        self.write(pickle.GLOBAL + f"{module}\n{thing.__name__}\n".encode())
        self.memoize(thing)

    dispatch[str] = dispatch[bytes] = save_text
    save_global = save_name
    dispatch[type] = save_name


def pickle_as_python2(path: Path, contents: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file: _Python2Pickler(file).dump(contents)


def _batch(paint: Painter, n: int) -> tuple[np.ndarray, list[int]]:
    "`n` images of each of three classes, as rows of 3 x 32 x 32 bytes."
    labels = [label for _ in range(n) for label in range(3)]
    colours = np.array([paint.colour(label) for label in labels], dtype=np.uint8)
    return colours.repeat(1024, axis=1), labels


def cifar10(root: Path) -> Expected:
    classes, paint = ["airplane", "automobile", "bird"], Painter()
    base = root / "cifar-10-batches-py"
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data, labels = _batch(paint, 4)
        files = [f"image_{i}.png" for i in range(len(labels))]
        pickle_as_python2(base / name, {"batch_label": name, "labels": labels, "data": data,
                                        "filenames": files})
    pickle_as_python2(base / "batches.meta", {"num_cases_per_batch": 12, "label_names": classes,
                                              "num_vis": 3072})
    return Expected(classes, (54, 6, 12))


def cifar100(root: Path) -> Expected:
    classes, paint, base = ["apple", "bear", "worm"], Painter(), root / "cifar-100-python"
    for name, n in (("train", 20), ("test", 4)):
        data, labels = _batch(paint, n)
        pickle_as_python2(base / name, {"fine_labels": labels, "data": data, "batch_label": name,
                                        "coarse_labels": [0] * len(labels),
                                        "filenames": ["x.png"] * len(labels)})
    pickle_as_python2(base / "meta", {"fine_label_names": classes,
                                      "coarse_label_names": ["animals", "fruit"]})
    return Expected(classes, (54, 6, 12))


# Folders

def folders(base: Path, classes: list[str], suffix: str, **parts: int):
    "`PART/CLASS/*` with so many images of each class in each part."
    paint = Painter()
    for part, n in parts.items():
        for label, name in enumerate(classes):
            for i in range(n): paint(base / part / name / f"{i}.{suffix}", label)


def birdsnap(root: Path) -> Expected:
    "As the creators' script leaves it: some listed images could not be fetched."
    names, paint = ["Acadian_Flycatcher", "Blue_Jay", "Zone_tailed_Hawk"], Painter()
    base, rows, test = root / "birdsnap", [], []
    for label, name in enumerate(names):
        keys = [f"{name}/{100 * label + i:04d}.jpg" for i in range(26)]
        rows += [f"http://x/{key}\tmd5\t{key}\t{label + 1}\t1\t1\t9\t9" for key in keys]
        test += keys[20:25]
        for key in keys[:24]: paint(base / "download" / "images" / key, label)
    write(base / "images.txt", ["url\tmd5\tpath\tspecies_id\tbb_x1\tbb_y1\tbb_x2\tbb_y2", *rows])
    write(base / "test_images.txt", ["path", *test])
    species = [f"{i + 1}\t{n.replace('_', ' ')}\tAvis\t{n}" for i, n in enumerate(names)]
    write(base / "species.txt", ["id\tcommon\tscientific\tdir", *species])
    return Expected(names, (54, 6, 12))


MINIATURES = {f.__name__: f for f in (food101, cifar10, cifar100, birdsnap, sun397, cars, aircraft,
                                      voc2007, dtd, pets, caltech101, flowers102)}
