"One short round of `make fuzz`, and that it finds what it looks for."
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="cases are forked")
def test_a_short_round(tmp_path):
    "Twenty seconds of cases; `make fuzz` takes twenty minutes."
    done = subprocess.run([sys.executable, "-W", "ignore", FUZZ, "--seconds", "20"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.rstrip().endswith("0 failed")


@pytest.mark.parametrize("code, out, err, wrong", [
    (0, "fine", "", ""), (2, "", "simclr-plan: error: no\n", ""), (None, "", "", "hangs"),
    (1, "", "x: fault: y\n", "traceback"), (2, "", "Traceback (most recent call last)\n", "traceback"),
    (-11, "", "", "ends with code -11"), (2, "", "a\nb\n", "not one line"), (0, "\x1b[31m", "", "escape code")])
def test_verdicts(tmp_path, code, out, err, wrong):
    (tmp_path / "stdout").write_text(out)
    (tmp_path / "stderr").write_text(err)
    found = fuzz.verdict(code, tmp_path)
    assert (found == "") if not wrong else (wrong in found)


def test_a_started_program_is_found(tmp_path):
    def work(argv): subprocess.run(["true"])
    child = os.fork()
    if not child: fuzz.in_child(work, [], tmp_path)
    assert "starts a program: subprocess.Popen" in fuzz.verdict(fuzz.ended(child, 60), tmp_path)
