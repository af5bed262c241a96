"Facts stated twice agree, imports point one way and do nothing else, a wheel holds the package."
import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

try: import tomllib
except ImportError: import tomli as tomllib  # Python 3.10

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "simclr_nb"
sys.path.insert(0, str(ROOT / "tools"))
from wings import WINGS, exported, order, rooms

ORDER = order()  # modules such as `core.show` and `data`; each imports only earlier ones
DISTRIBUTION = {"sklearn": "scikit-learn", "PIL": "pillow"}  # where an import has another name

ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
REQUIREMENTS = [Requirement(r) for r in cfg["requirements"].split()]
EXTRAS = {key.removesuffix("_requirements"): [Requirement(r) for r in value.split()]
          for key, value in cfg.items() if key.endswith("_requirements")}
DEV = EXTRAS["dev"]
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.stem != "_modidx")
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)


def tracked() -> list[Path]:
    "The repository's files: those git knows and new ones it does not ignore."
    if not (ROOT / ".git").exists(): pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [p for name in out.split("\0") if name and (p := ROOT / name).is_file()]


def cells(path: Path) -> list[tuple[str, str]]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [(c["cell_type"], "".join(c["source"])) for c in notebook["cells"]]


def name(path: Path) -> str: return path.relative_to(ROOT).as_posix()


def dotted(path: Path) -> str:
    "Name of a module inside the package: `core.show`; that of a wing itself: `core`."
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


# One fact, one value

def test_pyproject_repeats_settings():
    toml = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    static = {k: v for k, v in toml["project"].items() if k != "dynamic"}
    assert static == {"name": cfg["lib_name"], "description": cfg["description"],
                      "requires-python": f">={cfg['min_python']}"}
    assert toml["tool"]["nbdev"]["update_pyproject"] is False


def test_version_is_one():
    init = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{cfg["version"]}"' in init
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.M)[1] == cfg["version"]


def test_installed_metadata_is_settings():
    dist = importlib.metadata.distribution(cfg["lib_name"])
    meta = dist.metadata
    assert (dist.version, meta["Summary"]) == (cfg["version"], cfg["description"])
    assert meta["Requires-Python"] == f">={cfg['min_python']}"
    assert meta["License-Expression"] == cfg["license"]

    def facts(requirements): return {(r.name, str(r.specifier)) for r in requirements}
    requires = [Requirement(r) for r in dist.requires]
    assert facts(r for r in requires if "extra" not in str(r.marker)) == facts(REQUIREMENTS)
    optional = facts(r for r in requires if "extra" in str(r.marker))
    assert optional == facts(r for group in EXTRAS.values() for r in group)
    scripts = {f"{e.name}={e.value}" for e in dist.entry_points if e.group == "console_scripts"}
    assert scripts == set(cfg["console_scripts"].split())


def test_site_title_and_description_are_settings():
    site = yaml.safe_load((ROOT / "nbs/_quarto.yml").read_text(encoding="utf-8"))["website"]
    assert (site["title"], site["description"]) == (cfg["lib_name"], cfg["description"])


