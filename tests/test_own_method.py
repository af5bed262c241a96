"""The method of tutorial 08 in under 60 lines: what it promises, over processes too."""
import json
from pathlib import Path

import torch

from processes import run
from simclr_nb.data import simclr_dls
from test_parallel import Rounded, close, copies

TUTORIAL = Path(__file__).parent.parent / "nbs" / "tutorials" / "08_your_own_method.ipynb"


def sources() -> list[str]:
    "The cell of imports and the cell of the method."
    cells = ["".join(c["source"]) for c in json.loads(TUTORIAL.read_text("utf-8"))["cells"]]
    place = next(i for i, source in enumerate(cells) if source.startswith("class BYOL("))
    return cells[place - 1:place + 1]


def method() -> dict:
    "Names that the two cells define."
    names = {}
    exec("\n\n".join(sources()), names)
    return names


def test_it_is_shorter_than_60_lines():
    assert sum(len(source.strip().splitlines()) for source in sources()) < 60


def learner_in_processes(rank: int, world: int) -> dict:
    torch.manual_seed(0)
    dls = simclr_dls("digits", bs=32, n_train=128, n_valid=64, seed=0, device="cpu", progress=False)
    learn = method()["byol_learner"](dls, width=0.0625, precision="fp32", cbs=[Rounded()])
    learn.model.double()
    learn.views.two_views = lambda x: copies(x, torch.float64)
    learn.model.encoder.register_forward_pre_hook(lambda m, x: x[0].double())
    learn.probe._start(torch.empty(0, learn.model.encoder.out_dim))  # equal in all runs
    with learn.no_bar(), learn.no_logging(): learn.pretrain(2, lr=1e-3, scaling="none")
    history = {f"history {k}": torch.tensor(v) for k, v in learn.history().items()}
    weights = {k: v for k, v in learn.model.state_dict().items() if v.is_floating_point()}
    return {**weights, **history}


def test_it_is_the_same_over_processes(tmp_path):
    "Weights of both networks, running statistics, losses, accuracies."
    expected = run(learner_in_processes, 1, tmp_path / "one")[0]
    assert any(name.startswith("target.") for name in expected)
    for found in run(learner_in_processes, 2, tmp_path / "two"): close(found, expected)
