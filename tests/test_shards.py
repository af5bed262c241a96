"Shards: faults of tar files, networks, workers and conversions; each image once; nothing escapes."
import inspect
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from processes import start
from simclr_nb.core import remote
from simclr_nb.core.remote import fetch
from simclr_nb.images import shards
from simclr_nb.views.crop import RandomResizedCrop
from simclr_nb.images.files import ImageFiles, read_pixels
from simclr_nb.images.epochs import EpochLoader, epoch_order, rank_batches
from simclr_nb.images.pack import verify_shards, write_shards
from simclr_nb.images.shards import expand_shards, open_shards

FLOWER = load_sample_images().images[1]


def jpeg(i: int) -> bytes:
    y, x = divmod(7 * i, 500)
    Image.fromarray(FLOWER[3 * y:3 * y + 48, x:x + 64]).save(file := io.BytesIO(), "jpeg")
    return file.getvalue()


def tar(path: Path, members: list) -> Path:
    "Tar file of (name, content), or of ready `TarInfo`."
    with tarfile.open(path, "w") as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo): file.addfile(member)
            else:
                (about := tarfile.TarInfo(member[0])).size = len(member[1])
                file.addfile(about, io.BytesIO(member[1]))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    "Six shards of eight photos, label = number of the photo."
    (tmp_path / "set").mkdir()
    for shard in range(6):
        tar(tmp_path / "set" / f"{shard}.tar", [
            member for i in range(8 * shard, 8 * shard + 8)
            for member in [(f"{i:03}.jpg", jpeg(i)), (f"{i:03}.cls", str(i).encode())]])
    return tmp_path / "set"


@pytest.fixture
def photos(folder, tmp_path): return open_shards(folder, cache=tmp_path / "cache")


def files(photos): return ImageFiles(photos, torch.from_numpy(photos.labels(photos.groups)),
                                     RandomResizedCrop(16))


def seen(loader) -> list[int]: return [i for _, y in loader for i in y.tolist()]


# Each image once

@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.integers(1, 20), st.integers(1, 5), st.integers(0, 7), st.booleans())
def test_no_image_twice_and_batches_equal(n, bs, world_size, window, spare):
    numbers = np.sort(np.random.default_rng(n).integers(0, 9, n)) if window else None
    order = epoch_order(n, 1, 2, numbers, max(window, 1))
    parts = [rank_batches(order, bs, r, world_size, bool(window), spare) for r in range(world_size)]
    assert len({batches.shape for batches, _ in parts}) == 1
    rows = np.concatenate([rows.ravel() for part in parts for rows in part])
    assert sorted(rows) == list(range(n))  # in a batch or a spare, each once
    left_out = n - sum(batches.size for batches, _ in parts)
    assert left_out < 2 * bs * world_size if spare else left_out < bs * world_size
    if spare and n >= world_size: assert all(len(spares) for _, spares in parts)


@pytest.mark.parametrize("window", [0, 2])
def test_pixels_do_not_depend_on_workers_and_resumption(photos, window):
    def loader(num_workers):
        return EpochLoader(files(photos), 4, seed=3, window=window, num_workers=num_workers,
                           rank=1, world_size=2)
    whole = loader(0)
    expected = [batch for _ in range(2) for batch in whole]
    assert len(expected) == 12
    for num_workers, stop in [(1, 0), (2, 5), (3, 6), (0, 7)]:
        first = loader(num_workers)
        before = list(itertools.islice(itertools.chain(first, first), stop))
        state = json.loads(json.dumps(first.state_dict()))
        assert (state["epoch"], state["position"]) in [(0, stop), (1, stop - 6)]
        second = loader(2 - num_workers % 2)
        second.load_state_dict(state)
        got = before + [batch for _ in range(state["epoch"], 2) for batch in second]
        for (x, y), (x2, y2) in zip(expected, got, strict=True):
            assert torch.equal(x, x2) and torch.equal(y, y2)


class Draws:
    "Number of the image and a random number, in place of a crop."
    def __len__(self): return 40
    def __getitem__(self, i): return torch.tensor(i), torch.rand(())


def test_draws_differ_between_images_epochs_and_seeds_alone():
    draws = {}
    for seed, num_workers in [(0, 0), (0, 2), (1, 1)]:
        loader = EpochLoader(Draws(), 4, seed, num_workers=num_workers)
        for epoch in range(2):
            for rows, drawn in loader:
                for row, number in zip(rows.tolist(), drawn.tolist(), strict=True):
                    assert draws.setdefault((seed, epoch, row), number) == number
    assert len(set(draws.values())) == len(draws) == 160


