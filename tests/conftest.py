"""Fixtures: real images, a browser. The order of the files.

Real images are never downloaded by a test. They lie where fastai's `untar_data` looks for them,
`$FASTAI_HOME/data` or `~/.fastai/data`. A test that asks for images which are not there is skipped;
where `SIMCLR_NB_REQUIRE_DATA` is set, as in continuous integration, it fails, and so does a session
in which no test used the images named in `REQUIRED`.
"""
import os
import shutil
from pathlib import Path

import pytest

REQUIRED = {"cifar10"}
used = set()


def _need(reason: str, required: bool):
    "Skip, or fail where what is missing is required."
    (pytest.fail if required else pytest.skip)(reason)


def _require_data() -> bool: return bool(os.environ.get("SIMCLR_NB_REQUIRE_DATA"))


def _images(name: str) -> Path:
    folder = Path(os.environ.get("FASTAI_HOME", "~/.fastai")).expanduser() / "data" / name
    if not folder.is_dir(): _need(f"no real images at {folder}", _require_data())
    used.add(name)
    return folder


# Files that take longest, begun first, so that no worker of pytest-xdist is left with one at the end
LONGEST = "parallel transfer protocols dist cli gpu checkpoint".split()


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    "Add the images that a worker of pytest-xdist has used."
    used.update(getattr(node, "workeroutput", {}).get("used", []))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker: the session that began it judges
        session.config.workeroutput["used"] = sorted(used)
        return
    if _require_data() and not session.config.option.collectonly and REQUIRED - used:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if not _require_data(): return
    terminalreporter.section("real images")
    for name in sorted(REQUIRED | used):
        terminalreporter.line(f"{name}: {'used' if name in used else 'NOT USED: a failure'}")


@pytest.fixture(scope="session")
def cifar10() -> Path:
    "CIFAR-10 as `untar_data(URLs.CIFAR)` lays it out: `train/CLASS/*.png`, `test/CLASS/*.png`."
    return _images("cifar10")


@pytest.fixture(scope="session")
def cifar100_sample() -> Path:
    "A sample of CIFAR-100."
    return _images("cifar100_sample")


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    "A sample of ImageNet: photographs of many sizes."
    return _images("imagenet_sample")


@pytest.fixture(scope="session")
def chromium() -> str:
    "A Chromium or Chrome to drive: `$CHROMIUM`, or one on the PATH; required where `CI` is set."
    names = [os.environ.get("CHROMIUM", "chromium"), "chromium-browser", "google-chrome",
             "google-chrome-stable"]
    found = next(filter(None, map(shutil.which, names)), None)
    if not found: _need("no browser: install chromium, or set CHROMIUM", bool(os.environ.get("CI")))
    return found


@pytest.fixture(scope="module")
def browser(chromium):
    "The browser, started without anything that asks the network."
    from playwright.sync_api import sync_playwright
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
               --disable-background-networking --disable-component-update""".split()
    with sync_playwright() as p: yield p.chromium.launch(executable_path=chromium, args=flags)


@pytest.fixture
def call(capsys):
    "Runs a command, a function of its arguments: exit code, standard output and standard error."
    def run(work, *argv):
        try: code = work([str(a) for a in argv])
        except SystemExit as end: code = end.code
        return code, *capsys.readouterr()
    return run
