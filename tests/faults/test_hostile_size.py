"""Headers that promise more than a file holds, packed bombs and texts without end: each is refused in one line, in seconds, by a process that may take two more gigabytes."""
import json
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import h5py
import netCDF4
import numpy as np
import pytest
import rasterio
import torch
import xarray as xr
import yaml
import zarr
from hostile import SECONDS, detections, in_child, refused_in_child, signed

from geoforecast.fire.detections import read_detections
from geoforecast.fire.wsts import open_fire
from geoforecast.geo.io import read_geotiff, read_zarr
from geoforecast.guard import SUSPECT
from geoforecast.learn.bundle import _build, load_bundle, save_bundle
from geoforecast.learn.configuration import compose
from geoforecast.learn.launch import _checkpoint
from geoforecast.precipitation.atmosphere import open_atmosphere
from geoforecast.precipitation.normalize import Normalizer
from geoforecast.segmentation.classes import read_classes
from geoforecast.segmentation.tiles import find_scenes, mask_values, open_scene

pytestmark = pytest.mark.filterwarnings("ignore")
PLACE = dict(year=2020, fire_name="f", img_dates=[f"2020-09-0{d}" for d in range(1, 9)], lnglat=(-120., 40.))


def test_the_child_has_little_memory(tmp_path):
    "The reading that is refused below would end these tests."
    path = tmp_path/"any"
    path.touch()
    assert in_child(lambda p: np.ones(10**9), path)[0] in ("MemoryError", "_ArrayMemoryError")
    assert in_child(lambda p: None, path)[0] == "right"


# Headers

