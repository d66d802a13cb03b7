"The simulated atmosphere, its promise, and the comparison of two forecasts, beyond what their notebooks show."
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from sklearn.ensemble import HistGradientBoostingRegressor

from geoforecast.core import ConfigError, DataError
from geoforecast.precipitation.atmosphere import open_atmosphere
from geoforecast.precipitation.data import PrecipitationDataModule
from geoforecast.precipitation.experiment import another_year, common_fields, compare
from geoforecast.precipitation.regions import RegionConfig, select_region
from geoforecast.precipitation.simulate import World, moisture_of, simulate_atmosphere, world_of

warnings.filterwarnings("ignore", "the target has|upstream reaches|the series has")
MOIST = dict(variables=("DPT",), levels=(850,))


def rmse(forecast, truth): return float(np.sqrt(((forecast - truth)**2).mean()))


@pytest.mark.parametrize("world, offset", [(World(), 2), (World(shift=3, correlation=0.), 1),
                                           (World(persistence=.6, season=0., power=1), 1), (World(power=3, rain_rate=2.), 1)])
def test_the_promise_holds_in_other_worlds(world, offset):
    "The best forecast has the error that the formula gives, and upstream the gain; heavy tails leave some percent to chance."
    ds = simulate_atmosphere(n_times=4000, lon=(92.5, 125), world=world, seed=2, **MOIST)
    truth = ds.precipitation[offset:, :, -6:]
    measured = [rmse(world.best_forecast(ds, 6, n, offset), truth) for n in (0, 8)]
    expected = [world.expected_rmse(truth.time, 6, n, offset) for n in (0, 8)]
    assert np.allclose(measured, expected, rtol=.1)
    assert abs((1 - measured[1]/measured[0]) - (1 - expected[1]/expected[0])) < .03


def test_a_trained_forecaster_reaches_the_promise():
    "A boosted tree that sees one column of air, the one the wind brings, gains what the equations promise."
    world, ds = World(), simulate_atmosphere(n_times=6000, lon=(100, 125), **MOIST)
    air, rain, split = moisture_of(ds).values, ds.precipitation.values, 4000
    def forecast(sources):
        fields = []
        for column, source in zip(range(4, 11), sources):
            x, y = air[:-1, :, source].reshape(-1, 1), rain[1:, :, column].ravel()
            model = HistGradientBoostingRegressor(max_iter=25, learning_rate=.2, min_samples_leaf=100, early_stopping=False).fit(x[:split*7], y[:split*7])
            fields.append(model.predict(x[split*7:]).reshape(-1, 7))
        return ds.precipitation[split + 1:, :, 4:].copy(data=np.stack(fields, -1))
    result = compare(forecast(range(2, 9)), forecast([4, 4, *range(4, 9)]), ds.precipitation)
    without, knowing = (world.expected_rmse(ds.time[split + 1:], 7, n) for n in (0, 4))
    assert abs(result.share[0] - (1 - knowing/without)) < .03
    assert result["rmse"]["finding"] == "better" and result.test.p_value < 1e-4
    assert (result.field.better[:, :2] == 1).all() and (result.field.better[:, 2:] == 0).all()


def test_the_file_goes_through_the_readers(tmp_path):
    made = simulate_atmosphere(tmp_path/"world.nc", n_times=200, levels=(500, 850))
    read = open_atmosphere(tmp_path/"world.nc")
    for name in made: np.testing.assert_array_equal(read[name], made[name])
    data = PrecipitationDataModule(str(tmp_path/"world.nc"), RegionConfig(include_upstream=True))
    assert (data.upstream_columns, len(data.lon), len(data.channels)) == (16, 7, 11)
    assert world_of(tmp_path/"world.nc") == World() and world_of(tmp_path/"other.nc") is None


def test_worlds_that_cannot_be():
    with pytest.raises(ConfigError, match="persistence 1.0"): World(persistence=1.)
    with pytest.raises(ConfigError, match="shift"): World(shift=-1)
    with pytest.raises(ConfigError, match="DPT"): simulate_atmosphere(n_times=3, variables=("TEM",))


@pytest.fixture(scope="module")
def two():
    ds = simulate_atmosphere(n_times=400, lon=(90, 125), **MOIST)
    return ds, *(World().best_forecast(ds, 7, n) for n in (8, 0))


def test_what_is_unknown_does_not_count(two):
    ds, first, second = two
    hidden = ds.precipitation.copy()
    hidden[50:60, :, -7:] = np.nan
    hidden[:, 0, -1] = np.nan
    result, kept = compare(first, second, hidden), first.isel(time=[i for i in range(399) if not 49 <= i < 59])
    away = (kept - hidden).notnull()
    assert np.isclose(result["rmse"]["with upstream"], float(np.sqrt(((kept - hidden).where(away)**2).mean())), rtol=1e-6)
    assert np.isnan(result.field.rmse_gain[0, -1]) and result.field.better[0, -1] == 0


def test_forecasts_of_other_conventions_meet(two, tmp_path):
    ds, first, second = two
    turned = second[:, ::-1].assign_coords(lon=second.lon - 360).rename(lat="latitude", lon="longitude")
    with pytest.raises(DataError, match="same cells"): common_fields(first, turned, ds.precipitation)
    later = second[200:]
    a, b, t = common_fields(first, later, ds.precipitation)
    assert len(a) == len(b) == len(t) == 199 and (a.time == t.time).all()
    with pytest.raises(DataError, match="0 times in common"): common_fields(first[:50], second[60:], ds.precipitation)
    with pytest.raises(DataError, match="cells of the forecasts"): common_fields(first, second, ds.precipitation[:, :, :-1])


def test_the_same_forecast_twice(two):
    ds, first, _ = two
    result = compare(first, first, ds.precipitation)
    assert not any(r["finding"] for r in result.rows) and result.share == (0, 0, 0)
    assert "cannot be told apart" in result.verdict() and "nothing to test" in result.verdict()
    assert not result.field.better.any()


def test_the_order_turns_the_sign(two):
    ds, first, second = two
    one, other = compare(first, second, ds.precipitation), compare(second, first, ds.precipitation, names=("without", "with upstream"))
    assert np.isclose(one["rmse"]["gain"], -other["rmse"]["gain"]) and other["rmse"]["finding"] == "worse"
    assert np.isclose(one["rmse"]["gain_lo"], -other["rmse"]["gain_hi"])
    assert (one.field.better == -other.field.better).all()


def test_another_year_needs_one():
    ds = simulate_atmosphere(n_times=730, **MOIST)
    with pytest.raises(DataError, match="no other year"): another_year(ds, 16)


def test_a_real_atmosphere_takes_another_year():
    file = Path(os.environ.get("GEOFORECAST_DATA", Path(__file__).parents[1]/"../shared/data"))/"precipitation"/"iberia_1961_1995.nc"
    if not file.exists(): pytest.skip("needs iberia_1961_1995.nc")
    whole = open_atmosphere(file)
    box = dict(downstream_lat_min=float(whole.lat[0]), downstream_lat_max=float(whole.lat[-1]), downstream_lon_min=0., downstream_lon_max=5., upstream_lon_min=float(whole.lon[0]), upstream_lon_max=0.)
    ds, columns = select_region(whole, RegionConfig(**box, include_upstream=True))
    moved = another_year(ds, columns)
    assert moved.sizes == ds.sizes and columns > 0
    xr.testing.assert_equal(moved.precipitation.isel(lon=slice(columns, None)), ds.precipitation.isel(lon=slice(columns, None)))
    assert not moved.precipitation.isel(lon=0).equals(ds.precipitation.isel(lon=0))
