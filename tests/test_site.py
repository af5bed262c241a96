"The site in docs/: complete, whole without a network, right in a browser, wide and narrow, light and dark."
import ast
import functools
import html
import http.server
import json
import re
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from wings import WINGS, rooms

SITE = ROOT / "docs"
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html"))
NOTEBOOKS = sorted(p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)
FOLDERS = ["tutorials", *(wing for wing, about in WINGS.items() if about)]
PAPERS = ("https://arxiv.org/abs/", "https://doi.org/")  # the only addresses outside the site
WINDOWS = {"desktop": (1280, "light"), "tablet": (820, "dark"), "phone": (390, "light")}


def page_of(notebook: str) -> str:
    "A page has its notebook's name, without the number."
    return re.sub(r"(^|/)\d+[a-zA-Z0-9]*_", r"\1", notebook).replace(".ipynb", ".html")


# Without a browser

class Page(HTMLParser):
    "The ids of a page, what it links to, its pictures."
    def __init__(self, page: str):
        super().__init__()
        self.ids, self.links, self.images = set(), [], []
        self.feed((SITE / page).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("id"): self.ids.add(attrs["id"])
        self.links += [attrs[k] for k in ("href", "src") if attrs.get(k)]
        if tag == "img": self.images.append(attrs)


@functools.lru_cache
def parsed(page: str) -> Page: return Page(page)


def test_every_notebook_is_a_page_and_in_the_sidebar():
    overviews = [f"{folder}/index.html" for folder in FOLDERS]
    assert sorted([*map(page_of, NOTEBOOKS), *overviews]) == PAGES
    text = (SITE / "index.html").read_text(encoding="utf-8")
    sidebar = text[text.index('id="quarto-sidebar"'):text.index("<main")]
    links = [link.removeprefix("./") for link in re.findall(r'href="([^"#]+\.html)"', sidebar)]
    assert sorted(set(links)) == PAGES
    for title, purpose in filter(None, WINGS.values()):  # each wing says what it is for
        assert f'{html.escape(title)} <span class="wing">{html.escape(purpose)}</span>' in sidebar
    room = (SITE / "loss/tiled.html").read_text(encoding="utf-8")
    crumbs = within(room, 'class="breadcrumb"', "</ol>")
    assert re.findall(r">([^<>]+)</a>", crumbs) == ["Loss", "Tiled loss"]  # and not the purpose
    in_order = [page for page in links if "/" in page and not page.startswith("tutorials")]
    wings = list(dict.fromkeys(page.split("/")[0] for page in in_order))
    assert wings == [wing for wing, about in WINGS.items() if about]


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    broken = []
    for link in parsed(page).links:
        url = urlsplit(link)
        if url.scheme == "data" or link.startswith(PAPERS): continue
        assert not url.scheme and not url.netloc, f"an address outside the site: {link}"
        target = (SITE / page).parent / unquote(url.path) if url.path else SITE / page
        if target.is_dir(): target /= "index.html"
        if not target.is_file(): broken.append(link)
        elif url.fragment and target.suffix == ".html":
            ids = parsed(target.resolve().relative_to(SITE.resolve()).as_posix()).ids
            if unquote(url.fragment) not in ids: broken.append(link)
    assert broken == []


def test_front_page_leads_to_every_wing_and_tutorial():
    "On the site and in README.md, whose links and pictures exist."
    links = {link.removeprefix("./") for link in parsed("index.html").links}
    tutorials = [page_of(f"tutorials/{path.name}") for path in rooms("tutorials")]
    assert {*tutorials, *(f"{wing}/index.html" for wing in FOLDERS[1:])} <= links
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = [p for p in re.findall(r"\]\(([^)\s]+)\)", text) if not p.startswith(PAPERS)]
    assert [p for p in paths if not (ROOT / p).exists()] == []
    assert {f"nbs/tutorials/{path.name}" for path in rooms("tutorials")} <= set(paths)


@pytest.mark.parametrize("page", PAGES)
def test_page_is_whole(page):
    text = (SITE / page).read_text(encoding="utf-8")
    prose = re.sub(r"(?s)<(code|script).*?</\1>", "", text)
    assert r"\(" not in prose and r"\[" not in prose, "TeX that is not MathML"
    assert "](" not in prose, "Markdown that is not a link"
    assert all(image.get("alt") for image in parsed(page).images), "a figure needs fig-alt"


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_figure_of_a_notebook_is_on_its_page(notebook):
    pictures = 0
    for cell in json.loads((ROOT / "nbs" / notebook).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        kinds = [kind for o in cell.get("outputs", []) for kind in o.get("data", {})]
        figure = any(kind.startswith("image/") for kind in kinds)
        if not figure or re.match(r"#\| *hide\b", source): continue
        pictures += 1
        assert "#| fig-cap:" in source and "#| fig-alt:" in source, source
    assert len(parsed(page_of(notebook)).images) >= pictures


def within(text: str, start: str, end: str) -> str:
    "The part of a page between two marks."
    return text[text.index(start):].split(end)[0]


@pytest.mark.parametrize("folder", FOLDERS)
def test_overview_of_a_wing(folder):
    "A paragraph, a picture, and the rooms in reading order."
    text = (SITE / folder / "index.html").read_text(encoding="utf-8")
    main = within(text, "<main", 'class="page-navigation"')
    assert len(re.sub(r"<[^>]+>", " ", within(main, "<p>", "</p>")).split()) > 30
    assert [image["src"].rsplit(".")[0] for image in parsed(f"{folder}/index.html").images] == ["overview"]
    listed = re.findall(r'<li>\s*(?:<p>)?<a href="([^"]+)"', within(main, "<ol", "</ol>"))
    assert listed == [Path(page_of(p.name)).name for p in rooms(folder)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_picture_of_an_overview_exists(folder):
    "The cell that an overview takes its picture from has a picture, and a text for readers who cannot see it."
    text = (ROOT / "nbs" / folder / "index.md").read_text(encoding="utf-8")
    notebook, cell_id = re.search(r"<!-- picture: (\S+) (\S+) -->", text).groups()
    cells = json.loads((ROOT / "nbs" / folder / notebook).read_text(encoding="utf-8"))["cells"]
    cell = next(c for c in cells if c["id"] == cell_id)
    assert "#| fig-alt:" in "".join(cell["source"])
    assert any(kind.startswith("image/") for out in cell["outputs"] for kind in out.get("data", {}))


def test_previous_and_next_follow_the_sidebar():
    text = (SITE / "index.html").read_text(encoding="utf-8")
    sidebar = within(text, 'id="quarto-sidebar"', "<main")
    links = [link.removeprefix("./") for link in re.findall(r'href="([^"#]+\.html)"', sidebar)]
    order = list(dict.fromkeys(links))
    for before, page, after in zip([None, *order], order, [*order[1:], None]):
        foot = within((SITE / page).read_text(encoding="utf-8"), 'class="page-navigation"', "</nav>")
        found = [((SITE / page).parent / link).resolve() for link in re.findall(r'href="([^"]+)"', foot)]
        assert found == [(SITE / other).resolve() for other in (before, after) if other], page


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_to_download(notebook):
    "The page links to its notebook; the file has all cells but the one that exports, and no outputs."
    assert Path(notebook).name in parsed(page_of(notebook)).links
    cells = json.loads((ROOT / "nbs" / notebook).read_text(encoding="utf-8"))["cells"]
    own = [c["source"] for c in cells if "nbdev_export()" not in "".join(c["source"])]
    offered = json.loads((SITE / notebook).read_text(encoding="utf-8"))["cells"]
    assert [c["source"] for c in offered] == own
    assert not any(c.get("outputs") for c in offered)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_methods_have_anchors(notebook):
    "Methods with a docstring of an exported class, such as `NTXent.forward`."
    missing = []
    for cell in json.loads((ROOT / "nbs" / notebook).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if not re.match(r"#\| *exports?\b", source): continue
        for node in ast.parse(source).body:
            if not isinstance(node, ast.ClassDef) or node.name[0] == "_": continue
            missing += [f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)
                        and m.name[0] != "_" and ast.get_docstring(m)
                        and f"{node.name}.{m.name}".lower() not in parsed(page_of(notebook)).ids]
    assert missing == []


# In a browser

@pytest.fixture(scope="module")
def address():
    "docs/ served on this machine."
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    handler = functools.partial(Handler, directory=SITE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def windows(browser):
    "A window of each width, where what all pages share is fetched once."
    return {name: browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
            for name, (width, scheme) in WINDOWS.items()}


@pytest.fixture
def tab(windows, address, request):
    "An empty tab of the asked width; at the end, whatever went wrong in it."
    tab, wrong = windows[request.param].new_page(), []

    def request(r):
        if not r.url.startswith((address, "data:")): wrong.append(f"outside: {r.url}")
    tab.on("request", request)
    tab.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.on("requestfailed", lambda r: wrong.append(f"failed: {r.url}"))
    tab.on("response", lambda r: wrong.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    yield tab
    tab.close()
    assert wrong == []


def ask(tab, address: str, question: str):
    "Open the first page and type a question into its search."
    tab.goto(address, wait_until="networkidle")
    if tab.viewport_size["width"] < 992: tab.locator(".quarto-btn-toggle").first.click()
    tab.locator(".smalldocs-search input").first.fill(question)
    tab.wait_for_function(STILL)  # the sidebar slides in


STILL = """() => !document.querySelector('.collapsing')
    && document.getAnimations().every(a => a.playState != 'running')"""
FIGURES = """[...document.querySelectorAll('main img')].map(i => {
    const r = i.getBoundingClientRect(), s = getComputedStyle(i);
    return {alt: i.alt, natural: i.naturalWidth * i.naturalHeight, width: r.width, height: r.height,
            left: r.left, right: r.right, visible: s.visibility == 'visible' && s.opacity > 0};
})"""
SETTLED = """async () => {  // fonts, pictures, and what scripts do before the next frame
    await document.fonts.ready;
    await Promise.all([...document.images].map(i => i.complete || i.decode()));
    await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
}"""
TOO_WIDE = """[...document.querySelectorAll('main *')].filter(e => {
    for (let p = e; p.tagName != 'MAIN'; p = p.parentElement)
        if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return false;
    return e.getBoundingClientRect().right > innerWidth + 1;
}).map(e => e.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("tab", WINDOWS, indirect=True)
@pytest.mark.parametrize("page", PAGES)
def test_page_in_a_browser(tab, address, page):
    tab.goto(f"{address}/{page}", wait_until="load")
    tab.evaluate(SETTLED)
    width = tab.viewport_size["width"]
    for figure in tab.evaluate(FIGURES):
        assert figure["alt"] and figure["natural"] and figure["visible"], figure
        assert figure["width"] > 20 and figure["height"] > 20, figure
        assert figure["left"] >= 0 and figure["right"] <= width, figure
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(TOO_WIDE) == []
    assert tab.locator("main h1").inner_text().strip()
    dark = tab.evaluate("document.documentElement.classList.contains('quarto-dark')")
    assert dark == tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")


@pytest.mark.parametrize("tab", WINDOWS, indirect=True)
def test_search_finds_a_page(tab, address):
    entries = json.loads((SITE / "search.json").read_text(encoding="utf-8"))
    section = next(e for e in entries if e["section"] and e["href"].split("#")[0] != "index.html")
    ask(tab, address, section["section"])
    tab.locator(f'a.search-result[href$="{section["href"]}"]').click()
    tab.wait_for_url(f"**/{section['href']}")


QUESTIONS = {  # and the page that answers
    "resume a killed run": "train/learner.html#killed-and-resumed",
    "load official TensorFlow checkpoint": "convert/tensorflow.html",
    "export encoder to timm": "convert/export.html",
    "is the difference significant": "tutorials/evaluate_an_encoder.html#question-4",
    "find duplicate images in training": "measure/data_checks.html#near_duplicates",
    "what is global BatchNorm": "parallel/norm.html",
    "SimCLRLearner.pretrain": "train/learner.html#simclrlearner.pretrain",
}


@pytest.mark.parametrize("tab", WINDOWS, indirect=True)
@pytest.mark.parametrize("question", QUESTIONS)
def test_search_answers_a_question(tab, address, question):
    "The page is among the first five results, and the results fit into the window."
    ask(tab, address, question)
    tab.locator("a.search-result").first.wait_for()
    links = [link.get_attribute("href") for link in tab.locator("a.search-result").all()[:5]]
    assert any(QUESTIONS[question] in link for link in links), links
    box, window = tab.locator(".smalldocs-search-results.show").bounding_box(), tab.viewport_size
    assert box["x"] >= 0 and box["x"] + box["width"] <= window["width"]
    assert box["y"] >= 0 and box["y"] + box["height"] <= window["height"]
    on_top = tab.evaluate("([x, y]) => !!document.elementFromPoint(x, y).closest('.search-result')",
                          [box["x"] + box["width"] - 40, box["y"] + 30])
    assert on_top, "something covers the results"


def test_search_that_finds_nothing_says_so(windows, address):
    tab = windows["phone"].new_page()
    ask(tab, address, "zzyzx")
    tab.locator(".search-none").wait_for()
    tab.close()
