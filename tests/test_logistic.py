"Logistic regression beside scikit-learn's, for each of the 45 strengths."
import warnings

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from simclr_nb.data import simclr_dls
from simclr_nb.evaluate.features import encoder_features, random_encoder
from simclr_nb.evaluate.logistic import L2_STRENGTHS, fit_logistic

TOL = 1e-13  # of the gradient: at 1e-6, weights hardly change the loss, and need all digits


@pytest.fixture(scope="module")
def features():
    "Standardised representations of digits, `(300, 64)` and `(450, 64)`, float64, and labels."
    dls = simclr_dls("digits", n_train=300, n_valid=450, seed=0)
    f = encoder_features(random_encoder(dict(arch="resnet18", width=0.125, stem="cifar")), dls)
    h, h_test = f.h_train.double(), f.h_test.double()
    mean, std = h.mean(0), h.std(0, correction=0)
    return (h - mean) / std, f.y_train, (h_test - mean) / std


@pytest.fixture(scope="module")
def fit(features):
    return fit_logistic(*features[:2], tol=TOL, max_iter=5000)


def test_the_grid(fit):
    assert len(L2_STRENGTHS) == 45 and (fit.steps >= 0).all(), "not converged"


@pytest.mark.parametrize("i", range(45), ids=[f"{l2:.3g}" for l2 in L2_STRENGTHS])
def test_equals_scikit_learn(i, features, fit):
    "Coefficients to 1e-4 relative, and every prediction."
    h, y, h_test = (t.numpy() for t in features)
    model = LogisticRegression(C=1 / L2_STRENGTHS[i], tol=TOL, max_iter=200,
                               solver="newton-cholesky")  # Newton's method: few steps, all digits
    with warnings.catch_warnings(action="ignore"): model.fit(h, y)  # no progress at the last digit
    coefficients, intercepts = torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)
    assert (fit.weight[i] - coefficients).norm() <= 1e-4 * coefficients.norm()
    centred = fit.bias[i] - fit.bias[i].mean() + intercepts.mean()  # a shift of all says the same
    assert (centred - intercepts).norm() <= 1e-4 * intercepts.norm()
    predicted = fit.logits(features[2])[i].argmax(1)
    assert (predicted.numpy() == model.predict(h_test)).all()
