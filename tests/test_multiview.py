"""CCA, canonical regression and bounds: golden numbers, any shapes and values, degenerate views.

The golden numbers are of another implementation with other random draws: means of repeats, so
they agree within standard errors. Values with a closed form agree to rounding.
"""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from sklearn.cross_decomposition import CCA as SklearnCCA
from sklearn.linear_model import RidgeCV

from simclr_nb.theory.bounds import gaussian_critic, infonce_bound, location_bound, nominal_bound
from simclr_nb.theory.correlation import (
    STRENGTHS,
    _left_out_error,
    canonical_probe,
    canonical_projection,
    canonical_ridge,
    canonical_shrinkage,
    cca,
    gaussian_mi,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "amdim.json").read_text())["cca_and_mi"]
MIXED = torch.tensor(GOLDEN["low"]["rho"], dtype=torch.float64)
quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def randn(*size): return torch.randn(size, dtype=torch.float64)


def gaussian_views(rho, *n):
    "Canonical coordinates `(*n, k)` of both views."
    z1 = randn(*n, len(rho))
    return z1, rho * z1 + (1 - rho**2).sqrt() * randn(*n, len(rho))


def shared_signal(n, d1, d2, k=2):
    "Two noisy linear images of the same k numbers."
    s = randn(n, k)
    return s @ randn(k, d1) + randn(n, d1), s @ randn(k, d2) + randn(n, d2)


# Golden numbers

