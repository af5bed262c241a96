"""MoCo: the authors' numbers, processes, groups of BatchNorm, a killed run.

`golden/comparators.json` holds values of the official class, in float64.
"""
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from comparators import GOLDEN, approx, hash_t, same, unit
from processes import run
from simclr_nb.core.gather import sum_over_ranks
from simclr_nb.core.processes import shard_rows
from simclr_nb.data import simclr_dls
from simclr_nb.loss.memory import KeyQueue, bank_logits
from simclr_nb.methods.moco import MoCo, MoCoLoss, moco_learner
from simclr_nb.model.head import projection_head
from simclr_nb.parallel.norm import SplitBatchNorm, to_global_batch_norm, to_split_batch_norm
from test_parallel import Rounded, close


def tiny(case: dict, **options) -> MoCo:
    "The case's network: Flatten, Linear, BatchNorm, ReLU, and the head of its version."
    i = case["inputs"]
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.BatchNorm1d(10), nn.ReLU())
    kind = "nonlinear" if i.get("mlp") else "linear"
    head = projection_head(10, i["dim"], kind=kind, bias=True)
    model = MoCo(encoder, head, KeyQueue(i["K"], i["dim"]), i["m"], **options).double()
    of_norm = {id(p) for p in encoder[2].parameters()}  # left at 1 and 0
    for number, p in enumerate([*encoder.parameters(), *head.parameters()]):
        if id(p) in of_norm: continue
        fan_in = p.shape[-1]
        p.data.copy_(hash_t(tuple(p.shape), i["c"] + number) / fan_in**0.5)
    model.key_encoder.encoder.load_state_dict(encoder.state_dict())
    model.key_encoder.head.load_state_dict(head.state_dict())
    model.queue.keys.copy_(unit(hash_t((i["dim"], i["K"]), i["c"] + 500), 0).T)
    return model


def images(case: dict, step: int) -> torch.Tensor:
    "Both views of a step, `(2N, 3, 4, 4)`."
    c = case["inputs"]["c"] + 100 + 2 * step
    return torch.cat([hash_t((4, 3, 4, 4), c), hash_t((4, 3, 4, 4), c + 1)])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("name", ["moco_v1_3steps", "moco_v2_3steps"])
def test_three_steps_of_the_official_class(name, shuffle):
    "Losses, logits, gradients, pointer; then all parameters, running means and the queue."
    case = GOLDEN[name]
    i = case["inputs"]
    model = tiny(case, shuffle=shuffle)
    params = [*model.encoder.parameters(), *model.head.parameters()]
    assert len(params) == len(i["names"])
    options = dict(lr=i["lr"], momentum=i["momentum"], weight_decay=i["weight_decay"])
    optimizer = torch.optim.SGD(params, **options)
    loss_func = MoCoLoss(model.queue, i["T"])
    for s, expected in enumerate(case["steps"]):
        out = model(images(case, s))
        loss = loss_func(out)
        q, k = out.z.chunk(2)
        positive = (q * k).sum(1, keepdim=True) / i["T"]
        logits = torch.cat([positive, bank_logits(q, model.queue.keys, i["T"])], 1)
        same(logits[0], expected["logits_row0"])
        assert loss.item() == approx(expected["loss"])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        assert norm.item() == approx(expected["grad_norm"])
        model.remember(out)
        assert model.queue.pointer.item() == expected["pointer"]
        optimizer.step()
    of_keys = [*model.key_encoder.encoder.parameters(), *model.key_encoder.head.parameters()]
    same(torch.stack([p.abs().sum() for p in params]), case["l1_query"])
    same(torch.stack([p.abs().sum() for p in of_keys]), case["l1_key"])
    same(model.encoder[2].running_mean, case["running_mean_query"])
    same(model.key_encoder.encoder[2].running_mean, case["running_mean_key"])
    same(model.queue.keys[0], case["queue_end_column0"])
    same(model.queue.keys.norm(dim=1), case["queue_end_columns_norm"])


