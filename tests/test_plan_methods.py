"Plans of all methods against steps of their learners: operations, memory, bytes between devices."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from simclr_nb.cli import plan as command
from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.methods.amdim import amdim_learner
from simclr_nb.methods.cmc import cmc_learner
from simclr_nb.methods.cpc import cpc_learner
from simclr_nb.methods.instdisc import instdisc_learner
from simclr_nb.methods.moco import moco_learner
from simclr_nb.methods.pirl import pirl_learner
from simclr_nb.methods.remembering import MemoryCallback
from simclr_nb.methods.steps import STEPS, plan_method
from simclr_nb.model.head import SimCLR
from simclr_nb.plan.cost import count_encoder
from simclr_nb.plan.plan import PlanConfig
from simclr_nb.plan.step import count_method, step_memory
from simclr_nb.run.config import METHODS

N_TRAIN = 96
N = 16
ARCHS = dict(cpc="cpc/8-1", amdim="amdim/16-64-1", cmc="cmc/resnet18")
LEARNERS = dict(
    instdisc=lambda dls: instdisc_learner(dls, width=0.25),
    moco=lambda dls: moco_learner(dls, width=0.25, version="v1", negatives=64),
    moco_v2=lambda dls: moco_learner(dls, width=0.25, version="v2", negatives=64),
    pirl=lambda dls: pirl_learner(dls, width=0.25, negatives=None, kind="softmax"),
    cmc=lambda dls: cmc_learner(dls, ARCHS["cmc"], width=0.25),
    cpc=lambda dls: cpc_learner(dls, ARCHS["cpc"]),
    amdim=lambda dls: amdim_learner(dls, ARCHS["amdim"]))


def loaders():
    dls = simclr_dls("digits", size=32, bs=N, n_train=N_TRAIN, n_valid=32, seed=0, device="cpu",
                     progress=False)
    for loader in dls: loader.dataset.images[:, 2] = 100  # no longer grey, for CMC
    return dls


def config_of(method: str, **options) -> PlanConfig:
    width = 1.0 if method in ("cpc", "amdim") else 0.25
    negatives = 64 if method.startswith("moco") else None
    return PlanConfig(f"{N_TRAIN}x32", ARCHS.get(method, "resnet18"), width,
                      **dict(method=method, negatives=negatives, batch=N) | options)


def count_of(method: str):
    config = config_of(method)
    return count_method(lambda: STEPS[method](config, N_TRAIN, 32), 32)


def learner(method: str):
    "A learner, ready for a step by hand, and views of its first images."
    torch.manual_seed(0)
    learn = LEARNERS[method](loaders())
    images = torch.arange(N)
    for bank in MemoryCallback.banks(learn): bank.images = images
    views = learn.views.two_views(learn.dls.train.dataset.images[:N])
    learn.model.train()
    learn.loss_func.train()
    return learn, views


def test_every_method_has_a_plan():
    assert STEPS.keys() == METHODS.keys() - {"simclr"}


@pytest.mark.parametrize("method", STEPS)
def test_operations_are_those_of_a_step(method):
    "Of the learner on real images: forward, backward, loss; parameters and BatchNorm layers too."
    learn, views = learner(method)
    with FlopCounterMode(display=False) as counter:
        out = learn.model(views)
        forward = counter.get_total_flops()
        learn.loss_func(out).backward()
    count = count_of(method)
    flops = N * count.flops() + count.of_loss("flops", N)
    print(f"{method}: counted {flops / counter.get_total_flops():.4f} of the step")
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert N * count.flops(False) == pytest.approx(forward, rel=0.02)
    assert count.params == sum(p.numel() for p in learn.model.parameters() if p.requires_grad)
    assert count.frozen == sum(p.numel() for p in learn.model.parameters() if not p.requires_grad)
    assert count.memory == sum(b.numel() * b.element_size() for b in learn.model.buffers())
    assert count.pixels * N == views.numel()


def test_operations_of_simclr_too():
    learn = simclr_learner(loaders(), width=0.25)
    views = learn.views.two_views(learn.dls.train.dataset.images[:N])
    with FlopCounterMode(display=False) as counter: learn.loss_func(learn.model(views)).backward()
    count = count_encoder("resnet18", 0.25, 32)
    assert isinstance(learn.model, SimCLR)
    assert 2 * N * count.flops() == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("method", STEPS)
