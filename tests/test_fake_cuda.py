"""The CUDA path without CUDA: steps on a pretended device wait for nothing and mix no devices.

`pretended.py` says how. `test_cuda.py` asks the same of a real GPU.
"""
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from torch import Generator, nn

import gpu_steps
import pretended
from gpu_steps import METHODS, STEPS, WAITING, StepLosses, within_steps
from pretended import NOTES, Gpu, Inherit, Pretend, Waited, WrongDevice
from simclr_nb.loss.memory import MemoryBank
from simclr_nb.loss.tiled import NTXent
from simclr_nb.model.head import SimCLR
from simclr_nb.parallel.microbatch import micro_batched
from simclr_nb.train.callbacks import FiniteLossCallback
from simclr_nb.views.policy import POLICIES, create_policy
from simclr_nb.views.two_views import TwoViews


@pytest.fixture(autouse=True)
def gpu():
    "The pretended device, and the answers of a driver."
    NOTES.clear()
    NOTES.refuse = False
    torch.manual_seed(0)
    with (patch("torch.autocast", pretended.Autocast),
          patch("torch.amp.GradScaler", pretended.Scaler),
          patch("torch._has_compatible_shallow_copy_type", pretended.compatible),
          patch("torch.cuda.mem_get_info", lambda *device: (2**34, 2**34)),
          patch("torch.cuda.get_rng_state", lambda *device: torch.get_rng_state()),
          patch("torch.cuda.set_rng_state", lambda state, *device: torch.set_rng_state(state)),
          Inherit(), Pretend()): yield


class Steps:
    "Counts of each step that was watched."

    def __init__(self, refuse: bool = True):
        self.refuse = refuse
        self.is_watching = False
        self.copies, self.waits = [], []

    def enter(self):
        NOTES.clear()
        NOTES.refuse = self.refuse
        self.is_watching = True

    def leave(self):
        if not self.is_watching: return
        self.copies.append(Counter(NOTES.copies))
        self.waits.append(list(NOTES.waits))
        NOTES.refuse = self.is_watching = False

    def __enter__(self): return within_steps(self.enter, self.leave)
    def __exit__(self, *error): NOTES.refuse = False


def train(method: str = "simclr", **options):
    "A short run on the pretended device, four steps of 32 images."
    data = dict(bs=32, n_train=128, n_valid=32)
    common = dict(data=data, width=0.125 if method == "cmc" else 0.0625, precision="fp32")
    return gpu_steps.train("cuda", method, **common | options)


# The pretended device itself

def test_rules_of_a_gpu():
    x = torch.ones(3, 4, device="cuda", requires_grad=True)
    assert type(x) is Gpu and x.device.type == "cuda" and x.is_cuda and not x.is_cpu
    for wrong in (lambda: x + torch.ones(4), lambda: torch.cat([x, torch.ones(1, 4)]),
                  lambda: x @ torch.arange(4.0), lambda: torch.arange(4) * x):
        with pytest.raises(WrongDevice): wrong()
    y = (x * torch.tensor(2.0)).sum(1).exp() + torch.arange(3, device=x.device)
    y.sum().backward()
    assert type(x.grad) is Gpu and not NOTES.waits
    NOTES.refuse = True
    for wait in (lambda: y[0].item(), lambda: bool(y[0] > 0), lambda: y.tolist(), lambda: y.cpu(),
                 lambda: y.nonzero(), lambda: y[y > 0], lambda: y.to("cpu"), lambda: float(y[1]),
                 lambda: torch.equal(y, y), lambda: y.unique(), lambda: y.detach().numpy()):
        with pytest.raises(Waited): wait()
    y.detach()[y > 0] = 3.0  # a mask and a number: nothing is counted


def test_numbers_are_those_of_a_cpu():
    "A network, a loss, a gradient, an optimiser, to the last bit."
    def steps(device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                              nn.Linear(8 * 36, 16)).to(device)
        opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        x = torch.rand(12, 3, 8, 8).to(device)
        for _ in range(3):
            opt.zero_grad()
            NTXent(0.5, tiled=True)(model(x)).backward()
            opt.step()
        return [t.cpu() for t in model.state_dict().values()]
    for a, b in zip(steps("cpu"), steps("cuda"), strict=True): assert torch.equal(a, b)


# Steps

FAST = [*((name, {}) for name in ("simclr", "moco_v2", "pirl", "cmc")),
        ("simclr", dict(precision="bf16")), ("simclr", dict(micro_batch=16)),
        ("instdisc", dict(negatives=20))]
MARKED = [pytest.param(*step, marks=[] if step in FAST else pytest.mark.slow) for step in STEPS]
COPIES = dict(cpc=260)  # of 49 patches, by seven operators twice; others: by one policy, two views


