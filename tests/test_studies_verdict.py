"The verdict on claims: against statsmodels, 2,000 studies without any effect, planted effects."
import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
import torch
from scipy.stats import norm, permutation_test as scipy_permutation
from statsmodels.stats.multitest import multipletests

from simclr_nb.studies.design import (
    Cell, Contrast, Claim, Study, Table, best, equal, exact, greater, interaction, monotone, slope,
    worst)
from simclr_nb.studies.estimates import contrast_scores, estimate_contrast, fit_two_way
from simclr_nb.studies.verdict import detectable, holm, image_test, judge, power

SIX = "abcdef"
ERROR = 0.8  # points, between seeds


def study(*claims, cells=SIX, measures=("logistic",)):
    return Study("made-up", "", (), "", tuple(Cell(c, measures=measures) for c in cells), claims)


def table(y, cells=SIX, measure="logistic", expected=()):
    "Scores of an array `(cells, seeds)`; NaN: no run."
    scores = {(c, s, measure): float(y[i, s]) for i, c in enumerate(cells)
              for s in range(y.shape[1]) if np.isfinite(y[i, s])}
    return Table(scores, tuple(expected))


def scores(generator, means=np.zeros(6), seeds=3, error=ERROR):
    "Means, a luck of each seed, and an error."
    luck = generator.normal(0, 1.5, seeds)
    return 40 + np.asarray(means)[:, None] + luck + generator.normal(0, error, (len(means), seeds))


def with_holes(y):
    y = y.copy()
    for hole in [(0, 1), (0, 2), (3, 0), (5, 2)]: y[hole] = np.nan
    return y


def frame(y):
    rows = [dict(cell=c, seed=s, y=y[i, s]) for i, c in enumerate(SIX) for s in range(y.shape[1])]
    return pd.DataFrame(rows).dropna()


# Against statsmodels

CONTRASTS = {"difference": [1, -1, 0, 0, 0, 0], "slope": [-5, -3, -1, 1, 3, 5],
             "interaction": [1, -1, -1, 1, 0, 0], "mean of others": [1, 0, 0, -.5, -.5, 0]}


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", CONTRASTS)
def test_contrasts_equal_statsmodels(name, holes):
    "Estimate, standard error, degrees of freedom, interval and p-value of ordinary least squares."
    y = scores(np.random.default_rng(3), [0, 1, 2, 0, -1, 3])
    if holes: y = with_holes(y)
    weights = CONTRASTS[name]
    fitted = smf.ols("y ~ C(cell) + C(seed) - 1", frame(y)).fit()  # cells first, no intercept
    row = [*weights, *[0] * (len(fitted.params) - 6)]
    reference = fitted.t_test(row)
    ours = estimate_contrast(fit_two_way(y), weights)
    assert ours.df == fitted.df_resid == (6 if holes else 10)
    np.testing.assert_allclose([ours.value, ours.se, *ours.interval],
                               [reference.effect.item(), reference.sd.item(),
                                *reference.conf_int()[0]], rtol=1e-9)
    two_sided = 2 * min(ours.p_above(), ours.p_below())
    np.testing.assert_allclose(two_sided, reference.pvalue.item(), rtol=1e-7)


def test_a_mean_over_cells_equals_a_mixed_model():
    "With seeds as random effects (REML); balanced data, so both variances must agree."
    y = scores(np.random.default_rng(5), [0, 1, 2, 0, -1, 3], seeds=8)
    mixed = smf.mixedlm("y ~ C(cell) - 1", frame(y), groups="seed").fit(reml=True)
    weights = np.array([1, 1, 1, 0, 0, 0]) / 3
    se = math.sqrt(weights @ mixed.cov_params().iloc[:6, :6].to_numpy() @ weights)
    ours = estimate_contrast(fit_two_way(y), weights)
    np.testing.assert_allclose([ours.value, ours.se], [y[:3].mean(), se], rtol=2e-3)
    assert 7 <= ours.df < 35  # mostly between seeds


