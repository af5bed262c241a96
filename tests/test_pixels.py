"Values of more than 8 bits: order, levels, one range for a data set; channels that are refused."
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from PIL import Image, ImageOps
from torch.utils.data import TensorDataset

from simclr_nb.data import clean_loader, simclr_dls
from simclr_nb.images.files import read_pixels
from simclr_nb.images.pixels import PixelRules, pixel_rules, probe_image, read_image
from simclr_nb.images.source import folder_source
from simclr_nb.learner import simclr_learner
from simclr_nb.views.compiled import compiled_policy
from simclr_nb.views.policy import cifar_policy


def compiled_cifar(): return compiled_policy(cifar_policy())


RAMP = np.linspace(0, 1, 32 * 32).reshape(32, 32)


def tiff(path: Path, values: np.ndarray, order="<", packed=False, extra=(), photometric=None,
         planar=1) -> Path:
    "Write `(H, W)` or `(H, W, C)` as a TIFF of one strip; Pillow cannot write most of these."
    height, width, n = *values.shape[:2], values.shape[2] if values.ndim == 3 else 1
    form = dict(u=1, i=2, f=3)[values.dtype.kind]
    if photometric is None: photometric = 2 if n - len(extra) in (3, 4) else 1
    values = values.transpose(2, 0, 1) if planar == 2 else values
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    if packed: data = zlib.compress(data)
    shorts = {256: [width], 257: [height], 258: [values.itemsize * 8] * n,
              259: [8 if packed else 1], 262: [photometric], 277: [n], 278: [height],
              284: [planar], 339: [form] * n}
    if extra: shorts[338] = list(extra)
    longs = {273: [0], 279: [len(data)]}
    tags = sorted([(t, 3, "H", v) for t, v in shorts.items()]
                  + [(t, 4, "I", v) for t, v in longs.items()])
    offset = 8 + 2 + 12 * len(tags) + 4
    table = struct.pack(order + "H", len(tags))
    more = b""
    for tag, kind, code, numbers in tags:
        if tag == 273: numbers = [offset + sum(2 * len(v) for v in shorts.values() if len(v) > 2)]
        content = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        if len(content) > 4:
            where = struct.pack(order + "I", offset + len(more))
            more += content
            content = where
        table += struct.pack(order + "HHI", tag, kind, len(numbers)) + content.ljust(4, b"\0")
    start = b"II*\0" if order == "<" else b"MM\0*"
    path.write_bytes(start + struct.pack(order + "I", 8) + table + bytes(4) + more + data)
    return path


