"""Pretraining on CIFAR-10 with one GPU: images/s, share of matrix peak, k-NN and linear accuracy.

A run goes in pieces. Each ends itself in time, keeps weights and all that decides what comes next
in `--out`, and leaves with status 75; the same command goes on, and leaves with 0 when all is done:

    until python benchmarks/gpu_cifar.py --data FOLDER; do [ $? = 75 ] || break; done

`--recipe` takes the settings of a speed run (see the study of that name); others may be given, too.
A folder holds `train/CLASS/*.png` and `test/CLASS/*.png`, or `cifar-10-batches-py`. Without a GPU
it runs as well, which says something of the script and nothing of speed.
"""
import argparse
import json
import signal
import time
from pathlib import Path

import torch

from common import HERE, finish, header, parser_of, spread, wait, write
from fastai.callback.core import Callback
from gpu_common import Piece, begun, bf16_rate, kept, pieces_of
from simclr_nb.images.arrays import ImageArrays
from simclr_nb.train.probes import KNNCallback, ProbeCallback, RepresentCallback
from simclr_nb.train.checkpoint import CheckpointCallback
from simclr_nb.plan.cost import count_encoder
from simclr_nb.data import SimCLRDataLoaders, simclr_dls
from simclr_nb.images.source import Source
from simclr_nb.images.find import find_source
from simclr_nb.model.encoder import load_encoder
from simclr_nb.evaluate.features import encoder_features
from simclr_nb.evaluate.frozen import knn_accuracy, linear_evaluation
from simclr_nb.learner import SimCLRLearner, simclr_learner
from simclr_nb.studies.speedrun import SPEED_RUNS

COUNTS = dict(batch=(512, "images in a batch"), epochs=(100, "passes over the training images"),
              interval=(50, "steps between notes of the speed"), k=(200, "neighbours that vote"),
              linear_epochs=(90, "passes of linear evaluation"),
              hidden_layers=(1, "of the head", 0),
              out_dim=(128, "width of the projection"), seed=(0, "of all that is random", 0))
TEXTS = dict(data=("cifar10", "folder, or a named data set"), arch=("resnet18", "encoder"),
             precision=("auto", "auto, bf16, fp16 or fp32"), optimizer=("lars", "its name"),
             scaling=("sqrt", "of the learning rate: sqrt, linear or none"),
             policy=("auto", "augmentation"), loss=("nt_xent", "its name"))
NUMBERS = dict(width=(1.0, "times the channels"), temperature=(0.5, "of the loss"),
               lr=(None, "base learning rate; the paper's"),
               weight_decay=(1e-6, "of weights, not of biases and BatchNorm"),
               warmup=(None, "epochs; 10, at most a tenth of all"),
               strength=(None, "of the colour distortion; the policy's"))


class SpeedCallback(Callback):
    "Images per second of each interval of steps, over all pieces; ends a piece in time."
    order = 70  # before the checkpoint is written

    def __init__(self, piece: Piece, interval: int, steps: int | None, device: str):
        self.piece = piece
        self.interval = interval
        self.most = steps
        self.on = device

    def before_fit(self):
        self.began = time.monotonic()
        self.own = 0
        self.pieces = []
        self.rates = []
        self.first = []
        self.every = min(self.interval, len(self.dls.train))

    def state_dict(self) -> dict:
        "Steps from and to, and seconds, of each piece; speed of its first interval, and others."
        begin = self.pieces[-1][1] if self.pieces else 0
        own = [begin, begin + self.own, time.monotonic() - self.began]
        return dict(pieces=[*self.pieces, own], rates=self.rates, first=self.first)

    def load_state_dict(self, state: dict):
        "Go on with the notes of other pieces."
        self.pieces, self.rates, self.first = (list(state[k]) for k in ("pieces", "rates", "first"))

    def before_train(self): self._restart()

    def _restart(self):
        wait(self.on)
        self.count = 0
        self.since = time.perf_counter()

    def after_batch(self):
        if not self.training: return
        self.count += 1
        self.own += 1
        if self.count == self.every:
            wait(self.on)
            rate = self.count * self.dls.train.bs / (time.perf_counter() - self.since)
            is_first = self.own <= self.every  # compiles and warms up
            (self.first if is_first else self.rates).append(rate)
            self._restart()
        if self.piece.is_over() or self.own == self.most: signal.raise_signal(signal.SIGTERM)


