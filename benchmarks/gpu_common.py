"Shared by the benchmarks for a GPU: runs in pieces that end themselves in time, and rates."
import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from common import machine, made_once, product_rate
from simclr_nb.core.store import write_atomic

AGAIN = 75  # exit status of a piece after which the same command goes on (EX_TEMPFAIL)
PART = {"minutes", "steps", "output", "out"}  # options that may differ from piece to piece


class Piece:
    "A part of a run, with an end; each piece gets something done, however short it is."

    def __init__(self, minutes: float):
        self.start = time.monotonic()
        self.limit = 60 * minutes
        self.is_idle = True

    def seconds(self) -> float: return time.monotonic() - self.start

    def is_over(self) -> bool:
        "Whether it is time to save and stop, before the limit is there."
        return self.seconds() > 0.93 * self.limit  # imports came before

    def begin(self) -> None:
        "Before work that cannot be divided: only in the first half, unless it is the first."
        if not self.is_idle and self.seconds() > self.limit / 2: self.end()
        self.is_idle = False

    def end(self) -> None:
        "End the process; what was done is kept."
        print(f"piece over after {self.seconds():.0f} s: the same command goes on", flush=True)
        raise SystemExit(AGAIN)


def kept(file: Path, work: Callable[[], dict], piece: Piece) -> dict:
    "Result of some work, from now or from an earlier piece."
    if not file.is_file(): piece.begin()
    return made_once(file, work)


def begun(args: Namespace, card: dict) -> dict:
    "Beginning of the card of a run: of its first piece; raises `SystemExit` for another run."
    file = args.out / "begun.json"
    given = {k: v for k, v in vars(args).items() if k not in PART} | dict(gpu=machine()["gpu"])
    own = json.loads(json.dumps(given, default=str))
    if not file.is_file():
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(dict(card, settings=own), indent=2).encode())
    first = json.loads(file.read_text(encoding="utf-8"))
    for name, value in own.items():
        if first["settings"].get(name) != value:
            raise SystemExit(f"{args.out} holds a run with {name} {first['settings'].get(name)}, "
                             f"not {value}: use the same options, or another folder (--out)")
    return first


def pieces_of(parser: ArgumentParser, out: str) -> ArgumentParser:
    "The same parser, with the options of a run in pieces."
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder of the run ({out})")
    parser.add_argument("--minutes", type=float, default=9.0, help="of a piece at most (9)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cuda, or cpu to try the script; a GPU where there is one")
    return parser


def bf16_rate(device: str) -> float:
    "bf16 operations per second of a large product of matrices, the peak that is compared with."
    return product_rate(torch.device(device).type, torch.bfloat16)
