"""Damaged data of fires: each damage of a good file either gives what a plain reading of the file gives, or one line that names it.

The plain readings are by h5py, rasterio, csv and netCDF4 alone, in this file, and know nothing of the library.
"""
import contextlib
import csv
import io
import re
import shutil
import struct
import warnings
from datetime import datetime, timedelta, timezone
from pathlib import Path

import h5py
import netCDF4
import numpy as np
import pytest
import rasterio
import torch
from damage import Judge, copied, random_damage
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from geoforecast.core import DataError
from geoforecast.fire.channels import BAND, BANDS, FireInputs
from geoforecast.fire.commands import describe_fire
from geoforecast.fire.convert import convert_tiffs, write_tiffs
from geoforecast.fire.data import FireDataModule
from geoforecast.fire.detections import detections_to_fire, read_detections
from geoforecast.fire.weather import join_weather
from geoforecast.fire.wsts import Fire, open_fire, write_fire
from geoforecast.geo.grid import Grid

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
GRID = Grid("EPSG:32611", (375, 0, 269625, 0, -375, 4178250), 9, 12)
DAYS = np.arange("2020-09-05", "2020-09-13", dtype="datetime64[D]")
HOUR = BAND["detection_hour"]
# What nature has, said once more by hand: the largest magnitude a band may show
LIMITS = dict(elevation=9000, temperature_min=400, temperature_max=400, wind_speed=150, precipitation=2000, specific_humidity=1, slope=90)
QUIET = {"right", "refused"}


