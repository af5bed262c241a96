"Properties of NT-Xent, dense and tiled alike, on batches that Hypothesis invents."
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from processes import GIVE_BACK
from simclr_nb.loss.tiled import NTXent, tiled_nt_xent
from simclr_nb.loss.contrastive import contrastive_logits, nt_xent
from simclr_nb.loss.projections import unit_vectors

LOSSES = dict(dense=nt_xent, tiled=tiled_nt_xent, tiles_of_5=partial(tiled_nt_xent, tile=5))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
settings.register_profile("losses", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("losses")
both = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
temperatures = st.floats(-2, 2).map(lambda x: 10**x)  # 0.01 to 100
seeds = st.integers(0, 2**32 - 1)


def noise(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


@st.composite
def batches(draw, n=st.integers(2, 12), dim=st.integers(1, 9), dtype=torch.float64) -> Tensor:
    "Two views of each image, from equal to unrelated."
    n, dim, seed = draw(n), draw(dim), draw(seeds)
    views = noise(n, dim, seed=seed).repeat(2, 1) + draw(
        st.sampled_from([0, 0.3, 1, 10])) * noise(2 * n, dim, seed=seed ^ 1)
    return views.to(dtype)


def value_and_gradient(loss, z: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    z = z.detach().clone().requires_grad_()
    value = loss(z, **kwargs)
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def close(found, expected, tolerance: float) -> bool:
    "To a relative, or below 1 an absolute, tolerance."
    found, expected = found.double(), torch.as_tensor(expected, dtype=torch.float64)
    return bool(((found - expected).abs() <= tolerance * expected.abs().clamp_min(1)).all())


# What changes nothing

@both
@given(batches(), temperatures, seeds)
def test_order_of_images(loss, z, temperature, seed):
    order = torch.randperm(len(z) // 2, generator=torch.Generator().manual_seed(seed))
    order = torch.cat([order, order + len(order)])
    losses = loss(z, temperature, reduction="none")
    assert close(loss(z[order], temperature, reduction="none"), losses[order], 1e-10)
    assert close(loss(z[order], temperature), losses.mean(), 1e-10)


@both
@given(batches(), temperatures)
def test_order_of_views(loss, z, temperature):
    assert close(loss(z.roll(len(z) // 2, 0), temperature), loss(z, temperature), 1e-10)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(z=batches(), exponents=st.lists(st.integers(-30, 30), min_size=24, max_size=24))
def test_length_of_each_row(loss, dtype, z, exponents):
    factor = 10.0 ** torch.tensor(exponents[:len(z)], dtype=torch.float64)[:, None]
    found, gradient = value_and_gradient(loss, (z * factor).to(dtype))
    expected, direction = value_and_gradient(loss, z)
    limit = TOLERANCE[dtype] * 10  # of rounded projections
    assert close(found, expected, limit)
    assert close(gradient.double() * factor, direction, limit)  # shorter by as much as z is longer


@both
@given(batches(dtype=torch.float32), temperatures)
def test_half_precision_and_autocast_compute_in_float32(loss, z, temperature):
    half = z.bfloat16()
    found, gradient = value_and_gradient(loss, half, temperature=temperature)
    expected, wide = value_and_gradient(loss, half.float(), temperature=temperature)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert torch.equal(gradient, wide.bfloat16())
    x = z.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16): inside = loss(x, temperature)
    found = inside, torch.autograd.grad(inside, x)[0]
    assert all(map(torch.equal, found, value_and_gradient(loss, z, temperature=temperature)))


# What has a closed form

@both
@given(batches(), temperatures)
def test_each_image_twice(loss, z, temperature):
    "Each candidate counts twice, and one's own double joins them."
    losses = loss(z, temperature, reduction="none")
    u = F.normalize(z, dim=1)
    positive = (u * u.roll(len(u) // 2, 0)).sum(1) / temperature
    double = torch.tensor(1 / temperature, dtype=z.dtype)
    expected = torch.logaddexp(losses + positive + math.log(2), double) - positive
    first, second = z.chunk(2)
    found = loss(torch.cat([first, first, second, second]), temperature, reduction="none")
    assert close(found.view(2, 2, -1), expected.view(2, 1, -1), 1e-10)


@both
@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), temperatures)
def test_one_hot(loss, labels, temperature):
    "Images collapsed onto one direction per class: all of one's class are equally good guesses."
    labels = torch.tensor(labels).repeat(2)
    same = (labels[:, None] == labels).double().sum(1) - 1
    others = len(labels) - 1 - same
    expected = (same + others * math.exp(-1 / temperature)).log()
    z = F.one_hot(labels, 5).double()
    assert close(loss(z, temperature, reduction="none"), expected, 1e-10)


@both
@given(st.integers(2, 40), st.integers(1, 9), temperatures, seeds)
def test_collapse(loss, n, dim, temperature, seed):
    z = noise(1, dim, seed=seed).expand(2 * n, dim)
    value, gradient = value_and_gradient(loss, z, temperature=temperature)
    assert close(value, math.log(2 * n - 1), 1e-10)
    assert gradient.norm() * z[0].norm() * temperature < 1e-12  # balanced, though not at all good


# What is extreme, or wrong

numbers = st.sampled_from([0.0, 1e-30, -1e-30, 1e-10, 1.0, -1.0, 3e18, 1e30, -1e30])


@both
@given(st.integers(2, 6).flatmap(lambda n: st.lists(
    st.lists(numbers, min_size=3, max_size=3), min_size=2 * n, max_size=2 * n)), temperatures)
def test_extreme_values(loss, rows, temperature):
    z = torch.tensor(rows, dtype=torch.float32)
    value, gradient = value_and_gradient(loss, z, temperature=temperature)
    assert -1e-4 <= value <= (2 / temperature + math.log(len(z) - 1)) * (1 + 1e-5)
    assert gradient.isfinite().all()
    exact = value_and_gradient(loss, z.double(), temperature=temperature)[0]
    assert close(value, exact, 1e-5 * max(1, 1 / temperature))  # logits up to 1/τ, rounded


@both
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@given(z=batches(), bad=st.sampled_from([math.nan, math.inf, -math.inf]), data=st.data())
def test_what_is_not_finite_is_counted(loss, normalize, dtype, z, bad, data):
    rows = data.draw(st.sets(st.integers(0, len(z) - 1), min_size=1))
    z = z.to(dtype)
    z[sorted(rows), data.draw(st.integers(0, z.shape[1] - 1))] = bad
    with pytest.raises(ValueError, match=f"^{len(rows)} of {len(z)} projections hold NaN or inf"):
        loss(z, normalize=normalize)
    assert NTXent(normalize=normalize, tiled=loss is not nt_xent)(z).isnan()


@both
def test_products_that_overflow_are_refused(loss):
    with pytest.raises(ValueError, match="8 of 8 projections .* too long for dot products"):
        loss(noise(8, 3, dtype=torch.float32) * 1e25, normalize=False)
    assert loss(noise(8, 3, dtype=torch.float32) * 1e15, normalize=False).isfinite()


@both
@pytest.mark.parametrize("rows, message", [
    (0, "0 rows: no negatives"), (1, "got 1 rows"), (2, "2 rows: no negatives"), (5, "got 5 rows")])
def test_batches_without_pairs_or_negatives_are_refused(loss, rows, message):
    with pytest.raises(ValueError, match=message): loss(torch.ones(rows, 3))


def test_nothing_changes_the_input():
    z = noise(12, 3)
    before = z.clone()
    unit_vectors(z), contrastive_logits(z), contrastive_logits(z, normalize=False)
    for loss in LOSSES.values(): loss(z), loss(z, normalize=False)
    assert torch.equal(z, before)


# Tiled = dense

@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@given(z=batches(n=st.integers(2, 40), dim=st.integers(1, 16)), temperature=temperatures,
       tile=st.integers(1, 90), normalize=st.booleans(), reduction=st.sampled_from(["mean", "none"]))
def test_tiled_is_dense(dtype, z, temperature, tile, normalize, reduction):
    z, kwargs = z.to(dtype), dict(normalize=normalize, reduction=reduction)
    expected, gradient = value_and_gradient(nt_xent, z.double(), temperature=temperature, **kwargs)
    found, tiled = value_and_gradient(
        tiled_nt_xent, z, temperature=temperature, tile=tile, **kwargs)
    length = z.double().norm(dim=1)
    largest = (1 if normalize else length.max() ** 2) / temperature
    limit = TOLERANCE[dtype] * max(1, largest / 30)  # float32 rounds a logit of 100 by 1e-5
    pull = 1 / length.min() if normalize else length.max()  # of a positive: it cancels in part
    scale = pull / temperature / (len(z) if reduction == "mean" else 1)
    assert close(found, expected, limit)
    assert (tiled.double() - gradient).abs().max() <= limit * scale


@given(batches(), temperatures, st.integers(1, 30), st.data())
def test_anchors_share_the_work(z, temperature, tile, data):
    "As processes do: losses and gradients of any parts add up."
    cut = data.draw(st.integers(1, len(z) - 1))
    order = torch.tensor(data.draw(st.permutations(range(len(z)))))
    options = dict(temperature=temperature, reduction="none")
    losses, gradient = value_and_gradient(nt_xent, z, **options)
    parts = [value_and_gradient(tiled_nt_xent, z, anchors=part, tile=tile, **options)
             for part in (order[:cut], order[cut:])]
    assert close(torch.cat([value for value, _ in parts]), losses[order], 1e-10)
    total = sum(part for _, part in parts)
    assert (total - gradient).abs().max() <= 1e-10 * (1 + gradient.abs().max()) / temperature


@pytest.mark.parametrize("temperature", [0.5, 0.02, 0.01])
def test_gradcheck(temperature):
    "Each row of the Jacobian, hence any weights of the losses, also negative ones."
    z = noise(14, 3).requires_grad_()
    each = partial(tiled_nt_xent, temperature=temperature, tile=4, reduction="none")
    assert torch.autograd.gradcheck(each, z)
    assert torch.autograd.gradcheck(partial(each, anchors=torch.tensor([12, 3])), z)
    assert torch.autograd.gradcheck(partial(each, normalize=False), z)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(each(z).sum(), z, create_graph=True)


@pytest.mark.parametrize("value", [0.5, 0.02])
def test_temperature_may_be_learnt(value):
    def gradient(loss):
        temperature = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(loss(noise(14, 3), temperature), temperature)[0]
    assert close(gradient(tiled_nt_xent), gradient(nt_xent), 1e-10)


def in_parts(z: Tensor, temperature: float, rows: int = 500) -> tuple[Tensor, Tensor]:
    "The dense loss and its gradient, from some rows of the matrix at a time."
    z = z.detach().clone().requires_grad_()
    values, partner = [], torch.arange(len(z)).roll(len(z) // 2)
    for a in range(0, len(z), rows):
        u, own = F.normalize(z, dim=1), torch.arange(a, min(a + rows, len(z)))
        logits = (u[own] @ u.T / temperature).index_put((own - a, own), torch.tensor(-math.inf).to(z))
        loss = F.cross_entropy(logits, partner[own], reduction="sum") / len(z)
        loss.backward()
        values.append(loss.detach())
    return torch.stack(values).sum(), z.grad


@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_ten_thousand_rows(temperature):
    z = noise(5000, 16).repeat(2, 1) + noise(10_000, 16, seed=1)
    expected, gradient = in_parts(z, temperature)
    for dtype in (torch.float64, torch.float32):
        value, tiled = value_and_gradient(tiled_nt_xent, z.to(dtype), temperature=temperature)
        assert close(value, expected, TOLERANCE[dtype])
        assert (tiled.double() - gradient).norm() <= TOLERANCE[dtype] * gradient.norm()


PEAK = """
import sys, torch
from simclr_nb.loss.tiled import tiled_nt_xent
torch.set_num_threads(1)
def step(n): tiled_nt_xent(torch.randn(2 * n, 64).requires_grad_()).backward()
def held(field):
    return int(next(s for s in open("/proc/self/status") if s.startswith(field)).split()[1]) * 1024
step(500)
open("/proc/self/clear_refs", "w").write("5")
before = held("VmRSS")
step(int(sys.argv[1]))
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory as Linux tells")
def test_memory_grows_with_n():
    peaks = {}
    for n in (2048, 8192):
        done = subprocess.run([sys.executable, "-c", PEAK, str(n)], capture_output=True, text=True,
                              timeout=200, env=os.environ | GIVE_BACK)
        assert done.returncode == 0, done.stderr
        peaks[n] = int(done.stdout)
    assert peaks[8192] <= 5 * max(peaks[2048], 2**22)
    assert peaks[8192] <= 0.1 * 4 * (2 * 8192)**2  # of one matrix


# The module

@given(batches(n=st.integers(2, 300), dim=st.just(4), dtype=torch.float32))
def test_module_takes_the_tiled_way_by_size(z):
    expected = nt_xent(z, 0.1)
    for tiled in (None, True, False): assert close(NTXent(0.1, tiled=tiled)(z), expected, 1e-5)
    assert close(NTXent(0.1, reduction="none")(z).mean(), expected, 1e-5)
    function = tiled_nt_xent if len(z) > 512 else nt_xent
    assert torch.equal(NTXent(0.1)(z), function(z, 0.1, reduction="none").mean())
