"Runs that are killed, stopped, short of disk or spoilt: each goes on, or says what is wrong."
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simclr_nb.train.checkpoint import find_checkpoints, latest_checkpoint, write_checkpoint

LIVES = """
import json, os, random, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from fastai.callback.core import Callback
from simclr_nb.images.arrays import ArrayEpochLoader
from simclr_nb.train.checkpoint import CheckpointCallback
from simclr_nb.data import SimCLRDataLoaders, simclr_dls
from simclr_nb.learner import simclr_learner
from simclr_nb.core.processes import rank, world_size

EPOCHS, N, BS = 3, 192, 32
dls = simclr_dls("cifar10", n_train=N, n_valid=64, seed=0, device="cpu", progress=False)

class Seen(Callback):
    "Notes the images of each step that was finished, in each life."
    def __init__(self, path): self.path = path
    def after_step(self):
        rows = self.dl.plan(self.dl.epoch)[0][self.iter].tolist()
        with open(self.path, "a") as f: f.write(json.dumps([self.epoch, self.iter, rows]) + "\\n")

def life(folder, nan=None):
    "One life of a run; writes what it ends with."
    torch.manual_seed(0)
    random.seed(0)
    train = ArrayEpochLoader(dls.train.dataset, bs=BS // world_size(), seed=0, device="cpu")
    kwargs = dict(policy=dls.policy, classes=dls.classes, info=dls.info, device=torch.device("cpu"))
    own = SimCLRDataLoaders(train, dls.valid.new(bs=32 // world_size()), **kwargs)
    learn = simclr_learner(own, width=0.0625, temperature=0.2)
    if nan is not None:
        views = learn.views.two_views
        def spoilt(x): return views(x) * (float("nan") if learn.train_iter == nan else 1.0)
        if rank() == world_size() - 1: learn.views.two_views = spoilt
    saving = CheckpointCallback(folder / "state", every_steps=1, resume=True)
    with learn.no_bar(), learn.no_logging():
        learn.pretrain(EPOCHS, cbs=[saving, Seen(folder / f"seen{rank()}.jsonl")])
    history = {k: torch.tensor(v) for k, v in learn.history().items()}
    end = dict(learn.model.state_dict(), **history, classifier=learn.probe.classifier[1].weight.detach(),
               random=torch.get_rng_state())
    torch.save(end, folder / f"end{rank()}.part")
    os.replace(folder / f"end{rank()}.part", folder / f"end{rank()}.pt")

def start(folder, before=lambda rank: None, world=1, **kwargs):
    "Begin a life in processes of its own."
    folder.mkdir(exist_ok=True)
    meeting = f"file://{folder}/meeting{time.monotonic_ns()}"
    return [fork(folder, before, world, r, meeting, kwargs) for r in range(world)]

def fork(folder, before, world, r, meeting, kwargs):
    if pid := os.fork(): return pid
    try:
        before(r)
        if world > 1:
            for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"): os.environ[name] = str(world)
            for name in ("RANK", "LOCAL_RANK"): os.environ[name] = str(r)
            torch.distributed.init_process_group("gloo", init_method=meeting, rank=r, world_size=world,
                                                 timeout=timedelta(seconds=30))
        life(folder, **kwargs)
        os._exit(0)
    except SystemExit as e: os._exit(e.code)
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", flush=True)
        os._exit(1)

def first_state(folder, pids):
    "Wait until a run has saved its state; a life that ends before that is an error."
    deadline = time.monotonic() + 120
    while not list((folder / "state").glob("*.ckpt")):
        ended = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0]]
        assert not ended, "a life ended before it saved a state"
        assert time.monotonic() < deadline, "no state within two minutes"
        time.sleep(0.01)

def end(pids):
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return codes[0] if len(codes) == 1 else codes
"""

