"Atmospheres in every form that archives give them, made small, and two real files, skipped where they are absent."
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from geoforecast.cli import main
from geoforecast.core import ConfigError, DataError
from geoforecast.precipitation.atmosphere import open_atmosphere, to_source_convention
from geoforecast.precipitation.channels import channels_of, stack_channels
from geoforecast.precipitation.check import check_atmosphere

DATA = Path(os.environ.get('GEOFORECAST_DATA', Path(__file__).parents[2]/'shared'/'data'))/'precipitation'
DAVOS, IBERIA = DATA/'davos_era5_202001.nc', DATA/'iberia_1961_1995.nc'
real = pytest.mark.skipif(not (DAVOS.is_file() and IBERIA.is_file()), reason='no precipitation data under GEOFORECAST_DATA or ../shared/data')
DIMS = 'time', 'level', 'lat', 'lon'


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


@pytest.fixture
def made():
    "Three days of hours in the common form's names and units, none of which needs a repair."
    rng = np.random.default_rng(0)
    axes = dict(time=pd.date_range('2020-01-01 01:00', periods=72, freq='1h'), level=('level', [500., 850.], dict(units='hPa')), lat=np.arange(40., 46), lon=np.arange(-3., 5))
    shape = 72, 2, 6, 8
    temperature = 270 + rng.standard_normal(shape)
    fields = dict(TEM=('K', temperature), DPT=('K', temperature - rng.uniform(1, 9, shape)), GPH=('m', 3000 + rng.standard_normal(shape)), U=('m s-1', 9*rng.standard_normal(shape)))
    ds = xr.Dataset({n: (DIMS, v.astype('float32'), dict(units=u)) for n, (u, v) in fields.items()}, axes)
    return ds.assign(precipitation=(('time', 'lat', 'lon'), rng.gamma(.3, 1, (72, 6, 8)).round(2).astype('float32'), dict(units='mm')))


def same(a, b, rtol=1e-5):
    assert list(a.data_vars) == list(b.data_vars) and a.sizes == b.sizes
    for name in a.data_vars: np.testing.assert_allclose(a[name].values, b[name].values, rtol=rtol, atol=2e-4, err_msg=name)


def warned(path, **options):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        return open_atmosphere(path, **options), ' | '.join(str(w.message) for w in said)


def test_sums_are_conserved_and_labelled_at_the_end(made):
    for step, n in (('12h', 6), ('6h', 12), ('24h', 3), ('1h', 72)):
        ds = open_atmosphere(made, step)
        assert ds.sizes['time'] == n and ds.attrs['step'] == step and str(ds.time.values[-1])[:16] == '2020-01-04T00:00'
        np.testing.assert_allclose(ds.precipitation.sum('time'), made.precipitation.sum('time'), rtol=1e-5)
    first = open_atmosphere(made).isel(time=0)
    np.testing.assert_allclose(first.precipitation, made.precipitation[:12].sum('time'), rtol=1e-6)
    np.testing.assert_array_equal(first.TEM, made.TEM[11])
    with pytest.raises(DataError, match='no multiple'): open_atmosphere(made, '90min')
    with pytest.raises(ConfigError, match='no length of time'): open_atmosphere(made, 'noon')


@pytest.mark.parametrize('names', [dict(TEM='t', DPT='dew_point', GPH='gh', U='u', precipitation='tp'), dict(TEM='ta', GPH='zg', U='ua', precipitation='pr'),
                                   dict(TEM='T', GPH='Z', U='U', precipitation='TP'), dict(TEM='air', GPH='hgt', U='uwnd', precipitation='prate'),
                                   dict(TEM='temperature', DPT='dew_point', GPH='geopotential_height', U='u_wind', precipitation='total_precipitation')])
def test_names(made, names):
    same(open_atmosphere(made.rename(names)), open_atmosphere(made))


def test_orders_and_conventions(made):
    expected = open_atmosphere(made)
    turned = made.isel(lat=slice(None, None, -1), level=slice(None, None, -1), time=slice(None, None, -1)).rename(lat='latitude', lon='longitude', time='valid_time', level='isobaricInhPa')
    same(open_atmosphere(turned), expected, 0)
    assert to_source_convention(expected, open_atmosphere(turned).attrs).latitude.values[0] == 45
    pascal = made.assign_coords(level=made.level*100).rename(level='plev')
    pascal.plev.attrs['units'] = 'Pa'
    same(open_atmosphere(pascal), expected, 0)
    for lon in (made.lon.values % 360, np.sort(made.lon.values % 360)):
        ds = open_atmosphere(made.assign_coords(lon=made.lon.values % 360).sel(lon=lon))
        same(ds, expected, 0)
        np.testing.assert_array_equal(ds.lon, expected.lon)
    np.testing.assert_array_equal(to_source_convention(ds, ds.attrs).lon, np.arange(357, 365))
    pacific = open_atmosphere(made.assign_coords(lon=[176., 177, 178, 179, -180, -179, -178, -177]))
    np.testing.assert_array_equal(pacific.lon, np.arange(176, 184))


