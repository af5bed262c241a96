"""CPC: numbers of an implementation, causality, processes, killed runs.

`golden/comparators.json` holds the loss of lightning-bolts (CPC v2) and of CPCV2-PyTorch (version
1's form); both in float64. That code adds 1e-11 inside the logarithm of version 1, hence 1e-9 there.
"""
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from comparators import GOLDEN, approx, hash_t, index_t
from processes import run
from simclr_nb.core.gather import sum_over_ranks
from simclr_nb.core.processes import shard_rows
from simclr_nb.data import simclr_dls
from simclr_nb.methods.cpc import (
    CPC,
    ContextNetwork,
    CPCLoss,
    cpc_learner,
    prediction_logits,
    sampled_loss,
)
from simclr_nb.model.encoder import create_encoder, load_encoder
from simclr_nb.model.head import Projection
from simclr_nb.parallel.microbatch import micro_batched
from simclr_nb.parallel.norm import batch_norms
from simclr_nb.views.patches import cut_patches, lay_patches
from test_instdisc import killed_runs_end_alike
from test_parallel import Rounded, close

IMAGES = 4


@pytest.mark.parametrize("name", ["cpc_v2_step2", "cpc_v2_step0"])
def test_loss_of_version_2(name):
    case = GOLDEN[name]
    i = case["inputs"]
    shape = i["batch"], i["dim"], i["rows"], i["cols"]
    targets = hash_t(shape, i["c"]).requires_grad_()
    predictions = (3 * hash_t(shape, i["c"] + 1)).requires_grad_()
    logits, labels = prediction_logits(targets, predictions, i["i"], i["scale"])
    assert labels.tolist() == case["labels"]
    assert logits[0, :6].tolist() == approx(case["logits_row0_first6"])
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    assert loss.item() == approx(case["loss"])
    assert targets.grad.norm().item() == approx(case["grad_targets_l2"])
    assert predictions.grad.norm().item() == approx(case["grad_predictions_l2"])
    z = torch.stack([targets, predictions], 1)[:, None]  # the loss of a model with one direction
    assert CPCLoss([i["i"]], i["scale"])(Projection(z, z)).item() == approx(case["loss"])


def test_loss_of_version_1():
    case = GOLDEN["cpc_gim"]
    i = case["inputs"]
    n, dim, rows, cols = shape = i["batch"], i["channels"], i["rows"], i["cols"]
    z, context = (hash_t(shape, i["c"] + k).requires_grad_() for k in (0, 1))
    losses = []
    for k in range(1, i["pred_steps"] + 1):
        distance = k + i["skip"]
        weight = hash_t((dim, dim), i["c"] + 10 + k) / dim**0.5
        places = (rows - distance) * cols * n
        drawn = index_t((places, i["negatives"]), i["c"] + 50 + k, places)
        losses.append(sampled_loss(z, context, weight, distance, drawn))
    loss = sum(losses) / len(losses)
    loss.backward()
    close_to = dict(rel=1e-9)
    assert [v.item() for v in losses] == pytest.approx(case["each_step"], **close_to)
    assert loss.item() == pytest.approx(case["loss"], **close_to)
    assert z.grad.norm().item() == pytest.approx(case["grad_z_l2"], **close_to)
    assert context.grad.norm().item() == pytest.approx(case["grad_context_l2"], **close_to)


@pytest.mark.parametrize("row", range(7))
def test_a_changed_row_changes_no_context_above_it(row):
    "Not one bit; contexts of this row and of the five below see it."
    torch.manual_seed(row)
    network = ContextNetwork(6, 10)
    z = torch.randn(3, 6, 7, 7)
    changed = z.clone()
    changed[:, :, row] = torch.randn(3, 6, 7)
    with torch.no_grad(): before, after = network(z), network(changed)
    assert torch.equal(before[:, :, :row], after[:, :, :row])
    sees = [not torch.equal(before[:, :, r], after[:, :, r]) for r in range(7)]
    assert sees == [row <= r <= row + 5 for r in range(7)]


def model(**options) -> CPC:
    torch.manual_seed(0)
    encoder = create_encoder("cpc/4-1", size=32, zero_init_last=False)
    return CPC(encoder, blocks=2, **options).double()


def test_nothing_in_the_model_lets_patches_see_each_other():
    "No BatchNorm; and a pixel that one patch alone holds moves one vector of the grid."
    cpc = model()
    assert not batch_norms(cpc) and not any(isinstance(m, _BatchNorm) for m in cpc.modules())
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    changed = x.clone()
    changed[0, :, 0, 0] += 0.5
    with torch.no_grad(): differs = (cpc.encoder.grid(x) != cpc.encoder.grid(changed)).any(1)
    assert differs.nonzero().tolist() == [[0, 0, 0]]


def test_predictions_ignore_what_they_predict():
    "The gradient with respect to the rows below its context is zero, in all directions."
    cpc = model()
    grid = torch.randn(1, 16, 7, 7, dtype=torch.float64, requires_grad=True)
    for turns, predictor in enumerate(cpc.directions):
        predicted = predictor(grid.rot90(turns, (2, 3)))[:, 1]
        for row in range(4):
            (g,) = torch.autograd.grad(predicted[:, :, row].sum(), grid, retain_graph=True)
            rows = g.rot90(turns, (2, 3)).abs().sum((0, 1, 3))
            assert (rows[row + 1:] == 0).all() and rows[row] > 0