def test_resuming_decodes_nothing_before_the_position(photos, monkeypatch):
    read = []
    from simclr_nb.images import files as room
    monkeypatch.setattr(room, "read_pixels", lambda *args: read.append(args) or read_pixels(*args))
    loader = EpochLoader(files(photos), 8)
    loader.load_state_dict(loader.state_dict() | dict(position=5))
    assert len(seen(loader)) == len(read) == 8


def _rank(rank: int, folder: str):
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    photos = open_shards(f"{folder}/set", cache=f"{folder}/cache")
    rows = seen(EpochLoader(files(photos), 4, num_workers=rank))  # spawned
    Path(f"{folder}/{rank}.json").write_text(json.dumps(rows))
    torch.distributed.barrier()


def test_ranks_of_a_process_group_share_an_epoch(folder, tmp_path):
    ranks = [start(tmp_path / f"{r}.log", _rank, r, str(tmp_path)) for r in range(2)]
    try:
        for p in ranks: p.join(60)
    finally:
        for p in ranks: p.kill()
    assert [p.exitcode for p in ranks] == [0, 0], (tmp_path / "0.log").read_text()
    parts = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2)]
    assert [len(p) for p in parts] == [24, 24] and sorted(sum(parts, [])) == list(range(48))


# Damaged and hostile shards

def break_jpeg(photos, row: int):
    with open(photos.addresses[photos.shards[row]], "r+b") as file:
        file.seek(photos.offset[row] + 300)
        file.write(bytes(photos.size[row] - 300))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_corrupt_jpeg_in_a_shard(photos, num_workers):
    for row in (10, 11, 40): break_jpeg(photos, row)
    photos_of = partial(EpochLoader, files(photos), 4, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"cannot read image .*[15]\.tar:0(10|11|40)\.jpg"):
        seen(photos_of())
    loaders = [photos_of(rank=r, world_size=2, skip_bad=True) for r in range(2)]
    for _ in range(3):
        parts = [[y.tolist() for _, y in loader] for loader in loaders]
        assert len(parts[0]) == len(parts[1]) == 5
        for first, second in zip(*parts, strict=True):
            assert len(set(first + second)) == 8 and not {10, 11, 40} & {*first, *second}
    found = {line.split(": ")[0].split("/")[-1] for loader in loaders for line in loader.skipped}
    assert found == {"1.tar:010.jpg", "1.tar:011.jpg", "5.tar:040.jpg"}


def test_more_damaged_images_than_spares(photos):
    for row in range(48): break_jpeg(photos, row)
    with pytest.raises(ValueError, match=r"no spare left: cannot read image .*tar:\d+.jpg"):
        seen(EpochLoader(files(photos), 4, skip_bad=True))


def test_missing_shard(folder, photos, tmp_path):
    (folder / "4.tar").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="no such shard: .*4.tar"):
        seen(EpochLoader(files(photos), 4, num_workers=2))
    with pytest.raises(FileNotFoundError, match="no such shard.*4.tar"):
        open_shards(f"{folder}/{{0..5}}.tar")


def test_compressed_or_foreign_files_are_no_shards(tmp_path):
    bad = {"a.tar": b"", "b.tar": os.urandom(2000), "c.tar": b"\x1f\x8b" + bytes(99)}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read shard .*{name}.*uncompressed"):
            open_shards(tmp_path / name, cache=tmp_path)


def test_hostile_members_stay_inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    links = [tarfile.TarInfo("k.jpg"), tarfile.TarInfo("l.jpg"), tarfile.TarInfo("d.jpg")]
    for link, kind in zip(links, (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE), strict=True):
        link.type, link.linkname = kind, "/etc/passwd"
    class Bomb:
        def __reduce__(self): return os.system, ("touch exploded",)
    bomb = pickle.dumps(Bomb())
    named = [("../../evil.jpg", jpeg(0)), ("/abs/evil.png", jpeg(1)), ("x" * 300 + ".jpg", jpeg(2)),
             ("p.jpg", jpeg(3)), ("p.pyd", bomb), ("p.pickle", bomb),
             ("é.jpg", jpeg(4)), ("noimage.txt", b"")]
    tar(tmp_path / "a.tar", links + named)
    found = open_shards(tmp_path / "a.tar", cache=tmp_path / "cache")
    assert [f.getvalue() for f in found] == [jpeg(i) for i in range(5)]
    assert [str(f).split(":")[1] for f in found][:2] == ["../../evil.jpg", "/abs/evil.png"]
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar", "cache"}


