"The explorer page in Chromium: what it shows is what was measured; offline, on a phone, with names that are no HTML."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_nb.cli import embed as command
from simclr_nb.measure.neighbours import nearest_neighbours
from simclr_nb.model.encoder import create_encoder, save_encoder
from simclr_nb.run.embedding import embed
from simclr_nb.run.explorer import explore
from simclr_nb.run.vector_files import Vectors

WIDTHS = {"desktop": (1280, 844), "phone": (390, 844)}
EVIL = ["<script>alert(1)</script>.png", '"><img src=x onerror=alert(2)>.png', "&amp; $x ${y} 'z'.png"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path: return tmp_path_factory.mktemp("explore")


@pytest.fixture(scope="module")
def vectors(folder) -> Vectors:
    "120 images of noise around three colours; two are copies; three have names that are markup."
    rng = np.random.default_rng(0)
    for i in range(120):
        name = EVIL[i].replace("/", "\u2215") if i < 3 else f"{i:03}.png"
        file = folder / "data" / f"class {i % 3}" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 90, (16, 16, 3)) + 120 * (np.arange(3) == i % 3)
        if i != 57: last = pixels
        Image.fromarray(last.astype(np.uint8)).save(file)
    torch.manual_seed(0)
    encoder = create_encoder("resnet18", 0.125, "cifar", zero_init_last=False)
    save_encoder(encoder, folder / "encoder.safetensors")
    return embed(encoder, folder / "data", folder / "x.npy", workers=0, progress=False).read()


@pytest.fixture(scope="module")
def page(vectors, folder) -> Path:
    return explore(vectors, folder / "data", folder / "page.html", "pca", progress=False)


@pytest.fixture
def tab(browser, page, request):
    "The page in a window of the asked width; at the end, whatever went wrong in it."
    width, height = WIDTHS[getattr(request, "param", "desktop")]
    window = browser.new_context(viewport=dict(width=width, height=height), has_touch=width < 500,
                                 accept_downloads=True)
    tab, wrong = window.new_page(), []
    tab.set_default_timeout(60_000)
    allowed = (page.as_uri(), "data:", "blob:")
    tab.on("request", lambda r: None if r.url.startswith(allowed) else wrong.append(f"outside: {r.url}"))
    tab.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.on("dialog", lambda d: (wrong.append(f"dialog: {d.message}"), d.dismiss()))
    tab.goto(page.as_uri(), wait_until="load")
    tab.wait_for_function("document.body.dataset.ready && !asked")
    yield tab
    window.close()
    assert wrong == []


def place(tab, row: int) -> tuple[float, float]:
    "Where an image is on the screen."
    x, y = tab.evaluate(f"[toX(X[{row}]) / ratio, toY(Y[{row}]) / ratio]")
    box = tab.locator("#map").bounding_box()
    return box["x"] + x, box["y"] + y


def lone(tab) -> int:
    "The image with the most room around it on the map."
    points = torch.tensor(tab.evaluate("[Array.from(X), Array.from(Y)]")).T
    return int(torch.cdist(points, points).fill_diagonal_(9).min(1).values.argmax())


def test_neighbours_are_those_of_the_measure(tab, vectors):
    row = lone(tab)
    tab.mouse.click(*place(tab, row))
    shown = tab.locator("#panel .grid button")
    shown.first.wait_for()
    rows, similarity = nearest_neighbours(torch.from_numpy(np.array(vectors.h)), torch.tensor([row]), 12)
    assert [int(button.get_attribute("data-row")) for button in shown.all()] == rows[0].tolist()
    said = [float(text) for text in shown.all_inner_texts()]
    assert said == pytest.approx(similarity[0].tolist(), abs=6e-4)
    assert tab.locator("#panel p").first.inner_text() == vectors.names[row]
    everyone, _ = nearest_neighbours(torch.from_numpy(np.array(vectors.h)), torch.arange(120), 12)
    assert tab.evaluate("Array.from(near)") == everyone.flatten().tolist()


def selected(tab) -> list[int]: return tab.evaluate("chosen()")


def downloaded(tab) -> list[str]:
    with tab.expect_download() as file: tab.locator("#download").click()
    return Path(file.value.path()).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("way", ["box", "lasso"])
