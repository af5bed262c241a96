"""Cells of a notebook as a reader of the site meets them: which are visible, and which names they need.

The site shows neither hidden cells nor the code of cells marked `echo: false`.
"""
import ast
import builtins
import re
import symtable

UNSEEN = re.compile(r"(?m)^#\| *(hide|hide_input|echo: *false|include: *false|eval: *false)\b")
EXPORTED = re.compile(r"(?m)^#\| *export[is]?\b")
SLOW = re.compile(r"(?m)^#\| *slow\b")
GIVEN = {*dir(builtins), "__name__", "__file__", "__annotations__", "__conditional_annotations__", "display"}


def scopes(table: symtable.SymbolTable) -> list[symtable.SymbolTable]:
    "A scope and all scopes inside it."
    return [table] + [inner for child in table.get_children() for inner in scopes(child)]


def names(source: str) -> tuple[set[str], set[str]]:
    "Global names that a cell uses, also inside its functions, and global names that it defines."
    top = symtable.symtable(source, "cell", "exec")
    used, defined = set(), set()
    for scope in scopes(top):
        for symbol in scope.get_symbols():
            if scope is not top and not symbol.is_global(): continue
            if symbol.is_referenced(): used.add(symbol.get_name())
            if symbol.is_assigned() or symbol.is_imported(): defined.add(symbol.get_name())
    return used, defined


def before_their_lines(source: str, known: set[str]) -> set[str]:
    "Names that top-level statements of a cell use before the cell defines them."
    early, known = set(), set(known)
    for statement in ast.parse(source).body:
        used, defined = names(ast.unparse(statement))
        if isinstance(statement, ast.AugAssign):  # `n += 1` uses n
            used |= defined
            defined = set()
        definition = isinstance(statement, (ast.FunctionDef, ast.ClassDef))  # runs when it is called
        if not definition: early |= used - defined - known
        known |= defined
    return early


def undefined(cells: list[str]) -> list[tuple[int, str]]:
    "Every name that a cell uses and that neither an earlier cell nor this one defines, with the cell's number."
    known, found = set(GIVEN), []
    for number, source in enumerate(cells):
        used, defined = names(source)
        missing = (used - defined - known) | before_their_lines(source, known)
        found += [(number, name) for name in sorted(missing)]
        found += [(number, "*") for _ in re.findall(r"(?m)^from \S+ import \*", source)]
        known |= defined
    return found


def import_lines(source: str, wanted: set[str]) -> list[str]:
    "The import statements of a cell that bind a wanted name, with the wanted names alone."
    lines = []
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
        node.names = [a for a in node.names if (a.asname or a.name.split(".")[0]) in wanted]
        if node.names: lines.append(ast.unparse(node))
    return lines


def hidden_imports(cells: list[str], module: str | None, not_there: set[str] = frozenset()) -> str:
    "Imports that the visible cells of a notebook need and that only its exported and hidden cells have."
    visible = [s for s in cells if not UNSEEN.search(s) and not EXPORTED.search(s)]
    wanted, lines = {name for _, name in undefined(visible)}, []
    for source in cells:
        if not UNSEEN.search(source) and not EXPORTED.search(source): continue
        lines += [line for line in import_lines(source, wanted) if line.split()[1].split(".")[0] not in not_there]
    own = set().union(*(names(s)[1] for s in cells if EXPORTED.search(s))) & wanted
    own -= {name for line in lines for name in names(line)[1]}
    if own and module: lines.append(f"from simclr_nb.{module} import {', '.join(sorted(own))}")
    return "\n".join(dict.fromkeys(lines))