KILLS = LIVES + """
root, n_kills, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
began = time.monotonic()
assert end(start(root / "whole", world=world)) in (0, [0] * world)
took = time.monotonic() - began
rng, kills, writes, finished = random.Random(7), 0, 0, 0

def dies_writing(left):
    "Die at a flush to the disk, when a checkpoint is half there."
    def fsync(fd):
        nonlocal left
        left -= 1
        if not left: os.kill(os.getpid(), signal.SIGKILL)
    def prepare(r): os.fsync = fsync
    return prepare

def is_over(folder): return all((folder / f"end{r}.pt").exists() for r in range(world))

while kills < n_kills or not is_over(root / f"{finished}"):
    folder = root / f"{finished}"
    if is_over(folder):
        finished += 1
        continue
    if kills >= n_kills: codes = end(start(folder, world=world))
    elif rng.random() < 0.3: codes = end(start(folder, dies_writing(rng.randint(1, 4)), world=world))
    else:
        pids = start(folder, world=world)
        time.sleep(rng.uniform(0, 0.6) * took)
        os.kill(rng.choice(pids), signal.SIGKILL)             # the others notice
        codes = end(pids)
    codes = [codes] if world == 1 else codes
    killed = -9 in codes
    kills += killed
    assert set(codes) <= ({0, -9, 1} if killed else {0}), codes
print(json.dumps(dict(kills=kills, runs=finished + 1)))
"""


def run(script: str, *args, code: int = 0) -> str:
    "Output of a script in a process of its own."
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, *map(str, args)], env=env,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def seen(folder: Path, world: int = 1) -> dict[int, list[int]]:
    "Images of each epoch on all ranks, by the last life in which each step was made."
    steps = {}
    for r in range(world):
        for line in (folder / f"seen{r}.jsonl").read_text().splitlines():
            epoch, step, rows = json.loads(line)
            steps[epoch, (step, r)] = rows
    return {e: sum((rows for (epoch, _), rows in sorted(steps.items()) if epoch == e), [])
            for e in {epoch for epoch, _ in steps}}


def same_end(a: Path, b: Path, world: int = 1) -> None:
    for r in range(world):
        first, second = (torch.load(p / f"end{r}.pt", weights_only=True) for p in (a, b))
        assert first.keys() == second.keys()
        for name in first: assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("world", [1, 2])
def test_kills_change_nothing(tmp_path, world):
    "20 kills at random moments and in the middle of writing: the same end, to the last bit."
    told = json.loads(run(KILLS, tmp_path, 20, world).splitlines()[-1])
    assert told["kills"] >= 20
    for i in range(told["runs"]):
        same_end(tmp_path / "whole", tmp_path / f"{i}", world)
        for rows in seen(tmp_path / f"{i}", world).values(): assert sorted(rows) == list(range(192))
        assert len(seen(tmp_path / f"{i}", world)) == 3
        assert not list((tmp_path / f"{i}" / "state").glob(".*.tmp"))


TERMINATED = LIVES + """
root, world = Path(sys.argv[1]), int(sys.argv[2])
all_ended = lambda code: code if world == 1 else [code] * world
assert end(start(root / "whole", world=world)) == all_ended(0)
pids = start(root / "cut", world=world)
first_state(root / "cut", pids)
os.kill(pids[-1], signal.SIGTERM)                             # one is asked, all stop
assert end(pids) == all_ended(143)
assert end(start(root / "cut", world=world)) == all_ended(0)
"""


@pytest.mark.parametrize("world", [1, 2])
def test_asked_to_stop_it_saves_and_goes_on_later(tmp_path, world):
    assert run(TERMINATED, tmp_path, world).count("asked to stop (SIGTERM): the state is in") == 1
    same_end(tmp_path / "whole", tmp_path / "cut", world)


ELASTIC = LIVES + """
root = Path(sys.argv[1])
pids = start(root / "cut", world=2)
first_state(root / "cut", pids)
os.kill(pids[0], signal.SIGKILL)
assert end(pids)[0] == -9
assert end(start(root / "cut")) == 0                          # goes on in one process
"""


