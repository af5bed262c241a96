"""Photos per second: decoded whole by Pillow and by torchvision, read by us, cropped twice by us.

The same files, in turns, in one run, in one process and in several; each process has one thread and
keeps the pixels to itself. Files were read before, so that the disk counts for nothing.
"""
import argparse
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from common import bounds, closing, finish, header, machine, parser_of, rate, rounds, write
from simclr_nb.images.pixels import read_image
from simclr_nb.views.policy import create_policy
from simclr_nb.images.files import ImageFiles

WAYS = dict(pillow="Pillow, whole photos", torchvision="torchvision, whole photos",
            read_image="ours, `read_image`: upright, checked",
            two_crops="ours, `ImageFiles`: decoded once, two crops")
SAMPLE = "imagenet_sample"
WHOLE = "pillow", "torchvision"  # the roof for whoever decodes whole photos


def photos(folder: str) -> list[str]:
    "JPEG files of a folder; the sample of ImageNet is looked for in fastai's data folder."
    if folder == SAMPLE:
        from fastai.data.external import fastai_cfg
        folder = fastai_cfg().path("data") / folder
    found = sorted(map(str, Path(folder).rglob("*.[jJ][pP]*[gG]")))
    if not found: raise SystemExit(f"no JPEG files in {folder}: name a folder by --folder")
    return found


def read(way: str, paths: list[str], size: int) -> None:
    "Decode these files in one of `WAYS`."
    if way == "two_crops":
        files = ImageFiles(paths, torch.zeros(len(paths)), create_policy("paper", size).crop)
        for i in range(len(files)): files[i]
        return
    for path in paths:
        if way == "pillow": Image.open(path).convert("RGB")
        elif way == "torchvision": decode_jpeg(read_file(path), ImageReadMode.RGB)
        else: read_image(path)


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    card = header("photos decoded per second", args, "torchvision", "pillow")
    card["settings"]["folder"] = Path(args.folder).name
    paths = photos(args.folder) * args.copies
    sizes = [Image.open(path).size for path in paths]
    counts = sorted({1, args.processes})
    context = get_context("fork")
    pools = {n: context.Pool(n, torch.set_num_threads, (1,)) for n in counts}

    def speed(way: str, n: int) -> float:
        parts = [(way, paths[i::4 * n], args.size) for i in range(4 * n)]
        return round(rate(partial(pools[n].starmap, read, parts, 1), len(paths), 1), 1)
    works = {f"{way} {n}": partial(speed, way, n) for n in counts for way in WAYS}
    found = rounds(works, args.repeats)
    for pool in pools.values(): pool.terminate()
    speeds = {str(n): {way: found[f"{way} {n}"] for way in WAYS} for n in counts}
    roofs = {n: max(ways[way]["median"] for way in WHOLE) for n, ways in speeds.items()}
    shares = {n: round(ways["two_crops"]["median"] / roofs[n], 3) for n, ways in speeds.items()}
    pixels = sum(w * h for w, h in sizes) / len(sizes)
    return finish(dict(
        card, photos=len(paths), mean_megapixels=round(pixels / 1e6, 3), speeds=speeds, limit=roofs,
        share_of_limit=shares), *found.values())


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s = card["settings"]
    lines = []
    for n, ways in card["speeds"].items():
        lines += [f"| photos/s, processes: {n} | median | lowest | highest |",
                  "|---|---:|---:|---:|"]
        lines += [f"| {WAYS[way]} | {bounds(found, ',.0f')} |" for way, found in ways.items()]
        lines.append("")
    shares = ", ".join(f"{share:.0%} with processes: {n}"
                       for n, share in card["share_of_limit"].items())
    what = (f"{card['photos']:,} photos of {card['mean_megapixels']:.2f} megapixels on average, "
            f"crops of {s['size']} px, {s['repeats']} passes of each.")
    lines += [f"Two crops, as a share of the faster way to decode whole photos: {shares}.",
              *closing(card, what)]
    return "\n".join(lines) + "\n"


def options() -> argparse.ArgumentParser:
    parser = parser_of(
        __doc__, processes=(machine()["cores"], "beside one"), size=(224, "side of the crops"),
        copies=(4, "times that each photo is read in a pass"), repeats=(7, "timed passes of each"))
    parser.add_argument("--folder", default=SAMPLE, help=f"with JPEG files ({SAMPLE})")
    return parser


def main():
    args = options().parse_args()
    torch.set_num_threads(1)
    card = measure(args)
    write("decode", card, table(card), args.output)


if __name__ == "__main__": main()
