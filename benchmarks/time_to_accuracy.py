"""Minutes of pretraining to a good representation: k-NN accuracy of ours and of others' recipes.

The same 10,000 images of CIFAR-10, the same encoder, the same cores. Each recipe trains for so many
minutes in a process of its own; its encoder is copied after each epoch and judged afterwards, so
that judging costs no time. Ours trains once for all minutes and once for half of them.

It takes hours: 3.5 recipes for each seed. Kill it at any time; the same command goes on.
"""
import argparse
import io
import json
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from math import cos, pi
from pathlib import Path
from statistics import median

import torch
from fastai.callback.core import Callback
from torch import Tensor, nn

from common import (HERE, closing, finish, header, machine, made_once, own_process, parser_of,
                    spread, write)
from peers import one_by_one, peer, plain_loss, solo_views, torchvision_encoder
from simclr_nb.data import simclr_dls
from simclr_nb.images.arrays import ImageArrays
from simclr_nb.images.source import Source
from simclr_nb.learner import simclr_learner
from simclr_nb.measure.neighbours import knn_predict

ARCH, WIDTH, SIZE, BATCH = "resnet18", 0.25, 32, 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, lightly's default
RECIPES = dict(ours="ours, the settings of `simclr-pretrain`", half="ours, half the time",
               lightly="lightly's documented loop", torch="plain loop of torch and torchvision",
               solo="solo-learn's recipe for CIFAR")
DIFFERENCES = (
    "Alike: images, encoder, batch of 256, both cores; k-NN with 20 neighbours among the training "
    "images. lightly: SGD, learning rate 0.06, constant, temperature 0.5, the network once a view. "
    "torch: Adam, learning rate 0.001, temperature 0.5, both views in one pass. solo-learn: LARS, "
    "learning rate 0.4, weight decay 0.0001, temperature 0.2, a head of 2,048 and 256, full colour "
    "distortion, blur; its cosine ends with the minutes. Ours also validates and runs its probes.")


def images() -> tuple[ImageArrays, ImageArrays, list[str]]:
    "10,000 training images of CIFAR-10, and 2,000 others of its training part to judge with."
    dls = simclr_dls("cifar10", n_train=10_000, n_valid=2_000, valid_part=0.2, seed=0,
                     device="cpu", progress=False)
    return dls.train.dataset, dls.valid.dataset, dls.classes


class Copies(Callback):
    "The encoder after each epoch, and when."
    order = 1  # before validation

    def __init__(self, encoder: nn.Module): self.encoder, self.taken = encoder, []

    def take(self) -> None:
        state = deepcopy(self.encoder.state_dict())
        self.taken.append((time.perf_counter() - self.start, state))

    def before_fit(self): self.start = time.perf_counter()
    def after_train(self): self.take()


def ours(train: ImageArrays, valid: ImageArrays, classes: list, minutes: float,
         seed: int) -> Copies:
    "Train as `simclr-pretrain --minutes` does."
    torch.manual_seed(seed)
    dls = simclr_dls(Source("cifar10", train, valid, classes), seed=seed, device="cpu",
                     progress=False)
    learn = simclr_learner(dls, ARCH, WIDTH, temperature=0.2, zero_init_last=False)
    copies = Copies(learn.model.encoder)
    with redirect_stdout(io.StringIO()), learn.no_bar():
        learn.pretrain(minutes=minutes, lr=0.15, cbs=copies)
    return copies


def loop(copies: Copies, batches: Iterable, step: Callable, opt, minutes: float,
         rate: Callable | None = None) -> Copies:
    "Train for so many minutes; rate: share of the learning rate at a share of the time."
    base = [group["lr"] for group in opt.param_groups]
    copies.before_fit()
    while True:
        for views in batches:
            share = (time.perf_counter() - copies.start) / (60 * minutes)
            if share >= 1:
                copies.take()
                return copies
            if rate:
                for group, lr in zip(opt.param_groups, base): group["lr"] = lr * rate(share)
            step(*views).backward()
            opt.step()
            opt.zero_grad()
        copies.take()


def lightly(train: ImageArrays, minutes: float, workers: int) -> Copies:
    "The loop of lightly's example for SimCLR."
    encoder, dim = torchvision_encoder(ARCH, WIDTH)
    head = peer("lightly.models.modules").SimCLRProjectionHead(dim, dim, 128)
    model = nn.Sequential(encoder, head)
    loss = peer("lightly.loss").NTXentLoss()
    views = peer("lightly.transforms").SimCLRTransform(input_size=SIZE, gaussian_blur=0.0)
    views.takes_pillow = True
    opt = torch.optim.SGD(model.parameters(), lr=0.06)
    return loop(Copies(encoder), one_by_one(views, list(train.images), BATCH, workers),
                lambda a, b: loss(model(a), model(b)), opt, minutes)


def plain(train: ImageArrays, minutes: float, workers: int) -> Copies:
    "A loop as tutorials write it, with the augmentation of the paper's CIFAR-10 experiments."
    encoder, dim = torchvision_encoder(ARCH, WIDTH)
    model = nn.Sequential(encoder, nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 128))
    opt = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-6)
    return loop(Copies(encoder), one_by_one(solo_views(SIZE), list(train.images), BATCH, workers),
                lambda a, b: plain_loss(model(torch.cat([a, b]))), opt, minutes)


class ClippedLARS(torch.optim.SGD):
    "SGD whose gradients of weights are scaled layer by layer, at most to the learning rate's own."

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2: continue  # biases and BatchNorm as in SGD
                p.grad += 1e-4 * p
                trust = 0.02 * p.norm() / p.grad.norm().clamp_min(1e-8)
                p.grad *= (trust / group["lr"]).clamp_max(1)
        super().step()