def test_goes_on_in_fewer_processes(tmp_path):
    "With the same batch of all; no image is seen twice or left out."
    run(ELASTIC, tmp_path)
    one, two = tmp_path / "cut" / "seen0.jsonl", tmp_path / "cut" / "seen1.jsonl"
    steps = {}
    for line in two.read_text().splitlines() + one.read_text().splitlines():
        epoch, step, rows = json.loads(line)
        steps.setdefault((epoch, step), []).append(rows)
    for epoch in range(3):
        last = [max(steps[epoch, i], key=len) for i in range(6) if len(steps[epoch, i][-1]) == 32]
        halves = [rows for i in range(6) if len(steps[epoch, i][-1]) == 16 for rows in steps[epoch, i][:2]]
        assert sorted(sum(last + halves, [])) == list(range(192))


SPOILT = LIVES + """
root, world = Path(sys.argv[1]), int(sys.argv[2])
all_ended = lambda code: code if world == 1 else [code] * world
assert end(start(root / "nan", nan=4, world=world)) == all_ended(1)
assert end(start(root / "nan", world=world)) == all_ended(0)  # without the fault it goes on
assert end(start(root / "whole", world=world)) == all_ended(0)
"""


@pytest.mark.parametrize("world", [1, 2])
def test_not_a_number_stops_with_a_diagnosis(tmp_path, world):
    "On the last rank; all say so and stop."
    told, last = run(SPOILT, tmp_path, world), world - 1
    rows = json.loads((tmp_path / "whole" / f"seen{last}.jsonl").read_text().splitlines()[4])[2][:8]
    assert told.count("FloatingPointError") == world
    assert told.count("the projections are not finite at epoch 0, step 4, learning rate") == world
    assert told.count(f"rank {last}, images {', '.join(map(str, rows))}, ...") == world
    assert told.count("the last good state is") == told.count("step-000000004") == world
    same_end(tmp_path / "whole", tmp_path / "nan", world)


FULL = """
import resource, sys, torch
from simclr_nb.train.checkpoint import write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))     # as a disk with no more room
try: write_checkpoint(sys.argv[1], 2, dict(x=torch.zeros(100_000)))
except OSError as e: print(e)
"""


def test_no_room_left(tmp_path):
    write_checkpoint(tmp_path, 1, dict(x=torch.ones(3)))
    told = run(FULL, tmp_path)
    assert "cannot write a checkpoint" in told and "step-000000001" in told and "still there" in told
    assert [p.name[:14] for p in find_checkpoints(tmp_path)] == ["step-000000001"]
    assert torch.equal(latest_checkpoint(tmp_path)["x"], torch.ones(3))
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
def test_full_disk(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path])
    if mounted.returncode: pytest.skip("no right to mount here")
    try:
        write_checkpoint(tmp_path / "state", 1, dict(x=torch.ones(3)))
        with pytest.raises(OSError, match="No space left.*step-000000001.* is still there"):
            write_checkpoint(tmp_path / "state", 2, dict(x=torch.zeros(1_000_000)))
        assert torch.equal(latest_checkpoint(tmp_path / "state")["x"], torch.ones(3))
    finally: subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM])
def test_handler_is_given_back(signal_number):
    before = signal.getsignal(signal_number)
    from simclr_nb.data import simclr_dls
    from simclr_nb.learner import simclr_learner
    dls = simclr_dls("digits", bs=64, n_train=128, n_valid=64, seed=0, device="cpu")
    learn = simclr_learner(dls, width=0.0625)
    import tempfile
    with learn.no_bar(), learn.no_logging(), tempfile.TemporaryDirectory() as folder:
        learn.pretrain(1, checkpoints=folder)
        assert signal.getsignal(signal_number) is before
        learn.remove_cbs(learn.cbs.filter(lambda cb: cb.name == "views"))  # an error in each step
        with pytest.raises(Exception): learn.pretrain(1, checkpoints=Path(folder) / "other")
    assert signal.getsignal(signal_number) is before