def fields(days=len(DAYS), seed=0) -> np.ndarray:
    "Bands that a fire may have: every band within its limits, a fire that grows, one pixel of NaN."
    rng = np.random.default_rng(seed)
    data = (np.array([b.limit for b in BANDS[:23]])[:, None, None]*rng.uniform(.01, .2, (days, 23, *GRID.shape))).astype(np.float32)
    data[:, BAND["temperature_min"]], data[:, BAND["temperature_max"]] = 285, 300
    data[:, BAND["land_cover"]] = rng.integers(1, 18, data[:, 0].shape)
    rows, columns = np.mgrid[:GRID.height, :GRID.width]
    for t in range(days): data[t, HOUR] = np.where((abs(rows - 4) <= 1) & (abs(columns - 2 - t) <= 1 + t//3), 13.5 + t/8, 0)
    data[2, 5, 3, 3] = np.nan
    return data


def tried(judge, ledger, kind):
    "Note how the trials ended, and fail where one ended badly."
    judge.close()
    ledger(kind, judge.endings.total(), **judge.endings)
    assert not judge.bad, judge.report()
    assert judge.endings["refused"], judge.endings


def read_as_a_user(path: Path) -> Fire:
    "Open a fire as training, checking and forecasting do; everything that a network may see stays within nature."
    fire = open_fire(path)
    describe_fire(fire, 1)
    data = FireDataModule(str(path), window_size=1, crop_size=8, batch_size=2)
    data.setup("fit")
    assert np.isfinite(data.statistics["mean"]).all() and np.abs(data.statistics["mean"]).max() <= 65535
    raw = torch.from_numpy(fire.read_raw())[None]
    inputs = FireInputs("all")
    assert torch.isfinite(inputs(raw)).all()
    for name, limit in LIMITS.items():
        seen, stored = inputs(raw)[0, :, inputs.channels.index(name)].numpy(), raw[0, :, BAND[name]].numpy()
        np.testing.assert_array_equal(seen, np.where(np.abs(stored) <= limit, stored, 0), err_msg=name)
    return fire


# WildfireSpreadTS in HDF5

def plain_fire(path: Path) -> tuple:
    "Read a fire by h5py alone: numbers, days, year, name and, where they are said, CRS and transform."
    with h5py.File(path) as f:
        d = f["data"]
        assert not d.is_virtual and d.file.filename == str(path)
        attrs = {k: v.decode(errors="replace") if isinstance(v := d.attrs[k], bytes) else v for k in ("year", "fire_name", "img_dates", "crs", "transform") if k in d.attrs}
        return d[...].astype(np.float32), [(t.decode() if isinstance(t, bytes) else str(t))[:10] for t in attrs["img_dates"]], attrs


def use_fire(path: Path) -> str | None:
    fire = read_as_a_user(path)
    values, days, attrs = plain_fire(path)
    np.testing.assert_array_equal(fire.read(), values)
    if [str(d) for d in fire.dates] != days: return f"days {fire.dates}"
    if "year" in attrs and int(attrs["year"]) != fire.year: return f"year {fire.year}"
    if "fire_name" in attrs and str(attrs["fire_name"]) != fire.name: return f"name {fire.name}"
    if "crs" in attrs and "transform" in attrs and tuple(attrs["transform"]) != fire.grid.transform: return f"grid {fire.grid}"


def bare_lzf(path):
    "Packed by LZF without the checksums that the library adds."
    rewritten(storage=dict(compression="lzf", shuffle=True, chunks=(1, 1, *GRID.shape)))(path)
    return path


def written(**options): return lambda path: write_fire(path, fields(), DAYS, GRID, "good", **options)


KINDS = dict(block=written(), half=written(dtype="float16"), gzip=written(compression="gzip"), lzf=written(compression="lzf")) | {"lzf of others": bare_lzf}


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_of_a_fire_file(kind, tmp_path, many, ledger):
    good = KINDS[kind](tmp_path/"good.hdf5")
    judge = Judge(use_fire)
    assert judge.try_file("good", good) == "right"
    content = good.read_bytes()
    judge.try_all(good, (random_damage(content, seed) for seed in range(1500 if many else 60)))
    tried(judge, ledger, f"fire file, {kind}: random")


def rewritten(values=None, storage=None, **attrs):
    "A function that writes a file with other numbers, other storage or other attributes; None leaves an attribute out."
    def write(path):
        known = dict(year=2020, fire_name="good", img_dates=[str(d) for d in DAYS], lnglat=(-119.0, 37.7), crs="EPSG:32611", transform=GRID.transform) | attrs
        with h5py.File(path, "w") as f:
            d = f.create_dataset("data", data=fields() if values is None else values, **(storage or {}))
            for k, v in known.items():
                if v is not None: d.attrs[k] = v
    return write


def changed(**bands):
    "Numbers with some bands changed: a function of the band, or what to set."
    data = fields()
    for name, change in bands.items():
        if callable(change): data[:, BAND[name]] = change(data[:, BAND[name]])
        else: data[..., BAND[name], :, :] = change
    return data


def one(name, value):
    data = fields()
    data[3, BAND[name], 4, 6] = value
    return data


def scattered(value, share=.01):
    data = fields()
    at = np.random.default_rng(1).random(data.shape) < share
    at[:, HOUR] = False
    data[at] = value
    return data


def days(*changes):
    texts = [str(d) for d in DAYS]
    for i, text in changes: texts[i] = text
    return texts


def linked(how):
    def write(path):
        other = path.parent/"other.hdf5"
        rewritten()(other)
        with h5py.File(path, "w") as f:
            if how == "external link": f["data"] = h5py.ExternalLink(other.name, "data")
            if how == "link to nowhere": f["data"] = h5py.SoftLink("/nowhere")
            if how == "link to itself": f["data"] = h5py.SoftLink("/data")
            if how == "soft link":
                f.copy(h5py.File(other)["data"], f, "there")
                f["data"] = h5py.SoftLink("/there")
            if how == "group": f.create_group("data")
            if how == "virtual":
                layout = h5py.VirtualLayout(fields().shape, "f4")
                layout[:4] = h5py.VirtualSource("absent.hdf5", "data", fields().shape)[:4]
                f.create_virtual_dataset("data", layout, fillvalue=0)
            if how == "external numbers":
                fields().tofile(path.parent/"numbers.bin")
                f.create_dataset("data", fields().shape, "f4", external=[("numbers.bin", 0, h5py.h5f.UNLIMITED)])
            if how == "never written": f.create_dataset("data", fields().shape, "f4")
            if how == "chunks never written": f.create_dataset("data", (4000, 23, 4000, 4000), "f4", chunks=(1, 1, 4000, 4000), compression="gzip")
            if how == "some chunks never written": f.create_dataset("data", fields().shape, "f4", chunks=(1, 1, *GRID.shape))[1:] = fields()[1:]
            if how == "datatype": f["data"] = np.dtype("f4")
            if how not in ("group", "datatype", "link to nowhere", "link to itself"):
                n = f["data"].shape[0]
                f["data"].attrs.update(year=2020, fire_name="good", lnglat=(-119.0, 37.7), img_dates=[str(d) for d in np.datetime64("2020-09-05") + np.arange(min(n, 8))])
    return write


def emptied(write, name):
    "A function that writes a file in chunks with checksums, whose index then says that the second one has no bytes."
    def damaged(path):
        write(path)
        with h5py.File(path) as f: chunk = f[name].id.get_chunk_info(1)
        entry, content = struct.pack(f"<II{len(chunk.chunk_offset) + 2}Q", chunk.size, 0, *chunk.chunk_offset, 0, chunk.byte_offset), path.read_bytes()
        assert content.count(entry) == 1
        path.write_bytes(content.replace(entry, bytes(4) + entry[4:]))
    return damaged


def foreign_attribute(path):
    "A year whose name and type have become such as no library converts is no year, and says nothing."
    rewritten()(path)
    year, content = b"year\0\0\0\0\x10\x08\0", path.read_bytes()
    assert content.count(year) == 1
    path.write_bytes(content.replace(year, b"yea@\0\0\0\0\x34\xff\x03"))


def other_file(kind):
    def write(path):
        if kind == "empty": path.write_bytes(b"")
        if kind == "PNG": path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
        if kind == "CSV": path.write_text("latitude,longitude\n1,2\n")
        if kind == "folder": path.mkdir()
        if kind == "loop": path.symlink_to(path.name)
        if kind == "link to nowhere": path.symlink_to("absent.hdf5")
        if kind == "HDF5 signature": path.write_bytes(b"\x89HDF\r\n\x1a\n")
        if kind == "NetCDF":
            with netCDF4.Dataset(path, "w") as f: f.createDimension("x", 3)
    return write


data = fields()
compound = np.zeros(data.shape, [("a", "f4"), ("b", "f4")])
TARGETED = {
    # storage that changes nothing
    "as it is": (rewritten(), "right"), "big-endian": (rewritten(data.astype(">f4")), "right"), "double": (rewritten(data.astype("f8")), "right"),
    "half": (rewritten(changed(elevation=100).astype("f2")), "right"), "integers": (rewritten(np.nan_to_num(data).astype("i4")), "right"), "chunks": (rewritten(data, dict(chunks=(3, 5, 4, 4))), "right"),
    "checksums": (rewritten(data, dict(chunks=(3, 5, 4, 4), fletcher32=True)), "right"), "room to grow": (rewritten(data, dict(chunks=True, maxshape=(None,)*4)), "right"),
    "fixed text": (rewritten(fire_name=np.bytes_(b"good"), img_dates=np.array(days(), "S10")), "right"), "dates of files": (rewritten(img_dates=[f"{d}.tif" for d in DAYS]), "right"),
    "no CRS": (rewritten(crs=None), "right"), "no transform": (rewritten(transform=None), "right"), "no name": (rewritten(fire_name=None), "right"), "no year": (rewritten(year=None), "right"),
    "an attribute of no use": (foreign_attribute, "right"), "user block": (lambda p: (rewritten()(p.parent/"x"), h5py.File(p, "w", userblock_size=512).close(), _copy(p.parent/"x", p)), "right"), "soft link": (linked("soft link"), "right"),
    # types and shapes
    "text": (rewritten(np.full(data.shape, b"1.5")), "refused"), "objects": (rewritten(np.full((8, 23, 2, 2), "1.5", object), dict(dtype=h5py.string_dtype())), "refused"),
    "compound": (rewritten(compound), "refused"), "complex": (rewritten(data.astype("c8")), "refused"), "booleans": (rewritten(data > 0), "refused"),
    "22 bands": (rewritten(data[:, :22]), "refused"), "24 bands": (rewritten(np.concatenate([data, data[:, :1]], 1)), "refused"), "flat": (rewritten(data[:, 0]), "refused"),
    "extra dimension": (rewritten(data[None]), "refused"), "bands last": (rewritten(np.moveaxis(data, 1, -1)), "refused"), "bands first": (rewritten(np.moveaxis(data, 1, 0)), "refused"),
    "no rows": (rewritten(data[:, :, :0]), "refused"), "no days": (rewritten(data[:0], img_dates=np.zeros(0, "S10")), "refused"), "scalar": (rewritten(np.float32(1)), "refused"), "seven days": (rewritten(data[:7]), "refused"),
    # numbers
    "all NaN": (rewritten(np.full_like(data, np.nan)), "refused"), "all infinite": (rewritten(np.full_like(data, np.inf)), "refused"), "fill values": (rewritten(scattered(1e36)), "right"),
    "negative fill values": (rewritten(scattered(-1e36)), "right"), "some 1e20": (rewritten(scattered(1e20)), "right"), "some infinite": (rewritten(scattered(-np.inf)), "right"), "some NaN": (rewritten(scattered(np.nan, .3)), "right"),
    "reflectance 1e29": (rewritten(changed(viirs_i1=1e29)), "refused"), "temperature in 1/100 K": (rewritten(changed(temperature_max=lambda x: 100*x)), "refused"), "humidity in g/kg": (rewritten(changed(specific_humidity=8.)), "refused"),
    "elevation in mm": (rewritten(changed(elevation=lambda x: 1000*x)), "refused"), "hour 1e20": (rewritten(one("detection_hour", 1e20)), "refused"), "hour 25": (rewritten(one("detection_hour", 25)), "refused"),
    "hour infinite": (rewritten(one("detection_hour", np.inf)), "refused"), "hour negative": (rewritten(one("detection_hour", -13)), "refused"), "hours as HHMM": (rewritten(changed(detection_hour=lambda x: 100*x)), "refused"),
    "nothing burns": (rewritten(changed(detection_hour=0)), "refused"), "land cover of 1e9": (rewritten(one("land_cover", 1e9)), "right"),
    # days
    "no dates": (rewritten(img_dates=None), "refused"), "dates twice": (rewritten(img_dates=days((3, "2020-09-07"))), "refused"), "dates shuffled": (rewritten(img_dates=days()[::-1]), "refused"),
    "dates of 1800": (rewritten(img_dates=days((0, "1800-09-05"))), "refused"), "NaT": (rewritten(img_dates=days((0, "NaT"))), "refused"), "empty date": (rewritten(img_dates=days((0, ""))), "refused"),
    "month 13": (rewritten(img_dates=days((4, "2020-13-09"))), "refused"), "dates as numbers": (rewritten(img_dates=np.arange(8)), "refused"), "one date": (rewritten(img_dates="2020-09-05"), "refused"),
    "dates in words": (rewritten(img_dates=days((2, "Monday"))), "refused"), "a month only": (rewritten(img_dates=days((0, "2020-09"))), "refused"), "dates not as text": (rewritten(img_dates=np.array(days(), "S10").view("V10")), "refused"),
    "year in words": (rewritten(year="last"), "refused"), "year of another": (rewritten(year=2036), "refused"), "years": (rewritten(year=[2020, 2021]), "refused"), "year NaN": (rewritten(year=np.nan), "refused"),
    "year as text": (rewritten(year="2020"), "right"), "name of bytes": (rewritten(fire_name=np.bytes_(b"\xff\xfe")), "right"),
    # place
    "nonsense CRS": (rewritten(crs="nonsense"), "refused"), "empty CRS": (rewritten(crs=""), "refused"), "CRS a number": (rewritten(crs=7), "refused"), "CRS of heights": (rewritten(crs="EPSG:5703"), "refused"),
    "CRS of Earth's centre": (rewritten(crs="EPSG:4978"), "refused"), "NaN in transform": (rewritten(transform=(375, 0, np.nan, 0, -375, 4178250)), "refused"), "infinite transform": (rewritten(transform=(375, 0, np.inf, 0, -375, 4178250)), "refused"),
    "no pixel size": (rewritten(transform=(0, 0, 269625, 0, 0, 4178250)), "refused"), "NaN pixel size": (rewritten(transform=(375, 0, 269625, 0, np.nan, 4178250)), "refused"), "turned": (rewritten(transform=(375, 9, 269625, 9, -375, 4178250)), "refused"),
    "far from Earth": (rewritten(transform=(375, 0, 1e30, 0, -375, 4178250)), "refused"), "two numbers": (rewritten(transform=(1.0, 2.0)), "refused"), "transform in words": (rewritten(transform="375"), "refused"), "transform of text": (rewritten(transform=list("abcdef")), "refused"),
    "degrees in metres": (rewritten(crs="EPSG:4326"), "refused"), "no place": (rewritten(crs=None, lnglat=None), "refused"), "place in words": (rewritten(crs=None, lnglat="there"), "refused"), "place NaN": (rewritten(crs=None, lnglat=(np.nan, 37.7)), "refused"),
    "latitude first": (rewritten(crs=None, lnglat=(37.7, -119.0)), "refused"), "place of three": (rewritten(crs=None, lnglat=(1.0, 2.0, 3.0)), "refused"),
    # links and files
    "other name": (lambda p: h5py.File(p, "w").create_dataset("images", data=data).file.close(), "refused"), "external link": (linked("external link"), "refused"), "link to nowhere": (linked("link to nowhere"), "refused"),
    "link to itself": (linked("link to itself"), "refused"), "group": (linked("group"), "refused"), "virtual": (linked("virtual"), "refused"), "external numbers": (linked("external numbers"), "refused"), "never written": (linked("never written"), "refused"),
    "chunks never written": (linked("chunks never written"), "refused"), "datatype": (linked("datatype"), "refused"),
    # chunks
    "some chunks never written": (linked("some chunks never written"), "refused"), "a chunk of no bytes": (emptied(written(compression="lzf"), "data"), "refused"),
    "a chunk of no bytes, by others": (emptied(rewritten(storage=dict(chunks=(1, 1, *GRID.shape), fletcher32=True)), "data"), "refused")} | {
    f"file: {kind}": (other_file(kind), "refused") for kind in ("empty", "PNG", "CSV", "folder", "loop", "link to nowhere", "HDF5 signature", "NetCDF")}


def _copy(source, target):
    with h5py.File(source) as a, h5py.File(target, "a") as b: a.copy("data", b)


def try_targeted(judge, cases, folder, name):
    "Write each case under the good file's name into a folder of its own, use it, and compare how it ended with how it should."
    other = []
    for i, (case, (write, expected)) in enumerate(cases.items()):
        path = folder/f"case {i}"/name
        path.parent.mkdir()
        write(path)
        ended = judge.try_file(case, path)
        if ended in QUIET and ended != expected: other.append(f"{case}: {ended}, not {expected}")
        shutil.rmtree(path.parent)
    assert not other, "\n".join([*other, judge.report()])


def test_targeted_damage_of_a_fire_file(tmp_path, ledger):
    judge = Judge(use_fire)
    try_targeted(judge, TARGETED, tmp_path, "good.hdf5")
    tried(judge, ledger, "fire file: types, shapes, numbers, days, places, links")


def test_cut_at_every_place(tmp_path, many, ledger):
    "A file that ends early is refused wherever it ends, and numbers that are gone are never made up."
    good = write_fire(tmp_path/"good.hdf5", fields(), DAYS, GRID, "good")
    content = good.read_bytes()
    judge = Judge(use_fire)
    judge.try_all(good, ((f"cut at {n}", content[:n]) for n in np.unique(np.linspace(0, len(content) - 1, 1000 if many else 40).astype(int))))
    tried(judge, ledger, "fire file: cut short")
    assert not judge.endings["right"]


# Detections in CSV

FIRMS = "latitude,longitude,bright_ti4,scan,track,acq_date,acq_time,satellite,instrument,confidence,version,bright_ti5,frp,daynight,type"
FEDS = "lat,lon,datetime,frp,sat"
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def firms_rows(n=24):
    return [f"{37.2 + .002*i:.4f},{-119.3 + .003*i:.4f},340.{i},0.4,0.4,2020-09-{5 + i//8:02},{100*(9 + i//3) + i},N,VIIRS,{'lnh'[i % 3]},2,300.1,{i}.5,D,0" for i in range(n)]


def feds_rows(n=24):
    return [f"{37.2 + .002*i:.4f},{-119.3 + .003*i:.4f},2020-09-{5 + i//8:02} {9 + i//3:02}:{i:02}:00,{i}.5,SNPP" for i in range(n)]


TABLES = dict(FIRMS=(FIRMS, firms_rows), FEDS=(FEDS, feds_rows))


def table_of(kind: str) -> str: return "\n".join([TABLES[kind][0], *TABLES[kind][1]()]) + "\n"


def plain_detections(path: Path) -> set:
    "Read places and times by csv alone; what cannot be read so must have been refused."
    with open(path, newline="", encoding="utf-8-sig") as f: rows = [[field.strip() for field in row] for row in csv.reader(f, skipinitialspace=True) if row and any(field.strip() for field in row)]
    head, found = [name.lower() for name in rows[0]], set()
    for row in rows[1:]:
        assert len(row) <= len(head) or not any(row[len(head):]), row
        values = dict(zip(head, row))
        if "acq_date" in values:
            lat, lon = float(values["latitude"]), float(values["longitude"])
            assert re.fullmatch(r"[0-9]{1,4}|[0-9]{1,2}:[0-9]{2}", values["acq_time"]), row
            clock = values["acq_time"].replace(":", "").zfill(4)
            time = datetime.strptime(f"{values['acq_date']} {clock}", "%Y-%m-%d %H%M")
        else:
            lat, lon = float(values["lat"]), float(values["lon"])
            time = datetime.fromisoformat(values["datetime"])
        time = time.replace(tzinfo=timezone.utc) if time.tzinfo is None else time.astimezone(timezone.utc)
        assert abs(lat) <= 90 and -180 <= lon <= 360, row
        found.add((lon, lat, (time - EPOCH)//timedelta(seconds=1)))
    return found


def use_table(path: Path) -> str | None:
    table = read_detections(path)
    found = set(zip(table.lon, table.lat, table.time.astype("datetime64[s]").astype("int64")))
    if found != plain_detections(path): return f"{len(found ^ plain_detections(path))} detections differ"
    if len(table):
        fire = open_fire(detections_to_fire(path, path.with_suffix(".hdf5"), margin=2))
        if not fire.mask().any(): return "a fire without fire"


@pytest.mark.parametrize("kind", TABLES)
def test_random_damage_of_a_table(kind, tmp_path, many, ledger):
    good = tmp_path/"table.csv"
    good.write_text(table_of(kind))
    judge = Judge(use_table)
    assert judge.try_file("good", good) == "right"
    judge.try_all(good, (random_damage(good.read_bytes(), seed) for seed in range(2000 if many else 100)))
    tried(judge, ledger, f"table of detections, {kind}: random")


def row(kind, number, change):
    "The table with a row changed: a function of its fields, or its whole text."
    lines = table_of(kind).splitlines()
    lines[number] = change if isinstance(change, str) else ",".join(change(lines[number].split(",")))
    return "\n".join(lines) + "\n"


def put(field, text): return lambda fields: [*fields[:field], text, *fields[field + 1:]]


good = table_of("FIRMS")
TABLE_CASES = {
    "as it is": (good, "right"), "DOS lines": (good.replace("\n", "\r\n"), "right"), "byte order mark": ("\ufeff" + good, "right"), "blank lines": (good.replace("\n", "\n\n"), "right"), "blanks after commas": (good.replace(",", ", "), "right"),
    "capitals": (good.replace(FIRMS, FIRMS.upper()), "right"), "clock with colon": (row("FIRMS", 1, put(6, "9:07")), "right"), "all quoted": ("\n".join(",".join(f'"{f}"' for f in line.split(",")) for line in good.splitlines()), "right"),
    "columns in another order": ("\n".join(",".join(line.split(",")[::-1]) for line in good.splitlines()), "right"), "header only": (FIRMS + "\n", "right"), "rows twice": (good + good.partition("\n")[2], "right"), "rows shuffled": ("\n".join([FIRMS, *firms_rows()[::-1]]), "right"),
    "empty": ("", "refused"), "no header": (good.partition("\n")[2], "refused"), "semicolons": (good.replace(",", ";"), "refused"), "tabs": (good.replace(",", "\t"), "refused"), "HTML": ("<html><body>Invalid MAP_KEY.</body></html>", "refused"),
    "no latitude": (good.replace("latitude", "lat"), "refused"), "latitude twice": (good.replace("bright_ti4", "latitude"), "refused"), "one field more": (row("FIRMS", 3, lambda f: [*f, "7", "8"]), "refused"), "one field more in each": ("\n".join([FIRMS, *(f"{r},7" for r in firms_rows())]), "refused"),
    "one field less in each": ("\n".join([FIRMS, *(r.partition(",")[2] for r in firms_rows())]), "refused"), "a row cut short": (row("FIRMS", 24, "37.2,-119.3,340"), "refused"), "a quote": (row("FIRMS", 3, lambda f: ['"' + f[0], *f[1:]]), "refused"),
    "two quotes rows apart": (good.replace("N,VIIRS", 'N,"VIIRS', 1).replace(",D,0", ',D",0', 5).replace(',D",0', ",D,0", 4), "refused"), "latitude 91": (row("FIRMS", 3, put(0, "91")), "refused"), "latitude NaN": (row("FIRMS", 3, put(0, "nan")), "refused"), "longitude infinite": (row("FIRMS", 3, put(1, "inf")), "refused"),
    "longitude 1e30": (row("FIRMS", 3, put(1, "1e30")), "refused"), "latitude missing": (row("FIRMS", 3, put(0, "")), "refused"), "decimal comma": (row("FIRMS", 3, put(0, '"37,2"')), "refused"), "date of 1800": (row("FIRMS", 3, put(5, "1800-09-05")), "refused"), "date of 9999": (row("FIRMS", 3, put(5, "9999-09-05")), "refused"),
    "day first": (row("FIRMS", 3, put(5, "05-09-2020")), "refused"), "NaT": (row("FIRMS", 3, put(5, "NaT")), "refused"), "clock 2460": (row("FIRMS", 3, put(6, "2460")), "refused"), "no clock": (row("FIRMS", 3, put(6, "")), "refused"), "cut behind the day": (row("FIRMS", 24, ",".join(firms_rows()[23].split(",")[:6])), "refused"),
    "half a globe apart": (row("FIRMS", 3, put(1, "-11")), "refused"), "forty years apart": (row("FIRMS", 24, put(5, "2060-09-07")), "refused"), "clock -42": (row("FIRMS", 3, put(6, "-42")), "refused"), "type 7": (row("FIRMS", 3, put(14, "7")), "refused"),
    "type infinite": (row("FIRMS", 3, put(14, "inf")), "refused"), "type in words": (row("FIRMS", 3, put(14, "volcano")), "refused"), "confidence x": (row("FIRMS", 3, put(9, "x")), "refused"), "confidence 300": (row("FIRMS", 3, put(9, "300")), "refused"), "null bytes": (row("FIRMS", 3, put(0, "37\0")), "refused")}
del good


def test_targeted_damage_of_a_table(tmp_path, ledger):
    judge = Judge(use_table)
    cases = {name: (lambda p, text=text: p.write_bytes(text.encode()), expected) for name, (text, expected) in TABLE_CASES.items()}
    cases |= {"Latin-1": (lambda p: p.write_bytes(TABLE_CASES["as it is"][0].replace("VIIRS", "VIÎRS").encode("latin-1")), "refused"), "UTF-16": (lambda p: p.write_text(TABLE_CASES["as it is"][0], encoding="utf-16"), "refused"),
              "folder": (lambda p: p.mkdir(), "refused"), "loop": (lambda p: p.symlink_to(p.name), "refused"), "PNG": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500)), "refused")}
    try_targeted(judge, cases, tmp_path, "table.csv")
    tried(judge, ledger, "table of detections: fields, columns, quotes, encodings")


@pytest.mark.parametrize("kind", TABLES)
def test_any_words_in_any_field(kind, tmp_path, many, ledger):
    "Hypothesis writes into fields of a row."
    judge, path = Judge(use_table), tmp_path/"table.csv"
    words = st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str), st.dates().map(str), st.datetimes().map(str), st.sampled_from(["", '"', ",", "\n", "1e400", "-0", "+37.2", "37,2", "0x25", "٣٧"]))

    @settings(max_examples=1000 if many else 60, database=None, derandomize=True, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.integers(1, 24), st.integers(0, TABLES[kind][0].count(",")), words)
    def write(number, field, text):
        path.write_bytes(row(kind, number, put(field, text)).encode(errors="surrogatepass"))
        judge.try_file(f"row {number}, field {field}: {text!r}", path)

    write()
    tried(judge, ledger, f"table of detections, {kind}: any words")


