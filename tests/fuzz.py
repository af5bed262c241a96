"""A fuzz of the three commands: `python tests/fuzz.py --seconds 1200 --seed 0`, or `make fuzz`.

Each case is a folder and a command line drawn from (seed, kind, number). A case fails if the command ends with
anything but success or one line of refusal: a traceback, a fault, a signal, a hang, an escape code printed raw, or
a program started. A failed case is named, its folder kept; `--case KIND:NUMBER` runs it again.
"""
import argparse
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
import numpy as np
import torch
from PIL import Image

from simclr_nb import cli
from simclr_nb.run import pretrain as runs

PATIENCE = 120  # seconds for a case
SMALL = "--epochs 1 --width 0.125 --size 16 --seed 0".split()
PROGRAMS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn")
NUMBERS = ["0", "1", "2", "-1", "3", "7.5", "nan", "inf", "-inf", "1e400", "1e-400", "x", "", "--", "10**20",
           "9" * 20, "-" + "9" * 20, "٣", "0x10", "1_000", " 4", "4 ", "2147483648", "16", "0.5", "64"]
WORDS = ["", "--", "-", "auto", "digits", "cifar", "paper", "none", "x" * 5000, "résumé", "\x1b[31m", "a\nb", "a,b",
         "a/b", "/", "..", "%s", "{0}", "$HOME", "torchvision/resnet18", "timm/resnet18", "amdim/32-256-2",
         "amdim/0-0-0", "resnet50", "lars", "adam", "bf16", "linear", "identity", "0.1,0.2", ",", "knn", "all"]
NAMES = ["$_{", "price_$5_to_$10", "a\nb", "\x1b[31mred", "%d%s", "-rf", "--out", " ", "a b", "'", '"', "日本", "é" * 60,
         "x" * 200, "{}", "<b>&amp;", "\\", "~", "*", "?", "[a]", "con", "a:b", "#", "\u202e", "\x7f",
         "train", "Test", "valid", "images", "2020", "1.jpg"]
MODES = ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I", "I;16", "F", "YCbCr"]
FORMATS = ["jpg", "png", "bmp", "gif", "webp", "tif", "tiff", "jpeg", "JPG", "ppm", "tga", "ico", "jp2", "avif"]


# Material

def picture(rng: random.Random, mode: str | None = None, size: tuple | None = None) -> Image.Image:
    "Noise in a mode and a size."
    width, height = size or (rng.choice([1, 2, 7, 8, 16, 40, 150]), rng.choice([1, 3, 8, 24, 40, 140]))
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    mode = mode or "RGB"
    return image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)


def damaged(rng: random.Random, content: bytes) -> bytes:
    "Bytes with something wrong, or as they are."
    content = bytearray(content)
    how = rng.choice(["cut", "flip", "empty", "noise", "twice", "zeros", "insert", "as it is"])
    if how == "cut": return bytes(content[:rng.randrange(len(content) + 1)])
    if how == "empty": return b""
    if how == "noise": return rng.randbytes(rng.randrange(1, 400))
    if how == "twice": return bytes(content + content)
    if how == "flip":
        for _ in range(rng.choice([1, 3, 30])):
            if content: content[rng.randrange(len(content))] = rng.randrange(256)
    if how == "zeros" and content:
        start = rng.randrange(len(content))
        content[start:start + 64] = bytes(len(content[start:start + 64]))
    if how == "insert":
        at = rng.randrange(len(content) + 1)
        content[at:at] = rng.randbytes(rng.randrange(1, 20))
    return bytes(content)


def image_bytes(rng: random.Random, suffix: str = "jpg", **kwargs) -> bytes:
    "A file of an image; where Pillow cannot write it so, a PNG."
    buffer = io.BytesIO()
    image = picture(rng, **kwargs)
    for kind in (Image.registered_extensions().get(f".{suffix.lower()}", "PNG"), "PNG"):
        try:
            image.save(buffer, kind)
            return buffer.getvalue()
        except (OSError, ValueError, KeyError): buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    "Write a file where the system takes its name."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError: pass


def sound(rng: random.Random, folder: Path, n: int = 6, **kwargs) -> None:
    for i in range(n): write(folder / f"{i}.png", image_bytes(rng, "png", **kwargs))


def workers(rng: random.Random) -> list[str]: return ["--workers", rng.choice(["0", "0", "0", "1"])]


