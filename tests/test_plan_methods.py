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
from simclr_nb.loss.tiled import NTXent
from simclr_nb.model.head import SimCLR
from simclr_nb.parallel.loss import global_loss
from simclr_nb.parallel.norm import to_global_batch_norm, to_split_batch_norm
from simclr_nb.plan.cost import LINK_USE, Link, communication, count_encoder
from simclr_nb.plan.devices import DEVICES, MATRIX_USE
from simclr_nb.plan.plan import PlanConfig, run_plan
from simclr_nb.plan.step import count_method, step_memory
from simclr_nb.run.config import METHODS

N_TRAIN = 96
N = 16
NEGATIVES = 64 * N  # as many as keys on 64 devices
ARCHS = dict(cpc="cpc/8-1", amdim="amdim/16-64-1", cmc="cmc/resnet18")
LEARNERS = dict(
    instdisc=lambda dls: instdisc_learner(dls, width=0.25),
    moco=lambda dls: moco_learner(dls, width=0.25, version="v1", negatives=NEGATIVES),
    moco_v2=lambda dls: moco_learner(dls, width=0.25, version="v2", negatives=NEGATIVES),
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
    negatives = NEGATIVES if method.startswith("moco") else None
    known = dict(data=f"{N_TRAIN}x32", arch=ARCHS.get(method, "resnet18"), width=width)
    return PlanConfig(**known | dict(method=method, negatives=negatives, batch=N) | options)


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
            elif "broadcast" not in name: raise AssertionError(f"not expected: {name}")
        return func(*args, **(kwargs or {}))


def exchanged(method: str, world: int = 2) -> dict:
    "Of a step, with stand-ins for the other devices that send nothing: only sizes count."
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    learn, views = learner(method)
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        if method.startswith("moco"): to_split_batch_norm(learn.model, max(world, 8))
        with Exchanged(world) as mode:
            out = learn.model(views)
            learn.loss_func(out).backward()
            if hasattr(learn.model, "remember"): learn.model.remember(out)
    finally: dist.destroy_process_group()
    return mode.bytes


def exchanged_by_simclr(world: int) -> dict:
    "Of a whole step, gradients included, with stand-ins for the other devices."
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.testing._internal.distributed.fake_pg import FakeStore
    learn = simclr_learner(loaders(), width=0.25)
    views = learn.views.two_views(learn.dls.train.dataset.images[:N])
    gradients = []

    def count_bucket(_, bucket):
        gradients.append(bucket.buffer().numel() * bucket.buffer().element_size())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        model = to_global_batch_norm(learn.model.train())
        model = DistributedDataParallel(model, broadcast_buffers=False)
        model.register_comm_hook(None, count_bucket)
        with Exchanged(world) as mode: global_loss(NTXent())(model(views)).backward()
    finally: dist.destroy_process_group()
    return dict(mode.bytes, gradients=sum(gradients))


PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_plan_methods as t
of_methods = {m: {w: t.exchanged(m, w) for w in t.WORLDS} for m in t.STEPS}
print(json.dumps(dict(of_methods, simclr={w: t.exchanged_by_simclr(w) for w in t.WORLDS})))
"""
WORLDS = 2, 8, 64


@pytest.fixture(scope="module")
def traffic() -> dict:
    "In a process of its own: a group of processes is of the whole process."
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(Path(__file__).parent)],
                          capture_output=True, text=True, timeout=600,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("method", STEPS)
def test_bytes_between_devices_are_those_of_a_step(method, world, traffic):
    "Counted at the collectives of a step; shapes that are compared before are a few bytes more."
    count, found = count_of(method), traffic[method][str(world)]
    gathers = 4 * world * N * sum(numbers for numbers, _ in count.step.gathers)
    back = 4 * world * N * sum(numbers for numbers, passes in count.step.gathers if passes == 2)
    splits = sum(8 * call.channels for call in count.calls if not call.gathers)
    print(f"{method}: counted {gathers / found['gather']:.4f} of what is gathered")
    assert gathers == pytest.approx(found["gather"], rel=0.02)
    assert back + splits == pytest.approx(found["reduce"], rel=0.02)


@pytest.mark.parametrize("world", WORLDS)
def test_bytes_between_devices_are_those_of_simclr(world, traffic):
    "A ring sends (W - 1) / W of a tensor in a pass: one to gather or scatter, two for a sum."
    count, found = count_encoder("resnet18", 0.25, 32), traffic["simclr"][str(world)]
    link = Link(1 / LINK_USE, 0.0)  # a byte per second
    plan = communication(count, N, 1, world, link, link)
    ring = (world - 1) / world
    scattered = 4 * 2 * N * world * count.dims[1]
    statistics = found["reduce"] - scattered
    sent = ring * (found["gather"] + scattered + 2 * statistics)
    assert plan["embeddings"] + plan["statistics"] == pytest.approx(sent, rel=0.001)
    assert plan["gradients"] == pytest.approx(2 * ring * found["gradients"])


def test_many_devices_compute_as_one():
    "On W devices, each computes the step of one with a W-th of the batch; only the loss grows."
    one = run_plan(config_of("simclr", gpus="a100", batch=64, data="50000x32"))
    many = run_plan(config_of("simclr", gpus="8x8xa100", batch=64 * 64, data="50000x32"))
    assert one.seconds["network"] == 0 < many.seconds["network"]
    more = (8 * 64 - 4) * (2 * 64) ** 2 * 128  # two extra passes, and 64 times the negatives
    found = many.seconds["compute"] - one.seconds["compute"]
    assert found == pytest.approx(more / (MATRIX_USE * DEVICES["a100"].peak["bf16"]), rel=0.01)


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
