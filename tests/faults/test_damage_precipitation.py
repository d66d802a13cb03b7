"""Damaged atmospheres: from one good NetCDF file or Zarr store, each damage either gives what a plain reading of the file gives, or one line that names it.

The plain reading is by netCDF4 or zarr alone, in this file, and knows nothing of the library.
"""
import json
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path

import dask
import h5py
import netCDF4
import numpy as np
import pytest
import xarray as xr
import zarr
from damage import Judge, copied, each, random_damage, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from geoforecast.core import DataError
from geoforecast.geo.io import write_netcdf
from geoforecast.learn.bundle import Bundle
from geoforecast.precipitation.atmosphere import open_atmosphere
from geoforecast.precipitation.channels import channels_of
from geoforecast.precipitation.check import check_atmosphere
from geoforecast.precipitation.data import PrecipitationDataModule
from geoforecast.precipitation.experiment import compare
from geoforecast.precipitation.forecaster import PrecipitationForecaster
from geoforecast.precipitation.heads import MeanHead
from geoforecast.precipitation.normalize import PrecipitationInputs
from geoforecast.precipitation.prediction import forecast_bundle
from geoforecast.precipitation.simulate import simulate_atmosphere

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
STATES = ("DPT", "GPH", "TEM", "U", "V")
LIMITS = dict(DPT=(180, 330), GPH=(-1000, 35000), TEM=(180, 330), U=(-150, 150), V=(-150, 150), precipitation=(0, 1000))
UNITS = {"K": (1, 0), "degC": (1, 273.15), "C": (1, 273.15), "F": (5/9, 459.67*5/9), "mm": (1, 0), "m": (1, 0), "m s-1": (1, 0), "m/s": (1, 0), "m2 s-2": (1/9.80665, 0)}
OWN = dict(DPT="K", GPH="m", TEM="K", U="m s-1", V="m s-1", precipitation="mm")
WINDOW = dict(window_size=3, target_offset=1)


@pytest.fixture(autouse=True, scope="module")
def no_threads():
    "Trials fork, and threads of dask do not live on in a fork."
    with dask.config.set(scheduler="synchronous"): yield


def made(**options):
    options = dict(n_times=60, lat=(30.0, 45.0), lon=(100.0, 125.0), levels=(500, 850), variables=("DPT", "GPH", "TEM", "U"), seed=3) | options
    return simulate_atmosphere(**options)


def write(kind: str, ds: xr.Dataset, folder: Path) -> Path:
    "Write a data set in one of the kinds that a user may bring."
    path = folder/f"rain{'.zarr' if 'Zarr' in kind else '.nc'}"
    ds = ds.drop_encoding()
    if kind == "NetCDF-4 of ours": return write_netcdf(path, ds)
    if kind == "NetCDF-4": ds.to_netcdf(path, engine="netcdf4", encoding={n: dict(zlib=True) for n in ds.data_vars})
    if kind == "NetCDF classic": ds.to_netcdf(path, engine="netcdf4", format="NETCDF3_CLASSIC")
    if kind == "NetCDF classic with records": ds.to_netcdf(path, engine="netcdf4", format="NETCDF3_64BIT", unlimited_dims=["time"])
    if kind == "NetCDF CDF-5": ds.to_netcdf(path, engine="netcdf4", format="NETCDF3_64BIT_DATA")
    if "Zarr" in kind: ds.chunk(time=30).to_zarr(path, zarr_format=int(kind[-1]), consolidated=False)
    return path


# The plain reading

def netcdf_variables(path):
    with netCDF4.Dataset(path) as f:
        for name, v in f.variables.items():
            values = np.ma.filled(np.ma.asarray(v[:]).astype(float), np.nan) if v.dtype != str and v.dtype.kind in "fiu" else None
            yield name, (v.dimensions, values, {k: v.getncattr(k) for k in v.ncattrs()})


def zarr_variables(path):
    for name, a in zarr.open_group(path, mode="r").arrays():
        attrs, values = dict(a.attrs), a[...]
        fill = attrs.get("_FillValue", a.fill_value if a.metadata.zarr_format == 2 else None)
        values = np.where(values == fill, np.nan, values) if fill is not None and not isinstance(fill, str) else values
        yield name, (attrs.get("_ARRAY_DIMENSIONS") or a.metadata.dimension_names, values, attrs)


def plain(path: Path) -> dict:
    "Read the axes and the fields of a file in the simulator's names, in the units of the table; fields (time, level, lat, lon), all ascending."
    found = dict((zarr_variables if path.is_dir() else netcdf_variables)(path))
    _, values, about = found["time"]
    times = netCDF4.num2date(values, about["units"].replace("- ", "-0"), about.get("calendar", "standard"), only_use_cftime_datetimes=False, only_use_python_datetimes=True)
    axes = dict(time=np.array(times, "M8[us]")) | {n: found[n][1] for n in ("level", "lat", "lon")}
    order = {n: np.unique(v, return_index=True)[1] for n, v in axes.items()}
    fields = {}
    for name in (*STATES, "precipitation"):
        if name not in found: continue
        dims, values, about = found[name]
        unit = about.get("units") or OWN[name]
        scale, offset = (1000, 0) if (name, unit) == ("precipitation", "m") else UNITS.get(unit, (np.nan, 0))
        fields[name] = values[np.ix_(*(order[d] for d in dims))]*scale + offset
    return {n: v[order[n]] for n, v in axes.items()} | fields


