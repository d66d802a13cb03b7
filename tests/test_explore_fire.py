"The fire explorer: what its numbers say, when it makes forecasts, what it says of data that lack something, and all of it in a real browser."
import asyncio
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from browser import ROOT, Figure, notebook_page, press_slider, serve_lab, until, voila_page
from geoforecast.core import ConfigError
from geoforecast.fire.channels import BAND
from geoforecast.fire.explorer import FireExplorer, Model
from geoforecast.fire.picture import OUTCOMES
from geoforecast.fire.prediction import forecast_bundle
from geoforecast.fire.simulate import simulate_fires
from geoforecast.fire.wsts import find_fires, open_fire
from geoforecast.geo.explore import explorer_or_reason
from geoforecast.geo.io import read_netcdf
from geoforecast.learn.bundle import load_bundle, save_bundle
from geoforecast.learn.launch import launch

CREEK = Path(os.environ.get("GEOFORECAST_DATA", ROOT.parent/"shared"/"data"))/"fire"/"creek2020.hdf5"
SCORES = dict(precision=precision_score, recall=recall_score, f1=f1_score)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two fires to look at, a model trained for seconds on others, and a copy of the dashboard that is given both."
    folder = tmp_path_factory.mktemp("explore")
    simulate_fires(folder/"fires", n=2, seed=11, shape=(9, 72, 64))
    simulate_fires(folder/"others", n=5, seed=3, shape=(8, 64, 64))
    run = launch("fire/unet", data_dir=str(folder/"others"), output_dir=str(folder/"tiny"), channels="detections wind_speed wind_direction", window_size=3, crop_size=48,
                 samples_per_epoch=128, max_epochs=3, batch_size=16, hidden_dims=[8, 16], learning_rate=.02, ema_decay=0., seed_everything=0).fit()
    save_bundle(folder/"tiny"/"bundle", run.forecaster, run.config, dict(task="fire"))
    subprocess.run([sys.executable, "-m", "papermill", "--prepare-only", "--no-progress-bar", str(ROOT/"nbs"/"explore"/"fire.ipynb"), str(folder/"fire.ipynb"),
                    "-p", "data", str(folder/"fires"), "-p", "bundle", str(folder/"tiny")], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def fire(folder): return open_fire(find_fires(folder/"fires")[0])


@pytest.fixture(scope="module")
def truth(folder, fire):
    "Forecasts as the command line makes them: the day they were made on to probabilities."
    forecast_bundle(load_bundle(folder/"tiny"), fire.path, folder/"out")
    found = read_netcdf(folder/"out"/fire.path.stem/"predictions.nc").fire_probability
    made = found.time.values.astype("datetime64[D]") - 1
    return {int(np.flatnonzero(fire.dates == d)[0]): p for d, p in zip(made, found.values)}


def expected(fire, truth, day, threshold, growth=False):
    "Scores of a day by scikit-learn."
    hours = fire.read(bands=[BAND["detection_hour"]])[:, 0]
    here = hours[day] == 0 if growth else np.full(hours[day].shape, True)
    return {k: score((hours[day + 1] > 0)[here], truth[day][here] >= threshold, zero_division=0) for k, score in SCORES.items()}


def test_numbers_are_those_of_scikit_learn(folder, fire, truth):
    explorer = FireExplorer(folder/"fires", folder/"tiny", outputs=folder/"none")
    assert explorer.state["model"] == "tiny" and explorer.message.value == ""
    for day, threshold in ((3, .05), (5, .1), (7, .2)):
        explorer.set(day=day, threshold=threshold)
        assert np.allclose(explorer.known[day], truth[day], atol=1e-6)
        for part in ("all", "growth"):
            assert {k: explorer.scores[part][k] for k in SCORES} == pytest.approx(expected(fire, truth, day, threshold, part == "growth"), abs=1e-9)


def test_hand_on_the_slider_waits_for_no_network(folder):
    "Days that are only passed are not forecast, days that were forecast are not forecast again."
    asked = []
    def predict(fire, day): asked.append(day); return np.full(fire.grid.shape, .1, np.float32)
    async def hand():
        explorer = FireExplorer(folder/"fires", outputs=folder/"none")
        explorer.models["slow"] = Model("slow", 2, [BAND["detection_hour"]], predict)
        explorer.controls["model"].options = [*explorer.controls["model"].options, "slow"]
        explorer.set(model="slow", day=2)
        assert asked == [2]
        for day in (3, 4, 5): explorer.controls["day"].value = day
        assert asked == [2] and "at work" in explorer.message.value and explorer.scores == {}
        await asyncio.sleep(.6)
        assert asked == [2, 5] and explorer.message.value == "" and explorer.scores
        for day in (2, 5): explorer.controls["day"].value = day
        explorer.set(day=0)
        assert "needs 2 observed days" in explorer.message.value
        explorer.forecast_all()
        assert sorted(asked) == list(range(1, 9)), "each day once"
    asyncio.run(hand())


def test_what_is_not_there_is_said(folder):
    assert "does not exist" in explorer_or_reason(lambda: FireExplorer(folder/"no <fires>")).value and "<fires>" not in explorer_or_reason(lambda: FireExplorer(folder/"no <fires>")).value
    explorer = FireExplorer(folder/"fires", outputs=folder/"none")
    assert "geoforecast run fire" in explorer.facts.value and explorer.scores, "baselines need no bundle"
    explorer = FireExplorer(folder/"fires", folder/"gone", outputs=folder/"none")
    assert "gone is not a bundle" in explorer.message.value and explorer.scores == {}
    explorer.set(model="blur", day=8)
    assert "was not observed" in explorer.message.value and explorer.scores == {}
    with pytest.raises(ConfigError, match="wind_sped"): explorer.set(channel="wind_sped")


def test_a_new_fire_brings_its_own_days_place_and_view(folder):
    explorer = FireExplorer(folder/"fires", outputs=folder/"none")
    first, second = explorer.controls["fire"].options
    before = explorer.figure.maps[0].get_xlim()
    explorer.set(fire=second, day=4, channel="ndvi", row=3, column=5, wind=False)
    assert explorer.figure.maps[0].get_xlim() != before and explorer.fire.name == second
    explorer.set(fire=first)
    assert explorer.state["channel"] == "ndvi" and explorer.figure.maps[0].get_xlim() == before


@pytest.mark.skipif(not CREEK.is_file(), reason=f"needs {CREEK}")
def test_a_real_fire_of_detections_only(folder):
    explorer = FireExplorer(CREEK, folder/"tiny", outputs=folder/"none")
    assert explorer.controls["wind"].disabled and "no terrain and no wind" in explorer.facts.value and "it takes their means" in explorer.message.value
    explorer.set(model="persistence", day=35, threshold=.5)
    mask = open_fire(CREEK).mask()
    assert explorer.message.value == "" and explorer.scores["all"]["f1"] == pytest.approx(f1_score(mask[36].ravel(), mask[35].ravel()))
    assert explorer.save(folder/"creek.png").stat().st_size > 20_000


def page_scores(page):
    "Rows of the table on the page."
    return [[float(c) for c in row.locator("td").all_inner_texts()[:3]] for row in page.locator("table.scores").first.locator("tr").all()[1:]]


def wait_for_scores(page, fire, truth, day, threshold):
    want = [[round(v, 3) for v in expected(fire, truth, day, threshold, growth).values()] for growth in (False, True)]
    until(lambda: "–" not in page.locator("table.scores").first.inner_text() and np.allclose(page_scores(page), want, atol=6e-4), f"the scores {want} of day {day} at {threshold:.2f}")


def coloured(figure, color):
    "Count the pixels of a colour."
    r, g, b = (int(color[i:i + 2], 16) for i in (1, 3, 5))
    return figure._drawn.evaluate(f"c => {{ const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0; for (let i = 0; i < d.length; i += 4) n += d[i] == {r} && d[i+1] == {g} && d[i+2] == {b}; return n }}")


@pytest.fixture(scope="module")
def lab(folder):
    pytest.importorskip("playwright")
    with serve_lab(folder) as address: yield address


def test_page_follows_hands_as_the_data_say(lab, folder, fire, truth):
    here = FireExplorer(folder/"fires", folder/"tiny", outputs=folder/"none")
    day = here.state["day"]
    with notebook_page(lab, "fire.ipynb") as page:
        figure = Figure(page)
        wait_for_scores(page, fire, truth, day, .5)
        for _ in range(3): figure.changed(lambda: press_slider(page, "threshold", "PageDown"))
        threshold = float(page.locator(".widget-hslider").filter(has_text="threshold").locator(".widget-readout").inner_text())
        assert threshold == pytest.approx(.35)
        wait_for_scores(page, fire, truth, day, threshold)
        figure.changed(lambda: press_slider(page, "day", "ArrowLeft"))
        wait_for_scores(page, fire, truth, day - 1, threshold)
        figure.click(.3, .05); figure.press("ArrowRight")
        wait_for_scores(page, fire, truth, day, threshold)
        check_click(page, figure, here)
        check_outcomes(page, figure, fire, truth, day, threshold)


def check_click(page, figure, here):
    "A click on a cell of the right map puts its row and column into the boxes."
    cell = tuple(int(v) for v in np.argwhere((here.hours > 0).any(0))[0])
    x, y = here.figure.maps[1].transData.transform(here.figure.place.xy((cell[1] + .5, cell[0] + .5)))/here.canvas.figure.bbox.size
    figure.changed(lambda: figure.click(x, 1 - y))
    boxes = [page.get_by_label(name, exact=True) for name in ("row", "column")]
    until(lambda: tuple(int(b.input_value()) for b in boxes) == cell, f"row and column {cell}")


def check_outcomes(page, figure, fire, truth, day, threshold):
    "Hits and false alarms take as much room on the map as the data say."
    before = {name: coloured(figure, color) for name, color in OUTCOMES.items()}
    page.get_by_label("right map").select_option("hits and misses")
    burns, said = fire.mask(slice(day + 1, day + 2))[0], truth[day] >= threshold
    share = (burns & said).sum()/(said & ~burns).sum()
    until(lambda: coloured(figure, OUTCOMES["hit"]) - before["hit"] > 100, "hits on the map") # the picture of the click before may come in between
    drawn = {name: coloured(figure, color) - before[name] for name, color in OUTCOMES.items()}
    assert drawn["hit"]/drawn["false alarm"] == pytest.approx(share, rel=.2)


def test_voila_serves_the_dashboard(folder):
    with voila_page(folder/"fire.ipynb") as page:
        figure = Figure(page)
        assert page.locator("pre").count() == 0, "neither code nor a traceback"
        before = page_scores(page)
        figure.changed(lambda: page.get_by_label("forecast by").select_option("persistence"))
        until(lambda: page_scores(page) != before, "other scores")
