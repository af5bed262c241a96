"Files that nobody vouches for: none starts a program, ends the process, or fails without its name."
import io
import os
import pickle
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from sklearn.datasets import load_sample_images

import miniatures
import simclr_nb
from simclr_nb.data import simclr_dls
from simclr_nb.images.files import JpegFiles, read_pixels
from simclr_nb.images.pixels import MAX_PIXELS, PixelRules, probe_image, read_image
from simclr_nb.images.shards import NamedImage
from simclr_nb.transfer.datasets import load_transfer
from simclr_nb.views.crop import RandomResizedCrop

PHOTO = Image.fromarray(load_sample_images().images[1]).resize((48, 40))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"


def fresh(code: str, *args, **kwargs) -> subprocess.CompletedProcess:
    "Run code in a process of its own."
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True,
                          text=True, timeout=120, **kwargs)


def bomb(path: Path, side: int = 13_300) -> Path:
    "A PNG of one colour, small on disk."
    Image.new("1", (side, side)).save(path)
    return path


# No program is started

def test_eps_named_jpg_starts_no_program(tmp_path):
    "Pillow would run `gs`; the first `gs` in PATH is ours, and leaves a mark."
    (tmp_path / "bin").mkdir()
    gs = tmp_path / "bin" / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    gs.chmod(0o755)
    (tmp_path / "data").mkdir()
    for i in range(4): PHOTO.save(tmp_path / "data" / f"{i}.jpg")
    (tmp_path / "data" / "z.jpg").write_bytes(EPS)
    code = ("import sys; from simclr_nb.cli import pretrain; "
            "sys.exit(pretrain([sys.argv[1], '--epochs', '1', '--out', sys.argv[2]]))")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = fresh(code, tmp_path / "data", tmp_path / "run", env=dict(os.environ, PATH=path))
    assert done.returncode == 2 and "z.jpg: it is damaged, or none of JPEG, PNG" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "started").exists()


def test_every_open_names_its_formats():
    "In the whole package; and only one room opens images."
    opened = {}
    for path in Path(simclr_nb.__file__).parent.rglob("*.py"):
        calls = re.findall(r"Image\.open\(([^\n]*)", path.read_text(encoding="utf-8"))
        if calls: opened[path.name] = calls
    assert list(opened) == ["pixels.py"]
    assert all("formats=" in call for call in opened["pixels.py"])


# Bombs

def test_bomb_is_refused_before_it_is_decoded(tmp_path):
    bomb(tmp_path / "bomb.png")
    for i in range(4): PHOTO.save(tmp_path / f"{i}.png")
    code = ("import sys, resource; from simclr_nb.data import simclr_dls\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "try: simclr_dls(sys.argv[1], progress=False)\n"
            "except ValueError as error: print(error, file=sys.stderr)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = fresh(code, tmp_path)
    assert int(done.stdout) < 60_000  # KiB; decoded, it takes 170,000 and more
    line, = done.stderr.strip().splitlines()
    assert re.search(r"bomb.png: 13,300 x 13,300 pixels are more than the limit of 89,478,485: "
                     r"raise max_pixels \(--max-pixels\) to read it", line)
    dls = simclr_dls(tmp_path, bs=2, skip_bad=True, progress=False)
    assert len(dls.info["skipped"]) == 1


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_limit_of_pixels_can_be_set(tmp_path, name):
    PHOTO.save(tmp_path / name)
    low = PixelRules(max_pixels=48 * 40 - 1)
    for read in (read_image, read_pixels):
        assert read(tmp_path / name, PixelRules(max_pixels=48 * 40)) is not None
        with pytest.raises(ValueError, match=f"{name}: 48 x 40 pixels are more than the limit"):
            read(tmp_path / name, low)
    assert "1,919" in probe_image(tmp_path / name, low).reason
    for i in range(4): PHOTO.save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="max_pixels"):
        simclr_dls(tmp_path, max_pixels=1000, progress=False)


