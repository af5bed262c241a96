"""Seconds and memory of whole training steps, beside what the cost model predicts.

The prediction sees the network, and rates that `measure_device` finds in the same run; it never
sees a training step. Steps are those of `simclr_learner`: two views, the loss, LARS. Memory is that
of a process of its own, in which the C library gives freed blocks back at once, so that the system
counts what is held; what the library keeps by default is noted beside.
"""
import argparse
import gc
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from statistics import fmean

import torch

from common import (GIVE_BACK, closing, finish, header, machine, own_process, parser_of, peak,
                    spread, timed, write)
from simclr_nb.core.processes import kept_memory
from simclr_nb.views.two_views import TwoViews
from simclr_nb.views.policy import create_policy
from simclr_nb.plan.cost import PRECISIONS
from simclr_nb.model.encoder import create_encoder
from simclr_nb.model.resnet import encoder_stem
from simclr_nb.model.head import SimCLR, projection_head
from simclr_nb.loss.tiled import NTXent
from simclr_nb.parallel.microbatch import micro_batched
from simclr_nb.train.optim import LARS
from simclr_nb.plan.plan import PlanConfig, run_plan

SAME = dict(gpus="cpu", decode_rate=0, epochs=1)
STEPS = dict(
    small=PlanConfig("50000x32", "resnet18", 0.25, batch=256, precision="bf16", **SAME),
    deep=PlanConfig("50000x32", "resnet50", 1.0, batch=32, precision="fp32", **SAME),
    photos=PlanConfig("50000x96", "resnet18", 0.5, batch=256, micro_batch=64, precision="bf16",
                      **SAME),
)


def create_step(config: PlanConfig, batch: int) -> Callable[[], None]:
    "A training step on random images, with all that it needs."
    size = int(config.data.split("x")[1])
    encoder = create_encoder(config.arch, config.width, encoder_stem(size))
    model = SimCLR(encoder, projection_head(encoder.out_dim))
    model = model.to(memory_format=torch.channels_last)
    views = TwoViews(create_policy("cifar" if size <= 64 else "paper", size))
    x = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)
    loss = NTXent()
    opt = LARS(model.parameters(), lr=0.1)
    half = config.precision != "fp32"

    def step():
        v = views(x).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", PRECISIONS[config.precision]) if half else nullcontext():
            micro = config.micro_batch
            value = loss(micro_batched(model, v, micro) if micro else model(v))
        value.backward()
        opt.step()
        opt.zero_grad()
    return step


def measure_peak(name: str) -> dict:
    "Peak memory of three steps, model and images included; for a fresh process."
    create_step(STEPS[name], 2)()  # libraries allocate something at their first call
    gc.collect()

    def work():
        step = create_step(STEPS[name], STEPS[name].batch)
        for _ in range(3): step()
    return peak(work)


def peaks(name: str, args: argparse.Namespace) -> dict:
    "MiB that steps hold, and what the C library makes of that by default."
    held, kept = (own_process(__file__, env, peak=name, threads=args.threads)["peak_mib"]
                  for env in (GIVE_BACK, {}))
    return dict(held_mib=held, by_default_mib=kept)


def seconds(name: str, args: argparse.Namespace) -> dict:
    "Seconds of each of some steps, after two to warm up."
    step = create_step(STEPS[name], STEPS[name].batch)
    with kept_memory():  # as in training
        return spread([timed(step) for _ in range(2 + args.repeats)][2:])


def compare(name: str, args: argparse.Namespace) -> dict:
    "Prediction and measurement of a configuration; the device is measured before and after."
    torch.manual_seed(0)
    plan = run_plan(STEPS[name])
    measured = seconds(name, args)
    expected = [plan.step, run_plan(STEPS[name]).step]
    memory = peaks(name, args)
    predicted = dict(seconds=round(fmean(expected), 4), both=[round(s, 4) for s in expected],
                     mib=round(sum(plan.memory.values()) / 2**20, 1))
    return dict(config=asdict(STEPS[name]), predicted=predicted, parts=plan.seconds,
                seconds=measured, **memory,
                time_ratio=round(predicted["seconds"] / measured["median"], 3),
                memory_ratio=round(predicted["mib"] / memory["held_mib"], 3))


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    card = header("training steps, predicted and measured seconds and MiB", args)
    steps = {name: compare(name, args) for name in STEPS}
    return finish(dict(card, steps=steps), *(s["seconds"] for s in steps.values()))


def row(name: str, step: dict) -> str:
    "Of the table, one for each configuration."
    c, p, s = (step[k] for k in ("config", "predicted", "seconds"))
    micro = f" by {c['micro_batch']}" if c["micro_batch"] else ""
    size = c["data"].split("x")[1]
    what = (f"{name}: {c['arch']} x {c['width']:g}, {size} px, batch {c['batch']}{micro}, "
            f"{c['precision']}")
    return (f"| {what} | {p['seconds']:.3f} | {s['median']:.3f} | {s['min']:.3f} | "
            f"{s['max']:.3f} | {step['time_ratio']:.2f} | {p['mib']:,.0f} | "
            f"{step['held_mib']:,.0f} | {step['memory_ratio']:.2f} | "
            f"{step['by_default_mib']:,.0f} |")


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s = card["settings"]
    what = f"{s['repeats']} steps of each, threads: {s['threads']}."
    lines = [
        "| a training step | s predicted | s measured | lowest | highest | ratio | MiB predicted | "
        "MiB held | ratio | MiB by default |", "|---|" + "---:|" * 9,
        *(row(name, step) for name, step in card["steps"].items()), "", *closing(card, what)]
    return "\n".join(lines) + "\n"


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, repeats=(9, "timed steps of each"),
                       threads=(machine()["cores"], "of torch"))
    parser.add_argument("--peak", choices=STEPS, help=argparse.SUPPRESS)
    return parser


def main():
    args = options().parse_args()
    torch.set_num_threads(args.threads)
    if args.peak: return print(json.dumps(measure_peak(args.peak)))
    card = measure(args)
    write("plan", card, table(card), args.output)


if __name__ == "__main__": main()