def differs(path: Path, data: PrecipitationDataModule) -> str | None:
    "Say where what a training would see is not what stands in the file."
    here, ds = plain(path), data.atmosphere
    if not np.array_equal(ds.time.values.astype("M8[us]"), here["time"]): return f"times {ds.time.values[:3]} for {here['time'][:3]}"
    if not (np.abs(here["lat"]) <= 90).all() or not np.isfinite(here["lon"]).all() or not (np.diff(here["time"].astype(int)) > 0).all(): return "impossible axes were taken"
    for axis, near in dict(level=5.1e-6, lat=0).items():  # a level is known by six digits
        if ds.sizes[axis] != len(here[axis]) or not np.allclose(ds[axis].values.astype(float), here[axis], rtol=near, atol=0): return f"{axis} {ds[axis].values} for {here[axis]}"
    if ds.sizes["lon"] != len(here["lon"]) or not np.allclose(ds.lon.values % 360, here["lon"] % 360): return f"lon {ds.lon.values} for {here['lon']}"
    stack = dict(zip(data.channels, data.stack.values.numpy().swapaxes(0, 1)))
    for name, (low, high) in LIMITS.items():
        if name in STATES and name not in ds: continue
        want = here[name].astype("float32").astype(float)
        parts = {name: want} if name == "precipitation" else {f"{name}_{p:g}": want[:, i] for i, p in enumerate(here["level"])}
        for channel, values in parts.items():
            got = stack[channel]
            if name == "precipitation": values = np.where(values < 1e-4, 0, values)
            if name == "DPT" and "TEM" in here: values = np.minimum(values, here["TEM"][:, list(parts).index(channel)].astype("float32"))
            if not (np.isfinite(values).all() and values.min() >= low and values.max() <= high): return f"{channel} from {values.min()} to {values.max()} was taken"
            if not np.allclose(got, values, rtol=1e-6, atol=1e-6): return f"{channel} differs by up to {np.abs(got - values).max()}"


def train_on(path: Path) -> str | None:
    "Read a file as a training does, and as the check does before it; the two must agree."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_atmosphere(path, **WINDOW)
        try:
            data = PrecipitationDataModule(str(path), train_ratio=.6, val_ratio=.2, batch_size=2, **WINDOW)
            data.setup("fit")
        except DataError as e:
            if found.ready and not any(word in str(e) for word in ("part is empty", "not numbers")): return f"the check says that a training can start, which says: {e}"
            raise
    if not found.ready: return f"a training starts, but the check says {found.answer}"
    return differs(path, data)


FILES = ("NetCDF-4 of ours", "NetCDF-4", "NetCDF classic", "NetCDF classic with records", "NetCDF CDF-5")
STORES = ("Zarr 2", "Zarr 3")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    def make(kind):
        folder = tmp_path_factory.mktemp("good")
        return write(kind, made(), folder)
    return make


def finish(judge, kind, ledger):
    judge.close()
    ledger(kind, judge.endings.total(), **judge.endings)
    assert not judge.bad, judge.report()


@pytest.mark.parametrize("kind", FILES)
def test_random_damage_of_a_file(kind, good, many, ledger):
    path, judge = good(kind), Judge(train_on)
    assert judge.try_file("whole", path) == "right", judge.report()
    judge.try_all(path, (random_damage(path.read_bytes(), seed) for seed in range(2000 if many else 30)))
    finish(judge, kind, ledger)


@pytest.mark.parametrize("kind", STORES)
def test_random_damage_of_a_store(kind, good, many, ledger, tmp_path):
    path, judge = good(kind), Judge(train_on)
    assert judge.try_file("whole", path) == "right", judge.report()
    parts = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
    for seed in range(1000 if many else 15):
        part = parts[np.random.default_rng(seed).integers(len(parts))]
        store = copied(path, tmp_path/"damaged")
        if seed % 7 == 0:
            (store/part).unlink()
            judge.try_file(f"{part} removed", store)
        else:
            name, content = random_damage((path/part).read_bytes(), seed)
            (store/part).write_bytes(content)
            judge.try_file(f"{part} {name}", store)
    finish(judge, kind, ledger)


# Damage of a certain kind: what becomes of the data set, and what the line says; None where the answer stays that of the good file

def swap(name, **attrs): return lambda ds: ds.assign({name: ds[name].assign_attrs(attrs)})
def without_unit(name): return lambda ds: ds.assign({name: ds[name].drop_attrs()})
def put(name, value, share=.001):
    def damage(ds):
        wrong = np.random.default_rng(0).random(ds[name].shape) < share
        return ds.assign({name: ds[name].where(~wrong, value)})
    return damage
def axis(name, change):
    return lambda ds: ds.assign_coords({name: (name, np.asarray(change(ds[name].values.copy())), ds[name].attrs)})
def at(i, value):
    def change(values): values[i] = value; return values
    return change
def retype(name, dtype): return lambda ds: ds.assign({name: ds[name].astype(dtype)})
def shuffled(name):
    return lambda ds: ds.isel({name: np.random.default_rng(1).permutation(ds.sizes[name])})
def calendar(name): return lambda ds: ds.convert_calendar(name, align_on="year", use_cftime=True)
def packed(ds):
    for n in ("TEM", "DPT"): ds[n].encoding = dict(dtype="int16", scale_factor=.01, add_offset=250., _FillValue=-32768)
    return ds
def hourly(ds): return ds.assign_coords(time=ds.time[0].values + np.arange(ds.sizes["time"])*np.timedelta64(1, "h"))
def raw_time(units, **attrs): return lambda ds: ds.assign_coords(time=("time", np.arange(ds.sizes["time"])*12., dict(units=units) | attrs))


