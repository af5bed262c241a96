"""Numbers of the official code: colour operations, blur, bicubic, central crop, sampler of boxes.

`golden/simclr.json` was derived in NumPy (float64) and confirmed against the official TF2 code; its
`_about` says how. We compute in float64 too, so values must agree to 1e-10. The boxes were drawn at
random, so there the tolerance is sampling error, as `check_quantiles` and `check_extremes` say.
"""

import re
from pathlib import Path

import pytest
import torch
from test_golden import GOLDEN, approx

from simclr_nb.views.color import (
    ColorJitter,
    RandomEqualize,
    RandomSolarize,
    add_brightness,
    adjust_brightness,
    adjust_contrast_per_channel,
    adjust_hue,
    adjust_saturation_hsv,
    grayscale,
)
from simclr_nb.views.crop import (
    RandomResizedCrop,
    central_box,
    sample_boxes,
    sample_boxes_tf,
)
from simclr_nb.views.distort import gaussian_blur
from simclr_nb.views.resize import INTERPOLATIONS, crop_resize, resize_weights

TESTS = Path(__file__).parent
NOTES = {"_about", "inputs"}  # words about the numbers, no numbers
DRAWS = 20_000  # boxes behind each entry of crop_statistics, and of ours
Z = 4.5  # standard errors; by chance one comparison in 150,000 is further off


def formula(height, width):
    "The golden image, `(1, 3, height, width)`; the formula runs over height, width, channel."
    i = torch.arange(height * width * 3, dtype=torch.float64)
    flat = 0.5 + 0.45 * torch.sin(0.37 * i + 0.9 * (i % 3))
    return flat.view(1, height, width, 3).permute(0, 3, 1, 2)


def one(value):
    return torch.tensor([value], dtype=torch.float64)


def flat(x):
    "Images `(1, 3, H, W)` in the order of the file."
    return x[0].permute(1, 2, 0).flatten().tolist()


def test_every_key_of_the_file_is_tested():
    files = "test_golden.py", "test_golden_augment.py", "test_golden_losses.py"
    texts = [(TESTS / f).read_text() for f in files if (TESTS / f).exists()]
    tested = set(re.findall(r'GOLDEN\["(\w+)"\]', "".join(texts)))
    assert set(GOLDEN) - NOTES == tested


# Colour

def test_image_is_the_golden_one():
    assert GOLDEN["color"]["image_shape_HWC"] == [4, 5, 3]
    assert flat(formula(4, 5)) == approx(GOLDEN["color"]["image_flat"])


SINGLE = dict(
    brightness_mul=adjust_brightness, brightness_add=add_brightness,
    contrast=adjust_contrast_per_channel, saturation=adjust_saturation_hsv, hue=adjust_hue)
VARIANTS = dict(v1="official_v1", v2="official_v2", paper="paper")


def chain(x, name):
    "The jitter that a name of the file describes, through the operator itself."
    pattern = r"chain_(v1|v2|paper)_(?:order|pseudocode)_(.+)_clip_.+"
    source, steps = re.fullmatch(pattern, name).groups()
    factors, order = torch.zeros(1, 4, dtype=torch.float64), []
    for step in steps.split("_"):
        op, value = re.fullmatch(r"(badd|[bcsh])([+-]?[\d.]+)", step).groups()
        assert (op == "badd") == (op[0] == "b" and source != "v2")
        order.append("bcsh".index(op[0]))
        factors[0, order[-1]] = float(value)
    jitter = ColorJitter(variant=VARIANTS[source])
    if source == "paper":  # its order is fixed
        assert order == jitter.parameters(1)[1][0].tolist()
        assert name.endswith("_clip_end_only")
    else: assert name.endswith("_clip_each")
    return jitter.apply(x.clone(), factors, torch.tensor([order]))


@pytest.mark.parametrize("name", GOLDEN["color"]["ops"])
def test_colour(name):
    x, expected = formula(4, 5), GOLDEN["color"]["ops"][name]
    if name.startswith("chain"): out = chain(x, name)
    elif name == "gray": out = grayscale(x).expand_as(x)
    else:
        op, value = name.rsplit("_", 1)
        free = {} if op == "hue" else dict(clamp=False)
        out = SINGLE[op](x, one(float(value)), **free)
    assert flat(out) == approx(expected["flat"])
    assert out.mean().item() == approx(expected["mean"])
    assert out.std(correction=0).item() == approx(expected["std"])


