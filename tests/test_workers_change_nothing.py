"The number of workers decides how long a run takes, and nothing else."
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from simclr_nb.data import clean_loader, simclr_dls
from simclr_nb.learner import simclr_learner


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    "Two classes of photographs, too large for memory."
    folder = tmp_path_factory.mktemp("photos")
    for label, photo in zip("ab", load_sample_images().images, strict=True):
        (folder / label).mkdir()
        for i in range(10):
            Image.fromarray(photo[7 * i : 7 * i + 140, :160 + i]).save(folder / label / f"{i}.jpg")
    return folder


def trained(photos: Path, workers: int, **kwargs) -> dict:
    "Weights, history and random state after two epochs."
    dls = simclr_dls(photos, size=32, bs=4, seed=3, num_workers=workers, device="cpu",
                     progress=False, **kwargs)
    torch.manual_seed(0)
    learn = simclr_learner(dls, width=0.0625)
    with learn.no_bar(), learn.no_logging(): learn.pretrain(2)
    history = {f"column {k}": torch.tensor(v) for k, v in learn.history().items()}
    return {**learn.model.state_dict(), **history, "random": torch.get_rng_state()}


@pytest.mark.parametrize("decode", ["workers", "device"])
def test_weights_are_equal(photos, decode):
    "With 0, 1, 2 and 3; the probes and the validation loss too."
    first, *others = (trained(photos, workers, decode=decode) for workers in range(4))
    for other in others:
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_no_loader_of_files_draws_from_the_global_state(photos, i, workers):
    dls = simclr_dls(photos, size=32, bs=4, seed=3, num_workers=workers, device="cpu",
                     progress=False)
    before = torch.get_rng_state()
    dls[i].one_batch()
    for loader in (dls[i], clean_loader(dls, i), dls[i].new(bs=2)): assert len(list(loader))
    assert torch.equal(torch.get_rng_state(), before)
