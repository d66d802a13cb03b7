"What all explorers share, in a real browser."
import re

import pytest

from browser import Figure, notebook_page, press_slider, serve_lab, until


@pytest.fixture(scope="module")
def lab():
    pytest.importorskip("playwright")
    with serve_lab() as served: yield served


def test_slider_key_and_click_change_the_figure(lab):
    with notebook_page(lab, "nbs/geo/04_explore.ipynb") as page:
        figure = Figure(page)
        message = page.locator(".jp-OutputArea-output p[role=status]").first
        first = figure.changed(lambda: press_slider(page, "step"))
        figure.click(.4, .5)
        value = until(lambda: re.fullmatch(r"\d\.\d\d", message.inner_text() if message.count() else ""), "the value of the cell")[0]
        assert figure.picture() == first
        second = figure.changed(lambda: press_slider(page, "step", "ArrowLeft"))
        figure.click(.4, .5)
        until(lambda: message.count() and message.inner_text() not in ("", value), "another field's value there")
        figure.press("ArrowRight")
        until(lambda: figure.picture() == first, "the field of before")
        assert second != first
