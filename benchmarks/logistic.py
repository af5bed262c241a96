"""Seconds for logistic regression under 45 strengths of L2: ours in one batch beside scikit-learn.

Real features: an untrained ResNet-18 on CIFAR-10, 512 columns, standardised. Of each solver the
largest entry of the gradient that it leaves is measured too, by one function, in float64.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import (bounds, closing, finish, header, machine, parser_of, product_rate, spread,
                    write)
from simclr_nb.data import clean_loader, simclr_dls
from simclr_nb.measure.representations import represent
from simclr_nb.evaluate.features import random_encoder
from simclr_nb.evaluate.logistic import L2_STRENGTHS, fit_logistic

REACHED = 1.05  # times the tolerance: left by rounding the fits to their number type
PEERS = {  # scikit-learn's: number type, and whether a fit starts from the one before
    "float32": ("float32", False), "float32_warm": ("float32", True),
    "float64": ("float64", False), "float64_warm": ("float64", True),
}


def features(n: int) -> tuple[Tensor, Tensor]:
    "Standardised representations of CIFAR-10 training images, `(n, 512)`, and classes."
    dls = simclr_dls("cifar10", n_train=n, n_valid=2, bs=256, seed=0, progress=False)
    encoder = random_encoder(dict(arch="resnet18", width=1.0, stem="cifar"))
    h, y = represent(encoder, clean_loader(dls, 0))
    return (h - h.mean(0)) / h.std(0, correction=0).clamp_min(1e-9), y


def gradient(h: Tensor, y: Tensor, weight: Tensor, bias: Tensor, l2: float) -> float:
    "Largest entry of the gradient of the mean loss, in float64: what both solvers bring below tol."
    h = h.double()
    weight = weight.double()
    p = (h @ weight + bias.double()).softmax(1)
    p[torch.arange(len(y)), y] -= 1
    return max((h.T @ p + l2 * weight).abs().max().item(), p.sum(0).abs().max().item()) / len(y)


def ours(h: Tensor, y: Tensor, tol: float) -> tuple[float, dict[str, Tensor]]:
    "Seconds, and weights with the intercept below them, by strength."
    start = time.perf_counter()
    fit = fit_logistic(h, y, tol=tol)
    seconds = time.perf_counter() - start
    fits = torch.cat([fit.weight, fit.bias[:, None]], 1)
    return seconds, {f"{l2:.6g}": w for l2, w in zip(L2_STRENGTHS, fits, strict=True)}


def worker(folder: Path, share: int, of: int, peer: str, tol: float):
    "A process of scikit-learn's: its share of the strengths, on one thread; saves the fits."
    from sklearn.linear_model import LogisticRegression

    dtype, warm = PEERS[peer]
    with np.load(folder / "features.npz") as data: h, y = data["h"].astype(dtype), data["y"]
    strengths = L2_STRENGTHS[::-1]
    fits = {}
    mine = np.array_split(strengths, of)[share] if warm else strengths[share::of]
    model = LogisticRegression(tol=tol, max_iter=10_000, warm_start=warm)  # L-BFGS, as by default
    warnings.simplefilter("ignore")  # what is left of the gradient is measured
    LogisticRegression(tol=tol).fit(h[:500], y[:500])  # a first call takes longer
    print("ready", flush=True)
    input()
    for l2 in mine:
        model.set_params(C=1 / l2).fit(h, y)
        fits[f"{l2:.6g}"] = np.vstack([model.coef_.T, model.intercept_])
    print("done", flush=True)
    np.savez(folder / f"fits{share}.npz", **fits)


def hear(process: subprocess.Popen, word: str):
    "Wait until a process says it."
    if process.stdout.readline() != f"{word}\n": raise SystemExit(f"scikit-learn is not {word}")


def theirs(folder: Path, name: str, args: argparse.Namespace) -> tuple[float, dict[str, Tensor]]:
    "As `ours`, by a process per core with one thread each; starting them is not counted."
    env = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    command = [sys.executable, __file__, f"--tol={args.tol}", f"--of={args.processes}",
               f"--peer={name}", f"--folder={folder}"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    running = [subprocess.Popen([*command, f"--share={i}"], **pipes)
               for i in range(args.processes)]
    try:
        for process in running: hear(process, "ready")
        start = time.perf_counter()
        for process in running:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in running: hear(process, "done")
        seconds = time.perf_counter() - start
        for process in running: process.wait(60)
    finally:
        for process in running: process.kill()
    fits = {}
    for i in range(args.processes):
        with np.load(folder / f"fits{i}.npz") as found:
            fits |= {k: torch.from_numpy(w) for k, w in found.items()}
    return seconds, fits


def limit(h: Tensor, steps: Tensor, n_classes: int) -> dict:
    "Roof: the two products of each step alone, at the rate of a large one."
    product = product_rate()
    flop = int(2 * 2 * h.shape[0] * (h.shape[1] + 1) * n_classes * (steps.sum() + len(steps)))
    return dict(product_gflop_per_s=round(product / 1e9, 1), flop=flop,
                seconds=round(flop / product, 3))


def runs_of_all(h: Tensor, y: Tensor, args: argparse.Namespace) -> tuple[dict, dict]:
    "Seconds of each solver, one after the other in turns, and its last fits."
    seconds = {name: [] for name in ("ours", *PEERS)}
    fits = {}
    fit_logistic(h[:500], y[:500], L2_STRENGTHS[::9])  # a first call takes longer
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "features.npz", h=h.numpy(), y=y.numpy())
        for _ in range(args.repeats):
            for name, kept in seconds.items():
                run = ours(h, y, args.tol) if name == "ours" else theirs(Path(folder), name, args)
                kept.append(round(run[0], 3))
                fits[name] = run[1]
    return seconds, fits


def judge(h: Tensor, y: Tensor, runs: list[float], fits: dict, reference: dict) -> dict:
    "Of one solver: seconds, largest gradient left, least agreement in predictions with ours."
    left = [gradient(h, y, fits[l2][:-1], fits[l2][-1], float(l2)) for l2 in reference]
    said = {l2: [(h.double() @ w[:-1].double() + w[-1]).argmax(1) for w in (fits[l2], own)]
            for l2, own in reference.items()}
    agree = min((a == b).double().mean().item() for a, b in said.values())
    return dict(spread(runs), largest_gradient=max(left), agreement=round(agree, 4))


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    card = header("logistic regression under 45 strengths of L2, seconds", args, "scikit-learn",
                  "scipy", "numpy")
    h, y = features(args.images)
    runs, fits = runs_of_all(h, y, args)
    solvers = {name: judge(h, y, kept, fits[name], fits["ours"]) for name, kept in runs.items()}
    matched = [n for n in PEERS if solvers[n]["largest_gradient"] <= REACHED * args.tol]
    fastest = min(PEERS, key=lambda name: solvers[name]["median"])
    best = min(matched or PEERS, key=lambda name: solvers[name]["median"])
    roof = limit(h, fit_logistic(h, y, tol=args.tol).steps, int(y.max()) + 1)
    own = solvers["ours"]
    other = solvers[best]
    settings = dict(data="cifar10", encoder="resnet18, untrained", images=args.images,
                    columns=h.shape[1], classes=int(y.max()) + 1, strengths=len(L2_STRENGTHS),
                    tol=args.tol, repeats=args.repeats, threads=args.threads,
                    processes=args.processes, dtype="float32", device="cpu", seed=0)
    return finish(dict(
        card, settings=settings, solvers=solvers, matched=matched, best_peer=best,
        ratio=round(other["median"] / own["median"], 2),
        ratio_fastest=round(solvers[fastest]["median"] / own["median"], 2),
        ratio_worst=round(other["min"] / own["max"], 2), limit=roof,
        share_of_limit=round(roof["seconds"] / own["median"], 3)), *solvers.values())


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s = card["settings"]
    roof = card["limit"]
    version = card["versions"]["scikit-learn"]
    names = {"ours": "ours, float32"} | {
        name: f"scikit-learn {version}, {dtype}{', warm starts' if warm else ''}"
        for name, (dtype, warm) in PEERS.items()}
    rows = [f"| {names[k]} | {bounds(x, '.1f')} | {x['largest_gradient']:.1e} | "
            f"{x['agreement']:.1%} |" for k, x in card["solvers"].items()]
    what = (f"{s['images']:,} x {s['columns']} features, {s['classes']} classes, {s['strengths']} "
            f"strengths, tolerance {s['tol']:g}, {s['repeats']} runs of each. Ours, threads: "
            f"{s['threads']}; scikit-learn, processes: {s['processes']}.")
    lines = [
        "| seconds for all strengths | median | lowest | highest | gradient left | as ours |",
        "|---|---:|---:|---:|---:|---:|", *rows, "",
        f"Ratio of the medians, to the fastest of scikit-learn's that reach the tolerance: "
        f"**{card['ratio']}**. Our slowest run to its fastest: {card['ratio_worst']}. To the "
        f"fastest, whatever it leaves of the gradient: {card['ratio_fastest']}.",
        *closing(card, what),
        f"Roof: {roof['seconds']:.1f} s for {roof['flop'] / 1e9:,.0f} GFLOP of products at "
        f"{roof['product_gflop_per_s']} GFLOP/s; ours reach {card['share_of_limit']:.0%} of it."]
    if not card["matched"]: lines.append("**None of scikit-learn's reaches the tolerance.**")
    return "\n".join(lines) + "\n"


def options() -> argparse.ArgumentParser:
    cores = machine()["cores"]
    parser = parser_of(
        __doc__, images=(10_000, "rows to fit to", 500), repeats=(3, "timed runs of each"),
        threads=(cores, "of torch, for ours"), processes=(cores, "of scikit-learn"))
    parser.add_argument("--tol", type=float, default=1e-4, help="of the gradient (0.0001)")
    for hidden, kind in dict(share=int, of=int, peer=str, folder=Path).items():
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    return parser


def main():
    args = options().parse_args()
    if args.share is not None:
        return worker(args.folder, args.share, args.of, args.peer, args.tol)
    torch.set_num_threads(args.threads)
    card = measure(args)
    write("logistic", card, table(card), args.output)


if __name__ == "__main__": main()
