"""Images per second from JPEG files to two views of 224 px: ours beside what others offer.

Decoding, two crops, colours and blur of the paper's policy, end to end, in turns, in one run.
"""
import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from common import bounds, closing, finish, header, machine, parser_of, rate, rounds, write
from decode import SAMPLE, photos
from peers import lightly_views, one_by_one, solo_views, torchvision_views
from simclr_nb.views.two_views import TwoViews
from simclr_nb.views.policy import paper_policy
from simclr_nb.images.files import ImageFiles
from simclr_nb.views.compiled import compiled_views
from simclr_nb.images.epochs import EpochLoader
from simclr_nb.core.processes import kept_memory

WAYS = dict(ours="ours, compiled", eager="ours, operators", crops="ours, decoded and cropped alone",
            lightly="lightly", solo="solo-learn's recipe", torchvision="torchvision v2")
DIFFERENCES = (
    "Alike: probabilities and ranges of crop, flip, colours and blur; no normalisation. Workers of "
    "ours decode and crop, the main process does the rest in batches of floats, and keeps its "
    "memory; those of the others do all. lightly and solo-learn use Pillow in 8 bits, and its "
    "blur, an approximation by boxes; solo-learn resizes by a cubic; torchvision works on 8-bit "
    "tensors.")


def passes(args: argparse.Namespace) -> dict[str, Callable[[], Iterable]]:
    "For each way, what goes over all photos once and yields views."
    paths = photos(args.folder) * args.copies
    policy = paper_policy(args.size)
    labels = torch.zeros(len(paths), dtype=torch.long)
    files = ImageFiles(list(map(Path, paths)), labels, policy.crop)
    ours = EpochLoader(files, args.batch, num_workers=args.workers)
    plain = TwoViews(policy)
    others = dict(
        lightly=lightly_views(args.size), solo=solo_views(args.size),
        torchvision=torchvision_views(args.size))
    views = dict(ours=compiled_views(plain), eager=plain, crops=lambda pairs: pairs)
    ways = {name: partial(map, lambda b, f=f: f(b[0]), ours) for name, f in views.items()}
    ways |= {name: partial(iter, one_by_one(f, paths, args.batch, args.workers))
             for name, f in others.items()}
    return {name: ways[name] for name in WAYS}


def one_pass(batches: Callable, n: int) -> float:
    "Images per second."
    start = time.perf_counter()
    for views in batches(): pass
    return round(n / (time.perf_counter() - start), 1)


def views_alone(args: argparse.Namespace) -> float:
    "Images per second that get colours and blur, compiled, when nothing is decoded."
    pairs = torch.randint(0, 256, (args.batch, 2, 3, args.size, args.size), dtype=torch.uint8)
    fast = compiled_views(TwoViews(paper_policy(args.size)))
    return round(rate(lambda: fast(pairs), args.batch), 1)


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    card = header("JPEG files to two views, images/s", args, "torchvision", "lightly", "pillow")
    card["settings"]["folder"] = Path(args.folder).name
    ways = passes(args)
    n = len(photos(args.folder)) * args.copies
    n = n // args.batch * args.batch
    with kept_memory():  # as in training
        works = {name: partial(one_pass, way, n) for name, way in ways.items()}
        speeds = rounds(works, args.repeats)
        alone = views_alone(args)
    theirs = speeds["lightly"]["median"]
    crops = speeds["crops"]["median"]
    limit = machine()["cores"] / (args.threads / alone + args.workers / crops)
    return finish(dict(
        card, images_timed=n, differences=DIFFERENCES, speeds=speeds,
        ratios={name: round(s["median"] / theirs, 2) for name, s in speeds.items()},
        views_alone=alone, limit=round(limit, 1),
        share_of_limit=round(speeds["ours"]["median"] / limit, 3)), *speeds.values())


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s = card["settings"]
    ratios = card["ratios"]
    lines = ["| images/s, from file to two views | median | lowest | highest | to lightly |",
             "|---|---:|---:|---:|---:|"]
    lines += [f"| {WAYS[name]} | {bounds(speed, ',.0f')} | {ratios[name]} |"
              for name, speed in card["speeds"].items()]
    what = (f"{s['folder']}, {s['size']} px, {card['images_timed']:,} photos a pass, "
            f"{s['repeats']} passes, batches of {s['batch']}, workers: {s['workers']}, threads: "
            f"{s['threads']}.")
    roof = (f"Colours and blur alone: {card['views_alone']:,.0f} images/s; after decoding and "
            f"cropping, on the same cores, {card['limit']:,.0f}. Ours reach "
            f"{card['share_of_limit']:.0%} of that.")
    return "\n".join([*lines, "", *closing(card, what), roof]) + "\n"


def main():
    parser = parser_of(
        __doc__, copies=(16, "of each photo in a pass"), repeats=(5, "timed passes of each"),
        batch=(64, "photos in a batch"), workers=(2, "processes"), size=(224, "side of the views"),
        threads=(1, "of torch, in the main process, beside the workers"))
    parser.add_argument("--folder", default=SAMPLE, help="JPEG files (the sample of ImageNet)")
    args = parser.parse_args()
    card = measure(args)
    write("photos", card, table(card), args.output)


if __name__ == "__main__": main()
