"""Numbers of the official code: loss, gradients, metrics, LARS, schedules, sizes of networks.

`golden/simclr.json` was derived in NumPy (float64) and confirmed against the official TF2 code; its
`_about` says how. We compute in float64 too, so values must agree to 1e-10 relative (1e-12 absolute
near zero) unless a line says otherwise.
"""

import json
from pathlib import Path

import pytest
import torch

from simclr_nb.model.encoder import create_encoder, encoder_stats
from simclr_nb.model.head import projection_head
from simclr_nb.loss.contrastive import (
    contrastive_accuracy,
    contrastive_entropy,
    contrastive_logits,
    nt_xent,
)
from simclr_nb.train.optim import LARS, official_steps, scale_lr, trust_ratio, warmup_cosine

GOLDEN = json.loads((Path(__file__).parent / "golden" / "simclr.json").read_text())
PARAMETERS = ("dense/kernel", "dense/bias", "batch_normalization/gamma")


def approx(value):
    return pytest.approx(value, rel=1e-10, abs=1e-12)


def inputs(name):
    i = torch.arange(256, dtype=torch.float64)
    if name == "brief":
        return (torch.sin(0.37 * i) + 0.1 * torch.cos(1.3 * i)).view(16, 16)
    i = i[:128]
    a = torch.sin(0.37 * i + 0.011 * i**2).view(8, 16)
    c = torch.cos(0.73 * i + 0.007 * i**2).view(8, 16)
    if name == "paired":
        return torch.cat([a, 0.8 * a + 0.6 * c])
    return torch.cat([a, 0.35 * a + 0.9 * c]) * (0.5 + 0.15 * torch.arange(16).double())[:, None]


def case(key):
    name, normalize, temperature = (part.split("=")[-1] for part in key.split("|"))
    return inputs(name), float(temperature.removeprefix("tau")), normalize == "True"


@pytest.mark.parametrize("name", GOLDEN["input_checks"])
def test_inputs_are_the_golden_ones(name):
    z, expected = inputs(name), GOLDEN["input_checks"][name]
    assert list(z.shape) == expected["shape"]
    assert z.sum().item() == approx(expected["sum"])
    assert z.norm().item() == approx(expected["fro"])
    assert z[0, :4].tolist() == approx(expected["row0_first4"])
    assert z[15, -4:].tolist() == approx(expected["row15_last4"])


@pytest.mark.parametrize("key", GOLDEN["ntxent"])
def test_nt_xent_and_its_gradient(key):
    (z, temperature, normalize), expected = case(key), GOLDEN["ntxent"][key]
    loss = nt_xent(z.requires_grad_(), temperature, normalize)
    assert loss.item() == approx(expected["loss_paper"])
    assert 2 * loss.item() == approx(expected["loss_official"])
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.norm().item() == approx(expected["grad_fro_norm_paper"])
    assert 2 * gradient.norm().item() == approx(expected["grad_fro_norm_official"])
    assert (2 * gradient[0, :4]).tolist() == approx(expected["grad_row0_first4_official"])
    assert (2 * gradient[-1, :4]).tolist() == approx(expected["grad_lastrow_first4_official"])


@pytest.mark.parametrize("key", GOLDEN["ntxent"])
def test_contrastive_accuracy(key):
    (z, _, normalize), expected = case(key), GOLDEN["ntxent"][key]
    top1 = contrastive_accuracy(z, normalize=normalize)
    top5 = contrastive_accuracy(z, k=5, normalize=normalize)
    assert top1 == expected["contrastive_acc_official"]
    assert top5 == expected["contrastive_top5_acc_official"]
    both = contrastive_accuracy(z, candidates="all", normalize=normalize)
    assert both == expected["alt_acc_2N_minus_1_candidates_both_dirs"]


def test_contrastive_accuracy_of_paired_views():
    assert contrastive_accuracy(inputs("paired")) == 1  # as with the official code


