"What the IOOS compliance checker says about forecasts of rain, and what happens to data and bundles that do not fit."
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from geoforecast.core import BundleError, ConfigError, DataError, project_root
from geoforecast.geo.io import read_netcdf, write_netcdf, write_zarr
from geoforecast.learn.bundle import load_bundle, save_bundle
from geoforecast.learn.ensemble import Ensemble
from geoforecast.precipitation.atmosphere import open_atmosphere
from geoforecast.precipitation.channels import channels_of
from geoforecast.precipitation.forecaster import PrecipitationForecaster
from geoforecast.precipitation.heads import MeanHead, QuantileHead
from geoforecast.precipitation.models import ConvLSTMUNet
from geoforecast.precipitation.normalize import PrecipitationInputs
from geoforecast.precipitation.prediction import as_source, forecast_bundle, forecast_series, generate_predictions, load_model, write_forecast
from geoforecast.precipitation.regions import RegionConfig
from geoforecast.precipitation.rolling import rolling_forecast
from geoforecast.precipitation.simulate import simulate_atmosphere

cfchecker = pytest.importorskip("compliance_checker.runner", reason="pip install compliance-checker")
from compliance_checker.suite import CheckSuite

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
DATA = Path(os.environ.get("GEOFORECAST_DATA", project_root(Path(__file__).parent).parent / "shared" / "data")) / "precipitation"


class LastRain(nn.Module):
    "Forecast the rain of the last step, as often as the head asks for a number."

    def __init__(self, input_dim, window_size, output_dim=1, upstream_columns=0):
        super().__init__()
        self.output_dim, self.upstream_columns = output_dim, upstream_columns

    def forward(self, x):
        return x[:, -1, -1:, :, self.upstream_columns :].expand(-1, self.output_dim, -1, -1)


class StandStill(nn.Module):
    "Change nothing."

    def __init__(self, input_dim, window_size, output_dim, upstream_columns=0):
        super().__init__()

    def forward(self, x):
        return torch.cat([torch.zeros_like(x[:, -1, :-1]), x[:, -1, -1:]], 1)


def model_of(atmosphere, network=LastRain, upstream_columns=0, head=None, **more):
    inputs = PrecipitationInputs(channels_of(atmosphere), upstream_columns)
    model = PrecipitationForecaster(network, inputs, head or MeanHead("log"), window_size=3, ema_decay=0, **more).eval()
    n = len(inputs.channels)
    return model.set_statistics(dict(mean=[0.0] * n, std=[1.0] * n, rain_scale=1.0, lat=atmosphere.lat.values))


def archive(path, n_times=12, names=("latitude", "longitude"), north_first=True, lon=(-10.0, 10.0), start="2020-06-01"):
    ds = simulate_atmosphere(n_times=n_times, start=start, lat=(40.0, 50.0), lon=lon, levels=(500, 850), variables=("DPT", "TEM"))
    ds = ds.isel(lat=slice(None, None, -1)) if north_first else ds
    return write_netcdf(path, ds.rename(lat=names[0], lon=names[1]))


def region(west, east, upstream=None):
    box = dict(downstream_lat_min=40, downstream_lat_max=50, downstream_lon_min=west, downstream_lon_max=east)
    return RegionConfig(**box | (dict(upstream_lon_min=upstream, upstream_lon_max=west, include_upstream=True) if upstream is not None else {}))


def compliant(path, folder):
    CheckSuite.load_all_available_checkers()
    report = folder / "report.txt"
    passed, errors = cfchecker.ComplianceChecker.run_checker(str(path), ["cf:1.8"], verbose=0, criteria="strict", output_filename=str(report))
    return passed and not errors, report.read_text()


