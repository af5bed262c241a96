"""Images per second of pretraining on CIFAR-10 in memory, from uint8 images to updated weights.

In turns, in one run: the loop that lightly documents, a bare loop of our parts, `learn.pretrain`
with the very same parts, that compiled, and that in the precision it takes by itself; all others in
fp32. The same images, batch, network, head, loss, optimiser and learning rate. Two networks:
ResNet-18 with the stem of torchvision, which lightly's documentation takes also for small images,
and with the stem for small images, which costs fifteen times the multiplications.
"""
import argparse
import io
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from common import bounds, closing, finish, header, machine, parser_of, rate, rounds, write
from peers import Transformed, lightly_views, peer, torchvision_encoder
from simclr_nb.images.arrays import ImageArrays, load_arrays
from simclr_nb.views.two_views import TwoViews
from simclr_nb.data import SimCLRDataLoaders, simclr_dls
from simclr_nb.images.source import Source, cifar10_source
from simclr_nb.model.encoder import create_encoder
from simclr_nb.model.head import SimCLR, projection_head
from simclr_nb.learner import simclr_learner
from simclr_nb.loss.tiled import NTXent
from simclr_nb.train.optim import create_optimizer
from simclr_nb.core.processes import kept_memory

ARCH = "resnet18"
SIZE = 32
LR = 0.05
AHEAD = 2  # batches that each worker prepares ahead
LOOPS = dict(lightly="lightly's documented loop", bare="bare loop of our parts",
             pretrain="`learn.pretrain`", compiled="`learn.pretrain`, compiled",
             auto="`learn.pretrain`, precision by itself")
STEMS = dict(imagenet="documented", cifar="small")  # and the option with the batch


def passes(batches: Iterable, step: Callable, n: int, args: argparse.Namespace) -> float:
    """Images per second of the timed steps of a pass over batches of n images.

    The first steps do not count, and neither do batches prepared ahead: as many batches are
    ready at the end as at the start of the timed steps, and are then thrown away.
    """
    for i, batch in enumerate(batches, 1):
        if i <= args.skip + args.steps: step(batch)
        if i == args.skip: start = perf_counter()
        if i == args.skip + args.steps: seconds = perf_counter() - start
    return round(args.steps * n / seconds, 2)


class Lightly:
    "The loop of lightly's documentation: images one by one in workers, a forward pass per view."

    def __init__(self, images: torch.Tensor, stem: str, batch: int, args: argparse.Namespace):
        (encoder, dim), heads = torchvision_encoder(ARCH, 1, stem), peer("lightly.models.modules")
        self.model = nn.Sequential(encoder, heads.SimCLRProjectionHead(dim, dim, 128))
        self.loss = peer("lightly.loss").NTXentLoss(temperature=0.5)
        self.opt = torch.optim.SGD(self.model.parameters(), LR, momentum=0.9, nesterov=True)
        views = Transformed(list(images), lightly_views(SIZE))
        ahead = AHEAD * args.workers * batch
        self.batches = DataLoader(
            views, batch, drop_last=True, num_workers=args.workers, prefetch_factor=AHEAD,
            sampler=RandomSampler(views, num_samples=len(images) + ahead), persistent_workers=True)
        self.args = batch, args

    def __call__(self) -> float: return passes(self.batches, self.step, *self.args)

    def step(self, batch: list) -> None:
        x1, x2 = batch
        self.loss(self.model(x1), self.model(x2)).backward()
        self.opt.step()
        self.opt.zero_grad()


class Bare:
    "Our loader, views, network, loss and optimiser without fastai's loop."

    def __init__(self, dls: SimCLRDataLoaders, stem: str, args: argparse.Namespace):
        model = create_model(stem)
        self.model = model.to(memory_format=torch.channels_last)
        self.args = (dls.train.bs, args)
        self.batches = dls.train
        self.views = TwoViews(dls.policy)
        self.loss = NTXent()
        self.opt = create_optimizer("sgd", model.parameters(), LR)

    def __call__(self) -> float:
        with kept_memory(): return passes(self.batches, self.step, *self.args)  # as in `pretrain`

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

    def __init__(self, dls: SimCLRDataLoaders, stem: str, args, precision="fp32", compiled=False):
        self.ends = Ends()
        self.args = args
        self.learn = simclr_learner(dls, ARCH, stem=stem, optimizer="sgd", batch_norm=True,
                                    precision=precision, compiled=compiled, cbs=self.ends)

    def __call__(self) -> float:
        with redirect_stdout(io.StringIO()): self.learn.pretrain(1, LR, "none", warmup_epochs=0)
        first = self.ends.times[self.args.skip - 1]
        last = self.ends.times[-1]
        return round(self.args.steps * self.learn.dls.train.bs / (last - first), 2)


def create_model(stem: str) -> SimCLR:
    "Our network, as `simclr_learner` makes it with these options."
    encoder = create_encoder(ARCH, stem=stem)
    return SimCLR(encoder, projection_head(encoder.out_dim, batch_norm=True))


def loaders(images: torch.Tensor, batch: int) -> SimCLRDataLoaders:
    "Our loaders of these images, without labels; the validation set is as small as may be."
    arrays = ImageArrays(images, torch.full((len(images),), -1))
    return simclr_dls(Source("cifar10", arrays, arrays), SIZE, batch, "cifar", n_valid=2,
                      seed=0, device="cpu", progress=False)