def png(path: Path, values: np.ndarray, color: int) -> Path:
    "Write 16-bit colour as PNG, every second row by the filter Sub."
    raw = values.astype(">u2").view(np.uint8).reshape(len(values), -1)
    bpp = 2 * values.shape[2]
    rows = b""
    for i, row in enumerate(raw):
        if i % 2: row = row - np.concatenate([np.zeros(bpp, np.uint8), row[:-bpp]])
        rows += bytes([i % 2]) + row.tobytes()

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check
    head = struct.pack(">IIBBBBB", values.shape[1], len(values), 16, color, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def check_order(values: np.ndarray, pixels: np.ndarray, levels: int = 100):
    "Grey values in the order of `values`, and many of them."
    in_order = pixels.ravel()[np.argsort(values.ravel(), kind="stable")].astype(int)
    assert (np.diff(in_order) >= 0).all() and len(set(in_order)) > levels
    assert (in_order[0], in_order[-1]) == (0, 255)


KINDS = {  # values in [low, high] as a type
    "unit_float": (0, 1, "float32"), "large_float": (0, 10_000, "float32"),
    "twelve_bit": (0, 4095, "uint16"), "hounsfield": (-1000, 2000, "int32"),
    "signed_16": (-1024, 3071, "int16"), "bytes_in_int32": (0, 255, "int32"),
    "signed_bytes": (-128, 127, "int8"), "beyond_int32": (2**31, 2**32 - 1, "uint32"),
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", KINDS)
def test_order_of_deep_values_is_kept(tmp_path, kind, order):
    low, high, dtype = KINDS[kind]
    if (order, dtype) == (">", "uint32"): pytest.skip("Pillow reads it in the other order alone")
    values = (low + RAMP * (high - low)).astype(dtype)
    for i in range(5): tiff(tmp_path / f"{i}.tif", values, order)
    rules = folder_source(tmp_path).check(progress=False).rules
    assert list(rules.ranges) == [dtype]
    assert rules.ranges[dtype] == (values.min(), values.max())
    check_order(values, np.asarray(read_image(tmp_path / "1.tif", rules))[..., 0])


@pytest.mark.parametrize("kind", ["little", "big", "packed", "alpha", "png", "png alpha",
                                  "png grey alpha"])
def test_colour_of_16_bits_keeps_its_levels(tmp_path, kind):
    "RGB uint16 0..3,000 became 0..11."
    color = np.stack([RAMP, RAMP.T, 1 - RAMP], 2)
    alpha = np.full((32, 32, 1), 65535)
    deep = (color * 3000).astype(np.uint16)
    shown = deep
    if kind == "png grey alpha":
        deep = deep[..., :1]
        shown = deep.repeat(3, 2)
    if "alpha" in kind: deep = np.concatenate([deep, alpha], 2).astype(np.uint16)
    path = tmp_path / ("a.png" if "png" in kind else "a.tif")
    if "png" in kind: png(path, deep, {2: 4, 3: 2, 4: 6}[deep.shape[2]])
    else:
        order = ">" if kind == "big" else "<"
        tiff(path, deep, order, kind == "packed", [2] if kind == "alpha" else [])
    probe = probe_image(path)
    assert (probe.reason, probe.kind, probe.low, probe.high) == ("", "uint16", 0, 3000)
    rules = PixelRules(ranges={"uint16": (0, 3000)})
    pixels = np.asarray(read_image(path, rules)).astype(int)
    assert np.abs(pixels - shown / 3000 * 255).max() < 0.5 + 1e-6
    for c in range(3): check_order(shown[..., c], pixels[..., c])


def depth_folder(folder: Path) -> Path:
    "Float, 12-bit and signed images in one folder, as in `make_folder.py depth`."
    folder.mkdir()
    for i in range(4):
        Image.fromarray(RAMP.astype("float32")).save(folder / f"unit_float_{i}.tif")
        Image.fromarray((RAMP * 4095).astype("uint16")).save(folder / f"twelve_bit_{i}.png")
        Image.fromarray((RAMP * 3000 - 1000).astype("int32")).save(folder / f"hounsfield_{i}.tif")
    return folder


@pytest.mark.parametrize("size", [None, 48])
def test_folder_of_deep_images(tmp_path, capsys, size):
    "In memory and from files: all levels, one printed line for each kind, the card."
    folder = depth_folder(tmp_path / "depth")
    if size:  # of two sizes, so that they stay files
        Image.fromarray((RAMP.repeat(2, 1) * 4095).astype("uint16")).save(folder / "wide.png")
    dls = simclr_dls(folder, size=size, bs=4, seed=0, num_workers=0, progress=False)
    printed = capsys.readouterr().out
    for line in ("4 files hold float32: 0 becomes 0, 1 becomes 255 in all of them",
                 "hold uint16: 0 becomes 0, 4095 becomes 255", "hold int32: -1000 becomes 0, 2000"):
        assert line in printed
    ranges = dict(float32=(0, 1), uint16=(0, 4095), int32=(-1000, 2000))
    assert {kind: tuple(ends) for kind, ends in dls.info["pixel_range"].items()} == ranges
    for batch, _ in [dls.train.one_batch(), *clean_loader(dls, 0)]:
        for image in batch.reshape(-1, *batch.shape[-3:]): assert len(image[0].unique()) > 50
    if not size:
        for x, _ in clean_loader(dls, 0):
            for image in x: check_order(RAMP, image[0].numpy())


def test_range_is_never_that_of_one_image(tmp_path):
    for i in range(6): tiff(tmp_path / f"{i}.tif", np.full((32, 32), 100 * i, np.int16))
    dls = simclr_dls(tmp_path, bs=2, num_workers=0, progress=False)
    found = {x[0, 0, 0].item() for part in range(2) for x in dls[part].dataset.images}
    assert found == {0, 51, 102, 153, 204, 255}


def test_range_can_be_set(tmp_path):
    folder = depth_folder(tmp_path / "depth")
    ends = dict(uint16=(0, 8190), int32=(-1000, 1000))
    dls = simclr_dls(folder, bs=4, num_workers=0, progress=False, pixel_range=ends)
    assert dls.info["pixel_range"] == dict(ends, float32=(0, 1))
    brightest = {x.max().item() for part in range(2) for x in dls[part].dataset.images}
    assert brightest == {255, 128}
    with pytest.raises(ValueError, match="pixel_range must be a low and a higher value"):
        simclr_dls(folder, pixel_range=(5, 1))


def test_8_bit_files_have_no_range_and_stay_as_they_are(tmp_path, capsys):
    gray = (RAMP * 100).astype(np.uint8)
    for i in range(5): Image.fromarray(gray).save(tmp_path / f"{i}.png")
    dls = simclr_dls(tmp_path, bs=2, num_workers=0, progress=False)
    assert dls.info["pixel_range"] is None and capsys.readouterr().out == ""
    assert np.array_equal(dls.train.dataset.images[0, 0], gray)


def test_not_a_number_is_black(tmp_path):
    values = RAMP.astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    for i in range(4): Image.fromarray(values).save(tmp_path / f"{i}.tif")
    rules = folder_source(tmp_path).check(progress=False).rules
    assert rules.ranges["float32"][1] == 1
    assert read_pixels(tmp_path / "0.tif", rules)[0, 0, :3].tolist() == [0, 255, 0]


def test_float_without_a_range_is_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif: its values are float32, .*: give pixel_range="):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("name", ["8.tif", "16.tif", "16.png"])
def test_images_are_read_upright(tmp_path, turn, name):
    "Pillow 13 garbles a TIFF that EXIF turns, when it maps the file into memory."
    gray = (RAMP[:20] * 255).astype(np.uint8)
    (exif := Image.Exif())[0x0112] = turn
    stored = gray.astype(np.uint16) * 257 if "16" in name else gray
    Image.fromarray(stored).save(tmp_path / name, exif=exif)
    plain = Image.fromarray(gray)
    plain.getexif()[0x0112] = turn
    expected = ImageOps.exif_transpose(plain)
    image = read_image(tmp_path / name)
    assert np.array_equal(np.asarray(image)[..., 0], expected)
    assert probe_image(tmp_path / name).size == expected.size


def test_icon_of_alpha_alone_and_pages(tmp_path, capsys):
    alpha = Image.fromarray((RAMP * 255).astype(np.uint8))
    for i, color in enumerate([(0, 0, 0), (255, 255, 255)] * 2):
        icon = Image.new("RGBA", alpha.size, (*color, 0))
        icon.putalpha(alpha)
        icon.save(tmp_path / f"{i}.png")
        assert np.array_equal(np.asarray(read_image(tmp_path / f"{i}.png"))[..., 1], alpha)
    page = Image.fromarray((RAMP * 255).astype(np.uint8))
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[ImageOps.invert(page)] * 2)
    simclr_dls(tmp_path, bs=2, num_workers=0, progress=False)
    printed = capsys.readouterr().out
    assert "4 files have their shape in alpha alone: alpha is used as grey" in printed
    assert "1 files hold several pages: the first is used" in printed
    assert np.array_equal(np.asarray(read_image(tmp_path / "pages.tif"))[..., 0], page)


# Channels

@pytest.mark.parametrize("n, options, message", [
    (13, {}, "13 channels of uint16"), (2, {}, "2 channels of uint16"),
    (4, {}, "4 channels of uint16"),  # the fourth is not declared: near infra-red, perhaps
    (4, dict(extra=[0]), "4 channels of uint16"), (5, dict(extra=[2, 0]), "5 channels of uint16"),
    (3, dict(planar=2), "lie in separate planes"),
])
def test_other_channels_are_refused_by_a_sentence(tmp_path, n, options, message):
    values = (np.random.default_rng(0).random((32, 32, n)) * 3000).astype(np.uint16)
    for i in range(4): tiff(tmp_path / f"{i}.tif", values, **options)
    sentence = rf"cannot read image .*\.tif: its? .*{message}.*: save"
    with pytest.raises(ValueError, match=sentence) as caught: simclr_dls(tmp_path, progress=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message): read_image(tmp_path / "0.tif")


@pytest.mark.parametrize("dtype, n", [("float32", 3), ("float64", 1)])
def test_kinds_that_are_not_read_are_named(tmp_path, dtype, n):
    tiff(tmp_path / "a.tif", np.zeros((8, 8, n), dtype))
    with pytest.raises(ValueError, match=f"channels: {n}, values: {dtype}; save grey as"):
        read_image(tmp_path / "a.tif")


# Tensors

@pytest.mark.parametrize("n, advice", [(1, "repeat it"), (4, "choose three"), (13, "choose three")])
@pytest.mark.parametrize("policy", [cifar_policy, compiled_cifar])
def test_tensors_of_other_channels_are_refused_by_a_sentence(n, advice, policy):
    "luma() missed 2 arguments."
    with pytest.raises(ValueError, match=rf"RGB images \(N, 3, H, W\), got .*{advice}"):
        policy()(torch.rand(4, n, 32, 32))


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.int64])
def test_integer_tensors_that_are_no_bytes_are_refused_by_a_sentence(dtype):
    images = torch.zeros(8, 3, 32, 32, dtype=dtype)
    loaders = [DataLoader(TensorDataset(images, torch.arange(8)), bs=4) for _ in range(2)]
    learn = simclr_learner(DataLoaders(*loaders), "resnet18", width=0.125, policy=cifar_policy())
    with pytest.raises(ValueError, match=f"expected images as uint8, or as floats .*, got {dtype}"):
        learn.fit(1)
