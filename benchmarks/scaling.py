"""How time and memory grow: the loss with the batch, a step with the image.

The loss is that of `loss.py`: ours and, as far as its matrices fit in the memory allowed, that of
lightly. A step is that of `step.py`: ours, eager, channels last, fp32.
"""
import argparse
from functools import partial

import torch

import loss
from common import (bounds, closing, finish, header, machine, network_rate, parser_of, rounds,
                    timed, write)
from step import create_model, create_step, flop

ARCH = "resnet18"
VARIANT = "fp32 channels_last eager"
SIZES = (32, 64, 96, 128)
GIB = 2**30
MATRICES = 4.3  # of similarities that lightly's loss holds at a time, as measured by loss.py
SHORT = 0.05  # seconds below which runs say nothing on whether the machine was idle


def batches(args: argparse.Namespace) -> list[int]:
    "Powers of two between the smallest and the largest batch."
    return [args.least << i for i in range(20) if args.least << i <= args.most]


def fits(n: int, args: argparse.Namespace) -> bool:
    "Whether lightly's loss of so many images fits in the memory allowed."
    return MATRICES * 4 * (2 * n)**2 <= args.gib * GIB


def loss_at(n: int, args: argparse.Namespace) -> dict:
    "Seconds and peaks of the loss of a batch, and the least time of its products."
    names = ["ours", "lightly"] if fits(n, args) else ["ours"]
    args = argparse.Namespace(dim=args.dim, temperature=0.5, device="cpu", threads=args.threads,
                              repeats=args.repeats)
    if len(names) > 1: found = loss.losses_at(n, names, args)
    else:
        peak = loss.peak_of_process("ours", n, args)["peak_mib"]
        found = dict(ours=dict(loss.times(names, n, args)["ours"], peak_mib=peak))
    roof = loss.limit(n, args)["seconds"]
    ratio = loss.ratios(found).get("lightly")
    return dict(losses=found, limit_seconds=roof, ratio=ratio,
                share_of_limit=round(roof / found["ours"]["median"], 3))


def sizes(args: argparse.Namespace) -> dict:
    "Seconds of a step at several sizes of the image, in turns."
    def work(size: int):
        x = torch.rand(2 * args.batch, 3, size, size)
        return partial(timed, create_step(create_model(ARCH, args.width, size), x, VARIANT))
    found = rounds({str(s): work(s) for s in SIZES}, args.repeats)
    peak = network_rate()
    for size, s in found.items():
        share = flop(ARCH, args.batch, args.width, int(size)) / s["median"] / peak
        s.update(images_per_s=round(args.batch / s["median"], 1), share_of_peak=round(share, 3))
    return found


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    card = header("seconds and MiB as sizes grow", args, "lightly")
    losses = {str(n): loss_at(n, args) for n in batches(args)}
    steps = sizes(args)
    spreads = [s for at in losses.values() for s in at["losses"].values() if s["median"] > SHORT]
    return finish(dict(card, losses=losses, sizes=steps), *spreads, *steps.values())


def loss_rows(card: dict) -> list[str]:
    "Of the table of losses."
    lines = []
    for n, at in card["losses"].items():
        (ours, *others), ratio = at["losses"].values(), at["ratio"]
        theirs = [f"{1e3 * s['median']:,.1f} | {s['peak_mib']:,.0f} | {ratio['time']} | "
                  f"{ratio['memory']}" for s in others] or ["does not fit | | |"]
        own = " | ".join(f"{1e3 * ours[k]:,.1f}" for k in ("median", "min", "max"))
        lines.append(f"| {int(n):,} | {own} | {ours['peak_mib']:,.1f} | "
                     f"{at['share_of_limit']:.0%} | {theirs[0]} |")
    return lines


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s = card["settings"]
    what = (f"Loss: D = {s['dim']}, float32. Steps: {ARCH}, width {s['width']:g}, {s['batch']} "
            f"images, {VARIANT}; up to 64 px the CIFAR stem. {s['repeats']} runs of each. "
            f"Threads: {s['threads']}.")
    return "\n".join([
        "| images | ours, median ms | lowest | highest | peak MiB | of limit | lightly, median ms "
        "| peak MiB | times our time | times our memory |", "|" + "---:|" * 10, *loss_rows(card),
        "", "| step, image size | median s | lowest | highest | images/s | of peak |",
        "|---|" + "---:|" * 5,
        *(f"| {k} px | {bounds(v, '.3f')} | {v['images_per_s']:,.1f} | {v['share_of_peak']:.0%} |"
          for k, v in card["sizes"].items()),
        "", *closing(card, what)]) + "\n"


def options() -> argparse.ArgumentParser:
    parser = parser_of(
        __doc__, least=(256, "images of the smallest loss", 2), most=(32_768, "of the largest", 2),
        gib=(8, "GiB that lightly's loss may ask for", 0), dim=(128, "width of the projections"),
        batch=(32, "images of a step", 2), repeats=(5, "timed rounds"),
        threads=(machine()["cores"], "of torch"))
    parser.add_argument("--width", type=float, default=1.0, help="of the encoder (1)")
    return parser


def main():
    args = options().parse_args()
    torch.set_num_threads(args.threads)
    card = measure(args)
    write("scaling", card, table(card), args.output)


if __name__ == "__main__": main()