def load(args: argparse.Namespace) -> tuple[SimCLRDataLoaders, SimCLRDataLoaders]:
    "Loaders for the evaluation, and for pretraining, which looks at one validation batch alone."
    options = dict(bs=args.batch, policy=args.policy, strength=args.strength, seed=args.seed,
                   device=args.device, n_train=args.n_train, progress=False)
    dls = simclr_dls(read(args.data), n_valid=args.n_valid, **options)
    if not dls.info["in_memory"]: raise SystemExit(f"{args.data}: expected small images, all alike")
    images, labels = (t[: args.batch] for t in dls.valid.dataset[:])
    few = Source(dls.info["data"], dls.train.dataset, ImageArrays(images, labels), dls.classes)
    return dls, simclr_dls(few, **options | dict(policy=dls.policy))


def read(data: str) -> str | Source:
    "Where images are, or CIFAR-10 out of its official archive for Python."
    if not (Path(data) / "cifar-10-batches-py").is_dir(): return find_source(data)
    from torchvision.datasets import CIFAR10

    parts = [CIFAR10(data, train=train) for train in (True, False)]
    arrays = [ImageArrays(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(),
                          torch.tensor(p.targets)) for p in parts]
    return Source("cifar10", *arrays, parts[0].classes)


def create_learner(dls: SimCLRDataLoaders, args: argparse.Namespace) -> SimCLRLearner:
    "Learner of the run; without `--watch` nothing in it needs a label."
    names = ("width", "temperature", "loss", "optimizer", "weight_decay", "out_dim",
             "hidden_layers", "precision", "compiled")
    options = {name: getattr(args, name) for name in names}
    learn = simclr_learner(dls, args.arch, **options)
    if not args.watch:
        for kind in (RepresentCallback, ProbeCallback, KNNCallback):
            learn.remove_cbs(learn._grab_cbs(kind))
        learn.metrics = learn.metrics[:1]
    return learn


def augmentation_seconds(learn: SimCLRLearner, args: argparse.Namespace) -> list[float]:
    "Seconds in which a batch becomes views, of ten batches, after two to warm up."
    x = learn.dls.train.one_batch()[0]
    seconds = []
    for _ in range(12):
        wait(args.device)
        start = time.perf_counter()
        learn.views.two_views(x).contiguous(memory_format=torch.channels_last)
        wait(args.device)
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def train(dls: SimCLRDataLoaders, piece: Piece, args: argparse.Namespace) -> dict:
    "Train, or go on with it, to the end of the piece or of the run; what is known of it then."
    torch.manual_seed(args.seed)
    learn = create_learner(dls, args)
    notes = SpeedCallback(piece, args.interval, args.steps, args.device)
    saving = CheckpointCallback(args.out / "state", every_minutes=2, resume=True)
    try:
        with learn.no_bar():
            learn.pretrain(args.epochs, args.lr, args.scaling, args.warmup, cbs=[notes, saving])
    except SystemExit: piece.end()  # the state is saved
    state = notes.state_dict()
    views = augmentation_seconds(learn, args)
    run = {k: str(v) for k, v in vars(args).items()}
    learn.save_encoder(args.out / "encoder.safetensors", run=run)
    return dict(state, history=learn.history(), views=views, size=learn.views.two_views.policy.size)


def accuracy(dls: SimCLRDataLoaders, args: argparse.Namespace, how: str) -> dict:
    "Of the encoder that was kept: by k-NN, or by linear evaluation."
    start = time.monotonic()
    encoder = load_encoder(args.out / "encoder.safetensors")
    encoder = encoder.to(args.device)
    options = dict(seed=args.seed, progress=False)
    if how == "knn": result = knn_accuracy(encoder_features(encoder, dls), k=args.k)
    else: result = linear_evaluation(encoder, dls, args.linear_epochs, **options)
    return dict(value=result.value, low=result.low, high=result.high,
                seconds=round(time.monotonic() - start, 1))


def flop_per_image(args: argparse.Namespace, size: int) -> float:
    "Operations for an image: two views through the network and back, its share of the loss."
    count = count_encoder(args.arch, args.width, size)
    return 2 * count.flops() + 4 * 4 * args.batch * count.dims[1]


