"AMDIM's views: the same as NumPy and torchvision make of the same draws, with one flip for both."
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode

from simclr_nb.views.policy import (
    Policy,
    amdim_policy,
    cifar_policy,
    create_policy,
    supervised_policy,
)
from simclr_nb.views.two_views import TwoViews
from simclr_nb.views.color import ColorJitter, RandomGrayscale
from simclr_nb.views.crop import RandomFlip, RandomResizedCrop, RandomTranslate, reflect_translate
from simclr_nb.data import simclr_dls
from simclr_nb.core.show import sample_photo

N = 1000
SHARE = 3 * 0.5 / N**0.5  # three standard deviations of a share of about one half
ADJUST = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue


def seeded(seed: int) -> torch.Generator: return torch.Generator().manual_seed(seed)


def ramps(n: int, side: int) -> torch.Tensor:
    "Images that grow brighter from left to right."
    return torch.linspace(0, 1, side).expand(n, 3, side, side)


def mirrored(views: torch.Tensor) -> torch.Tensor:
    "Whether views of ramps fall from left to right; no crop and no shift hides it."
    quarter = views.shape[-1] // 4
    return views[..., :quarter].mean((1, 2, 3)) > views[..., -quarter:].mean((1, 2, 3))


def photos(n: int, side: int) -> torch.Tensor:
    return torch.stack([sample_photo(("flower", "palace")[i % 2], side) for i in range(n)])


# Shifts

@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_all_81_shifts_are_numpys_reflected_padding_and_a_crop(dtype):
    shifts = torch.cartesian_prod(*[torch.arange(-4, 5)] * 2)
    x = (torch.rand(81, 3, 32, 32) * 255).to(dtype)
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (4, 4), (4, 4)], "reflect")
    expected = np.stack([image[:, 4 - ty : 36 - ty, 4 - tx : 36 - tx]
                         for image, (ty, tx) in zip(padded, shifts.tolist(), strict=True)])
    moved = reflect_translate(x, *shifts.T)
    assert moved.dtype == dtype and np.array_equal(moved.numpy(), expected)


@settings(deadline=None, max_examples=50)
@given(height=st.integers(1, 9), width=st.integers(1, 9), data=st.data())
def test_any_shift_that_is_shorter_than_the_side(height, width, data):
    down = data.draw(st.integers(1 - height, height - 1))
    right = data.draw(st.integers(1 - width, width - 1))
    x = torch.rand(1, 2, height, width)
    padding = [(height - 1,) * 2, (width - 1,) * 2]
    padded = np.pad(x[0].numpy(), [(0, 0), *padding], "reflect")
    top, left = height - 1 - down, width - 1 - right
    moved = reflect_translate(x, torch.tensor([down]), torch.tensor([right]))
    assert np.array_equal(moved[0].numpy(), padded[:, top : top + height, left : left + width])


def test_shifts_that_cannot_be_are_refused():
    x, zero = torch.rand(2, 3, 8, 5), torch.tensor([0, 0])
    reflect_translate(x, torch.tensor([7, -7]), torch.tensor([4, -4]))
    with pytest.raises(ValueError, match="side of 8 pixels, got 8"):
        reflect_translate(x, torch.tensor([0, 8]), zero)
    with pytest.raises(ValueError, match="side of 5 pixels, got -5"):
        reflect_translate(x, zero, torch.tensor([-5, 0]))
    with pytest.raises(ValueError, match=r"whole number for each image, \(2,\)"):
        reflect_translate(x, zero[:1], zero)
    with pytest.raises(ValueError, match="larger images"): RandomTranslate(5)(x)


# One view, image by image

def by_torchvision(policy: Policy, images: torch.Tensor, generator: torch.Generator):
    "The policy with functions of NumPy and torchvision, one image at a time, from the same draws."
    n, side = len(images), policy.size
    flips = RandomFlip().draw(n, generator)[0]
    move, jitter, drop = policy.operators[0], *policy.operators[-2:]
    if policy.crop: boxes = policy.crop.draw(n, *images.shape[2:], generator)[0]
    else: down, right, moved = move.draw(n, generator)
    factors, order, jittered = jitter.draw(n, generator)
    gray = drop.draw(n, generator)[0]
    for i, x in enumerate(images):
        if flips[i]: x = TF.horizontal_flip(x)
        if policy.crop:
            x = TF.resized_crop(x, *boxes[i].tolist(), [side] * 2, InterpolationMode.BICUBIC)
            x = x.clamp(0, 1)
        elif moved[i]:
            padded = np.pad(x.numpy(), [(0, 0), (4, 4), (4, 4)], "reflect")
            top, left = 4 - down[i], 4 - right[i]
            x = torch.from_numpy(padded[:, top : top + side, left : left + side].copy())
        for op in order[i] if jittered[i] else []: x = ADJUST[op](x, factors[i, op].item())
        yield TF.rgb_to_grayscale(x, 3) if gray[i] else x