STRUCTURED = {
    # shapes
    "a variable renamed": (lambda ds: ds.assign(prcp=ds.precipitation.assign_attrs(long_name="")).drop_vars("precipitation"), "no precipitation among"),
    "a variable missing": (lambda ds: ds.drop_vars("precipitation"), "no precipitation among"),
    "states missing": (lambda ds: ds[["precipitation"]], "on pressure levels"),
    "no variable at all": (lambda ds: ds[[]], "no .* among"),
    "a dimension missing": (lambda ds: ds.assign(TEM=ds.TEM.isel(lat=0, drop=True)), "TEM.*no latitude"),
    "one more dimension": (lambda ds: ds.assign(TEM=ds.TEM.expand_dims(member=3)), "TEM.*'member': 3"),
    "one more dimension of one": (lambda ds: ds.assign(TEM=ds.TEM.expand_dims(member=1)), None),
    "dimensions in another order": (lambda ds: ds.transpose("lon", "lat", "time", "level"), None),
    "no steps": (lambda ds: ds.isel(time=slice(0)), "time"),
    "no rows": (lambda ds: ds.isel(lat=slice(0)), "lat.* 0 values"),
    "no levels": (lambda ds: ds.isel(level=slice(0)), "level.* 0 values"),
    "one step": (lambda ds: ds.isel(time=slice(1)), "two are the least"),
    "rows without coordinates": (lambda ds: ds.drop_vars("lat"), "no latitude"),
    "steps without times": (lambda ds: ds.drop_vars("time"), "no time"),
    "states without levels": (lambda ds: ds.drop_vars("level"), "on pressure levels"),
    "rain on another grid": (lambda ds: ds.assign(precipitation=ds.precipitation.isel(lon=slice(5)).rename(lon="longitude")), "different grids"),
    # types
    "big-endian": (retype("TEM", ">f4"), None),
    "double": (retype("TEM", "f8"), None),
    "text for numbers": (lambda ds: ds.assign(TEM=ds.TEM.astype(int).astype(str)), "TEM.*no numbers"),
    "times for numbers": (swap("TEM", units="hours since 1900-01-01"), "TEM.*no numbers"),
    "text for rows": (axis("lat", lambda v: v.astype(str)), "lat.*no numbers"),
    "packed in 16 bits": (packed, "near"),
    # values
    "a number missing": (put("TEM", np.nan), "TEM_.*missing"),
    "floods of NaN": (put("U", np.nan, .9), "U_.*missing"),
    "nothing but NaN": (put("precipitation", np.nan, 1), "precipitation.*missing"),
    "infinite": (put("GPH", np.inf), "GPH: .* infinite or outside"),
    "minus infinite": (put("precipitation", -np.inf), "precipitation: .* infinite or outside"),
    "fill of 1e36": (put("U", 1e36), "U: .* outside -150 to 150 m s-1, the first 1e\\+36 at 2000-"),
    "the default fill": (put("precipitation", 9.96921e36), "precipitation: .* outside 0 to 1000 mm"),
    "fill of -9999": (put("precipitation", -9999), "precipitation: .* the first -9999"),
    "fill of -999": (put("TEM", -999), "TEM: .* the first -999"),
    "fill of -99": (put("precipitation", -99), "precipitation: .* the first -99"),
    "a little negative rain": (lambda ds: ds.assign(precipitation=ds.precipitation.where(ds.precipitation > 0, -1e-6)), None),
    # units
    "kelvin called Celsius": (swap("TEM", units="degC"), "TEM: .* outside 180 to 330 K"),
    "Celsius called kelvin": (lambda ds: ds.assign(TEM=(ds.TEM - 273.15).assign_attrs(units="K")), "TEM: .* outside 180 to 330 K"),
    "Celsius": (lambda ds: ds.assign(TEM=(ds.TEM.astype(float) - 273.15).assign_attrs(units="degC")), "near"),
    "millimetres called metres": (swap("precipitation", units="m"), "precipitation: .* outside 0 to 1000 mm"),
    "metres": (lambda ds: ds.assign(precipitation=(ds.precipitation.astype(float)/1000).assign_attrs(units="m")), "near"),
    "pascals called hectopascals": (lambda ds: ds.assign_coords(level=("level", ds.level.values*100, dict(units="hPa"))), "'level' reach from 50000 to 85000 hPa"),
    "hectopascals called pascals": (lambda ds: ds.assign_coords(level=("level", ds.level.values, dict(units="Pa"))), "'level' reach from 5 to 8.5 hPa"),
    "pascals": (lambda ds: ds.assign_coords(level=("level", ds.level.values*100, dict(units="Pa"))), None),
    "metres for levels": (lambda ds: ds.assign_coords(level=("level", ds.level.values, dict(units="m"))), "no pressure"),
    "no unit under our name": (without_unit("TEM"), None),
    "no unit under another name": (lambda ds: without_unit("t")(ds.rename(TEM="t")), "'t' .* has no unit"),
    "a unit of nonsense": (swap("TEM", units="furlong"), "TEM.*furlong"),
    "a unit of another quantity": (swap("U", units="K"), "U.*cannot convert 'K'"),
    "a unit that is a number": (swap("U", units=1.5), "U.*1.5"),
    "rain with a unit of nonsense": (swap("precipitation", units="bucket"), "precipitation.*bucket"),
    # axes
    "rows in disorder": (shuffled("lat"), None),
    "columns in disorder": (shuffled("lon"), None),
    "levels in disorder": (shuffled("level"), None),
    "steps in disorder": (shuffled("time"), None),
    "descending": (lambda ds: ds.isel(lat=slice(None, None, -1), level=slice(None, None, -1)), None),
    "longitudes from -180 on": (axis("lon", lambda v: v - 360), None),
    "a row twice": (axis("lat", at(1, 30.)), "lat.* differ"),
    "all rows one": (axis("lat", lambda v: v*0), "lat.* differ"),
    "a column almost twice": (axis("lon", at([0, 1], [0., 1e-300])), "lon.* differ"),
    "a level almost twice": (axis("level", at(0, 850.0001)), "level.* differ"),
    "a level of many digits": (axis("level", at(0, 500.00001)), None),
    "a column twice": (axis("lon", at(1, 100.)), "lon.* differ"),
    "columns that come round again": (axis("lon", at([1, 3], [460., 470.])), "columns at the longitudes of others"),
    "a level twice": (axis("level", at(0, 850.)), "level.* differ"),
    "a row that is NaN": (axis("lat", at(2, np.nan)), "lat.* nan in place 3 of 7"),
    "a column that is infinite": (axis("lon", at(0, np.inf)), "lon.* inf in place 1"),
    "a level that is NaN": (axis("level", at(0, np.nan)), "level.* nan in place 1"),
    "a level of 0": (axis("level", at(0, 0.)), "'level' reach from 0"),
    "a level below the ground": (axis("level", at(1, 2000.)), "2000"),
    "rows at 100 degrees": (axis("lat", lambda v: v + 70), "lat.* not between -90 and 90"),
    "columns at 1e6 degrees": (axis("lon", lambda v: v*1e4), "lon.* not between -360 and 720"),
    "a time twice": (lambda ds: xr.concat([ds.isel(time=[0]), ds], "time", data_vars="minimal"), None),
    "a date missing": (axis("time", at(3, np.datetime64("NaT"))), "time.* 1 of 60 dates are missing.* place 4"),
    "a 360-day year": (calendar("360_day"), "standard calendar"),
    "no leap years": (calendar("noleap"), "standard calendar"),
    "all at one time": (lambda ds: ds.assign_coords(time=("time", np.repeat(ds.time.values[:1], ds.sizes["time"]))), "two are the least"),
    "hours since": (raw_time("hours since 2000-01-01 00:00:00"), None),
    "hours since the other epoch": (lambda ds: ds.assign_coords(time=("time", np.arange(60)*12. + 876576., dict(units="hours since 1900-01-01"))), None),
    "hours since nowhere": (raw_time("hours"), "no time"),
    "fortnights": (raw_time("fortnights since 2000-01-01"), "fortnights"),
    "a calendar of nonsense": (raw_time("hours since 2000-01-01", calendar="mayan"), "mayan"),
    "years since": (raw_time("years since 0001-01-01"), "time"),
    "a time beyond the clock": (lambda ds: ds.assign_coords(time=("time", np.r_[np.arange(59)*12., 4e6], dict(units="hours since 2000-01-01"))), "1 of 60 dates are .* not between 1678 and 2261"),
    "a whole number of hours beyond the clock": (lambda ds: ds.assign_coords(time=("time", np.r_[np.arange(59)*12, 4_194_328], dict(units="hours since 2000-01-01"))), "1 of 60 dates are .* not between 1678 and 2261"),
}
SPOKEN = {
    "gaps in time": (lambda ds: ds.isel(time=np.r_[:20, 25:60]), "gaps take"),
    "metres called millimetres": (lambda ds: ds.assign(precipitation=(ds.precipitation/1000).assign_attrs(units="mm")), "mm a step at most"),
    "rain that never falls": (lambda ds: ds.assign(precipitation=ds.precipitation*0), "never rains"),
    "heights in m2 s-2 called metres": (lambda ds: ds.assign(GPH=(ds.GPH*9.80665).isel(level=[1]).assign_attrs(units="m")).isel(level=[1]), "height of their level"),
    "heights called m2 s-2": (swap("GPH", units="m2 s-2"), "height of their level"),
    "rows unevenly spaced": (axis("lat", at(6, 65.)), "lat is not evenly spaced"),
    "no unit": (without_unit("TEM"), "taken to be TEM in K"),
    "a dew point above the temperature": (lambda ds: ds.assign(DPT=ds.TEM + 1), "above the temperature"),
    "humidity that is not used": (lambda ds: ds.assign(cape=ds.TEM), "not used: cape"),
}