def test_units(made):
    expected = open_atmosphere(made)
    other = made.assign(GPH=made.GPH*9.80665, TEM=made.TEM - 273.15, U=made.U*3.6, precipitation=made.precipitation/1000)
    for name, unit in dict(GPH='m**2 s**-2', TEM='degC', DPT='K', U='km/h', precipitation='m').items(): other[name].attrs['units'] = unit
    same(open_atmosphere(other), expected)
    for unit, scale in {'kg m**-2': 1, 'kg m-2 s-1': 1/3600, 'mm/day': 24, 'm s**-1': 1/3.6e6, 'mm h-1': 1}.items():
        same(open_atmosphere(made.assign(precipitation=(made.precipitation*scale).assign_attrs(units=unit))), expected)
    for name, unit in dict(GPH='ft', TEM='furlong', U='K', precipitation='inches').items():
        with pytest.raises(DataError, match=name): open_atmosphere(made.assign({name: made[name].assign_attrs(units=unit)}))
    with pytest.raises(DataError, match='no unit'): open_atmosphere(made.rename(GPH='z').assign(z=lambda d: d.z.drop_attrs()))


def test_humidity(made):
    from geoforecast.precipitation.moisture import saturation_pressure
    vapour = saturation_pressure(made.DPT)
    specific = (.622*vapour/(made.level - .378*vapour)).assign_attrs(units='kg kg**-1')
    relative = (100*vapour/saturation_pressure(made.TEM)).assign_attrs(units='%')
    dry = made.drop_vars('DPT')
    for humid in (dict(hus=specific), dict(hur=relative), dict(q=(1000*specific).assign_attrs(units='g/kg')), dict(rhum=(relative/100).assign_attrs(units='1'))):
        np.testing.assert_allclose(open_atmosphere(dry.assign(humid)).DPT, open_atmosphere(made).DPT, atol=2e-3)
    moist, said = warned(dry.assign(hur=relative + 60))
    assert (moist.DPT <= moist.TEM).all() and 'above the temperature' in said
    negative = open_atmosphere(dry.assign(q=(specific*0 - 1e-8).assign_attrs(units='kg kg-1')))
    np.testing.assert_allclose(negative.DPT, 180, atol=.1)


@pytest.mark.parametrize('hours', [24, 12, 1000])
def test_running_totals(made, hours):
    begun = (made.time - pd.Timedelta('1h')).dt.floor(f'{hours}h') if hours < 1000 else xr.zeros_like(made.time, int)
    totals = made.precipitation.groupby(begun.rename('begun')).cumsum().assign_coords(time=made.time).assign_attrs(units='mm')
    ds = open_atmosphere(made.assign(precipitation=totals), '6h')
    same(ds, open_atmosphere(made, '6h').sel(time=ds.time))
    assert ds.sizes['time'] == (12 if hours < 1000 else 11) and 'running totals' in ds.precipitation.attrs['source']


def test_gaps_duplicates_and_files(made, tmp_path):
    expected = open_atmosphere(made)
    holed = open_atmosphere(made.drop_isel(time=[30]))
    assert expected.time.values[2] not in holed.time.values and holed.sizes['time'] == 5
    twice, said = warned(xr.concat([made, made.isel(time=slice(5, 15))], 'time'))
    same(twice, expected, 0)
    assert '10 of 82 times are there twice' in said
    made.isel(time=slice(40)).to_netcdf(tmp_path/'b.nc')
    made.isel(time=slice(36, None)).drop_vars('precipitation').to_netcdf(tmp_path/'a.nc')
    made[['precipitation']].isel(time=slice(40, None)).to_netcdf(tmp_path/'c.nc')
    same(open_atmosphere(tmp_path), expected, 0)
    same(open_atmosphere(sorted(tmp_path.glob('*.nc'))), expected, 0)
    one_each = [made[['precipitation']], made.drop_vars('precipitation').sel(level=[500]), made.drop_vars('precipitation').sel(level=[850])]
    same(open_atmosphere(one_each), expected, 0)
    with pytest.raises(DataError, match='different grids'): open_atmosphere([made[['precipitation']].isel(lon=slice(4)), made.drop_vars('precipitation')])


