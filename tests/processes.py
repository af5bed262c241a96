"""Real processes over gloo: a function of a test module, called in each, and what all returned.

Every wait has an end. A process that fails ends the others, and its last words are the error.
"""
import importlib
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
PATIENCE = 30  # seconds that a process waits for others
# for a process whose memory is measured: glibc gives back at once what is freed
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run(function, world: int, folder: Path, timeout: float = 120) -> list:
    "What `function(rank, world)` returns in each of `world` processes: tensors, lists, dicts."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    what = function.__module__, function.__name__, str(folder), str(world)
    logs = [folder / f"{r}.log" for r in range(world)]
    running = []
    try:
        for r, log in enumerate(logs):
            command = [sys.executable, __file__, *what, str(r)]
            env |= dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(world),
                        LOCAL_WORLD_SIZE=str(world))
            with open(log, "wb") as file:
                running.append(subprocess.Popen(command, env=env, cwd=folder, stderr=file))
        _wait(running, logs, time.monotonic() + timeout)
    finally:
        for process in running: process.kill()
        for process in running: process.wait()
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(world)]


def _wait(running: list, logs: list[Path], end: float):
    "Until all have ended well; raises `AssertionError` if one has not, or at the end of the time."
    while any(process.poll() is None for process in running) and time.monotonic() < end:
        if any(process.returncode for process in running): break
        time.sleep(0.05)
    last = [log.read_text()[-3000:] for p, log in zip(running, logs) if p.poll()]
    if last: raise AssertionError("\n".join(last))
    if any(process.poll() is None for process in running):
        raise AssertionError(f"processes did not end in time: {logs[0].parent}")


def _main(module: str, function: str, folder: str, world: str, rank: str):
    sys.path.insert(0, str(HERE))
    work = getattr(importlib.import_module(module), function)
    dist.init_process_group("gloo", init_method=f"{Path(folder).as_uri()}/meeting", rank=int(rank),
                            world_size=int(world), timeout=timedelta(seconds=PATIENCE))
    result = work(int(rank), int(world))
    dist.destroy_process_group()
    torch.save(result, f"{folder}/{rank}.pt")


if __name__ == "__main__": _main(*sys.argv[1:])
