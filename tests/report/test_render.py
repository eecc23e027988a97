"""The page stands alone, says what it is given and nothing else, and can be read by everybody."""

import base64
import hashlib
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from scalselect_assets.charts import figures
from scalselect_assets.report.content import Picture
from scalselect_assets.report.render import render
from tests.conftest import RunPython
from tests.report.page import Page
from tests.report.sample import HOSTILE, bare_content, full_content, item

ELEMENTS = {"a", "abbr", "article", "bdi", "body", "code", "dd", "details", "div", "dl", "dt", "figcaption"}
ELEMENTS |= {"figure", "h1", "h2", "h3", "head", "header", "html", "img", "li", "main", "meta", "nav", "p"}
ELEMENTS |= {"pre", "section", "span", "strong", "style", "summary", "table", "tbody", "td", "th", "thead"}
ELEMENTS |= {"title", "tr", "ul", "svg", "g", "path", "defs", "use", "text", "clippath", "rect"}


@pytest.fixture(scope="module")
def full() -> Page:
    return Page(render(full_content()))


@pytest.fixture(scope="module")
def bare() -> Page:
    return Page(render(bare_content()))


@pytest.fixture(params=["full", "bare"])
def page(request: pytest.FixtureRequest) -> Page:
    return request.getfixturevalue(request.param)


def test_nothing_is_requested_from_anywhere(page: Page) -> None:
    for attribute in ("src", "href", "srcset", "poster", "action", "data", "xlink:href"):
        for value in page.values(attribute):
            assert value.startswith(("#", "data:image/jpeg;base64,")), f"{attribute}={value[:60]}"
    styles = "".join(one.text for one in page.all("style")) + "".join(page.values("style"))
    assert "@import" not in styles
    assert "url(" not in styles
    for value in page.values("clip-path"):
        assert re.fullmatch(r"url\(#[\w-]+\)", value)


def test_the_policy_forbids_what_the_page_does_not_do(page: Page) -> None:
    (policy,) = [one for one in page.all("meta") if "http-equiv" in one.attributes]
    assert policy.attributes["http-equiv"] == "Content-Security-Policy"
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy.attributes["content"]).split(";"))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    before = page.elements[: page.elements.index(policy)]
    assert {one.tag for one in before} <= {"html", "head", "meta"}


def test_there_are_only_elements_that_the_page_means(page: Page) -> None:
    assert {one.tag for one in page.elements} <= ELEMENTS
    assert not [name for one in page.elements for name in one.attributes if name.startswith("on")]


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_a_row_says_is_shown_as_text(full: Page, text: str) -> None:
    shown = max(full.all("article"), key=lambda one: one.text.count(text))
    assert shown.text.count(text) >= 5  # question, answer, note, source, id and place
    assert any(text in one.text for one in full.all("th"))


def test_texts_of_another_direction_do_not_turn_what_is_beside_them(full: Page) -> None:
    for element in full.elements:
        if element.tag == "span" and any(element.text == text for text in HOSTILE):
            assert element.attributes.get("dir") == "auto"
    assert any(one.text == HOSTILE[5] for one in full.all("bdi"))


def test_what_a_page_cannot_hold_is_marked() -> None:
    content = bare_content()
    odd = "nul\0 escape\x1b c1\x85 surrogate\ud800 end"
    gallery = replace(content.galleries[0], items=(item(1, odd),))
    html = render(replace(content, galleries=(gallery,)))
    assert "nul� escape� c1� surrogate� end" in html
    html.encode()


def test_ids_are_unique_and_every_reference_inside_the_page_leads_somewhere(page: Page) -> None:
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    referred = {value.removeprefix("#") for value in page.values("href") if value.startswith("#")}
    referred |= set(page.values("aria-labelledby"))
    referred |= {value[len("url(#") : -1] for value in page.values("clip-path")}
    assert referred <= set(ids)


def test_every_picture_has_words(page: Page) -> None:
    assert all(str(one.attributes.get("alt", "")).strip() for one in page.all("img"))
    for one in page.all("svg"):
        assert one.attributes["role"] == "img"
        assert str(one.attributes["aria-label"]).strip()


def test_every_chart_has_its_numbers_in_a_table(full: Page) -> None:
    content = full_content()
    labels = [
        one.attributes["aria-label"] for one in full.all("div") if one.attributes.get("role") == "region"
    ]
    assert labels[:3] == [
        "Energy by number of directions",
        "Samples by normalised leverage",
        "Normalised leverage by rank",
    ]
    rows = full.rows()
    assert [f"{content.energy.k} = k", f"{100 * content.energy.k_energy:.2f}%"] in rows
    told = {tuple(row[2:]) for row in rows}
    assert {(f"{one.pool:,}", f"{one.selected:,}") for one in content.leverage.bins} <= told
    assert [f"{content.leverage.ranks[-1]:,}", f"{content.leverage.values[-1]:.4g}"] in rows