def test_colour_file_has_every_kind():
    names = GOLDEN["color"]["ops"]
    kinds = {re.match(r"(chain_)?[a-z]+(\d|_add|_mul)?", name)[0] for name in names}
    assert kinds == {"brightness_mul", "brightness_add", "contrast", "saturation", "hue", "gray",
                     "chain_v1", "chain_v2", "chain_paper"}


# Blur, bicubic, central crop

@pytest.mark.parametrize("name", GOLDEN["blur"]["cases"])
def test_blur(name):
    argument, taps, sigma = (float(part.split("=")[1]) for part in name.split("|"))
    size = 2 * int(argument / 2) + 1  # the official rule: an even width grows by one
    assert size == taps
    out, expected = official_blur(formula(12, 10), sigma, size), GOLDEN["blur"]["cases"][name]
    assert out.mean().item() == approx(expected["mean"])
    assert out.std(correction=0).item() == approx(expected["std"])
    pixels = {key: value for key, value in expected.items() if key.startswith("px_")}
    assert len(pixels) == len(expected) - 2 == 3
    for key, value in pixels.items():
        row, column = map(int, key.split("_")[1:])
        assert out[0, :, row, column].tolist() == approx(value)


def official_blur(x, sigma, size):
    return gaussian_blur(x, one(sigma), size, border="zero")


