"""Images per second that get two augmented views at 32 px: ours beside what others offer.

All make the views of the CIFAR-10 policy from the same images, in turns, in one run.
"""
import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from common import bounds, closing, finish, header, machine, parser_of, rate, rounds, write
from peers import kornia_views, lightly_views, one_by_one, solo_views, torchvision_views
from simclr_nb.arrays import ImageArrays
from simclr_nb.augment import TwoViews
from simclr_nb.data import SimCLRDataLoaders, Source, simclr_dls
from simclr_nb.fused import compiled_views

SIZE = 32
WAYS = dict(ours="ours, compiled", eager="ours, operators", kornia="kornia, batched",
            lightly="lightly", solo="solo-learn's recipe", torchvision="torchvision v2")
DIFFERENCES = (
    "Alike: boxes, flips, probabilities, ranges, random order of the colour operators, no blur, no "
    "normalisation. Unlike: lightly and solo-learn work on Pillow images one by one and round to 8 "
    "bits after each operator, torchvision on 8-bit tensors; ours and kornia on batches of floats. "
    "solo-learn resizes by a cubic; kornia has one order of the colour operators for a batch.")


def load(data: str, n: int, batch: int, device: str) -> SimCLRDataLoaders:
    "Shuffled uint8 batches from memory: real CIFAR-10, or noise."
    if data == "random":
        noise = torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8)
        arrays = ImageArrays(noise, torch.full((n,), -1))
        data = Source("random", arrays, arrays)
    return simclr_dls(
        data, SIZE, batch, "cifar", n_train=n, n_valid=2, seed=0, device=device, progress=False)


def passes(args: argparse.Namespace, dls: SimCLRDataLoaders) -> dict[str, Callable[[], Iterable]]:
    "For each way, what goes over all images once and yields lists of views."
    images, plain = list(dls.train.dataset.images), TwoViews(dls.policy)
    fast, kornia = compiled_views(plain), kornia_views(SIZE)
    batched = dict(ours=lambda x: [fast(x)], eager=lambda x: [plain(x)], kornia=kornia)
    others = dict(lightly=lightly_views, solo=solo_views, torchvision=torchvision_views)
    loaders = {name: one_by_one(make(SIZE), images, args) for name, make in others.items()}
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


def limit() -> dict:
    """Roof for this method on this CPU: the slower of two parts, each alone and at full rate.

    Memory: uint8 images are read once and two float views written once. Arithmetic: each view is
    cropped by two matrix products. Colour counts for nothing here, so the roof is not reachable.
    """
    a, b, pixels = torch.ones(2, 2**26), torch.ones(1024, 1024), 3 * SIZE**2
    copy = rate(lambda: a[0].copy_(a[1]), 2 * a[0].nbytes)
    product = rate(lambda: b @ b, 2 * 1024**3)
    n_bytes, n_flop = pixels + 2 * 4 * pixels, 2 * 2 * 2 * pixels * SIZE
    return dict(copy_gb_per_s=round(copy / 1e9, 2), product_gflop_per_s=round(product / 1e9, 1),
                bytes_per_image=n_bytes, flop_per_image=n_flop,
                images_per_s=round(min(copy / n_bytes, product / n_flop)))


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    card = header("two augmented views of an image at 32 px, images/s", args,
                  "torchvision", "lightly", "kornia", "pillow")
    dls, pixels = load(args.data, args.images, args.batch, "cpu"), {}
    n = len(dls.train) * args.batch
    works = {name: partial(one_pass, name, batches, n, pixels)
             for name, batches in passes(args, dls).items()}
    speeds = rounds(works, args.repeats)
    theirs, roof = speeds["lightly"]["median"], limit()
    return finish(dict(
        card, images_timed=n, policy=repr(TwoViews(dls.policy)), differences=DIFFERENCES,
        speeds=speeds, pixels=pixels, limit=roof,
        ratios={name: round(s["median"] / theirs, 2) for name, s in speeds.items()},
        share_of_limit=round(speeds["ours"]["median"] / roof["images_per_s"], 4)), *speeds.values())


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s, ratios, roof = card["settings"], card["ratios"], card["limit"]
    lines = ["| images/s, two views of each | median | lowest | highest | to lightly |",
             "|---|---:|---:|---:|---:|"]
    lines += [f"| {WAYS[name]} | {bounds(speed, ',.0f')} | {ratios[name]} |"
              for name, speed in card["speeds"].items()]
    what = (f"{s['data']}, {card['images_timed']:,} images a pass, {s['repeats']} passes, batches "
            f"of {s['batch']}. Batched: threads: {s['threads']}; others: workers: {s['workers']}.")
    roof = (f"Roof: {roof['images_per_s']:,} images/s (copy {roof['copy_gb_per_s']} GB/s, products "
            f"{roof['product_gflop_per_s']} GFLOP/s); ours reach {card['share_of_limit']:.1%} of "
            "it.")
    return "\n".join([*lines, "", *closing(card, what), roof]) + "\n"


def main():
    parser = parser_of(
        __doc__, images=(10_000, "how many of them"), repeats=(7, "timed passes of each"),
        batch=(512, "images in a batch"), workers=(2, "processes, for those that use them", 0),
        threads=(machine()["cores"], "threads of torch, for the others"))
    parser.add_argument("--data", choices=["cifar10", "random"], default="cifar10", help="images")
    args = parser.parse_args()
    card = measure(args)
    write("augment", card, table(card), args.output)


if __name__ == "__main__": main()
