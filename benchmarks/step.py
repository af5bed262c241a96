"""Seconds of a training step: precision, memory format, compiled or not, beside plain PyTorch.

A step is the forward pass of two views through encoder and head, NT-Xent, the backward pass and
LARS. The same views, in turns, in one run. `fp32 contiguous eager` is our model as PyTorch has it
when nobody asks for anything; `torchvision` is its ResNet with the same stem and head, a loss of
three lines, and SGD. The other variants keep freed memory for the next step, as `learn.pretrain`
does.
"""
import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from common import (bounds, closing, finish, header, machine, network_rate, parser_of, rounds,
                    timed, write)
from peers import plain_loss, torchvision_encoder
from simclr_nb.plan.cost import PRECISIONS, count_encoder
from simclr_nb.model.encoder import create_encoder
from simclr_nb.model.resnet import encoder_stem
from simclr_nb.model.head import SimCLR, projection_head
from simclr_nb.loss.tiled import NTXent
from simclr_nb.train.optim import LARS
from simclr_nb.core.processes import kept_memory

ARCHS = ("resnet18", "resnet50")
SIZE = 32
LAYOUTS = dict(contiguous=torch.contiguous_format, channels_last=torch.channels_last)
PEAKS = "fp32", "bf16"
VARIANTS = [" ".join(v) for v in product(PEAKS, LAYOUTS, ("eager", "compiled"))]
EAGER = VARIANTS[0]
PEER = "torchvision"


def create_model(arch: str, width: float, size: int) -> SimCLR:
    "Our encoder, with the stem for the size of the views, and the paper's head."
    encoder = create_encoder(arch, width, encoder_stem(size))
    return SimCLR(encoder, projection_head(encoder.out_dim))


def create_step(model: nn.Module, x: Tensor, variant: str, loss=NTXent()) -> Callable[[], None]:
    "A training step of our parts on the same views each time."
    precision, layout, mode = variant.split()
    model, x = (v.to(memory_format=LAYOUTS[layout]) for v in (model, x))
    if mode == "compiled": model.encoder.compile()
    opt = LARS(model.parameters(), lr=0.1)
    half = precision != "fp32"

    def step():
        with torch.autocast("cpu", PRECISIONS[precision]) if half else nullcontext():
            value = loss(model(x))
        value.backward()
        opt.step()
        opt.zero_grad()
    return step


def plain_step(arch: str, width: float, x: Tensor) -> Callable[[], None]:
    "The same step as PyTorch and torchvision have it."
    encoder, dim = torchvision_encoder(arch, width)
    head = nn.Linear(dim, dim, bias=False), nn.ReLU(), nn.Linear(dim, 128, bias=False)
    model = nn.Sequential(encoder, *head)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step():
        plain_loss(model(x)).backward()
        opt.step()
        opt.zero_grad()
    return step


def kept(step: Callable[[], None]) -> float:
    "Seconds of a step with memory kept from the one before it."
    with kept_memory():
        step()
        return timed(step)


def flop(arch: str, images: int, width: float, size: int) -> float:
    "Operations of a step: convolutions and products of the network, and those of the loss."
    count = count_encoder(arch, width, size)
    return 2 * images * count.flops() + 4 * (2 * images)**2 * count.dims[1]


def steps_of(arch: str, args: argparse.Namespace) -> dict:
    "Seconds of each variant, and how they compare."
    torch.compiler.reset()  # so that variants of another network leave room for these
    torch.manual_seed(0)
    images = getattr(args, arch)
    x = torch.rand(2 * images, 3, SIZE, SIZE)
    works = {v: create_step(create_model(arch, args.width, SIZE), x, v) for v in VARIANTS}
    works[PEER] = plain_step(arch, args.width, x)
    found = rounds({v: partial(timed if v in (EAGER, PEER) else kept, work)
                    for v, work in works.items()}, args.repeats)
    return dict(images=images, flop=flop(arch, images, args.width, SIZE), steps=found)


def compared(network: dict, rates: dict) -> dict:
    "How many times as fast as both peers each variant is, and its share of the matrix peak."
    steps = network["steps"]

    def of(v: str) -> dict:
        s = steps[v]
        rate = rates[v.split()[0]] if v != PEER else rates["fp32"]
        return dict(images_per_s=round(network["images"] / s["median"], 1),
                    to_eager=round(steps[EAGER]["median"] / s["median"], 2),
                    to_eager_worst=round(steps[EAGER]["min"] / s["max"], 2),
                    to_torchvision=round(steps[PEER]["median"] / s["median"], 2),
                    share_of_peak=round(network["flop"] / s["median"] / rate, 3))
    return {v: of(v) for v in steps}


def peaks() -> dict:
    "Operations per second of a large convolution or product, by precision."
    return {name: network_rate(PRECISIONS[name]) for name in PEAKS}


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    card = header("training step, seconds", args, "torchvision")
    seen = [peaks()]
    networks = {}
    for arch in ARCHS:
        networks[arch] = steps_of(arch, args)
        seen.append(peaks())
    rates = {name: max(rate[name] for rate in seen) for name in PEAKS}
    for network in networks.values(): network["compared"] = compared(network, rates)
    peak = {name: round(rate / 1e9, 1) for name, rate in rates.items()}
    return finish(dict(card, peak_gflop_per_s=peak, networks=networks),
                  *(s for network in networks.values() for s in network["steps"].values()))


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s = card["settings"]
    peak = card["peak_gflop_per_s"]
    lines = []
    for arch, network in card["networks"].items():
        lines += [f"| {arch}, {network['images']} images | median s | lowest | highest | "
                  "images/s | to eager | to torchvision | of peak |", "|---|" + "---:|" * 7]
        for v, found in network["steps"].items():
            c = network["compared"][v]
            lines.append(f"| {v} | {bounds(found, '.3f')} | {c['images_per_s']:.1f} | "
                         f"{c['to_eager']} | {c['to_torchvision']} | {c['share_of_peak']:.0%} |")
        lines.append("")
    what = (f"Width {s['width']:g}, {SIZE} px, CIFAR stem, {s['repeats']} steps of each, threads: "
            f"{s['threads']}. Peak, a large convolution or product: fp32 {peak['fp32']}, bf16 "
            f"{peak['bf16']} GFLOP/s.")
    return "\n".join(lines + closing(card, what)) + "\n"


def options() -> argparse.ArgumentParser:
    parser = parser_of(
        __doc__, resnet18=(32, "images in its batch"), resnet50=(16, "images in its batch"),
        repeats=(7, "timed steps of each"), threads=(machine()["cores"], "of torch"))
    parser.add_argument("--width", type=float, default=1.0, help="of both encoders (1)")
    return parser


def main():
    args = options().parse_args()
    torch.set_num_threads(args.threads)
    card = measure(args)
    write("step", card, table(card), args.output)


if __name__ == "__main__": main()
