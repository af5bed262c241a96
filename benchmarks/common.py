"Shared by the benchmarks: the machine, rates, medians, and where a result goes."
import json
import os
import platform
import re
import subprocess
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median

import torch
import torch.nn.functional as F

import simclr_nb
from simclr_nb.core.store import write_atomic

HERE = Path(__file__).resolve().parent
MIB = 2**20
STEADY = 1.5  # slowest over fastest run; beyond it something else was running
IDLE = 0.5  # load for each core below which nothing else runs
HIDDEN = "output", "part", "peak", "check"  # options that change nothing of what is measured
# for a process whose memory is measured: glibc gives back at once what is freed
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def rate(work, amount: int, repeats: int = 10) -> float:
    "Amount per second in the fastest of some runs."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return amount / min(times)


def timed(work: Callable) -> float:
    "Seconds of some work."
    start = time.perf_counter()
    work()
    return round(time.perf_counter() - start, 5)


def rounds(works: dict[str, Callable[[], float]], repeats: int, warm: int = 1) -> dict[str, dict]:
    "Spread of what each work returns: one after another, in turns, after rounds to warm up."
    runs = {name: [] for name in works}
    for _ in range(warm + repeats):
        for name, work in works.items(): runs[name].append(work())
    return {name: spread(kept[warm:]) for name, kept in runs.items()}


def product_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    "Operations per second of a large product of matrices: the roof of what consists of products."
    side = 1024 if device == "cpu" else 8192
    a = torch.ones(side, side, device=device, dtype=dtype)
    return rate(lambda: (a @ a, wait(device)), 2 * side**3)


def network_rate(dtype: torch.dtype = torch.float32) -> float:
    """Operations per second, on a CPU, of what a network consists of: its roof.

    A large convolution or a large product of matrices, the faster. PyTorch has them from different
    libraries, and on some processors one is twice as fast as the other.
    """
    x = torch.ones(32, 512, 16, 16, dtype=dtype)
    weight = torch.ones(512, 512, 3, 3, dtype=dtype)
    x, weight = (v.to(memory_format=torch.channels_last) for v in (x, weight))
    convolution = rate(lambda: F.conv2d(x, weight, padding=1), 2 * x.numel() * weight[0].numel())
    return max(product_rate(dtype=dtype), convolution)


def wait(device: str | torch.device) -> None:
    "Until the device has done all that it was given."
    if torch.device(device).type == "cuda": torch.cuda.synchronize()


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


def own_process(script: str, env: dict | None = None, **options) -> dict:
    "Last line that a script prints, as JSON, called with these options in a process of its own."
    command = [sys.executable, script, *(f"--{k}={v}" for k, v in options.items())]
    kept = {k: v for k, v in os.environ.items() if k not in GIVE_BACK}
    done = subprocess.run(command, capture_output=True, text=True, env=kept | (env or {}))
    if done.returncode: raise SystemExit(f"{options}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def made_once(file: Path, work: Callable[[], dict]) -> dict:
    "Result of some work, from now or from an earlier call that kept it in this file."
    if not file.is_file(): write_atomic(file, json.dumps(work(), indent=2).encode())
    return json.loads(file.read_text(encoding="utf-8"))


def count(least: int) -> Callable[[str], int]:
    "Type of an option: whole numbers from this one on."
    def convert(text: str) -> int:
        if int(text) < least: raise ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)
    return convert


def parser_of(description: str, **counts: tuple) -> ArgumentParser:
    "Options that every benchmark has, and counts: name to default, meaning and perhaps the least."
    parser = ArgumentParser(description=description)
    for name, (default, text, *least) in counts.items():
        parser.add_argument(f"--{name}", type=count(*least or [1]), default=default,
                            help=f"{text} ({default})")
    parser.add_argument("--output", type=Path,
                        help="write the card here, and leave results/ and RESULTS.md alone")
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


def header(benchmark: str, args: Namespace, *packages: str) -> dict:
    "Beginning of a card: what, when, with which versions and settings, where; before any work."
    settings = {k: v for k, v in vars(args).items() if k not in HIDDEN}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return dict(benchmark=benchmark, date=now, versions=versions("torch", *packages),
                hardware=machine(), settings=dict(settings, seed=0))


def finish(card: dict, *spreads: dict) -> dict:
    "A card with its end: whether the runs are those of an idle machine, and seconds of all."
    start = datetime.fromisoformat(card["date"]).timestamp()
    return dict(card, steady=steady(*spreads), seconds=round(time.time() - start))


def closing(card: dict, what: str) -> list[str]:
    "Last lines of a table: what ran, where and when; and whether something disturbed it."
    h = card["hardware"]
    v = card["versions"]
    listed = ", ".join(f"{k} {v[k]}" for k in v if k not in ("simclr_nb", "python"))
    where = f"{h['cpu']}, cores: {h['cores']}, load before the run: {h['load_before']}"
    lines = [f"{what} {where}. {listed}, {card['date'][:10]}."]
    if not card["steady"]: lines.append("**Disturbed: runs differ too much. Repeat it.**")
    return lines


def bounds(s: dict, form: str = ",.1f") -> str:
    "Median, lowest and highest of a spread as cells of a table."
    return " | ".join(format(s[k], form) for k in ("median", "min", "max"))


def write(name: str, card: dict, table: str, output: Path | None) -> None:
    "Print the table, keep the card; without a path of its own, put both into their places."
    print(table, flush=True)
    path = output or HERE / f"results/{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    if output: return
    results = HERE / "RESULTS.md"
    first = f"<!-- {name} -->\n"
    last = f"<!-- /{name} -->"
    before, after = results.read_text(encoding="utf-8").split(first)
    text = before + first + table + last + after.split(last)[1]
    results.write_text(text, encoding="utf-8")


def settle(seconds: int = 300) -> None:
    "Wait until nothing else runs; after that many seconds say so and go on."
    for waited in range(0, seconds + 1, 5):
        load = os.getloadavg()[0]
        cores = machine()["cores"]
        if load < IDLE * cores: return print(f"load {load:.2f} on {cores} cores: idle")
        if not waited: print(f"load {load:.2f} on {cores} cores: waiting for less", flush=True)
        time.sleep(5)
    print(f"WARNING: load {load:.2f} on {cores} cores: something else runs, numbers say little")


if __name__ == "__main__": settle()
