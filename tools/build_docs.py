"""Build docs/ and README.md from the executed notebooks: no Quarto, no network, no GPU.

    python tools/build_docs.py          write docs/ and README.md
    python tools/build_docs.py --check  write nothing; fail if either would change

The steps: nbdev's processors on each notebook, page names without the notebook's number, an overview
of each wing, smalldocs' site with our search, TeX to MathML, notebooks to download, README.md from the
index. Any warning is an error, and so is an address outside the site. Two builds of the same notebooks
give the same bytes.
"""
import argparse
import ast
import base64
import filecmp
import html
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

os.environ.update(MPLBACKEND="agg", IN_TEST="1")  # IN_TEST: `nbdev_export()` cells do nothing
import smalldocs.site
import yaml
from fastcore.basics import AttrDict
from fastcore.nbio import mk_cell, read_nb, write_nb
from latex2mathml.converter import convert
from nbdev import doclinks
from nbdev.config import get_config
from nbdev.processors import FilterDefaults

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cells import hidden_imports
from wings import NUMBER, ROOT, WINGS, exported, rooms

OUTSIDE = re.compile(r"^\s*(?:[a-z][a-z0-9+.-]*:)?//|^\s*(?:mailto|ftp):", re.I)
PAPER = re.compile(r"https://(?:arxiv\.org/abs/|doi\.org/)")  # a link for the reader; no page fetches it
URL = re.compile(r"(?:url\(|@import\s+(?!url))\s*['\"]?([^'\")\s;]+)")
WEB_FONT = re.compile(r"@import url\([^)]*\);?")  # the theme's; the system's fonts serve as well
KATEX = re.compile(r'<(?:link|script)[^>]*katex[^>]*>(?:</script>)?\n?')
HERE = re.compile(r'__main__<span class="op">\.</span>')  # signatures of a notebook's own classes
NESTED = "".join(f"(?<!<m{t}>)" for t in "sub sup subsup under over underover frac".split())
TOUCH_UP = [(re.compile(a), b) for a, b in [  # what browsers space or stretch otherwise than TeX
    (r"<mo>(&#x02016;|&#x0007C;)</mo>", r'<mo stretchy="false">\1</mo>'),  # bars
    (r"<mo>(&#x0221E;|[A-Za-z]{2,})</mo>", r"<mi>\1</mi>"),  # infinity, named functions
    (NESTED + r"(<mi>[a-z]{2,}</mi>)(?=<m[^o])", r'\1<mspace width="0.17em"/>'),  # log x
]]
NESTED_LINK = re.compile(r"\[\[(`[^`\n]+`)\]\([^)\s]*\)\]\(")  # nbdev links a name inside a link
DUNDER = re.compile(r"(?m)^(#{3,4} \S+\.)__(\w+)__$")  # in a heading, Markdown takes it for bold
FIGURE = re.compile(r"<!-- picture: (\S+) (\S+) -->")  # notebook, and id of the cell that draws
METHOD = re.compile(r'(<a [^>]*class="nav-link[^>]*>\w+\.)(?=\w)')  # may wrap at its dot
FUSE = re.compile(r"site_libs/fuse/fuse\.min\.js")
SPAN = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)


def bare(path: Path) -> Path: return path.with_name(NUMBER.sub("", path.name))


def title(notebook: Path) -> str:
    "Title of a notebook: the heading of its first cell."
    return "".join(read_nb(notebook).cells[0].source).splitlines()[0].removeprefix("# ")


def subtitle(notebook: Path) -> str:
    "Subtitle of a notebook: the quoted sentence below its title."
    return "".join(read_nb(notebook).cells[0].source).split("\n> ")[1].strip()


def overview(page: Path, dst: Path) -> str:
    "The page of a wing, with the list of its rooms; the picture comes from one of them."
    def figure(m):
        cell = next((c for c in read_nb(page.parent / m[1]).cells if c.id == m[2]), None)
        if cell is None or not picture(cell): raise SystemExit(f"{page}: no picture in {m[1]} {m[2]}")
        alt, kind, content = picture(cell)
        caption = re.search(r'(?m)^#\| fig-cap: "(.*)"$', cell.source)[1]
        (dst / f"overview.{kind}").write_bytes(content)
        caption = f"{caption} (from [{title(page.parent / m[1])}]({m[1]}))"
        return f'![{caption}](overview.{kind}){{fig-alt="{alt}"}}'
    rooms_in_order = [f"1. [{title(p)}]({p.name}). {subtitle(p)}" for p in rooms(page.parent.name)]
    text = page.read_text("utf-8").replace("<!-- rooms -->", "## In reading order\n\n" + "\n".join(rooms_in_order))
    return renumbered(FIGURE.sub(figure, text))


