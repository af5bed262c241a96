"""Fail where nbdev-export or nbdev-clean changes a file: a module out of step, outputs not clean.

The files are then in step, and named, so that `git diff` shows what was not.
"""
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def snapshot() -> dict[Path, bytes]:
    "Every module and notebook."
    paths = [p for d in ("simclr_nb", "nbs") for p in (ROOT / d).rglob("*")]
    return {p.relative_to(ROOT): p.read_bytes() for p in paths
            if p.suffix in (".py", ".ipynb", ".txt") and ".ipynb_checkpoints" not in p.parts}


def main():
    before = snapshot()
    for command in ("nbdev-export", "nbdev-clean"): subprocess.run([command], cwd=ROOT, check=True)
    after = snapshot()
    changed = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if changed: raise SystemExit("\n".join(["were not in step, and now are:", *changed]))
    print(f"in step: {len(after)} modules and notebooks")


if __name__ == "__main__": main()
