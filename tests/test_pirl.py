"""PIRL: the author's numbers, and a learner over processes; `golden/comparators.json`, float64."""
import pytest
import torch

from comparators import GOLDEN, approx, candidates, hash_t, index_t, same, unit
from processes import run
from simclr_nb.data import simclr_dls
from simclr_nb.loss.memory import MemoryBank
from simclr_nb.loss.projections import unit_vectors
from simclr_nb.methods.pirl import PIRLLoss, pirl_learner
from simclr_nb.model.head import Projection
from test_parallel import Rounded, close


@pytest.mark.parametrize("name", ["pirl_nce", "pirl_softmax"])
def test_loss_of_the_author(name):
    "Loss, Z of the patches' branch, both gradients, and the rows of the bank afterwards."
    case = GOLDEN[name]
    i, c = case["inputs"], case["inputs"]["c"]
    shape = i["batch"], i["dim"]
    bank = MemoryBank(i["n_data"], i["dim"], i["momentum"]).double()
    bank.rows.copy_(unit(hash_t((i["n_data"], i["dim"]), c + 2)))
    bank.images = torch.tensor(i["y"])
    for branch, offset in (("patches", 3), ("image", 4)):
        drawn = index_t((i["batch"], i["K"] + 1), c + offset, i["n_data"])[:, 1:]
        assert drawn.tolist() == i[f"idx_{branch}"]
    patches, image = (hash_t(shape, c + k).requires_grad_() for k in (0, 1))
    kind = dict(nce="nce", cross_entropy="softmax")[i["loss_type"]]
    loss_func = PIRLLoss(bank, i["T"], i["K"], i["weights"][0], kind)
    indices = [candidates(bank.images, i[f"idx_{branch}"]) for branch in ("patches", "image")]
    vectors = torch.cat([image, patches])
    out = Projection(image, unit_vectors(vectors))  # the author's loss normalises by itself
    loss = loss_func.losses(out, indices).mean()
    loss.backward()
    assert loss.item() == approx(case["loss"])
    same(patches.grad, case["grad_patches"])
    same(image.grad, case["grad_image"])
    if kind == "nce": assert bank.normalizer.item() == approx(case["Z"])
    else: assert bank.normalizer == 0
    bank.update(bank.images, unit(image.detach()))
    same(bank.rows[bank.images], case["memory_rows_y"])


def copies(x: torch.Tensor) -> torch.Tensor:
    "A view and a puzzle of which nothing depends on who draws them."
    x = torch.nn.functional.interpolate(x.double() / 255, 32)
    return torch.cat([x, x.flip(3)])


def learner_in_processes(rank: int, world: int) -> dict:
    torch.manual_seed(0)
    dls = simclr_dls("digits", size=32, bs=32, n_train=128, n_valid=64, seed=0, device="cpu",
                     progress=False)
    learn = pirl_learner(dls, width=0.0625, kind="softmax", cbs=[Rounded()], precision="fp32")
    learn.model.double()
    every = torch.arange(128)  # all rows: nothing to draw
    learn.model.memory.draw = lambda images, k: torch.cat(
        [images[:, None], every.expand(len(images), -1)], 1)
    learn.model.encoder.register_forward_pre_hook(lambda m, x: x[0].double())
    learn.views.two_views = copies
    learn.probe._start(torch.empty(0, learn.model.encoder.out_dim))  # equal in all runs
    with learn.no_bar(), learn.no_logging(): learn.pretrain(2, lr=0.1)
    columns = {k: v for k, v in learn.history().items() if k != "valid_loss"}  # that is NaN
    history = {f"history {k}": torch.tensor(v) for k, v in columns.items()}
    weights = {k: v for k, v in learn.model.state_dict().items() if v.is_floating_point()}
    return {**weights, **history}


def test_learner_is_that_of_one_process(tmp_path):
    "Weights, bank, losses, accuracies, on both ranks."
    expected = run(learner_in_processes, 1, tmp_path / "one")[0]
    assert "memory.rows" in expected
    for found in run(learner_in_processes, 2, tmp_path / "two"): close(found, expected)
