"""Training steps of ResNet-50 at 224 px on one GPU: images/s, peak of memory, share of matrix peak.

Batches of 256 to 4,096 images, of which a micro-batch has its activations in memory at a time; on
random uint8 images that lie on the device, and on JPEG files of a folder (`--data`), decoded by
worker processes or on the device. A step makes two views of each image and is otherwise that of
`simclr_learner`: NT-Xent over the whole batch, LARS. Each batch size and source is a case; what is
measured stays in `--out`, and when the time of a piece is over the script leaves with status 75:

    until python benchmarks/gpu_step.py --data FOLDER; do [ $? = 75 ] || break; done
"""
import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from common import count, finish, header, parser_of, peak, spread, wait, write
from gpu_common import Piece, begun, bf16_rate, kept, pieces_of
from simclr_nb.views.two_views import TwoViews
from simclr_nb.views.policy import create_policy
from simclr_nb.views.compiled import compiled_views
from simclr_nb.train.callbacks import auto_precision
from simclr_nb.plan.cost import PRECISIONS, count_encoder
from simclr_nb.data import simclr_dls
from simclr_nb.model.encoder import create_encoder
from simclr_nb.model.resnet import encoder_stem
from simclr_nb.model.head import SimCLR, projection_head
from simclr_nb.loss.tiled import NTXent
from simclr_nb.parallel.microbatch import micro_batched
from simclr_nb.train.optim import LARS

SOURCES = ("random", "workers", "device")  # images, and where those of files are decoded
COUNTS = dict(size=(224, "side of the views, in pixels"), micro=(256, "images in a micro-batch", 2),
              repeats=(9, "timed steps of each case", 2), workers=(16, "processes for files", 0))


def create_step(args: argparse.Namespace) -> Callable[[Tensor], None]:
    "A training step on a batch of images, or of pairs of crops."
    torch.manual_seed(0)
    encoder = create_encoder(args.arch, args.width, encoder_stem(args.size))
    model = SimCLR(encoder, projection_head(encoder.out_dim))
    model = model.to(args.device, memory_format=torch.channels_last)
    if args.compiled: model.encoder.compile()
    loss = NTXent()
    opt = LARS(model.parameters(), lr=0.1)
    views = TwoViews(create_policy("cifar" if args.size <= 64 else "paper", args.size))
    if args.compiled: views = compiled_views(views)
    kind = torch.device(args.device).type
    half = PRECISIONS[args.precision] if args.precision != "fp32" else None

    def step(x: Tensor):
        v = views(x).contiguous(memory_format=torch.channels_last)
        with torch.autocast(kind, half) if half else nullcontext():
            value = loss(micro_batched(model, v, args.micro) if args.micro < len(x) else model(v))
        value.backward()
        opt.step()
        opt.zero_grad()
    return step


def batches(source: str, batch: int, args: argparse.Namespace) -> Iterator[Tensor]:
    "Endless batches: one of random pixels again and again, or passes over the files of a folder."
    if source == "random":
        shape = batch, 3, args.size, args.size
        x = torch.randint(256, shape, dtype=torch.uint8, device=args.device)
        while True: yield x
    loader = simclr_dls(args.data, size=args.size, bs=batch, policy="paper", seed=0, decode=source,
                        num_workers=args.workers, device=args.device, progress=False).train
    while True:
        for x, _ in loader: yield x


def seconds(step: Callable, source: Iterator[Tensor], args: argparse.Namespace) -> list[float]:
    "Seconds from batch to batch, those for the images included, after two to warm up."
    times = [time.perf_counter()]
    for _ in range(2 + args.repeats):
        step(next(source))
        wait(args.device)
        times.append(time.perf_counter())
    return [round(b - a, 5) for a, b in zip(times[2:], times[3:])]


def case(source: str, batch: int, args: argparse.Namespace) -> dict:
    "Seconds of the steps of a case, and the most memory; or why there are none."
    found = []
    cuda = torch.device(args.device).type == "cuda"
    gc.collect()  # what the case before has left
    if cuda: torch.cuda.empty_cache()

    def work(): found.extend(seconds(create_step(args), batches(source, batch, args), args))
    try: most = peak(work, cuda)
    except torch.cuda.OutOfMemoryError: return dict(failed="out of memory")
    except ValueError as error:
        if "is larger than the" not in str(error): raise
        return dict(failed=str(error))
    return dict(seconds=spread(found), peak_mib=most["peak_mib"])


