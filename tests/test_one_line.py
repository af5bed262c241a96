"A command that cannot go on prints one line, never a traceback, and names the file."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from simclr_nb import cli
from simclr_nb.cli import evaluate, plan, pretrain
from simclr_nb.model.encoder import create_encoder, save_encoder

DIGITS = "--data digits --n-train 200 --n-valid 100 --protocol knn --workers 0".split()
SMALL = "--epochs 1 --width 0.125 --size 16".split()


def photos(folder: Path, n: int = 16, side: int = 40) -> Path:
    "Folder of `n` images of noise, of different sizes, so that workers decode them."
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        pixels = rng.integers(0, 256, (side, side + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return folder


@pytest.fixture
def command(call, tmp_path, monkeypatch):
    "Runs a command in an empty folder: its exit code, standard output and standard error."
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return call


@pytest.fixture
def refused(command):
    "Asserts that a command ends with code 2 and one line with the given words."
    def check(work, *argv, words=()):
        code, _, err = command(work, *argv)
        assert (code, err.count("\n")) == (2, 1), err
        for word in words: assert str(word) in err, err
    return check


def child(code: str, *argv, **kwargs) -> subprocess.CompletedProcess:
    "Run the code, then `simclr-pretrain` with the arguments, in a process of its own."
    code = f"import os, sys, threading, resource\nfrom simclr_nb.cli import pretrain\n{code}\nsys.exit(pretrain())"
    kwargs = dict(capture_output=True, text=True, timeout=120) | kwargs
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, argv)], **kwargs)


def one_line(done: subprocess.CompletedProcess) -> str:
    "The last line that a command wrote to standard error, after a check that nothing is a traceback."
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# Files

THINGS = {"list": [1, 2], "tensor": torch.zeros(3), "number": 3, "text": "abc", "none": None,
          "numbered": {1: torch.zeros(2)}, "nested": {"state_dict": {"a": 3}}}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_that_are_something_else(refused, thing, zipped):
    torch.save(THINGS[thing], "x.pth", _use_new_zipfile_serialization=zipped)
    refused(evaluate, "x.pth", "--arch", "resnet18", *DIGITS, words=["'x.pth' holds no "])


@pytest.mark.parametrize("content", [b"", b"\x80\x02.", b"\x80\x02e.", b"\x80\x80", b"PK\x03\x04"])
def test_weights_that_are_empty_or_foreign(refused, content):
    Path("x.pth").write_bytes(content)
    refused(evaluate, "x.pth", "--arch", "resnet18", *DIGITS, words=["'x.pth' is no file of weights"])


def test_weights_of_another_network(refused):
    torch.save(create_encoder("resnet18", 0.125).state_dict(), "x.pth")
    refused(evaluate, "x.pth", "--arch", "resnet34", *DIGITS, words=["'x.pth'", "missing"])
    refused(evaluate, "x.pth", "--arch", "resnet18", *DIGITS, words=["'x.pth'", "does not fit"])


DEEP = "[" * 200_000
SAVED = {"another version": dict(version="9.0"), "no config": dict(config=None),
         "a list": dict(config=[1]), "no metadata": dict(metadata=None),
         "another option": dict(config=dict(arch="resnet18", sides=3)),
         "another type": dict(config=dict(arch=3)), "another width": dict(config=dict(width="x"))}


@pytest.mark.parametrize("change", SAVED)
def test_encoder_of_another_version(refused, change, tmp_path):
    save_encoder(create_encoder("resnet18", 0.125, "cifar"), "x.safetensors")
    with safe_open("x.safetensors", "pt") as file:
        header = json.loads(file.metadata()["simclr_nb"])
        state = {k: file.get_tensor(k) for k in file.keys()}
    header |= SAVED[change]
    if change == "another version": del header["config"]  # what a later one may call otherwise
    save_file(state, "x.safetensors", dict(simclr_nb=json.dumps(header)))
    refused(evaluate, "x.safetensors", *DIGITS, words=["'x.safetensors'"])


