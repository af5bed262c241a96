"""Images per second of one batch in one process and in two, and what their exchange costs.

A step is that of `step.py`: ours, eager, channels last, fp32, in kept memory as in training. Two
processes, with one thread each, share its images. First they exchange nothing: that is what the
machine allows. Then they exchange, one after another, the gradients, the statistics of BatchNorm
and the negatives of the loss, over gloo; with all three they train as one process would.
"""
import argparse
import json
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel

from common import (bounds, closing, finish, header, own_process, parser_of, rounds, spread, timed,
                    write)
from simclr_nb.core.processes import kept_memory, launch, world_size
from simclr_nb.loss.tiled import NTXent
from simclr_nb.parallel.loss import global_loss
from simclr_nb.parallel.norm import to_global_batch_norm
from step import create_model, create_step

ARCH, SIZE = "resnet18", 32
VARIANT = "fp32 channels_last eager"
WAYS = {"1 process, 1 thread": (1, 1, 0), "1 process, 2 threads": (1, 2, 0),
        "2 processes that exchange nothing": (2, 2, 0), "and with the gradients": (2, 2, 1),
        "and with BatchNorm's statistics": (2, 2, 2), "and with the negatives: all": (2, 2, 3)}


def own_steps(batch: int, width: float, repeats: int, exchanged: int) -> list[float]:
    "Seconds of some steps in one of the processes that share a batch, after two to warm up."
    torch.manual_seed(0)
    model = create_model(ARCH, width, SIZE).to(memory_format=torch.channels_last)
    if exchanged > 1: model = to_global_batch_norm(model)
    if exchanged: model = DistributedDataParallel(model, broadcast_buffers=False)
    x = torch.rand(2 * (batch // world_size()), 3, SIZE, SIZE)
    criterion = global_loss(NTXent()) if exchanged > 2 else NTXent()
    step = create_step(model, x, VARIANT, criterion)
    with kept_memory(): return [timed(step) for _ in range(2 + repeats)][2:]


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    card = header("images/s of a batch in one process and two", args)
    for name in ("exchanged", "threads"): del card["settings"][name]  # of parts

    def speed(count: int, threads: int, exchanged: int) -> float:
        steps = own_process(__file__, part=count, threads=threads, exchanged=exchanged,
                            batch=args.batch, width=args.width, inner=args.inner)
        return round(args.batch / spread(steps)["median"], 2)
    found = rounds({name: partial(speed, *way) for name, way in WAYS.items()}, args.repeats)
    limit = found["2 processes that exchange nothing"]["median"]
    shares = {name: round(s["median"] / limit, 3) for name, s in found.items()}
    return finish(dict(card, speeds=found, shares=shares), *found.values())


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s = card["settings"]
    lines = ["| images/s | median | lowest | highest | of what the machine allows |",
             "|---|---:|---:|---:|---:|"]
    lines += [f"| {name} | {bounds(found)} | {card['shares'][name]:.0%} |"
              for name, found in card["speeds"].items()]
    what = (f"{ARCH}, width {s['width']:g}, {SIZE} px, {s['batch']} images, {VARIANT}; "
            f"{s['repeats']} runs of each, of {s['inner']} steps.")
    return "\n".join([*lines, "", *closing(card, what)]) + "\n"


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, batch=(32, "images of a step", 2),
                       inner=(5, "steps of a process, in each round"), repeats=(5, "timed rounds"),
                       threads=(2, "of torch in a part"), exchanged=(0, "by a part: 0 to 3", 0))
    parser.add_argument("--width", type=float, default=1.0, help="of the encoder (1)")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    return parser


def main():
    args = options().parse_args()
    if args.part:
        torch.set_num_threads(args.threads)
        found = launch(own_steps, args.batch, args.width, args.inner, args.exchanged,
                       processes=args.part)
        return print(json.dumps([max(times) for times in zip(*found)]))
    card = measure(args)
    write("processes", card, table(card), args.output)


if __name__ == "__main__": main()