def test_what_is_chunked_stays_on_the_disk(made, tmp_path, monkeypatch):
    expected = open_atmosphere(made)
    made.chunk(time=20).to_zarr(tmp_path/'a.zarr', consolidated=False)
    made.to_netcdf(tmp_path/'a.nc')
    for path in (tmp_path/'a.zarr', tmp_path/'a.nc'):
        monkeypatch.setattr('geoforecast.precipitation.atmosphere.LARGE', 0)
        ds = open_atmosphere(path)
        assert all(f.chunks for f in ds.data_vars.values())
        same(ds, expected, 0)
        same(open_atmosphere(path, coarsen=2), open_atmosphere(made, coarsen=2), 0)
    with pytest.raises(DataError, match='TEM'): open_atmosphere(made.assign(TEM=made.TEM.where(made.lat > 40, 500)).chunk(time=20)).load()


def test_repairs_and_limits(made):
    rain = made.precipitation.copy()
    rain[0], rain[1] = -20, 1e-19
    repaired, said = warned(made.assign(precipitation=rain), step='1h')
    assert '48 of 3,456 values are negative' in said and '48 of 3,456 values are traces' in said
    assert (repaired.precipitation[:2] == 0).all() and (repaired.precipitation >= 0).all()
    below, said = warned(made.assign(TEM=made.TEM.where(made.level < 850)), step='1h')
    assert 'TEM: 3,456 of 6,912 values are missing, first at 2020-01-01T01:00' in said and np.isnan(below.TEM).sum() == 3456
    for name, value in dict(TEM=400, DPT=0, GPH=9e4, U=-200, precipitation=1e4).items():
        with pytest.raises(DataError, match=f'{name}: 1 of'): open_atmosphere(made.assign({name: made[name].where(np.arange(made[name].size).reshape(made[name].shape) != 0, value)}), '1h')
    with pytest.raises(DataError, match='infinite'): open_atmosphere(made.assign(U=made.U*np.inf))


def test_refusals(made):
    for layers in (made.rename(level='hybrid'), made.rename(level='model_level_number'), xr.concat([made]*3, 'level').assign_coords(level=np.arange(6))):
        with pytest.raises(DataError, match='pressure levels'): open_atmosphere(layers)
    with pytest.raises(DataError, match='no precipitation among'): open_atmosphere(made.drop_vars('precipitation'))
    with pytest.raises(DataError, match='member'): open_atmosphere(made.expand_dims(member=2))
    with pytest.raises(DataError, match='leave one out'): open_atmosphere(made.assign(ta=made.TEM))
    with pytest.raises(DataError, match='latitude'): open_atmosphere(made.rename(lat='row'))
    with pytest.raises(DataError, match='regular grid'): open_atmosphere(made.stack(values=('lat', 'lon')).reset_index('values'))


def test_oddities(made):
    expected = open_atmosphere(made)
    old, new = made.where(made.time < made.time[30]), made.where(made.time >= made.time[30])
    same(open_atmosphere(xr.concat([old, new], pd.Index([1, 5], name='expver'))), expected, 0)
    single = open_atmosphere(made.sel(level=500))
    np.testing.assert_array_equal(single.level, [500])
    same(single, expected.sel(level=[500]), 0)
    around = made.isel(lon=slice(7)).assign_coords(lon=np.arange(0, 361, 60.))
    assert open_atmosphere(around).lon.values.tolist() == [0, 60, 120, 180, 240, 300]
    few, said = warned([made.drop_vars('DPT'), made[['DPT']].sel(level=[500])])
    assert few.level.values.tolist() == [500] and 'levels 850 hPa are left out' in said
    slow = made.drop_vars('precipitation').sel(time=made.time.dt.hour % 6 == 0)
    same(open_atmosphere([slow, made[['precipitation']]]), expected, 0)
    daily = open_atmosphere([slow.sel(time=slow.time.dt.hour == 0), made[['precipitation']]])
    assert daily.attrs['step'] == '24h' and daily.sizes['time'] == 3


def test_block_means(made):
    expected, ds = open_atmosphere(made), open_atmosphere(made, coarsen=2)
    np.testing.assert_allclose(ds.TEM[..., 1, 2], expected.TEM[..., 2:4, 4:6].mean(('lat', 'lon')), rtol=1e-6)
    assert ds.sizes['lat'] == 3 and ds.lat.values[0] == 40.5 and ds.attrs['coarsen'] == 2
    np.testing.assert_allclose(ds.precipitation.mean(), expected.precipitation.mean(), rtol=1e-5)


def test_check_command(made, tmp_path, capsys):
    made.to_netcdf(tmp_path/'good.nc')
    made.drop_vars('precipitation').to_netcdf(tmp_path/'dry.nc')
    assert not main(['data', 'precipitation', 'check', str(tmp_path/'good.nc'), '--window_size', '4'])
    assert 'a training can start' in capsys.readouterr().out
    assert main(['data', 'precipitation', 'check', str(tmp_path/'dry.nc')]) == 2
    assert 'no training can start: no precipitation' in capsys.readouterr().out