# GeoTIFFs, a file a day

def plain_images(folder: Path) -> np.ndarray:
    "Read images by rasterio alone, the detection as an hour."
    days = sorted(folder.glob("*.tif"))
    images = np.stack([rasterio.open(p).read() for p in days]).astype(np.float32)
    for p in days:
        nodata = rasterio.open(p).nodata
        if nodata is not None: images[images == np.float32(nodata)] = np.nan
    clock = images[:, -1].astype(float)
    images[:, -1] = np.where(np.isnan(clock), 0, np.maximum(clock//100 + clock % 100/60, 1/60))
    return images


def use_images(folder: Path) -> str | None:
    "Convert a folder `good` of images, one of which is damaged, and compare every number."
    out = folder.parent/"out"
    shutil.rmtree(out, ignore_errors=True)
    path, = convert_tiffs(folder, out, report=lambda line: None)
    fire, images = open_fire(path), plain_images(folder)
    if len(fire) != len(images) and fire.missing.sum() != len(fire) - len(images): return f"{len(fire)} days of {len(images)} images"
    np.testing.assert_array_equal(fire.read()[~fire.missing | np.isnan(fire.read()[:, HOUR]).all((1, 2)) & (len(fire) == len(images))], images)
    first = rasterio.open(sorted(folder.glob("*.tif"))[0])
    if fire.grid.transform != tuple(first.transform)[:6]: return f"grid {fire.grid}"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiff")
    write_tiffs(open_fire(write_fire(folder/"good.hdf5", fields(3), DAYS[:3], GRID, "good")), folder/"2020"/"good")
    return folder/"2020"/"good"


def image_with(data=None, **profile):
    def write(folder):
        path = folder/"2020-09-06.tif"
        with rasterio.open(path) as f: old, values = f.profile, f.read()
        values = values if data is None else data(values)
        path.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with rasterio.open(path, "w", **old | dict(height=values.shape[1], width=values.shape[2], count=len(values), dtype=values.dtype, predictor=1) | profile) as f: f.write(values)
    return write


def at(band, value):
    def change(values):
        values[band, 4, 6] = value
        return values
    return change


def as_file(content): return lambda folder: (folder/"2020-09-06.tif").write_bytes(content)


IMAGE_CASES = {
    "as it is": (lambda folder: None, "right"), "double": (image_with(lambda v: v.astype("f8")), "right"), "big-endian": (image_with(ENDIANNESS="BIG"), "right"), "uncompressed": (image_with(compress=None), "right"), "tiles": (image_with(tiled=True, blockxsize=16, blockysize=16), "right"),
    "by pixel": (image_with(interleave="pixel"), "right"), "a day less": (lambda folder: (folder/"2020-09-06.tif").unlink(), "right"), "fill value": (image_with(at(5, -9999), nodata=-9999), "right"), "some infinite": (image_with(at(5, np.inf)), "right"),
    "22 bands": (image_with(lambda v: v[:22]), "refused"), "one band": (image_with(lambda v: v[:1]), "refused"), "24 bands": (image_with(lambda v: np.concatenate([v, v[:1]])), "refused"), "cut": (image_with(lambda v: v[:, :5]), "refused"), "complex": (image_with(lambda v: v.astype("c8")), "refused"),
    "clock 1375": (image_with(at(22, 1375)), "refused"), "clock 2500": (image_with(at(22, 2500)), "refused"), "clock 1e20": (image_with(at(22, 1e20)), "refused"), "clock -1": (image_with(at(22, -1)), "refused"), "no CRS": (image_with(crs=None), "refused"), "other CRS": (image_with(crs="EPSG:32612"), "refused"),
    "no transform": (image_with(transform=None), "refused"), "moved": (image_with(transform=rasterio.Affine(375, 0, 0, 0, -375, 0)), "refused"), "turned": (image_with(transform=rasterio.Affine(375, 9, 269625, 9, -375, 4178250)), "refused"),
    "NaN pixels": (image_with(transform=rasterio.Affine(np.nan, 0, 269625, 0, -375, 4178250)), "refused"), "of 1800": (lambda folder: (folder/"2020-09-06.tif").rename(folder/"1800-09-06.tif"), "refused"), "of month 13": (lambda folder: (folder/"2020-09-06.tif").rename(folder/"2020-13-06.tif"), "refused"),
    "empty": (as_file(b""), "refused"), "PNG": (as_file(b"\x89PNG\r\n\x1a\n" + bytes(500)), "refused"), "HTML": (as_file(b"<html>"), "refused"), "list of files": (as_file(b'<VRTDataset rasterXSize="12" rasterYSize="9"></VRTDataset>'), "refused"),
    "folder": (lambda folder: ((folder/"2020-09-06.tif").unlink(), (folder/"2020-09-06.tif").mkdir()), "refused"), "loop": (lambda folder: ((folder/"2020-09-06.tif").unlink(), (folder/"2020-09-06.tif").symlink_to("2020-09-06.tif")), "refused"),
    "empty folder": (lambda folder: [p.unlink() for p in folder.iterdir()], "refused")}


def test_targeted_damage_of_images(images, tmp_path, ledger):
    judge = Judge(use_images)
    cases = {name: (lambda p, change=change: (copied(images, p.parent), change(p)), expected) for name, (change, expected) in IMAGE_CASES.items()}
    try_targeted(judge, cases, tmp_path, "good")
    tried(judge, ledger, "GeoTIFFs: types, bands, places, clocks, files")


def test_random_damage_of_an_image(images, tmp_path, many, ledger):
    judge, content = Judge(use_images), (images/"2020-09-06.tif").read_bytes()
    for seed in range(1500 if many else 80):
        name, damaged = random_damage(content, seed)
        folder = copied(images, tmp_path/"trial")
        (folder/"2020-09-06.tif").write_bytes(damaged)
        judge.try_file(name, folder)
    tried(judge, ledger, "GeoTIFFs: random")


def test_a_damaged_archive_is_converted_anew(images, tmp_path):
    "What was converted before is looked at before it is taken as done."
    path, = convert_tiffs(images, tmp_path, compression="lzf", report=lambda line: None)
    whole, judge = path.read_bytes(), Judge(lambda path: convert_tiffs(images, tmp_path, compression="lzf", report=lambda line: None) and None)
    emptied(lambda path: None, "data")(path)
    assert judge.try_file("a chunk of no bytes", path) == "right", judge.report()
    judge.close()
    assert path.read_bytes() == whole


# Weather

LON, LAT, TIMES = np.linspace(-120.2, -118.9, 14), np.linspace(38.2, 37.2, 11), np.arange("2020-09-05", "2020-09-13", dtype="datetime64[h]")
WEATHER = dict(t2m=("K", 290, 8), d2m=("K", 275, 3), sp=("Pa", 90000, 500), u10=("m/s", 3, 1), v10=("m/s", 1, 1), tp=("m", .0002, .0001))


def write_weather(path, change=lambda values, axes: None, kind="NETCDF4", names=(), units=(), **options):
    "Write hourly weather by netCDF4 alone; `change` may alter numbers and axes."
    hours = (TIMES - np.datetime64("1970-01-01T00")).astype(int).astype(float)
    axes = dict(time=hours, latitude=LAT.copy(), longitude=LON.copy())
    values = {name: mean + spread*np.sin(hours[:, None, None]/24*2*np.pi + LAT[:, None] + LON) for name, (unit, mean, spread) in WEATHER.items()}
    change(values, axes)
    with netCDF4.Dataset(path, "w", format=kind) as f:
        for name, axis in axes.items():
            f.createDimension(name, len(axis))
            v = f.createVariable(name, np.asarray(axis).dtype, (name,))
            v[:] = axis
            v.setncatts(dict(units="hours since 1970-01-01") if name == "time" else dict(units="degrees"))
        for name, field in values.items():
            v = f.createVariable(dict(names).get(name, name), np.asarray(field).dtype, tuple(axes)[-np.ndim(field):], **options)
            v.units = dict(units).get(name, WEATHER[name][0])
            v[:] = field
    return path


def plain_weather(path: Path, fire: Fire) -> dict:
    "Temperatures of the days at the pixels, by netCDF4, sorting and linear interpolation alone."
    with netCDF4.Dataset(path) as f:
        lat, lon, hours = (np.ma.filled(f[n][:].astype(float), np.nan) for n in ("latitude", "longitude", "time"))
        values = np.ma.filled(f["t2m"][:].astype(float), np.nan)
    for axis, along in ((0, hours), (1, lat), (2, lon)): values = np.take(values, np.argsort(along), axis)
    hours, lat, lon = np.sort(hours), np.sort(lat), np.sort(lon)
    x, y = fire.grid.lonlat()
    i, j = np.clip(np.searchsorted(lat, y) - 1, 0, len(lat) - 2), np.clip(np.searchsorted(lon, x) - 1, 0, len(lon) - 2)
    a, b = (y - lat[i])/(lat[i + 1] - lat[i]), (x - lon[j])/(lon[j + 1] - lon[j])
    days = [values[hours//24 == d] for d in fire.dates.astype(int)]
    found = {}
    for name, how in (("temperature_min", np.min), ("temperature_max", np.max)):
        daily = np.stack([how(v, 0) if len(v) == 24 else np.full(values.shape[1:], np.nan) for v in days])
        found[name] = (1 - a)*(1 - b)*daily[:, i, j] + (1 - a)*b*daily[:, i, j + 1] + a*(1 - b)*daily[:, i + 1, j] + a*b*daily[:, i + 1, j + 1]
    return found


FIRE = {}


def use_weather(path: Path) -> str | None:
    out = path.parent/"joined.hdf5"
    out.unlink(missing_ok=True)
    fire = open_fire(FIRE["path"])
    joined = open_fire(join_weather(FIRE["path"], path, out)).read()
    if np.nanmax(np.abs(joined[:, BAND["specific_humidity"]])) > 1: return "humidity beyond nature"
    try: expected = plain_weather(path, fire)
    except (KeyError, IndexError): return None if not np.array_equal(joined, fire.read(), equal_nan=True) else "nothing was joined"
    for name, values in expected.items():
        own, before = joined[:, BAND[name]], fire.read(bands=[BAND[name]])[:, 0]
        natural = np.isfinite(values) & (values >= 150) & (values <= 400)
        np.testing.assert_allclose(own, np.where(natural, values, before), rtol=2e-5, err_msg=name)


@pytest.fixture(scope="module", autouse=True)
def fire_for_weather(tmp_path_factory): FIRE["path"] = write_fire(tmp_path_factory.mktemp("fire")/"fire.hdf5", fields(), DAYS, GRID, "fire")


def axis(name, change):
    def alter(values, axes): axes[name] = change(axes[name])
    return alter


def numbers(name, change):
    def alter(values, axes): values[name] = change(values[name])
    return alter


def along(name, order):
    def alter(values, axes):
        at = list(axes).index(name)
        axes[name] = order(axes[name], 0)
        for k in values: values[k] = order(values[k], at)
    return alter


def holes(values, axes): values["t2m"][5, 3, 3] = np.nan


def moved(hours): return lambda x: x + hours*(np.arange(len(x)) == 75)


WEATHER_CASES = {
    "as it is": ({}, "right"), "classic": (dict(kind="NETCDF3_CLASSIC"), "right"), "packed": (dict(zlib=True, shuffle=True), "right"), "single": (dict(change=lambda v, a: v.update({k: x.astype("f4") for k, x in v.items()})), "right"),
    "south first": (dict(change=along("latitude", lambda x, at: np.flip(x, at))), "right"), "shuffled": (dict(change=along("longitude", lambda x, at: np.take(x, np.random.default_rng(0).permutation(len(LON)), at))), "right"),
    "times shuffled": (dict(change=along("time", lambda x, at: np.take(x, np.random.default_rng(0).permutation(len(TIMES)), at))), "right"), "degrees Celsius": (dict(change=numbers("t2m", lambda x: x - 273.15), units=dict(t2m="degC")), None),
    "some NaN": (dict(change=holes), "right"), "an hour of another day": (dict(change=axis("time", moved(26.75))), "right"), "an hour beyond all": (dict(change=axis("time", moved(1e4))), "right"), "a day is cut": (dict(change=along("time", lambda x, at: np.take(x, np.arange(180), at))), "right"),
    "K as degC": (dict(units=dict(t2m="degC")), "refused"), "degC as K": (dict(change=numbers("t2m", lambda x: x - 273.15)), "refused"), "hPa as Pa": (dict(change=numbers("sp", lambda x: x/100)), "refused"), "1e36": (dict(change=numbers("t2m", lambda x: 0*x + 1e36)), "refused"),
    "1e30": (dict(change=numbers("u10", lambda x: 0*x + 1e30)), "refused"), "unknown unit": (dict(units=dict(t2m="furlong")), "refused"), "no variable": (dict(names={n: f"x_{n}" for n in WEATHER}), "refused"), "text": (dict(change=numbers("t2m", lambda x: np.full(x.shape, b"a"))), "refused"),
    "latitude twice": (dict(change=axis("latitude", lambda x: np.r_[x[:1], x[:-1]])), "refused"), "times twice": (dict(change=axis("time", lambda x: np.r_[x[:1], x[:-1]])), "refused"), "latitude NaN": (dict(change=axis("latitude", lambda x: np.r_[np.nan, x[1:]])), "refused"),
    "latitude 1e30": (dict(change=axis("latitude", lambda x: np.r_[1e30, x[1:]])), "refused"), "time NaN": (dict(change=axis("time", lambda x: np.r_[np.nan, x[1:]])), "refused"), "one column": (dict(change=along("longitude", lambda x, at: np.take(x, [3], at))), "refused"),
    "no times": (dict(change=along("time", lambda x, at: np.take(x, [], at))), None), "wind without its other half": (dict(names=dict(v10="x")), "right")}


def test_targeted_damage_of_weather(tmp_path, ledger):
    judge = Judge(use_weather)
    cases = {name: (lambda p, options=options: write_weather(p, **options), expected) for name, (options, expected) in WEATHER_CASES.items() if expected}
    cases |= {"empty": (lambda p: p.write_bytes(b""), "refused"), "CSV": (lambda p: p.write_text("a,b\n1,2\n"), "refused"), "empty folder": (lambda p: p.mkdir(), "refused"), "loop": (lambda p: p.symlink_to(p.name), "refused"), "fire": (lambda p: shutil.copy(FIRE["path"], p), "refused"),
              "a chunk of no bytes": (emptied(lambda p: write_weather(p, fletcher32=True, chunksizes=(24, 11, 14)), "t2m"), "refused")}
    try_targeted(judge, cases, tmp_path, "weather.nc")
    tried(judge, ledger, "weather: units, coordinates, numbers, files")


@pytest.mark.parametrize("kind", ["NETCDF4", "NETCDF3_CLASSIC"])
def test_random_damage_of_weather(kind, tmp_path, many, ledger):
    "Flipped bits of numbers are what the file says; what lies beyond nature stays as it was before."
    judge, good = Judge(use_weather), write_weather(tmp_path/"weather.nc", kind=kind)
    assert judge.try_file("good", good) == "right"
    judge.try_all(good, (random_damage(good.read_bytes(), seed) for seed in range(1000 if many else 50)))
    tried(judge, ledger, f"weather, {kind}: random")