def test_encoder_without_all_of_its_weights(refused):
    save_encoder(create_encoder("resnet18", 0.125, "cifar"), "x.safetensors")
    with safe_open("x.safetensors", "pt") as file:
        header, names = file.metadata(), [k for k in file.keys() if k != "bn1.bias"]
        save_file({k: file.get_tensor(k) for k in names}, "y.safetensors", header)
    refused(evaluate, "y.safetensors", *DIGITS, words=["'y.safetensors'", "bn1.bias"])


@pytest.mark.parametrize("text", [DEEP, "[1]", "3", '{"a', ""], ids=["deep", "list", "3", "cut", ""])
def test_encoder_with_damaged_description(refused, text):
    save_file({"a": torch.zeros(1)}, "x.safetensors", dict(simclr_nb=text))
    refused(evaluate, "x.safetensors", *DIGITS, words=["'x.safetensors' is damaged"])


@pytest.mark.parametrize("text", [DEEP, "[1]", "3", '{"a', "", "{}", '{"config": true, "data": {}, "policy": ""}',
                                  '{"config": {}, "data": 1.5, "policy": ""}'],
                         ids=["deep", "list", "number", "cut", "empty", "no keys", "no settings", "no data"])
def test_run_with_damaged_json(refused, text):
    Path("run").mkdir()
    Path("run/config.json").write_text(text)
    options = ["digits", *SMALL, "--n-train=200", "--out=run", "--resume"]
    refused(pretrain, *options, words=["'run/config.json' is damaged"])


@pytest.mark.parametrize("text", [DEEP, "[1]", '{"labels": 3}'], ids=["deep", "list", "number"])
def test_list_of_labels_that_is_none(refused, text):
    save_encoder(create_encoder("resnet18", 0.125, "cifar"), "x.safetensors")
    Path("labels.txt").write_text(text)
    refused(evaluate, "x.safetensors", "--data", photos(Path("photos")), "--protocol=semi",
            "--labels=labels.txt", "--workers=0")


@pytest.fixture
def deep(tmp_path):
    "Folder of 6 images, and of 4 that lie 1,200 folders deep; removed by name, as pytest cannot."
    photos(tmp_path / "data", 6)
    here = os.getcwd()
    os.chdir(tmp_path / "data")
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    for i in range(4): Image.new("RGB", (40, 40), (i, 9 * i, 0)).save(f"{i}.png")
    os.chdir(here)
    yield tmp_path / "data"
    subprocess.run(["rm", "-rf", tmp_path / "data"], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="removed by rm")
def test_folders_1200_deep(command, deep):
    "Either its images are used, or it is refused by name."
    code, _, err = command(pretrain, deep, *SMALL, "--workers=0", "--out=run")
    assert code in (0, 2) and err.count("\n") == (code == 2) and len(err) < 6000


# Command lines

@pytest.mark.parametrize("option", "epochs n-train n-valid seed workers bs size micro-batch".split())
@pytest.mark.parametrize("value", [10**20, -10**20])
def test_numbers_of_20_digits(refused, option, value):
    refused(pretrain, f"--{option}={value}", words=[option, value])


@pytest.mark.parametrize("option", "protocol data arch seed fractions".split())
def test_option_whose_value_is_two_dashes(refused, option):
    refused(evaluate, "x.safetensors", f"--{option}=--", words=[option, "'--'"])