def sheets(rank: int, world: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64)
    return lay_patches(cut_patches(x))[list(shard_rows(IMAGES, rank, world))]


def step(cpc: nn.Module, forward, loss_func: CPCLoss, rank: int, world: int) -> dict:
    out = forward(cpc, sheets(rank, world))
    loss = loss_func(out)
    loss.backward()
    inner = getattr(cpc, "module", cpc)
    gradients = {f"gradient {k}": p.grad.clone() for k, p in inner.named_parameters()}
    share = loss_func.cpc_top1(Projection(out.h, out.z.detach())).double()
    means = {"loss": sum_over_ranks(loss) / world, "top1": sum_over_ranks(share) / world}
    return means | gradients


def plain(cpc, x): return cpc(x)
def micro(cpc, x): return micro_batched(cpc, x, 1)


def steps_in_processes(rank: int, world: int) -> dict:
    ways = {"plain": plain, "micro": micro}
    return {name: step(DistributedDataParallel(model(steps=2)), way, CPCLoss((0, 2)), rank, world)
            for name, way in ways.items()}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return cache(lambda world: run(steps_in_processes, world, tmp_path_factory.mktemp("cpc")))


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["plain", "micro"])
def test_one_step_is_that_of_one_process(name, world, steps):
    "Loss and every gradient to 1e-6, in float64: predictions of each rank, targets of all."
    expected = step(model(steps=2), plain, CPCLoss((0, 2)), 0, 1)
    for found in steps(world):
        assert found[name].keys() == expected.keys()
        for key, value in expected.items():
            scale = value.abs().max().clamp_min(1)
            assert (found[name][key] - value).abs().max() < 1e-6 * scale, key


def test_targets_of_one_process_alone_are_not_the_same(steps):
    "So the test above can fail."
    alone = [step(model(steps=2), plain, CPCLoss((0, 2)), rank, 2)["loss"] * 2 for rank in (0, 1)]
    assert (sum(alone) / 2 - steps(2)[0]["plain"]["loss"]).abs() > 0.1


def learner_in_processes(rank: int, world: int) -> dict:
    torch.manual_seed(0)
    dls = simclr_dls("digits", size=32, bs=16, n_train=64, n_valid=32, seed=0, device="cpu",
                     progress=False)
    learn = cpc_learner(dls, "cpc/4-1", blocks=1, precision="fp32", cbs=[Rounded()])
    learn.model.double()
    learn.model.encoder.register_forward_pre_hook(lambda m, x: x[0].double())
    learn.views.two_views = lambda x: lay_patches(cut_patches(F.interpolate(x.double() / 255, 32)))
    learn.probe._start(torch.empty(0, learn.model.encoder.out_dim))  # equal in all runs
    grid = learn.model.encoder.grid
    learn.model.encoder.grid = lambda x: grid(x.double())
    with learn.no_bar(), learn.no_logging(): learn.pretrain(2, lr=1e-3)
    history = {f"history {k}": torch.tensor(v) for k, v in learn.history().items()}
    return {**learn.model.state_dict(), **history}


def test_learner_is_that_of_one_process(tmp_path):
    "Weights, losses, accuracies, on both ranks. Blank patches are alike: rounding decides a few predictions."
    expected = run(learner_in_processes, 1, tmp_path / "one")[0]
    top1 = expected.pop("history cpc_top1")
    for found in run(learner_in_processes, 2, tmp_path / "two"):
        assert (found.pop("history cpc_top1") - top1).abs().max() < 2e-3
        close(found, expected)


def test_a_killed_run_ends_alike(tmp_path):
    killed_runs_end_alike("cpc", [5], tmp_path)


def test_a_saved_encoder_gives_the_same_h(tmp_path):
    dls = simclr_dls("digits", size=32, bs=16, n_train=32, n_valid=32, device="cpu", progress=False)
    learn = cpc_learner(dls, "cpc/4-1", blocks=1, ahead=(1, 2), precision="fp32")
    with learn.no_bar(), learn.no_logging(): learn.pretrain(1)
    encoder = load_encoder(learn.save_encoder(tmp_path / "cpc.safetensors"))
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(encoder(x), learn.model.encoder.eval()(x), atol=1e-5)
        assert torch.allclose(encoder(x), encoder.grid(x).mean((2, 3)))


def test_refusals():
    dls = simclr_dls("digits", size=32, bs=16, n_train=32, n_valid=32, device="cpu", progress=False)
    with pytest.raises(ValueError, match="CPC needs an encoder cpc/WIDTH-DEPTH, got 'resnet18'"):
        cpc_learner(dls, "resnet18")
    with pytest.raises(ValueError, match="ahead must be 0 to 5, got 6"):
        cpc_learner(dls, "cpc/4-1", ahead=(6,))
    with pytest.raises(TypeError, match="no option 'aheads'; did you mean 'ahead'"):
        cpc_learner(dls, aheads=(2,))
    with pytest.raises(ValueError, match="expected predictions for 2 distances, got 1"):
        CPCLoss((1, 2))(model()(sheets(0, 1)))
