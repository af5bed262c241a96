"""Seconds for logistic regression under 45 strengths of L2: ours in one batch beside scikit-learn.

Real features: an untrained ResNet-18 on CIFAR-10, 512 columns, standardised.
"""
import argparse
import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import machine, rate, spread, steady, versions, write
from simclr_nb.data import clean_loader, simclr_dls
from simclr_nb.diagnose import represent
from simclr_nb.evaluate import random_encoder
from simclr_nb.logistic import L2_STRENGTHS, fit_logistic

PEER = Path(__file__).resolve().parent / "results" / ".features.npz"  # for scikit-learn's processes


def features(n: int) -> tuple[Tensor, Tensor]:
    "Standardised representations of CIFAR-10 training images, `(n, 512)`, and classes."
    dls = simclr_dls("cifar10", n_train=n, n_valid=2, bs=256, seed=0, progress=False)
    encoder = random_encoder(dict(arch="resnet18", width=1.0, stem="cifar"))
    h, y = represent(encoder, clean_loader(dls, 0))
    return (h - h.mean(0)) / h.std(0, correction=0).clamp_min(1e-9), y


def gradient(h: Tensor, y: Tensor, weight: Tensor, bias: Tensor, l2: float) -> float:
    "Largest entry of the gradient of the mean loss, in float64: what both solvers bring below tol."
    h, weight = h.double(), weight.double()
    p = (h @ weight + bias.double()).softmax(1)
    p[torch.arange(len(y)), y] -= 1
    return max((h.T @ p + l2 * weight).abs().max().item(), p.sum(0).abs().max().item()) / len(y)


def ours(h: Tensor, y: Tensor, tol: float) -> tuple[float, list[tuple[Tensor, Tensor]]]:
    start = time.perf_counter()
    fit = fit_logistic(h, y, tol=tol)
    return time.perf_counter() - start, list(zip(fit.weight, fit.bias))


def worker(share: int, of: int, tol: float, warm: bool):
    "A process of the peer: its share of the strengths, on one thread; prints seconds, saves fits."
    from sklearn.linear_model import LogisticRegression

    data = np.load(PEER)
    h, y, fits = data["h"], data["y"], {}
    strengths = list(reversed(L2_STRENGTHS))
    mine = np.array_split(strengths, of)[share] if warm else strengths[share::of]
    print("ready", flush=True)
    input()
    model = LogisticRegression(tol=tol, max_iter=10_000, warm_start=warm)
    for l2 in mine:
        model.set_params(C=1 / l2).fit(h, y)
        fits[f"{l2:.6g}"] = np.vstack([model.coef_.T, model.intercept_])
    np.savez(PEER.with_name(f".fits{share}.npz"), **fits)
    print("done", flush=True)


def peer(tol: float, processes: int, warm: bool) -> tuple[float, dict[str, Tensor]]:
    "scikit-learn, one process per core with one thread each; starting them is not counted."
    env = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    command = [sys.executable, __file__, f"--tol={tol}", f"--of={processes}"]
    command += ["--warm"] if warm else []
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    running = [subprocess.Popen([*command, f"--share={i}"], **pipes) for i in range(processes)]
    for process in running:
        if process.stdout.readline() != "ready\n": raise SystemExit("scikit-learn did not start")
    start = time.perf_counter()
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in running:
        if process.stdout.readline() != "done\n": raise SystemExit("scikit-learn failed")
    seconds, fits = time.perf_counter() - start, {}
    for i, process in enumerate(running):
        process.wait()
        path = PEER.with_name(f".fits{i}.npz")
        with np.load(path) as found: fits |= {k: torch.from_numpy(v) for k, v in found.items()}
        path.unlink()
    return seconds, fits