def test_fault_of_the_program(command, monkeypatch, tmp_path):
    "Its traceback is in a file that the line names."
    def fail(config): return {}["no such key"]
    monkeypatch.setattr(cli, "plan_method", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out, err = command(plan)
    assert (code, out, err.count("\n")) == (1, "", 1)
    path = Path(re.search(r"fault: KeyError: 'no such key'; the traceback is in (.*)$", err)[1])
    assert path.parent == tmp_path
    assert "in fail" in path.read_text() and path.read_text().startswith("Traceback")


def test_fault_without_room_for_its_traceback(command, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "plan_method", lambda config: [][1])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    code, _, err = command(plan)
    assert (code, err.count("\n")) == (1, 1) and "no room to write the traceback" in err


# A machine that gives no more

KILL = """
def kill():
    import multiprocessing, signal, time
    while not (workers := multiprocessing.active_children()): time.sleep(0.01)
    os.kill(workers[0].pid, signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
"""


def test_killed_worker(tmp_path):
    options = ["--epochs=500", "--width=0.125", "--size=16", "--bs=4", "--workers=1"]
    done = child(KILL, photos(tmp_path / "photos", 100), *options, cwd=tmp_path)
    assert "a data worker was killed" in one_line(done)


def test_too_many_open_files(tmp_path):
    few = "resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + 6,) * 2)"
    done = child(few, photos(tmp_path / "photos"), *SMALL, "--workers=4", cwd=tmp_path)
    assert "too many open files" in one_line(done).lower()


def test_memory_limit(tmp_path):
    few = """
import torch
torch.set_num_threads(1)
pages = int(open('/proc/self/statm').read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 300 * 2**20,) * 2)
"""
    options = ["--epochs=1", "--size=256", "--bs=100", "--workers=0"]
    done = child(few, photos(tmp_path / "photos", 120, 300), *options, cwd=tmp_path)
    assert "out of memory" in one_line(done) or "starts no more" in done.stderr


FULL = """
from simclr_nb.images.files import ImageFiles
def full(self, i): raise RuntimeError("unable to write to file </torch_9_1>: No space left on device (28)")
ImageFiles.__getitem__ = full
"""


def test_shared_memory_is_full(tmp_path):
    "As PyTorch words it, in a worker."
    done = child(FULL, photos(tmp_path / "photos"), *SMALL, "--workers=1", cwd=tmp_path)
    assert "no room in shared memory (/dev/shm)" in one_line(done)


TINY_SHM = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]


def test_shared_memory_is_really_full(tmp_path):
    "64 KB of it, in a mount of its own."
    if not shutil.which("unshare") or subprocess.run([*TINY_SHM, "true"], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    options = ["--epochs=1", "--width=0.125", "--size=64", "--bs=8", "--workers=1"]
    argv = [*TINY_SHM, sys.executable, "-W", "ignore", "-c", cli_code(), photos(tmp_path / "photos")]
    done = subprocess.run([*map(str, argv), *options], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120)
    assert "no room in shared memory (/dev/shm)" in one_line(done)


# A reader that goes away

def test_reader_that_goes_away(tmp_path):
    "`simclr-pretrain | head -1`: the run goes on to its end."
    options = "--epochs 3 --width 0.125 --n-train 200 --n-valid 100 --out run".split()
    argv = [sys.executable, "-u", "-c", cli_code(), *options]
    process = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(120) == 0, err
    assert err.count("\n") == 1 and "nobody reads the output any more" in err
    assert (tmp_path / "run/report.html").exists()


def test_help_to_a_closed_pipe(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", cli_code(), "--help"], stdout=write, timeout=60,
                          stderr=subprocess.PIPE, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def cli_code() -> str: return "import sys; from simclr_nb.cli import pretrain; sys.exit(pretrain())"


# Found by the fuzz

def test_no_batch_beside_the_spares(refused, tmp_path):
    "Two training images, one of them kept as a spare."
    photos(tmp_path / "data", 4)
    refused(pretrain, tmp_path / "data", *SMALL, "--workers=0", "--skip-bad", words=["no batch of 2", "spares"])


def test_no_sound_training_image(refused, tmp_path):
    for part, content in dict(train=b"damaged", test=None).items():
        photos(tmp_path / "data" / part, 3)
        for path in (tmp_path / "data" / part).iterdir():
            if content: path.write_bytes(content)
    refused(pretrain, tmp_path / "data", *SMALL, "--workers=0", "--skip-bad", words=["too few sound images: 0"])


def test_state_of_another_version(command, monkeypatch):
    "A checkpoint that is whole, without a part that this version needs: a KeyError before."
    from simclr_nb.run import pretrain as runs
    from simclr_nb.train.checkpoint import find_checkpoints, read_checkpoint, write_checkpoint
    options = ["digits", *SMALL, "--n-train=64", "--n-valid=32", "--out=run"]
    def killed(*args): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_finish", killed)
        assert command(pretrain, *options)[0] == 130
    state = read_checkpoint(find_checkpoints(Path("run/state"))[0])
    del state["recorder"]
    shutil.rmtree("run/state")
    write_checkpoint(Path("run/state"), 1, state)
    code, _, err = command(pretrain, *options, "--resume")
    assert (code, err.count("\n")) == (2, 1), err
    assert "has no 'recorder': another version" in err