def sidebar() -> list:
    "Contents of the sidebar: the index, the tutorials, then wing by wing."
    def pages(folder): return [f"{folder}/{path.name}" for path in rooms(folder)]
    def section(text, wing): return {"section": text, "href": f"{wing}/index.md", "contents": pages(wing)}
    wings = [section(f"{about[0]}: {about[1]}", wing) for wing, about in WINGS.items() if about]
    return ["index.ipynb", section("Tutorials", "tutorials"), *wings]


def with_sidebar(text: str) -> str:
    "The site's configuration with the contents of the sidebar."
    config = yaml.safe_load(text)
    config["website"]["sidebar"]["contents"] = sidebar()
    return yaml.safe_dump(config, sort_keys=False)


def own_names_only():
    "Backticked names link to this package's pages, not to the sites of other nbdev packages."
    index = {}
    exec((ROOT / get_config().lib_path / "_modidx.py").read_text(encoding="utf-8"), index)
    entry = SimpleNamespace(name=get_config().lib_name, load=lambda: index["d"])
    doclinks.entry_points = lambda group: [entry]
    doclinks.NbdevLookup.code = lambda self, name: None  # no [source] links: there is no host


def renumbered(text: str) -> str:
    "Take the numbers off the notebooks that links and the sidebar point to."
    link = re.compile(r"(\]\(|^\s*- )([^()\[\]\s]*\.(?:ipynb|html))", re.M)
    return link.sub(lambda m: m[1] + bare(Path(m[2])).as_posix(), text)


def methods(source: str) -> list[str]:
    "Methods with a docstring that an exported cell defines inside a class, public ones, as `Class.method`."
    if not re.search(r"(?m)^#\| *exports?\b", source) or re.search(r"(?m)^#\| *hide\b", source): return []
    classes = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    return [f"{c.name}.{m.name}" for c in classes for m in c.body
            if isinstance(m, ast.FunctionDef) and m.name[0] != "_" and ast.get_docstring(m)]


def with_methods(nb):
    "Documents the methods of each exported class, each under an anchor of its own, below the class."
    cells = []
    for cell in nb.cells:
        cells.append(cell)
        if cell.cell_type != "code": continue
        cells += [mk_cell(f"show_doc({name}, title_level=4)", metadata=AttrDict())
                  for name in methods(cell.source)]
    nb.cells[:] = cells


def imports_cell(path: Path, nb):
    "A folded cell with the imports that the page hides and its visible code needs; None where it needs none."
    helpers = {p.stem for p in (ROOT / "tests").glob("*.py")}  # the tests' own modules are in no package
    code = [cell.source for cell in nb.cells if cell.cell_type == "code"]
    lines = hidden_imports(code, exported(path), helpers)
    fold = '#| code-fold: true\n#| code-summary: "Imports for the code on this page"\n'
    return mk_cell(fold + lines, metadata=AttrDict()) if lines else None


def processed(path: Path):
    "A notebook as nbdev shows it: signatures in place of exported code, hidden cells gone."
    nb = read_nb(path)
    imports = imports_cell(path, nb)
    with_methods(nb)
    try: FilterDefaults()(nb)
    except UserWarning as warning: raise SystemExit(f"{path.name}: {warning}") from None
    if imports:
        first = next(i for i, cell in enumerate(nb.cells) if cell.cell_type == "code")
        nb.cells.insert(first, imports)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = renumbered(NESTED_LINK.sub(r"[\1](", cell.source))
        if cell.cell_type == "raw": cell.source = re.sub(r"(?m)^output-file: .*\n", "", cell.source)
        for out in cell.get("outputs", []):  # a terminal goes back to the start of the line at \r
            if "text" in out: out["text"] = re.sub(r"[^\n]*\r", "", "".join(out["text"]))
            if signature := out.get("data", {}).get("text/markdown"):
                out["data"]["text/markdown"] = DUNDER.sub(r"\1\_\_\2\_\_", "".join(signature))
    return nb


