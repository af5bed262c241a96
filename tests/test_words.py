"""Prose: British spelling everywhere, and no sentence of a kind that readers have to read twice.

Prose is the text of the notebooks, captions, docstrings, comments in notebooks, README, CHANGELOG,
CONTRIBUTING and the overviews of the wings. Text in backticks, formulas, addresses and code is free: names in
code follow the libraries. A finding names the rule and the sentence; rewrite the sentence.
"""
import ast
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
TEXTS += sorted((ROOT / "nbs").glob("*/index.md"))
CODE = sorted(p for folder in ("tests", "tools", "benchmarks") for p in (ROOT / folder).glob("*.py"))
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

IZE = r"(?!(?:re|over|under|down|cap|as)?siz|priz|seiz|maiz)[a-z]+(?:i|y)z(?:e[drs]?|ers|ing|ations?|able)"
AMERICAN = re.compile(rf"""(?ix)(?<![.\w])(?:{IZE}
    | (?:dis|multi|un)?color(?:s|ed|ful|ing|less|ings)? | behavior(?:s|al)? | (?:dis)?favor(?:s|ed|ing|ite|able)?
    | neighbor(?:s|ing|hoods?)? | labor | honor(?:s|ed)? | gray(?:s|ish|scale)? | center(?:s|ed|ing)? | fibers?
    | (?:un|re)?label(?:ed|ing) | model(?:ed|ing) | cancel(?:ed|ing) | travel(?:ed|ing) | signal(?:ed|ing)
    | catalogs? | analogs? | dialogs? | defense | offense | skillful | fulfill | enroll | artifacts? )\b""")
START = {  # a relative clause without a head as the subject; a question is none
    "begins with What": r"^What\b(?! to look for)(?!.*\?$)",
    "begins with Who": r"^(?:Who|Whom|Whose|Whoever|That which)\b(?!.*\?$)",
    "begins with Nor": r"^Nor\b",
    "begins with So, and a participle": r"^So [a-z]+ed,",
    "ends with or, without a verb": r"; or X\.$",
}
PHRASES = {  # not English, or not plain
    "for in the sense of because": r", for (?:otherwise|else|there (?:is|are)|it (?:is|has)|they (?:are|have))\b",
    "looked at, by nobody": r"\b(?:is|are|was|were|be|been) (?:not )?looked at\b",
    "at hand": r"\bat hand\b",
    "said of": r"\b(?:is|was) said of\b",
    "one in the sense of you": r"\bone does not have\b|\bthat one sees\b"
                               r"|\b(?:if|when|before) one (?:wants|begins|knows|sees)\b",
    "an idiom of another language": r"\b(?:asks? for nothing|other way round of|by hand of|goes? without|in one piece"
                                    r"|end(?:s|ed) well|(?:is|are|too) dear)\b",
}


def prose_of_markdown(text: str) -> str:
    "Markdown with code, formulas, addresses and HTML taken out; a code span or formula leaves an X."
    text = re.sub(r"(?ms)^ *(```|~~~).*?^ *\1 *$", "\n", text)
    text = re.sub(r"(?s)<!--.*?-->|<style.*?</style>|<script.*?</script>|</?[a-z][^>]*>", " ", text)
    text = re.sub(r"(?s)\$\$.*?\$\$", "X", text)
    text = re.sub(r"(?s)(`+)(?!`).+?(?<!`)\1(?!`)", "X", text)
    text = re.sub(r"\$[^$\n]+(?:\n[^$\n]+)?\$", "X", text)
    text = re.sub(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^)]*\)", r"“\1”", text)  # a title may begin with What
    return re.sub(r"https?://\S+", "X", text)


def comments_of(source: str) -> list[str]:
    "Comments of Python source, without directives."
    lines = [line for line in source.splitlines() if not line.startswith("#|")]
    if not any("#" in line for line in lines): return []
    try: tokens = list(tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline))
    except (tokenize.TokenError, IndentationError, SyntaxError): return []
    return [t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT]