def test_a_label_that_cannot_be_read_is_named(tmp_path):
    for bad in (b"\xff\xfe", b"{", b"[1, 2"):
        tar(tmp_path / "a.tar", [("1.jpg", jpeg(0)), ("1.json", bad)])
        with pytest.raises(ValueError, match=r"a.tar: label of 1.jpg"):
            open_shards(tmp_path / "a.tar", cache=tmp_path)


# Networks

class Faulty(LocalFileSystem):
    "Local files at `faulty://`: the name says what goes wrong; every call is logged in a file."
    protocol = "faulty"
    log: Path

    @classmethod
    def _strip_protocol(cls, path): return str(path).removeprefix("faulty://")

    def _open(self, path, mode="rb", **kwargs):
        with open(self.log, "a") as file: file.write(f"{path}\n")
        calls = self.log.read_text().count(path)
        if "hang" in path: time.sleep(100)
        if "refused" in path or "flaky" in path and calls < 3: raise OSError("connection reset")
        if "slow" in path: time.sleep(0.5)
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    Faulty.log = tmp_path / "log"
    Faulty.log.touch()
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    monkeypatch.setattr(remote, "fetch", partial(fetch, timeout=0.5))


def test_the_defaults_give_up_within_a_minute():
    default = {k: v.default for k, v in inspect.signature(fetch).parameters.items()}
    assert default["tries"] * default["timeout"] + sum(range(default["tries"])) < 60


@pytest.mark.parametrize("fault, error, calls", [
    ("hang", "no answer for 0.5 s", 3), ("refused", "connection reset", 3), ("flaky", "", 3)])
def test_a_shard_that_cannot_be_reached(folder, tmp_path, faulty, fault, error, calls):
    shutil.copy(folder / "0.tar", tmp_path / f"{fault}.tar")
    address, start = f"faulty://{tmp_path}/{fault}.tar", time.perf_counter()
    if error:
        with pytest.raises(ConnectionError, match=f"{fault}.tar.*3 attempts.*{error}"):
            open_shards(address, cache=tmp_path)
        assert not list((tmp_path / "copies").glob(".*.tmp"))
    else: assert len(open_shards(address, cache=tmp_path)) == 8
    assert time.perf_counter() - start < 20
    noted = len(Faulty.log.read_text().splitlines())
    assert noted == calls or (fault == "hang" and 0 < noted < calls)  # given up before it began


def test_unreachable_in_a_worker(folder, tmp_path, faulty):
    photos = open_shards(f"faulty://{folder}/{{0..5}}.tar", cache=tmp_path)
    photos.addresses[2] = f"faulty://{tmp_path}/hang.tar"
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match="hang.tar"):
        seen(EpochLoader(files(photos), 4, num_workers=2, window=2))
    assert time.perf_counter() - start < 30


def _fetch(address, to): return fetch(address, to).stat().st_size


def test_processes_copy_a_shard_once(folder, tmp_path, faulty):
    shutil.copy(folder / "0.tar", tmp_path / "slow.tar")
    address = f"faulty://{tmp_path}/slow.tar"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        sizes = pool.starmap_async(_fetch, [(address, tmp_path / "copy.tar")] * 4).get(30)
    assert set(sizes) == {(folder / "0.tar").stat().st_size}
    assert len(Faulty.log.read_text().splitlines()) == 1


def test_copies_keep_to_their_limit(folder, tmp_path, faulty):
    size = (folder / "0.tar").stat().st_size
    photos = open_shards(f"faulty://{folder}/{{0..5}}.tar", cache=tmp_path, limit=2 * size)
    assert [f.getvalue() for f in photos] == [jpeg(i) for i in range(48)]
    assert len(list((tmp_path / "copies").glob("*.tar"))) <= 3


def test_without_fsspec_local_shards_need_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert len(open_shards(folder, cache=tmp_path / "cache")) == 48
    with pytest.raises(ImportError, match="s3://bucket/a.tar: pip install fsspec"):
        open_shards("s3://bucket/a.tar", cache=tmp_path / "cache")


# Workers