# Kinds of cases: each fills an empty folder, which is the working folder, and gives command and arguments

def images(rng: random.Random, base: Path):
    "Images of any format and mode, some damaged, through the whole command."
    size = rng.choice([None, (40, 32)])
    for i in range(rng.randrange(4, 10)):
        suffix = rng.choice(FORMATS)
        content = image_bytes(rng, suffix, mode=rng.choice(MODES), size=size)
        if rng.random() < 0.3: content = damaged(rng, content)
        if rng.random() < 0.05: content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\nshowpage\n"
        write(Path("data", rng.choice(["", "a", "b"]), f"{i}.{suffix}"), content)
    extra = ["--skip-bad"] if rng.random() < 0.7 else []
    return cli.pretrain, ["data", *SMALL, *workers(rng), *extra]


def names(rng: random.Random, base: Path):
    "Sound images below folders and in files that are called anything."
    root = Path("data" if rng.random() < 0.7 else rng.choice(NAMES))
    for label in rng.sample(NAMES, 2):
        if rng.random() < 0.2: label = os.fsdecode(b"\xff\xfe" + label.encode()[:20])
        for i in range(4): write(root / label / f"{rng.choice(NAMES)[:100]}{i}.png", image_bytes(rng, "png"))
    argv = [str(root), *SMALL, *workers(rng)]
    if rng.random() < 0.3: argv += ["--out", rng.choice(NAMES)]
    return cli.pretrain, argv


def layouts(rng: random.Random, base: Path):
    "Trees of folders with what folders have: pipes, links, loops, other files, archives."
    folders = [Path("data")]
    for _ in range(rng.randrange(1, 8)): folders.append(rng.choice(folders) / rng.choice(
        ["train", "Train", "Test", "test", "val", "cat", "dog", "2020", "images", ".hidden", "__MACOSX"]))
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(rng.choice([0, 0, 1, 3, 5])): write(folder / f"{i}.png", image_bytes(rng, "png", size=(40, 32)))
    for _ in range(rng.randrange(4)):
        place = rng.choice(folders) / rng.choice(["x.jpg", "x.tar", "labels.csv", "x.png", "Thumbs.db", "x.npy"])
        if os.path.lexists(place): continue
        how = rng.choice(["fifo", "loop", "broken", "folder", "text", "tar", "closed"])
        if how == "fifo": os.mkfifo(place)
        elif how == "loop": place.symlink_to(Path.cwd() / "data")
        elif how == "broken": place.symlink_to("nowhere")
        elif how == "folder": place.mkdir()
        elif how == "tar": write(place, tar_bytes(rng))
        else: write(place, b"text")
        if how == "closed": place.chmod(0)
    return cli.pretrain, ["data", *SMALL, *workers(rng), *(["--skip-bad"] if rng.random() < 0.3 else [])]


def command_lines(rng: random.Random, base: Path):
    "Options with values that nobody means; a run that would start is a tiny one."
    command, config = rng.choice([(cli.pretrain, cli.RunConfig), (cli.evaluate, cli.EvaluationConfig),
                                  (cli.plan, cli.PlanConfig)])
    options = [a for a in cli.config_parser("x", config)._actions if a.option_strings]
    argv = []
    if command is cli.pretrain: argv = ["digits", "--n-train=64", "--n-valid=32", *SMALL]
    if command is cli.evaluate: argv = [str(base / "run/encoder.safetensors"), "--data=digits", "--protocol=knn",
                                        "--n-train=64", "--n-valid=32", "--workers=0"]
    for action in rng.choices(options, k=rng.randrange(1, 4)):
        name = rng.choice(action.option_strings)
        if name in ("--epochs", "--compiled", "--help", "-h", "--workers", "--checkpoint-minutes"): continue
        value = rng.choice(NUMBERS if rng.random() < 0.5 else WORDS)
        argv += [name] if action.nargs == 0 else rng.choice([[f"{name}={value}"], [name, value]])
    if rng.random() < 0.1: argv.append(rng.choice(WORDS))
    return command, [text.replace("\0", "") for text in argv]