def stage(nbs: Path, dst: Path):
    "Everything of `nbs` that the site is made from, processed, in `dst`."
    for src in sorted(p for p in nbs.rglob("*") if p.is_file()):
        rel = src.relative_to(nbs)
        if src.name != "_quarto.yml" and any(part[0] in "._" for part in rel.parts): continue
        (out := dst / rel).parent.mkdir(parents=True, exist_ok=True)
        if src.suffix == ".ipynb":
            if bare(out).exists(): raise SystemExit(f"{rel}: another notebook is {bare(rel)} too")
            write_nb(processed(src), bare(out))
        elif src.name == "index.md": out.write_text(overview(src, out.parent), "utf-8")
        elif src.name == "_quarto.yml":
            out.write_text(renumbered(with_sidebar(src.read_text("utf-8"))), "utf-8")
        else: shutil.copy(src, out)


def mathml(span: re.Match) -> str:
    "One span of TeX as MathML; what the converter or a browser gets wrong is refused."
    tex = html.unescape(span[2])
    if re.search(r"\\begin\{aligned\}|\\math(?:bf|bb)\{\d", tex):
        raise SystemExit(f"use align, or an Iverson bracket; MathML shows this wrongly: {tex}")
    out = convert(tex, display="block" if span[1] == "display" else "inline")
    for pattern, to in TOUCH_UP: out = pattern.sub(to, out)
    if "\\" in out: raise SystemExit(f"unknown TeX command in: {tex}")
    return f'<span class="math {span[1]}">{out}</span>'


def picture(cell) -> tuple[str, str, bytes] | None:
    "Alternative text, kind and bytes of the picture that a cell of the index shows."
    alt = re.search(r'(?m)^#\| fig-alt: "(.*)"$', cell.source)
    for out in cell.get("outputs", []):
        for kind in ("jpeg", "png"):
            data = out.get("data", {}).get(f"image/{kind}")
            if data and alt: return alt[1], kind, base64.b64decode(data)
    return None


def readme(index: Path, site: Path) -> str:
    "README.md: the index's prose, pictures and code, with links to notebooks; pictures go to `site`."
    def link(m):
        if OUTSIDE.match(m[1]) or m[1].startswith("#"): return m[0]
        return f"](nbs/{m[1].removesuffix('/index.md')})"  # a code host lists a folder
    parts = ["<!-- Written by tools/build_docs.py from nbs/index.ipynb; edit that. -->"]
    for cell in read_nb(index).cells:
        if shown := picture(cell):
            alt, kind, content = shown
            name = f"readme_{len(parts)}.{kind}"
            (site / name).write_bytes(content)
            parts.append(f"![{alt}](docs/{name})")
        if cell.cell_type == "markdown": parts.append(re.sub(r"\]\(([^)\s]+)\)", link, cell.source.strip()))
    return "\n\n".join(parts) + "\n"


def to_download(path: Path) -> str:
    "A notebook to run elsewhere: no outputs, and not the cell that exports the module."
    nb = json.loads(path.read_text("utf-8"))
    nb["cells"] = [c for c in nb["cells"] if "nbdev_export()" not in "".join(c["source"])]
    for cell in nb["cells"]:
        if cell["cell_type"] == "code": cell.update(outputs=[], execution_count=None)
    return json.dumps(nb, indent=1, ensure_ascii=False) + "\n"


def add_downloads(nbs: Path, site: Path):
    "Each notebook beside its page, and below the title of the page a link to it."
    for path in sorted(nbs.rglob("*.ipynb")):
        rel = path.relative_to(nbs)
        page = (site / bare(rel)).with_suffix(".html")
        if not page.exists(): continue
        (site / rel).write_text(to_download(path), "utf-8")
        link = f'<p class="download"><a href="{path.name}" download>Download this notebook</a></p>'
        text = page.read_text("utf-8")
        before, header, after = text.partition('<header id="title-block-header"')
        if not header: raise SystemExit(f"{page.name}: no header to put the download below")
        page.write_text(before + header + after.replace("</header>", link + "</header>", 1), "utf-8")


def own_search(site: Path):
    "Our search takes the place of Fuse; its index without what nothing reads."
    shutil.rmtree(site / "site_libs/fuse")
    shutil.copy(Path(__file__).with_name("search.js"), site / "site_libs/search.js")
    script = site / "site_libs/smalldocs.js"
    before = script.read_text("utf-8")
    after = before.replace("(w) => w.length > 1", "(w) => w.length > 3")  # a result marks no "of"
    if after == before: raise SystemExit("smalldocs marks the words of a result otherwise now")
    script.write_text(after, "utf-8")
    entries = json.loads((site / "search.json").read_text("utf-8"))
    for entry in entries:
        entry.pop("objectID")
        entry["text"] = entry["text"][:2500]  # sections with long code or output
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":"))
    (site / "search.json").write_text(text, "utf-8")