def speeds(images: torch.Tensor, stem: str, batch: int, args: argparse.Namespace) -> dict:
    "Images per second of the loops, in turns."
    images = images[:(args.skip + args.steps) * batch]

    def pretrain(**options) -> Pretrain:
        return Pretrain(loaders(images, batch), stem, args, **options)
    torch.manual_seed(0)
    torch.compiler.reset()
    works = dict(
        lightly=Lightly(images, stem, batch, args), bare=Bare(loaders(images, batch), stem, args),
        pretrain=pretrain(), compiled=pretrain(compiled=True), auto=pretrain(precision="auto"))
    sizes = [sum(p.numel() for p in getattr(work, "learn", work).model.parameters())
             for work in works.values()]
    if max(sizes) - min(sizes) > 128:  # the shifts of lightly's last BatchNorm
        raise SystemExit(f"networks of {sizes} weights are not alike")
    return rounds(works, args.repeats)


def overhead(loops: dict, batch: int) -> dict:
    "Time of `learn.pretrain` besides that of the bare loop: medians of rounds."
    pairs = list(zip(loops["bare"]["runs"], loops["pretrain"]["runs"]))
    extra = [batch * (1 / b - 1 / a) for a, b in pairs]
    return dict(share=round(median(a / b for a, b in pairs) - 1, 4),
                ms_per_step=round(1e3 * median(extra), 2))


def ratios(loops: dict) -> dict:
    "How many times as fast as lightly's loop: of medians, and at worst."
    peer = loops["lightly"]
    return {name: dict(median=round(loop["median"] / peer["median"], 2),
                       worst=round(loop["min"] / peer["max"], 2))
            for name, loop in loops.items() if name != "lightly"}


def convolution_seconds(stem: str, batch: int) -> float:
    "Seconds of the convolutions of a step alone, forward and backward, each the fastest of some."
    model = create_model(stem)
    seconds = []

    def alone(conv: nn.Conv2d, inputs: tuple, out: torch.Tensor) -> None:
        x = inputs[0].detach().requires_grad_(inputs[0].requires_grad)  # images need no gradient
        asked = [v for v in (x, conv.weight) if v.requires_grad]
        grad = torch.ones_like(out)
        seconds.append(1 / rate(lambda: torch.autograd.grad(
            F.conv2d(x, conv.weight, None, conv.stride, conv.padding), asked, grad), 1, 5))
    for module in model.modules():
        if isinstance(module, nn.Conv2d): module.register_forward_hook(alone)
    views = torch.rand(2 * batch, 3, SIZE, SIZE)
    with kept_memory():
        model.to(memory_format=torch.channels_last)(views.to(memory_format=torch.channels_last))
    return sum(seconds)


def network(images: torch.Tensor, stem: str, args: argparse.Namespace) -> dict:
    "Measure everything with one stem; and the roof of the convolutions alone, in fp32."
    batch = getattr(args, STEMS[stem])
    before = convolution_seconds(stem, batch)
    loops = speeds(images, stem, batch, args)
    seconds = min(before, convolution_seconds(stem, batch))
    best = max(loops[name]["median"] for name in LOOPS if name != "auto")
    roof = batch / seconds
    limit = dict(seconds=round(seconds, 4), images_per_s=round(roof, 1))
    return dict(batch=batch, loops=loops, ratios=ratios(loops), overhead=overhead(loops, batch),
                limit=limit, share_of_limit=round(best / roof, 3))


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    card = header("pretraining, images/s", args, "torchvision", "lightly", "fastai", "pillow")
    n = (args.skip + args.steps) * max(getattr(args, option) for option in STEMS.values())
    images = load_arrays(cifar10_source().train[:n], [-1] * n, False).images
    networks = {stem: network(images, stem, args) for stem in STEMS}
    return finish(dict(card, networks=networks),
                  *(loop for found in networks.values() for loop in found["loops"].values()))


def rows(stem: str, found: dict, version: str) -> list[str]:
    "A table of one network, and what is to be said of it."
    lost = found["overhead"]
    roof = found["limit"]
    names = dict(LOOPS, lightly=f"{LOOPS['lightly']}, {version}")
    ratio = {k: r["median"] for k, r in found["ratios"].items()}
    return [
        f"| images/s, {ARCH}, {stem} stem, batch {found['batch']} | median | lowest | highest | "
        "to lightly |", "|---|" + "---:|" * 4,
        *(f"| {names[k]} | {bounds(s)} | {ratio.get(k, '')} |" for k, s in found["loops"].items()),
        "", f"`learn.pretrain` takes longer than the bare loop by **{lost['share']:.1%}**, "
        f"{lost['ms_per_step']:.1f} ms a step; medians over rounds. Roof in fp32: "
        f"{roof['images_per_s']:,} images/s, since PyTorch takes {roof['seconds']:.3f} s for the "
        f"convolutions of a step alone; the fastest loop in fp32 reaches "
        f"{found['share_of_limit']:.0%} of it.", ""]


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s = card["settings"]
    version = card["versions"]["lightly"]
    lines = [line for part in card["networks"].items() for line in rows(*part, version)]
    what = (f"CIFAR-10, {s['steps']} steps a round after {s['skip']} that do not count, "
            f"{s['repeats']} rounds. SGD. Threads: {s['threads']}, lightly's workers: "
            f"{s['workers']}.")
    return "\n".join([*lines, *closing(card, what)]) + "\n"


def options() -> argparse.ArgumentParser:
    return parser_of(
        __doc__, documented=(256, "images in a batch, with torchvision's stem", 2),
        small=(64, "images in a batch, with the stem for small images", 2),
        steps=(8, "timed in each round"), skip=(2, "steps before them that do not count"),
        repeats=(5, "timed rounds"), workers=(2, "processes, for lightly"),
        threads=(machine()["cores"], "of torch"))


def main():
    args = options().parse_args()
    torch.set_num_threads(args.threads)
    card = measure(args)
    write("end_to_end", card, table(card), args.output)


if __name__ == "__main__": main()