def test_license_is_apache():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert cfg["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_bounds():
    for r in REQUIREMENTS:
        assert [s.operator for s in r.specifier] == [">="], f"{r}: a lower bound and no upper one"
    pinned = {r.name for r in DEV if any(s.operator == "==" for s in r.specifier)}
    assert pinned == {"smalldocs", "latex2mathml"}, "the site's bytes depend on these two alone"


def test_console_scripts_exist():
    for script in cfg["console_scripts"].split():
        module, function = script.split("=")[1].split(":")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, script


# Imports

def absolute(node: ast.ImportFrom, module: str) -> str:
    "Module that a `from` import of a module of the package names, without dots in front."
    if not node.level: return node.module or ""
    package = ["simclr_nb", *module.split(".")][: -node.level]
    return ".".join(package + ([node.module] if node.module else []))


def imported(tree: ast.AST, module: str) -> list[tuple[str, list[str]]]:
    "Every import, also inside functions: the module's full name, and the names taken from it."
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found += [(a.name, []) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((absolute(node, module), [a.name for a in node.names]))
    return found


def outside(tree: ast.AST, module: str) -> set[str]:
    "The distributions that a module imports from."
    tops = {full.split(".")[0] for full, _ in imported(tree, module)}
    return {DISTRIBUTION.get(t, t) for t in tops - {"simclr_nb"} - sys.stdlib_module_names}


def docstrings(tree: ast.AST) -> set[int]:
    "The nodes that are docstrings."
    return {id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
            and ast.get_docstring(node) is not None}


def import_faults(text: str, module: str) -> list[str]:
    "Imports that break the rule in the source of a module of the package."
    tree, faults = ast.parse(text), []
    for full, names in imported(tree, module):
        if full.split(".")[0] != "simclr_nb": continue
        inside = full.removeprefix("simclr_nb").lstrip(".")
        submodules = [f"{inside}.{n}".lstrip(".") for n in names]
        rooms = [inside] if inside in ORDER else [m for m in submodules if m in ORDER]
        if not rooms and names != ["__version__"]: faults.append(f"{full} is no room")
        for room in rooms:
            if ORDER.index(room) >= ORDER.index(module): faults.append(f"{room} is not above {module}")
        faults += [f"{room}.{n} is private" for room in rooms for n in names
                   if n[0] == "_" and n != "__version__"]
    docs = docstrings(tree)
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)) or id(node) in docs: continue
        if node.value.removeprefix("simclr_nb.") in ORDER and node.value.startswith("simclr_nb."):
            faults.append(f"a string: {node.value}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call): continue
        called = ast.unparse(node.func).split(".")[-1]
        if called in ("import_module", "__import__") and re.search(r"simclr_nb|['\"]\.", ast.unparse(node)):
            faults.append(ast.unparse(node))
    return faults


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=tuple(map(int, cfg["min_python"].split("."))))
    written = [line for line in text.splitlines() if not line.startswith("# %%")]
    assert len(written) <= 350, "split the notebook"
    declared = {r.name for r in REQUIREMENTS}
    top = [n for n in tree.body if not isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert outside(ast.Module(top, []), dotted(path)) <= declared, "not in settings.ini"
    if path.stem != "__init__": assert import_faults(text, dotted(path)) == []


PLANTED = {  # each breaks the rule, in a wing and at the root
    "from ..train.optim import LARS": "train.optim is not above",
    "from .train.optim import LARS": "train.optim is not above",
    "from simclr_nb.run.pretrain import RunConfig": "run.pretrain is not above",
    "from simclr_nb.run import pretrain": "run.pretrain is not above",
    "def f():\n    from simclr_nb.cli import plan": "cli is not above",
    "from simclr_nb.core.show import _hidden": "is private",
    "import simclr_nb.run.pretrain": "run.pretrain is not above",
    "import_module('simclr_nb.' + name)": "import_module",
    "importlib.import_module('.optim', __package__)": "import_module",
    "__import__('simclr_nb.learner')": "__import__",
    "load('simclr_nb.learner')": "a string",
    "from simclr_nb.nowhere import x": "is no room",
}


@pytest.mark.parametrize("fault", PLANTED)
@pytest.mark.parametrize("module", ["loss.tiled", "data"])
def test_a_planted_import_is_found(fault, module):
    if fault.startswith("from ..") and "." not in module or fault.startswith("from .train") and "." in module:
        pytest.skip("these dots lead elsewhere from here")
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    text = path.read_text(encoding="utf-8")
    assert import_faults(text, module) == []
    faults = import_faults(f"{text}\n{fault}\n", module)
    assert len(faults) >= 1 and any(PLANTED[fault] in f for f in faults), faults


def stale(package: Path, nbs: Path) -> set[str]:
    "Modules that no notebook exports, and notebooks whose module is missing or names another."
    modules = {p.relative_to(package).with_suffix("").as_posix().replace("/", "."): p
               for p in package.rglob("[!_]*.py")}
    notebooks = {exported(p): p for p in nbs.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    notebooks.pop(None, None)
    wrong = set(modules) ^ set(notebooks)
    for module in set(modules) & set(notebooks):
        named = re.search(r"File to edit: (\S+)\.$", modules[module].read_text(encoding="utf-8"), re.M)
        if not named or (modules[module].parent / named[1]).resolve() != notebooks[module].resolve():
            wrong.add(module)
    return wrong


def test_modules_and_notebooks_are_pairs():
    assert stale(PACKAGE, ROOT / "nbs") == set()
    assert sorted(ORDER) == sorted(dotted(p) for p in MODULES if p.stem != "__init__")
    assert set(ORDER) >= {door for door, about in WINGS.items() if about is None}


@pytest.mark.parametrize("where", ["loss/old.py", "old.py"])
def test_a_stale_module_is_found(tmp_path, where):
    "nbdev-export leaves the module of a moved notebook behind; it would go on satisfying imports."
    for folder in ("simclr_nb", "nbs"): shutil.copytree(ROOT / folder, tmp_path / folder)
    package, nbs = tmp_path / "simclr_nb", tmp_path / "nbs"
    assert stale(package, nbs) == set()
    shutil.copy(PACKAGE / "loss/tiled.py", package / where)
    assert stale(package, nbs) == {where[:-3].replace("/", ".")}


def test_no_room_is_named_like_what_it_exports():
    "`from simclr_nb.loss import nt_xent` must not give a module."
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        assert path.stem not in defined, path


def test_titles_differ():
    titles = [cells(p)[0][1].splitlines()[0] for p in NOTEBOOKS]
    assert len(set(titles)) == len(titles), sorted(t for t in titles if titles.count(t) > 1)


def test_links_to_notebooks_have_their_titles():
    "In the overviews, which code hosts show as they are."
    for page in (ROOT / "nbs").rglob("index.md"):
        for text, name in re.findall(r"\[([^]]*)\]\(([^)]+\.ipynb)\)", page.read_text()):
            cell = json.loads((page.parent / name).read_text())["cells"][0]
            assert text == "".join(cell["source"]).splitlines()[0].removeprefix("# "), page


def test_notebooks_live_in_wings():
    "Every notebook is the index, a tutorial, or a numbered room of a wing; numbers differ in a wing."
    wings = [wing for wing, about in WINGS.items() if about]
    listed = [p for folder in ["tutorials", *wings] for p in rooms(folder)]
    assert sorted([*listed, ROOT / "nbs/index.ipynb"]) == NOTEBOOKS
    numbers = [(p.parent.name, p.name.split("_")[0]) for p in listed]
    assert len(set(numbers)) == len(numbers)


def test_every_requirement_is_used():
    used = set()
    for path in MODULES: used |= outside(ast.parse(path.read_text(encoding="utf-8")), dotted(path))
    assert {r.name for r in REQUIREMENTS} == used & {r.name for r in REQUIREMENTS}


PROBE = """
import logging, os, random, sys
sys.modules.update(dict.fromkeys(["IPython", "ipykernel", "matplotlib_inline", "nbdev"]))
import fastai.vision.all, matplotlib, numpy, sklearn, torch, torchvision  # what these do is theirs
print("ours from here", file=sys.stderr, flush=True)

def state():
    return dict(
        python=random.getstate(), numpy=str(numpy.random.get_state()),
        torch=torch.get_rng_state().tolist(), dtype=torch.get_default_dtype(),
        threads=torch.get_num_threads(), cuda=torch.cuda.is_initialized(),
        environ=dict(os.environ), cwd=os.getcwd(), handlers=list(logging.getLogger().handlers),
        backend=str(dict.__getitem__(matplotlib.rcParams, "backend")),
        figures=matplotlib.pyplot.get_fignums(),
    )

before = state()
for name in sys.argv[1:]:
    __import__("simclr_nb." + name)
    after = state()
    changed = [k for k in before if before[k] != after[k]]
    assert not changed, f"importing simclr_nb.{name} changes {changed}"
"""


def test_import_has_no_side_effect(tmp_path):
    "Without Jupyter: no warning, output, file, backend, seed, CUDA start or changed setting."
    (home := tmp_path / "home").mkdir()
    env = dict(HOME=str(home), PATH="", PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1",
               MPLCONFIGDIR=str(tmp_path))
    command = [sys.executable, "-c", PROBE, *ORDER]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr.split("ours from here\n")[1]) == ("", "")
    assert list(home.rglob("*")) == []


# The repository

MACHINE = re.compile(r"(?<![\w.~$}/+=-])/(?:work|root|farm|home|tmp|Users)/\w[\w/.-]*")
DATA = ".tgz .gz .zip .npz .npy .pt .pth .pkl .ckpt .safetensors .parquet .onnx".split()


def test_repository_files():
    for path in tracked():
        most = 2_000_000 if path.name == "search.json" else 1_500_000  # the text of all pages
        assert path.stat().st_size <= most, f"{name(path)} is over {most / 1e6} MB"
        assert path.suffix not in DATA, f"{name(path)} is data or weights"
        try: text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError: continue
        hit = MACHINE.search(text)
        assert not hit, f"{name(path)} names a path of some machine: {hit[0]!r}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook(path):
    assert path.stat().st_size <= 1_000_000, "over 1 MB: use compact_figures()"
    all_cells = cells(path)
    assert len(all_cells) <= 80
    kind, title = all_cells[0]
    assert kind == "markdown" and re.fullmatch(r"# [^\n]+\n+> [^\n]+", title.strip()), title
    code = [source for kind, source in all_cells if kind == "code"]
    if any(re.search(r"^#\| *default_exp", source, re.M) for source in code):
        assert re.match(r"#\| *hide\b", all_cells[-1][1]) and "nbdev_export()" in all_cells[-1][1]
    for source in code:
        long = [s for s in source.splitlines() if len(s) > 100 and not s.startswith("#|")]
        assert not long, "over 100 columns"
        if re.match(r"#\| *export", source): check_export_cell(source)


def check_export_cell(source: str):
    "Its lines, besides directives, imports and documented arguments; its names; its functions and classes."
    tree = ast.parse(source)
    signatures = sum(n.body[0].lineno - n.lineno - 1 for n in ast.walk(tree)
                     if isinstance(n, ast.FunctionDef))
    signatures += sum(isinstance(field, ast.AnnAssign) for n in tree.body  # of a dataclass
                      if isinstance(n, ast.ClassDef) for field in n.body)
    only_imports = all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body)
    lines = [line for line in source.splitlines() if not line.startswith("#|")]
    assert only_imports or len(lines) - signatures <= 25, "over 25 lines: one idea a cell"
    definitions = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    public = [n.name for n in definitions if n.name[0] != "_" and not n.decorator_list]
    assert len(public) <= 1, f"one public name per export cell: {public}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 20, f"the body of {node.name} has {lines} lines"
        elif isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name} has over 80 lines"


