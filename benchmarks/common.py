"What the benchmarks share: the machine, rates, medians, and where a result goes."
import json
import os
import platform
import re
import subprocess
import sys
import time
from argparse import ArgumentParser
from importlib.metadata import version
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median

import torch

import simclr_nb

HERE = Path(__file__).resolve().parent
MIB = 2**20
STEADY = 1.5  # slowest over fastest run; beyond it something else was running


def rate(work, amount: int, repeats: int = 10) -> float:
    "Amount per second in the fastest of some runs."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return amount / min(times)


def product_rate(device: str = "cpu") -> float:
    "Operations per second of a large product of matrices: the roof of what consists of products."
    side = 1024 if device == "cpu" else 8192
    a = torch.ones(side, side, device=device)
    wait = torch.cuda.synchronize if a.is_cuda else lambda: None
    return rate(lambda: (a @ a, wait()), 2 * side**3)


def resident(field: str) -> int:
    "`VmRSS`, the memory a process holds, or `VmHWM`, the most it held; `ru_maxrss` but for Linux."
    status = Path("/proc/self/status")
    if not status.exists(): return getrusage(RUSAGE_SELF).ru_maxrss  # bytes on macOS
    line, = (s for s in status.read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) * 1024


def peak(work, cuda: bool = False) -> dict:
    "Seconds of some work, and the most memory in MiB above what was held before it."
    clear = Path("/proc/self/clear_refs")
    if cuda: torch.cuda.reset_peak_memory_stats()
    elif clear.exists(): clear.write_text("5")  # the peak starts anew
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    most = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    return dict(seconds=round(seconds, 3), peak_mib=round((most - before) / MIB, 1))


def own_process(script: str, **options) -> dict:
    "What a script prints last, as JSON, called with these options in a process of its own."
    command = [sys.executable, script, *(f"--{k}={v}" for k, v in options.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"{options}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def parser_of(description: str, **counts: tuple) -> ArgumentParser:
    "Options that every benchmark has, and counts: name to default and meaning."
    parser = ArgumentParser(description=description)
    for name, (default, text) in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--output", type=Path,
                        help="write the card here, and leave results/ and README.md alone")
    return parser


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
