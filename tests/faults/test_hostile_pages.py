"""Names and values that come from files are shown as text: in notebooks, explorers, model cards, the page of a run, figures, terminals and logs.

Every page is read by a parser of HTML; a tag or an attribute that the library does not write is a payload that went through.
"""
import io
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hostile import detections, refusal

from geoforecast import notebooks
from geoforecast.core import DataError, GeoforecastError, html_table
from geoforecast.fire.wsts import open_fire, write_fire
from geoforecast.geo.grid import Grid
from geoforecast.learn.bundle import Bundle, model_card
from geoforecast.learn.metrics import score_table
from geoforecast.notebooks import Plan, _about, _note
from geoforecast.segmentation.classes import ClassMapping, read_classes
from geoforecast.terminal import RunLog, error_line

pytestmark = pytest.mark.filterwarnings("ignore")
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script></td></table><b style=\"x:expression(1)\">'\"&lt;svg/onload=alert(3)>"
TAGS = {"table", "caption", "tr", "td", "th", "thead", "tbody", "p", "b", "i", "div", "br", "pre", "span", "style", "code", "a", "h1", "h2", "h3", "ul", "li", "ol", "em", "strong"}


class Page(HTMLParser):
    "Collect tags, attributes and text."
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
    def handle_data(self, data): self.text += data


def harmless(html: str, evil: str = EVIL) -> Page:
    "Assert that a page shows the payload as text and nothing of it as HTML."
    page = Page(html)
    assert page.tags <= TAGS, page.tags - TAGS
    assert not [a for a in page.attributes if a[0].startswith("on") or "expression" in str(a[1]) or "javascript" in str(a[1])], page.attributes
    assert evil in page.text or "".join(evil.split()) in "".join(page.text.split()), page.text[:500]
    return page


def test_the_parser_would_see_it():
    page = Page(f"<table><tr><td>{EVIL}</td></tr></table>")
    assert {"img", "script"} <= page.tags and any(name == "onerror" for name, _ in page.attributes)


def mapping(name=EVIL): return ClassMapping((name, "other"), ((1, 2, 3), (4, 5, 6)))


def shown(tmp_path):
    "Yield what shows itself in a notebook, with the payload in every name it can hold."
    rows = [dict(model=EVIL, split=EVIL, ap=.5, ap_lo=.4, ap_hi=.6, n=3), dict(model="b", split=EVIL, ap=.4, ap_lo=.3, ap_hi=.5, n=3)]
    yield "table", html_table({EVIL: EVIL}, EVIL)
    yield "table of rows", html_table([[EVIL, "b"], ["c", EVIL]])
    yield "scores", score_table(rows)._repr_html_()
    yield "score that is text", score_table([dict(model="a", split="test", protocol=EVIL, n=EVIL), dict(model="b", split="test", protocol=EVIL, n=EVIL)])._repr_html_()
    yield "classes", mapping()._repr_html_()
    yield "fire", open_fire(write_fire(tmp_path/"f.hdf5", detections(), np.datetime64("2020-09-01") + np.arange(8), Grid("EPSG:32611", (375, 0, 269625, 0, -375, 4178250), 6, 7), EVIL))._repr_html_()
    yield "bundle", Bundle(tmp_path, None, {}, {"network": EVIL, EVIL: 1, "task": EVIL}, {}, rows)._repr_html_()
    from geoforecast.geo.explore import _line
    yield "line of an explorer", _line(EVIL)
    from geoforecast.fire.download import Inventory
    images = pd.DataFrame([("tiff", 2020, EVIL, "2020-09-01", EVIL, "h"), ("tiff", 2020, EVIL, "2020-09-02", EVIL, "h")], columns=["form", "year", "fire", "date", "file", "hash"])
    with pd.option_context("display.max_colwidth", None): yield "inventory", Inventory(tmp_path, images, pd.DataFrame([(EVIL, EVIL)], columns=["file", "why"]))._repr_html_()
    from geoforecast.sweep_scores import SweepScores
    run = dict(name=EVIL, status=EVIL, error=EVIL, duration="1", parameters={EVIL: EVIL, "seed": 0}, test=dict(model=EVIL, split="test", ap=.5), validation={})
    with pd.option_context("display.max_colwidth", None): yield "sweep", SweepScores(EVIL, "ap", {EVIL: [EVIL], "seed": [0]}, [run], [dict(model=EVIL, split="test", ap=.3)])._repr_html_()
    from geoforecast.segmentation.screen import scores_table
    yield "scores on screen", scores_table([{"class": EVIL, "mask": .5, "map": .5, "iou": .5}], mapping(), EVIL)


def test_what_shows_itself_in_a_notebook(tmp_path, ledger):
    pages = dict(shown(tmp_path))
    for name, html in pages.items(): harmless(html)
    ledger("names in what shows itself", len(pages), text_only=len(pages))