def test_larger_limit_reads_what_pillow_alone_would_refuse(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    PHOTO.save(tmp_path / "a.png")
    assert probe_image(tmp_path / "a.png", PixelRules(max_pixels=400)).reason.endswith("to read it")
    assert probe_image(tmp_path / "a.png").reason == "" and Image.MAX_IMAGE_PIXELS == MAX_PIXELS


# Damaged and small files

@pytest.mark.parametrize("size", [(60, 7), (7, 60), (1, 1), (3, 200)])
@pytest.mark.parametrize("turn", [1, 6])
def test_small_jpeg_is_sound(tmp_path, size, turn):
    "A side below 8 pixels was a division by zero in the probe."
    (exif := Image.Exif())[0x0112] = turn
    PHOTO.resize(size).save(tmp_path / "small.jpg", exif=exif)
    probe = probe_image(tmp_path / "small.jpg")
    assert (probe.size, probe.reason) == (size if turn == 1 else size[::-1], "")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_small_jpeg_is_used(tmp_path, skip_bad):
    for i in range(5): PHOTO.save(tmp_path / f"{i}.jpg")
    PHOTO.resize((60, 7)).save(tmp_path / "crop.jpg")
    dls = simclr_dls(tmp_path, size=32, bs=2, num_workers=0, skip_bad=skip_bad, progress=False)
    assert len(dls.train.dataset) + len(dls.valid.dataset) == 6 and not dls.info["skipped"]
    assert dls.one_batch()[0].shape[-3:] == (3, 32, 32)


def variants(name: str) -> bytes:
    "A small image in a format."
    kwargs = dict(tif=dict(compression="tiff_lzw"), deep=dict(compression="tiff_lzw")).get(name, {})
    image = PHOTO
    if name == "deep": image = Image.fromarray(np.asarray(PHOTO.convert("L")).astype("uint16") * 9)
    if name == "gif": kwargs = dict(save_all=True, append_images=[PHOTO.rotate(90)])
    format = dict(jpg="JPEG", tif="TIFF", deep="TIFF", jp2="JPEG2000", ppm="PPM").get(name, name)
    image.save(content := io.BytesIO(), format, **kwargs)
    return content.getvalue()


@pytest.mark.parametrize("name", "jpg png gif bmp webp tif deep ppm jp2 avif".split())
def test_damaged_file_of_any_format_is_one_line(tmp_path, name):
    "Cut, overwritten and shuffled bytes: the image, or a `ValueError` that names the file."
    if name in ("webp", "avif") and not features.check(name): pytest.skip("not in this Pillow")
    sound = variants(name)
    rng = random.Random(name)
    path = tmp_path / f"bad.{name}"
    wrong = []
    for i in range(60):
        data = bytearray(sound)
        if i % 3 == 0: del data[rng.randrange(len(data)):]
        else:
            for _ in range(rng.choice([1, 4, 30])):
                data[rng.randrange(len(data) if i % 3 == 1 else 200)] = rng.randrange(256)
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probe = probe_image(path)
            assert "\n" not in probe.reason and (probe.size == (0, 0)) == bool(probe.reason)
            for read in (read_image, read_pixels):
                try: read(path)
                except ValueError as error: wrong.append(str(error))
    assert wrong and all(w.startswith(f"cannot read image {path}: ") for w in wrong)
    assert not any("\n" in w for w in wrong)


@pytest.mark.parametrize("error", [
    RuntimeError("decoder"), ZeroDivisionError("by zero"), KeyError("tag"), AssertionError(),
    MemoryError(), OverflowError("int too large"), EOFError(), NotImplementedError("two\nlines"),
    AttributeError("none"), RecursionError("deep"), Image.DecompressionBombError("too many"),
])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    PHOTO.save(tmp_path / "a.png")

    def fail(self): raise error
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", fail)
    with pytest.raises(ValueError, match="cannot read image .*a.png: .") as caught:
        read_image(tmp_path / "a.png")
    assert "\n" not in str(caught.value)
    assert probe_image(tmp_path / "a.png").reason


def test_errors_of_the_system_are_not_blamed_on_the_file(tmp_path, monkeypatch):
    PHOTO.save(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError): read_image(tmp_path / "gone.png")

    def full(*args, **kwargs): raise OSError(24, "Too many open files")
    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(OSError, match="Too many open files"): probe_image(tmp_path / "a.png")


def test_empty_and_foreign_files_are_named(tmp_path):
    for name, content in {"empty.jpg": b"", "text.jpg": b"no image", "eps.jpg": EPS}.items():
        (tmp_path / name).write_bytes(content)
        files = JpegFiles([tmp_path / name], torch.tensor([-1]), RandomResizedCrop(32))
        for read in (read_image, read_pixels, lambda path: files[0]):
            with pytest.raises(ValueError, match=f"cannot read image .*{name}: "):
                read(tmp_path / name)
    with pytest.raises(ValueError, match="cannot read image a.tar:b.jpg: it is damaged, or none"):
        read_image(NamedImage(EPS, "a.tar:b.jpg"))


def test_name_with_escape_codes_is_shown_as_text(tmp_path):
    path = tmp_path / "a\n\x1b[31m.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(ValueError) as caught: read_image(path)
    assert str(caught.value).isprintable()


# Pickles

def test_pickle_of_an_object_array_is_refused(tmp_path):
    "numpy takes bytes of such a file as addresses, and the process dies."
    pointers = bytes.fromhex("41" * 32)
    kind = (b"cnumpy\ndtype\nU\x02O8\x89\x88\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
            b"K\x00tb")
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
             b"(K\x01K\x04\x85" + kind + b"\x89U\x20" + pointers + b"tb")
    miniatures.cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(
        b"\x80\x02}U\x04data" + array + b"s.")
    code = ("import sys; from simclr_nb.transfer.datasets import load_transfer\n"
            "try: load_transfer('cifar10', sys.argv[1])\n"
            "except ValueError as error: print(error)")
    done = fresh(code, tmp_path)
    assert done.returncode == 0
    assert "data_batch_2: type 'O8' has no place in it, only u1" in done.stdout