def test_blur_taps():
    taps = GOLDEN["blur"]["taps_224px_sigma1.0_centre_outwards"]
    reach = len(taps) - 1
    assert 2 * reach + 1 == 2 * int(224 // 10 / 2) + 1 == 23
    impulse = torch.zeros(1, 3, 25, 25, dtype=torch.float64)
    impulse[0, :, 12, 12] = 1
    out = official_blur(impulse, 1.0, 23)[0, 0]
    outer = torch.tensor(taps[::-1] + taps[1:], dtype=torch.float64)
    assert out[1:-1, 1:-1].flatten().tolist() == approx((outer[:, None] * outer).flatten().tolist())
    assert out[0].abs().max() == 0


@pytest.mark.parametrize("name", GOLDEN["bicubic"]["cases"])
def test_bicubic(name):
    "TF rounds its kernel to a table, 4e-4 off at 9x11; these are the numbers of the exact kernel."
    height, width = map(int, name.removeprefix("to_").split("x"))
    x, expected = formula(6, 8), GOLDEN["bicubic"]["cases"][name]
    how = dict(antialias=False, interpolation="bicubic", dtype=torch.float64)
    rows = resize_weights(torch.tensor([0]), torch.tensor([6]), 6, height, **how)
    columns = resize_weights(torch.tensor([0]), torch.tensor([8]), 8, width, **how)
    out = rows[:, None] @ x @ columns.mT[:, None]
    assert flat(out) == approx(expected["flat"])
    for f in (torch.mean, torch.amin, torch.amax):
        assert f(out).item() == approx(expected[f.__name__.removeprefix("a")])
    if height == width:
        square = crop_resize(x, torch.tensor([[0, 0, 6, 8]]), height, None, False, "bicubic")
        assert flat(square) == approx(expected["flat"])


@pytest.mark.parametrize("name", GOLDEN["center_crop"])
def test_central_crop(name):
    g = GOLDEN["center_crop"][name]
    expected = g["off_y"], g["off_x"], g["crop_h"], g["crop_w"]
    assert central_box(*map(int, name.split("x"))) == expected


# Boxes

AREA_QUANTILES = 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99

def draw_boxes(name, seed=0):
    "Boxes of the sampler that a name of the file describes: area share, ratio, and the boxes."
    size, kind = name.split("|")
    height, width = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(seed)
    if kind == "torchvision_like":
        boxes = sample_boxes(DRAWS, height, width, generator=generator)
    else:
        covered = float(re.fullmatch(r"(?:min_object_covered=|numpy_model_moc)(.+)", kind)[1])
        boxes = sample_boxes_tf(DRAWS, height, width, min_covered=covered, generator=generator)
    boxes = boxes.double()
    area, ratio = boxes[:, 2] * boxes[:, 3] / (height * width), boxes[:, 3] / boxes[:, 2]
    return height, area, ratio, boxes


def check_quantiles(values, quantiles, shares):
    """Our share of values up to each golden quantile is the quantile's own.

    Both come from `DRAWS` draws, so their difference has standard error sqrt(2 q (1 - q) / DRAWS).
    """
    for q, x in zip(shares, quantiles, strict=True):
        tolerance = Z * (2 * q * (1 - q) / DRAWS) ** 0.5
        below, upto = (f(values, x).double().mean().item() for f in (torch.lt, torch.le))
        assert below - tolerance <= q <= upto + tolerance, (q, x)


def check_mean(values, mean):
    error = values.std().item() * (2 / DRAWS) ** 0.5
    assert values.mean().item() == pytest.approx(mean, abs=Z * error)


def check_extremes(values, low, high):
    """Few of our values lie beyond the golden extremes.

    Of two equal samples, one has k values below the least of the other with probability 2**-k.
    """
    assert (values < low).sum() <= 20 and (values > high).sum() <= 20
    assert low <= values.median() <= high


def check_count(ours, share):
    "Two counts of rare events differ by a few standard deviations of their difference."
    theirs = share * DRAWS
    assert abs(ours - theirs) <= Z * (ours + theirs) ** 0.5 + 1e-6


@pytest.mark.parametrize("name", GOLDEN["crop_statistics"])
def test_crop_statistics(name):
    g = dict(GOLDEN["crop_statistics"][name])
    height, area, ratio, boxes = draw_boxes(name)
    check_mean(area, g.pop("area_mean"))
    check_mean(ratio, g.pop("ar_mean"))
    check_quantiles(area, g.pop("area_q"), AREA_QUANTILES)
    check_quantiles(ratio, g.pop("ar_q"), [0.1, 0.25, 0.5, 0.75, 0.9])
    if not g: return  # a model: no more was recorded
    check_extremes(area, g.pop("area_min"), g.pop("area_max"))
    check_extremes(ratio, g.pop("ar_min"), g.pop("ar_max"))
    top, bottom = boxes[:, 0], boxes[:, 0] + boxes[:, 2]
    lower = boxes[:, 2] < height
    check_count((area == 1).sum().item(), g.pop("full_image_frac"))
    check_count((lower & (top == 0)).sum().item(), g.pop("frac_top_flush"))
    assert (bottom[lower] == height).double().mean() == g.pop("frac_bottom_flush_when_h_lt_H") == 0
    assert bottom.max().item() / height == g.pop("max_y_plus_h_over_H")
    assert not g, "an entry that nothing looks at"


def test_samplers_are_told_apart():
    "The tolerances are narrow enough: either sampler fails the other's numbers."
    _, area, *_ = draw_boxes("256x256|torchvision_like")
    g = GOLDEN["crop_statistics"]["256x256|min_object_covered=0.1"]
    with pytest.raises(AssertionError): check_mean(area, g["area_mean"])
    with pytest.raises(AssertionError): check_quantiles(area, g["area_q"], AREA_QUANTILES)


# Operators as operators

CROPS = [RandomResizedCrop(16, sampler=s, interpolation=i, antialias=a)
         for s in ("torchvision", "tensorflow") for i in INTERPOLATIONS for a in (True, False)]
JITTERS = [ColorJitter(p=1, variant=v) for v in ("torch", "paper", "official_v1", "official_v2")]
CHANGES = [*JITTERS, RandomSolarize(p=1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("operator", [*CROPS, *CHANGES], ids=str)
def test_equal_images_get_different_views(operator, dtype):
    x = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    x = x.to(dtype).expand(64, -1, -1, -1)
    views, again = (operator(x, torch.Generator().manual_seed(2)) for _ in range(2))
    assert views.dtype == dtype
    assert len(views.flatten(1).unique(dim=0)) == 64
    assert torch.equal(views, again), "the same seed"
    other = operator(x, torch.Generator().manual_seed(3))
    assert not torch.equal(views, other), "another seed"


def test_equalize_changes_each_image_or_not():
    "It has no parameter, so of equal images it makes two kinds."
    x = 0.5 * formula(40, 40).expand(64, -1, -1, -1)
    views, again = (RandomEqualize(p=0.5)(x, torch.Generator().manual_seed(2)) for _ in range(2))
    assert len(views.flatten(1).unique(dim=0)) == 2
    assert torch.equal(views, again)


@pytest.mark.parametrize(
    "operator", [*(ColorJitter(p=0, variant=j.variant) for j in JITTERS),
                 RandomSolarize(p=0), RandomEqualize(p=0)], ids=str)
def test_no_share_no_change(operator):
    x = torch.rand(8, 3, 12, 12)
    assert torch.equal(operator(x), x)
