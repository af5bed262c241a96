"""Seconds and memory of an exact k-NN vote: ours, tile by tile, beside lightly's.

The same random vectors, of any length, in turns, in one run; all predictions must agree. The peak
of memory is that of a process of its own, also for a bank that lightly's matrix would not suit.
"""
import argparse
import json
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common import (bounds, closing, finish, header, machine, own_process, parser_of, peak,
                    product_rate, rounds, timed, write)
from simclr_nb.measure.neighbours import knn_predict

CLASSES = 10
TEMPERATURE = 0.1


def data(bank: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    "Bank `(bank, dim)`, its classes, and queries `(queries, dim)`."
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(bank + args.queries, args.dim, generator=generator)
    y = torch.randint(CLASSES, (bank,), generator=generator)
    return h[:bank], y, h[bank:]


def ours(bank: Tensor, y: Tensor, h: Tensor, k: int) -> Tensor:
    return knn_predict(bank, y, h, k, TEMPERATURE)


def lightly(bank: Tensor, y: Tensor, h: Tensor, k: int) -> Tensor:
    try: from lightly.utils.benchmarking import knn_predict as peer
    except ImportError as e:
        raise SystemExit(f"{e}: pip install -r benchmarks/requirements.txt") from None
    h = F.normalize(h, dim=1)
    bank = F.normalize(bank, dim=1)  # as its documentation recommends
    return peer(h, bank.T, y, CLASSES, k, TEMPERATURE)[:, 0]


VOTES = dict(ours=ours, lightly=lightly)


def measure_peak(name: str, bank: int, args: argparse.Namespace) -> dict:
    "Seconds and peak memory of a vote; for a fresh process."
    x = data(bank, args)
    VOTES[name](x[0][:500], x[1][:500], x[2][:8], min(args.k, 500))  # a first call allocates
    return peak(lambda: VOTES[name](*x, args.k))


def peak_of_process(name: str, bank: int, args: argparse.Namespace) -> dict:
    "Result of `measure_peak` in a process of its own."
    same = {k: getattr(args, k) for k in ("queries", "dim", "k", "threads")}
    return own_process(__file__, peak=name, bank=bank, **same)


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    card = header("exact k-NN vote, seconds and MiB", args, "lightly")
    x = data(args.bank, args)
    card["settings"] |= dict(temperature=TEMPERATURE, classes=CLASSES, device="cpu")
    predicted = {name: vote(*x, args.k) for name, vote in VOTES.items()}
    agree = (predicted["ours"] == predicted["lightly"]).float().mean().item()
    if agree < 0.999: raise SystemExit(f"only {agree:.2%} of the predictions agree")
    works = {name: partial(timed, partial(vote, *x, args.k)) for name, vote in VOTES.items()}
    found = rounds(works, args.repeats)
    for name in VOTES: found[name]["peak_mib"] = peak_of_process(name, args.bank, args)["peak_mib"]
    flop = 2 * args.bank * args.queries * args.dim
    product = product_rate()
    return finish(dict(
        card, agreement=agree, **found,
        ratio=round(found["lightly"]["median"] / found["ours"]["median"], 2),
        large=dict(bank=args.large, **peak_of_process("ours", args.large, args)),
        limit=dict(product_gflop_per_s=round(product / 1e9, 1), seconds=round(flop / product, 3)),
        share_of_limit=round(flop / product / found["ours"]["median"], 3)), *found.values())


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s, large, roof = (card[k] for k in ("settings", "large", "limit"))
    names = dict(ours="ours, tiled", lightly=f"lightly {card['versions']['lightly']}")
    what = (f"Bank {s['bank']:,}, queries {s['queries']:,}, D = {s['dim']}, k = {s['k']}, float32, "
            f"{s['repeats']} runs of each. CPU threads: {s['threads']}.")
    lines = ["| | median s | lowest | highest | peak MiB |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {text} | {bounds(card[name], '.2f')} | {card[name]['peak_mib']:,.0f} |"
              for name, text in names.items()]
    lines += [
        "", f"**{card['ratio']}** times as fast as lightly; {card['agreement']:.2%} of the "
        f"predictions agree. A bank of {large['bank']:,}: {large['seconds']:.1f} s, "
        f"{large['peak_mib']:,.0f} MiB.", *closing(card, what),
        f"Roof: {roof['seconds']:.2f} s for the products alone at {roof['product_gflop_per_s']} "
        f"GFLOP/s; ours reach {card['share_of_limit']:.0%} of it."]
    return "\n".join(lines) + "\n"


def options() -> argparse.ArgumentParser:
    parser = parser_of(
        __doc__, bank=(50_000, "known vectors, for both"), queries=(2_000, "to classify"),
        large=(1_000_000, "known vectors, for ours alone"), dim=(512, "of the vectors"),
        k=(200, "neighbours"), repeats=(15, "timed runs of each"),
        threads=(machine()["cores"], "of torch"))
    parser.add_argument("--peak", choices=VOTES, help=argparse.SUPPRESS)
    return parser


def main():
    args = options().parse_args()
    torch.set_num_threads(args.threads)
    if args.peak: return print(json.dumps(measure_peak(args.peak, args.bank, args)))
    card = measure(args)
    write("knn", card, table(card), args.output)


if __name__ == "__main__": main()
