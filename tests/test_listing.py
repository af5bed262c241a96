"The index of a folder: the same list as a walk, kept, checked, never trusted, small."
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from simclr_nb.images import listing
from simclr_nb.images.listing import IMAGE_SUFFIXES, index_images


@pytest.fixture
def calm(monkeypatch): monkeypatch.setattr(listing, "_RACY", 0)  # young folders are kept too


def walked(folder: Path) -> list[Path]:
    "The plain way."
    files = [Path(root) / name for root, folders, names in os.walk(folder) for name in names
             if not any(p[0] == "." for p in (Path(root) / name).relative_to(folder).parts)]
    return sorted(f for f in files if f.suffix.lower() in IMAGE_SUFFIXES)


def dealt(paths: list[Path]) -> list[Path]:
    "The plain way: shuffle each class by one generator, deal by shares."
    groups, rng, found = {}, random.Random(0), []
    for path in paths: groups.setdefault(path.parent.name, []).append(path)
    for label, group in sorted(groups.items()):
        rng.shuffle(group)
        found += [(i / len(group), label, path) for i, path in enumerate(group)]
    return [path for *_, path in sorted(found, key=lambda item: item[:2])]


def make(folder: Path, names: list[str]):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


part = st.sampled_from(["a", "b", "B", "a b", "a.b", "é", "Ю", ".hid", "10", "9"])
suffix = st.sampled_from([".jpg", ".PNG", ".txt", "", ".tiff"])
names = st.lists(st.builds(lambda parts, end: "/".join(parts) + end,
                           st.lists(part, min_size=1, max_size=3), suffix), max_size=30)


def are_files(names: list[str]) -> bool:
    "Whether none of them is a folder of another."
    return not any(other.startswith(f"{name}/") for name in names for other in names)


