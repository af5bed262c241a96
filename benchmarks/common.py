"What the benchmarks share: the machine, rates, medians, and where a result goes."
import json
import os
import platform
import re
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

import simclr_nb

HERE = Path(__file__).resolve().parent
STEADY = 1.5  # slowest over fastest run; beyond it something else was running


def rate(work, amount: int, repeats: int = 10) -> float:
    "Amount per second in the fastest of some runs."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return amount / min(times)


def spread(runs: list[float]) -> dict:
    "Median and range of some runs, and all of them."
    return dict(median=median(runs), min=min(runs), max=max(runs), runs=runs)


def steady(*spreads: dict) -> bool:
    "Whether the runs of each differ no more than those of an idle machine."
    return all(s["max"] <= STEADY * s["min"] for s in spreads)


def machine() -> dict:
    "Processor, cores open to this process, how busy it is, accelerator."
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    affinity = getattr(os, "sched_getaffinity", None)
    return dict(cpu=model[1].strip() if model else platform.processor(), system=platform.system(),
                cores=len(affinity(0)) if affinity else os.cpu_count(),
                load_before=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def versions(*packages: str) -> dict:
    "Of simclr_nb, these packages and Python."
    found = {name: version(name) for name in packages}
    return dict(simclr_nb=simclr_nb.__version__, **found, python=platform.python_version())


def write(name: str, card: dict, table: str, output: Path | None) -> None:
    "The card as JSON; without a path of its own, in the table of README.md too."
    path = output or HERE / f"results/{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    if output: return
    readme, first, last = HERE / "README.md", f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, after = readme.read_text(encoding="utf-8").split(first)
    text = before + first + table + last + after.split(last)[1]
    readme.write_text(text, encoding="utf-8")