@pytest.mark.parametrize("key", GOLDEN["ntxent"])
def test_contrastive_entropy(key):
    (z, temperature, normalize), expected = case(key), GOLDEN["ntxent"][key]
    logits, _ = contrastive_logits(z, temperature, normalize, candidates="other_view")
    p = logits.softmax(1)
    official = expected["contrastive_entropy_official_nats"]
    # the official log(p + 1e-8) lowers each row's entropy by at most N * 1e-8; ours is exact
    assert -(p * (p + 1e-8).log()).sum(1).mean().item() == approx(official)
    exact = contrastive_entropy(z, temperature, normalize).item()
    assert official <= exact <= official + 8e-8
    both = contrastive_entropy(z, temperature, normalize, candidates="all").item()
    assert both == approx(expected["alt_entropy_2N_minus_1_both_dirs"])


def lars_problem():
    """Start, target and curvature of kernel, bias and gamma, as `problem` in the file states."""
    i = torch.arange(6, dtype=torch.float64)
    kernel = [torch.sin(0.37 * i) + 0.1 * torch.cos(1.3 * i), 0.5 * torch.cos(0.9 * i), 1 + 0.1 * i]
    bias = torch.tensor([[0.2, -0.1], [1.0, -1.0], [1.0, 2.0]], dtype=torch.float64)
    gamma = torch.tensor([[1.0, 1.0], [0.5, 1.5], [1.5, 0.5]], dtype=torch.float64)
    return [(k.view(3, 2), b, g) for k, b, g in zip(kernel, bias, gamma)]


@pytest.mark.parametrize("name", GOLDEN["lars"]["runs"])
def test_lars_step_by_step(name):
    run = GOLDEN["lars"]["runs"][name]
    config = run["config"]
    start, target, curvature = lars_problem()
    params = [torch.nn.Parameter(t.clone()) for t in start]
    names = dict(lr="lr", mom="momentum", wd="weight_decay", eeta="trust_coefficient")
    opt = LARS(params, **{names.get(k, k): v for k, v in config.items()})
    for step in run["steps"]:
        for p, t, c in zip(params, target, curvature):
            p.grad = c * (p.detach() - t)
        kernel = params[0].detach().clone()
        opt.step()
        for key, p in zip(PARAMETERS, params):
            assert p.detach().flatten().tolist() == approx(step[key]["value"])
            assert opt.state[p]["velocity"].flatten().tolist() == approx(step[key]["momentum"])
        decayed = params[0].grad + config["wd"] * kernel
        adapted = decayed if config["classic"] else opt.state[params[0]]["velocity"]
        ratio = trust_ratio(kernel.norm(), adapted.norm(), config["eeta"])
        assert ratio.item() == approx(step["dense/kernel"]["trust_ratio"])


@pytest.mark.parametrize("name", GOLDEN["lr_schedule"])
def test_learning_rate_schedule(name):
    g = GOLDEN["lr_schedule"][name]
    warmup, total = official_steps(g["num_examples"], g["batch"], g["epochs"], g["warmup_epochs"])
    assert (warmup, total) == (g["warmup_steps"], g["total_steps"])
    peak = scale_lr(g["base_lr"], g["batch"], g["scaling"])
    assert peak == approx(g["peak_lr"])
    assert g["values"]
    for step, lr in g["values"].items():
        assert warmup_cosine(int(step), peak, warmup, total) == approx(lr), step


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_sizes_of_networks(name):
    g = GOLDEN["models"][name]
    stem = "cifar" if g["cifar_stem"] else "imagenet"
    with torch.device("meta"):
        encoder = create_encoder(f"resnet{g['depth']}", g["width"], stem, shortcut="projection")
        dim = encoder.out_dim
        heads = {
            "proj_head_2layer_params": projection_head(dim, batch_norm=True),
            "proj_head_3layer_params": projection_head(dim, hidden_layers=2, batch_norm=True),
            "proj_head_paper_literal_2layer_nobias_params": projection_head(dim),
        }
    stats = encoder_stats(encoder, g["input"])
    assert stats["params"] == g["trainable_params_encoder"]
    assert stats["macs"] == g["macs_encoder"]
    assert stats["out_dim"] == g["feature_dim"]
    one_dimensional = sum(p.numel() for p in encoder.parameters() if p.ndim == 1)
    assert one_dimensional == g["of_which_bn_gamma_beta"]
    with_classifier = stats["params"] + 1000 * (stats["out_dim"] + 1)
    assert with_classifier == g["trainable_params_encoder_plus_1000way_linear"]
    for key, head in heads.items():
        assert sum(p.numel() for p in head.parameters()) == g[key], key