def definitions(node: ast.AST) -> list[ast.AST]:
    "A module, class or function, and the classes and functions inside it."
    inner = [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return [node] + [d for n in inner for d in definitions(n)]


def docstrings_of(source: str) -> list[str]:
    "Docstrings of Python source, and the captions among the directives of its cell."
    captions = re.findall(r'(?m)^#\| *fig-(?:cap|alt): *"(.*)"$', source)
    try: found = definitions(ast.parse(source))
    except SyntaxError: return captions
    return captions + [doc for node in found if (doc := ast.get_docstring(node))]


def prose(path: Path) -> tuple[list[str], list[str]]:
    "Texts of a file, whose sentences should be whole, and comments, which may be notes: Markdown, module, notebook."
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".md": return [content], []
    if path.suffix == ".py": return docstrings_of(content), []
    texts, comments = [], []
    for cell in json.loads(content)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": texts.append(source)
        elif cell["cell_type"] == "code":
            texts += docstrings_of(source)
            comments += comments_of(source)
    return texts, comments


def sentences(text: str) -> list[str]:
    "Sentences of Markdown; headings and cells of tables are pieces without a full stop."
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*>|#]|\d+\.) )|(?<=\n)(#+ .*)\n", prose_of_markdown(text))
    cells = [" ".join(cell.split()) for block in blocks if block for cell in block.split("|")]
    bare = [re.sub(r"^(?:[\s>*#-]+|\d+\. )|\*\*|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)", "", cell) for cell in cells]
    cut = [re.split(r"(?<=[.!?:;])[*_\")]* +(?=[*_\"(“]*[A-Z0-9])", piece) for piece in bare]
    return [sentence.strip(" *_") for pieces in cut for sentence in pieces if sentence.strip(" *_")]


def findings(text: str, whole: bool = True) -> list[str]:
    "Faults of a text: the rule and the sentence. Beginnings count in whole sentences only."
    found = []
    for sentence in sentences(text):
        rules = PHRASES | (START if whole and sentence[-1] in ".;:" else {})
        hits = {name: re.search(rule, sentence) for name, rule in rules.items()}
        hits["American spelling"] = AMERICAN.search(re.sub('"[^"]*"', "X", sentence))  # quotations are free
        found += [f"{name}, {hit[0]!r}: {sentence}" for name, hit in hits.items() if hit]
    return found


def faults(path: Path) -> list[str]:
    "Faults in the prose of a file."
    texts, comments = prose(path)
    return [f for t in texts for f in findings(t)] + [f for c in comments for f in findings(c, whole=False)]


def name(path: Path) -> str: return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [*TEXTS, *CODE, *NOTEBOOKS], ids=name)
def test_prose(path):
    assert faults(path) == []


@pytest.mark.parametrize("text, rule", {
    "A color and a colour.": "American spelling, 'color'",
    "## Normalized inputs": "American spelling, 'Normalized'",
    "| grey | gray |": "American spelling, 'gray'",
    "We optimize and analyze the behavior of unlabeled neighbors.": "American spelling, 'optimize'",
    "Rows are ready. Who wants the local BatchNorm does not convert.": "begins with Who, 'Who'",
    "- What cannot be is refused before anything is computed.": "begins with What, 'What'",
    "That which is kept is small.": "begins with Who, 'That which'",
    "Nor are there 60,000 tasks for them.": "begins with Nor, 'Nor'",
    "The order is checked, for otherwise\nthey would wait.": "for in the sense of because, ', for otherwise'",
    "Rows of both views; or `ValueError`.": "ends with or, without a verb, '; or X.'",
    "Every file is looked at.": "looked at, by nobody, 'is looked at'",
    "The batch at hand.": "at hand, 'at hand'",
    "Machines that one does not have.": "one in the sense of you, 'one does not have'",
    "An encoder asks for nothing.": "an idiom of another language, 'asks for nothing'",
}.items())
def test_a_planted_fault_is_found(text, rule):
    assert findings(text)[0].startswith(f"{rule}: "), findings(text)


@pytest.mark.parametrize("text", [
    "The size of a resized `color` is $normalize$ `gray`, a prize; see [colour](x#color).",
    "```\nnormalize(gray)\n```\nThe paper says \"optimize the color\", and F.normalize is a name.",
    "What does the network see? Who knows? [What makes good views](03.ipynb) says so.",
    "## What was learned\n\n> What a run costs, before it starts",
    "| What varies | Who |\n|---|---|\n| a colour | nobody |",
    "What to look for: bars of one height. We know what follows and who is right.",
    "The order, for which `a` or `b` stands; `x` or `y`.",
])
def test_good_prose_passes(text): assert findings(text) == []


def test_every_kind_of_file_is_read(tmp_path):
    code = '#| fig-cap: "A gray image"\ndef f(a):  # A color\n    "Normalized."\n    return "color"'
    cells = [{"cell_type": "markdown", "source": ["The behavior.\n", "`color`"]},
             {"cell_type": "code", "source": [code]}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    (tmp_path / "a.py").write_text(code)
    (tmp_path / "a.md").write_text("Gray.")
    found = {path.name: [f.split("'")[1] for f in faults(path)] for path in sorted(tmp_path.iterdir())}
    assert found == {"a.ipynb": ["behavior", "gray", "Normalized", "color"], "a.md": ["Gray"],
                     "a.py": ["gray", "Normalized"]}