def flop(args: argparse.Namespace, batch: int) -> float:
    "Operations of a step: the network, its first pass once more with micro-batches, and the loss."
    count = count_encoder(args.arch, args.width, args.size)
    again = count.flops(backward=False) if args.micro < batch else 0
    return 2 * batch * (count.flops() + again) + 4 * (2 * batch)**2 * count.dims[1]


def judged(found: dict, batch: int, rate: float, args: argparse.Namespace) -> dict:
    "A case with its images per second and its share of the matrix peak."
    if "failed" in found: return found
    s = found["seconds"]["median"]
    work = flop(args, batch)
    return dict(found, images_per_s=round(batch / s, 1), flop=work,
                share_of_peak=round(work / s / rate, 4))


def measure(args: argparse.Namespace, piece: Piece) -> dict:
    "The result card, made from all pieces; ends the process where this one is over before."
    first = begun(args, header("training steps at 224 px on one GPU", args, "torchvision"))
    sources = SOURCES if args.data else SOURCES[:1]
    rate = kept(args.out / "peak.json", lambda: dict(bf16=bf16_rate(args.device)), piece)["bf16"]
    cases = {}
    for batch in args.batches:
        for source in sources:
            name = f"{source}-{batch}"
            found = kept(args.out / f"{name}.json", lambda: case(source, batch, args), piece)
            cases[name] = dict(judged(found, batch, rate, args), source=source, batch=batch)
    measured = [c["seconds"] for c in cases.values() if "seconds" in c]
    card = finish(dict(first, bf16_product_flop_per_s=rate, cases=cases), *measured)
    return dict(card, seconds=round(sum(sum(s["runs"]) for s in measured)))


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s = card["settings"]
    h = card["hardware"]
    lines = [f"| {s['arch']} x {s['width']:g}, {s['size']} px, two views of each | images/s | "
             "lowest | highest | peak MiB | of bf16 peak |", "|---|" + "---:|" * 5]
    for c in card["cases"].values():
        what = c["source"] if c["source"] == "random" else f"JPEG, decoded by {c['source']}"
        micro = f" by {s['micro']}" if s["micro"] < c["batch"] else ""
        start = f"| {c['batch']:,}{micro}, {what} | "
        if "failed" in c: lines.append(f"{start}{c['failed']} | | | | |")
        else:
            rates = (c["batch"] / c["seconds"][k] for k in ("median", "max", "min"))
            lines.append(start + " | ".join(f"{r:,.0f}" for r in rates) +
                         f" | {c['peak_mib']:,.0f} | {c['share_of_peak']:.1%} |")
    how = f"{s['precision']}" + (", compiled" if s["compiled"] else "")
    lines += ["", f"{s['repeats']} steps of each, {how}. {h['gpu'] or h['cpu']}. "
              f"torch {card['versions']['torch']}, {card['date'][:10]}."]
    if not card["steady"]: lines.append("**Disturbed: runs differ too much. Repeat it.**")
    return "\n".join(lines) + "\n"


def options() -> argparse.ArgumentParser:
    "Options of the script."
    parser = pieces_of(parser_of(__doc__, **COUNTS), "runs/gpu_step")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--batches", type=count(2), nargs="+", default=[256, 512, 1024, 2048, 4096],
                        help="images in a batch (256 512 1024 2048 4096)")
    parser.add_argument("--data", help="folder of JPEG files; random images alone without it")
    parser.add_argument("--arch", default="resnet50", help="encoder (resnet50)")
    parser.add_argument("--width", type=float, default=1.0, help="times the channels (1)")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto",
                        help="bf16, fp32, or as suits the device (auto)")
    parser.add_argument("--compiled", action="store_true", help="compile encoder and views")
    return parser


def main():
    parser = options()
    args = parser.parse_args()
    if args.precision == "fp16": parser.error("fp16 needs a scaler of gradients: use bf16 or fp32")
    if args.precision == "auto": args.precision = auto_precision(args.device)
    torch.backends.cudnn.benchmark = True  # one size of images: the fastest convolution is sought
    card = measure(args, Piece(args.minutes))
    (args.out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    write("gpu_step", card, table(card), args.output)


if __name__ == "__main__": main()
