"""Seconds and memory of NT-Xent with its gradient: ours beside lightly and pytorch-metric-learning.

All compute the same number from the same projections, in turns, in one run; the peak of memory is
that of a process of its own. `--check` only compares their values and gradients.
"""
import argparse
import json
import math
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common import (closing, finish, header, machine, own_process, parser_of, peak, product_rate,
                    rounds, wait, write)
from simclr_nb.loss.contrastive import nt_xent
from simclr_nb.loss.tiled import tiled_nt_xent

LOSSES = "ours", "dense", "in_place", "lightly", "pytorch_metric_learning"
CHECKED = dict(images=(2, 3, 17, 100), temperatures=(0.05, 0.1, 0.5, 1, 10))
TOLERANCE = dict(float64=1e-10, float32=1e-5)  # of the value and, by its norm, of the gradient


def in_place(z: Tensor, temperature: float) -> Tensor:
    "The plain way with care for memory: one matrix, divided and masked where it lies."
    z = F.normalize(z, dim=1)
    logits = (z @ z.T).div_(temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def create(name: str, temperature: float) -> Callable[[Tensor], Tensor]:
    "A loss of projections `(2N, D)`, by its name in `LOSSES`."
    own = dict(ours=tiled_nt_xent, dense=nt_xent, in_place=in_place)
    if name in own: return lambda z: own[name](z, temperature)
    try:
        if name == "lightly":
            from lightly.loss import NTXentLoss
            loss = NTXentLoss(temperature)
        else:
            from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss
            loss = SelfSupervisedLoss(NTXentLoss(temperature))
    except ImportError as e:
        raise SystemExit(f"{e}: pip install -r benchmarks/requirements.txt") from None
    return lambda z: loss(*z.chunk(2))


def triples_bytes(n: int) -> int:
    "Smallest array of pytorch-metric-learning: a byte for each positive pair and negative pair."
    return 2 * n * 2 * n * (2 * n - 2)


def projections(n: int, args: argparse.Namespace, dtype=torch.float32) -> Tensor:
    "Two noisy copies of n random directions."
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(n, args.dim, generator=generator, dtype=dtype).repeat(2, 1)
    z = image + torch.randn(2 * n, args.dim, generator=generator, dtype=dtype)
    return z.to(args.device).requires_grad_()


def step(loss: Callable, z: Tensor) -> tuple[float, Tensor, Tensor]:
    "Seconds of value and gradient together; both."
    wait(z.device)
    start = time.perf_counter()
    value = loss(z)
    gradient, = torch.autograd.grad(value, z)
    wait(z.device)
    return time.perf_counter() - start, value.detach(), gradient


def compare(names: list[str], n: int, temperature: float, args, dtype=torch.float64) -> str | None:
    "The first of these losses that differs from the dense one, and by how much; None if none does."
    z = projections(n, args, dtype)
    limit = TOLERANCE[str(dtype).removeprefix("torch.")]
    _, *reference = step(create("dense", temperature), z)
    for name in names:
        _, *found = step(create(name, temperature), z)
        error = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, reference))
        if not error <= limit:
            return f"{name} differs by {error:.1e}: {n} images, temperature {temperature}, {dtype}"
    return None


def check(args: argparse.Namespace) -> list[str]:
    "Disagreements over all sizes and temperatures, in float64."
    args = argparse.Namespace(dim=args.dim, device="cpu")
    found = [compare(LOSSES, n, temperature, args)
             for n in CHECKED["images"] for temperature in CHECKED["temperatures"]]
    return [fault for fault in found if fault]


def measure_peak(name: str, n: int, args: argparse.Namespace) -> dict:
    "Seconds and peak memory of a step; for a fresh process."
    loss = create(name, args.temperature)
    z = projections(n, args)
    step(loss, projections(32, args))  # libraries allocate something at their first call
    return peak(lambda: step(loss, z), z.is_cuda)


def peak_of_process(name: str, n: int, args: argparse.Namespace) -> dict:
    "Result of `measure_peak` in a process of its own."
    same = {k: getattr(args, k) for k in ("dim", "temperature", "threads", "device")}
    return own_process(__file__, peak=name, images=n, **same)


def times(names: list[str], n: int, args: argparse.Namespace) -> dict:
    "Seconds of each loss, a step of one after a step of the others."
    z = projections(n, args)
    losses = {name: create(name, args.temperature) for name in names}
    return rounds({name: lambda loss=loss: round(step(loss, z)[0], 5)
                   for name, loss in losses.items()}, args.repeats)


def limit(n: int, args: argparse.Namespace) -> dict:
    """Roof for this method: its matrix products alone, at the rate of a large one.

    Half of the similarities forward and again backward, and both products with the weights. That is
    twice 2 (2N)² D; powers and sums count for nothing here.
    """
    product = product_rate(args.device)
    flop = 2 * 2 * (2 * n)**2 * args.dim
    return dict(product_gflop_per_s=round(product / 1e9, 1), flop=flop,
                seconds=round(flop / product, 4))


