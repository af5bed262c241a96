"""Images per second that get two augmented views: ours beside lightly's SimCLR transform.

Both make the views of the CIFAR-10 policy from the same images, in turns, in one run.
"""
import argparse
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from common import machine, rate, spread, steady, versions, write
from simclr_nb.augment import TwoViews
from simclr_nb.data import ImageArrays, SimCLRDataLoaders, Source, simclr_dls

SIZE = 32
LIGHTLY = dict(  # as simclr_nb.augment.cifar_policy
    input_size=SIZE, cj_prob=0.8, cj_strength=0.5, cj_bright=0.8, cj_contrast=0.8, cj_sat=0.8,
    cj_hue=0.2, min_scale=0.08, random_gray_scale=0.2, hf_prob=0.5, gaussian_blur=0.0,
    normalize=None)
DIFFERENCES = (
    "Alike: boxes, flips, probabilities, ranges, random order of the colour operators, no blur, no "
    "normalisation. Unlike: lightly works on PIL images one by one and rounds to 8 bits after each "
    "operator, ours works on batches of float images.")


def load(data: str, n: int, batch: int, device: str) -> SimCLRDataLoaders:
    "Shuffled uint8 batches from memory: real CIFAR-10, or noise."
    if data == "random":
        noise = torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8)
        arrays = ImageArrays(noise, torch.full((n,), -1))
        data = Source("random", arrays, arrays)
    return simclr_dls(
        data, SIZE, batch, "cifar", n_train=n, n_valid=2, seed=0, device=device, progress=False)


class LightlyViews(Dataset):
    "lightly's transform where it is fastest: on PIL images, already decoded, in memory."

    def __init__(self, images: Tensor):
        try: from lightly.transforms import SimCLRTransform
        except ImportError:
            raise SystemExit("no lightly: pip install -r benchmarks/requirements.txt") from None
        self.images, self.transform = list(map(to_pil_image, images)), SimCLRTransform(**LIGHTLY)

    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.transform(self.images[i])


def epoch(batches, n: int, device: str) -> dict:
    "Images per second of one pass over n images; mean and spread of the pixels of the last views."
    start = time.perf_counter()
    for views in batches: views = [view.to(device, non_blocking=True) for view in views]
    if device.startswith("cuda"): torch.cuda.synchronize()
    speed, pixels = n / (time.perf_counter() - start), torch.cat(views)
    return dict(speed=round(speed, 1), mean=pixels.mean().item(), std=pixels.std().item())


def summary(runs: list[dict]) -> dict:
    "Speeds, with median and range; statistics of the pixels, which agree if the work is the same."
    pixels = {k: round(mean(run[k] for run in runs), 3) for k in ("mean", "std")}
    return dict(**spread([run["speed"] for run in runs]), pixels=pixels)


def limit() -> dict:
    """Roof for this method on this CPU: the slower of two parts, each alone and at full rate.

    Memory: uint8 images are read once and two float views written once. Arithmetic: each view is
    cropped by two matrix products. Colour counts for nothing here, so the roof is not reachable.
    """
    a, b, pixels = torch.ones(2, 2**26), torch.ones(1024, 1024), 3 * SIZE**2
    copy = rate(lambda: a[0].copy_(a[1]), 2 * a[0].nbytes)
    product = rate(lambda: b @ b, 2 * 1024**3)
    n_bytes, n_flop = pixels + 2 * 4 * pixels, 2 * 2 * 2 * pixels * SIZE
    return dict(copy_gb_per_s=round(copy / 1e9, 2), product_gflop_per_s=round(product / 1e9, 1),
                bytes_per_image=n_bytes, flop_per_image=n_flop,
                images_per_s=round(min(copy / n_bytes, product / n_flop)))