def read(path):
    data = PrecipitationDataModule(str(path), train_ratio=.6, val_ratio=.2, batch_size=2, **WINDOW)
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return read(write("NetCDF-4", made(), tmp_path_factory.mktemp("whole")))


def same(data, whole, rtol=0):
    assert data.channels == whole.channels and np.array_equal(data.times, whole.times) and np.array_equal(data.lat, whole.lat) and np.array_equal(data.lon % 360, whole.lon)
    np.testing.assert_allclose(data.stack.values, whole.stack.values, rtol=rtol, atol=1e-4*rtol and 1e-4)


def test_certain_damage(whole, tmp_path, ledger):
    def judge_one(name):
        damage, said = STRUCTURED[name]
        path = tmp_path/f"{list(STRUCTURED).index(name)}.nc"
        damage(made().drop_encoding()).to_netcdf(path, engine="netcdf4")
        if said in (None, "near"):
            same(read(path), whole, 1e-4 if said else 0)
            return "right"
        line = refused(lambda: read(path), path.name)
        assert re.search(said, line), line
        found = check_atmosphere(path, **WINDOW)
        assert not found.ready or "missing" in said and any("needs fill" in line for line in found.missing), found
        return "refused"
    each(STRUCTURED, judge_one, ledger, "atmosphere, certain damage")


def test_what_is_possible_but_odd_is_said(tmp_path, ledger):
    def judge_one(name):
        damage, said = SPOKEN[name]
        path = tmp_path/f"{list(SPOKEN).index(name)}.nc"
        damage(made().drop_encoding()).to_netcdf(path, engine="netcdf4")
        found = check_atmosphere(path, **WINDOW)
        assert found.ready and said in str(found), found
        assert (wrong := differs(path, read(path))) is None, wrong
        return "right_with_a_warning"
    each(SPOKEN, judge_one, ledger, "atmosphere, possible but odd")


# Stores and folders

