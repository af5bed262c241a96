"""AMDIM against the numbers of the original code, and against one process.

`golden/amdim.json` was made with the authors' public code, its maths unmodified; its `meta` says how
inputs and weights are computed. Losses are float64 and must agree to 1e-10; what was computed in
float32 (encoders, and the values that the original code casts to float32) to 1e-4 and 1e-6.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from simclr_nb.model.amdim import (
    AMDIM,
    AMDIMEncoder,
    Scales,
    amdim_parameters,
    receptive_fields,
    _seen_pixels,
    split_scales,
)
from simclr_nb.model.head import Projection
from simclr_nb.loss.amdim import AMDIMLoss, amdim_loss, nce_scores, nce_term, soft_clip

GOLDEN = json.loads((Path(__file__).parent / "golden" / "amdim.json").read_text())
RAW = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # the original's inputs are normalised already


def hash01(n, c):
    x = (torch.arange(n) * 2654435761 + c * 40503 + 12345) % 2**32
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
    return (x ^ (x >> 16)).double() / 2**32


def hash_t(shape, c):
    return 2 * hash01(torch.Size(shape).numel(), c).view(shape) - 1


def sin_t(shape, phase=0.0):
    return torch.sin(0.01 * torch.arange(torch.Size(shape).numel()).double() + phase).view(shape)


def positions(n):
    b = torch.arange(n)
    return (7 * b + 3) % 25, (11 * b + 5) % 25


def loss_inputs(case):
    shapes = [(case["B"], case["d"], k * k) for k in (1, 5, 7)] * 2
    if case["inputs"] == "sin":
        made = [sin_t(shape, 0.5 * k) for k, shape in enumerate(shapes)]
    else:
        made = [hash_t(shape, k + 1) for k, shape in enumerate(shapes)]
    return [(case["scale"] * x).requires_grad_() for x in made]


def as_scales(r1, r5, r7):
    return Scales(r1[..., 0], r5, r7)


def test_the_hash_is_the_golden_one():
    assert hash01(5, 0).tolist() == GOLDEN["hash_check"]["hash01(5,c=0)"]
    assert hash01(3, 7).tolist() == GOLDEN["hash_check"]["hash01(3,c=7)"]


@pytest.mark.parametrize("case", GOLDEN["loss"], ids=lambda c: f"{c['inputs']}-{c['tclip']:g}")
def test_loss_and_gradients(case):
    inputs = loss_inputs(case)
    drawn = positions(case["B"])
    assert [p.tolist() for p in drawn] == [case["idx1"], case["idx2"]]
    terms = amdim_loss(as_scales(*inputs[:3]), as_scales(*inputs[3:]), drawn, clip=case["tclip"])
    expected = [case[k] for k in ("loss_1t5", "loss_1t7", "loss_5t5", "lgt_reg")]
    assert [t.item() for t in terms] == pytest.approx(expected, rel=1e-10)
    assert sum(terms).item() == pytest.approx(case["total"], rel=1e-10)
    gradients = torch.autograd.grad(sum(terms), inputs)
    norms = [g.norm().item() for g in gradients]
    assert norms == pytest.approx(list(case["grad_l2"].values()), rel=1e-10)
    first = gradients[0].flatten()[:4].tolist()
    assert first == pytest.approx(case["grad_r1_1_first4"], rel=1e-10)


def test_single_term():
    expected = GOLDEN["single_nce"]
    source, target = 3 * hash_t((4, 8), 1), 3 * hash_t((4, 8, 25), 2)
    term = nce_term(source, target)
    assert term.loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    assert term.penalty.item() == pytest.approx(expected["lgt_reg"], rel=1e-6)
    scores = soft_clip(nce_scores(source, target))
    rows = torch.arange(4)
    positive = scores[rows, rows]
    negatives = scores.masked_fill(torch.eye(4, dtype=bool)[..., None], -torch.inf).flatten(1)
    nce = positive - torch.logaddexp(positive, negatives.logsumexp(1, keepdim=True))
    assert list(nce.shape) == expected["nce_scores_shape"]
    assert positive[0, :5].tolist() == pytest.approx(expected["pos_row0_first5"], rel=1e-6)
    assert nce[0, :5].tolist() == pytest.approx(expected["nce_row0_first5"], rel=1e-6)
    assert term.loss.item() == pytest.approx(-nce.mean().item(), rel=1e-12)


def test_zero_features_are_a_guess():
    expected = GOLDEN["zero_features"]
    zero = Scales(torch.zeros(4, 8), torch.zeros(4, 8, 25), torch.zeros(4, 8, 49))
    terms = [t.item() for t in amdim_loss(zero, zero, positions(4))]
    assert terms[:3] == pytest.approx(expected["expected"], rel=1e-6)
    assert terms[:3] == pytest.approx([expected[f"loss_{t}"] for t in ("1t5", "1t7", "5t5")], rel=1e-6)
    assert terms[3] == 0


def golden_model(case):
    "The model with the golden weights: convolutions numbered in the order of execution."
    encoder = AMDIMEncoder(case["size"], case["ndf"], case["n_rkhs"], case["n_depth"],
                           case["use_bn"], **RAW)
    model = AMDIM(encoder)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]  # encoder, head5, head7
    for i, conv in enumerate(convs, 1):
        fan_in = conv.weight[0].numel()
        weight = (3 / fan_in) ** 0.5 * hash_t(conv.weight.shape, i)
        conv.weight.data = weight.float()
        if conv.bias is not None:
            conv.bias.data = (0.1 * hash_t(conv.bias.shape, 1000 + i)).float()
    return model, convs


def stages(encoder):
    "The stages of the original's table."
    down = list(encoder.to_7)
    if isinstance(down[0], nn.ReflectionPad2d):
        down = [nn.Sequential(*down[:2]), *down[2:]]  # padding belongs to the stem there
    return [*down, encoder.to_5, *encoder.to_1]


def original_name(model, name):
    "Our parameter for a name of the original."
    owner, number, *rest = name.replace("rkhs_block_", "head.").split(".")
    if owner == "head":
        return getattr(model, f"head{number}").get_submodule(rest[0]).weight
    stage = stages(model.encoder)[int(number)]
    if rest[0] == "conv":
        return next(m for m in stage.modules() if isinstance(m, nn.Conv2d)).weight
    path = ".".join(rest[:-1])
    if path.startswith("layer_list."):
        path = path.removeprefix("layer_list.")
    return stage.get_submodule(path).weight


def check_statistics(x, expected):
    assert list(x.shape) == expected["shape"][: x.ndim]
    x = x.double()
    found = [x.std(correction=0).item(), x.norm().item(), *x.flatten()[:4].tolist(),
             x.flatten()[-1].item()]
    wanted = [expected["std_pop"], expected["l2"], *expected["first4"], expected["last"]]
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert x.mean().item() == pytest.approx(expected["mean"], abs=1e-5)


def maps(scales):
    n = len(scales.r1)
    return dict(r1=scales.r1.reshape(n, -1, 1, 1), r5=scales.r5.reshape(n, -1, 5, 5),
                r7=scales.r7.reshape(n, -1, 7, 7))


def views(case):
    shape = (4, 3, case["size"], case["size"])
    return hash_t(shape, 501).float(), hash_t(shape, 502).float(), sin_t(shape).float()


TRAIN = [c for c in GOLDEN["encoder"] if c["mode"] == "train"]
EVAL = [c for c in GOLDEN["encoder"] if c["mode"] == "eval"]


@pytest.mark.parametrize("case", TRAIN, ids=lambda c: str(c["size"]))
def test_encoder_in_training(case):
    model, convs = golden_model(case)
    assert len(convs) == case["n_convs"]
    x1, x2, x_sin = views(case)
    shapes, x = [], x1
    for stage in stages(model.encoder):
        x = stage(x)
        shapes.append(list(x.shape))
    assert shapes == case["act_shapes"]
    a, b = (split_scales(z) for z in model(torch.cat([x1, x2])).z.chunk(2))
    for name, x in maps(a).items(): check_statistics(x, case["hash_input_view1"][name])
    check_statistics(maps(b)["r1"], case["hash_input_view2_r1"])
    terms = amdim_loss(a, b, positions(4))
    expected = [case[k] for k in ("loss_1t5", "loss_1t7", "loss_5t5", "lgt_reg")]
    assert [t.item() for t in terms] == pytest.approx(expected, rel=1e-4)
    sum(terms).backward()
    total = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert total == pytest.approx(case["grad_norm_all"], rel=1e-4)
    for name, norm in case["grad_norms"].items():
        assert original_name(model, name).grad.norm().item() == pytest.approx(norm, rel=1e-4), name
    sin = split_scales(model.embed(x_sin)[1])
    for name, x in maps(sin).items(): check_statistics(x, case["sin_input"][name])


@pytest.mark.parametrize("case", EVAL, ids=lambda c: str(c["size"]))
def test_encoder_in_evaluation(case):
    like = next(c for c in TRAIN if c["size"] == case["size"])
    model, _ = golden_model(like)
    x1, x2, x_sin = views(case)
    x = dict(view1=x1, view2=x2).get(case["input"], x_sin if "sin" in case["input"] else x1)
    with torch.no_grad(): z = model.eval()(x).z
    for name, x in maps(split_scales(z)).items(): check_statistics(x, case[name])


def test_a_new_network_is_pools_and_zeros():
    state, torch_seed = GOLDEN["init_state_32"], torch.manual_seed(0)
    model = AMDIM(AMDIMEncoder(32, 8, 64, 2))
    a = split_scales(model.embed(torch.rand(4, 3, 32, 32))[1])
    assert a.r1.shape[1] == state["n_rkhs"]
    assert (a.r1.abs().sum(0) > 1e-6).sum() == state["nonzero_channels_r1"]
    assert (a.r5.abs().sum((0, 2)) > 1e-6).sum() == state["nonzero_channels_r5"]


@pytest.mark.parametrize("case", GOLDEN["param_counts"],
                         ids=lambda c: f"{c['size']}-{c['ndf']}-{c['n_rkhs']}-{c['n_depth']}")
def test_parameter_counts(case):
    sizes = [case[k] for k in ("size", "ndf", "n_rkhs", "n_depth")]
    with torch.device("meta"): model = AMDIM(AMDIMEncoder(*sizes))
    active = sum(p.numel() for p in model.parameters())
    trunk = sum(p.numel() for p in model.encoder.parameters())
    assert active == case["active"]
    assert (trunk, active - trunk) == (case["trunk_active"], case["rkhs_heads_active"])
    assert amdim_parameters(*sizes) == (case["trunk_active"], case["rkhs_heads_active"])
    with torch.device("meta"): full = AMDIM(AMDIMEncoder(*sizes, use_bn=True))
    inside = sum(p.numel() for p in full.parameters()) - active
    assert inside == case["unused_bn"]  # the original holds these without using them
    assert active + inside == case["total_incl_unused_bn"]


FIELDS = {32: {7: (8, 4), 5: (16, 4), 3: (24, 4), 1: (32, 4)},
          64: {7: (16, 8), 5: (32, 8), 3: (48, 8), 1: (64, 8)},
          128: {7: (35, 16), 5: (67, 16), 3: (99, 16), 1: (131, 16)}}


@pytest.mark.parametrize("size", FIELDS)
def test_receptive_fields_by_gradients(size):
    encoder = AMDIMEncoder(size, 4, 32, 3)
    fields = FIELDS[size]
    assert receptive_fields(encoder) == fields
    start = -2 if size == 128 else 0
    for side in (7, 5, 1):
        seen, step = fields[side]
        for row in range(0, side, 2):
            box = _seen_pixels(encoder, side, row, side - 1)
            assert box == (start + row * step, start + (side - 1) * step, seen, seen)
    with pytest.raises(ValueError, match="side 7, 5 or 1"): _seen_pixels(encoder, 3)


def features(n=6, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dim, k, generator=generator, dtype=torch.float64) for k in (1, 25, 49)]


def test_invariants_of_the_loss():
    a, b = as_scales(*features(seed=0)), as_scales(*features(seed=1))
    p = positions(6)
    loss = sum(amdim_loss(a, b, p))
    order = torch.randperm(6)
    a2, b2 = (Scales(*(r[order] for r in v)) for v in (a, b))
    assert sum(amdim_loss(a2, b2, tuple(q[order] for q in p))).item() == pytest.approx(loss.item())
    assert sum(amdim_loss(b, a, p[::-1])).item() == pytest.approx(loss.item())  # views are equals
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]  # one rotation of all features
    a3, b3 = (Scales(v.r1 @ turn.T, turn @ v.r5, turn @ v.r7) for v in (a, b))
    assert sum(amdim_loss(a3, b3, p)).item() == pytest.approx(loss.item())
    # sources times k and targets over k: the same scores
    t1 = nce_term(a.r1, b.r5)
    t2 = nce_term(3 * a.r1, b.r5 / 3)
    assert [v.item() for v in t2] == pytest.approx([v.item() for v in t1])


def test_positions_of_one_image_do_not_compete():
    "A position's loss has no gradient with respect to other positions of its own image."
    source, target = torch.randn(4, 8).double(), torch.randn(4, 8, 25).double().requires_grad_()
    scores = soft_clip(nce_scores(source, target))
    negatives = scores[0, 1:].logsumexp((0, 1))
    one = torch.logaddexp(scores[0, 0, 7], negatives) - scores[0, 0, 7]
    (g,) = torch.autograd.grad(one, target)
    assert (g[0].abs().sum(0) > 0).nonzero().tolist() == [[7]]
    # and this is what nce_term adds up
    single = nce_term(source[:1], torch.cat([target[:1, :, 7:8].expand(-1, -1, 25), target[1:]]),
                      torch.tensor([0]))
    assert single.loss.item() == pytest.approx(one.item())


def test_loss_module_agrees_with_the_function():
    a, b = features(seed=2), features(seed=3)
    z = torch.cat([torch.cat(a, 2), torch.cat(b, 2)])
    loss = AMDIMLoss(clip=10.0, penalty=0.1)(Projection(z[..., 0], z), positions=positions(6))
    expected = sum(amdim_loss(as_scales(*a), as_scales(*b), positions(6), clip=10.0, penalty=0.1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
