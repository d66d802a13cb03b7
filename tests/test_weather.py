"Weather as files hold it: gridMET's folder, Zarr stores in chunks, grids that do not fit, fires across the seam."
import warnings

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from geoforecast.core import DataError
from geoforecast.fire.channels import BAND
from geoforecast.fire.detections import detections_to_fire
from geoforecast.fire.weather import weather_bands, weather_fields
from geoforecast.fire.wsts import open_fire
from geoforecast.geo.grid import Grid

GRID = Grid('EPSG:32611', (375, 0, 300000, 0, -375, 4130000), 20, 24)
DAYS = np.arange('2020-09-05', '2020-09-08', dtype='datetime64[D]')
LON, LAT = np.arange(-120.5, -117.9, 1/24), np.arange(38.5, 36, -1/24)


def field(values, units, time=DAYS, dims=('day', 'lat', 'lon'), **attrs):
    values = np.broadcast_to(values, (len(time), len(LAT), len(LON)))
    return xr.DataArray(values, dict(zip(dims, (np.asarray(time, 'datetime64[ns]'), LAT, LON))), dims, attrs=dict(units=units, **attrs))


@pytest.fixture
def gridmet(tmp_path):
    "A folder of gridMET's files: the long names and units of its NetCDF."
    folder, flat = tmp_path/'gridmet', 330 + LON + 2*LAT[:, None]
    variables = dict(tmmn=('air_temperature', field(flat, 'K', cell_methods='time: minimum(interval: 24 hours)')), tmmx=('air_temperature', field(flat + 15, 'K', cell_methods='time: maximum(interval: 24 hours)')),
                     pr=('precipitation_amount', field(3., 'mm')), vs=('wind_speed', field(4., 'm/s')), th=('wind_from_direction', field(225., 'Degrees Clockwise from north')),
                     sph=('specific_humidity', field(.008, 'kg/kg')), erc=('energy_release_component-g', field(70., 'Unitless')),
                     pdsi=('palmer_drought_severity_index', field(np.arange(2.)[:, None, None], 'Unitless', np.array(['2020-09-01', '2020-09-06'], 'M8[D]'))))
    folder.mkdir()
    for name, (long, data) in variables.items(): data.to_dataset(name=long).to_netcdf(folder/f'{name}_2020.nc')
    return folder


def test_gridmet(gridmet):
    bands, (lon, lat) = weather_bands(gridmet, DAYS, GRID), GRID.lonlat()
    assert sorted(bands, key=BAND.get) == ['precipitation', 'wind_speed', 'wind_direction', 'temperature_min', 'temperature_max', 'energy_release_component', 'specific_humidity', 'pdsi']
    np.testing.assert_allclose(bands['temperature_max'], np.stack([330 + lon + 2*lat + 15]*3), atol=1e-4)
    np.testing.assert_allclose(bands['temperature_min'], bands['temperature_max'] - 15, atol=1e-4)
    for name, value in dict(precipitation=3, wind_speed=4, wind_direction=225, energy_release_component=70, specific_humidity=.008).items(): np.testing.assert_allclose(bands[name], value, rtol=1e-5)
    assert bands['pdsi'][:, 0, 0].tolist() == [0, 1, 1]


def test_zarr_in_chunks_is_read_around_the_fire_only(tmp_path):
    time = pd.date_range('2020-09-01', periods=240, freq='h')
    data = xr.Dataset(dict(t2m=field(290 + time.hour.to_numpy()[:, None, None], 'K', time, ('time', 'latitude', 'longitude')).astype('f4')))
    data.chunk(time=24, latitude=20, longitude=20).to_zarr(tmp_path/'t.zarr', consolidated=False)
    bands = weather_bands(tmp_path/'t.zarr', DAYS, GRID)
    assert (bands['temperature_min'] == 290).all() and (bands['temperature_max'] == 313).all()
    elsewhere = [p for p in (tmp_path/'t.zarr'/'t2m'/'c'/'9').rglob('*') if p.is_file()]
    for p in elsewhere: p.write_bytes(b'damaged')
    assert elsewhere
    np.testing.assert_array_equal(weather_bands(tmp_path/'t.zarr', DAYS, GRID)['temperature_max'], bands['temperature_max'])


@pytest.mark.parametrize('change, says', [
    (lambda d: d.assign_attrs(units='furlong'), 'furlong'), (lambda d: d.rename(lat='a', lon='b'), 'no Y coordinate'),
    (lambda d: d.isel(lat=slice(1)), '2 x 2 are the least'), (lambda d: d.expand_dims(level=2), 'level')])
def test_what_does_not_fit_is_refused(change, says):
    with pytest.raises(DataError, match=says): weather_bands(change(field(4., 'm/s')).to_dataset(name='vs'), DAYS, GRID)


def test_files_that_do_not_fit_each_other(tmp_path):
    speed = field(4., 'm/s')
    speed.to_dataset(name='vs').to_netcdf(tmp_path/'a.nc')
    speed.assign_coords(lat=speed.lat + .01, day=speed.day + np.timedelta64(3, 'D')).to_dataset(name='vs').to_netcdf(tmp_path/'b.nc')
    with pytest.raises(DataError, match='different grids'): weather_fields(tmp_path)
    (tmp_path/'b.nc').write_bytes(b'no netcdf')
    with pytest.raises(DataError, match='b.nc'): weather_fields(tmp_path)
    with pytest.raises(DataError, match='does not exist'): weather_fields(tmp_path/'absent')


def test_components_of_different_times_make_no_wind():
    u, v = field(3., 'm/s'), field(4., 'm/s', DAYS + 1)
    with pytest.raises(DataError, match='differ in their grids or times'): weather_bands(xr.Dataset(dict(u10=u, v10=v.rename(day='time'))), DAYS, GRID)
    with pytest.raises(DataError, match='both components'): weather_bands(xr.Dataset(dict(u10=u)), DAYS, GRID)


def test_across_the_antimeridian(tmp_path):
    table = pd.DataFrame(dict(lon=[179.99, -179.99], lat=[-17.5, -17.52], time=pd.to_datetime(['2021-08-03 01:30', '2021-08-03 13:30'])))
    lon, lat = np.arange(0, 360, .25), np.arange(10., -30, -.25)
    warm = xr.DataArray(300 + np.cos(np.radians(lon)) + 0*lat[:, None], dict(lat=lat, lon=lon), ('lat', 'lon'), attrs=dict(units='K'))
    xr.Dataset(dict(t2m=warm.expand_dims(time=pd.to_datetime(['2021-08-03'])))).to_netcdf(tmp_path/'w.nc')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fire = open_fire(detections_to_fire(table, tmp_path/'fiji.hdf5', margin=2, weather=tmp_path/'w.nc'))
    np.testing.assert_allclose(fire.read(bands=[BAND['temperature_max']]), 299, atol=1e-4)


def test_weather_that_is_elsewhere_leaves_all_nan_and_says_so():
    away = field(4., 'm/s').assign_coords(lon=LON + 40)
    with pytest.warns(UserWarning, match='100% of the pixels'): bands = weather_bands(away.to_dataset(name='vs'), DAYS, GRID)
    assert np.isnan(bands['wind_speed']).all()