def test_symmetric_loss_of_the_demo():
    case = GOLDEN["moco_symmetric"]
    model = tiny(case, symmetric=True)
    out = model(images(case, 0))
    loss = MoCoLoss(model.queue, case["inputs"]["T"], symmetric=True)(out)
    loss.backward()
    params = [*model.encoder.parameters(), *model.head.parameters()]
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    assert loss.item() == approx(case["loss"])
    assert norm.item() == approx(case["grad_norm"])
    model.remember(out)
    assert model.queue.pointer.item() == case["pointer"]
    same(model.queue.keys[0], case["queue_column0"])


def test_split_batch_norm_of_the_demo():
    case = GOLDEN["split_bn"]
    i = case["inputs"]
    norm = nn.BatchNorm2d(3).double()
    norm.weight.data.copy_(1 + 0.1 * hash_t((3,), i["c"] + 1))
    norm.bias.data.copy_(0.1 * hash_t((3,), i["c"] + 2))
    to_split_batch_norm(norm, i["splits"])
    x = hash_t(tuple(i["shape"]), i["c"])
    y = norm(x)
    same(y.flatten()[:8], case["train_flat_first8"])
    assert y.norm().item() == approx(case["train_l2"])
    same(norm.running_mean, case["running_mean"])
    same(norm.running_var, case["running_var"])
    same(norm.eval()(x).flatten()[:8], case["eval_flat_first8"])


SETTINGS = dict(plain=dict(splits=1), split=dict(splits=4),
                symmetric=dict(splits=1, symmetric=True))


def moco(splits: int, symmetric: bool = False) -> MoCo:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder.out_dim = 4
    head = projection_head(4, 6, kind="nonlinear", bias=True)
    model = MoCo(encoder, head, KeyQueue(32, 6), 0.9, symmetric).double()
    return to_split_batch_norm(model, splits) if splits > 1 else to_global_batch_norm(model)


def two_steps(rank: int, world: int, splits: int, symmetric: bool = False, order=None) -> dict:
    "Losses, gradients, queue and both encoders of two steps; `order` deals out the images."
    model = moco(splits, symmetric)
    forward = DistributedDataParallel(model) if world > 1 else model
    loss_func = MoCoLoss(model.queue, 0.2, symmetric)
    params = [*model.encoder.parameters(), *model.head.parameters()]
    found = {}
    for s in range(2):
        torch.manual_seed(100 + s)  # of the shuffled keys
        drawn = torch.Generator().manual_seed(s)
        both = torch.rand(2, 8, 3, 6, 6, generator=drawn, dtype=torch.float64)
        if order is not None: both = both[:, order]
        out = forward(both[:, list(shard_rows(8, rank, world))].flatten(0, 1))
        loss = loss_func(out)
        for p in params: p.grad = None
        loss.backward()
        found[f"loss {s}"] = sum_over_ranks(loss) / world
        for n, p in enumerate(params): found[f"gradient {s} {n}"] = p.grad.clone()
        model.remember(out)
        with torch.no_grad():
            for p in params: p -= 0.1 * p.grad
    state = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    return found | state | {"pointer": model.queue.pointer.double()}


def steps_in_processes(rank: int, world: int) -> dict:
    return {name: two_steps(rank, world, **options) for name, options in SETTINGS.items()}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list:
    return run(steps_in_processes, 2, tmp_path_factory.mktemp("moco"))


def same_steps(found: dict, expected: dict, keys: torch.Tensor | None = None):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "queue.keys" and keys is not None: value = value[keys]
        scale = value.abs().max().clamp_min(1.0)
        assert (found[name] - value).abs().max() < 1e-6 * scale, name


@pytest.mark.parametrize("name", ["plain", "symmetric"])
def test_two_processes_agree_with_one(name, of_two):
    "With common statistics: losses, gradients, queue, both encoders, running averages."
    expected = two_steps(0, 1, **SETTINGS[name])
    keys = None
    if name == "symmetric":  # each rank adds its first views, then its second
        once = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15])
        keys = torch.cat([once, 16 + once])
    for found in of_two: same_steps(found[name], expected, keys)


def test_groups_of_two_processes_are_those_of_one(of_two, monkeypatch):
    "One process whose rows alternate between the two: row i of rank r is row 2 i + r."
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    draw = torch.randperm
    def of_images(n, **options): return torch.argsort(order)[draw(n, **options)]  # not of places
    monkeypatch.setattr(torch, "randperm", of_images)
    expected = two_steps(0, 1, 4, order=order)
    monkeypatch.undo()
    places = torch.cat([8 * s + torch.argsort(order) for s in range(2)])
    keys = torch.cat([places, torch.arange(16, 32)])
    for found in of_two: same_steps(found["split"], expected, keys)
    other = two_steps(0, 1, 4)  # the same images in other groups
    assert (of_two[0]["split"]["loss 0"] - other["loss 0"]).abs() > 1e-6