def json_files(rng: random.Random, base: Path):
    "A finished run or evaluation with one damaged file, asked to go on."
    done = rng.choice(["run", "evaluation"])
    shutil.copytree(base / done, "run")
    path = rng.choice(sorted(p for p in Path("run").iterdir() if p.suffix in (".json", ".csv", ".gz", ".html")))
    content = path.read_bytes()
    if path.suffix == ".gz" and rng.random() < 0.7: content = gzip.compress(changed(rng, gzip.decompress(content)))
    elif path.suffix == ".json" and rng.random() < 0.7: content = changed(rng, content)
    else: content = damaged(rng, content)
    path.write_bytes(content)
    if done == "run" and rng.random() < 0.3: Path("run/report.html").unlink(missing_ok=True)
    if done == "run": return cli.pretrain, [*BASE, "--out", "run", "--resume"]
    return cli.evaluate, [str(base / "run/encoder.safetensors"), *EVALUATION, "--out", "run"]


def changed(rng: random.Random, content: bytes) -> bytes:
    "JSON with one value of another type, one key gone, or no object at all."
    odd = rng.choice([None, 3, -1, 1e400, "x", [], {}, [1], True, "x" * 10_000, {"a": {"b": []}}])
    if rng.random() < 0.2: return rng.choice([b"[" * 200_000, b"{}", b"[]", b"3", b"null", b'"x"', b"NaN"])
    try: value = json.loads(content)
    except ValueError: return content
    place = value
    while isinstance(place, (dict, list)) and place:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7: place = place[key]
        elif rng.random() < 0.3 and isinstance(place, dict): del place[key]; break
        else: place[key] = odd; break
    return json.dumps(value).encode()


def tar_bytes(rng: random.Random) -> bytes:
    "An archive of images, with members of every type and name."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice([0, 1, 2])) as tar:
        for i in range(rng.randrange(1, 9)):
            content = image_bytes(rng, "png")
            if rng.random() < 0.2: content = damaged(rng, content)
            name = rng.choice([f"a/{i}.png", f"b/{i}.png", f"{i}.png", f"../{i}.png", f"/tmp/{i}.png", rng.choice(NAMES)[:90] + ".png"])
            member = tarfile.TarInfo(name.encode("utf-8", "replace").decode())
            member.size = len(content)
            if rng.random() < 0.15: member.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
            try: tar.addfile(member, io.BytesIO(content))
            except (ValueError, UnicodeError, OSError): pass
    return buffer.getvalue()


def tars(rng: random.Random, base: Path):
    content = tar_bytes(rng)
    if rng.random() < 0.6: content = damaged(rng, content)
    write(Path("data.tar"), content)
    if rng.random() < 0.2: write(Path("data.json"), changed(rng, b'{"parts": {"train": [], "valid": []}, "data": "x"}'))
    return cli.pretrain, ["data.tar", *SMALL, *workers(rng), *(["--skip-bad"] if rng.random() < 0.5 else [])]


def checkpoints(rng: random.Random, base: Path):
    "Encoders, heads, weights and states of runs that are damaged, or something else."
    how = rng.choice(["encoder", "encoder", "weights", "object", "state", "state"])
    if how == "state":
        shutil.copytree(base / "killed", "run")
        path = rng.choice(sorted(p for p in Path("run/state").rglob("*") if p.is_file()))
        path.write_bytes(damaged(rng, path.read_bytes()))
        return cli.pretrain, [*BASE, "--out", "run", "--resume"]
    if how == "encoder":
        write(Path("x.safetensors"), damaged(rng, (base / "run/encoder.safetensors").read_bytes()))
        return cli.evaluate, ["x.safetensors", *EVALUATION]
    thing = torch.load(base / "weights.pth", weights_only=True)
    if how == "object": thing = rng.choice([thing, [thing], {1: 2}, torch.zeros(3), None, "x", {"model": 3}, {"state_dict": []},
                                            {k: None for k in thing}, {k: v.double() for k, v in thing.items()},
                                            {k: v[..., :1] if v.ndim else v for k, v in thing.items()}])
    torch.save(thing, "x.pth", _use_new_zipfile_serialization=rng.random() < 0.7)
    if how == "weights": write(Path("x.pth"), damaged(rng, Path("x.pth").read_bytes()))
    return cli.evaluate, ["x.pth", "--arch", rng.choice(["resnet18", "torchvision/resnet18", "amdim/8-64-1"]), "--width-x"][:3] + EVALUATION


KINDS = dict(images=images, names=names, layouts=layouts, command_lines=command_lines, json_files=json_files, tars=tars,
             checkpoints=checkpoints)