class Addresses(HTMLParser):
    "Collects what the attributes of a page refer to outside the site."
    def __init__(self):
        super().__init__()
        self.outside = []

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            urls = URL.findall(value or "") if key == "style" else [value or ""]
            if tag == "a" and PAPER.match(value or ""): continue
            if key != "xmlns" and any(map(OUTSIDE.match, urls)):
                self.outside.append(f"<{tag} {key}={value}>")


def outside(site: Path) -> list[str]:
    "Every address outside the site that one of its pages or style sheets refers to."
    found = []
    for path in sorted(p for p in site.rglob("*") if p.suffix in (".html", ".css")):
        text = path.read_text("utf-8")
        hits = []
        if path.suffix == ".html":
            (parser := Addresses()).feed(text)
            hits = parser.outside
            text = "".join(re.findall(r"(?s)<style[^>]*>(.*?)</style>", text))
        hits += [u for u in URL.findall(text) if OUTSIDE.match(u)]
        found += [f"{path.relative_to(site)}: {hit}" for hit in hits]
    return found


def build(tmp: Path) -> tuple[Path, str]:
    "The site's folder, inside `tmp`, and the text of README.md."
    own_names_only()
    stage(get_config().nbs_path, tmp)
    built = smalldocs.site.build(tmp, quiet=True)
    if built.warnings: raise SystemExit("\n".join(built.warnings))
    text = readme(get_config().nbs_path / "index.ipynb", built.out)
    for page in built.out.rglob("*.html"):
        body = KATEX.sub("", page.read_text("utf-8"))
        for wing, purpose in filter(None, WINGS.values()):
            named = html.escape(f"{wing}: {purpose}")
            body = re.sub(f'(<li class="breadcrumb-item"><a [^>]*>){re.escape(named)}', rf"\1{wing}", body)
            own_line = f'{wing} <span class="wing">{html.escape(purpose)}</span>'
            body = body.replace(named, own_line)  # in the sidebar
        body = FUSE.sub("site_libs/search.js", METHOD.sub(r"\1<wbr>", HERE.sub("", body)))
        page.write_text(SPAN.sub(mathml, body), "utf-8")
    own_search(built.out)
    add_downloads(get_config().nbs_path, built.out)
    for css in (built.out / "site_libs/themes").glob("*.css"):
        css.write_text(WEB_FONT.sub("", css.read_text("utf-8")), "utf-8")
    if found := outside(built.out): raise SystemExit("outside addresses:\n" + "\n".join(found))
    return built.out, text


def differences(a: Path, b: Path) -> list[str]:
    "Names of the files that only one of two folders has, or that differ in their bytes."
    names = {p.relative_to(d) for d in (a, b) for p in d.rglob("*") if p.is_file()}
    _, changed, missing = filecmp.cmpfiles(a, b, sorted(map(str, names)), shallow=False)
    return sorted(changed + missing)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true",
                        help="write nothing; fail if docs/ or README.md would change")
    check = parser.parse_args().check
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # notebooks on files borrow their golden ones
    warnings.simplefilter("error", UserWarning)
    # nbdev runs a cell that imports; where that is hidden set-up, it may do more than import
    warnings.filterwarnings("ignore", r"Found cells containing imports[^\n]*\n---\n#\| *hide\b")
    docs, readme_md = get_config().doc_path, ROOT / "README.md"
    with tempfile.TemporaryDirectory() as tmp:
        site, text = build(Path(tmp).resolve())
        if check:
            stale = [f"docs/{name}" for name in differences(site, docs)]
            if readme_md.read_text("utf-8") != text: stale.append("README.md")
            if stale: raise SystemExit("\n".join(["not in step with the notebooks:", *stale]))
        else:
            shutil.rmtree(docs, ignore_errors=True)
            shutil.copytree(site, docs)
            readme_md.write_text(text, "utf-8")
        print(f"{'checked' if check else 'wrote'} {len(list(site.rglob('*.html')))} pages")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # each of the notebooks leaves a shell that would tidy up for a second or more
