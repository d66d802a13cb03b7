"The explorer of rain: in JupyterLab, under voila, and what a notebook cannot show of it."
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from browser import Figure, notebook_page, press_slider, serve_lab, until, voila_page
from geoforecast.geo.io import write_netcdf
from geoforecast.learn.bundle import load_bundle, save_bundle
from geoforecast.learn.launch import launch
from geoforecast.precipitation.atmosphere import open_atmosphere
from geoforecast.precipitation.baselines import fit_baselines
from geoforecast.precipitation.evaluation import describe
from geoforecast.precipitation.explorer import PrecipitationExplorer
from geoforecast.precipitation.prediction import as_source, forecast_series, region_of
from geoforecast.precipitation.regions import RegionConfig
from geoforecast.precipitation.scores import rain_scores
from geoforecast.precipitation.simulate import simulate_atmosphere, world_of

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("GEOFORECAST_DATA", ROOT.parent/"shared"/"data"))/"precipitation"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real data here")
warnings.filterwarnings("ignore", "the target has|upstream reaches|the series has")
HALF_DAY = np.timedelta64(12, "h")


def part(name, **options): return dict(class_path=f"geoforecast.precipitation.{name}", init_args=options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A simulated atmosphere, a small network of it in a bundle, the two best forecasts, and the dashboard that shows them."
    folder = tmp_path_factory.mktemp("explore")
    ds = simulate_atmosphere(folder/"air.nc", n_times=200, start="2020-05-01", variables=("DPT", "TEM", "U", "V"), levels=(500, 850), seed=1)
    channels = [f"{v}_{p}" for v in ("DPT", "TEM", "U", "V") for p in (500, 850)] + ["precipitation"]
    model = part("forecaster.PrecipitationForecaster", network=part("models.UNet", hidden_dims=[8, 8]), window_size=2, learning_rate=.01, ema_decay=0,
                 inputs=part("normalize.PrecipitationInputs", channels=channels, upstream_columns=16))
    data = part("data.PrecipitationDataModule", data_dir=str(folder/"air.nc"), region=part("regions.RegionConfig", include_upstream=True), window_size=2, batch_size=32)
    run = launch(dict(name="run", output_dir=str(folder/"run"), monitor="val/loss", model=model, data=data, trainer=dict(max_epochs=2, accelerator="cpu"))).fit()
    save_bundle(folder/"run"/"bundle", run.forecaster, run.config, describe(run), fit_baselines(run.datamodule))
    for name, columns in (("knowing", 8), ("alone", 0)):
        best = world_of(ds).best_forecast(ds, 7, columns)
        write_netcdf(folder/name/"predictions.nc", best.assign_coords(forecast_reference_time=best.time - HALF_DAY).rename("precipitation"))
    parameters = dict(data=folder/"air.nc", bundle=folder/"run"/"bundle", compare=f"{folder/'knowing'}, {folder/'alone'}")
    subprocess.run([sys.executable, "-m", "papermill", "nbs/explore/precipitation.ipynb", str(folder/"rain.ipynb"), "--prepare-only", *(w for k, v in parameters.items() for w in ("-p", k, str(v)))],
                   cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def forecast(made):
    bundle = load_bundle(made/"run")
    return forecast_series(bundle.forecaster, open_atmosphere(made/"air.nc"), region_of(bundle))


@pytest.fixture(scope="module")
def twin(made):
    "The same explorer in this process, for the places of its axes."
    return PrecipitationExplorer(made/"air.nc", made/"run", f"{made/'knowing'}, {made/'alone'}")


def place(explorer, ax, lon, lat):
    "Where a point of a map lies on the figure, as shares of its width and height from the upper left."
    x, y = ax.transData.transform((lon, lat))
    return x/explorer.canvas.figure.bbox.width, 1 - y/explorer.canvas.figure.bbox.height


def expected(forecast, when, threshold=5):
    "Scores by the library, as the page writes them."
    scores = rain_scores(*(forecast[k].sel(time=when) for k in ("precipitation", "observed")))
    return [f"{scores[k]:.3f}" for k in ("rmse", "mae")] + [f"{abs(scores['bias']):.3f}"] + ([f"{scores[f'csi_{threshold}']:.3f}"] if np.isfinite(scores[f"csi_{threshold}"]) else [])


@pytest.fixture(scope="module")
def lab(made):
    pytest.importorskip("playwright")
    with serve_lab(root=made) as address: yield address


def test_sliders_keys_clicks_and_drags_in_jupyterlab(lab, made, forecast, twin):
    "Picture and numbers change as the data say, for a slider, a key, a click and a hand on a box."
    with notebook_page(lab, "rain.ipynb") as page:
        figure = Figure(page)
        table = lambda: page.locator(".jp-OutputArea-output table.dataframe tr", has_text="UNet").first.inner_text()
        title = lambda: re.search(r"Scores of (\S+ \S+),", page.locator(".jp-OutputArea-output").filter(has_text="Scores of").first.inner_text())[1]
        def shows(when, threshold=5): return title() == when and all(number in table() for number in expected(forecast, np.datetime64(when), threshold))
        first = title()
        until(lambda: shows(first), "the scores of the first time")
        before = figure.picture()
        figure.changed(lambda: press_slider(page, "time", "ArrowLeft"))
        earlier = str(np.datetime64(first) - HALF_DAY).replace("T", " ")
        until(lambda: shows(earlier), f"the scores of {earlier}")
        figure.press("ArrowRight")
        until(lambda: shows(first) and figure.picture() == before, "the first time again, by a key")
        for _ in range(4): press_slider(page, "threshold", "ArrowLeft") # 3, 2, 1, .5 mm
        press_slider(page, "threshold")
        until(lambda: shows(first, 1), "the CSI at 1 mm")
        figure.click(*place(twin, twin.bottom["axes"][0], 117.5, 30))
        note = page.locator("p[role=note]")
        number = f"{float(forecast.precipitation.sel(time=np.datetime64(first), lat=30, lon=117.5)):.2f} mm"
        until(lambda: note.count() and f"UNet {number}" in note.inner_text(), f"{number} in the clicked cell")
        box, (x, y), (to, _) = figure.canvas.bounding_box(), *(place(twin, twin.top["ax"], lon, 33.) for lon in (110, 101))
        page.mouse.move(box["x"] + x*box["width"], box["y"] + y*box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + to*box["width"], box["y"] + y*box["height"], steps=3)
        until(lambda: "-p downstream_lon_min=100 " in page.locator("pre", has_text="geoforecast run precipitation").last.inner_text(), "the boxes to be 100 degrees east")
        page.mouse.up()
        assert "upstream_lon_max=100" in page.locator("pre", has_text="geoforecast run precipitation").last.inner_text()


def test_voila_serves_the_page(made, forecast):
    with voila_page(made/"rain.ipynb", 1100, 1500) as page:
        figure = Figure(page)
        title = lambda: page.get_by_text("Scores of").first.inner_text()
        before = title()
        figure.changed(lambda: press_slider(page, "time", "ArrowRight")) # the slider stands at the month's first time
        until(lambda: title() != before, "the scores of the next time")


@pytest.mark.parametrize("count", [0, -180])
def test_data_across_the_seam_with_falling_latitudes(tmp_path, count):
    "Longitudes of either count and latitudes either way: boxes, truth and forecasts from a file meet the same cells."
    ds = simulate_atmosphere(n_times=60, lon=(-15., 20.), variables=("DPT",), levels=(850,), seed=2)
    lon = (ds.lon.values - count) % 360 + count
    source = ds.assign_coords(lon=lon).isel(lat=slice(None, None, -1)).rename(lat="latitude", lon="longitude").sortby("longitude")
    source.to_netcdf(tmp_path/"air.nc")
    rain = source.precipitation.isel(longitude=slice(0, 5)) if count == 0 else source.precipitation.isel(longitude=slice(6, 11)) # 0 to 10 degrees east
    later = (rain.isel(time=slice(None, -1)) + 1).assign_coords(time=rain.time.values[1:])
    write_netcdf(tmp_path/"f"/"predictions.nc", later.assign_coords(forecast_reference_time=("time", rain.time.values[:-1])).rename("precipitation"))
    explorer = PrecipitationExplorer(tmp_path/"air.nc", tmp_path/"f"/"predictions.nc")
    assert explorer.message.value == ""
    west, far = (357.5, 345) if count == 0 else (-2.5, -15)
    explorer.set(time=explorer.words[20], downstream_lon_min=west, downstream_lon_max=10, upstream_lon_min=far, upstream_lon_max=west)
    assert explorer.message.value == "" and "7 x 6 points, 5 columns upstream" in explorer.command.value
    shown = [i.get_array()[::-1] for i in explorer.bottom["images"]]
    here = ds.precipitation.sel(lon=slice(0, 10))
    np.testing.assert_allclose(shown[1], here[20], atol=1e-5)
    np.testing.assert_allclose(shown[0], here[19] + 1, atol=1e-5)
    np.testing.assert_allclose(explorer.rains["persistence"][0, explorer.shown[1]], here[19], atol=1e-5)


def test_a_network_runs_once_for_a_month(made, monkeypatch):
    "Sliders, other months and other bundles do not run it again."
    explorer, runs = PrecipitationExplorer(made/"air.nc", made/"run"), []
    forecaster = explorer.bundle.forecaster
    forecaster.register_forward_hook(lambda *_: runs.append(1))
    explorer.set(time="2020-06-10 12:00")
    once = len(runs)
    for change in (dict(time="2020-06-11 00:00"), dict(threshold=1), dict(variable="U"), dict(time="2020-05-20 00:00"), dict(time="2020-06-11 00:00"), dict(bundle=""), dict(bundle=str(made/"run"))): explorer.set(**change)
    assert once > 0 and len(runs) - once <= 8, "only May is forecast anew"
    count = len(runs)
    for time in explorer.controls["time"].options: explorer.set(time=time)
    assert len(runs) == count


def test_bundles_that_do_not_fit_are_said(made, tmp_path):
    shutil.copytree(made/"run"/"bundle", tmp_path/"fire")
    (tmp_path/"fire"/"SHA256SUMS").unlink()
    facts = json.loads((tmp_path/"fire"/"metadata.json").read_text())
    (tmp_path/"fire"/"metadata.json").write_text(json.dumps(facts | dict(task="fire")))
    explorer = PrecipitationExplorer(made/"air.nc", tmp_path/"fire")
    assert "the task 'fire'" in explorer.message.value.replace("&#x27;", "'") and explorer.state["forecast"] == "persistence"
    explorer.set(bundle=str(tmp_path))
    assert "is not a bundle" in explorer.message.value
    explorer.set(bundle=str(made/"air.nc"))
    assert "holds no forecasts" in explorer.message.value
    elsewhere = simulate_atmosphere(n_times=30, lat=(40., 50.), lon=(0., 10.), variables=("DPT",), levels=(850,))
    write_netcdf(tmp_path/"predictions.nc", elsewhere.precipitation.assign_coords(forecast_reference_time=elsewhere.time - HALF_DAY))
    explorer.set(bundle=str(tmp_path/"predictions.nc"))
    assert "not among those of the data" in explorer.message.value
    explorer.set(data="", bundle="")
    assert "no data" in explorer.message.value and explorer.atmosphere is None
    explorer.set(data=str(made/"air.nc"), bundle=str(made/"run"))
    assert explorer.message.value == "" and explorer.state["forecast"] == "UNet"


def test_text_is_escaped(made):
    explorer = PrecipitationExplorer(made/"air.nc", "<b>x</b>")
    assert "<b>x" not in explorer.message.value and "&lt;b&gt;" in explorer.message.value


@real
def test_iberia(tmp_path):
    "Daily rain of 35 years without wind: the shown day's scores are those of the file, and its coming day has no truth."
    explorer = PrecipitationExplorer(REAL/"iberia_1961_1995.nc")
    assert explorer.controls["wind"].disabled and explorer.state["lead"] == "24 h"
    explorer.set(time="1982-11-07 00:00", threshold=10)
    rain = xr.open_dataset(REAL/"iberia_1961_1995.nc").precipitation.sel(time=["1982-11-06", "1982-11-07"]).transpose("time", "lat", "lon").sortby("lat").values.astype(float)
    error, (yes, wet) = rain[0] - rain[1], rain >= 10
    row = re.search(r"persistence</td>(.*?)</tr>", explorer.table.value, re.S)[1]
    for number in (np.sqrt((error**2).mean()), np.abs(error).mean(), error.mean(), (yes & wet).sum()/(yes | wet).sum()): assert f"{number:.3f}" in row
    explorer.set(variable="GPH", level=500.)
    np.testing.assert_allclose(explorer.top["image"].get_array()[::-1], open_atmosphere(REAL/"iberia_1961_1995.nc").GPH.sel(level=500, time="1982-11-07"), rtol=1e-6)
    assert explorer.region == RegionConfig(35, 47.5, 0, 5, upstream_lon_min=-15, upstream_lon_max=0, include_upstream=True)


@real
def test_davos():
    "Hourly ERA5 with falling latitudes becomes steps of 12 hours with wind."
    explorer = PrecipitationExplorer(REAL/"davos_era5_202001.nc")
    assert not explorer.controls["wind"].disabled and "traces" in explorer.notes.value
    hourly = xr.open_dataset(REAL/"davos_era5_202001.nc").tp.sortby("latitude")*1000
    explorer.set(time="2020-01-29 00:00")
    fallen = hourly.sel(time=slice("2020-01-28T13", "2020-01-29T00")).sum("time")
    np.testing.assert_allclose(explorer.bottom["images"][1].get_array()[::-1], fallen, atol=2e-3)