def time_both(args: argparse.Namespace) -> dict:
    "Speeds of both, a pass of one after a pass of the other, after a pass of each to warm up."
    dls = load(args.data, args.images, args.batch, args.device)
    policy, n = TwoViews(dls.policy), len(dls.train) * args.batch
    loader = DataLoader(
        LightlyViews(dls.train.dataset.images), args.batch, shuffle=True, drop_last=True,
        num_workers=args.workers, persistent_workers=args.workers > 0,
        pin_memory=args.device.startswith("cuda"))
    passes = dict(ours=lambda: ([policy(x)] for x, _ in dls.train), lightly=lambda: loader)
    runs = dict(ours=[], lightly=[])
    for _ in range(1 + args.repeats):
        for name, batches in passes.items(): runs[name].append(epoch(batches(), n, args.device))
    speeds = {name: summary(kept[1:]) for name, kept in runs.items()}
    return dict(images_timed=n, policy=repr(policy), **speeds)


def measure(args: argparse.Namespace) -> dict:
    "The result card: what was measured, and all that is needed to judge and repeat it."
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    hardware, start = machine(), time.perf_counter()
    card = time_both(args)
    ours, theirs, roof = card["ours"], card["lightly"], limit()
    share = round(ours["median"] / roof["images_per_s"], 4) if args.device == "cpu" else None
    return dict(
        benchmark="two augmented views of an image at 32 px, images/s",
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions("torch", "torchvision", "lightly", "pillow"),
        hardware=hardware, settings=dict(vars(args), seed=0), lightly_settings=LIGHTLY,
        differences=DIFFERENCES, **card, ratio=round(ours["median"] / theirs["median"], 2),
        ratio_worst=round(ours["min"] / theirs["max"], 2), limit=roof, share_of_limit=share,
        steady=steady(ours, theirs), seconds=round(time.perf_counter() - start))


def table(card: dict) -> str:
    "Markdown for people, from a card."
    s, h, v, roof = (card[k] for k in ("settings", "hardware", "versions", "limit"))
    names = dict(ours=f"ours, {s['device']}, threads: {s['threads']}",
                 lightly=f"lightly {v['lightly']}, workers: {s['workers']}")
    lines = ["| images/s, two views of each | median | lowest | highest |", "|---|---:|---:|---:|"]
    for k, name in names.items():
        speeds = (f"{card[k][q]:,.0f}" for q in ("median", "min", "max"))
        lines.append(f"| {name} | {' | '.join(speeds)} |")
    lines += [
        "", f"Ratio of the medians: **{card['ratio']}**. "
        f"Our slowest pass to lightly's fastest: {card['ratio_worst']}.",
        f"{s['data']}, {card['images_timed']:,} images a pass, {s['repeats']} passes, "
        f"batches of {s['batch']}. {h['cpu']}, cores: {h['cores']}, load before the run: "
        f"{h['load_before']}, GPU: {h['gpu'] or 'none'}.",
        f"torch {v['torch']}, torchvision {v['torchvision']}, {card['date'][:10]}."]
    if not card["steady"]: lines.append("**Disturbed: passes differ too much. Repeat it.**")
    if card["share_of_limit"]:
        lines.append(f"Roof: {roof['images_per_s']:,} images/s (copy {roof['copy_gb_per_s']} GB/s, "
                     f"products {roof['product_gflop_per_s']} GFLOP/s); ours reach "
                     f"{card['share_of_limit']:.1%} of it.")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=["cifar10", "random"], default="cifar10", help="images")
    counts = dict(images=(10_000, "how many of them"), repeats=(7, "timed passes of each"),
                  batch=(512, "images in a batch"), workers=(2, "processes, for lightly"),
                  threads=(machine()["cores"], "threads of torch, for ours"))
    for name, (default, text) in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where the views must be; a GPU if there is one")
    parser.add_argument("--output", type=Path,
                        help="write the card here, and leave results/ and README.md alone")
    args = parser.parse_args()
    if min(args.images, args.repeats, args.batch, args.threads) < 1:
        parser.error("counts start at 1")
    output = vars(args).pop("output")
    card = measure(args)
    write("augment", card, table(card), output)
    print(table(card))


if __name__ == "__main__": main()