def losses_at(n: int, names: list[str], args: argparse.Namespace) -> dict:
    "Times and peaks of each."
    fault = compare(names, n, args.temperature, args, torch.float32)
    if fault: raise SystemExit(fault)
    peaks = {name: peak_of_process(name, n, args)["peak_mib"] for name in names}
    spreads = times(names, n, args)
    return {name: dict(spreads[name], peak_mib=peaks[name]) for name in names}


def ratios(losses: dict) -> dict:
    "How many times the time, of medians and at worst, and the memory of ours each other needs."
    ours = losses["ours"]
    return {name: dict(
        time=round(other["median"] / ours["median"], 2),
        time_worst=round(other["min"] / ours["max"], 2),
        memory=round(other["peak_mib"] / max(ours["peak_mib"], 0.1), 2))
        for name, other in losses.items() if name != "ours"}


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    card = header("NT-Xent with its gradient, seconds and MiB", args, "lightly",
                  "pytorch-metric-learning")
    faults = check(args)
    if faults: raise SystemExit("\n".join(faults))
    large = dict(images=args.large, **peak_of_process("ours", args.large, args))
    few = [name for name in LOSSES if name != "pytorch_metric_learning"]
    losses = losses_at(args.images, few, args)
    small = losses_at(args.small, LOSSES, args)
    roof = limit(args.images, args)
    return finish(dict(
        card, agreement=dict(CHECKED, tolerance=TOLERANCE), losses=losses, ratios=ratios(losses),
        small_losses=small, large=large,
        pytorch_metric_learning_gib=round(triples_bytes(args.images) / 2**30),
        limit=roof, share_of_limit=round(roof["seconds"] / losses["ours"]["median"], 3)),
        *losses.values())


def rows(losses: dict, card: dict) -> list[str]:
    "Of the table, one for each loss."
    v = card["versions"]
    names = dict(ours="ours, tiled", dense="ours, dense", in_place="in-place `cross_entropy`",
                 lightly=f"lightly {v['lightly']}",
                 pytorch_metric_learning=f"pytorch-metric-learning {v['pytorch-metric-learning']}")
    return [f"| {names[k]} | " + " | ".join(f"{1e3 * s[q]:,.1f}" for q in ("median", "min", "max"))
            + f" | {s['peak_mib']:,.1f} |" for k, s in losses.items()]


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s, r, large, roof = (card[k] for k in ("settings", "ratios", "large", "limit"))
    head = "median ms | lowest | highest | peak MiB |\n|---|---:|---:|---:|---:|"
    what = (f"D = {s['dim']}, temperature {s['temperature']}, float32, {s['repeats']} runs of "
            f"each. {s['device']}, threads: {s['threads']}.")
    lines = [
        f"| {s['images']:,} images | {head}", *rows(card["losses"], card), "",
        f"| {s['small']:,} images | {head}", *rows(card["small_losses"], card), "",
        f"Against lightly: **{r['lightly']['time']}** times as fast with "
        f"**{r['lightly']['memory']}** times less memory; against in-place `cross_entropy`: "
        f"**{r['in_place']['time']}** and {r['in_place']['memory']} times. Our slowest run to "
        f"their fastest: {r['lightly']['time_worst']} and {r['in_place']['time_worst']}.",
        f"{large['images']:,} images, ours: {large['seconds']:.1f} s, "
        f"{large['peak_mib']:,.0f} MiB. pytorch-metric-learning would ask for "
        f"{card['pytorch_metric_learning_gib']:,} GiB at {s['images']:,} images.",
        *closing(card, what),
        f"Roof: {1e3 * roof['seconds']:,.0f} ms for {roof['flop'] / 1e9:,.1f} GFLOP of products at "
        f"{roof['product_gflop_per_s']} GFLOP/s; ours reach {card['share_of_limit']:.0%} of it."]
    return "\n".join(lines) + "\n"


def options() -> argparse.ArgumentParser:
    parser = parser_of(
        __doc__, images=(4096, "in a batch, for all but pytorch-metric-learning", 2),
        small=(128, "in a batch, for all", 2), large=(32_768, "in a batch, for ours alone", 2),
        dim=(128, "width of the projections"), repeats=(9, "timed runs of each"),
        threads=(machine()["cores"], "of torch"))
    parser.add_argument("--temperature", type=float, default=0.5, help="of the softmax (0.5)")
    parser.add_argument("--device", default="cpu", help="where the projections are (cpu)")
    parser.add_argument("--check", action="store_true",
                        help="time nothing; exit with 1 if two of the losses disagree")
    parser.add_argument("--peak", choices=LOSSES, help=argparse.SUPPRESS)
    return parser


def main():
    args = options().parse_args()
    torch.set_num_threads(args.threads)
    if args.peak: return print(json.dumps(measure_peak(args.peak, args.images, args)))
    if args.check:
        faults = check(args)
        print("\n".join(faults) or "all agree")
        sys.exit(bool(faults))
    card = measure(args)
    write("loss", card, table(card), args.output)


if __name__ == "__main__": main()