@pytest.mark.parametrize("size, side", [(32, 32), (64, 96), (128, 150)])
def test_a_view_is_what_torchvision_makes_of_the_same_draws(size, side):
    policy, images = amdim_policy(size), photos(24, side)
    expected = torch.stack([*by_torchvision(policy, images, seeded(size))])
    assert torch.allclose(policy(images, seeded(size)), expected, atol=1e-4)


@pytest.mark.parametrize("size, hue", [(8, .2), (32, .2), (33, .2), (64, .2), (127, .2), (128, .1)])
def test_parameters_follow_the_size(size, hue):
    policy = amdim_policy(size, 0.5)
    jitter, gray = policy.operators[-2:]
    assert (type(jitter), type(gray)) == (ColorJitter, RandomGrayscale)
    assert (jitter.brightness, jitter.contrast, jitter.saturation) == (0.2, 0.2, 0.2)
    assert (jitter.hue, jitter.p, gray.p, policy.size) == (pytest.approx(hue / 2), 0.8, 0.25, size)
    crop = policy.crop
    assert (crop is None) == (size <= 32) == isinstance(policy.operators[0], RandomTranslate)
    if crop:
        assert (crop.flip, crop.scale, crop.ratio) == (0, (0.3, 1), (0.7, 1.4))
        assert crop.interpolation == "bicubic" and crop.antialias
    assert [(type(o), o.p) for o in policy.shared.operators] == [(RandomFlip, 0.5)]
    only = amdim_policy(size, jitter=False, gray=False)
    assert not any(isinstance(o, (ColorJitter, RandomGrayscale)) for o in only.operators)
    assert isinstance(amdim_policy(size, gray=False).operators[-1], ColorJitter)


# Two views

@pytest.mark.parametrize("size", [32, 64])
def test_both_views_are_mirrored_or_neither(size):
    views = TwoViews(amdim_policy(size, jitter=False))(ramps(N, size), seeded(0))
    first, second = mirrored(views).chunk(2)
    assert (first == second).all()
    assert abs(first.float().mean() - 0.5) < SHARE
    first, second = mirrored(TwoViews(cifar_policy(size))(ramps(N, size), seeded(0))).chunk(2)
    assert abs((first == second).float().mean() - 0.5) < SHARE  # SimCLR's are not


def test_otherwise_views_are_independent_and_shifts_at_most_4_pixels():
    position = torch.arange(32) / 32  # red: the column; green: the row
    x = torch.stack([position.expand(32, 32), position[:, None].expand(32, 32), torch.zeros(32, 32)])
    views = TwoViews(amdim_policy(32, jitter=False, gray=False))(x.expand(N, -1, -1, -1), seeded(0))
    red, green = (views[:, :2, 16, 16] * 32).round().T
    flip = mirrored(views[:, :1])
    right = torch.where(flip, 15 - red, 16 - red).view(2, N)  # centre column of a mirrored one: 15
    down = (16 - green).view(2, N)
    for shift in (down, right):
        assert shift.unique().tolist() == [*range(-4, 5)]
        assert abs(torch.corrcoef(shift)[0, 1]) < 3 / N**0.5
    still = ((down == 0) & (right == 0)).float().mean()
    assert abs(still - (0.2 + 0.8 / 81)) < 3 * 0.4 / (2 * N) ** 0.5


def test_one_view_alone_is_mirrored_too():
    policy = amdim_policy(32, jitter=False)
    assert abs(mirrored(policy(ramps(N, 32), seeded(1))).float().mean() - 0.5) < SHARE
    assert not mirrored(policy.separate()(ramps(N, 32), seeded(1))).any()


def test_the_streams_of_policies_that_share_nothing_are_as_before():
    policy, x = cifar_policy(32), photos(6, 40)
    expected, generator = [], seeded(3)
    for _ in range(2):
        view = x
        for operator in policy.operators: view = operator(view, generator)
        expected.append(view.clamp(0, 1))
    assert torch.equal(TwoViews(policy)(x, seeded(3)), torch.cat(expected))
    pairs, rest = torch.stack([x, x.flip(3)], 1), torch.cat([x, x.flip(3)])
    generator = seeded(3)
    for operator in policy.operators[1:]: rest = operator(rest, generator)
    assert torch.equal(TwoViews(policy)(pairs, seeded(3)), rest.clamp(0, 1))


# Pairs of crops, made by workers

