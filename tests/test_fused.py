"Compiled augmentation against the operators, without the compiler where that is enough."
import os
import subprocess
import sys

import pytest
import torch
from fastai.callback.core import Callback
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from simclr_nb.views.policy import POLICIES, create_policy
from simclr_nb.views.two_views import TwoViews
from simclr_nb.views.color import ColorJitter, RandomGrayscale
from simclr_nb.data import simclr_dls
from simclr_nb.views.distort import gaussian_blur, gaussian_taps
from simclr_nb.views.compiled import (
    color_steps,
    compiled_policy,
    compiled_views,
    jitter_colors,
    shifted_sum,
)
from simclr_nb.learner import simclr_learner
from simclr_nb.loss.tiled import NTXent


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(0, 1.25), st.sampled_from([0.0, 0.5, 1.0]))
def test_table_is_the_operators(seed, strength, p):
    "Any strength and order, grey and black images too, in double precision."
    g = Generator().manual_seed(seed)
    x = torch.rand(7, 3, 5, 6, generator=g).double()
    x[1], x[2], x[3] = x[1, :1], 0, x[3].round()
    s = 0.8 * strength
    jitter, drop = ColorJitter(s, s, s, 0.2 * strength, p=p), RandomGrayscale(p)
    state = g.get_state()
    expected = drop(jitter(x, g), g)
    g.set_state(state)
    *draws, change = jitter.draw(7, g)
    found = jitter_colors(x, *color_steps(*draws, change), *drop.draw(7, g))
    assert (found - expected).abs().max() < 1e-6  # factors are float32 in one place, here double
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("kernel", [3, 5, 9])
def test_shifted_sums_are_the_blur(kernel):
    x, sigma = torch.rand(4, 3, 11, 9).double(), torch.tensor([0.1, 0.5, 1.0, 2.0]).double()
    r, taps = kernel // 2, gaussian_taps(sigma, kernel)[:, kernel // 2:]
    for border, mode in dict(reflect="reflect", zero="constant").items():
        found = shifted_sum(torch.nn.functional.pad(x, (0, 0, r, r), mode=mode), taps, 2)
        found = shifted_sum(torch.nn.functional.pad(found, (r, r, 0, 0), mode=mode), taps, 3)
        assert (found - gaussian_blur(x, sigma, kernel, border)).abs().max() < 1e-12


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_has_a_compiled_form(name):
    "It prints the same, shares and crops the same, and after the crop as well."
    policy = create_policy(name, 32)
    fast = compiled_policy(policy)
    assert repr(fast) == repr(policy) and fast.size == policy.size
    assert repr(fast.crop) == repr(policy.crop) and repr(fast.after_crop()) == repr(policy.after_crop())
    views = compiled_views(TwoViews(policy))
    assert views.second is views.policy and repr(views.shared) == repr(policy.shared)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_compiled(name):
    x = torch.rand(6, 3, 40, 40).mul(255).byte()[:, :, :32, :32]
    policy, slow, fast = create_policy(name, 32), *(Generator().manual_seed(1) for _ in range(2))
    expected, found = TwoViews(policy)(x, slow), compiled_views(TwoViews(policy))(x, fast)
    assert (found - expected).abs().max() < 1e-4 and torch.equal(slow.get_state(), fast.get_state())


WITHOUT_COMPILER = """
import warnings
from simclr_nb.data import simclr_dls
from simclr_nb.learner import simclr_learner
dls = simclr_dls("digits", bs=32, n_train=64, n_valid=32, seed=0, device="cpu")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    learn = simclr_learner(dls, width=0.125, compiled=True)
    with learn.no_bar(), learn.no_logging(): learn.pretrain(1)
print("said:", sum("going on without" in str(w.message) for w in said))
"""


def test_without_a_compiler_training_goes_on(tmp_path):
    env = dict(PATH=str(tmp_path), CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True,
                          timeout=300, env=env | dict(HOME=str(tmp_path), OMP_NUM_THREADS="1"))
    assert done.returncode == 0 and "said: 1" in done.stdout, done.stderr[-2000:]


SHARED_CACHE = """
import torch
from torch import nn
from simclr_nb.views.compiled import compile_options, shifted_sum

def made(function): return torch.compile(function, options=compile_options())

x, taps = torch.rand(2, 3, 40, 36), torch.rand(2, 3)
print((made(shifted_sum)(x, taps, 2) - shifted_sum(x, taps, 2)).abs().max().item() < 1e-5)
layer = nn.Sequential(nn.Linear(37, 41), nn.Tanh())  # forwards and backwards
x = torch.rand(5, 37, requires_grad=True)
exact, = torch.autograd.grad(layer(x).square().sum(), x)
layer.compile(options=compile_options())
found, = torch.autograd.grad(layer(x).square().sum(), x)
print((found - exact).abs().max().item() < 1e-5)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs AVX-512")
@pytest.mark.parametrize("widths", [("avx512", "avx2"), ("avx2", "avx512")], ids="-".join)
def test_processors_of_unlike_width_share_a_cache(widths, tmp_path):
    "Kernels of AVX-512 leave half of the numbers unwritten on AVX2; the other way round they crash."
    for width in widths:
        env = dict(ATEN_CPU_CAPABILITY=width, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
        done = subprocess.run([sys.executable, "-c", SHARED_CACHE], capture_output=True, text=True,
                              timeout=300, env=os.environ | env | dict(OMP_NUM_THREADS="1"))
        assert done.stdout.split() == ["True", "True"], (width, done.stderr[-2000:])


# Waiting for the device

WAITS = {"item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "nonzero", "argwhere",
         "is_nonzero"}


class ReadSeldom(Callback):
    "As on a device that is read every seven steps."
    order = 13
    def before_fit(self): self.finite_loss.steps = 7


class Waits(torch.overrides.TorchFunctionMode):
    "Counts what would wait for a GPU."
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        masked = name == "__getitem__" and getattr(args[1], "dtype", None) == torch.bool
        caller = sys._getframe(1).f_code.co_filename
        on_cpu = caller.endswith("torch/optim/optimizer.py")  # Adam's count of steps
        if (name in WAITS or masked) and not on_cpu: self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_one_wait_for_many_steps(monkeypatch):
    "Seven steps of the learner with probe, LARS and table: one look at the losses, and no other."
    dls = simclr_dls("digits", bs=32, n_train=320, n_valid=64, seed=0, device="cpu")
    learn = simclr_learner(dls, width=0.125, precision="fp32")
    fixed = torch.rand(64, 3, 16, 16)
    learn.views.two_views = lambda x: fixed  # draws are made on the CPU anyway
    monkeypatch.setattr("simclr_nb.loss.projections._check_finite", lambda *args: None)  # on the CPU alone
    learn.add_cb(ReadSeldom())
    one_batch, waits = learn.one_batch, []

    def counted(i, b):
        with Waits() as mode: one_batch(i, b)
        if learn.training: waits.append(mode.seen)

    learn.one_batch = counted
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    reads = ["cpu", "nonzero", "tolist"]
    assert [bool(w) for w in waits] == [i in (0, 7) for i in range(10)], waits
    assert waits[7] == reads and waits[0][-3:] == reads


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_loss_is_nan_where_nobody_looks(tiled, normalize, value, monkeypatch):
    "As on a GPU, where the check would wait."
    monkeypatch.setattr("simclr_nb.loss.projections._check_finite", lambda *args: None)
    z = torch.randn(12, 4)
    z[3, 1] = value
    assert NTXent(0.5, normalize, tiled=tiled)(z).isnan()