def rendered(markdown: str) -> str:
    from nbconvert.filters import markdown2html
    return re.sub(r' ?class="anchor-link"', "", markdown2html(markdown))


LINKS = "[a](javascript:alert(1)) ![b](x) `c` | d $\\foo$ <http://e> **f**"


def test_a_model_card_is_text(ledger):
    for evil in (EVIL, LINKS, "a\n\n# b\n\n<script>alert(1)</script>"):
        facts = {"network": evil, "task": evil, "checkpoint": evil, "limits": evil, "data": {"train": dict(windows=1, first=evil, last=evil, fires=[evil]), "val": dict(tiles=1, scenes=[evil])}}
        card = model_card(facts, [dict(model=evil, split="test", ap=.5, n=1), dict(model=f"```\n{evil}", split="test", ap=.5, n=1)])
        page = Page(rendered(card))
        assert page.tags <= TAGS and not [a for a in page.attributes if a[0] in ("onerror", "src", "href") and "#" not in str(a[1])], (page.tags - TAGS, page.attributes)
        assert page.text.count("alert(1)") + page.text.count("alert(2)") >= 5
    ledger("names in model cards", 3, text_only=3)


def test_the_page_of_a_run_is_text(tmp_path, monkeypatch, ledger):
    known = {"value": dict(inferred_type_name="str", default="'a'", help=EVIL)}
    monkeypatch.setattr(notebooks, "_inspected", lambda path: known)
    for evil in (EVIL, LINKS, "a\n\n<script>alert(1)</script>\n\nb", "a\r\r<script>alert(1)</script>", "`<script>alert(1)</script>`", "| <script>alert(1)</script> |"):
        plan = Plan(tmp_path/"walk.ipynb", tmp_path/"run", "run", {"value": evil})
        facts = dict(status="done", started="now", ended="now", duration="1", section=evil, error=f"walk.ipynb, cell [3] failed: {evil}")
        for text in (_about(plan, facts), _note(plan, facts | dict(status="failed"))):
            page = Page(rendered(text))
            assert page.tags <= TAGS, (evil, page.tags - TAGS, text)
            assert not [a for a in page.attributes if a[0].startswith("on") or a[0] == "src" or a[0] == "href" and not a[1].startswith(("#papermill-error-cell", "http://e"))], page.attributes  # an address that is shown is a link
            assert "alert" in page.text
    ledger("values on the page of a run", 12, text_only=12)


def test_names_in_figures_are_no_formulas(tmp_path, ledger):
    from geoforecast.fire.evaluation import draw_scores
    evil, tried = r"$\foo{$ \$ $x_1$", 0
    fig, ax = plt.subplots()
    with pytest.raises(ValueError): ax.set_title(evil); fig.savefig(io.BytesIO())
    plt.close(fig)
    fig, axes = plt.subplots(1, 3)
    mapping(evil).legend(axes[0])
    from geoforecast.segmentation.scores import draw_confusion
    draw_confusion(axes[1], np.eye(2), mapping(evil))
    draw_scores(axes[2], [dict(model=evil, split="test", ap=.5, ap_lo=.4, ap_hi=.6, n=3)], "test")
    fig.savefig(io.BytesIO())
    plt.close(fig)
    ledger("names in figures", 3, text_only=3)


def test_the_terminal_hears_no_commands_from_files(tmp_path, ledger):
    evil = ("\x1b]0;owned\x07", "\x1b[2J\x1b[1;1H", "a\rb", "\x9b31m", "\u202egpj.exe", "a\nerror: b")
    for text in evil:
        for line in (error_line(DataError(f"x.tif: {text} is wrong")), str(GeoforecastError(text))): assert line.isprintable(), line
        refusal(lambda: mapping(text), "class name")
        (tmp_path/"class_mapping.csv").write_text(f'id,name\n0,"{text}"\n1,b\n', newline="")
        if text.strip("\r\n") == text and not re.search(r"[\r\n]", text): refusal(lambda: read_classes(tmp_path), "class_mapping.csv")
    with RunLog(tmp_path/"training.log", "geoforecast run walk -p 'value=a\n2020-01-01 00:00:00  done'") as log:
        print("\x1b[2Jepoch 1")
    lines = (tmp_path/"training.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) and line.isprintable() for line in lines) and len(lines) == 2, lines
    ledger("commands to the terminal", 3*len(evil) + 2, refused=2*len(evil), text_only=len(evil) + 2)


def test_formulas_in_tables_come_back_as_they_were(tmp_path, ledger):
    "A name that begins as a formula is kept in CSV as it is, so that it can be read again; it is a spreadsheet that must be told not to count."
    name = "=HYPERLINK(\"http://x\",\"y\")"
    mapping(name).write(tmp_path/"class_mapping.csv")
    assert read_classes(tmp_path).names[0] == name
    ledger("formulas in tables", 1, kept=1)