def test_a_whole_study_equals_statsmodels():
    "Claims of one contrast each: p-values, Holm's correction and verdicts."
    y = with_holes(scores(np.random.default_rng(8), [0, 6, 6, 0, -5, 1]))
    claims = [greater("b", "a"), greater("a", "d"), greater("e", "f"), slope(SIX, range(6))]
    verdicts = judge(study(*claims), table(y))
    fitted = smf.ols("y ~ C(cell) + C(seed) - 1", frame(y)).fit()
    one_sided = []
    for claim in claims:
        weights = claim.contrasts[0].weights
        row = [*(weights.get(c, 0) for c in SIX), *[0] * (len(fitted.params) - 6)]
        test = fitted.t_test(row)
        half = test.pvalue.item() / 2
        one_sided += [half, 1 - half] if test.effect.item() > 0 else [1 - half, half]
    rejected, adjusted, _, _ = multipletests(one_sided, method="holm")
    for i, verdict in enumerate(verdicts):
        np.testing.assert_allclose(verdict.p, min(one_sided[2 * i : 2 * i + 2]), rtol=1e-7)
        np.testing.assert_allclose(verdict.p_holm, min(adjusted[2 * i : 2 * i + 2]), rtol=1e-7)
        says = {(True, False): "confirmed", (False, True): "refuted"}
        assert verdict.state == says.get(tuple(rejected[2 * i : 2 * i + 2]), "not resolved")
    assert len({v.state for v in verdicts}) == 3  # the example has one of each


def test_holm_equals_statsmodels():
    p = np.random.default_rng(0).uniform(0, 0.2, 20)
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])
    assert holm([]) == []


# Nothing differs

def error_rates(judged, repeats=2000, holes=False, seed=0):
    "Share of studies with a false statement, and of claims confirmed and refuted by claim."
    generator = np.random.default_rng(seed)
    wrong, confirmed, refuted = 0, np.zeros(len(judged.claims)), np.zeros(len(judged.claims))
    for _ in range(repeats):
        y = scores(generator)
        verdicts = judge(judged, table(with_holes(y) if holes else y))
        c, r = (np.array([v.state == s for v in verdicts]) for s in ("confirmed", "refuted"))
        confirmed, refuted = confirmed + c, refuted + r
        wrong += (c | r).any()
    return wrong / repeats, confirmed / repeats, refuted / repeats


def test_one_claim_errs_in_five_of_a_hundred():
    "Not fewer either: the interval has the size it says."
    wrong, confirmed, refuted = error_rates(study(greater("a", "b")))
    sd = math.sqrt(0.05 * 0.95 / 2000)
    assert abs(wrong - 0.05) < 3 * sd
    assert abs(confirmed[0] - refuted[0]) < 4 * sd


@pytest.mark.parametrize("holes", [False, True])
def test_no_difference_gives_few_false_statements(holes):
    "2,000 studies of nine claims of every kind that can be wrong: any false one in at most 5%."
    claims = (greater("a", "b"), best("c", SIX), worst("d", SIX), slope(SIX, range(6)),
              monotone(SIX), monotone(SIX[::-1]), interaction("a", "b", "c", "d"),
              greater("e", "f"), greater("f", "a"))
    wrong, confirmed, refuted = error_rates(study(*claims), holes=holes)
    print(f"any false statement: {wrong:.2%}")
    assert 0 < wrong <= 0.05
    assert confirmed.max() <= 0.025 and refuted.max() <= 0.025


def test_a_claim_of_five_contrasts_errs_rarely():
    "Refuting by any of five contrasts is corrected for five; confirming needs the worst of them."
    wrong, confirmed, refuted = error_rates(study(best("c", SIX)))
    assert wrong <= 0.05 and confirmed[0] <= 0.025 and 0.005 < refuted[0] <= 0.031
    generator = np.random.default_rng(1)  # four contrasts clear, the fifth exactly zero
    judged = study(best("c", SIX))
    wrongly = sum(judge(judged, table(scores(generator, [0, 0, 9, 9, 0, 0])))[0].state == "confirmed"
                  for _ in range(2000)) / 2000
    assert abs(wrongly - 0.025) < 0.0105  # the level is used up, without a correction for five