def solo(train: ImageArrays, minutes: float, workers: int) -> Copies:
    "solo-learn's settings for SimCLR on CIFAR, in a loop without its framework."
    encoder, dim = torchvision_encoder(ARCH, WIDTH)
    model = nn.Sequential(encoder, nn.Linear(dim, 2048), nn.ReLU(), nn.Linear(2048, 256))
    views = solo_views(SIZE, dict(strength=1.0, blur=0.5))
    opt = ClippedLARS(model.parameters(), lr=0.4, momentum=0.9)
    return loop(Copies(encoder), one_by_one(views, list(train.images), BATCH, workers),
                lambda a, b: plain_loss(model(torch.cat([a, b])), 0.2), opt, minutes,
                lambda share: min(share / 0.1, 0.5 + 0.5 * cos(pi * max(share - 0.1, 0) / 0.9)))


@torch.no_grad()
def accuracy(encoder: nn.Module, train: ImageArrays, valid: ImageArrays, normal: tuple) -> float:
    "k-NN accuracy in percent; normal: mean and deviation to normalise by, or nothing."
    shift, scale = (torch.tensor(v).view(-1, 1, 1) for v in (normal or ((0,), (1,))))

    def represent(arrays: ImageArrays) -> Tensor:
        return torch.cat([encoder((x / 255 - shift) / scale) for x in arrays.images.split(500)])
    encoder.eval()
    found = knn_predict(represent(train), train.labels, represent(valid))
    return round(100 * (found == valid.labels).float().mean().item(), 2)


def part(args: argparse.Namespace) -> dict:
    "Train one recipe with one seed; its curve."
    train, valid, classes = images()
    torch.manual_seed(args.seed)
    if args.part == "ours": copies = ours(train, valid, classes, args.minutes, args.seed)
    elif args.part == "half": copies = ours(train, valid, classes, args.minutes / 2, args.seed)
    else:
        train_by = dict(lightly=lightly, torch=plain, solo=solo)[args.part]
        copies = train_by(train, args.minutes, args.workers)
    step = max(len(copies.taken) // 20, 1)
    chosen = copies.taken[::-step][::-1]  # evenly, and the last
    normal = (MEAN, STD) if args.part == "lightly" else ()
    curve = []
    for seconds, state in chosen:
        copies.encoder.load_state_dict(state)
        curve.append((round(seconds / 60, 3), accuracy(copies.encoder, train, valid, normal)))
    return dict(epochs=len(copies.taken), curve=curve)


def minutes_to(runs: Iterable[dict], least: float) -> float | None:
    "Fewest minutes after which the curve of one of these runs is at least so high."
    return min((minutes for run in runs for minutes, value in run["curve"] if value >= least),
               default=None)


def measure(args: argparse.Namespace) -> dict:
    "The result card: all curves, and the time of ours to what the others reach."
    card = header("minutes to k-NN accuracy", args, "torchvision", "lightly", "fastai", "pillow")
    del card["settings"]["out"]
    args.out.mkdir(parents=True, exist_ok=True)
    curves = {name: [] for name in RECIPES}
    for seed in range(args.seeds):
        for name in RECIPES:
            file = args.out / f"{name}-{seed}-{args.minutes:g}.json"
            work = partial(own_process, __file__, part=name, seed=seed, minutes=args.minutes,
                           workers=args.workers, threads=args.threads)
            curves[name].append(made_once(file, work))
            print(f"{name}, seed {seed}: {curves[name][-1]['curve'][-1][1]}%", flush=True)
    ends = {name: spread([run["curve"][-1][1] for run in found]) for name, found in curves.items()}
    both = list(zip(*(curves[name] for name in ("ours", "half"))))
    faster = {name: [minutes_to(pair, max(value for _, value in run["curve"]))
                     for pair, run in zip(both, curves[name])]
              for name in ("lightly", "torch", "solo")}
    return finish(dict(card, differences=DIFFERENCES, curves=curves, ends=ends,
                       minutes_of_ours=faster))


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s = card["settings"]
    lines = ["| recipe | minutes | epochs | k-NN, % | lowest | highest | ours as good after |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    for name, title in RECIPES.items():
        end = card["ends"][name]
        epochs = median(run["epochs"] for run in card["curves"][name])
        minutes = s["minutes"] / 2 if name == "half" else s["minutes"]
        needed = card["minutes_of_ours"].get(name)
        after = "" if needed is None else (
            "not reached" if None in needed else f"{median(needed):.1f} min")
        lines.append(f"| {title} | {minutes:g} | {epochs:g} | {end['median']:.1f} | "
                     f"{end['min']:.1f} | {end['max']:.1f} | {after} |")
    what = (f"10,000 images of CIFAR-10, {ARCH} x {WIDTH} with the cifar stem, batches of {BATCH}, "
            f"seeds: {s['seeds']}, medians. \"As good\": the first epoch of ours, of either length,"
            f" with the best accuracy of the other. Threads: {s['threads']}, workers of the others: "
            f"{s['workers']}.")
    return "\n".join([*lines, "", *closing(card, what)]) + "\n"


def main():
    parser = parser_of(__doc__, seeds=(5, "runs of each recipe"), seed=(0, "of a part", 0),
                       workers=(2, "processes that make views, for the others"),
                       threads=(machine()["cores"], "of torch"))
    parser.add_argument("--minutes", type=float, default=10.0, help="of training (10)")
    parser.add_argument("--part", choices=RECIPES, help="train one recipe with --seed, print JSON")
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs/time_to_accuracy",
                        help="where finished parts are kept (runs/time_to_accuracy)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part: return print(json.dumps(part(args)))
    card = measure(args)
    write("time_to_accuracy", card, table(card), args.output)


if __name__ == "__main__": main()
