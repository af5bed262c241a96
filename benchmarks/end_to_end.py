"""Images per second of pretraining on CIFAR-10 in memory, from uint8 images to updated weights.

In turns, in one run: the loop that lightly documents, a bare loop of our parts, `learn.pretrain`
with the very same parts, and that compiled. The same images, batch, network, head, loss, optimiser
and learning rate, all in fp32.
"""
import argparse
import io
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from statistics import median
from time import perf_counter

import torch
from fastai.callback.core import Callback
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from common import (bounds, closing, finish, header, machine, parser_of, product_rate, rounds,
                    write)
from peers import Transformed, lightly_views, peer, torchvision_encoder
from simclr_nb.arrays import ImageArrays, load_arrays
from simclr_nb.augment import TwoViews
from simclr_nb.data import SimCLRDataLoaders, Source, cifar10_source, simclr_dls
from simclr_nb.encoder import create_encoder
from simclr_nb.head import SimCLR, projection_head
from simclr_nb.learner import simclr_learner
from simclr_nb.loss import NTXent
from simclr_nb.optim import create_optimizer
from simclr_nb.processes import kept_memory
from step import flop

ARCH, SIZE, LR, AHEAD = "resnet18", 32, 0.05, 2  # batches that each worker prepares ahead
LOOPS = dict(lightly="lightly's documented loop", bare="bare loop of our parts",
             pretrain="`learn.pretrain`", compiled="`learn.pretrain`, compiled")


def passes(batches: Iterable, step: Callable, args: argparse.Namespace) -> float:
    """Images per second of the timed steps of a pass.

    The first steps do not count. Nor does what workers have prepared ahead: as many batches are
    ready at the end as at the start of the timed steps, and are then thrown away.
    """
    for i, batch in enumerate(batches, 1):
        if i <= args.skip + args.steps: step(batch)
        if i == args.skip: start = perf_counter()
        if i == args.skip + args.steps: seconds = perf_counter() - start
    return round(args.steps * args.batch / seconds, 2)


class Lightly:
    "The loop of lightly's documentation: images one by one in workers, a forward pass per view."

    def __init__(self, images: torch.Tensor, width: float, args: argparse.Namespace):
        (encoder, dim), heads = torchvision_encoder(ARCH, width), peer("lightly.models.modules")
        self.model = nn.Sequential(encoder, heads.SimCLRProjectionHead(dim, dim, 128))
        self.loss = peer("lightly.loss").NTXentLoss(temperature=0.5)
        self.opt = torch.optim.SGD(self.model.parameters(), LR, momentum=0.9, nesterov=True)
        views = Transformed(list(images), lightly_views(SIZE))
        ahead = AHEAD * args.workers * args.batch
        self.batches = DataLoader(
            views, args.batch, drop_last=True, num_workers=args.workers, prefetch_factor=AHEAD,
            sampler=RandomSampler(views, num_samples=len(images) + ahead), persistent_workers=True)
        self.args = args

    def __call__(self) -> float: return passes(self.batches, self.step, self.args)

    def step(self, batch: list) -> None:
        x1, x2 = batch
        self.loss(self.model(x1), self.model(x2)).backward()
        self.opt.step()
        self.opt.zero_grad()


class Bare:
    "Our loader, views, network, loss and optimiser without fastai's loop."

    def __init__(self, dls: SimCLRDataLoaders, width: float, args: argparse.Namespace):
        encoder = create_encoder(ARCH, width, "cifar")
        model = SimCLR(encoder, projection_head(encoder.out_dim, batch_norm=True))
        self.model, self.args = model.to(memory_format=torch.channels_last), args
        self.batches, self.views, self.loss = dls.train, TwoViews(dls.policy), NTXent()
        self.opt = create_optimizer("sgd", model.parameters(), LR)

    def __call__(self) -> float:
        with kept_memory(): return passes(self.batches, self.step, self.args)  # as in `pretrain`

    def step(self, batch: tuple) -> None:
        x = self.views(batch[0].as_subclass(torch.Tensor))
        self.loss(self.model(x.contiguous(memory_format=torch.channels_last))).backward()
        self.opt.step()
        self.opt.zero_grad()


class Ends(Callback):
    "When each training step ended, after all other callbacks."
    order = 100

    def before_fit(self): self.times = []

    def after_batch(self):
        if self.training: self.times.append(perf_counter())


class Pretrain:
    "`learn.pretrain`; its steps, not its start, validation and table."

    def __init__(self, dls: SimCLRDataLoaders, width: float, args, compiled: bool = False):
        self.ends, self.args = Ends(), args
        self.learn = simclr_learner(dls, ARCH, width, optimizer="sgd", batch_norm=True,
                                    precision="fp32", compiled=compiled, cbs=self.ends)

    def __call__(self) -> float:
        with redirect_stdout(io.StringIO()): self.learn.pretrain(1, LR, "none", warmup_epochs=0)
        first, last = self.ends.times[self.args.skip - 1], self.ends.times[-1]
        return round(self.args.steps * self.args.batch / (last - first), 2)