@pytest.mark.parametrize("method, options", MARKED, ids=str)
def test_steps_do_not_wait(method, options):
    "From the batch to the end of the step, probes and metrics included."
    steps = Steps()
    with steps as cbs: learn = train(method, cbs=cbs, **options)
    assert len(steps.copies) == 2 and not any(steps.waits)
    per_step = max(sum(copies.values()) for copies in steps.copies)
    print(f"{method} {options}: {per_step} copies to the device in a step")
    assert 0 < per_step <= COPIES.get(method, 80)
    assert all(type(p) is Gpu for p in learn.model.parameters())
    assert all(p.isfinite().all() for p in learn.model.parameters())


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m == "simclr" else pytest.mark.slow)
                                    for m in METHODS])
def test_weights_are_those_of_a_cpu(method):
    "After ten steps; other tiles and layouts of memory round otherwise."
    options = dict(precision="fp32", width=0.125, epochs=2, data=dict(bs=32, n_train=160, n_valid=64))
    states = []
    for device in ("cpu", "cuda"):
        start = FirstWeights()
        learn = gpu_steps.train(device, method, cbs=[start], **options)
        state = [p.detach().cpu() for p in learn.model.parameters()]
        states.append(torch.cat([(p - old).flatten() for p, old in zip(state, start.state, strict=True)]))
    moved = states[0].norm()
    print(f"{method}: moved by {moved:.3g}, difference {(states[1] - states[0]).norm() / moved:.2g}")
    assert moved > 0 and (states[1] - states[0]).norm() < 0.05 * moved


class FirstWeights(gpu_steps.Callback):
    "The weights at the beginning."
    def before_fit(self): self.state = [p.detach().cpu().clone() for p in self.model.parameters()]


def test_fp16_waits_for_its_scale_alone():
    "Once a step, to know whether it must be left out."
    steps, notes = Steps(refuse=False), StepLosses()
    with steps as cbs: train(precision="fp16", cbs=[*cbs, notes])
    assert notes.is_scaled and len(steps.waits) == 2
    assert all(set(waits) == {"_local_scalar_dense"} and len(waits) <= 2 for waits in steps.waits)


def test_losses_are_read_every_few_steps():
    steps = Steps(refuse=False)
    with steps as cbs: train(epochs=2, cbs=[*cbs, Every(2)])
    assert sum(map(bool, steps.waits)) == 2 and all(len(waits) <= 2 for waits in steps.waits)


class Every(gpu_steps.Callback):
    "Losses are read more often."
    order = 13

    def __init__(self, steps: int): self.steps_between = steps
    def before_fit(self): self.learn.finite_loss.steps = self.steps_between


@pytest.mark.parametrize("name", POLICIES)
def test_views_do_not_wait(name):
    "Of images that lie on the device; policies of torchvision's operators work image by image."
    x = (torch.rand(8, 3, 32, 32) * 255).byte()
    views = TwoViews(create_policy(name, 32))
    expected = views(x, Generator().manual_seed(1))
    on_device = x.to("cuda")
    views(on_device)
    NOTES.clear()
    NOTES.refuse = name not in WAITING
    found = views(on_device, Generator().manual_seed(1))
    print(f"{name}: {len(NOTES.copies)} copies to the device")
    NOTES.refuse = False
    assert type(found) is Gpu and bool(NOTES.waits) <= (name in WAITING)
    assert (found.cpu() - expected).abs().mean() < 1e-5


# Plants: what the test must find

def test_a_planted_wait_is_found():
    "In a loss, in a callback, in the views, and in a backward pass."
    class Reads(NTXent):
        def forward(self, out, *labels):
            loss = super().forward(out)
            return loss if loss.item() > 0 else 2 * loss

    class Looks(gpu_steps.Callback):
        def after_batch(self):
            if self.training and self.loss > 1e9: raise RuntimeError("diverged")

    for options in (dict(loss=Reads()), dict(cbs=[Looks()])):
        with Steps() as cbs, pytest.raises(Waited):
            train(**options | dict(cbs=cbs + options.get("cbs", [])))
    with patch.object(MemoryBank, "is_estimated", property(lambda self: False, lambda self, v: None)):
        with Steps() as cbs, pytest.raises(Waited):  # the look at Z in each step that there was
            train("instdisc", negatives=20, cbs=cbs)


def test_a_planted_tensor_of_the_cpu_is_found():
    class Weighs(NTXent):
        def losses(self, z, *rest): return super().losses(z, *rest) * torch.ones(len(z))
    with pytest.raises(WrongDevice): train(loss=Weighs())