DEADLY = """
import os, signal, sys, time, torch
from simclr_nb.images.epochs import EpochLoader

class Deadly:
    def __len__(self): return 64
    def __getitem__(self, i):
        if i == 9: os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == "dies" else time.sleep(600)
        return torch.tensor(i), torch.tensor(i)

for batch in EpochLoader(Deadly(), 4, num_workers=2, timeout=3): pass
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("how, words", [("dies", "worker .*(signal|exited|died)"), ("hangs", "timed out")])
def test_a_worker_that_dies_or_hangs_ends_the_run(how, words):
    done = subprocess.run([sys.executable, "-c", DEADLY, how], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode and re.search(words, done.stderr), done
    assert inspect.signature(EpochLoader).parameters["timeout"].default <= 60


# Conversion

@pytest.fixture
def images(tmp_path) -> Path:
    for i in range(60):
        path = tmp_path / "images" / f"class{i % 3}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    return tmp_path / "images"


def content(out: Path) -> dict:
    "Shards and manifest; the bytes of an index depend on the order of its header."
    return {p.name: p.read_bytes() for p in out.glob("[!.]*") if p.suffix in (".tar", ".json")}


def convert(images: str, out: str):
    print("ready", flush=True)
    write_shards(images, out, max_count=4, progress=False)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_conversion_killed_at_any_moment_goes_on(images, tmp_path):
    write_shards(images, tmp_path / "whole", max_count=4)
    def written() -> int: return len(list((tmp_path / "out").glob("[!.]*.tar")))
    rng = random.Random(0)
    kills = 0
    for i in range(8):
        process = start(log := tmp_path / f"{i}.log", convert, str(images), str(tmp_path / "out"))
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text()): assert time.monotonic() < deadline
        wanted = written() + rng.randint(0, 2)
        while process.is_alive() and written() < wanted: assert time.monotonic() < deadline
        process.join(rng.uniform(0, 0.004))
        kills += process.is_alive()
        process.kill()
        process.join(60)
        for shard in (tmp_path / "out").glob("[!.]*.tar"):
            assert shard.read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()
        manifest = tmp_path / "out" / "manifest.json"
        if manifest.exists() and json.loads(manifest.read_text())["complete"]: break
        with pytest.raises((ValueError, FileNotFoundError)): open_shards(tmp_path / "out")
    assert kills
    write_shards(images, tmp_path / "out", max_count=4)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert verify_shards(tmp_path / "out") == []


def test_goes_on_where_it_was(images, tmp_path, monkeypatch):
    out, write, written = tmp_path / "out", shards.scan_shards, []
    write_shards(images, tmp_path / "whole", max_count=10)
    from simclr_nb.images import pack
    fill = pack._fill

    def failing(*args):
        if len(written) == 3: raise OSError(28, "No space left on device")
        written.append(1)
        return fill(*args)
    monkeypatch.setattr(pack, "_fill", failing)
    with pytest.raises(OSError, match="No space"): write_shards(images, out, max_count=10)
    with pytest.raises(ValueError, match="not finished"): open_shards(out)
    monkeypatch.setattr(pack, "_fill", lambda *a: written.append(2) or fill(*a))
    write_shards(images, out, max_count=10)
    assert written == [1] * 3 + [2] * 4  # 54 images for training in 6 shards, 6 for validation
    assert content(out) == content(tmp_path / "whole")


def test_remote_set_needs_no_reading_to_be_known(images, tmp_path, faulty):
    write_shards(images, tmp_path / "out", max_count=16)
    far = open_shards(f"faulty://{tmp_path}/out", cache=tmp_path / "cache")
    assert not [line for line in Faulty.log.read_text().splitlines() if line.endswith(".tar")]
    near = open_shards(tmp_path / "out")
    assert [f.getvalue() for f in far] == [f.getvalue() for f in near]
    assert far.labels(far.groups).tolist() == near.labels(near.groups).tolist()
    (tmp_path / "out" / "train.index.safetensors").write_bytes(b"damaged")
    again = open_shards(tmp_path / "out", cache=tmp_path / "other")
    assert [f.getvalue() for f in again] == [f.getvalue() for f in near]


@pytest.mark.parametrize("name", ["../images/x.tar", "/etc/passwd", "a/b.tar", "..", ".tar/"])
def test_a_manifest_names_only_its_own_shards(images, tmp_path, name):
    write_shards(images, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["parts"]["train"][0]["name"] = name
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError): open_shards(tmp_path / "out")


def test_two_conversions_into_one_folder(images, tmp_path):
    from filelock import FileLock
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        with pytest.raises(ValueError, match="another"): write_shards(images, tmp_path / "out")
    assert expand_shards([]) == []