def test_headings_are_in_order_and_sections_are_named(page: Page) -> None:
    levels = [int(one.tag[1]) for one in page.elements if re.fullmatch(r"h\d", one.tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert page.elements[0].attributes["lang"] == "en"
    assert all("aria-labelledby" in one.attributes for one in page.all("section"))


def test_what_scrolls_can_be_scrolled_by_keyboard(page: Page) -> None:
    for one in page.all("div", "pre"):
        if one.tag == "pre" or one.attributes.get("class") == "scroll":
            assert one.attributes["tabindex"] == "0"
            assert one.attributes["aria-label"]


def test_sections_without_contents_say_so(bare: Page) -> None:
    for sentence in (
        "All embeddings are equal, so there is no energy to hold.",
        "No sample has any leverage.",
        "The pool has no rows.",
        "No other strategies were compared with this selection.",
        "There was no selection before this one, or what became of it is not recorded.",
        "No row was rejected.",
        "There are no such samples.",
        "The selection is not simply the top by leverage",
    ):
        assert sentence in bare.text


def test_equal_contents_give_equal_bytes_in_any_process(fresh_python: RunPython, full: Page) -> None:
    statement = (
        "import hashlib; from tests.report.sample import full_content; "
        "from scalselect_assets.report.render import render; "
        "print(hashlib.sha256(render(full_content()).encode()).hexdigest())"
    )
    other = fresh_python("-c", statement, PYTHONHASHSEED="12345")
    assert render(full_content()) == full.html
    assert hashlib.sha256(full.html.encode()).hexdigest() == other.stdout.strip(), other.stderr


def test_numbers_are_said_as_they_are(full: Page) -> None:
    for told in (
        "1,020",
        "Of the selection before, 131 samples stayed and 24 went (15.5%); 29 came.",
        "46 of 128 directions hold 89.97% of the energy (energy 0.9).",
        "16.0%",
    ):
        assert told in full.text
    assert ["spanning", "–", "0.43", "1", "0", "−∞"] in full.rows()


def test_a_picture_that_cannot_be_shown_says_why(full: Page) -> None:
    (missing,) = [one for one in full.all("p") if one.attributes.get("class") == "missing"]
    assert HOSTILE[0] in missing.text
    assert HOSTILE[0] in str(missing.attributes["aria-label"])


def test_pictures_are_the_bytes_that_were_given(full: Page) -> None:
    given = [
        one
        for gallery in full_content().galleries
        for sample in gallery.items
        for one in (*sample.pictures, *([sample.overlay] if sample.overlay else []))
        if one.data is not None
    ]
    shown = [one.attributes for one in full.all("img")]
    assert [base64.b64decode(str(one["src"]).partition(",")[2]) for one in shown] == [
        one.data for one in given
    ]
    assert [(one["width"], one["height"], one["alt"]) for one in shown] == [
        (str(one.width), str(one.height), one.alt) for one in given
    ]


def test_charts_follow_the_colours_of_the_page(full: Page) -> None:
    drawn = "".join(
        value
        for one in full.elements
        if "svg" in one.parents
        for value in [one.attributes.get("style")]
        if value
    )
    assert not re.search(r"#[0-9a-f]{6}", drawn)
    declared = set(re.findall(r"(--\w+):", full.all("style")[0].text))
    used = set(re.findall(r"var\((--\w+)\)", drawn))
    assert used == {"--ink", "--grid", "--series", "--rest", "--mark"}
    assert used <= declared


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_what_is_to_be_read_stands_out_from_what_is_behind_it(full: Page, theme: str) -> None:
    blocks = re.findall(r":root \{(.*?)\}", full.all("style")[0].text, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[["light", "dark"].index(theme)]))
    for text in ("ink", "quiet", "link"):
        for behind in ("page", "card"):
            assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
    assert contrast(colours["yes"], colours["yes-page"]) >= 4.5
    for shape in ("series", "mark"):
        assert contrast(colours[shape], colours["page"]) >= 3, shape


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_charts_of_one_page_do_not_share_ids() -> None:
    draw = figures.leverage_chart(full_content().leverage)
    first, second = (set(re.findall(r'\bid="([^"]*)"', figures.themed_svg(draw, name, "x"))) for name in "ab")
    assert first
    assert not first & second


def test_a_chart_as_a_picture_is_the_same_every_time() -> None:
    draw = figures.energy_chart(full_content().energy)
    assert figures.png(draw) == figures.png(draw)
    assert figures.png(draw).startswith(b"\x89PNG")


def test_a_picture_without_data_needs_no_size() -> None:
    assert (Picture("x", problem="gone").width, Picture("x", problem="gone").data) == (0, None)