CASES = {
    "whole field": (dict(), None, 0, {}),
    "upstream": (dict(), region(2.5, 10, upstream=-10), 5, {}),
    "south first, other names": (dict(names=("lat", "lon"), north_first=False), None, 0, {}),
    "across the seam": (dict(lon=(340.0, 370.0)), region(0, 10, upstream=-20), 8, {}),
    "a column": (dict(), region(10, 10.1, upstream=-10), 8, {}),
    "quantiles": (dict(), None, 0, dict(head=QuantileHead(20))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("only", [None, "2020-06-07T00"])
def test_predictions_keep_to_cf_and_to_the_source(case, only, tmp_path):
    options, box, columns, more = CASES[case]
    source = archive(tmp_path / "source.nc", **options)
    atmosphere = open_atmosphere(source)
    model = model_of(atmosphere, upstream_columns=columns, **more)
    forecast = forecast_series(model, atmosphere, box, only=only and np.array([only], "datetime64[ns]"))
    files = write_forecast(tmp_path, forecast)
    good, report = compliant(files[0], tmp_path)
    assert good, report
    back, given = read_netcdf(files[0]), xr.open_dataset(source)
    lat, lon = options.get("names", ("latitude", "longitude"))
    assert np.array_equal(back[lat], given[lat]) and set(back[lon].values % 360) <= set(given[lon].values % 360)
    assert back.sizes["time"] == (1 if only else 10) and (back.time.values[-1] == given.time.values[-1] + np.timedelta64(12, "h"))
    assert (back.time_bnds[:, 1].values == back.time.values).all() and (np.diff(back.time_bnds) == np.timedelta64(12, "h")).all()
    if case == "quantiles":
        assert (back.quantiles.diff("quantile") >= 0).all()
    else:
        before = given.precipitation.sel(time=back.forecast_reference_time.values).isel({lon: slice(-back.sizes[lon], None)})
        np.testing.assert_allclose(back.precipitation, before, atol=1e-3)


def test_the_checker_notices_what_is_not_cf(tmp_path):
    atmosphere = open_atmosphere(archive(tmp_path / "source.nc"))
    forecast = forecast_series(model_of(atmosphere), atmosphere)
    forecast.precipitation.attrs["units"] = "kg m-2"
    files = write_forecast(tmp_path, forecast)
    good, report = compliant(files[0], tmp_path)
    assert not good and "units" in report


def test_rolling_forecasts_keep_to_cf(tmp_path):
    atmosphere = open_atmosphere(archive(tmp_path / "source.nc", n_times=8))
    rolled = rolling_forecast(model_of(atmosphere, StandStill, all_channels=True), atmosphere, steps=3)
    good, report = compliant(write_netcdf(tmp_path / "rolled.nc", as_source(rolled)), tmp_path)
    assert good, report
    last = atmosphere.precipitation.sel(time=rolled.forecast_reference_time.values).values
    np.testing.assert_allclose(rolled.precipitation, np.stack([last] * 3), atol=1e-3)


def test_an_ensemble_forecasts_the_mean_of_its_members(tmp_path):
    atmosphere = open_atmosphere(archive(tmp_path / "source.nc"))
    light, heavy = (model_of(atmosphere, head=MeanHead(space)) for space in ("mm", "log"))
    forecast = forecast_series(Ensemble([light, heavy]), atmosphere)
    mean = (forecast_series(light, atmosphere).precipitation + forecast_series(heavy, atmosphere).precipitation) / 2
    np.testing.assert_allclose(forecast.precipitation, mean, atol=1e-4)
    assert "quantiles" not in forecast, "two networks are no distribution"
    unsure = Ensemble([model_of(atmosphere, head=QuantileHead(20)) for _ in range(2)])
    np.testing.assert_allclose(forecast_series(unsure, atmosphere).quantiles, forecast_series(unsure.members[0], atmosphere).quantiles, atol=0.3)


def test_data_opened_at_another_step_stays_as_it_is(tmp_path):
    ds = simulate_atmosphere(n_times=12, step="6h", start="2090-06-01", lat=(40.0, 50.0), lon=(0.0, 10.0), levels=(500, 850), variables=("DPT", "TEM"))
    atmosphere = open_atmosphere(write_netcdf(tmp_path / "source.nc", ds), step="6h")
    model = model_of(atmosphere)
    rain = generate_predictions(model, atmosphere)
    assert (np.diff(rain.time) == np.timedelta64(6, "h")).all() and len(rain) == 10
    good, report = compliant(write_forecast(tmp_path, forecast_series(model, atmosphere))[0], tmp_path)
    assert good, report


def test_too_little_memory_names_the_knobs(tmp_path):
    class Hungry(LastRain):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    atmosphere = open_atmosphere(archive(tmp_path / "source.nc"))
    with pytest.raises(ConfigError, match="cpu ran out of memory on 8 windows.*lower batch_size"):
        forecast_series(model_of(atmosphere, Hungry), atmosphere)


@pytest.fixture
def bundle(tmp_path):
    "A bundle of an untrained network, and the series it belongs to."
    source = archive(tmp_path / "europe.nc")
    atmosphere = open_atmosphere(source)
    network = dict(class_path="geoforecast.precipitation.models.ConvLSTMUNet", init_args=dict(hidden_dims=[4, 4]))
    inputs = dict(class_path="geoforecast.precipitation.normalize.PrecipitationInputs", init_args=dict(channels=channels_of(atmosphere)))
    config = dict(model=dict(class_path="geoforecast.precipitation.forecaster.PrecipitationForecaster", init_args=dict(network=network, inputs=inputs, window_size=3)))
    torch.manual_seed(0)
    model = model_of(atmosphere, lambda *dims: ConvLSTMUNet(*dims, hidden_dims=(4, 4)), head=MeanHead())
    save_bundle(tmp_path / "bundle", model, config, dict(task="precipitation", region=None, step="12h", coarsen=1))
    return tmp_path / "bundle", source, model


def test_a_loaded_model_forecasts_what_it_did(bundle, tmp_path):
    folder, source, model = bundle
    loaded, config, box = load_model(folder)
    assert box is None and config["model"]["init_args"]["window_size"] == 3
    mine, its = (generate_predictions(m, source, 3, box, "cpu") for m in (model, loaded))
    np.testing.assert_allclose(its, mine, atol=1e-5)
    with pytest.raises(ConfigError, match="window_size 6"):
        generate_predictions(loaded, source, 6)


def test_many_series_get_folders_of_their_own(bundle, tmp_path):
    folder, source, _ = bundle
    write_zarr(tmp_path / "later.zarr", xr.open_dataset(archive(tmp_path / "x.nc", start="2021-06-01")).load().drop_encoding())
    files = forecast_bundle(load_bundle(folder), [source, tmp_path / "later.zarr"], tmp_path / "out")
    assert [p.relative_to(tmp_path / "out").as_posix() for p in files] == [f"{name}/{file}" for name in ("europe", "later") for file in ("predictions.nc", "metadata.json")]
    facts = json.loads(files[-1].read_text())
    assert facts["time"][-1] == "2021-06-07T00:00:00" and facts["model"]["task"] == "precipitation" and facts["channels"][-1] == "precipitation" and "torch" in facts["versions"]


def test_dates_are_chosen_and_refused(bundle, tmp_path):
    folder, source, _ = bundle
    opened = load_bundle(folder)
    files = forecast_bundle(opened, source, tmp_path / "day", date="2020-06-04", visualize=True)
    assert [p.name for p in files] == ["predictions.nc", "prediction_map_2020-06-04T00.png", "prediction_map_2020-06-04T12.png", "metadata.json"]
    assert len(read_netcdf(forecast_bundle(opened, source, tmp_path / "beyond", date="2020-06-07")[0]).time) == 1
    with pytest.raises(ConfigError, match="2020-06-02T12:00:00 to 2020-06-07T00:00:00"):
        forecast_bundle(opened, source, tmp_path / "no", date="2020-06-08")


def test_what_does_not_fit_is_named(bundle, tmp_path):
    folder, source, model = bundle
    opened, ds = load_bundle(folder), xr.open_dataset(source).load().drop_encoding()
    with pytest.raises(BundleError, match="lack 2 of the 5 channels.*TEM_500, TEM_850"):
        forecast_bundle(opened, write_netcdf(tmp_path / "no_tem.nc", ds.drop_vars("TEM")), tmp_path / "out")
    with pytest.raises(BundleError, match="2.5 degrees apart"):
        forecast_bundle(opened, write_netcdf(tmp_path / "every_other.nc", ds.isel(latitude=slice(None, None, 2))), tmp_path / "out")
    with pytest.raises(DataError, match="too few"):
        forecast_bundle(opened, write_netcdf(tmp_path / "short.nc", ds.isel(time=slice(2))), tmp_path / "out")
    with pytest.raises(DataError, match="in a row"):
        forecast_bundle(opened, write_netcdf(tmp_path / "gaps.nc", ds.isel(time=[0, 1, 3, 4, 6, 7])), tmp_path / "out")
    ds.TEM[4, 1, 2, 3] = np.nan
    with pytest.raises(DataError, match="TEM_850 1 missing"):
        forecast_bundle(opened, write_netcdf(tmp_path / "hole.nc", ds), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*")), "nothing is written for a series that is refused"


def test_damaged_and_foreign_bundles_are_refused(bundle, tmp_path):
    folder, *_ = bundle
    def broken(name, change):
        other = shutil.copytree(folder, tmp_path / "other", dirs_exist_ok=True)
        (other / name).write_bytes(change((folder / name).read_bytes()))
        if name == "metadata.json": (other / "SHA256SUMS").unlink()  # what the checksums would notice first
        return other
    for name, change, message in (("model.safetensors", lambda b: b[:-40], "damaged"), ("config.yaml", lambda b: b + b"#", "damaged"), ("metadata.json", lambda b: b[:-9], "not valid JSON"),
                                  ("metadata.json", lambda b: b.replace(b'"task": "precipitation"', b'"task": "fire"'), "task 'fire'")):
        with pytest.raises(BundleError, match=message):
            load_model(broken(name, change))
    with pytest.raises(BundleError, match="missing"):
        load_model(tmp_path / "other" / "nothing")


@pytest.mark.skipif(not (DATA / "iberia_1961_1995.nc").is_file(), reason="needs the real data; set GEOFORECAST_DATA")
def test_real_rain_keeps_to_cf(tmp_path):
    atmosphere = open_atmosphere(DATA / "iberia_1961_1995.nc").isel(time=slice(-9, None))
    forecast = forecast_series(model_of(atmosphere), atmosphere)
    good, report = compliant(write_forecast(tmp_path, forecast, atmosphere, maps=1)[0], tmp_path)
    assert good, report
    assert forecast.time.values[-1] > atmosphere.time.values[-1] and float(forecast.precipitation.min()) >= 0