def measure(args: argparse.Namespace, piece: Piece) -> dict:
    "The result card, made from all pieces; ends the process where this one is over before."
    first = begun(args, header("CIFAR-10 pretraining on one GPU", args, "torchvision", "fastai"))
    dls, quick = load(args)
    run = kept(args.out / "training.json", lambda: train(quick, piece, args), piece)
    found = {how: kept(args.out / f"{how}.json", lambda: accuracy(dls, args, how), piece)
             for how in ("knn", "linear")}
    peak = kept(args.out / "peak.json", lambda: dict(bf16=bf16_rate(args.device)), piece)["bf16"]
    rate = spread(run["rates"] or run["first"])
    views = spread(run["views"])
    steps = run["pieces"][-1][1]
    seconds = sum(s for *_, s in run["pieces"])
    flop = flop_per_image(args, run["size"])
    card = dict(first, data=dls.info, images_per_s=rate, first_images_per_s=run["first"],
                flop_per_image=flop, bf16_product_flop_per_s=peak,
                share_of_peak=round(rate["median"] * flop / peak, 4), views_seconds=views,
                share_of_augmentation=round(views["median"] * rate["median"] / args.batch, 4),
                steps=steps, training_seconds=round(seconds, 1), pieces=run["pieces"],
                accuracy=found, history=run["history"])
    seconds += sum(f["seconds"] for f in found.values())
    return dict(finish(card, rate), seconds=round(seconds))


def row(name: str, run: dict) -> str:
    "Of the table, one for each run."
    s, rate, found = (run[k] for k in ("settings", "images_per_s", "accuracy"))
    what = f"{name}: {s['arch']} x {s['width']:g}, batch {s['batch']}, {s['epochs']} epochs"
    how = f"{s['precision']}, {s['optimizer']}" + (", compiled" if s["compiled"] else "")
    knn, linear = (f"{found[k]['value']:.2%}" for k in ("knn", "linear"))
    return (f"| {what}, {how} | {rate['median']:,.0f} | {rate['min']:,.0f} | {rate['max']:,.0f} | "
            f"{run['share_of_peak']:.1%} | {run['share_of_augmentation']:.1%} | "
            f"{run['training_seconds']:,.0f} | {knn} | {linear} |")


def closing(name: str, run: dict) -> str:
    "Where and when a run was, and whether something disturbed it."
    h = run["hardware"]
    n = len(run["images_per_s"]["runs"])
    pieces = len(run["pieces"])
    text = (f"{name}: {n} intervals of {run['settings']['interval']} steps, pieces: {pieces}. "
            f"{h['gpu'] or h['cpu']}. torch {run['versions']['torch']}, {run['date'][:10]}.")
    return text if run["steady"] else text + " **Disturbed: intervals differ too much. Repeat it.**"


def table(card: dict) -> str:
    "Markdown for people, from the cards of some runs."
    lines = [
        "| CIFAR-10 on one GPU | images/s | lowest | highest | of bf16 peak | views, of a step | "
        "training s | k-NN | linear |", "|---|" + "---:|" * 8,
        *(row(*run) for run in card["runs"].items()), "",
        *(closing(*run) + "  " for run in card["runs"].items())]
    return "\n".join(lines) + "\n"


def publish(name: str, run: dict, args: argparse.Namespace) -> None:
    "Put the card of a run beside those of others, and print the table."
    file = args.output or HERE / "results/gpu_cifar.json"
    others = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.is_file() else {}
    card = dict(settings=run["settings"], runs=dict(others, **{name: run}))
    write("gpu_cifar", card, table(card), args.output)


def options() -> argparse.ArgumentParser:
    "Options of the script."
    parser = pieces_of(parser_of(__doc__, **COUNTS), "runs/gpu_cifar-RECIPE-SEED")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for kind, group in ((str, TEXTS), (float, NUMBERS)):
        for name, (default, text) in group.items():
            parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} ({default})")
    for name in ("n_train", "n_valid", "steps"):
        what = "of a piece at most" if name == "steps" else "images at most"
        parser.add_argument(f"--{name}", type=int, help=f"{what}; all")
    parser.add_argument("--recipe", choices=SPEED_RUNS, help="settings of a speed run")
    parser.add_argument("--compiled", action="store_true", help="compile encoder and views")
    parser.add_argument("--watch", action="store_true", help="probe and k-NN after each epoch")
    return parser


def main():
    parser = options()
    given = parser.parse_args()
    name = f"{given.recipe or 'own'}-{given.seed}"
    parser.set_defaults(out=Path(f"runs/gpu_cifar-{name}"), **SPEED_RUNS.get(given.recipe, {}))
    args = parser.parse_args()
    if args.minutes <= 0: parser.error("minutes must be above 0")
    torch.backends.cudnn.benchmark = True  # one size of images: the fastest convolution is sought
    card = measure(args, Piece(args.minutes))
    (args.out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    publish(name, card, args)


if __name__ == "__main__": main()