def write_grib(path, made):
    "Write hours as the ECMWF does: analyses on levels, and rain as totals of forecasts that begin every midnight."
    eccodes = pytest.importorskip('eccodes')
    north_first = made.isel(lat=slice(None, None, -1))
    place = dict(Ni=8, Nj=6, latitudeOfFirstGridPointInDegrees=45, latitudeOfLastGridPointInDegrees=40, longitudeOfFirstGridPointInDegrees=357,
                 longitudeOfLastGridPointInDegrees=4, iDirectionIncrementInDegrees=1, jDirectionIncrementInDegrees=1, bitsPerValue=24)

    def message(f, name, values, date, hour, **keys):
        handle = eccodes.codes_grib_new_from_samples('regular_ll_pl_grib1' if 'level' in keys else 'regular_ll_sfc_grib1')
        for k, v in {**place, 'dataDate': int(f'{date:%Y%m%d}'), 'dataTime': 100*hour, 'shortName': name, **keys}.items(): eccodes.codes_set(handle, k, v)
        eccodes.codes_set_values(handle, values.astype(float).ravel())
        eccodes.codes_write(handle, f)
        eccodes.codes_release(handle)

    with open(path, 'wb') as f:
        for i, time in enumerate(made.indexes['time']):
            for level in (500, 850):
                for short, name in dict(t='TEM', u='U', gh='GPH', r='R').items(): message(f, short, north_first[name].sel(time=time, level=level).values, time, time.hour, level=level)
            begun = (time - pd.Timedelta('1h')).normalize()
            total = north_first.precipitation.sel(time=slice(begun + pd.Timedelta('1h'), time)).sum('time').values/1000
            message(f, 'tp', total, begun, 0, stepType='accum', stepRange=f'0-{i % 24 + 1}')


def test_grib(made, tmp_path):
    pytest.importorskip('cfgrib')
    relative = (60 + 0*made.TEM).assign_attrs(units='%')
    write_grib(tmp_path/'a.grib', made.assign(R=relative))
    ds = open_atmosphere(tmp_path/'a.grib')
    same(ds[['GPH', 'TEM', 'U', 'precipitation']], open_atmosphere(made)[['GPH', 'TEM', 'U', 'precipitation']], 1e-4)
    assert (ds.DPT < ds.TEM).all() and ds.lon.values[0] == -3


def test_grib_needs_the_extra(made, tmp_path, monkeypatch):
    (tmp_path/'a.grib').write_bytes(b'GRIB')
    monkeypatch.setitem(__import__('sys').modules, 'cfgrib', None)
    with pytest.raises(ConfigError, match=r'geoforecast\[grib\]'): open_atmosphere(tmp_path/'a.grib')


@real
def test_davos():
    ds, said = warned(DAVOS)
    assert ds.attrs['step'] == '12h' and set(ds.data_vars) == {'DPT', 'GPH', 'TEM', 'U', 'V', 'precipitation'} and len(channels_of(ds)) == 31
    source = xr.open_dataset(DAVOS).load().sortby('latitude')
    rain = 1000*np.stack([source.tp.values[i + 1:i + 13].sum(0, dtype=float) for i in range(0, 732, 12)])
    np.testing.assert_allclose(ds.precipitation, np.where(rain < 1e-4, 0, rain), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ds.GPH, source.z[12::12]/9.80665, rtol=1e-6)
    np.testing.assert_array_equal(ds.TEM, source.t[12::12])
    assert (ds.DPT <= ds.TEM).all() and 'traces' in said
    # Relative humidity, of which the dew point was not made, gives the same above the ground, where the ECMWF does not extrapolate.
    relative = open_atmosphere(xr.open_dataset(DAVOS).drop_vars('q')).DPT
    moist = (source.r[12::12] > 20).values[:, :5]
    assert moist.sum() > 4000 and abs(relative - ds.DPT).values[:, :5][moist].mean() < .3
    south_first = open_atmosphere(source)
    np.testing.assert_array_equal(stack_channels(south_first), stack_channels(ds))
    assert ds.lat.values[0] < ds.lat.values[-1] and to_source_convention(ds, ds.attrs).latitude.values[0] > 47


@real
def test_iberia():
    ds = open_atmosphere(IBERIA)
    source = xr.open_dataset(IBERIA).load()
    assert ds.attrs['step'] == '24h' and len(channels_of(ds)) == 10 and ds.sizes['time'] == 12783
    for name in ('GPH', 'TEM'): np.testing.assert_array_equal(ds[name], source[name])
    np.testing.assert_array_equal(ds.DPT, np.minimum(source.DPT, source.TEM))
    np.testing.assert_allclose(ds.precipitation.sum(dtype=float), source.precipitation.sum(dtype=float), rtol=1e-6)
    found = check_atmosphere(IBERIA)
    assert found.ready and any('12,777 windows' in line for line in found.recognised) and any('13,520' in line for line in found.suspicious)
