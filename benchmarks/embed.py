"""Images per second from files to a table of representations: `simclr-embed` beside lightly's `lightly-embed`.

The same encoder, the same small PNG files, in turns, in one run; one thread each, on one core.
"""
import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torchvision import transforms as T
from torch.utils.data import DataLoader

from common import bounds, closing, finish, header, parser_of, rounds, timed, write
from simclr_nb.images.source import find_images
from simclr_nb.model.encoder import create_encoder
from simclr_nb.run.embedding import embed
from simclr_nb.run.vector_files import read_vectors

WAYS = dict(npy="ours, to .npy", csv="ours, to .csv", parquet="ours, to .parquet",
            command="lightly's command: batches of 16, to .csv",
            batched="lightly's functions: batches of ours, to .csv",
            unwritten="lightly's functions: batches of ours, nothing written")
DIFFERENCES = (
    "Alike: files, encoder, 32 px, float32, one thread on one core, files read by the same "
    "process. lightly's command takes batches of 16 and writes CSV; with its functions it gets our "
    "batches. Normalisation is off. Ours also writes pieces to go on with, and a card.")


def pictures(source: Path, folder: Path, n: int) -> None:
    "Links to so many images, in folders by class, evenly from all over."
    files = find_images(source)
    if len(files) < n: raise SystemExit(f"{source} has {len(files):,} images, fewer than {n:,}")
    for i in range(n):
        file = files[i * len(files) // n]
        link = folder / file.parent.name / f"{i:05}{file.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())


def theirs(encoder, folder: Path, out: Path | None, bs: int, size: int) -> np.ndarray:
    "The steps of `lightly.cli.embed_cli` after it has built its model, without normalisation."
    from lightly.data import LightlyDataset
    from lightly.embedding import SelfSupervisedEmbedding
    from lightly.utils.io import save_embeddings

    transform = T.Compose([T.Resize((size, size)), T.ToTensor()])
    loader = DataLoader(LightlyDataset(str(folder), transform=transform), bs, num_workers=0)
    model = SimpleNamespace(backbone=encoder, eval=encoder.eval)
    found = SelfSupervisedEmbedding(model, None, None, None).embed(loader, torch.device("cpu"))
    if out: save_embeddings(str(out), *found)
    return found[0]


def ours(encoder, folder: Path, out: Path, bs: int, size: int) -> np.ndarray:
    "A new file, from the first image on."
    for file in out.parent.glob(f"{out.name}*"): file.unlink()
    return embed(encoder, folder, out, size=size, bs=bs, workers=0, progress=False).read().h


def ways(args: argparse.Namespace, encoder, folder: Path, out: Path) -> dict[str, Callable]:
    "For each way, what goes over all images once."
    mine = {kind: partial(ours, encoder, folder, out / f"x.{kind}", args.bs, args.size)
            for kind in ("npy", "csv", "parquet")}
    other = partial(theirs, encoder, folder)
    return mine | dict(command=partial(other, out / "theirs.csv", 16, args.size),
                       batched=partial(other, out / "theirs.csv", args.bs, args.size),
                       unwritten=partial(other, None, args.bs, args.size))


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    torch.set_num_threads(1)
    card = header("files to representations, images/s", args, "torchvision", "lightly", "pillow",
                  "pyarrow")
    card["settings"]["data"] = "/".join(Path(args.data).parts[-2:])
    if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.manual_seed(0)
    encoder = create_encoder(args.arch, stem=args.stem, zero_init_last=False).eval()
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "images", Path(place)
        pictures(Path(args.data), folder, args.images)
        works = ways(args, encoder, folder, out)
        difference = np.abs(works["unwritten"]() - works["npy"]()).max()
        names = read_vectors(out / "x.npy").names
        if sorted(names) != names: raise SystemExit("another order than lightly's")
        speeds = rounds({name: lambda work=work: round(args.images / timed(work), 1)
                         for name, work in works.items()}, args.repeats, warm=0)
    return finish(dict(
        card, differences=DIFFERENCES, largest_difference=float(difference), speeds=speeds,
        ratios={name: round(s["median"] / speeds["command"]["median"], 2)
                for name, s in speeds.items()},
        ratios_same_batch={name: round(speeds[name]["median"] / speeds["batched"]["median"], 2)
                           for name in ("npy", "csv", "parquet")}), *speeds.values())


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s = card["settings"]
    lines = ["| images/s, from file to table | median | lowest | highest | to lightly's command |",
             "|---|---:|---:|---:|---:|"]
    lines += [f"| {WAYS[name]} | {bounds(speed, ',.0f')} | {card['ratios'][name]} |"
              for name, speed in card["speeds"].items()]
    same = card["ratios_same_batch"]
    what = (f"{s['images']:,} images of {s['data']}, {s['arch']} with the {s['stem']} stem, "
            f"{s['size']} px, batches of {s['bs']}, one thread, {s['repeats']} passes of each.")
    note = (f"To lightly with the same batches: {same['csv']} (.csv), {same['npy']} (.npy). Largest "
            f"difference between both tables: {card['largest_difference']:.1e}.")
    return "\n".join([*lines, "", note, *closing(card, what)]) + "\n"


def main():
    parser = parser_of(
        __doc__, images=(20_000, "files"), repeats=(3, "timed passes of each", 3),
        bs=(256, "images in a batch of ours"), size=(32, "side of the images"))
    parser.add_argument("--data", default="~/.fastai/data/cifar10/train", type=os.path.expanduser,
                        help="folder of small images, by class (CIFAR-10's training images)")
    parser.add_argument("--arch", default="resnet18", help="encoder (resnet18)")
    parser.add_argument("--stem", default="imagenet", help="its first layers (imagenet)")
    args = parser.parse_args()
    card = measure(args)
    write("embed", card, table(card), args.output)


if __name__ == "__main__": main()
