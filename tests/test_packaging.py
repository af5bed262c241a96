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
MAP = """show processes crop color distort augment fused listing shards loader arrays files
         data pack labels datasets encoder head loss alternatives dist microbatch optim
         diagnose transformation multiview bounds amdim nce callback checkpoint parallel learner amdim_learner
         result significance comparison logistic classifier evaluate amdim_evaluate
         run search finetune transfer protocols study convert cost plan cli speedrun""".split()
DISTRIBUTION = {"sklearn": "scikit-learn", "PIL": "pillow"}  # where an import has another name

ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
REQUIREMENTS = [Requirement(r) for r in cfg["requirements"].split()]
DEV = [Requirement(r) for r in cfg["dev_requirements"].split()]
MODULES = sorted(p for p in PACKAGE.glob("*.py") if p.stem != "_modidx")
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
    assert facts(r for r in requires if "extra" in str(r.marker)) == facts(DEV)
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

def imported(tree: ast.AST) -> list[tuple[str, int]]:
    "Every imported module: its dotted name, and whether it is ours (level 1)."
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found += [(a.name, 0) for a in node.names]
        elif isinstance(node, ast.ImportFrom): found.append((node.module or "", node.level))
    full = [m.removeprefix("simclr_nb").lstrip(".") for m, _ in found if m.startswith("simclr_nb")]
    return [(m, 1) for m in full] + [f for f in found if not f[0].startswith("simclr_nb")]


def outside(tree: ast.AST) -> set[str]:
    "The distributions that a tree imports from."
    tops = {m.split(".")[0] for m, level in imported(tree) if not level}
    return {DISTRIBUTION.get(t, t) for t in tops - sys.stdlib_module_names}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_module(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=tuple(map(int, cfg["min_python"].split("."))))
    written = [line for line in text.splitlines() if not line.startswith("# %%")]
    assert len(written) <= 400, "split the notebook"
    declared = {r.name for r in REQUIREMENTS}
    top = [n for n in tree.body if not isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert outside(ast.Module(top, [])) <= declared, "not in settings.ini"
    if path.stem == "__init__": return
    row = MAP.index(path.stem)
    for module, level in imported(tree):
        if not (level and module): continue
        assert MAP.index(module.split(".")[0]) < row, f"{path.stem} imports {module}, a later row"


def test_every_requirement_is_used():
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in MODULES]
    used = set().union(*map(outside, trees))
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
    names = [m for m in MAP if (PACKAGE / f"{m}.py").exists()]
    (home := tmp_path / "home").mkdir()
    env = dict(HOME=str(home), PATH="", PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1",
               MPLCONFIGDIR=str(tmp_path))
    command = [sys.executable, "-c", PROBE, *names]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr.split("ours from here\n")[1]) == ("", "")
    assert list(home.rglob("*")) == []


# The repository

MACHINE = re.compile(r"(?<![\w.~$}/+=-])/(?:work|root|farm|home|tmp|Users)/\w[\w/.-]*")
DATA = ".tgz .gz .zip .npz .npy .pt .pth .pkl .ckpt .safetensors .parquet .onnx".split()


def test_repository_files():
    for path in tracked():
        assert path.stat().st_size <= 1_500_000, f"{name(path)} is over 1.5 MB"
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
        if re.match(r"#\| *export", source): check_export_cell(ast.parse(source))


def check_export_cell(tree: ast.Module):
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
    modules = {f"simclr_nb/{p.name}" for p in PACKAGE.glob("*.py")}
    with zipfile.ZipFile(wheel) as z: inside = set(z.namelist())
    assert {n for n in inside if ".dist-info/" not in n} == modules
    assert any(n.endswith("licenses/LICENSE") for n in inside)
    with tarfile.open(sdist) as t:
        packed = {m.name.split("/", 1)[1] for m in t.getmembers() if m.isfile()}
    plain = """settings.ini setup.py pyproject.toml setup.cfg MANIFEST.in README.md LICENSE
               CHANGELOG.md PKG-INFO""".split()
    assert {n for n in packed if ".egg-info/" not in n} == modules | set(plain)