def lose_chunks(store): shutil.rmtree(store/"TEM"/"c") if (store/"TEM"/"c").exists() else [p.unlink() for p in (store/"TEM").glob("[0-9]*")]
def lose_metadata(store): [p.unlink() for p in (store/"TEM"/"zarr.json", store/"TEM"/".zarray") if p.exists()]
def lose_group(store): [p.unlink() for n in ("zarr.json", ".zgroup", ".zmetadata") if (p := store/n).exists()]
def cut_chunk(store): [p.write_bytes(p.read_bytes()[:-7]) for p in (store/"precipitation").rglob("*") if p.is_file() and p.name[0] in "0123456789"]
def cut_packed(store): [(store/"TEM"/n).write_bytes((store/"TEM"/n).read_bytes()[:-1]) for n in ("0.0.0.0",) if (store/"TEM"/n).exists()] or cut_chunk(store)
def nonsense_metadata(store): [p.write_text("{") for p in (store/"U"/"zarr.json", store/"U"/".zarray") if p.exists()]
def file_for_folder(store): shutil.rmtree(store); store.write_text("a store")
def nothing_inside(store): shutil.rmtree(store); store.mkdir()
def loop(store): shutil.rmtree(store); store.symlink_to(store.name)
def dangling(store): shutil.rmtree(store/"GPH"); (store/"GPH").symlink_to("nowhere")
def lose_axis(store): shutil.rmtree(store/"lat")


STORE_DAMAGE = {
    lose_chunks: "TEM_.*missing", lose_metadata: "TEM holds chunks", lose_group: "rain.zarr", cut_chunk: "cannot read|its head speaks of", cut_packed: "cannot read|its head speaks of", nonsense_metadata: "cannot read",
    file_for_folder: "cannot read", nothing_inside: "nothing to read", loop: "does not exist", lose_axis: "no latitude"}


@pytest.mark.parametrize("kind", STORES)
def test_certain_damage_of_a_store(kind, good, tmp_path, ledger):
    whole = good(kind)
    def judge_one(damage):
        damage(store := copied(whole, tmp_path/damage.__name__))
        line = refused(lambda: read(store), "rain.zarr")
        assert re.search(STORE_DAMAGE[damage], line), line
        found = check_atmosphere(store, **WINDOW)
        assert not found.ready or damage is lose_chunks and any("needs fill" in line for line in found.missing), found
        return "refused"
    each(STORE_DAMAGE, judge_one, ledger, f"{kind}, certain damage")


def test_chunks_that_read_as_numbers_are_spoken_of(tmp_path):
    made().chunk(time=30).to_zarr(tmp_path/"a.zarr", consolidated=False)
    about = tmp_path/"a.zarr"/"precipitation"/"zarr.json"
    facts = json.loads(about.read_text())
    about.write_text(json.dumps(facts | dict(fill_value=0., attributes={k: v for k, v in facts["attributes"].items() if k != "_FillValue"})))
    assert check_atmosphere(tmp_path/"a.zarr", **WINDOW).ready and "absent" not in str(check_atmosphere(tmp_path/"a.zarr", **WINDOW))
    (tmp_path/"a.zarr"/"precipitation"/"c"/"1"/"0"/"0").unlink()
    assert any("1 of 2 chunks of precipitation are absent and read as 0" in line for line in check_atmosphere(tmp_path/"a.zarr", **WINDOW).suspicious)


def test_what_is_no_file_of_the_kind(tmp_path, ledger):
    store, path = write("Zarr 3", made(), tmp_path), write("NetCDF-4", made(), tmp_path)
    (tmp_path/"text.nc").write_text("lat,lon,rain\n1,2,3\n")
    (tmp_path/"empty.nc").write_bytes(b"")
    (tmp_path/"folder.nc").mkdir()
    (tmp_path/"loop.nc").symlink_to("loop.nc")
    (tmp_path/"gone.nc").symlink_to("nowhere.nc")
    shutil.copy(path, tmp_path/"netcdf.zarr")
    shutil.copytree(store, tmp_path/"store.nc")
    for name, said in {"text.nc": "cannot read", "empty.nc": "cannot read", "folder.nc": "nothing to read", "loop.nc": "does not exist", "gone.nc": "does not exist"}.items():
        with pytest.raises(DataError, match=said) as error: read(tmp_path/name)
        assert name in str(error.value) and not check_atmosphere(tmp_path/name, **WINDOW).ready
    for name in ("netcdf.zarr", "store.nc"): assert differs(path, read(tmp_path/name)) is None, "what a file holds counts, not its name"
    ledger("atmosphere, wrong file", 7, refused=5, right=2)


# GRIB

SHORT = dict(TEM="t", DPT="dpt", precipitation="tp")
GRIBS = {"GRIB 1": dict(edition=1), "GRIB 2": dict(edition=2), "GRIB 2 packed by CCSDS": dict(edition=2, packingType="grid_ccsds")}


def small(**options): return made(n_times=8, variables=("DPT", "TEM"), **options)[["TEM", "precipitation"]]


def write_grib(path, ds, edition=2, change=lambda keys: None, **packing):
    "Write fields as a weather service does, one after another; `change` may alter what a field says of itself, or leave it out by a `shortName` of None."
    eccodes = pytest.importorskip("eccodes")
    ds = ds.isel(lat=slice(None, None, -1))
    degrees = dict(latitudeOfFirst=ds.lat[0], latitudeOfLast=ds.lat[-1], longitudeOfFirst=ds.lon[0], longitudeOfLast=ds.lon[-1])
    place = dict(Ni=ds.sizes["lon"], Nj=ds.sizes["lat"], iDirectionIncrementInDegrees=2.5, jDirectionIncrementInDegrees=2.5, bitsPerValue=24) | {f"{k}GridPointInDegrees": float(v) for k, v in degrees.items()}
    with open(path, "wb") as f:
        for time in ds.indexes["time"]:
            fields = [("TEM", level, ds.TEM.sel(time=time, level=level).values) for level in ds.level.values] + [("precipitation", None, ds.precipitation.sel(time=time).values/1000)]
            for name, level, values in fields:
                begun = time if level else time - np.timedelta64(12, "h")
                keys = place | dict(shortName=SHORT[name], dataDate=int(f"{begun:%Y%m%d}"), dataTime=100*begun.hour) | (dict(level=int(level)) if level else dict(stepType="accum", stepRange="0-12")) | dict(values=values)
                change(keys)
                if keys["shortName"] is None: continue
                values = keys.pop("values")
                handle = eccodes.codes_grib_new_from_samples(f"regular_ll_{'pl' if level else 'sfc'}_grib{edition}")
                for k, v in keys.items(): eccodes.codes_set(handle, k, v)
                for k, v in packing.items(): eccodes.codes_set(handle, k, v)
                eccodes.codes_set_values(handle, np.asarray(values, float).ravel())
                eccodes.codes_write(handle, f)
                eccodes.codes_release(handle)
    return path