def test_built_distributions(tmp_path):
    "The sdist holds what a build needs; the wheel made from it holds the package and nothing else."
    for path in tracked():
        (to := tmp_path / "tree" / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    dist = tmp_path / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, tmp_path / "tree"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    modules = {name(p) for p in PACKAGE.rglob("*") if p.suffix in (".py", ".json", ".js", ".css", ".html")}
    with zipfile.ZipFile(wheel) as z:
        inside = set(z.namelist())
        (about,) = (z.read(n).decode() for n in inside if n.endswith(".dist-info/METADATA"))
    assert {n for n in inside if ".dist-info/" not in n} == modules
    assert set(re.findall(r"^Provides-Extra: (\S+)$", about, re.M)) == set(EXTRAS)
    assert any(n.endswith("licenses/LICENSE") for n in inside)
    with tarfile.open(sdist) as t:
        packed = {m.name.split("/", 1)[1] for m in t.getmembers() if m.isfile()}
    plain = """settings.ini setup.py pyproject.toml setup.cfg MANIFEST.in README.md LICENSE
               CHANGELOG.md PKG-INFO""".split()
    assert {n for n in packed if ".egg-info/" not in n} == modules | set(plain)


def test_messages_name_extras_that_exist():
    named = {hit for path in MODULES for hit in re.findall(r"simclr_nb\[(\w+)\]", path.read_text("utf-8"))}
    assert "log" in named and named <= set(EXTRAS)


def test_an_editable_install_is_found_from_the_folder_that_holds_the_clone(tmp_path):
    "There Python sees a folder `simclr_nb` without `__init__.py`; only a package on the path comes before it."
    for path in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / "simclr_nb").mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / "simclr_nb" / path)
    (tmp_path / "simclr_nb/simclr_nb").mkdir()
    shutil.copy(PACKAGE / "__init__.py", tmp_path / "simclr_nb/simclr_nb")
    build = "from setuptools.build_meta import build_editable; build_editable('.')"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "simclr_nb", capture_output=True,
                          text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "simclr_nb").glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        (line,) = (z.read(n).decode().strip() for n in z.namelist() if n.endswith(".pth"))
    assert Path(line).resolve() == (tmp_path / "simclr_nb").resolve()