def test_saved_bytes_are_those_of_a_step(method):
    "Tensors that autograd keeps for the backward pass, besides weights and the views."
    learn, views = learner(method)
    own = {t.untyped_storage().data_ptr() for t in (views, *learn.model.parameters(),
                                                    *learn.model.buffers())}
    kept = {}

    def note(t):
        place = t.untyped_storage()
        if place.data_ptr() not in own: kept[place.data_ptr()] = place
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): learn.model(views)
    saved = sum(place.nbytes() for place in kept.values())
    print(f"{method}: counted {N * count_of(method).saved / saved:.3f} of the bytes kept")
    assert N * count_of(method).saved == pytest.approx(saved, rel=0.1)


class Exchanged(TorchDispatchMode):
    "Bytes of all devices together that collectives of this device move, times their passes."

    def __init__(self, world: int):
        super().__init__()
        self.world = world
        self.bytes = dict(gather=0, reduce=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("c10d::"):
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            largest = max(t.numel() * t.element_size() for t in tensors)
            if "allgather" in name: self.bytes["gather"] += self.world * largest
            elif "allreduce" in name: self.bytes["reduce"] += largest
            else: raise AssertionError(f"not expected: {name}")
        return func(*args, **(kwargs or {}))


def exchanged(method: str) -> dict:
    "Of a step, with a stand-in for another device that sends nothing: only sizes count."
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    learn, views = learner(method)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with Exchanged(2) as mode:
            out = learn.model(views)
            learn.loss_func(out).backward()
            if hasattr(learn.model, "remember"): learn.model.remember(out)
    finally: dist.destroy_process_group()
    return mode.bytes


PROGRAM = "import json, sys; sys.path.insert(0, sys.argv[1]); import test_plan_methods as t; " \
          "print(json.dumps({m: t.exchanged(m) for m in t.STEPS}))"


@pytest.fixture(scope="module")
def traffic() -> dict:
    "In a process of its own: a group of processes is of the whole process."
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(Path(__file__).parent)],
                          capture_output=True, text=True, timeout=600,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("method", STEPS)
def test_bytes_between_devices_are_those_of_a_step(method, traffic):
    "Counted at the collectives of a step; shapes that are compared before are a few bytes more."
    count, found = count_of(method), traffic[method]
    gathers = 4 * 2 * N * sum(numbers for numbers, _ in count.step.gathers)
    back = 4 * 2 * N * sum(numbers for numbers, passes in count.step.gathers if passes == 2)
    splits = sum(8 * call.channels for call in count.calls if not call.gathers)
    print(f"{method}: counted {gathers / found['gather']:.4f} of what is gathered")
    assert gathers == pytest.approx(found["gather"], rel=0.02)
    assert back + splits == pytest.approx(found["reduce"], rel=0.02)


@pytest.mark.parametrize("method", STEPS)
def test_memory_grows_with_the_batch(method):
    count = count_of(method)
    def total(n, **options): return sum(step_memory(count, n, **options).values())
    assert total(64) < total(65) and total(64, micro_batch=8) < total(64)
    assert total(64, devices=8) > total(64)
    assert min(step_memory(count, 64, 8, 8, True).values()) >= 0


def test_command(call):
    text = "cifar10 --arch resnet18 --batch 512 --gpus a100 --method".split()
    code, out, _ = call(command, *text, "moco_v2")
    assert code == 0 and out.startswith("moco_v2, resnet18") and "bank, queue and buffers" in out
    code, _, err = call(command, *text, "mocco")
    assert code == 2 and "did you mean 'moco'" in err
    code, out, _ = call(command, *text[:-1])
    assert code == 0 and out.startswith("resnet18")


def test_a_bank_of_imagenet():
    "1,281,167 rows of 128 numbers are 656 MB on each device; a queue of 65,536 keys is 34 MB."
    bank, queue = (plan_method(PlanConfig(method=m, batch=256, gpus="a100")).memory
                   for m in ("instdisc", "moco"))
    assert bank["bank, queue and buffers"] == pytest.approx(656e6, rel=0.01)
    assert queue["bank, queue and buffers"] == pytest.approx(34e6, rel=0.02)
    assert bank["loss"] == pytest.approx(4 * 4 * 2**24, rel=0.05)