def plain_grib(path):
    "Read by eccodes alone, field by field: latitudes, longitudes and numbers by name, time and level; of two with one key the first, all others being equal."
    import eccodes
    found = {}
    with open(path, "rb") as f:
        while (handle := eccodes.codes_grib_new_from_file(f)) is not None:
            name, date, clock, level, missing = (eccodes.codes_get(handle, k) for k in ("shortName", "validityDate", "validityTime", "level", "missingValue"))
            key = name, np.datetime64(f"{date//10000:04}-{date//100 % 100:02}-{date % 100:02}") + np.timedelta64(clock//100, "h") + np.timedelta64(clock % 100, "m"), level if name == "t" else 0
            if name in ("t", "tp"):
                values = eccodes.codes_get_values(handle).reshape(eccodes.codes_get(handle, "Nj"), eccodes.codes_get(handle, "Ni"))
                lat, lon = (np.asarray(eccodes.codes_get_array(handle, k)).reshape(values.shape) for k in ("latitudes", "longitudes"))
                field = lat[:, 0], lon[0], np.where(values == missing, np.nan, values)
                assert key not in found or np.array_equal(found[key][2], field[2], equal_nan=True), key
                found.setdefault(key, field)
            eccodes.codes_release(handle)
    return found


def use_grib(path):
    "Open a GRIB file as a training does; each number must be that of its field, and what has no field is missing."
    ds, found = open_atmosphere(path).compute(), plain_grib(path)
    for name, field in ds.data_vars.items():
        for time in ds.time.values:
            for level in (ds.level.values if name == "TEM" else [0]):
                got = field.sel(time=time, level=level).values if level else field.sel(time=time).values
                if (key := (SHORT[name], time, level)) not in found:
                    if np.isfinite(got).any(): return f"{key} was made up"
                    continue
                lat, lon, values = found[key]
                values = values[np.argsort(lat)][:, np.argsort(lon % 360)]
                if name == "precipitation": values = np.where(values*1000 < 1e-4, 0, values*1000)
                if not (np.allclose(np.sort(lat), ds.lat, atol=1e-5) and np.allclose(np.sort(lon % 360), ds.lon % 360, atol=1e-5)): return f"{key} lies at {lat[:2]}, {lon[:2]}"
                if not np.allclose(got, values, rtol=1e-6, atol=1e-5, equal_nan=True): return f"{key} differs by up to {np.nanmax(np.abs(got - values))}"


@pytest.mark.parametrize("kind", GRIBS)
def test_random_damage_of_grib(kind, tmp_path, many, ledger):
    pytest.importorskip("cfgrib")
    path, judge = write_grib(tmp_path/"rain.grib", small(), **GRIBS[kind]), Judge(use_grib)
    assert judge.try_file("whole", path) == "right", judge.report()
    judge.try_all(path, (random_damage(path.read_bytes(), seed) for seed in range(1000 if many else 20)))
    finish(judge, kind, ledger)


def keys_of(when, **changes):
    "Change what the fields say for which `when` holds."
    def change(keys):
        if when(keys): keys.update(changes)
    return dict(change=change)


def values_of(when, of):
    def change(keys):
        if when(keys): keys["values"] = of(keys["values"])
    return dict(change=change)


def rain(keys): return keys["shortName"] == "tp"
def warm(keys): return keys["shortName"] == "t"
def third(keys): return warm(keys) and (keys["dataDate"], keys["dataTime"], keys["level"]) == (20000102, 0, 500)


SPOILT = {
    "no rain": (keys_of(rain, shortName=None), "no precipitation among"), "no states": (keys_of(warm, shortName=None), "on pressure levels"), "other names": (keys_of(warm, shortName="pt"), "on pressure levels"),
    "levels of a model": (keys_of(warm, typeOfLevel="hybrid"), "on model levels"), "a time twice, with other numbers": (keys_of(third, dataDate=20000101), "there 2 times with different numbers"),
    "another grid": (keys_of(third, latitudeOfFirstGridPointInDegrees=50., latitudeOfLastGridPointInDegrees=35.), "another grid"), "rows at 100 degrees": (keys_of(warm, latitudeOfFirstGridPointInDegrees=110., latitudeOfLastGridPointInDegrees=95.), "at most 90"),
    "millimetres called metres": (values_of(rain, lambda v: v*1000), "outside 0 to 1000 mm"), "Celsius called kelvin": (values_of(warm, lambda v: v - 273.15), "outside 180 to 330 K"), "fill of 1e36": (values_of(third, lambda v: np.where(v == v.max(), 1e36, v)), "outside 180 to 330 K"),
    "fill of -9999": (values_of(rain, lambda v: np.where(v == v.max(), -9.999, v)), "the first -9999"),
    "a sum that ends at another hour than its length says": (keys_of(rain, hourOfEndOfOverallTimeInterval=13), "ends 12 h after its date, and by its own end 25 h"), "a sum that ends at 28 o'clock": (keys_of(rain, hourOfEndOfOverallTimeInterval=28), "no valid_time that can be read")}
WRECKED = {
    "empty": lambda content: b"", "a byte": lambda content: content[:1], "cut": lambda content: content[:-5], "cut in a head": lambda content: content[:content.rindex(b"GRIB") + 9], "bytes before": lambda content: bytes(7) + content,
    "bytes behind": lambda content: content + bytes(7), "bytes between": lambda content: content.replace(b"7777GRIB", b"7777\r\nGRIB", 1), "edition 3": lambda content: content[:7] + b"\x03" + content[8:], "edition 1 for 2": lambda content: content[:7] + b"\x01" + content[8:],
    "a head of another name": lambda content: content.replace(b"GRIB", b"BUFR", 1), "length of 8 EB": lambda content: content[:8] + b"\x7f" + content[9:], "text": lambda content: b"lat,lon,rain\n1,2,3\n"}


def test_certain_damage_of_grib(tmp_path, ledger):
    pytest.importorskip("cfgrib")
    def judge_one(name):
        path = tmp_path/f"{[*SPOILT, *WRECKED].index(name)}.grib"
        if name in WRECKED: path.write_bytes(WRECKED[name](write_grib(path, small()).read_bytes())); said = "cannot read"
        else: write_grib(path, small(), **SPOILT[name][0]); said = SPOILT[name][1]
        line = refused(lambda: open_atmosphere(path).compute(), path.name)
        assert re.search(said, line), line
        return "refused"
    each([*SPOILT, *WRECKED], judge_one, ledger, "GRIB, certain damage")


def test_grib_that_is_odd_but_whole(tmp_path, ledger):
    "Fields in any order, one there twice, one lost: the numbers are those of the fields, and what is lost is missing."
    pytest.importorskip("cfgrib")
    content = write_grib(tmp_path/"good.grib", small()).read_bytes()
    fields = [b"GRIB" + part for part in content.split(b"GRIB")[1:]]
    cases = dict(shuffled=[fields[i] for i in np.random.default_rng(0).permutation(len(fields))], twice=fields + fields[3:4], lost=fields[:3] + fields[4:])
    for name, parts in cases.items():
        (tmp_path/f"{name}.grib").write_bytes(b"".join(parts))
        assert (wrong := use_grib(tmp_path/f"{name}.grib")) is None, wrong
        found = open_atmosphere(tmp_path/f"{name}.grib").TEM
        assert int(np.isnan(found).sum()) == (found[0, 0].size if name == "lost" else 0), name
    ledger("GRIB, odd but whole", len(cases), right=len(cases))


# Forecasts read back by `compare`, and a forecast of a damaged file

def predictions(folder, name="predictions.nc", seed=0):
    "A file as a forecast writes it, of rain that is nearly that of the good atmosphere."
    rain = made().precipitation
    rain = (rain*(1 + .1*np.random.default_rng(seed).standard_normal(rain.shape)).clip(.5)).astype("float32").assign_attrs(units="mm")
    return write_netcdf(folder/name, rain.to_dataset(name="precipitation").rename(lat="latitude", lon="longitude"))


def judged(folder):
    "A use of a damaged forecast: the errors that `compare` gives are those that follow from a plain reading."
    other, truth = predictions(folder, "other.nc", 1), made().precipitation
    truth.to_dataset(name="precipitation").to_netcdf(folder/"truth.nc")
    def use(path):
        found = compare(path, other, folder/"truth.nc", names=("first", "second"))
        here = dict(netcdf_variables(path))
        dims, values, about = here["precipitation"]
        values = values*{"mm": 1, "m": 1000, "cm": 10}.get(about.get("units", "mm"), np.nan)
        values = values[:, np.argsort(here["latitude"][1])][:, :, np.argsort(here["longitude"][1])]
        times = np.array(netCDF4.num2date(here["time"][1], here["time"][2]["units"], only_use_cftime_datetimes=False, only_use_python_datetimes=True), "M8[us]")
        common, mine, theirs = np.intersect1d(times, truth.time.values.astype("M8[us]"), return_indices=True)
        error = np.sqrt(np.mean((values[mine] - truth.values.astype(float)[theirs])**2))
        if not (values[mine].min() >= -50 and values[mine].max() <= 1000): return "impossible rain was scored"
        if not np.isclose(found["rmse"]["first"], error, rtol=1e-3, atol=1e-4): return f"rmse {found['rmse']['first']} for {error}"
    return use


def test_random_damage_of_a_forecast(tmp_path, many, ledger):
    path, judge = predictions(tmp_path), Judge(judged(tmp_path))
    assert judge.try_file("whole", path) == "right", judge.report()
    judge.try_all(path, (random_damage(path.read_bytes(), seed) for seed in range(1000 if many else 30)))
    finish(judge, "predictions.nc", ledger)


FORECASTS = {
    "a variable renamed": (lambda ds: ds.rename(precipitation="rain"), "no variable precipitation"), "empty": (lambda ds: ds[[]], "no variable precipitation"),
    "NaN": (put("precipitation", np.nan), "no value in"), "fill of 1e36": (put("precipitation", 1e36), "outside 0 to 1000 mm"), "fill of -9999": (put("precipitation", -9999), "the first -9999"),
    "a unit of nonsense": (swap("precipitation", units="bucket"), "bucket"), "millimetres called metres": (swap("precipitation", units="m"), "outside 0 to 1000 mm"),
    "a time twice": (lambda ds: xr.concat([ds.isel(time=[0]), ds], "time", data_vars="minimal"), "there twice"), "one time": (lambda ds: ds.isel(time=[0]), "two are the least"),
    "another dimension": (lambda ds: ds.expand_dims(member=2), "member"), "no rows": (lambda ds: ds.isel(lat=0, drop=True), "no latitude"),
    "other cells": (lambda ds: ds.isel(lat=slice(3)), "cells"), "rows at 100 degrees": (axis("lat", lambda v: v + 70), "between -90 and 90"), "text": (lambda ds: ds.assign(precipitation=ds.precipitation.astype(str)), "no numbers"),
    "a calendar of nonsense": (calendar("noleap"), "time")}


def test_certain_damage_of_a_forecast(tmp_path, ledger):
    other = predictions(tmp_path, "other.nc", 1)
    def judge_one(name):
        damage, said = FORECASTS[name]
        damage(made()[["precipitation"]].drop_encoding()).to_netcdf(tmp_path/"bad.nc", engine="netcdf4")
        line = refused(lambda: compare(tmp_path/"bad.nc", other, made().precipitation), "bad.nc", "one forecast covers")
        assert re.search(said, line), line
        return "refused"
    each(FORECASTS, judge_one, ledger, "predictions.nc, certain damage")


def test_a_flipped_bit_of_any_number_of_a_forecast_is_refused(tmp_path, ledger):
    "Coordinates too: rain at another time, or beside its place, would be held against rain that it does not forecast."
    path, other, truth = predictions(tmp_path), predictions(tmp_path, "other.nc", 1), made().precipitation
    with h5py.File(path) as f: places = {name: f[name].id.get_chunk_info(0).byte_offset for name in ("time", "latitude", "longitude", "precipitation")}
    content = path.read_bytes()
    def judge_one(case):
        name, bit = case
        damaged = bytearray(content)
        damaged[places[name] + 8 + bit//8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        refused(lambda: compare(path, other, truth), path.name)
        return "refused"
    each([(name, bit) for name in places for bit in range(0, 64, 3)], judge_one, ledger, "predictions.nc, single bits")


class LastRain(nn.Module):
    "Forecast the rain of the last step."
    def __init__(self, input_dim, window_size, output_dim=1, upstream_columns=0): super().__init__(); self.output_dim = output_dim
    def forward(self, x): return x[:, -1, -1:].expand(-1, self.output_dim, -1, -1)


def test_a_forecast_of_damaged_files(tmp_path, many, ledger):
    atmosphere = made()
    model = PrecipitationForecaster(LastRain, PrecipitationInputs(channels_of(atmosphere)), MeanHead("log"), window_size=3, ema_decay=0).eval()
    n = len(model.inputs.channels)
    model.set_statistics(dict(mean=[0.]*n, std=[1.]*n, rain_scale=1., lat=atmosphere.lat.values))
    bundle = Bundle(tmp_path/"bundle", model, {}, dict(task="precipitation", region=None, step="12h", coarsen=1), {}, [])
    def use(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = dict(netcdf_variables(forecast_bundle(bundle, path, tmp_path/"out")[0]))
        here = plain(path)
        rain = np.where(here["precipitation"] < 1e-4, 0, here["precipitation"])
        made_at = {t: i for i, t in enumerate(here["time"])}
        ends = np.array(netCDF4.num2date(written["forecast_reference_time"][1], written["forecast_reference_time"][2]["units"], only_use_cftime_datetimes=False, only_use_python_datetimes=True), "M8[us]")
        if not np.allclose(written["precipitation"][1], rain[[made_at[t] for t in ends]], atol=1e-3): return "the forecast is not the last rain of the file"
    path = write("NetCDF-4", atmosphere, tmp_path)
    judge = Judge(use)
    assert judge.try_file("whole", path) == "right", judge.report()
    judge.try_all(path, (random_damage(path.read_bytes(), seed) for seed in range(500 if many else 20)))
    finish(judge, "forecast of a damaged file", ledger)


# Axes and attributes of any content

numbers = st.one_of(st.floats(-400, 800), st.sampled_from([np.nan, np.inf, -np.inf, 1e36, 0., 90., -90., 100., 360., 850., 85000.]))
units = st.one_of(st.sampled_from([*UNITS, "", "Pa", "hPa", "%", "1", "kg m-2 s-1", "K K", "degrees_north"]), st.text(max_size=6), st.integers(), st.floats())
attribute = st.tuples(st.sampled_from(["DPT", "TEM", "U", "precipitation", "level", "lat"]), st.sampled_from(["units", "standard_name", "long_name", "axis"]), units)
spoilt = st.tuples(st.sampled_from(["lat", "lon", "level"]), st.integers(0, 10), numbers)


def test_axes_and_attributes_of_any_content(many, ledger):
    "What is taken lies within the limits and on axes that ascend, and is the good file's where its numbers and units are."
    good, endings = made(n_times=14, variables=("DPT", "TEM", "U")), Counter()

    @settings(max_examples=3000 if many else 150, deadline=None, database=None, derandomize=not many, suppress_health_check=list(HealthCheck))
    @given(st.lists(attribute, max_size=2), st.lists(spoilt, max_size=2))
    def read_any(attributes, places):
        ds = good.copy(deep=True)
        for name, key, value in attributes: ds[name].attrs[key] = value
        for name, i, value in places:
            values = ds[name].values.copy()
            values[i % len(values)] = value
            ds = ds.assign_coords({name: (name, values, ds[name].attrs)})
        try: found = open_atmosphere(ds).compute()
        except DataError as e:
            assert "\n" not in str(e)
            endings["refused"] += 1
            return
        for axis_name, low, high in (("lat", -90, 90), ("level", 0, 1100), ("lon", -361, 721)):
            values = found[axis_name].values
            assert (np.diff(values) > 0).all() and values.min() >= low and values.max() <= high, (axis_name, values)
        for name, field in found.data_vars.items(): assert LIMITS[name][0] <= float(field.min()) and float(field.max()) <= LIMITS[name][1], name
        if not attributes and not places: xr.testing.assert_equal(found.TEM, good.TEM.drop_attrs())
        endings["right"] += 1
    read_any()
    ledger("axes and attributes of any content", endings.total(), **endings)
