"""Processes of their own: functions of test modules over gloo, and scripts.

They are forked from a server that has imported the package once: that takes longer than most of them.
Every wait has an end. A process that fails ends the others, and its last words are the error.
"""
import importlib
import multiprocessing
import os
import random
import runpy
import sys
import time
import warnings
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

PATIENCE = 30  # seconds that a process waits for others
# for a process whose memory is measured: glibc gives back at once what is freed
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@cache
def server():
    "Server that starts processes of one thread that have imported the package."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simclr_nb.cli"])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"): forkserver.ensure_running()
    return context


def start(log: Path, function, *args):
    "Call a function in a process of its own, which prints into a file."
    process = server().Process(target=_print_to, args=(str(log), function, *args))
    process.start()
    return process


def _print_to(log: str, function, *args):
    for stream in (1, 2): os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    random.seed()  # as in a new process; PyTorch's seed is the same in all of them
    np.random.seed()
    function(*args)


def run(function, world: int, folder: Path, timeout: float = 120) -> list:
    "Results of `function(rank, world)` in each of `world` processes: tensors, lists, dicts."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    what = function.__module__, function.__name__, str(folder), world
    logs = [folder / f"{r}.log" for r in range(world)]
    running = []
    try:
        for r, log in enumerate(logs): running.append(start(log, _member, *what, r))
        _wait(running, logs, time.monotonic() + timeout)
    finally: _end(running)
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(world)]


def _member(module: str, function: str, folder: str, world: int, rank: int):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_WORLD_SIZE=str(world))
    work = getattr(importlib.import_module(module), function)
    dist.init_process_group("gloo", init_method=f"{Path(folder).as_uri()}/meeting", rank=rank,
                            world_size=world, timeout=timedelta(seconds=PATIENCE))
    result = work(rank, world)
    dist.destroy_process_group()
    torch.save(result, f"{folder}/{rank}.pt")


def script(path: Path, *argv, log: Path, timeout: float = 300) -> tuple[int, str]:
    "Exit status of a Python script, and what it printed."
    process = start(log, _script, str(path), list(map(str, argv)))
    try: process.join(timeout)
    finally: _end([process])
    assert process.exitcode >= 0, f"{path} did not end in time:\n{log.read_text()}"
    return process.exitcode, log.read_text()


def _script(path: str, argv: list[str]):
    warnings.simplefilter("ignore")
    sys.argv = [path, *argv]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def _wait(running: list, logs: list[Path], end: float):
    "Wait until all have ended with exit code 0; raises `AssertionError` if one has not, or at the end of the time."
    while any(process.exitcode is None for process in running) and time.monotonic() < end:
        if any(process.exitcode for process in running): break
        time.sleep(0.02)
    last = [log.read_text()[-3000:] for p, log in zip(running, logs) if p.exitcode]
    if last: raise AssertionError("\n".join(last))
    if any(process.exitcode is None for process in running):
        raise AssertionError(f"processes did not end in time: {logs[0].parent}")


def _end(running: list):
    for process in running: process.kill()
    for process in running: process.join(10)