def test_a_selection_is_what_lies_inside_and_its_list_is_exported(tab, vectors, way):
    box = tab.locator("#map").bounding_box()
    left, top = box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.2
    right, bottom = box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.75
    corners = [(right, top), (right, bottom), (left, bottom)] if way == "lasso" else [(right, bottom)]
    tab.locator(f"#{way}").click()
    tab.mouse.move(left, top)
    tab.mouse.down()
    for corner in corners: tab.mouse.move(*corner, steps=5)
    tab.mouse.up()
    places = [place(tab, row) for row in range(120)]
    inside = [i for i, (x, y) in enumerate(places) if left < x < right and top < y < bottom]
    assert selected(tab) == inside and 3 < len(inside) < 117
    assert f"{len(inside)} of 120 images selected" in tab.locator("#panel").inner_text()
    assert downloaded(tab) == [vectors.names[i] for i in inside]
    tab.keyboard.press("Escape")
    assert selected(tab) == []


def test_names_are_text(tab, vectors):
    "Nothing runs, nothing becomes an element; all of it can be found and read."
    for name in EVIL:
        name = name.replace("/", "\u2215")
        full = next(n for n in vectors.names if n.endswith(name))
        tab.locator("#search").fill(name.upper())
        button = tab.locator("#panel .grid button")
        assert button.count() == 1 and button.get_attribute("title") == full
        button.click()
        tab.wait_for_function("open === 'image' && example >= 0")
        assert tab.locator("#panel p").first.inner_text() == full
    assert tab.evaluate("document.querySelectorAll('img, iframe, object').length") == 0
    assert tab.evaluate("[...document.scripts].filter(s => !s.type).length") == 1


def test_duplicates_colours_and_keys(tab, vectors):
    tab.locator("#tab-pairs").click()
    tab.locator("#least").fill("0.999")
    first = tab.locator("#panel .pair").first.locator("button")
    copies = {int(b.get_attribute("data-row")) for b in first.all()}
    names = {vectors.names[i].split("/")[-1] for i in copies}
    assert names == {"056.png", "057.png"}
    tab.locator("#color").select_option(label="Colour: label")
    tab.locator("#legend button").first.click()
    assert selected(tab) == [i for i, label in enumerate(vectors.labels) if label == "class 0"]
    tab.locator("#map").focus()
    before = tab.evaluate("[view.x, view.y, view.zoom]")
    for key in ("ArrowRight", "ArrowDown", "+"): tab.keyboard.press(key)
    x, y, zoom = tab.evaluate("[view.x, view.y, view.zoom]")
    assert x > before[0] and y > before[1] and zoom > before[2]
    tab.keyboard.press("Enter")
    assert tab.evaluate("example") >= 0
    tab.keyboard.press("0")
    assert tab.evaluate("[view.x, view.y, view.zoom]") == [0.5, 0.5, 1]


def test_thumbnails_are_the_images(tab, vectors, folder):
    "The picture of an example has the colours of its file."
    tab.evaluate("take(40, true)")
    tab.wait_for_function("!waiting.length")
    side = tab.evaluate("facts.thumb")
    shown = tab.evaluate(f"Array.from(byId('example').getContext('2d').getImageData(0, 0, {side}, {side}).data)")
    mean = np.array(shown).reshape(-1, 4)[:, :3].mean(0)
    expected = np.asarray(Image.open(folder / "data" / vectors.names[40])).reshape(-1, 3).mean(0)
    assert np.abs(mean - expected).max() < 6


@pytest.mark.parametrize("tab", ["phone"], indirect=True)
def test_on_a_phone(tab):
    "No sideways scroll; every control lies in the window and can be tapped; fingers move and choose."
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    controls = tab.locator("header button, header select, header input, .tabs button")
    assert controls.count() >= 9
    for control in controls.all():
        box = control.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 30
        assert box["y"] >= 0 and box["y"] + box["height"] <= 844
    area = tab.locator("#map").bounding_box()
    assert area["width"] >= 380 and area["height"] >= 250
    tab.touchscreen.tap(*place(tab, lone(tab)))
    tab.locator("#panel .grid button").first.wait_for()
    assert tab.evaluate("example") == lone(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_command_writes_the_page(call, folder, vectors, browser):
    argv = [folder / "encoder.safetensors", folder / "data", "--out", folder / "y.csv", "--workers", "0",
            "--explore", folder / "y.html", "--map", "pca"]
    code, said, error = call(command, *argv)
    assert code == 0, error
    assert "y.html" in said
    text = (folder / "y.html").read_text(encoding="utf-8")
    assert json.loads(text.split('id="facts">')[1].split("</script>")[0])["names"] == vectors.names
    assert not any(word in text for word in ("http:", "https:", "//cdn"))
