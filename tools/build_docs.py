"""Build docs/ and README.md from the executed notebooks: no Quarto, no network, no GPU.

    python tools/build_docs.py          write docs/ and README.md
    python tools/build_docs.py --check  write nothing; fail if either would change

Any warning is an error. The steps: nbdev's processors on each notebook, names without their number, smalldocs' site,
TeX to MathML, README.md from the index. Two builds of the same notebooks give the same bytes.
"""
import argparse, filecmp, html, os, re, shutil, sys, tempfile, warnings
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

os.environ.update(MPLBACKEND="agg", IN_TEST="1")  # IN_TEST: `nbdev_export()` cells do nothing
import smalldocs.site
import yaml
from fastcore.nbio import read_nb, write_nb
from latex2mathml.converter import convert
from nbdev import doclinks
from nbdev.config import get_config
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"^\d+[a-zA-Z0-9]*_")  # `05_loss` is the page `loss`, as nbdev's own links have it
OUTSIDE = re.compile(r"^\s*(?:[a-z][a-z0-9+.-]*:)?//|^\s*(?:mailto|ftp):", re.I)
KATEX = re.compile(r'<(?:link|script)[^>]*katex[^>]*>(?:</script>)?\n?')
SPAN = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)


def bare(path: Path) -> Path: return path.with_name(NUMBER.sub("", path.name))


def own_names_only():
    "Backticked names link to this package's pages, not to the sites of other packages that nbdev knows of."
    index = {}
    exec((ROOT / get_config().lib_path / "_modidx.py").read_text(encoding="utf-8"), index)
    entry = SimpleNamespace(name=get_config().lib_name, load=lambda: index["d"])
    doclinks.entry_points = lambda group: [entry]
    doclinks.NbdevLookup.code = lambda self, name: None  # no [source] links: the package names no code host


def renumbered(text: str) -> str:
    "Take the numbers off the notebooks that links and the sidebar point to."
    return re.sub(r"(\]\(|^\s*- )([^)\s]*\.(?:ipynb|html))", lambda m: m[1] + bare(Path(m[2])).as_posix(), text, flags=re.M)


def stage(nbs: Path, dst: Path):
    "Process the notebooks into `dst`, beside the site's configuration."
    for src in sorted(nbs.rglob("*")):
        rel = src.relative_to(nbs)
        if not src.is_file() or any(p[0] in "._" and p != "_quarto.yml" for p in rel.parts): continue
        out = dst / rel
        out.parent.mkdir(parents=True, exist_ok=True)
        if src.suffix == ".ipynb":
            nb = read_nb(src)
            FilterDefaults()(nb)
            for cell in nb.cells:
                if cell.cell_type == "markdown": cell.source = renumbered(cell.source)
                if cell.cell_type == "raw": cell.source = re.sub(r"^output-file: .*\n", "", cell.source, flags=re.M)
            write_nb(nb, bare(out))
        elif src.name == "_quarto.yml": out.write_text(renumbered(src.read_text(encoding="utf-8")), encoding="utf-8")
        else: shutil.copy(src, out)


def mathml(m: re.Match) -> str:
    "One span of TeX as MathML; what the converter or a browser gets wrong is refused."
    tex = html.unescape(m[2])
    bad = re.search(r"\\begin\{aligned\}|\\math(?:bf|bb)\{\d", tex)
    if bad: raise SystemExit(f"{bad[0]} is not shown rightly as MathML; use align, or an Iverson bracket: {tex}")
    out = convert(tex, display="block" if m[1] == "display" else "inline")
    if "\\" in out: raise SystemExit(f"unknown TeX command in: {tex}")
    return f'<span class="math {m[1]}">{out}</span>'


def readme(index: Path) -> str:
    "README.md: the index's prose and code, with links into docs/."
    def link(m):
        if OUTSIDE.match(m[1]) or m[1].startswith("#"): return m[0]
        return f"](docs/{m[1].lstrip('/').replace('.ipynb', '.html')})"
    front, *cells = read_nb(index).cells
    meta = yaml.safe_load(front.source.strip().strip("-"))
    parts = [f"# {meta['title']}", f"> {meta['description']}"]
    for cell in cells:
        text = re.sub(r"^<!--.*?-->$|^#\|.*$", "", cell.source, flags=re.M).strip()
        if not text or "echo: false" in cell.source: continue
        if cell.cell_type == "code": text = f"```python\n{text}\n```"
        parts.append(re.sub(r"\]\(([^)\s]+)\)", link, text) if cell.cell_type == "markdown" else text)
    return "<!-- Written by tools/build_docs.py from nbs/index.ipynb; edit that. -->\n\n" + "\n\n".join(parts) + "\n"


def outside(site: Path) -> list[str]:
    "Every address outside the site that one of its pages or style sheets names."
    found = []
    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.extend(f"{page.relative_to(site)}: <{tag} {k}={v!r}>" for k, v in attrs
                         if k != "xmlns" and OUTSIDE.search(re.sub(r"^.*?url\(['\"]?", "", v or "") if k == "style" else v or ""))
    for page in sorted(site.rglob("*.html")): Parser().feed(page.read_text(encoding="utf-8"))
    for css in sorted(site.rglob("*.css")):
        text = css.read_text(encoding="utf-8")
        found += [f"{css.relative_to(site)}: {u}" for u in re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")\s;]+)", text) if OUTSIDE.match(u)]
    return found


def build(tmp: Path) -> tuple[Path, str]:
    "The site's folder, inside `tmp`, and the text of README.md."
    own_names_only()
    stage(get_config().nbs_path, tmp)
    text = readme(tmp / "index.ipynb")
    built = smalldocs.site.build(tmp, quiet=True)
    if built.warnings: raise SystemExit("\n".join(built.warnings))
    for page in built.out.rglob("*.html"):
        body = KATEX.sub("", page.read_text(encoding="utf-8"))
        page.write_text(SPAN.sub(mathml, body), encoding="utf-8")
    if found := outside(built.out): raise SystemExit("outside addresses:\n" + "\n".join(found))
    return built.out, text


def differences(a: Path, b: Path) -> list[str]:
    "Files of two folders that are missing in one or differ in their bytes."
    names = {p.relative_to(d) for d in (a, b) for p in d.rglob("*") if p.is_file()}
    return sorted(str(n) for n in names if not ((a / n).is_file() and (b / n).is_file() and filecmp.cmp(a / n, b / n, shallow=False)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if docs/ or README.md would change")
    check = parser.parse_args().check
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("error", UserWarning)
    docs, readme_md = get_config().doc_path, ROOT / "README.md"
    with tempfile.TemporaryDirectory() as tmp:
        site, text = build(Path(tmp).resolve())
        if check:
            stale = [f"docs/{n}" for n in differences(site, docs)]
            if readme_md.read_text(encoding="utf-8") != text: stale.append("README.md")
            if stale: raise SystemExit("not in step with the notebooks (run `make docs`):\n" + "\n".join(stale))
        else:
            shutil.rmtree(docs, ignore_errors=True)
            shutil.copytree(site, docs)
            readme_md.write_text(text, encoding="utf-8")
        print(f"{'checked' if check else 'wrote'} {len(list(site.rglob('*.html')))} pages")


if __name__ == "__main__": main()