BASE = ["digits", "--n-train=64", "--n-valid=32", "--epochs=2", "--width=0.125", "--workers=0"]
EVALUATION = "--data digits --n-train 64 --n-valid 32 --protocol knn --workers 0".split()


# Running a case

def prepare(base: Path) -> None:
    "Files for the cases to damage: a run, a run that was killed, an evaluation, and weights."
    def killed(*args, **kwargs): raise KeyboardInterrupt
    finish, runs._finish = runs._finish, killed
    cli.pretrain([*BASE, "--out", str(base / "killed")])
    runs._finish = finish
    cli.pretrain([*BASE, "--out", str(base / "run")])
    cli.evaluate([str(base / "run/encoder.safetensors"), *EVALUATION, "--out", str(base / "evaluation")])
    from simclr_nb.model.encoder import create_encoder
    torch.save(create_encoder("resnet18", 0.125).state_dict(), base / "weights.pth")


def in_child(command, argv: list[str], folder: Path) -> None:
    "The command in this process, which ends with it."
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for handle, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, handle)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    tempfile.tempdir = str(folder)
    def heed(event, args):
        if event in PROGRAMS: (folder / "started").write_text(f"{event} {args!r}")
    sys.addaudithook(heed)
    code = 99
    try: code = command(argv)
    except SystemExit as error: code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr): stream.flush()
        os._exit(code if isinstance(code, int) else 0)


def ended(child: int, patience: float) -> int | None:
    "Exit code or minus the signal of a child; None if it had to be ended."
    limit = time.monotonic() + patience
    while time.monotonic() < limit:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid: return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def verdict(code: int | None, folder: Path) -> str:
    "Fault in the way a case ended; empty if there is none."
    out, err = ((folder / name).read_text("utf-8", "replace") for name in ("stdout", "stderr"))
    if code is None: return f"hangs for {PATIENCE} s"
    if (folder / "started").exists(): return "starts a program: " + (folder / "started").read_text()[:200]
    if "Traceback" in err + out or code == 1:
        logs = "".join(path.read_text() for path in folder.glob("*.log"))
        return f"traceback, code {code}: {(err + logs)[-1500:]}"
    if code not in (0, 2): return f"ends with code {code}: {err[-300:]}"
    if code == 2 and (err.count("\n") != 1 or "error: " not in err): return f"not one line: {err[:500]!r}"
    if "\x1b" in err + out: return f"prints an escape code: {err + out!r}"[:300]
    return ""


def run_case(kind: str, number: int, seed: int, base: Path, root: Path) -> str:
    "Fault of one case; keeps the folder of the case only if there is one."
    folder = root / f"{kind}-{number}"
    (work := folder / "work").mkdir(parents=True)
    os.chdir(work)
    command, argv = KINDS[kind](random.Random(f"{seed} {kind} {number}"), base)
    (folder / "command.txt").write_text(repr([command.__name__, *argv]))
    child = os.fork()
    if not child: in_child(command, argv, folder)
    wrong = verdict(ended(child, PATIENCE), folder)
    os.chdir(root)
    if not wrong: shutil.rmtree(folder, ignore_errors=True)
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", help="one case, KIND:NUMBER")
    parser.add_argument("--kinds", default=",".join(KINDS))
    args = parser.parse_args(argv)
    start, here, root = time.monotonic(), Path.cwd(), Path(tempfile.mkdtemp(prefix="fuzz-"))
    torch.set_num_threads(1)
    prepare(root / "base")
    cases = [args.case.split(":")] if args.case else (
        (kind, number) for number in range(10**9) for kind in args.kinds.split(","))
    counts, failed = Counter(), []
    for kind, number in cases:
        if time.monotonic() - start > args.seconds: break
        wrong = run_case(kind, int(number), args.seed, root / "base", root)
        counts[kind] += 1
        if wrong: failed.append(f"{kind}:{number} in {root / f'{kind}-{number}'}: {wrong}")
        if wrong: print(failed[-1], flush=True)
    os.chdir(here)
    told = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    print(f"seed {args.seed}: {sum(counts.values())} cases ({told}), {len(failed)} failed")
    if not failed: shutil.rmtree(root, ignore_errors=True)
    return int(bool(failed))


if __name__ == "__main__": sys.exit(main())
