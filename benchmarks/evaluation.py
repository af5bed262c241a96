"""Seconds of what is done with representations besides linear evaluation: t-SNE, and a k-NN vote.

t-SNE is scikit-learn's as `tsne` calls it, so there is no peer; the vote is the one of each epoch
(`KNNCallback`). Random vectors around as many centres as there are classes, in turns, in one run.
`knn.py` and `logistic.py` compare with others at full size.
"""
import argparse

import torch
from torch import Tensor

from common import bounds, closing, finish, header, machine, parser_of, rounds, timed, write
from simclr_nb.measure.neighbours import knn_predict
from simclr_nb.measure.geometry import tsne

CLASSES = 10
NEIGHBOURS = 20
TEMPERATURE = 0.1


def data(n: int, dim: int) -> tuple[Tensor, Tensor]:
    "Vectors around centres `(n, dim)`, and their classes."
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (n,), generator=generator)
    centres = torch.randn(CLASSES, dim, generator=generator)
    return centres[y] + torch.randn(n, dim, generator=generator), y


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    card = header("t-SNE and k-NN vote, seconds", args, "scikit-learn", "numpy")
    (h, y), m = data(max(args.large, args.small, 2 * args.bank), args.dim), args.bank
    works = {
        f"t-SNE, {args.small:,} points": lambda: tsne(h[:args.small], method="sklearn"),
        f"t-SNE, {args.large:,} points": lambda: tsne(h[:args.large], method="sklearn"),
        f"k-NN vote, {m:,} images on {m:,}": lambda: knn_predict(
            h[:m], y[:m], h[m:2 * m], min(NEIGHBOURS, m), TEMPERATURE)}
    found = rounds({k: lambda work=work: timed(work) for k, work in works.items()}, args.repeats)
    return finish(dict(card, works=found), *found.values())


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s = card["settings"]
    lines = ["| | median s | lowest | highest |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {bounds(found, ',.3f')} |" for name, found in card["works"].items()]
    what = f"D = {s['dim']}, {s['repeats']} runs of each. Threads: {s['threads']}."
    return "\n".join([*lines, "", *closing(card, what)]) + "\n"


def options() -> argparse.ArgumentParser:
    return parser_of(
        __doc__, small=(2_000, "points of the smaller map", 10),
        large=(10_000, "of the larger one", 10),
        bank=(4_096, "images that vote, and as many that are asked"), dim=(512, "of the vectors"),
        repeats=(5, "timed runs of each"), threads=(machine()["cores"], "of torch"))


def main():
    args = options().parse_args()
    torch.set_num_threads(args.threads)
    card = measure(args)
    write("evaluation", card, table(card), args.output)


if __name__ == "__main__": main()