@pytest.mark.parametrize("case", ["low", "high"])
def test_golden_infonce(case):
    golden, rho = GOLDEN[case], torch.tensor(GOLDEN[case]["rho"], dtype=torch.float64)
    assert gaussian_mi(rho).item() == pytest.approx(golden["MI_nats"], rel=1e-12)
    for row in golden["table"]:
        K = row["K"]
        z1, z2 = gaussian_views(rho, 16_384 // K, K)
        scores = gaussian_critic(z1, z2, rho)
        bound = infonce_bound(scores)
        assert bound.ceiling == pytest.approx(row["logK"], rel=1e-12)
        single = scores.diagonal(dim1=1, dim2=2) - scores.logsumexp(2)
        error = single.std().item() / math.sqrt(single.numel())
        assert bound.value == pytest.approx(row["infonce"], abs=4 * math.hypot(error, row["se"]))
        assert bound.saturated == (case == "high")


@pytest.mark.parametrize("n", [1_000, 10_000, 100_000])
@pytest.mark.parametrize("exchangeable", [False, True])
def test_golden_cca_after_mixing(n, exchangeable):
    z1, z2 = gaussian_views(MIXED, n)
    mix = randn(4, 4)
    found = cca(z1 @ mix, z2 @ (mix if exchangeable else randn(4, 4)), 0, exchangeable)
    tolerance = 5 * (1 - MIXED**2) / math.sqrt(n)
    golden = torch.tensor(GOLDEN[f"cca_n{n}"]["rho_hat"], dtype=torch.float64)
    assert ((found.rho - MIXED).abs() < tolerance).all()
    assert ((found.rho - golden).abs() < math.sqrt(2) * tolerance).all()
    expected = gaussian_mi(golden).item()
    assert found.mi == pytest.approx(expected, abs=5 * MIXED.norm().item() * math.sqrt(2 / n))


def test_golden_counter_example():
    golden = GOLDEN["overestimate"]
    M, B, L = golden["M"], golden["B"], golden["L"]
    batches = torch.cartesian_prod(*[torch.arange(M)] * B)
    equal = batches[:, :, None] == batches[:, None]
    scores = torch.where(equal, 0.0, -60.0)[..., None].expand(-1, -1, -1, L)
    nominal, rigorous = nominal_bound(scores), location_bound(scores)
    assert nominal.value == pytest.approx(golden["nominal"], rel=1e-5)
    assert rigorous.value == pytest.approx(golden["rigorous_logB_version"], rel=1e-5)
    assert rigorous.value < golden["true_I"] < nominal.value
    assert (nominal.rigorous, rigorous.rigorous) == (False, True)
    assert "not a bound" in str(nominal) and "at least" in str(rigorous)


def test_golden_canonical_regression():
    golden = GOLDEN["kf"]
    first = (torch.arange(100) < 5).double()
    rho = 0.1 + 0.85 * first
    beta = first * 0.4 * ((1 + rho) / 2).sqrt()
    epsilon = 0.8 - beta @ beta                    # variance of the signal, less view 1's share
    assert epsilon.item() == pytest.approx(golden["eps"], rel=1e-9)
    assert (rho @ rho).item() == pytest.approx(golden["sum_lam2"], rel=1e-9)
    fits = dict(ols=lambda z, y: canonical_ridge(z, y, torch.ones(100)),
                shrink=lambda z, y: canonical_shrinkage(z, y, rho),
                ridge=lambda z, y: canonical_ridge(z, y, rho),
                proj=lambda z, y: canonical_projection(z, y, rho, 0.5))
    for n, row in golden["excess_over_best_view1"].items():
        z1, z2 = gaussian_views(rho, 100, int(n))
        y = (z1 + z2) @ (first * 0.4 / (2 * (1 + rho)).sqrt()) + math.sqrt(0.2) * randn(100, int(n))
        bound = (4 * epsilon + rho @ rho / int(n)).item()
        assert bound == pytest.approx(row["bound_4eps_plus_dim_over_n"], rel=1e-9)
        for name, fit in fits.items():
            risk = (fit(z1, y) - beta).square().sum(1)
            error = risk.std().item() * math.sqrt(1 / 100 + 1 / 200)  # ours of 100, golden of 200
            assert risk.mean().item() == pytest.approx(row[name], abs=4 * error), (n, name)
            if name != "ols": assert risk.mean() < bound


# CCA

@quick
@given(seeds, st.integers(1, 7), st.integers(1, 7), st.integers(2, 60),
       st.sampled_from([1e-6, 1e-3, 0.1, 10.0]), st.booleans())
def test_cca_of_any_views(seed, d1, d2, n, reg, exchangeable):
    "More pairs than features or fewer: whitened with the ridge, paired, between 0 and 1."
    torch.manual_seed(seed)
    if exchangeable: d2 = d1
    x1, x2 = (1000 * x for x in shared_signal(n, d1, d2))
    found = cca(x1, x2, reg, exchangeable)
    k = min(d1, d2)
    assert found.rho.shape == (k,) and ((found.rho >= 0) & (found.rho <= 1)).all()
    assert (found.rho.diff() <= 1e-12).all()
    z1, z2 = found.transform(x1, 0), found.transform(x2, 1)
    centred = [x - m for x, m in zip((x1, x2), found.means)]
    s = [x.T @ x / n for x in centred]
    if exchangeable: s = [(s[0] + s[1]) / 2] * 2
    for w, cov, d in zip(found.weights, s, (d1, d2)):
        ridged = cov + reg * cov.trace() / d * torch.eye(d)
        torch.testing.assert_close(w.T @ ridged @ w, torch.eye(k).double(), atol=1e-6, rtol=0)
    c = z1.T @ z2 / n
    if exchangeable: c = (c + c.T) / 2
    off = c - c.diag().diag()
    assert off.abs().max() < 1e-6
    torch.testing.assert_close(c.diag().clamp_min(0), found.rho, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(8))
def test_cca_is_that_of_scikit_learn(seed):
    torch.manual_seed(seed)
    d1, d2 = 2 + seed % 4, 2 + seed // 2
    x1, x2 = shared_signal(500, d1, d2, 3)
    found, k = cca(x1, x2, reg=0), min(d1, d2)
    model = SklearnCCA(k, max_iter=100_000, tol=1e-14).fit(x1.numpy(), x2.numpy())
    for view, theirs in enumerate(model.transform(x1.numpy(), x2.numpy())):
        ours = found.transform((x1, x2)[view], view)
        both = torch.corrcoef(torch.cat([ours, torch.as_tensor(theirs)], 1).T)
        torch.testing.assert_close(both[:k, k:].diag().abs(), torch.ones(k).double(),
                                   atol=1e-4, rtol=0)


@pytest.mark.parametrize("exchangeable", [False, True])
def test_cca_does_not_see_maps_order_or_dtype(exchangeable):
    x1, x2 = shared_signal(200, 4, 4)
    found = cca(x1, x2, 0, exchangeable)
    a, b = randn(4, 4), randn(4, 4)
    if exchangeable: b = a
    order = torch.randperm(200)
    moved = cca((x1 @ a + 5)[order], (x2 @ b + 5)[order], 0, exchangeable)
    torch.testing.assert_close(moved.rho, found.rho, atol=1e-8, rtol=0)
    torch.testing.assert_close(cca(x2, x1, 0, exchangeable).rho, found.rho, atol=1e-10, rtol=0)
    single = cca(x1.float().requires_grad_(), x2.float(), 0, exchangeable)
    assert single.rho.dtype == torch.float64 and not single.rho.requires_grad
    torch.testing.assert_close(single.rho, found.rho, atol=1e-6, rtol=0)
    half = cca(x1.half(), x2.half(), 0, exchangeable)
    torch.testing.assert_close(half.rho, found.rho, atol=1e-3, rtol=0)


@pytest.mark.parametrize("n, d1, d2", [(40, 5, 12), (300, 30, 30), (500, 3, 80), (2000, 40, 10)])
@pytest.mark.parametrize("exchangeable", [False, True])
def test_null_level(n, d1, d2, exchangeable):
    "Independent views: the mean information is exact, the correlation a limit for many features."
    if exchangeable: d2 = d1
    draws = [cca(randn(n, d1), randn(n, d2), 0, exchangeable) for _ in range(60)]
    mi, top = (torch.tensor(v) for v in zip(*((c.mi, c.rho[0]) for c in draws)))
    slack = 0.03 * exchangeable * mi.mean()         # there, half of a symmetric law
    assert (mi.mean() - draws[0].null_mi).abs() < 4 * mi.std() / math.sqrt(60) + slack
    least = 0.85 if min(d1, d2) >= 10 else 0.5
    assert least * draws[0].null_rho < top.mean() < 1.02 * draws[0].null_rho


def test_null_level_without_enough_pairs():
    few = cca(randn(20, 12), randn(20, 8), reg=1e-3)
    assert (few.null_rho, few.null_mi) == (1, math.inf)
    assert "by chance 1.000" in str(few) and "by chance inf" in str(few)
    few = cca(randn(10, 10), randn(10, 10), exchangeable=True)
    assert (few.null_rho, few.null_mi) == (1, math.inf)
    enough = cca(randn(21, 12), randn(21, 8), reg=1e-3)
    assert enough.null_rho < 1 and enough.null_mi < math.inf
    torch.testing.assert_close(cca(randn(15, 10), randn(15, 8), reg=0).rho[:4],
                               torch.ones(4).double(), atol=1e-6, rtol=0)


def test_exchangeable_ignores_negative_correlation():
    "An anti-correlated coordinate cannot come from one augmentation: 0, not 1."
    x = randn(1000, 2)
    other = torch.stack([x[:, 0], -x[:, 1]], 1)
    assert cca(x, other, 0).rho.tolist() == pytest.approx([1, 1])
    assert cca(x, other, 0, exchangeable=True).rho.tolist() == pytest.approx([1, 0], abs=2e-3)


DEGENERATE = {
    "constant feature": lambda x: torch.cat([x, torch.ones(len(x), 1)], 1),
    "almost constant": lambda x: torch.cat([x, 1 + 1e-15 * randn(len(x), 1)], 1),
    "feature twice": lambda x: torch.cat([x, x[:, :1]], 1),
    "sum of features": lambda x: torch.cat([x, x.sum(1, keepdim=True)], 1),
    "n < d": lambda x: torch.cat([x, randn(len(x), 200)], 1),
}


@pytest.mark.parametrize("how", DEGENERATE)
@pytest.mark.parametrize("exchangeable", [False, True])
def test_degenerate_view(how, exchangeable):
    "Refused without a ridge, with the way out; answered with one, finite everywhere."
    x1, x2 = shared_signal(100, 4, 4)
    bad = DEGENERATE[how](x1)
    other = DEGENERATE[how](x2) if exchangeable else x2
    with pytest.raises(ValueError, match=r"varies in \d+ of \d+ directions.*give reg > 0, not 0"):
        cca(bad, other, 0, exchangeable)
    found = cca(bad, other, 1e-3, exchangeable)
    plain = cca(x1, x2, 1e-3, exchangeable)
    assert found.transform(randn(5, bad.shape[1])).isfinite().all()
    if how == "n < d": assert found.null_rho == 1
    else: torch.testing.assert_close(found.rho[:2], plain.rho[:2], atol=0.01, rtol=0)


@pytest.mark.parametrize("bad, message", [
    (lambda x: x[:-1], "100 rows of view 1 and 99 of 2"),
    (lambda x: x[0], r"view 2: expected features \(n, d\), got \(4,\)"),
    (lambda x: x[:, :0], r"view 2: expected features \(n, d\), got \(100, 0\)"),
    (lambda x: x[None], "view 2: expected features"),
    (lambda x: x * 0, "view 2: all rows are equal"),
    (lambda x: x.where(x < 2, math.nan), r"view 2: \d+ rows hold NaN or infinity"),
    (lambda x: x.where(x < 2, -math.inf), r"view 2: \d+ rows hold NaN or infinity"),
])
def test_views_that_are_refused(bad, message):
    x1, x2 = shared_signal(100, 4, 4)
    with pytest.raises(ValueError, match=message): cca(x1, bad(x2))


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_pairs(n):
    with pytest.raises(ValueError, match=f"at least 2 pairs, got {n}"):
        cca(randn(n, 3), randn(n, 3))


# Canonical regression

@quick
@given(seeds, st.integers(1, 8), st.integers(1, 30), st.floats(0, 1e3), st.integers(1, 3))
def test_ridge_minimises_its_objective(seed, k, n, strength, targets):
    "Zero gradient on free coordinates, exact zeros on excluded ones; n < k and lambda = 1 too."
    torch.manual_seed(seed)
    z, y = randn(n, k), randn(n, targets)
    rho = torch.rand(k, dtype=torch.float64).clamp(0.05, 0.95)
    rho[torch.rand(k) < 0.2], rho[torch.rand(k) < 0.2] = 0.0, 1.0
    beta = canonical_ridge(z, y, rho, strength)
    assert beta.shape == (k, targets) and (beta[rho == 0] == 0).all()
    free = rho > 0
    gradient = z.T @ (z @ beta - y) / n
    gradient[free] += strength * ((1 - rho) / rho)[free, None] * beta[free]
    assert not free.any() or gradient[free].abs().max() < 1e-6 * (1 + y.abs().max())


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 20))
def test_shrinkage_and_projection_are_cases_of_ridge(seed, k, n):
    torch.manual_seed(seed)
    rho = torch.rand(k, dtype=torch.float64)
    n = max(n, k)
    z, y = math.sqrt(n) * torch.linalg.qr(randn(n, k))[0], randn(n)  # exactly white
    shrunk = canonical_shrinkage(z, y, rho)
    torch.testing.assert_close(canonical_ridge(z, y, rho), shrunk, atol=1e-8, rtol=0)
    cut = rho.median().item()
    projected = canonical_projection(z, y, rho, cut)
    torch.testing.assert_close(projected, (z.T @ y / n) * (rho >= cut), atol=1e-8, rtol=0)
    assert (shrunk.abs() <= canonical_ridge(z, y, torch.ones(k)).abs() + 1e-9).all()


