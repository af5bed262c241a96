"""The one list of wings. Sidebar, index and the import test read it; rooms come from the folders.

A wing is a folder of notebooks and the sub-package they export; a room is one notebook and its module.
A room may import from a wing or door higher in this list, or from a lower number in its own wing.
"""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"^\d+[a-zA-Z0-9]*_")  # `01_show` is the room, and the page, `show`
WINGS = {  # name: title, what it is for
    "core": ("Core", "figures, processes, atomic files, long work"),
    "views": ("Views", "the paper's augmentations, two views of every image"),
    "model": ("Model", "encoders and projection heads"),
    "convert": ("Convert", "weights from and to other libraries"),
    "loss": ("Loss", "NT-Xent and the losses it is compared with"),
    "images": ("Images", "from folders, shards and arrays to batches on the device"),
    "data": None,
    "parallel": ("Parallel", "one batch on many processes, or in micro-batches"),
    "plan": ("Plan", "what a run costs in time, memory and traffic, before it starts"),
    "measure": ("Measure", "what a representation contains, with intervals"),
    "train": ("Train", "optimiser, callbacks, checkpoints, the learner"),
    "learner": None,
    "evaluate": ("Evaluate", "k-NN, logistic, linear, fine-tuning; results that can be compared"),
    "methods": ("Methods", "other contrastive methods under the same learner"),
    "transfer": ("Transfer", "the paper's twelve data sets and their searches"),
    "theory": ("Theory", "canonical correlations of two views, bounds on mutual information"),
    "run": ("Run", "whole experiments as folders, reports and commands"),
    "studies": ("Studies", "experiments of the paper that anyone can run"),
    "cli": None,
}  # None: a door, a module at the root whose notebook lives in a wing


def rooms(wing: str) -> list[Path]:
    "Notebooks of a wing, in order."
    found = (ROOT / "nbs" / wing).glob("*.ipynb")
    return sorted(p for p in found if NUMBER.match(p.name))


def exported(notebook: Path) -> str | None:
    "Module that a notebook exports to, such as `core.show`; None if it exports nothing."
    name = re.search(r'#\| *default_exp (\S+?)(?:\\n)?"', notebook.read_text(encoding="utf-8"))
    return name[1] if name else None


def order() -> list[str]:
    "Every module of the package, such as `core.show` or `data`, in the order in which they may import."
    names = [exported(path) for wing, about in WINGS.items() if about for path in rooms(wing)]
    names = [name for name in names if name]
    return [n for entry in WINGS for n in names if n.split(".")[0] == entry]
