"""Images per second that get two augmented views: ours beside what others offer.

All make the same views from the same uint8 images in memory, in turns, in one run: those of the
CIFAR-10 policy at 32 px, and those of the paper's policy, with blur, at 224 px.
"""
import argparse
import gc
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from common import (bounds, closing, finish, header, machine, parser_of, product_rate, rate, rounds,
                    write)
from decode import SAMPLE, photos
from peers import kornia_views, lightly_views, one_by_one, solo_views, torchvision_views
from simclr_nb.images.arrays import ImageArrays
from simclr_nb.views.crop import sample_boxes
from simclr_nb.views.resize import crop_resize, crops_one_by_one
from simclr_nb.views.two_views import TwoViews
from simclr_nb.data import SimCLRDataLoaders, simclr_dls
from simclr_nb.images.source import Source
from simclr_nb.views.compiled import compiled_views
from simclr_nb.core.processes import kept_memory

SIDES = {32: 32, 224: 256}  # of the views: of the images
WAYS = dict(ours="ours, compiled", eager="ours, operators", kornia="kornia, batched",
            lightly="lightly", solo="solo-learn's recipe", torchvision="torchvision v2")
DIFFERENCES = (
    "Alike: boxes, flips, probabilities, ranges, random order of the colour operators, no blur at "
    "32 px, no normalisation. Unlike: lightly and solo-learn work on Pillow images one by one and "
    "round to 8 bits after each operator, torchvision on 8-bit tensors; ours and kornia on batches "
    "of floats. solo-learn resizes by a cubic; kornia has one order of the colour operators for a "
    "batch; the blur of lightly and solo-learn is Pillow's, an approximation by boxes.")


def squares(n: int, side: int) -> Tensor:
    "So many photos, cut to squares."
    paths = photos(SAMPLE)[:n]
    images = [ImageOps.fit(Image.open(path).convert("RGB"), (side, side)) for path in paths]
    return torch.stack([pil_to_tensor(images[i % len(images)]) for i in range(n)])


def load(data: str, size: int, n: int, batch: int) -> SimCLRDataLoaders:
    "Shuffled uint8 batches from memory: CIFAR-10, or photos for large views; or noise."
    side = SIDES[size]
    source = "cifar10"
    if data == "random" or size != 32:
        if data != "random": images = squares(n, side)
        else: images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
        arrays = ImageArrays(images, torch.full((n,), -1))
        source = Source("images", arrays, arrays)
    return simclr_dls(source, size, batch, "cifar" if size == 32 else "paper", n_train=n,
                      n_valid=2, seed=0, device="cpu", progress=False)


def passes(size: int, dls: SimCLRDataLoaders, args) -> dict[str, Callable[[], Iterable]]:
    "For each way, what goes over all images once and yields lists of views."
    images = list(dls.train.dataset.images)
    plain = TwoViews(dls.policy)
    fast = compiled_views(plain)
    kornia = kornia_views(size)
    batched = dict(ours=lambda x: [fast(x)], eager=lambda x: [plain(x)], kornia=kornia)
    others = dict(lightly=lightly_views, solo=solo_views, torchvision=torchvision_views)
    loaders = {name: one_by_one(make(size), images, dls.train.bs, args.workers)
               for name, make in others.items()}
    ways = {name: partial(map, lambda b, f=f: f(b[0]), dls.train) for name, f in batched.items()}
    return {name: ways.get(name) or partial(iter, loaders[name]) for name in WAYS}


def one_pass(name: str, batches: Callable, n: int, pixels: dict) -> float:
    "Images per second; keeps mean and spread of the last views, which agree for the same work."
    start = time.perf_counter()
    for views in batches(): pass
    speed = round(n / (time.perf_counter() - start), 1)
    views = torch.cat(list(views))
    pixels[name] = dict(mean=round(views.mean().item(), 2), std=round(views.std().item(), 2))
    return speed


def crop_rate(size: int) -> float:
    "Images of one batch that a second crops twice, alone, as the policy's crop does it."
    side = SIDES[size]
    x = torch.rand(64, 3, side, side)
    boxes = sample_boxes(len(x), side, side)
    return rate(lambda: crop_resize(x, boxes, size), len(x)) / 2


