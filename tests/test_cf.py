"What the IOOS compliance checker says about the NetCDF files that geoforecast writes."
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from geoforecast.geo.grid import Grid
from geoforecast.geo.io import georeference, read_netcdf, write_netcdf

cfchecker = pytest.importorskip("compliance_checker.runner", reason="pip install compliance-checker")
from compliance_checker.suite import CheckSuite

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FIRE = Grid("EPSG:32611", (375, 0, 300000, 0, -375, 4125000), 30, 40)
REGION = Grid("EPSG:4326", (.25, 0, 355, 0, .25, 40), 8, 12)
OWN = Grid("+proj=laea +lat_0=46 +lon_0=8 +datum=WGS84 +units=m", (1000, 0, -2e4, 0, -1000, 2e4), 40, 40, approximate=True)


def fire():
    days = pd.date_range("2020-09-05", periods=2)
    return georeference(np.random.rand(2, 30, 40), FIRE, coords=dict(time=days), name="probability", attrs=dict(units="1", long_name="probability of fire"))


def one_day():
    day = fire().isel(time=0)
    return day.to_dataset().assign(burning=(day > .5).assign_attrs(long_name="fire observed"))


def rain():
    hours = pd.date_range("2020", periods=3, freq="6h")
    field = georeference(np.random.rand(3, 8, 12), REGION, ("time", "lat", "lon"), dict(time=hours), "precipitation", dict(units="mm", long_name="rain"))
    return field.assign_coords(lead_time=np.timedelta64(24, "h"), step=("time", np.arange(3), dict(long_name="number of the step")))


def approximate():
    return georeference(np.arange(1600).reshape(40, 40), OWN, ("y", "x"), name="category", attrs=dict(long_name="class of the land"))


@pytest.mark.parametrize("make", [fire, one_day, rain, approximate])
def test_written_netcdf_keeps_to_cf(make, tmp_path):
    path = write_netcdf(tmp_path / "field.nc", make())
    CheckSuite.load_all_available_checkers()
    passed, errors = cfchecker.ComplianceChecker.run_checker(str(path), ["cf:1.8"], verbose=0, criteria="strict", output_filename=str(tmp_path / "report.txt"))
    assert passed and not errors, (tmp_path / "report.txt").read_text()


@pytest.mark.parametrize("make", [fire, one_day, rain, approximate])
def test_all_numbers_have_checksums(make, tmp_path):
    with h5py.File(write_netcdf(tmp_path/"field.nc", make())) as f: assert {name for name, numbers in f.items() if numbers.shape and not numbers.fletcher32} == set()


def test_the_checker_notices_what_is_not_cf(tmp_path):
    bare = fire().drop_vars("spatial_ref").drop_attrs()
    bare.to_dataset(name="probability").drop_encoding().to_netcdf(tmp_path / "bare.nc")
    CheckSuite.load_all_available_checkers()
    passed, _ = cfchecker.ComplianceChecker.run_checker(str(tmp_path / "bare.nc"), ["cf:1.8"], verbose=0, criteria="strict", output_filename=str(tmp_path / "report.txt"))
    assert not passed


@pytest.mark.skipif(sys.platform != "linux", reason="open files are looked up in /proc")
@pytest.mark.parametrize("dates", ["2020-09-05", "2478-06-01"])
def test_a_file_that_was_read_is_closed(tmp_path, dates):
    "Whether dates, or lead times, had to be brought to another form or not."
    times = np.datetime64(dates, "s") + np.arange(2)*np.timedelta64(1, "D")
    xr.Dataset(dict(rain=("time", [1., 2.])), dict(time=times)).to_netcdf(tmp_path/"rain.nc")
    def open_files(): return [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and "rain.nc" in str(link.readlink())]
    with read_netcdf(tmp_path/"rain.nc") as ds: assert open_files()
    assert not open_files(), ds
