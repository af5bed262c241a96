"The things to play with, driven in a browser by mouse, touch and keyboard."
import re

import pytest
import torch

from simclr_nb.core.play import (
    crop_explorer,
    image_address,
    matching_game,
    temperature_slider,
)

COLORS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])


def squares(colors):
    "Plain squares, `(N, 3, 8, 8)`."
    return colors[:, :, None, None].expand(-1, -1, 8, 8)


GAME = matching_game({"same": squares(COLORS).repeat(2, 1, 1, 1),
                      "darker": torch.cat([squares(COLORS), squares(COLORS) / 2])})
SHARES = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
SLIDER = temperature_slider([0.1, 0.5, 2.0], {"near": 0.9, "<b>far</b>": -0.5}, SHARES)
BOXES = torch.tensor([[[0, 0, 8, 4], [0, 4, 8, 4]], [[2, 2, 4, 4], [0, 0, 8, 8]]])
EXPLORER = crop_explorer(squares(COLORS)[0], [("disjoint", BOXES[0]), ("nested", BOXES[1])],
                         {"plain": [squares(COLORS)[:2]] * 2, "other": [squares(COLORS)[2:]] * 2})


@pytest.fixture(params=[1280, 390], ids=["desktop", "phone"])
def page(browser, request):
    "A page with all three; at the end, whatever went wrong on it."
    window = browser.new_context(viewport={"width": request.param, "height": 844}, has_touch=True)
    page, wrong = window.new_page(), []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith(("data:", "about:")) else wrong.append(r.url))
    html = "".join(part._repr_html_() for part in (GAME, SLIDER, EXPLORER))
    page.set_content(f"<!doctype html><meta name=viewport content='width=device-width'>{html}")
    assert page.evaluate("document.documentElement.scrollWidth") <= request.param
    yield page
    window.close()
    assert wrong == []


def said(page, kind): return page.locator(f"div[id^=play-{kind}] .play-says").inner_text()


def cards(page, row): return page.locator("div[id^=play-match] .play-row").nth(row).locator("button")


def sources(page, row): return [card.locator("img").get_attribute("src")
                                for card in cards(page, row).all()]


@pytest.mark.parametrize("how", ["click", "tap", "keyboard"])
def test_all_pairs_found(page, how):
    def press(card):
        if how == "keyboard":
            card.focus()
            page.keyboard.press("Enter")
        else: getattr(card, how)()
    upper, lower = sources(page, 0), sources(page, 1)
    assert sorted(upper) == sorted(lower) == sorted(map(image_address, squares(COLORS)))
    for i, address in enumerate(upper):
        press(cards(page, 0).nth(i))
        press(cards(page, 1).nth(lower.index(address)))
    assert said(page, "match") == "You matched 4 of 4. Guessing matches 1 of 4 on average."
    assert cards(page, 1).evaluate_all("b => b.every(x => x.classList.contains('right'))")


def test_wrong_pairs_and_second_thoughts(page):
    upper, lower = sources(page, 0), sources(page, 1)
    right = [lower.index(address) for address in upper]
    cards(page, 1).nth(0).click()
    assert said(page, "match") == "Choose a picture in the upper row first."
    def pair(i, below):
        cards(page, 0).nth(i).click()
        cards(page, 1).nth(below).click()
    pair(0, right[1])
    pair(1, right[1])  # taken from the first one
    pair(0, right[2])
    pair(0, right[0])  # and changed once more
    pair(2, right[3])
    pair(3, right[2])
    assert said(page, "match").startswith("You matched 2 of 4.")
    wrong = cards(page, 0).evaluate_all("b => b.map(x => x.classList.contains('wrong'))")
    assert wrong == [False, False, True, True]


def test_another_level_and_a_new_game(page):
    page.locator("div[id^=play-match] select").select_option(label="darker")
    assert sorted(sources(page, 1)) == sorted(map(image_address, squares(COLORS) / 2))
    orders = set()
    for _ in range(40):
        page.get_by_role("button", name="New game").click()
        orders.add(tuple(sources(page, 1)))
    assert len(orders) > 8  # of 24


def test_slider_shows_what_the_package_computed(page):
    slider = page.get_by_label("temperature")
    names = page.locator(".play-bars > span:first-child").all_inner_texts()
    assert names == ["near, similarity 0.90", "<b>far</b>, similarity -0.50"]
    for key, place in (("Home", 0), ("ArrowRight", 1), ("End", 2)):
        slider.focus()
        page.keyboard.press(key)
        shown = page.locator(".play-value").all_inner_texts()
        assert [float(text.rstrip("%")) for text in shown] == (100 * SHARES[place]).round().tolist()
    assert "Temperature 2.00: the hardest negative has 50% of the push." == said(page, "temperature")
    widths = page.locator(".play-fill").evaluate_all("b => b.map(x => x.style.width)")
    assert widths == ["50%", "50%"]


def test_explorer_shows_boxes_views_and_histograms(page):
    place = page.locator("div[id^=play-crops]")
    frames = place.locator(".play-frame rect")
    assert frames.evaluate_all("r => r.map(x => +x.getAttribute('width'))") == [0.5, 0.5]
    assert said(page, "crops") == "Draw 1 of 2: disjoint."
    views = place.locator(".play-views img")
    assert views.nth(1).get_attribute("src") == image_address(squares(COLORS)[1])
    page.get_by_role("button", name="Draw again").click()
    assert frames.evaluate_all("r => r.map(x => +x.getAttribute('height'))") == [0.5, 1]
    place.locator("select").select_option(label="other")
    assert views.nth(0).get_attribute("src") == image_address(squares(COLORS)[2])
    heights = place.locator(".play-histogram").first.locator("rect").evaluate_all(
        "r => r.map(x => +x.getAttribute('height'))")
    assert len(heights) == 32 and heights[0] == 1
    assert abs(heights[-1] - 0.5) < 1e-3  # two values of three are 0, one is 1


def test_page_without_scripts_says_so():
    for part in (GAME, SLIDER, EXPLORER):
        html = part._repr_html_()
        assert "This needs JavaScript." in html
        assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", html)
