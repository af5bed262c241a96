"The site in docs/: complete, whole without a network, and right in a browser, wide and narrow."
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
from wings import WINGS

SITE = ROOT / "docs"
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html"))
NOTEBOOKS = sorted(p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)
WIDTHS = {"desktop": 1280, "phone": 390}


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
    assert sorted(map(page_of, NOTEBOOKS)) == PAGES
    text = (SITE / "index.html").read_text(encoding="utf-8")
    sidebar = text[text.index('id="quarto-sidebar"'):text.index("<main")]
    links = [link.removeprefix("./") for link in re.findall(r'href="([^"#]+\.html)"', sidebar)]
    assert sorted(set(links)) == PAGES
    for title, purpose in filter(None, WINGS.values()):  # each wing says what it is for
        assert f'{html.escape(title)} <span class="wing">{html.escape(purpose)}</span>' in sidebar
    in_order = [page for page in links if "/" in page and not page.startswith("tutorials")]
    wings = list(dict.fromkeys(page.split("/")[0] for page in in_order))
    assert wings == [wing for wing, about in WINGS.items() if about]


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    broken = []
    for link in parsed(page).links:
        url = urlsplit(link)
        if url.scheme == "data": continue
        assert not url.scheme and not url.netloc, f"an address outside the site: {link}"
        target = (SITE / page).parent / unquote(url.path) if url.path else SITE / page
        if target.is_dir(): target /= "index.html"
        if not target.is_file(): broken.append(link)
        elif url.fragment and target.suffix == ".html":
            ids = parsed(target.resolve().relative_to(SITE.resolve()).as_posix()).ids
            if unquote(url.fragment) not in ids: broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_page_is_whole(page):
    text = (SITE / page).read_text(encoding="utf-8")
    prose = re.sub(r"(?s)<(code|script).*?</\1>", "", text)
    assert r"\(" not in prose and r"\[" not in prose, "TeX that is not MathML"
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
    return {name: browser.new_context(viewport={"width": width, "height": 844})
            for name, width in WIDTHS.items()}


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


@pytest.mark.parametrize("tab", WIDTHS, indirect=True)
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


@pytest.mark.parametrize("tab", WIDTHS, indirect=True)
def test_search_finds_a_page(tab, address):
    entries = json.loads((SITE / "search.json").read_text(encoding="utf-8"))
    section = next(e for e in entries if e["section"] and e["href"].split("#")[0] != "index.html")
    tab.goto(address, wait_until="networkidle")
    if tab.viewport_size["width"] < 992: tab.locator(".quarto-btn-toggle").first.click()
    tab.locator(".smalldocs-search input").first.fill(section["section"])
    tab.locator(f'a.search-result[href$="{section["href"]}"]').click()
    tab.wait_for_url(f"**/{section['href']}")
