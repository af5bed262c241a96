"""Official checkpoints made anew: index files that TensorFlow wrote, data by the golden formula.

`golden/convert/NAME.index` was written by TensorFlow 2.21 together with the official SimCLR code; its
checksums prove the data that `golden_bundle` makes for it. `write_bundle` writes bundles of any content.
"""
import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from simclr_nb.convert.bundle import crc32c

FOLDER = Path(__file__).parent / "golden" / "convert"
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
TYPES = {"<f4": 1, "<f8": 2, "<i4": 3, "|u1": 4, "|i1": 6, "<i8": 9, "|b1": 10, "<f2": 19}


# The formula

def _uniform(name: str, shape: tuple) -> np.ndarray:
    "Numbers in [0, 1), float64, from the name and the place alone."
    x = np.arange(int(np.prod(shape)), dtype=np.uint32) + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in [(16, 0x85EBCA6B), (13, 0xC2B2AE35)]:
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    return (x / 2.0**32).reshape(shape)


def _weight(name: str, shape: tuple) -> np.ndarray:
    "A weight by its TensorFlow 1 name and TensorFlow shape, float32."
    u = _uniform(name, shape)
    kind = name.rsplit("/")[-1]
    if kind == "kernel": value = (2 * u - 1) * np.sqrt(6 / np.prod(shape[:-1]))
    elif kind in ("gamma", "moving_variance"): value = 0.5 + u
    elif kind in ("beta", "bias"): value = 0.5 * u - 0.25
    elif kind == "moving_mean": value = 0.4 * u - 0.2
    else: value = 0.01 * (2 * u - 1)
    return value.astype(np.float32)


def _images(height: int, width: int) -> np.ndarray:
    "The two golden images, `(2, 3, H, W)` float32."
    y, x, c = np.ogrid[:height, :width, :3]
    pattern = (31 * y + 17 * x + 57 * c + x * y) % 256 / 255
    images = np.stack([_uniform("images", (height, width, 3)), pattern]).astype(np.float32)
    return images.transpose(0, 3, 1, 2).copy()


uniform = SimpleNamespace(numbers=_uniform, weight=_weight, images=_images)


# Golden files

def golden(name: str) -> dict:
    "Options, outputs and names of a golden checkpoint."
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def value_of(name: str, entry, about: dict) -> np.ndarray:
    "Value of an entry of a golden index, by the formula."
    if entry.dtype == "<i8": return np.full(entry.shape, about["integers"][name], np.int64)
    if name in about.get("constants", {}): return np.full(entry.shape, about["constants"][name], np.float32)
    return _weight(about.get("canonical", {}).get(name, name), entry.shape)


def golden_bundle(name: str, folder: Path) -> Path:
    "Write a golden checkpoint into a folder; gives the folder."
    from simclr_nb.convert.bundle import _read_index  # the index alone: there is no data yet

    about = golden(name)
    folder = Path(folder)
    prefix = folder / about["prefix"]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    _, entries = _read_index(FOLDER / f"{name}.index")
    content = bytearray(max(e.offset + e.size for e in entries.values()))
    for key, entry in entries.items():
        if key == GRAPH: data = zlib.decompress((FOLDER / f"{name}.graph").read_bytes())
        else: data = value_of(key, entry, about).tobytes()
        content[entry.offset:entry.offset + entry.size] = data
    Path(f"{prefix}.data-00000-of-00001").write_bytes(content)
    Path(f"{prefix}.index").write_bytes((FOLDER / f"{name}.index").read_bytes())
    if not about["prefix"].startswith("variables"):
        note = f'model_checkpoint_path: "/elsewhere/runs/{about["prefix"]}"\n'
        (folder / "checkpoint").write_text(note)
    return folder


# Bundles of any content

def varint(n: int) -> bytes:
    out = b""
    while n > 127: out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number: int, value) -> bytes:
    "A field of a protobuf message: a number or bytes."
    if isinstance(value, int): return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return ((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def entry_of(kind: int, shape: tuple, offset: int, size: int, crc: bytes, shard: int = 0) -> bytes:
    dims = b"".join(field(2, field(1, n)) for n in shape)
    place = field(3, shard) + field(4, offset) + field(5, size)
    return field(1, kind) + field(2, dims) + place + varint(6 << 3 | 5) + crc


def table(items: dict) -> bytes:
    "An index file: one block of names, one block with its handle, and the footer."
    def block(pairs):
        body = b"".join(varint(0) + varint(len(k)) + varint(len(v)) + k + v for k, v in pairs)
        return body + (0).to_bytes(4, "little") + (1).to_bytes(4, "little") + b"\0"
    out, handles = b"", []
    names = sorted(items)
    for start in range(0, len(names), 50):
        body = block([(n, items[n]) for n in names[start:start + 50]])
        handles.append((names[min(start + 49, len(names) - 1)], varint(len(out)) + varint(len(body) - 1)))
        out += body + masked(body)
    empty, body = block([]), block(handles)
    places = [len(out), len(empty) - 1, len(out) + len(empty) + 4, len(body) - 1]
    footer = b"".join(map(varint, places)).ljust(40, b"\0")
    return out + empty + masked(empty) + body + masked(body) + footer + (0xDB4775248B80FB57).to_bytes(8, "little")


def write_bundle(prefix: Path, arrays, text: dict = {}, header: bytes = field(1, 1)) -> Path:
    "Write a checkpoint: arrays by name (or pairs that come one by one), and lists of text by name."
    items, offset = {b"": header}, 0
    with open(f"{prefix}.data-00000-of-00001", "wb") as file:
        for name, array in arrays.items() if isinstance(arrays, dict) else arrays:
            data = np.ascontiguousarray(array).tobytes()
            kind = TYPES[array.dtype.str]
            items[name.encode()] = entry_of(kind, array.shape, offset, len(data), masked(data))
            offset += file.write(data)
        for name, words in text.items():
            lengths = np.array([len(w) for w in words], "<u4").tobytes()
            rest = masked(lengths) + b"".join(words)
            data = b"".join(varint(len(w)) for w in words) + rest
            items[name.encode()] = entry_of(7, (len(words),), offset, len(data), masked(lengths + rest))
            offset += file.write(data)
    Path(f"{prefix}.index").write_bytes(table(items))
    return Path(prefix)