def limit(h: Tensor, steps: Tensor, n_classes: int) -> dict:
    "Roof: the two products of each step alone, at the rate of a large one."
    a = torch.ones(1024, 1024)
    product = rate(lambda: a @ a, 2 * 1024**3)
    flop = int(2 * 2 * h.shape[0] * (h.shape[1] + 1) * n_classes * (steps.sum() + len(steps)))
    return dict(product_gflop_per_s=round(product / 1e9, 1), flop=flop,
                seconds=round(flop / product, 3))


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    hardware, begin = machine(), time.perf_counter()
    h, y = features(args.images)
    PEER.parent.mkdir(exist_ok=True)
    np.savez(PEER, h=h.numpy(), y=y.numpy())
    fit_logistic(h[:500], y[:500], L2_STRENGTHS[::9])  # libraries take their time at the first call
    runs, peers = {"ours": [], "sklearn": [], "sklearn_warm": []}, {}
    for _ in range(args.repeats):
        seconds, fits = ours(h, y, args.tol)
        runs["ours"].append(round(seconds, 3))
        for name in ("sklearn", "sklearn_warm"):
            seconds, peers[name] = peer(args.tol, args.processes, name == "sklearn_warm")
            runs[name].append(round(seconds, 3))
    PEER.unlink()
    left = dict(ours=[gradient(h, y, *fit, l2) for fit, l2 in zip(fits, L2_STRENGTHS)])
    for name, found in peers.items():
        found = [found[f"{l2:.6g}"] for l2 in L2_STRENGTHS]
        left[name] = [gradient(h, y, w[:-1], w[-1], l2) for w, l2 in zip(found, L2_STRENGTHS)]
    solvers = {name: dict(spread(kept), largest_gradient=max(left[name]))
               for name, kept in runs.items()}
    best = min(("sklearn", "sklearn_warm"), key=lambda name: solvers[name]["median"])
    roof = limit(h, fit_logistic(h, y, tol=args.tol).steps, int(y.max()) + 1)
    own, other = solvers["ours"], solvers[best]
    settings = dict(images=args.images, columns=h.shape[1], classes=int(y.max()) + 1,
                    strengths=len(L2_STRENGTHS), tol=args.tol, repeats=args.repeats,
                    threads=torch.get_num_threads(), processes=args.processes, dtype="float32")
    return dict(
        benchmark="logistic regression under 45 strengths of L2, seconds",
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions("torch", "scikit-learn", "scipy", "numpy"), hardware=hardware,
        settings=settings, solvers=solvers, best_peer=best,
        ratio=round(other["median"] / own["median"], 2),
        ratio_worst=round(other["min"] / own["max"], 2), limit=roof,
        share_of_limit=round(roof["seconds"] / own["median"], 3),
        steady=steady(*solvers.values()), seconds=round(time.perf_counter() - begin))


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s, h, v, roof = (card[k] for k in ("settings", "hardware", "versions", "limit"))
    names = dict(ours=f"ours, threads: {s['threads']}",
                 sklearn=f"scikit-learn {v['scikit-learn']}, processes: {s['processes']}",
                 sklearn_warm="the same, each fit starting from the one before")
    rows = [f"| {names[k]} | " + " | ".join(f"{x[q]:.1f}" for q in ("median", "min", "max"))
            + f" | {x['largest_gradient']:.1e} |" for k, x in card["solvers"].items()]
    lines = [
        "| seconds for all strengths | median | lowest | highest | largest gradient left |",
        "|---|---:|---:|---:|---:|", *rows, "",
        f"Ratio of the medians, to the faster of scikit-learn's: **{card['ratio']}**. Our slowest "
        f"run to its fastest: {card['ratio_worst']}.",
        f"{s['images']:,} x {s['columns']} features, {s['classes']} classes, {s['strengths']} "
        f"strengths, tolerance {s['tol']:g}, {s['repeats']} runs. {h['cpu']}, cores: {h['cores']}, "
        f"load before the run: {h['load_before']}. torch {v['torch']}, {card['date'][:10]}.",
        f"Roof: {roof['seconds']:.1f} s for {roof['flop'] / 1e9:,.0f} GFLOP of products at "
        f"{roof['product_gflop_per_s']} GFLOP/s; ours reach {card['share_of_limit']:.0%} of it."]
    if not card["steady"]: lines.append("**Disturbed: runs differ too much. Repeat it.**")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="rows to fit to (10000)")
    parser.add_argument("--tol", type=float, default=1e-4, help="of the gradient (0.0001)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (3)")
    parser.add_argument("--processes", type=int, default=machine()["cores"],
                        help="of scikit-learn (one per core)")
    parser.add_argument("--output", type=Path,
                        help="write the card here, and leave results/ and README.md alone")
    for hidden in ("--share", "--of"): parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.share is not None: return worker(args.share, args.of, args.tol, args.warm)
    if min(args.images, args.repeats, args.processes) < 1: parser.error("counts start at 1")
    card = measure(args)
    write("logistic", card, table(card), args.output)
    print(table(card))


if __name__ == "__main__": main()