def loaders(images: torch.Tensor, args: argparse.Namespace) -> SimCLRDataLoaders:
    "Our loaders of these images, without labels; the validation set is as small as may be."
    arrays = ImageArrays(images, torch.full((len(images),), -1))
    return simclr_dls(Source("cifar10", arrays, arrays), SIZE, args.batch, "cifar", n_valid=2,
                      seed=0, device="cpu", progress=False)


def speeds(images: torch.Tensor, names: Iterable[str], width: float, args) -> dict:
    "Images per second of some loops, in turns."
    dls = loaders(images, args)
    create = dict(
        lightly=lambda: Lightly(images, width, args), bare=lambda: Bare(dls, width, args),
        pretrain=lambda: Pretrain(dls, width, args),
        compiled=lambda: Pretrain(loaders(images, args), width, args, compiled=True))
    torch.manual_seed(0)
    works = {name: create[name]() for name in names}
    sizes = [sum(p.numel() for p in getattr(work, "learn", work).model.parameters())
             for work in works.values()]
    if max(sizes) - min(sizes) > 128:  # the shifts of lightly's last BatchNorm
        raise SystemExit(f"networks of {sizes} weights are not alike")
    return rounds(works, args.repeats)


def overhead(loops: dict, args: argparse.Namespace) -> dict:
    "Time of `learn.pretrain` besides that of the bare loop: medians of rounds."
    pairs = list(zip(loops["bare"]["runs"], loops["pretrain"]["runs"]))
    extra = [args.batch * (1 / b - 1 / a) for a, b in pairs]
    return dict(share=round(median(a / b for a, b in pairs) - 1, 4),
                ms_per_step=round(1e3 * median(extra), 2))


def ratios(loops: dict) -> dict:
    "How many times as fast as lightly's loop: of medians, and at worst."
    peer = loops["lightly"]
    return {name: dict(median=round(loop["median"] / peer["median"], 2),
                       worst=round(loop["min"] / peer["max"], 2))
            for name, loop in loops.items() if name != "lightly"}


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    card = header("pretraining, images/s", args, "torchvision", "lightly", "fastai", "pillow")
    n = (args.skip + args.steps) * args.batch
    images = load_arrays(cifar10_source().train[:n], [-1] * n, False).images
    loops = speeds(images, LOOPS, args.width, args)
    small = speeds(images, ("bare", "pretrain"), args.small, args)
    work, product = flop(ARCH, args.batch, args.width, SIZE) / args.batch, product_rate()
    roof = dict(product_gflop_per_s=round(product / 1e9, 1), images_per_s=round(product / work, 1))
    best = max(loop["median"] for loop in loops.values())
    return finish(dict(
        card, loops=loops, small=small, ratios=ratios(loops), overhead=overhead(loops, args),
        small_overhead=overhead(small, args), limit=roof,
        share_of_limit=round(best * work / product, 3)), *loops.values(), *small.values())


def rows(loops: dict, card: dict) -> list[str]:
    "Of the table, one for each loop."
    names = dict(LOOPS, lightly=f"{LOOPS['lightly']}, {card['versions']['lightly']}")
    ratio = {k: r["median"] for k, r in card["ratios"].items()} if "lightly" in loops else {}
    return [f"| {names[k]} | {bounds(s)} | {ratio.get(k, '')} |" for k, s in loops.items()]


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s, roof = card["settings"], card["limit"]
    head, line = "images/s, {} x {:g} | median | lowest | highest | to lightly |", "---:|" * 4
    lost = [f"**{o['share']:.1%}** at width {w:g}, {o['ms_per_step']:.1f} ms a step"
            for w, o in ((s["width"], card["overhead"]), (s["small"], card["small_overhead"]))]
    what = (f"CIFAR-10, batches of {s['batch']}, {s['steps']} steps a round after {s['skip']} that "
            f"do not count, {s['repeats']} rounds. SGD, fp32. Threads: {s['threads']}, lightly's "
            f"workers: {s['workers']}.")
    return "\n".join([
        f"| {head.format(ARCH, s['width'])}", f"|---|{line}", *rows(card["loops"], card), "",
        f"| {head.format(ARCH, s['small'])}", f"|---|{line}", *rows(card["small"], card), "",
        f"`learn.pretrain` takes longer than the bare loop by {' and '.join(lost)}; medians.",
        f"Roof: {roof['images_per_s']:,} images/s for the products of the network alone at "
        f"{roof['product_gflop_per_s']} GFLOP/s; the fastest loop reaches "
        f"{card['share_of_limit']:.0%} of it.", *closing(card, what)]) + "\n"


def options() -> argparse.ArgumentParser:
    parser = parser_of(
        __doc__, batch=(64, "images in a batch", 2), steps=(6, "timed in each round"),
        skip=(2, "steps before them that do not count"), repeats=(9, "timed rounds"),
        workers=(2, "processes, for lightly"), threads=(machine()["cores"], "of torch"))
    parser.add_argument("--width", type=float, default=1.0, help="of the encoder (1)")
    parser.add_argument("--small", type=float, default=0.25,
                        help="of another that makes fastai's share visible (0.25)")
    return parser


def main():
    args = options().parse_args()
    torch.set_num_threads(args.threads)
    card = measure(args)
    write("end_to_end", card, table(card), args.output)


if __name__ == "__main__": main()