def test_left_out_error_is_that_of_scikit_learn():
    "One rho makes it plain ridge: RidgeCV's leave-one-out, without an intercept."
    z, y = randn(40, 5), randn(40, 3)
    rho = torch.full((5,), 0.5).double()            # penalty n * strength in RidgeCV's units
    model = RidgeCV([40 * s for s in STRENGTHS], fit_intercept=False, store_cv_results=True)
    model.fit(z.numpy(), y.numpy())
    theirs = model.cv_results_.mean((0, 1))
    assert [_left_out_error(z, y, rho, s) for s in STRENGTHS] == pytest.approx(theirs, rel=1e-6)


# Probe

def world(n, n_views=1):
    "Features of views `(n_views, n, 30)` and classes: 3 classes, 2 coordinates that tell them."
    y = torch.randint(3, (n,))
    image, noise = randn(1, n, 30), randn(n_views, n, 30)
    z = noise.clone()
    angle = 2 * math.pi * y / 3
    z[..., :2] = 0.5 * (image + noise)[..., :2] + 3 * torch.stack([angle.cos(), angle.sin()], 1)
    return z @ torch.randn(30, 30, generator=torch.Generator().manual_seed(9)).double(), y


def test_probe_learns_from_one_label_per_class():
    views = cca(*world(5000, 2)[0], reg=0, exchangeable=True)
    (pool,), y = world(500)
    (h,), y_test = world(2000)
    accuracy = []
    for draw in range(10):
        rows = torch.cat([(y == c).nonzero()[draw : draw + 1, 0] for c in range(3)])
        scores = canonical_probe(views, pool[rows], y[rows], h, 1.0)
        accuracy.append((scores.argmax(1) == y_test).double().mean().item())
    assert sum(accuracy) / 10 > 0.9                 # chance is 1/3


