"Every public name says what it takes, what it gives, in which shape, and which errors it raises."
import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest
from fastcore.docments import docments
from torch import Tensor

PACKAGE = Path(__file__).resolve().parent.parent / "simclr_nb"
MODULES = sorted(p.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
                 for p in PACKAGE.rglob("[!_]*.py"))
SHAPE = re.compile(r"`\(.*?\)`|scalar|any shape|same shape|broadcast", re.I | re.S)


def public(module: str) -> list[tuple[str, object]]:
    loaded = importlib.import_module(f"simclr_nb.{module}")
    return [(f"{module}.{name}", getattr(loaded, name)) for name in loaded.__all__]


NAMES = [named for module in MODULES for named in public(module)]
CALLABLES = [n for n in NAMES if inspect.isfunction(n[1]) or inspect.isclass(n[1])]
METHODS = [(f"{name}.{key}", value) for name, cls in CALLABLES if inspect.isclass(cls)
           for key, value in vars(cls).items() if inspect.isfunction(value) and key[0] != "_"]


def ids(named): return [name for name, _ in named]


def arguments(thing) -> dict:
    "Comment of each argument, or field, and of the result (`return`)."
    target = thing
    if inspect.isclass(thing) and not dataclasses.is_dataclass(thing):
        target = thing.__init__ if "__init__" in vars(thing) else thing.__new__
        if target in (object.__init__, object.__new__) or target.__module__ != thing.__module__:
            return {}
    parameters = inspect.signature(target).parameters.values()
    stars = {p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    skip = stars | {"self", "cls"}  # fastcore finds no comment beside *args and **kwargs
    return {k: v for k, v in docments(target, full=True).items() if k not in skip}


def raises(thing) -> bool:
    "Whether the body raises an error of its own."
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc is not None]
    names = [ast.unparse(n.exc).split("(")[0] for n in nodes]
    return any(name in ("ValueError", "TypeError", "FileNotFoundError") for name in names)


@pytest.mark.parametrize("module", MODULES)
def test_all_is_complete(module):
    "Nothing public is left out of `__all__`, and all that is in it exists."
    loaded = importlib.import_module(f"simclr_nb.{module}")
    own = {k for k, v in vars(loaded).items() if k[0] != "_" and inspect.getmodule(v) is loaded}
    assert own <= set(loaded.__all__), "defined, not exported"


@pytest.mark.parametrize("name, thing", CALLABLES, ids=ids(CALLABLES))
def test_docstring(name, thing):
    "One line that ends like a sentence; errors are named."
    doc = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert doc and "\n" not in doc and doc.endswith("."), doc
    if inspect.isfunction(thing) and raises(thing):
        assert re.search(r"\b[Rr]aises?\b|[Rr]efuse", doc), f"raises, and does not say so: {doc}"


@pytest.mark.parametrize("name, thing", CALLABLES, ids=ids(CALLABLES))
def test_arguments(name, thing):
    "A comment beside every argument and the result; tensors have a shape."
    for key, about in arguments(thing).items():
        is_return, anno = key == "return", about["anno"]
        if is_return and (anno in (None, inspect._empty, type(None)) or inspect.isclass(thing)):
            continue
        if is_return and anno in (str, bool, float, int) and not about["docment"]: continue
        own = getattr(anno, "__module__", "").startswith(("simclr_nb", "matplotlib", "pathlib"))
        if is_return and own: continue  # the type and the docstring say it
        assert about["docment"], f"{key}: no comment"
        if anno is Tensor: assert SHAPE.search(about["docment"]), f"{key}: {about['docment']}"


@pytest.mark.parametrize("name, method", METHODS, ids=ids(METHODS))
def test_methods(name, method):
    "A docstring, unless it overrides one that has its own, and types of all arguments."
    owner = name.split(".")[-2]
    cls = next(c for n, c in CALLABLES if n == name.rsplit(".", 1)[0])
    inherited = any(hasattr(base, method.__name__) for base in cls.__mro__[1:])
    hooks = r"(before|after)_\w+|forward|create_batches|show_batch|new_empty|to_(fp16|bf16|fp32)"
    if not method.__doc__ and not inherited and not re.fullmatch(hooks, method.__name__):
        raise AssertionError(f"{owner}.{method.__name__} has no docstring")