@settings(max_examples=60, deadline=None)
@given(names)
def test_same_list_as_a_walk(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("tree")
    files = [f"{i % 3}/{name}" for i, name in enumerate(names)] + ["z/last.jpg"]
    assume(are_files(files))
    make(folder, files)
    found = index_images(folder, least=0, cache=tmp_path_factory.mktemp("cache"))
    assert list(found) == walked(folder)
    assert list(found.deal()) == dealt(walked(folder))
    assert found.parents == sorted({p.parent for p in found}, key=found.parents.index)
    classes = sorted({p.name for p in found.parents})
    assert [classes[i] for i in found.labels(classes)] == [p.parent.name for p in found]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such name")
def test_names_that_are_not_unicode(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    assert index_images(tmp_path)[0].read_bytes() == b"x"


def test_links(tmp_path):
    make(tmp_path / "far", ["x.jpg"])
    make(tmp_path / "here", ["a/1.jpg"])
    (tmp_path / "here" / "a" / "up").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "b").symlink_to(tmp_path / "far")
    found = [p.relative_to(tmp_path).as_posix() for p in index_images(tmp_path / "here")]
    assert found == ["here/a/1.jpg", "here/b/x.jpg"]


# The cache

def kept(cache: Path) -> list[Path]: return sorted(cache.rglob("*.safetensors"))


def test_20_000_files_are_scanned_once(tmp_path, monkeypatch, calm):
    make(tmp_path / "data", [f"{i % 100:02}/{i}.jpg" for i in range(20_000)])
    first = index_images(tmp_path / "data", cache=tmp_path / "cache")
    assert kept(tmp_path / "cache")[0].stat().st_size < 50 * 20_000
    monkeypatch.setattr(listing, "_scan", None)
    second = index_images(tmp_path / "data", cache=tmp_path / "cache")
    assert list(second) == list(first) == walked(tmp_path / "data")
    assert len(pickle.dumps(second)) < 60 * 20_000  # what a spawned worker gets
    monkeypatch.undo()
    (tmp_path / "data" / "99" / "new.jpg").touch()
    assert len(index_images(tmp_path / "data", cache=tmp_path / "cache")) == 20_001


def test_small_folders_leave_no_cache(tmp_path):
    make(tmp_path / "data", ["1.jpg"])
    index_images(tmp_path / "data", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("change", [
    lambda f: (f / "b" / "3.jpg").touch(), lambda f: (f / "a" / "1.jpg").unlink(),
    lambda f: (f / "a" / "1.jpg").rename(f / "a" / "0.jpg"),
    lambda f: (f / "a" / "1.jpg").rename(f / "b" / "1.jpg"),
    lambda f: make(f, ["a/deep/down/4.jpg"]), lambda f: (f / "b").rename(f / "c"),
])
def test_a_change_is_noticed_even_with_its_time_set_back(tmp_path, calm, change):
    folder = tmp_path / "data"
    make(folder, ["a/1.jpg", "b/2.jpg"])
    options = dict(least=0, cache=tmp_path / "cache")
    index_images(folder, **options)
    times = {f: os.stat(f) for f in (folder, folder / "a", folder / "b")}
    time.sleep(0.05)  # more than the clock of the file system needs
    change(folder)
    for f, s in times.items():
        if f.exists(): os.utime(f, ns=(s.st_atime_ns, s.st_mtime_ns))
    assert list(index_images(folder, **options)) == walked(folder)


def test_a_folder_that_has_just_changed_is_scanned_again(tmp_path):
    "Two files within one tick of the clock: the stamp of the first must not hide the second."
    make(tmp_path / "data", ["a/1.jpg"])
    scan = listing._scan(str(tmp_path / "data"))
    assert not scan["stamps"].any() and not listing._fresh(str(tmp_path / "data"), scan)


class Bomb:
    def __reduce__(self): return os.system, ("touch exploded",)


@pytest.mark.parametrize("damage", [
    lambda f: f.write_bytes(pickle.dumps(Bomb())), lambda f: f.write_bytes(b""),
    lambda f: np.save(open(f, "wb"), np.array([Bomb()], object), allow_pickle=True),
    lambda f: f.write_bytes(f.read_bytes()[:-1]),
    lambda f: f.write_bytes(f.read_bytes().replace(b"1.jpg", b"7.jpg")),
    lambda f: f.write_bytes((2**62).to_bytes(8, "little") + f.read_bytes()[8:]),
    lambda f: (f.unlink(), f.mkdir()),
])
@pytest.mark.filterwarnings("ignore:no index kept")  # a folder in its place cannot be replaced
def test_a_damaged_cache_is_rebuilt_and_nothing_in_it_runs(tmp_path, monkeypatch, calm, damage):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data", ["a/1.jpg"])
    options = dict(least=0, cache=tmp_path / "cache")
    index_images(tmp_path / "data", **options)
    file, = kept(tmp_path / "cache")
    damage(file)
    assert list(index_images(tmp_path / "data", **options)) == walked(tmp_path / "data")
    assert not (tmp_path / "exploded").exists()


def test_a_cache_that_cannot_be_written_only_warns(tmp_path):
    make(tmp_path / "data", ["1.jpg"])
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="SIMCLR_NB_CACHE"):
        assert len(index_images(tmp_path / "data", least=0, cache=tmp_path / "file")) == 1


MILLION = """
import json, resource, sys, time
from pathlib import Path
from simclr_nb.images.listing import index_images
start = time.perf_counter()
found = index_images(sys.argv[1], cache=sys.argv[2])
opened = time.perf_counter() - start
dealt = found.deal()
labels = dealt.labels(sorted({p.name for p in found.parents}))
first = [str(dealt[i]) for i in range(3)]
print(json.dumps(dict(n=len(found), opened=opened, ready=time.perf_counter() - start, first=first,
                      mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_a_million_files_open_in_5_s_with_1_gib(tmp_path):
    for i in range(1000):
        (folder := tmp_path / "data" / f"n{i:08}").mkdir(parents=True)
        for j in range(1000): (folder / f"n{i:08}_{j}.JPEG").touch()
    time.sleep(2.1)
    command = [sys.executable, "-c", MILLION, tmp_path / "data", tmp_path / "cache"]
    first, second = (json.loads(subprocess.run(command, capture_output=True, check=True, text=True,
                                               timeout=300).stdout) for _ in range(2))
    print(first, second)
    shutil.rmtree(tmp_path / "data")
    assert first["n"] == second["n"] == 1_000_000 and first["first"] == second["first"]
    assert second["opened"] < 5 and second["ready"] < 5 and second["mb"] < 1024