# Planted effects

def states(means, *claims, error=ERROR, repeats=200):
    "Share of each verdict on the first claim."
    generator, judged = np.random.default_rng(2), study(*claims)
    found = [judge(judged, table(scores(generator, means, error=error)))[0].state
             for _ in range(repeats)]
    return {state: found.count(state) / repeats for state in sorted(set(found))}


UP = [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("claim, means", [
    (greater("b", "a"), [0, 5, 0, 0, 0, 0]), (greater("b", "a", margin=4), [0, 9, 0, 0, 0, 0]),
    (best("f", SIX), UP), (worst("a", SIX), UP), (slope(SIX, range(6)), UP), (monotone(SIX), UP),
    (interaction("f", "e", "a", "b"), [0, 0, 0, 0, 0, 6]),
    (slope(SIX, range(6), falling=True), UP[::-1])], ids=lambda x: getattr(x, "text", ""))
def test_planted_effects_are_found(claim, means):
    found = states(means, claim)
    assert found.get("confirmed", 0) >= 0.75 and "refuted" not in found, found
    opposite = states([-m for m in means], claim)
    assert opposite.get("refuted", 0) >= 0.9 and "confirmed" not in opposite, opposite


def test_a_margin_moves_the_limit():
    claim = greater("b", "a", margin=5)
    assert states([0, 5, 0, 0, 0, 0], claim).get("not resolved", 0) > 0.9
    assert states([0, 1, 0, 0, 0, 0], claim).get("refuted", 0) > 0.9
    assert states([0, 9, 0, 0, 0, 0], claim).get("confirmed", 0) > 0.9


def test_equivalence():
    claim = equal("a", "b")
    assert states(np.zeros(6), claim, error=0.3).get("confirmed", 0) > 0.9
    assert states([5, 0, 0, 0, 0, 0], claim, error=0.3) == {"refuted": 1}
    assert states([-5, 0, 0, 0, 0, 0], claim, error=0.3) == {"refuted": 1}
    noisy = states(np.zeros(6), claim, error=3.0)  # no difference seen is not "no difference"
    assert noisy.get("not resolved", 0) > 0.9
    at_the_limit = states([1.5, 0, 0, 0, 0, 0], claim, error=0.3, repeats=2000)
    assert at_the_limit.get("confirmed", 0) <= 0.035


def test_monotone_needs_no_reversal():
    claim = monotone(SIX)
    reversed_once = [0, 2, 4, 6, 1, 10]
    assert states(reversed_once, claim).get("confirmed", 0) == 0
    assert states(reversed_once, claim).get("refuted", 0) > 0.7
    assert states(reversed_once, slope(SIX, range(6))).get("confirmed", 0) > 0.9


def test_power_is_that_of_simulated_studies():
    found = states([2, 0, 0, 0, 0, 0], greater("a", "b"), repeats=2000)["confirmed"]
    se = ERROR * math.sqrt(2 / 3)
    assert abs(found - power(2, se, 10)) < 0.03
    assert math.isclose(power(detectable(se, 10, 5), se, 10, 5), 0.8, rel_tol=1e-6)
    assert math.isclose(power(3, 1, 1e6), norm.sf(1.96 - 3), rel_tol=1e-3)


# Incomplete studies

def test_missing_seeds_are_allowed_for():
    "A cell that lacks the unlucky seeds is not better for it."
    luck = np.array([0, -10, -10])
    y = np.zeros((6, 3)) + luck
    y += np.random.default_rng(0).normal(0, 0.1, y.shape)
    y[0, 1:] = np.nan
    (verdict,) = judge(study(greater("a", "b")), table(y))
    assert np.nanmean(y[0]) - y[1].mean() > 6 and abs(verdict.estimates[0].value) < 0.5
    assert verdict.estimates[0].df == 8


def test_one_seed_is_not_resolved():
    y = scores(np.random.default_rng(0), UP, seeds=1)
    claims = (greater("f", "a"), best("f", SIX), equal("a", "b"), monotone(SIX))
    for verdict in judge(study(*claims), table(y)):
        assert (verdict.state, verdict.p_holm) == ("not resolved", 1.0)
        assert "too few seeds" in verdict.reason
        assert all(math.isnan(e.se) and not math.isnan(e.value) for e in verdict.estimates)


def test_key_cells_have_seeds_and_others_one():
    "As in Figure 5: the cells of one seed get an interval from the others' error."
    y = scores(np.random.default_rng(0), [0, 6, 0, 0, 0, 0])
    y[3:, 1:] = np.nan
    (verdict,) = judge(study(greater("b", "d")), table(y))
    (e,) = verdict.estimates
    assert e.df == 4 and verdict.state == "confirmed"
    complete = estimate_contrast(fit_two_way(y[:3]), [1, -1, 0])
    assert e.se > 1.3 * complete.se


def test_cells_of_other_scales_and_runs_to_come():
    y = scores(np.random.default_rng(0), UP)
    claims = (greater("f", "a"), greater("b", "a"))
    keys = [(c, s, "logistic") for c in SIX for s in range(3)]
    absent = judge(study(*claims), table(y[:5], SIX[:5]))
    assert [v.state for v in absent] == ["not at this scale", "confirmed"]
    assert "f/logistic" in absent[0].reason
    to_come = judge(study(*claims), table(y[:5], SIX[:5], expected=keys))
    assert [v.state for v in to_come] == ["not resolved", "confirmed"]
    assert to_come[0].reason == "some runs are missing"
    assert absent[1].p_holm <= to_come[1].p_holm  # a claim to come already counts
    assert [v.state for v in judge(study(*claims), Table({}))] == ["not at this scale"] * 2


def test_claims_by_computation_do_not_count():
    y = scores(np.random.default_rng(0), UP)
    proof = exact("it adds up", lambda: (True, "1e-13"))
    alone = judge(study(greater("f", "a")), table(y))[0]
    verdicts = judge(study(proof, greater("f", "a")), table(y))
    assert (verdicts[0].state, verdicts[0].p, verdicts[0].reason) == ("confirmed", None, "1e-13")
    assert verdicts[1].p_holm == alone.p_holm == 2 * alone.p


def test_equal_scores_everywhere_are_no_evidence():
    "All runs at chance: no variance, no difference, no verdict, no warning."
    (verdict,) = judge(study(greater("a", "b")), table(np.full((6, 3), 10.0)))
    assert verdict.state == "not resolved"


# Two measures of one run

def test_the_luck_of_a_run_cancels_between_its_measures():
    "h and z share their run: their difference is tested on differences, not on two cells."
    generator = np.random.default_rng(0)
    h = scores(generator, error=3.0)
    z = h - 2 + generator.normal(0, 0.1, h.shape)
    both = Table(table(h).scores | table(z, measure="z").scores)
    claims = [Claim("h > z", (Contrast({"a/logistic": 1, "a/z": -1}),)), greater("a", "b")]
    measured = judge(study(*claims, measures=("logistic", "z")), both)
    assert [v.state for v in measured] == ["confirmed", "not resolved"]
    assert measured[0].estimates[0].se < 0.2 < 1 < measured[1].estimates[0].se
    y, weights = contrast_scores(both, claims[0].contrasts[0])
    np.testing.assert_allclose(y, h - z)
    assert weights == [1, 0, 0, 0, 0, 0]


# Beside it

def test_images_are_the_units():
    "Equals SciPy's paired permutation test of each image's mean over seeds."
    generator = torch.Generator().manual_seed(0)
    a, b = (list(torch.rand(3, 12, generator=generator) < p) for p in (0.8, 0.3))
    x, y = (torch.stack(runs).double().mean(0).numpy() for runs in (a, b))
    reference = scipy_permutation((x, y), lambda x, y: np.mean(x - y), permutation_type="samples",
                                  n_resamples=np.inf).pvalue
    assert math.isclose(image_test(a, b, generator=generator), reference, rel_tol=0.05)
    tripled = image_test(a * 3, b * 3, generator=generator)  # more seeds alike, the same images
    assert math.isclose(tripled, reference, rel_tol=0.05)