def copies(x: torch.Tensor) -> torch.Tensor:
    "Two views of which nothing depends on who draws them."
    x = x.double() / 255
    return torch.cat([x, 0.9 * x + 0.1 * x.flip(3)])


def learner_in_processes(rank: int, world: int) -> dict:
    torch.manual_seed(0)
    dls = simclr_dls("digits", bs=32, n_train=128, n_valid=64, seed=0, device="cpu", progress=False)
    options = dict(width=0.0625, negatives=96, splits=1, precision="fp32")
    learn = moco_learner(dls, cbs=[Rounded()], **options)
    learn.model.double()
    learn.model.queue.keys.add_(rank)  # rank 0 decides
    if rank == 0: learn.model.queue.keys.copy_(unit(hash_t((96, 128), 5)))
    learn.model.encoder.register_forward_pre_hook(lambda m, x: x[0].double())
    learn.views.two_views = copies
    learn.probe._start(torch.empty(0, learn.model.encoder.out_dim))  # equal in all runs
    with learn.no_bar(), learn.no_logging(): learn.pretrain(2, lr=0.1)
    assert type(learn.loss_func) is MoCoLoss and type(learn.model) is MoCo
    history = {f"history {k}": torch.tensor(v) for k, v in learn.history().items()}
    weights = {k: v for k, v in learn.model.state_dict().items() if v.is_floating_point()}
    return {**weights, **history}


def test_learner_is_that_of_one_process(tmp_path):
    "Both encoders, queue, losses, contrastive accuracy, probe, k-NN, on both ranks."
    expected = run(learner_in_processes, 1, tmp_path / "one")[0]
    assert "queue.keys" in expected
    for found in run(learner_in_processes, 2, tmp_path / "two"): close(found, expected)


def test_the_optimiser_does_not_see_the_key_encoder():
    dls = simclr_dls("digits", bs=32, n_train=64, n_valid=64, seed=0, device="cpu", progress=False)
    learn = moco_learner(dls, width=0.0625, negatives=64, momentum=0.0)
    before = [p.clone() for p in learn.model.key_encoder.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.pretrain(1)
    known = {id(p) for group in learn.opt.param_lists for p in group}
    assert not known & {id(p) for p in learn.model.key_encoder.parameters()}
    assert all(p.grad is None for p in learn.model.key_encoder.parameters())
    pairs = zip(before, learn.model.key_encoder.parameters(), strict=True)
    assert any((a != b).any() for a, b in pairs)  # by following alone
    assert any(isinstance(m, SplitBatchNorm) for m in learn.model.key_encoder.modules())


def test_a_loaded_encoder_is_that_of_the_keys_too(tmp_path):
    "By `load_encoder`; `--init` calls the same method of the model."
    dls = simclr_dls("digits", bs=32, n_train=64, n_valid=64, seed=0, device="cpu", progress=False)
    file = moco_learner(dls, width=0.0625, negatives=64).save_encoder(tmp_path / "e.safetensors")
    model = moco_learner(dls, width=0.0625, negatives=64).load_encoder(file).model
    keys = model.key_encoder.encoder.state_dict()
    for name, value in model.encoder.state_dict().items(): assert torch.equal(value, keys[name])


def uneven_groups(rank: int, world: int) -> str:
    "Message of a forward pass whose groups do not divide among the processes."
    layer = nn.BatchNorm2d(2)
    with mock.patch("simclr_nb.parallel.norm.world_size", lambda: 1): to_split_batch_norm(layer, 3)
    with pytest.raises(ValueError) as error: layer(torch.randn(4, 2, 3, 3))
    return str(error.value)


def test_uneven_groups_fail_with_their_number(tmp_path):
    "A learner may be made before the processes meet."
    for message in run(uneven_groups, 2, tmp_path):
        assert message == "3 BatchNorm groups over 2 processes: set splits to a multiple of 2"
