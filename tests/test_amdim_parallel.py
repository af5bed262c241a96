"""AMDIM over processes is AMDIM of one: loss, gradients, weights; with real processes.

The functions `*_in_processes` run in each process. The reference is one with the whole batch.
"""
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from processes import run
from simclr_nb.model.amdim import AMDIM, AMDIMEncoder
from simclr_nb.methods.amdim import amdim_learner
from simclr_nb.data import simclr_dls
from simclr_nb.parallel.loss import global_loss
from simclr_nb.core.gather import sum_over_ranks
from simclr_nb.parallel.norm import to_global_batch_norm
from simclr_nb.parallel.microbatch import micro_batched, replace_norms
from simclr_nb.loss.amdim import AMDIMLoss, nce_top1
from simclr_nb.core.processes import shard_rows
from test_parallel import Rounded, close

IMAGES = 8
RUNS = dict(sampled={}, all_sources=dict(sampled=False), bare=dict(clip=None, penalty=0.0),
            one_term=dict(terms=("1t7",)))


def amdim(use_bn: bool = True) -> AMDIM:
    torch.manual_seed(0)
    encoder = AMDIMEncoder(32, 4, 16, 2, use_bn, zero_init_last=False)
    return AMDIM(encoder, zero_init_last=False).double()


def views(rank: int, world: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    both = torch.rand(2, IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64)
    return both[:, list(shard_rows(IMAGES, rank, world))].flatten(0, 1)


def positions(rank: int, world: int) -> tuple[Tensor, Tensor]:
    rows = torch.tensor(list(shard_rows(IMAGES, rank, world)))
    return (7 * rows + 3) % 25, (11 * rows + 5) % 25


def step(model, forward, loss_func, rank: int, world: int) -> dict:
    "Loss, gradients and contrastive accuracy of one batch."
    out = forward(model, views(rank, world))
    drawn = positions(rank, world) if loss_func.sampled else None
    loss = loss_func(out, positions=drawn)
    loss.backward()
    inner = getattr(model, "module", model)
    gradients = {f"gradient {k}": p.grad.clone() for k, p in inner.named_parameters()}
    return {"loss": sum_over_ranks(loss) / world, "top1": nce_top1(out).detach(), **gradients}


def plain(model, x): return model(x)
def micro(model, x): return micro_batched(model, x, 3)


def steps_in_processes(rank: int, world: int) -> dict:
    found = {}
    for name, options in RUNS.items():
        model = DistributedDataParallel(to_global_batch_norm(amdim()))
        found[name] = step(model, plain, global_loss(AMDIMLoss(**options)), rank, world)
    model = DistributedDataParallel(replace_norms(amdim(), "group"))
    found["micro"] = step(model, micro, AMDIMLoss(), rank, world)
    model = DistributedDataParallel(amdim())
    found["local statistics"] = step(model, plain, AMDIMLoss(), rank, world)
    return found


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return cache(lambda world: run(steps_in_processes, world, tmp_path_factory.mktemp("amdim")))


def in_one(name: str) -> dict:
    if name == "micro": return step(replace_norms(amdim(), "group"), plain, AMDIMLoss(), 0, 1)
    return step(amdim(), plain, AMDIMLoss(**RUNS.get(name, {})), 0, 1)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", [*RUNS, "micro"])
def test_one_step_is_that_of_one_process(name, world, steps):
    "To 1e-6, in float64, on every rank; sources local, targets from all."
    expected = in_one(name)
    for found in steps(world):
        assert found[name].keys() == expected.keys()
        for key, value in expected.items():
            scale = value.abs().max().clamp_min(1.0)
            assert (found[name][key] - value).abs().max() < 1e-6 * scale, key


def test_statistics_of_each_rank_alone_are_not_the_same(steps):
    "So the test above can fail."
    expected = in_one("sampled")
    found = steps(2)[0]["local statistics"]
    assert (found["loss"] - expected["loss"]).abs() > 1e-3


def copies(x: Tensor) -> Tensor:
    "Two views of which nothing depends on who draws them."
    x = torch.nn.functional.interpolate(x.double() / 255, 32)
    return torch.cat([x, 0.9 * x + 0.1 * x.flip(3)])


def learner_in_processes(rank: int, world: int) -> dict:
    torch.manual_seed(0)
    dls = simclr_dls("digits", size=32, bs=32, n_train=128, n_valid=64, seed=0, device="cpu")
    learn = amdim_learner(dls, "amdim/4-16-1", sampled=False, cbs=[Rounded()], precision="fp32")
    learn.model.double()
    learn.model.encoder.register_forward_pre_hook(lambda m, x: x[0].double())
    learn.views.two_views = copies
    learn.probe._start(torch.empty(0, learn.model.encoder.out_dim))  # equal in all runs
    with learn.no_bar(), learn.no_logging(): learn.pretrain(2, lr=1e-3)
    assert type(learn.loss_func) is AMDIMLoss and type(learn.model) is AMDIM
    history = {f"history {k}": torch.tensor(v) for k, v in learn.history().items()}
    weights = {k: v for k, v in learn.model.state_dict().items() if v.is_floating_point()}
    return {**weights, **history}


def test_learner_is_that_of_one_process(tmp_path):
    "Weights, running statistics, losses, contrastive accuracy, probe, k-NN, on both ranks."
    expected = run(learner_in_processes, 1, tmp_path / "one")[0]
    for found in run(learner_in_processes, 2, tmp_path / "two"): close(found, expected)
