"""Cost of the package itself: seconds to import it, and memory of CIFAR-10 in memory.

Imports are timed in fresh interpreters, in turns: torch, torchvision and fastai's `Learner` alone,
and the same followed by `simclr_nb.learner`. Memory is that of a fresh process which reads the
images and passes over them once, beside the bytes of the images; the C library gives freed blocks
back at once (`MALLOC_MMAP_THRESHOLD_`), so that the system counts what is held.
"""
import argparse
import gc
import json
import subprocess
import sys
from statistics import median

from common import (GIVE_BACK, MIB, bounds, closing, finish, header, own_process,
                    parser_of, resident, rounds, write)
from simclr_nb.images.arrays import ImageArrays
from simclr_nb.images.source import Source
from simclr_nb.data import simclr_dls

BASE = "torch, torchvision, fastai.learner"
IMPORTS = dict(base=BASE, package=f"{BASE}, simclr_nb.learner")


def import_seconds(modules: str) -> float:
    "Seconds that a fresh interpreter takes to import some modules."
    code = f"import time; start = time.perf_counter(); import {modules}; " \
           "print(time.perf_counter() - start)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return round(float(done.stdout), 3)


def measure_memory(args: argparse.Namespace) -> dict:
    "MiB of the images, and what reading them and an epoch hold and held at most; a fresh process."
    import torch

    few = ImageArrays(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4).long())
    list(simclr_dls(Source("few", few, few), bs=2, device="cpu").train)  # first calls allocate
    gc.collect()
    before = resident("VmRSS")

    def above(field: str) -> float:
        gc.collect()
        return round((resident(field) - before) / MIB, 1)
    n_train = args.images
    n_valid = args.valid
    dls = simclr_dls("cifar10", n_train=n_train, n_valid=n_valid, seed=0, device="cpu",
                     progress=False)
    read = above("VmRSS")
    arrays = [dl.dataset for dl in dls.loaders]
    for x, y in dls.train: pass
    images = sum(a.images.nbytes for a in arrays) / MIB
    return dict(images_mib=round(images, 1), read_mib=read, held_mib=above("VmRSS"),
                peak_mib=above("VmHWM"))


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    card = header("seconds of an import, and MiB", args, "torchvision", "fastai")
    works = {k: lambda m=modules: import_seconds(m) for k, modules in IMPORTS.items()}
    found = rounds(works, args.repeats)
    extra = [b - a for a, b in zip(found["base"]["runs"], found["package"]["runs"])]
    memory = own_process(__file__, GIVE_BACK, part="memory", images=args.images, valid=args.valid)
    for kind in ("held", "peak"):
        memory[f"{kind}_ratio"] = round(memory[f"{kind}_mib"] / memory["images_mib"], 3)
    return finish(dict(card, imports=found, extra_seconds=round(median(extra), 3), memory=memory),
                  *found.values())


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s = card["settings"]
    m = card["memory"]
    lines = ["| import | median s | lowest | highest |", "|---|---:|---:|---:|"]
    lines += [f"| {IMPORTS[name]} | {bounds(found, '.2f')} |"
              for name, found in card["imports"].items()]
    what = f"{s['repeats']} fresh interpreters of each; memory of one process."
    held, most = (f"{m[f'{k}_mib']:,.0f}" for k in ("held", "peak"))
    return "\n".join([
        *lines, "", f"The package adds **{card['extra_seconds']:.2f}** s, the median over pairs.",
        f"{s['images']:,} training and {s['valid']:,} validation images of CIFAR-10 are "
        f"{m['images_mib']:,.0f} MiB. After an epoch the process holds {held} MiB more than before "
        f"it read them, **{m['held_ratio']:.2f}** times the images; at most it held {most} MiB, "
        f"{m['peak_ratio']:.2f} times.", *closing(card, what)]) + "\n"


def options() -> argparse.ArgumentParser:
    parser = parser_of(
        __doc__, images=(50_000, "for training", 2), valid=(10_000, "for validation", 2),
        repeats=(7, "timed imports of each"))
    parser.add_argument("--part", choices=["memory"], help=argparse.SUPPRESS)
    return parser


def main():
    args = options().parse_args()
    if args.part: return print(json.dumps(measure_memory(args)))
    card = measure(args)
    write("footprint", card, table(card), args.output)


if __name__ == "__main__": main()