def limit(size: int) -> dict:
    """Roof for this method on this CPU: the slower of two parts, each alone and at full rate.

    Memory: uint8 images are read once and two float views written once. Arithmetic: each view is
    cropped, small ones by two matrix products, large ones one by one by PyTorch's resize. Colour
    and blur count for nothing here, so the roof is not reachable.
    """
    a = torch.ones(2, 2**26)
    side = SIDES[size]
    copy = rate(lambda: a[0].copy_(a[1]), 2 * a[0].nbytes)
    n_bytes = 3 * side**2 + 2 * 4 * 3 * size**2
    if crops_one_by_one(torch.empty(1), size): crops = crop_rate(size)
    else: crops = product_rate() / (2 * 2 * 3 * size * side * (side + size))
    return dict(copy_gb_per_s=round(copy / 1e9, 2), bytes_per_image=n_bytes,
                crops_per_s=round(crops), images_per_s=round(min(copy / n_bytes, crops)))


def measure_size(size: int, n: int, batch: int, args: argparse.Namespace) -> dict:
    "Measure everything with views of one size."
    dls = load(args.data, size, n, batch)
    pixels = {}
    n = len(dls.train) * batch
    works = {name: partial(one_pass, name, batches, n, pixels)
             for name, batches in passes(size, dls, args).items()}
    with kept_memory(): speeds = rounds(works, args.repeats, warm=2)  # memory as in training
    theirs = speeds["lightly"]["median"]
    roof = limit(size)
    return dict(
        images_timed=n, batch=batch, policy=repr(TwoViews(dls.policy)), speeds=speeds,
        pixels=pixels, ratios={name: round(s["median"] / theirs, 2) for name, s in speeds.items()},
        limit=roof, share_of_limit=round(speeds["ours"]["median"] / roof["images_per_s"], 4))


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    card = header("two augmented views of an image, images/s", args,
                  "torchvision", "lightly", "kornia", "pillow")
    small = measure_size(32, args.images, args.batch, args)
    gc.collect()  # ends the workers of its loaders
    sizes = {"32": small, "224": measure_size(224, args.photos, args.few, args)}
    return finish(dict(card, differences=DIFFERENCES, sizes=sizes),
                  *(s for found in sizes.values() for s in found["speeds"].values()))


def rows(size: str, found: dict) -> list[str]:
    "A table of one size, and its roof."
    ratios = found["ratios"]
    roof = found["limit"]
    return [
        f"| images/s, two views of {size} px | median | lowest | highest | to lightly |",
        "|---|---:|---:|---:|---:|",
        *(f"| {WAYS[name]} | {bounds(speed, ',.0f')} | {ratios[name]} |"
          for name, speed in found["speeds"].items()),
        "", f"{found['images_timed']:,} images a pass in batches of {found['batch']}. Roof: "
        f"{roof['images_per_s']:,} images/s (copy {roof['copy_gb_per_s']} GB/s, crops alone "
        f"{roof['crops_per_s']:,} images/s); ours reach {found['share_of_limit']:.1%} of it.",
        ""]


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s = card["settings"]
    lines = [line for part in card["sizes"].items() for line in rows(*part)]
    images = "Noise" if s["data"] == "random" else "CIFAR-10; the sample of ImageNet at 256 px"
    what = (f"{images}. {s['repeats']} passes. Batched: threads: {s['threads']}; others: workers: "
            f"{s['workers']}.")
    return "\n".join([*lines, *closing(card, what)]) + "\n"


def main():
    parser = parser_of(
        __doc__, images=(10_000, "for views of 32 px"), batch=(512, "of them in a batch"),
        photos=(640, "images for views of 224 px"), few=(64, "of them in a batch"),
        repeats=(7, "timed passes of each"),
        workers=(2, "processes, for those that use them", 0),
        threads=(machine()["cores"], "threads of torch, for the others"))
    parser.add_argument("--data", choices=["real", "random"], default="real", help="images")
    args = parser.parse_args()
    card = measure(args)
    write("augment", card, table(card), args.output)


if __name__ == "__main__": main()
