"A run that is resumed with other images than it was begun with is refused, and told which."
import shutil
from pathlib import Path

import pytest
from fastai.callback.core import Callback
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from sklearn.datasets import load_sample_images

from simclr_nb.cli import pretrain
from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.train.checkpoint import find_checkpoints


def folder_of(root: Path, side: int, kind: str = "png") -> Path:
    "Two classes of 20 pictures, `side` pixels high: up to 128 they lie in memory."
    photos = load_sample_images().images
    for i in range(40):
        file = root / "data" / "ab"[i % 2] / f"{i:02}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photos[i % 2][3 * i : 3 * i + side, 5 * i : 5 * i + side]).save(file)
    return root / "data"


def change_one(data): Image.new("RGB", Image.open(data / "a/00.png").size, "red").save(data / "a/00.png")
def rename_one(data): (data / "b/01.png").rename(data / "b/new.png")


def move_half(data):
    (data / "a/sub").mkdir()
    for file in sorted(data.glob("a/*.png")): file.rename(data / "a/sub" / file.name)


def replace_all(data):
    for file in sorted(data.glob("*/*.png")): Image.new("RGB", (40, 40), "blue").save(file)


def to_other_class(data): (data / "a/00.png").rename(data / "b/00.png")


CHANGES = {  # what is done, and what the message says
    "one changed": (change_one, r"1 of 40 images of other content \(a/00.png\)"),
    "one renamed": (rename_one, r"1 of 40 images gone \(b/01.png\); 1 of 40 images new \(b/new.png\)"),
    "half moved": (move_half, r"gone \(a/\d\d.png, a/\d\d.png, a/\d\d.png, ...\)"),
    "all replaced": (replace_all, r"40 of 40 images of other content"),
    "other class": (to_other_class, r"gone \(a/00.png\).* new \(b/00.png\)"),
}


class Stop(Callback):
    order = 100
    def after_batch(self):
        if self.training and self.train_iter == 3: raise KeyboardInterrupt


def begun(data: Path, state: Path, resume: bool = False, **kwargs):
    "A learner that is stopped in its second epoch."
    dls = simclr_dls(data, size=32, bs=18, seed=0, num_workers=0, device="cpu", progress=False)
    learn = simclr_learner(dls, width=0.0625)
    with learn.no_bar(), learn.no_logging():
        learn.pretrain(2, checkpoints=state, resume=resume, **kwargs)
    return learn


@pytest.mark.parametrize("side", [40, 140], ids=["in memory", "files"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_images_are_refused(tmp_path, change, side):
    data, state = folder_of(tmp_path, side), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt): begun(data, state, cbs=[Stop()])
    change[0](data)
    with pytest.raises(ValueError, match=f"was begun with other images: .*{change[1]}"):
        begun(data, state, resume=True)
    (state / "images.json.gz").unlink()  # the digest in the checkpoint is enough to refuse
    with pytest.raises(ValueError, match="which ones is not known any more"):
        begun(data, state, resume=True)


def test_a_folder_that_moved_is_the_same(tmp_path):
    data, state = folder_of(tmp_path, 140), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt): begun(data, state, cbs=[Stop()])
    moved = shutil.move(data, tmp_path / "elsewhere")
    assert len(begun(moved, state, resume=True).recorder.values) == 2


def test_images_of_fastai(tmp_path):
    data, state = folder_of(tmp_path, 40), tmp_path / "state"
    def fit(resume):
        dls = ImageDataLoaders.from_folder(data, valid_pct=0.2, seed=0, bs=8, num_workers=0,
                                           item_tfms=Resize(32), device="cpu")
        learn = simclr_learner(dls, width=0.0625)
        with learn.no_bar(), learn.no_logging(): learn.pretrain(1, checkpoints=state, resume=resume)
    fit(False)
    rename_one(data)
    with pytest.raises(ValueError, match=r"begun with other images: .*b/01.png"): fit(True)


ARGV = "--size 16 --bs 8 --epochs 1 --width 0.0625 --workers 0".split()


def test_the_command(tmp_path, capsys):
    "A run that has ended shows no results of other images either."
    data, out = folder_of(tmp_path, 40), tmp_path / "out"
    argv = [str(data), *ARGV, "--out", str(out)]
    assert pretrain(argv) == 0
    assert pretrain([*argv, "--resume"]) == 0
    rename_one(data)
    with pytest.raises(SystemExit) as end: pretrain([*argv, "--resume"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in error
    assert "out was begun with other images: " in error and "b/01.png" in error


def test_nothing_is_lost_by_a_list_that_is_damaged(tmp_path):
    "The checkpoint knows the digest of the images, which are still the same."
    data, state = folder_of(tmp_path, 40), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt): begun(data, state, cbs=[Stop()])
    (state / "images.json.gz").write_bytes(b"torn")
    assert find_checkpoints(state)
    begun(data, state, resume=True)