def test_probe_depends_on_labelled_images_alone():
    "Predictions of an image do not change with the images tested beside it, nor with their order."
    views = cca(*world(1000, 2)[0], exchangeable=True)
    (pool,), y = world(60)
    (h,), _ = world(50)
    scores = canonical_probe(views, pool, y, h)
    torch.testing.assert_close(canonical_probe(views, pool, y, h[:1]), scores[:1])
    order = torch.randperm(60)
    shuffled = canonical_probe(views, pool[order], y[order], h)
    torch.testing.assert_close(shuffled, scores, atol=1e-8, rtol=0)
    assert scores.shape == (50, 3) and scores.dtype == torch.float64


@pytest.mark.parametrize("y", [[0], [2], [0, 1], [0, 0, 0, 0]])
def test_probe_with_hardly_any_label(y):
    "One image, or one class: no error, finite scores, and the class seen wins where it is alone."
    views = cca(*world(500, 2)[0], exchangeable=True)
    (pool,), _ = world(len(y))
    scores = canonical_probe(views, pool, torch.tensor(y), world(20)[0][0])
    assert scores.shape == (20, max(y) + 1) and scores.isfinite().all()
    if len(set(y)) == 1: assert (scores.argmax(1) == y[0]).all()


# Bounds

@quick
@given(seeds, st.integers(2, 9), st.integers(1, 5), st.floats(-3, 4))
def test_bounds_of_any_scores(seed, B, L, log_scale):
    torch.manual_seed(seed)
    scores = 10**log_scale * randn(B, B, L)
    nominal, rigorous = nominal_bound(scores), location_bound(scores)
    assert nominal.ceiling == math.log((B - 1) * L + 1) and rigorous.ceiling == math.log(B)
    assert nominal.value <= nominal.ceiling + 1e-9 and rigorous.value <= rigorous.ceiling + 1e-9
    single = [infonce_bound(scores[..., i]).value for i in range(L)]
    assert rigorous.value == pytest.approx(sum(single) / L, rel=1e-9, abs=1e-9)
    shift = randn(B, 1, 1)                          # terms of the source alone cancel
    assert nominal_bound(scores + shift).value == pytest.approx(nominal.value, rel=1e-6, abs=1e-6)
    assert location_bound(scores + shift).value == pytest.approx(rigorous.value, rel=1e-6, abs=1e-6)
    raised = scores + 5 * torch.eye(B)[..., None] * (torch.arange(L) > 0)
    change = nominal_bound(raised).value - nominal.value  # positives do not compete: only up
    assert change >= -1e-9 and change <= 5 * (L - 1) / L + 1e-9


def test_infonce_is_a_lower_bound_for_any_critic():
    "Theorem: with random critics too, and in float32."
    rho = torch.tensor([0.8, 0.3]).double()
    z1, z2 = gaussian_views(rho, 2000, 16)
    for _ in range(10):
        bound = infonce_bound((z1 @ randn(2, 2) @ z2.mT + (z2 @ randn(2)).unsqueeze(-2)).float())
        assert bound.value < gaussian_mi(rho) + 0.02


@pytest.mark.parametrize("bound, shape", [(infonce_bound, (4, 4)), (nominal_bound, (4, 4, 3)),
                                          (location_bound, (4, 4, 3))])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(bound, shape, value):
    scores = torch.zeros(shape)
    scores.view(-1)[5] = value
    with pytest.raises(ValueError, match=f"1 of {scores.numel()} scores are NaN or infinite"):
        bound(scores)


def test_one_hot_targets_are_many_targets():
    z, y = randn(30, 4), torch.arange(30) % 3
    target = F.one_hot(y).double()
    rho = torch.tensor([0.9, 0.5, 0.1, 0.0])
    together = canonical_ridge(z, target, rho)
    for c in range(3):
        torch.testing.assert_close(together[:, c], canonical_ridge(z, target[:, c], rho))