@pytest.mark.parametrize("change, message", [
    (dict(data=np.zeros((12, 3072), "float32")), "type 'f4' has no place"),
    (dict(data=np.zeros((12, 3072), "int8")), "type 'i1' has no place"),
    (dict(data=np.zeros((12, 5), "uint8")), "cannot reshape"), (dict(data=None), "reshape"),
    (dict(labels=[0]), "12 images, 1 labels"), (dict(labels=[99] * 12), "from 0 to 2"),
    (dict(labels=["cat"] * 12), "whole numbers"), (dict(labels=None), "not iterable"),
])
@pytest.mark.parametrize("protocol", [3, 4])
def test_cifar_batch_with_other_contents_is_named(tmp_path, change, message, protocol):
    miniatures.cifar10(tmp_path)
    contents = dict(data=np.zeros((12, 3072), "uint8"), labels=[0, 1, 2] * 4) | change
    path = tmp_path / "cifar-10-batches-py" / "data_batch_4"
    path.write_bytes(pickle.dumps(contents, protocol=protocol))
    with pytest.raises(ValueError, match=f"cannot read .*data_batch_4: .*{message}"):
        load_transfer("cifar10", tmp_path)


def test_damaged_pickles_are_one_line(tmp_path):
    miniatures.cifar100(tmp_path)
    path = tmp_path / "cifar-100-python" / "train"
    sound = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        data = bytearray(sound)
        for _ in range(5): data[rng.randrange(300)] = rng.randrange(256)
        path.write_bytes(data)
        try: load_transfer("cifar100", tmp_path)
        except ValueError as error: assert "\n" not in str(error) and "train" in str(error)


# Annotations

@pytest.mark.parametrize("data, victim", [
    ("flowers102", "flowers-102/imagelabels.mat"), ("flowers102", "flowers-102/setid.mat"),
    ("cars", "stanford_cars/devkit/cars_train_annos.mat"),
    ("cars", "stanford_cars/cars_test_annos_withlabels.mat"),
    ("food101", "food-101/meta/train.json"),
    ("voc2007", "VOCdevkit/VOC2007/Annotations/000003.xml"),
])
@pytest.mark.parametrize("how", ["cut", "empty", "noise"])
def test_damaged_annotation_is_named(tmp_path, data, victim, how):
    getattr(miniatures, data)(tmp_path)
    path = tmp_path / victim
    content = path.read_bytes()
    path.write_bytes(dict(cut=content[:len(content) // 2], empty=b"",
                          noise=random.Random(0).randbytes(len(content)))[how])
    with pytest.raises(ValueError, match=f"cannot read .*{path.name}: .") as caught:
        load_transfer(data, tmp_path)
    assert "\n" not in str(caught.value)
