"""A reader who copies a tutorial from the site, cell by cell, gets a program that runs."""
import ast
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from cells import SLOW, UNSEEN, hidden_imports, undefined
from wings import exported

TUTORIALS = sorted((ROOT / "nbs/tutorials").glob("[0-9]*.ipynb"))
IMAGES = {"02_your_own_images": "imagenet_sample", "03_what_makes_views": "cifar10",
          "04_evaluate_an_encoder": "cifar10"}  # fixtures; the other tutorials bring their images along
ROOMS = sorted(p for p in (ROOT / "nbs").glob("*/[0-9]*.ipynb") if p not in TUTORIALS)


def code_cells(path: Path) -> list[str]:
    "Code of a notebook, cell by cell."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def visible_cells(path: Path, slow: bool = True) -> list[str]:
    "Code that the site shows of a notebook, cell by cell; without the cells marked slow if asked."
    shown = [source for source in code_cells(path) if not UNSEEN.search(source)]
    return [source for source in shown if slow or not SLOW.search(source)]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_visible_cells_define_what_they_use(path):
    assert undefined(visible_cells(path)) == []


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_visible_cells_define_what_they_use_without_the_slow_ones(path):
    assert undefined(visible_cells(path, slow=False)) == []


@pytest.mark.parametrize("cells, found", {
    ("x = 1", "print(x)"): [],
    ("import torch.nn as nn", "class A(nn.Module):\n    def f(self): return self.g(len(str(1)))"): [],
    ("[i for i in range(3)]", "lambda x, *y: [x, y]"): [],
    ("def f(): return later()\ndef later(): pass\nf()",): [],
    ("for i, (a, b) in enumerate([(1, 2)]): pass\nwith open('x') as f: f.read()", "a + b, i, f"): [],
    ("try: pass\nexcept OSError as error: print(error)",): [],
    ("print(torch.ones(2))",): [(0, "torch")],
    ("def f(x): return np.sin(x)", "import numpy as np"): [(0, "np")],
    ("f()\ndef f(): pass",): [(0, "f")],
    ("[i for i in range(3)]", "print(i)"): [(1, "i")],
    ("x: Tensor = 1",): [(0, "Tensor")],
    ("@torch.no_grad()\ndef f(x: Tensor) -> int: return x",): [(0, "Tensor"), (0, "torch")],
    ("y += 1",): [(0, "y")],
    ("from os.path import *",): [(0, "*")],
}.items())
def test_a_planted_fault_is_found(cells, found):
    assert undefined(list(cells)) == found


def test_hidden_cells_do_not_count(tmp_path):
    sources = ["#| hide\nimport torch", "#| echo: false\n#| fig-cap: x\na = 1", "#| slow\nb = 2", "torch, a, b"]
    cells = [{"cell_type": "code", "source": [source]} for source in sources]
    (path := tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert undefined(visible_cells(path)) == [(1, "a"), (1, "torch")]
    assert undefined(visible_cells(path, slow=False)) == [(0, "a"), (0, "b"), (0, "torch")]


def test_hidden_imports_of_a_page():
    cells = ["#| export\nfrom torch import Tensor, nn\nimport os", "#| hide\nimport numpy as np\nimport bundles\nx = 1",
             "#| export\ndef f(a: Tensor): pass\ndef _g(): pass", "f(np.ones(2), bundles, nn)\nimport os", "_g()"]
    assert hidden_imports(cells, "loss.tiled", {"bundles"}).splitlines() == [
        "from torch import nn", "import numpy as np", "from simclr_nb.loss.tiled import _g, f"]
    assert hidden_imports(["import os", "os.getcwd()"], None) == ""


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_the_site_gives_a_room_its_hidden_imports(path):
    "Names that the visible cells of a room still lack are values of hidden set-up, never something to import."
    cells = code_cells(path)
    imports = hidden_imports(cells, exported(path))
    missing = {name for _, name in undefined([imports, *(c for c in cells if not UNSEEN.search(c))])}
    importable = {alias.asname or alias.name.split(".")[0] for cell in cells for node in ast.parse(cell).body
                  if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert not missing & importable


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_visible_cells_run_in_a_fresh_kernel(path, tmp_path, request):
    "As in Jupyter, in a folder with saved results alone; `make slow` runs the cells marked slow, in place."
    if path.stem in IMAGES: request.getfixturevalue(IMAGES[path.stem])
    import nbformat
    from nbclient import NotebookClient
    if (path.parent / "results").is_dir(): shutil.copytree(path.parent / "results", tmp_path / "results")
    cells = [nbformat.v4.new_code_cell(source) for source in visible_cells(path, slow=False)]
    client = NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=1800, startup_timeout=300,
                            kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    client.execute(env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))})