def test_the_crops_of_an_image_are_mirrored_by_one_draw():
    for views in (TwoViews(amdim_policy(64, jitter=False)),
                  TwoViews(amdim_policy(64, jitter=False), amdim_policy(64, gray=False)),
                  TwoViews(Policy("crop", [RandomResizedCrop(64)]), shared=amdim_policy(64).shared)):
        first, second = mirrored(views(ramps(2 * N, 16).unflatten(0, (N, 2)), seeded(0))).chunk(2)
        assert (first == second).all()
        assert abs(first.float().mean() - 0.5) < SHARE


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_what_is_left_to_do_for_crops(dtype):
    pairs = (torch.rand(9, 2, 3, 64, 64) * 255).to(dtype)
    if dtype != torch.uint8: pairs /= 255
    views = TwoViews(amdim_policy(64, jitter=False, gray=False))(pairs, seeded(2))
    x = pairs.transpose(0, 1).flatten(0, 1).float() / (255 if dtype == torch.uint8 else 1)
    same = [(views == image).flatten(1).all(1) for image in (x, x.flip(3))]
    assert (same[0] ^ same[1]).all() and same[0].any() and same[1].any()


def test_a_shared_crop_still_starts_both_views():
    pairs = torch.rand(5, 2, 3, 16, 16)
    views = TwoViews(Policy("identity", []), shared=supervised_policy(16))(pairs)
    assert torch.equal(views, pairs[:, 0].repeat(2, 1, 1, 1))


def test_views_of_files_cropped_by_workers(tmp_path):
    ramp = np.linspace(0, 255, 120).astype(np.uint8)
    for i in range(40):
        side = 90 + i  # of several sizes, so they stay on disk
        Image.fromarray(np.tile(ramp[:, None], (side, 1, 3))).save(tmp_path / f"{i}.png")
    dls = simclr_dls(tmp_path, 64, 16, policy="amdim", num_workers=2, seed=0, device="cpu")
    assert (dls.policy.name, dls.info["in_memory"], dls.info["size"]) == ("amdim", False, 64)
    x = dls.train.one_batch()[0]
    assert x.shape == (16, 2, 3, 64, 64)
    assert not mirrored(x.flatten(0, 1).float()).any()  # the crop leaves the flip to the views
    views = TwoViews(dls.policy)(x, seeded(0))
    first, second = mirrored(views).chunk(2)
    assert views.shape == (32, 3, 64, 64) and (first == second).all() and 0 < first.sum() < 16


# What a policy says and refuses

def test_a_policy_without_a_crop_knows_its_size():
    policy = create_policy("amdim", 32)
    assert (policy.crop, policy.size, policy.after_crop().size) == (None, 32, 32)
    assert policy.after_crop().shared is policy.shared
    for call in (policy, policy.after_crop(), policy.separate(), TwoViews(policy)):
        with pytest.raises(ValueError, match="images of 32 x 32 pixels, got 40 x 32"):
            call(torch.rand(2, 3, 40, 32))
    with pytest.raises(ValueError, match="one size, got 32 and 40"):
        TwoViews(policy, cifar_policy(40))
    with pytest.raises(ValueError, match="leave out size=32"):
        Policy("twice", [RandomResizedCrop(16)], size=32)


def test_shared_operators():
    flip = amdim_policy(64).shared
    assert Policy("p", [], shared=flip).shared is flip
    assert Policy("p", [], shared=[]).shared is None
    with pytest.raises(ValueError, match="cannot share a crop"):
        Policy("p", [], shared=supervised_policy(32))
    shared = Policy("no flip", [RandomFlip(0)])
    views = TwoViews(amdim_policy(32, jitter=False), shared=shared)  # ours instead of the policy's
    assert views.shared is shared and not mirrored(views(ramps(N, 32))).any()
    assert TwoViews(cifar_policy(32), amdim_policy(32)).shared.operators[0].p == 0.5
    other = Policy("other", [], shared=[RandomFlip(0.1)])
    with pytest.raises(ValueError, match="share different operators"):
        TwoViews(amdim_policy(32), other)


def test_they_say_what_they_do():
    assert repr(amdim_policy(32, jitter=False, gray=False)) == (
        "amdim policy for images of 32 px\n"
        "  once for both views: horizontal flip with p=0.5\n"
        "  translation with p=0.8: up to 4 px each way, border reflected")
    assert repr(TwoViews(amdim_policy(64, jitter=False, gray=False))) == (
        "both views after the shared policy\n  horizontal flip with p=0.5\n"
        "two views, each by the amdim policy\n"
        "  crop 30% to 100% of the area, resize to 64 px, bicubic, flip with p=0\n"
        "  clip to [0, 1]")