def images(folder):
    "Yield images that announce far more pixels than they hold, and readers of each."
    def tiff(name, **options):
        with rasterio.open(folder/name, "w", driver="GTiff", sparse_ok=True, dtype="float32", crs="EPSG:32633", transform=rasterio.Affine(1, 0, 5e5, 0, -1, 5e6), **options): pass
        return folder/name
    yield tiff("tiled.tif", height=10**6, width=10**6, count=1, tiled=True, blockxsize=65536, blockysize=65536, BIGTIFF="YES"), (open_scene, read_geotiff)
    yield tiff("bands.tif", height=100, width=100, count=60_000, interleave="pixel", BIGTIFF="YES"), (open_scene, read_geotiff)
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    (folder/"wide.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    yield folder/"wide.png", (open_scene, lambda p: mask_values(open_scene(p, p)))
    (folder/"wide.jpg").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xc0\0\x11\x08" + struct.pack(">HH", 65500, 65500) + b"\3\1\x11\0\2\x11\0\3\x11\0" + b"\xff\xd9")
    yield folder/"wide.jpg", (open_scene,)


def test_images_of_absurd_size(tmp_path, ledger):
    tried = 0
    for path, readers in images(tmp_path):
        for read in readers:
            refused_in_child(read, path)
            tried += 1
    ledger("absurd sizes: images", tried, refused=tried)


def test_fires_of_absurd_size(tmp_path, ledger):
    shapes = {"rows": (8, 23, 10**8, 10**6), "plain": (8, 23, 3000, 3000), "days": (10**15, 23, 6, 7)}
    for name, shape in shapes.items():
        path = tmp_path/f"{name}.hdf5"
        with h5py.File(path, "w") as f:
            chunks = dict(chunks=(1, 1, min(shape[2], 64), min(shape[3], 64)), compression="gzip") if name != "plain" else {}
            f.create_dataset("data", shape, "f4", **chunks).attrs.update(PLACE)
        for read in (lambda p: open_fire(p).missing, lambda p: open_fire(p).read()): refused_in_child(read, path)
    with h5py.File(path := tmp_path/"attribute.hdf5", "w") as f:
        f.create_dataset("data", data=detections()).attrs.update(PLACE)
        f["data"].attrs.create("crs", "x"*60_000)
    refused_in_child(open_fire, path)
    ledger("absurd sizes: fires", 2*len(shapes) + 1, refused=2*len(shapes) + 1)


def states(folder: Path, **lengths) -> xr.Dataset:
    n = dict(time=4, level=2, lat=5, lon=6)
    axes = dict(time=np.datetime64("2020-01-01", "ns") + np.arange(4)*np.timedelta64(12, "h"), level=("level", [500., 850.], dict(units="hPa")), lat=np.arange(5.), lon=np.arange(6.))
    field = lambda dims, units, value: (dims, np.full([n[d] for d in dims], value, "f4"), dict(units=units))
    return xr.Dataset(dict(TEM=field(("time", "level", "lat", "lon"), "K", 280), precipitation=field(("time", "lat", "lon"), "mm", 1)), axes)


def test_atmospheres_of_absurd_size(tmp_path, ledger):
    "NetCDF of either kind and Zarr of either version, with one axis of a million million, and chunks of one value."
    tried = 0
    for axis in ("time", "lat"):
        path = tmp_path/f"{axis}.nc"
        with netCDF4.Dataset(path, "w") as f:
            for name, n in dict(time=4, level=2, lat=5, lon=6).items(): f.createDimension(name, 10**12 if name == axis else n)
            for name, units in dict(level="hPa", lat="degrees_north", lon="degrees_east", time="hours since 2020-01-01").items():
                if name != axis: f.createVariable(name, "f8", (name,)).units = units
            f.createVariable("TEM", "f4", ("time", "level", "lat", "lon"), chunksizes=(1, 1, 1, 1), zlib=True).units = "K"
            f.createVariable("precipitation", "f4", ("time", "lat", "lon"), chunksizes=(1, 1, 1), zlib=True).units = "mm"
        refused_in_child(open_atmosphere, path)
        tried += 1
    for version in (2, 3):
        for chunk in (1, 10**6):
            store = tmp_path/f"v{version}_{chunk}.zarr"
            states(tmp_path).to_zarr(store, zarr_format=version, consolidated=False)
            for name in ("TEM", "precipitation"):
                about = store/name/("zarr.json" if version == 3 else ".zarray")
                facts = json.loads(about.read_text())
                facts["shape"][0] = 10**15
                chunks = facts["chunks"] if version == 2 else facts["chunk_grid"]["configuration"]["chunk_shape"]
                chunks[:] = [chunk] + [1]*(len(chunks) - 1)
                about.write_text(json.dumps(facts))
            for read in (read_zarr, open_atmosphere):
                refused_in_child(read, store)
                tried += 1
    ledger("absurd sizes: NetCDF and Zarr", tried, refused=tried)


def test_a_variable_of_one_value_is_honest(tmp_path, ledger):
    "Snow in the tropics takes no room in a store, and the rain beside it is real."
    rain = np.random.default_rng(0).random((40, 50, 50), np.float32)
    ds = xr.Dataset(dict(rain=(("time", "lat", "lon"), rain)), dict(time=np.arange(40), lat=np.arange(50.), lon=np.arange(50.)))
    store, fields = tmp_path/"climate.zarr", 4000
    ds.to_zarr(store, consolidated=False)
    nothing = zarr.create_array(store/"snow", shape=(fields, 300, 300), chunks=(100, 300, 300), dtype="f4", fill_value=np.nan, dimension_names=("step", "y", "x"))
    assert nothing.nbytes > SUSPECT and nothing.nchunks_initialized == 0
    assert read_zarr(store).snow.shape == (fields, 300, 300)
    shutil.rmtree(store/"rain")
    refused_in_child(read_zarr, store, "snow", "all of climate.zarr holds")
    ledger("variables of one value", 2, right=1, refused=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    config = compose("fire/unet", hidden_dims=[2, 4], window_size=2)
    return save_bundle(folder/"bundle", _build({"model": config["model"]}, folder), config, dict(task="fire"))


def test_bundles_of_absurd_size(bundle, tmp_path, ledger):
    def changed(name, file, content):
        folder = tmp_path/name
        shutil.copytree(bundle, folder)
        (folder/file).write_bytes(content) if isinstance(content, bytes) else content(folder/file)
        signed(folder)
        return folder
    heads = {"huge": struct.pack("<Q", 10**18), "two gigabytes": struct.pack("<Q", 2**31) + b"{", "deep": struct.pack("<Q", 200_000) + b"["*200_000,
             "tensor": (lambda h: struct.pack("<Q", len(h)) + h)(json.dumps({"network.x": dict(dtype="F32", shape=[10**9, 10**9], data_offsets=[0, 4*10**18])}).encode())}
    tried = 0
    for name, head in heads.items(): refused_in_child(load_bundle, changed(name, "model.safetensors", head)); tried += 1
    for width in (10**5, 10**9, 10**30):
        def widen(path):
            config = yaml.safe_load(path.read_text())
            config["model"]["init_args"]["network"]["init_args"]["hidden_dims"] = [width, width]
            path.write_text(yaml.safe_dump(config))
        refused_in_child(load_bundle, changed(f"wide{width}", "config.yaml", widen)); tried += 1
    for file in ("metadata.json", "scores.json", "baselines.json"):
        refused_in_child(load_bundle, changed(f"deep {file}", file, b"["*10**6)); tried += 1
    baseline = {"a": {"class_path": "geoforecast.fire.models.Logistic", "init_args": {"input_dim": 10**6, "window_size": 10**6}}}
    refused_in_child(load_bundle, changed("baseline", "baselines.json", json.dumps(baseline).encode()))
    ledger("absurd sizes: bundles", tried + 1, refused=tried + 1)


# Bombs

def test_packed_checkpoints(tmp_path, ledger):
    "A checkpoint of some hundred kilobytes that unpacks to a hundred gigabytes."
    torch.save({"state_dict": {"a": torch.zeros(8)}}, tmp_path/"good.ckpt")
    content = zlib.compressobj(9, wbits=-15)
    packed = content.compress(bytes(10**8)) + content.flush()
    with zipfile.ZipFile(tmp_path/"good.ckpt") as good, zipfile.ZipFile(tmp_path/"bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for info in good.infolist(): bomb.writestr(info.filename, bytes(10**8) if info.filename.endswith("data/0") else good.read(info))
    assert (tmp_path/"bomb.ckpt").stat().st_size < 200_000 and len(packed) < 200_000
    claimed = bytearray((tmp_path/"bomb.ckpt").read_bytes())
    size = struct.pack("<I", 10**8)
    while (at := claimed.find(size)) >= 0: claimed[at:at + 4] = struct.pack("<I", 2**32 - 2)
    (tmp_path/"lie.ckpt").write_bytes(claimed)
    for name in ("bomb.ckpt", "lie.ckpt"): refused_in_child(_checkpoint, tmp_path/name)
    state = torch.zeros(8)
    torch.save({"state_dict": {"a": state}}, tmp_path/"numbers.ckpt")
    with zipfile.ZipFile(tmp_path/"numbers.ckpt") as good, zipfile.ZipFile(tmp_path/"large.ckpt", "w") as f:
        for info in good.infolist(): f.writestr(info.filename, good.read(info).replace(b"K\x08", b"J\xff\xff\xff\x7f") if info.filename.endswith(".pkl") else good.read(info))
    assert in_child(_checkpoint, tmp_path/"large.ckpt")[0] == "refused"
    ledger("packed checkpoints", 3, refused=3)


LAUGHS = "a0: &a0 [ha]\n" + "\n".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}']*10)}]" for i in range(12))
MERGED = "a0: &a0 {x: 1}\n" + "\n".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}']*10)}]}}" for i in range(12))
TEXTS = dict(laughs=LAUGHS, merged=MERGED, loop="a: &a [*a]", mapping="a: &a {b: *a}", deep="["*20_000, braces="{a: "*50_000, block="".join(" "*i + "a:\n" for i in range(3000)), digits="a: " + "9"*10**6, dashes="- "*50_000)


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_without_end(kind, bundle, tmp_path, ledger):
    "Ten lines that stand for a million million values, brackets in brackets, a number of a million digits."
    path = tmp_path/"mine.yaml"
    path.write_text(f"model: {{class_path: geoforecast.fire.forecaster.FireForecaster}}\n{TEXTS[kind]}\n" if kind not in ("deep", "braces", "dashes") else TEXTS[kind])
    for read in (compose, lambda p: compose("fire/unet", trainer=p)): refused_in_child(read, path)
    folder = tmp_path/"bundle"
    shutil.copytree(bundle, folder)
    (folder/"config.yaml").write_text(TEXTS[kind])
    signed(folder)
    refused_in_child(load_bundle, folder)
    from geoforecast.terminal import parse_value
    ending, text, seconds = in_child(lambda p: parse_value(TEXTS[kind]), path)
    assert (ending == "refused" or kind == "digits") and seconds < SECONDS, (ending, text, seconds)
    ledger("texts of YAML without end", 4, refused=4)


def test_text_in_a_value_without_end(tmp_path, ledger):
    "A value that is itself YAML is read once more, by jsonargparse."
    path = tmp_path/"mine.yaml"
    for option in ("learning_rate", "hidden_dims", "model.network", "data.data_dir"):
        for text in (LAUGHS, MERGED, "["*50_000):
            def read(p):
                from geoforecast.learn.launch import launch
                launch("fire/unet", output_dir=str(tmp_path/"run"), **{"data_dir": "nowhere", option: text})
            path.touch()
            ending, said, seconds = in_child(read, path)
            assert ending == "refused" and seconds < SECONDS, (option, text[:20], ending, said, seconds)
    ledger("texts within values without end", 12, refused=12)


def test_a_base_that_leads_back_to_itself(tmp_path, monkeypatch, ledger):
    monkeypatch.chdir(tmp_path)
    for name, base in dict(a="b.yaml", b="./c.yaml", c="../" + tmp_path.name + "/a.yaml", own="own.yaml").items(): (tmp_path/f"{name}.yaml").write_text(f"base: {base}\nmodel: {{}}\n")
    (tmp_path/"linked.yaml").symlink_to(tmp_path/"twice.yaml")
    (tmp_path/"twice.yaml").write_text("base: linked.yaml\n")
    for name in ("a", "own", "twice"):
        ending, text, _ = in_child(compose, tmp_path/f"{name}.yaml")
        assert ending == "refused" and "base of itself" in text, (name, ending, text)
    ledger("bases that lead in a circle", 3, refused=3)


# Long and deep text

def test_json_without_end(tmp_path, ledger):
    path = tmp_path/"n.json"
    for text in ("["*10**6, '{"a":'*10**5, "1"*10**6, '{"mean": ' + "9"*5000 + "}"):
        path.write_text(text)
        refused_in_child(Normalizer.load, path)
    ledger("texts of JSON without end", 4, refused=4)


def test_lines_without_end(tmp_path, ledger):
    (tmp_path/"cells.csv").write_text("id,name\n0," + "x"*500_000 + "\n")
    refused_in_child(read_classes, tmp_path/"cells.csv")
    (tmp_path/"class_mapping.csv").write_text("id,name\n0," + "x"*50_000_000 + "\n")
    refused_in_child(read_classes, tmp_path/"class_mapping.csv")
    (tmp_path/"quoted.csv").write_text('id,name\n0,"' + "x\n"*25_000_000)
    refused_in_child(read_classes, tmp_path/"quoted.csv")
    (tmp_path/"fires.csv").write_text("latitude,longitude,acq_date,acq_time\n" + "1"*50_000_000 + ",1,2020-01-01,1200\n")
    refused_in_child(read_detections, tmp_path/"fires.csv")
    (tmp_path/"header.csv").write_text(",".join(f"c{i}" for i in range(5_000_000)) + "\n")
    refused_in_child(read_classes, tmp_path/"header.csv")
    ledger("lines without end", 5, refused=5)
