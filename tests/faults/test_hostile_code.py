"""Nothing that is loaded runs code: pickles in every place a file has room for them, classes that a configuration or a bundle names, tags of YAML, parameters of a notebook.

Every payload is first shown to work: unpickled or imported as a careless program would, it leaves a mark.
"""
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from hostile import detections, forget, pickled, refusal, signed, trap

from geoforecast.core import BundleError, ConfigError, DataError, GeoforecastError
from geoforecast.fire.simulate import simulate_fires
from geoforecast.fire.wsts import open_fire, write_fire
from geoforecast.geo.grid import Grid
from geoforecast.geo.io import read_netcdf, read_zarr
from geoforecast.learn.bundle import _build, load_bundle, save_bundle
from geoforecast.learn.configuration import compose
from geoforecast.learn.launch import launch
from geoforecast.precipitation.atmosphere import open_atmosphere
from geoforecast.precipitation.normalize import Normalizer
from geoforecast.terminal import parse_value

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = {"window_size": 2, "hidden_dims": [2, 4], "crop_size": 16, "batch_size": 4, "samples_per_epoch": 8, "max_epochs": 1, "trainer.accelerator": "cpu", "log_level": "warning"}


@pytest.fixture
def mark(tmp_path): return tmp_path/"executed"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A bundle, and a checkpoint of the same network."
    folder = tmp_path_factory.mktemp("made")
    config = compose("fire/unet", hidden_dims=[2, 4], window_size=2)
    forecaster = _build({"model": config["model"]}, folder)
    save_bundle(folder/"bundle", forecaster, config, dict(task="fire", window_size=2))
    simulate_fires(folder/"fires", 3, shape=(7, 24, 26), seed=1)
    return folder


@pytest.fixture
def bundle(made, tmp_path): return Path(shutil.copytree(made/"bundle", tmp_path/"bundle"))


@pytest.fixture
def start(made, tmp_path):
    return lambda **options: launch("fire/unet", **OPTIONS | dict(data_dir=str(made/"fires"), output_dir=str(tmp_path/"run")) | options)


# Pickles

def checkpoints(content: bytes, folder: Path, mark: Path):
    "Yield checkpoints that run code: a bare pickle, torch's two formats, a pickle among the weights, an archive of TorchScript."
    from hostile import Payload
    (folder/"bare.ckpt").write_bytes(content)
    torch.save({"state_dict": {"network.weight": Payload(mark)}}, folder/"zip.ckpt")
    torch.save({"state_dict": Payload(mark)}, folder/"legacy.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {}, "callbacks": Payload(mark)}, folder/"callbacks.ckpt")
    with zipfile.ZipFile(folder/"plain.ckpt", "w") as f: f.writestr("archive/data.pkl", content); f.writestr("archive/version", "3")
    with zipfile.ZipFile(folder/"script.ckpt", "w") as f:
        for name in ("data.pkl", "constants.pkl"): f.writestr(f"archive/{name}", content)
        f.writestr("archive/version", "3")
    return sorted(folder.glob("*.ckpt"))


def test_no_checkpoint_runs_code(start, tmp_path, mark, ledger):
    files, worked = checkpoints(pickled(mark), tmp_path, mark), 0
    for path in files:
        try: torch.load(path, weights_only=False)
        except Exception: pass
        worked += mark.exists()
        mark.unlink(missing_ok=True)
    assert worked >= 4, "torch.load without its guard runs them"
    run = start()
    for path in files:
        refusal(lambda: run.load(path), path.name)
        refusal(lambda: start(ckpt_path=str(path), output_dir=str(tmp_path/"other")).fit(), path.name)
        assert not mark.exists(), path
    ledger("pickles: checkpoints", 2*len(files), refused=2*len(files))


def test_no_latest_checkpoint_of_a_run_folder_runs_code(start, tmp_path, mark, ledger):
    start()
    (tmp_path/"run"/"checkpoints").mkdir()
    (tmp_path/"run"/"checkpoints"/"latest.ckpt").write_bytes(pickled(mark))
    refusal(lambda: start().fit(), "latest.ckpt")
    from geoforecast.segmentation.screen import checkpoints_of
    refusal(lambda: checkpoints_of(tmp_path/"run"), "latest.ckpt")
    assert not mark.exists()
    ledger("pickles: latest.ckpt of a run", 2, refused=2)


def test_no_file_of_a_bundle_runs_code(bundle, made, mark, tmp_path, ledger):
    content, tried = pickled(mark), 0
    for name in ("model.safetensors", "baselines.safetensors", "config.yaml", "metadata.json", "scores.json", "baselines.json", "inputs.json"):
        shutil.copytree(made/"bundle", bundle, dirs_exist_ok=True)
        (bundle/name).write_bytes(content)
        signed(bundle)
        if name == "inputs.json": load_bundle(bundle) # the statistics are among the weights
        else: refusal(lambda: load_bundle(bundle), name)
        assert not mark.exists(), name
        tried += 1
    shutil.copytree(made/"bundle", bundle, dirs_exist_ok=True)
    for name in ("model.pkl", "pytorch_model.bin", "model.pt", "normalizer.pkl", "hubconf.py", "__init__.py", "conftest.py"): (bundle/name).write_bytes(content)
    signed(bundle)
    load_bundle(bundle)
    assert not mark.exists()
    ledger("pickles: files of a bundle", tried + 7, refused=tried - 1, not_opened=8)


def test_no_normaliser_runs_code(tmp_path, mark, ledger):
    for name in ("n.json", "n.pkl", "n.npy"):
        (tmp_path/name).write_bytes(pickled(mark))
        refusal(lambda: Normalizer.load(tmp_path/name), name)
    np.save(tmp_path/"o.npy", np.array([type("P", (), {"__reduce__": lambda s: (exec, (f"open({str(mark)!r}, 'w')",))})()], dtype=object), allow_pickle=True)
    refusal(lambda: Normalizer.load(tmp_path/"o.npy"), "o.npy")
    assert not mark.exists()
    ledger("pickles: normalisers", 4, refused=4)


def test_data_files_that_are_pickles(tmp_path, mark, ledger):
    from geoforecast.fire.detections import read_detections
    from geoforecast.segmentation.classes import read_classes
    from geoforecast.segmentation.tiles import open_scene
    content = pickled(mark)
    readers = {"f.hdf5": open_fire, "f.nc": open_atmosphere, "f.csv": read_detections, "class_mapping.csv": read_classes, "f.tif": open_scene, "f.png": open_scene, "f.jpg": open_scene, "f.pkl": open_atmosphere, "f.joblib": open_atmosphere}
    for name, read in readers.items():
        (tmp_path/name).write_bytes(content)
        refusal(lambda: read(tmp_path/name), name)
        assert not mark.exists(), name
    ledger("pickles: data files", len(readers), refused=len(readers))


def test_numbers_of_hdf5_and_netcdf_that_are_objects(tmp_path, mark, ledger):
    "HDF5 has texts of any length, references and opaque bytes; none of them becomes a Python object."
    content = np.frombuffer(pickled(mark), np.uint8)
    kinds = {"vlen": h5py.vlen_dtype(np.uint8), "text": h5py.string_dtype(), "reference": h5py.ref_dtype, "opaque": np.dtype("V8"), "complex": np.dtype("c8"),
             "compound": np.dtype([("a", "f4"), ("b", "f4")])}
    for name, dtype in kinds.items():
        good = write_fire(tmp_path/f"{name}.hdf5", detections(), np.datetime64("2020-09-01") + np.arange(8), Grid("EPSG:32611", (375, 0, 269625, 0, -375, 4178250), 6, 7), "f")
        with h5py.File(good, "r+") as f:
            attrs = dict(f["data"].attrs)
            del f["data"]
            f.create_dataset("data", (8, 23, 6, 7), dtype).attrs.update(attrs)
            if name == "vlen": f["data"][0, 0, 0, 0] = content
        refusal(lambda: open_fire(good), good.name)
    ds = xr.Dataset({"t": (("time", "lat", "lon"), np.array([[["a", "b"]]], dtype=object), dict(units="K", standard_name="air_temperature"))}, {"time": [0], "lat": [0.], "lon": [0., 1.]})
    ds.to_netcdf(tmp_path/"text.nc")
    refusal(lambda: open_atmosphere(tmp_path/"text.nc"))
    assert not mark.exists()
    ledger("objects in HDF5 and NetCDF", len(kinds) + 1, refused=len(kinds) + 1)


def test_codecs_of_zarr_that_unpickle(tmp_path, mark, monkeypatch, ledger):
    "A Zarr array of text may name pickle behind its own codec; numcodecs up to 0.16.1, or with its switch set, runs it."
    import numcodecs.pickles
    monkeypatch.setenv("NUMCODECS_ALLOW_UNSAFE_PICKLE_DECODE", "1")
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    content, tried = pickled(mark), 0
    for change in (dict(filters=[{"id": "vlen-utf8"}], compressor={"id": "pickle"}), dict(filters=[{"id": "vlen-utf8"}, {"id": "pickle"}], compressor=None)):
        for place in ("lat", "t"):
            store = tmp_path/f"{tried}.zarr"
            xr.Dataset({"t": (("time", "lat", "lon"), np.zeros((2, 3, 4), "f4"))}, dict(lat=np.arange(3.))).to_zarr(store, zarr_format=2, consolidated=False)
            about = store/place/".zarray"
            about.write_text(json.dumps(json.loads(about.read_text()) | dict(dtype="|O", fill_value=None) | change))
            for chunk in (store/place).iterdir():
                if not chunk.name.startswith("."): chunk.write_bytes(content)
            try: xr.open_zarr(store, consolidated=False).load()
            except Exception: pass
            assert mark.exists(), "xarray alone runs it"
            mark.unlink()
            for read in (read_zarr, open_atmosphere): refusal(lambda: read(store), store.name, "pickle")
            assert not mark.exists()
            tried += 1
    store = tmp_path/"new.zarr"
    xr.Dataset({"t": (("time", "lat"), np.zeros((2, 3), "f4"))}).to_zarr(store, zarr_format=3, consolidated=False)
    about = json.loads((store/"t"/"zarr.json").read_text())
    for codec in ("numcodecs.pickle", "pickle", "foreign.codec"):
        (store/"t"/"zarr.json").write_text(json.dumps(about | dict(codecs=[{"name": "bytes", "configuration": {"endian": "little"}}, {"name": codec, "configuration": {}}])))
        refusal(lambda: read_zarr(store), "new.zarr")
    ledger("codecs of Zarr that run code", tried + 3, refused=tried + 3)


def test_addresses_are_no_files(tmp_path, ledger):
    "What looks like an address of a store or of another driver is looked up on the disk and nowhere else."
    names = ("http://127.0.0.1:9/a.zarr", "s3://bucket/a.zarr", "reference://a.json", "/vsicurl/http://127.0.0.1:9/a.tif", "file:///etc/passwd", "zip://x.zip::a.nc", "HDF5:/etc/passwd://a")
    for name in names:
        for read in (read_zarr, open_atmosphere, open_fire): refusal(lambda: read(name))
        refusal(lambda: read_netcdf(Path(name)))
    ledger("addresses in the place of files", 4*len(names), refused=4*len(names))


def test_images_that_are_lists_of_other_files(tmp_path, ledger):
    "GDAL would follow a list of files, or ask a server, whatever the file is called; read as an image it is nothing."
    from geoforecast.geo.io import read_geotiff
    from geoforecast.segmentation.tiles import open_scene
    import rasterio
    secret = tmp_path/"secret.tif"
    with rasterio.open(secret, "w", driver="GTiff", height=8, width=8, count=1, dtype="uint8", crs="EPSG:32633", transform=rasterio.Affine(1, 0, 5e5, 0, -1, 5e6)) as f: f.write(np.full((1, 8, 8), 77, np.uint8))
    listed = f'<VRTDataset rasterXSize="8" rasterYSize="8"><SRS>EPSG:32633</SRS><VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename>{secret}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>'
    asked = '<GDAL_WMS><Service name="TMS"><ServerUrl>http://127.0.0.1:9/${z}/${x}/${y}.png</ServerUrl></Service><DataWindow><UpperLeftX>0</UpperLeftX><UpperLeftY>0</UpperLeftY><LowerRightX>8</LowerRightX><LowerRightY>8</LowerRightY><SizeX>8</SizeX><SizeY>8</SizeY></DataWindow></GDAL_WMS>'
    tried = 0
    for text in (listed, asked):
        for name in ("scene.tif", "scene.png", "scene.vrt"):
            (tmp_path/name).write_text(text)
            if text == listed:
                with rasterio.open(tmp_path/name) as f: assert (f.read() == 77).all(), "GDAL alone follows it"
            for read in (open_scene, read_geotiff): refusal(lambda: read(tmp_path/name), name)
            tried += 2
    ledger("images that list other files", tried, refused=tried)


def test_numbers_that_lie_in_other_files(tmp_path, ledger):
    "HDF5 can point into any file that the reader may read."
    (tmp_path/"secret").write_bytes(bytes(10**6))
    place = dict(year=2020, fire_name="f", img_dates=[f"2020-09-0{d}" for d in range(1, 9)], lnglat=(-120., 40.))
    with h5py.File(tmp_path/"outside.hdf5", "w") as f: f.create_dataset("data", (8, 23, 6, 7), "f4", external=[(str(tmp_path/"secret"), 0, h5py.h5f.UNLIMITED)]).attrs.update(place)
    with h5py.File(tmp_path/"inside.hdf5", "w") as f: f.create_dataset("data", data=detections()).attrs.update(place)
    with h5py.File(tmp_path/"link.hdf5", "w") as f: f["data"] = h5py.ExternalLink(str(tmp_path/"inside.hdf5"), "data")
    layout = h5py.VirtualLayout((8, 23, 6, 7), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path/"inside.hdf5"), "data", (8, 23, 6, 7))
    with h5py.File(tmp_path/"virtual.hdf5", "w") as f: f.create_virtual_dataset("data", layout).attrs.update(place)
    open_fire(tmp_path/"inside.hdf5")
    for name in ("outside.hdf5", "link.hdf5", "virtual.hdf5"): refusal(lambda: open_fire(tmp_path/name), name)
    ledger("numbers in other files", 3, refused=3)


# Classes that are named

def attacks(path: str, file: Path):
    "Ways to name a foreign class where a network stands."
    described = {"class_path": path}
    return dict(path=described, short=path, json=json.dumps(described), yaml=f"class_path: {path}", flow=f"{{class_path: {path}}}", file=str(file), relative=f"./{file.name}", word=file.stem,
                space={"class_path": f" {path}"}, line={"class_path": f"{path}\n"}, listed=[described], inner={"class_path": "geoforecast.fire.models.UNet", "init_args": json.dumps(dict(hidden_dims=[2, 4], static=described))},
                extra={"class_path": "geoforecast.fire.models.UNet", "init_args": {"hidden_dims": [2, 4]}, "dict_kwargs": {"static": path}}, function={"class_path": path.replace("Net", "call")})


def test_no_bundle_imports_a_foreign_class(bundle, made, tmp_path, mark, monkeypatch, ledger):
    path = trap(tmp_path, mark, monkeypatch)
    for file in ("settings.yaml", "settings"): (tmp_path/file).write_text(f"class_path: {path}\n")
    monkeypatch.chdir(tmp_path)
    places = {"network": lambda c, v: c["model"]["init_args"].update(network=v), "loss": lambda c, v: c["model"]["init_args"].update(loss=v), "model": lambda c, v: c.update(model=v),
              "beside": lambda c, v: c.update(config=v), "dotted": lambda c, v: c["model"]["init_args"].update({"network.class_path": v if isinstance(v, str) else path})}
    tried = 0
    for place, change in places.items():
        for kind, value in attacks(path, tmp_path/"settings.yaml").items():
            forget()
            config = yaml.safe_load((made/"bundle"/"config.yaml").read_text())
            change(config, value)
            (bundle/"config.yaml").write_text(yaml.safe_dump(config))
            signed(bundle)
            refusal(lambda: load_bundle(bundle))
            assert not mark.exists(), (place, kind, value)
            tried += 1
    for class_path in ("os.system", "builtins.exec", "subprocess.Popen", "geoforecast.cli.main", "geoforecast.core.importlib.import_module", "torch.load", "torch.nn.Linear", path):
        shutil.copytree(made/"bundle", bundle, dirs_exist_ok=True)
        (bundle/"baselines.json").write_text(json.dumps({"a": {"class_path": class_path, "init_args": {"command": f"touch {mark}"}}}))
        signed(bundle)
        refusal(lambda: load_bundle(bundle), class_path)
        assert not mark.exists(), class_path
        tried += 1
    shutil.copytree(made/"bundle", bundle, dirs_exist_ok=True)
    config = yaml.safe_load((bundle/"config.yaml").read_text())
    config["model"]["init_args"]["network"] = dict(class_path="geoforecast.fire.benchmark.ResNetUNet", init_args=dict(pretrained=True))
    (bundle/"config.yaml").write_text(yaml.safe_dump(config))
    signed(bundle)
    refusal(lambda: load_bundle(bundle), "pretrained")
    ledger("foreign classes in a bundle", tried + 1, refused=tried + 1)


def test_a_foreign_class_of_another_name_would_be_seen(bundle, tmp_path, mark, monkeypatch):
    "The bundle above is refused for its class: with a class of the library it loads."
    trap(tmp_path, mark, monkeypatch)
    load_bundle(bundle)
    assert not mark.exists()


def test_no_configuration_imports_a_foreign_class(made, tmp_path, mark, monkeypatch, ledger, many):
    path = trap(tmp_path, mark, monkeypatch)
    for file in ("settings.yaml", "settings"): (tmp_path/file).write_text(f"class_path: {path}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GEOFORECAST_PACKAGES", raising=False)
    kept = dict(data_dir=str(made/"fires"), output_dir=str(tmp_path/"run"), **OPTIONS)
    base = compose("fire/unet", **kept)
    places = {"network": lambda c, v: c["model"]["init_args"].update(network=v), "model": lambda c, v: c.update(model=v), "data": lambda c, v: c.update(data=v), "logger": lambda c, v: c["trainer"].update(logger=v),
              "callbacks": lambda c, v: c["trainer"].update(callbacks=[v]), "strategy": lambda c, v: c["trainer"].update(strategy=v), "plugins": lambda c, v: c["trainer"].update(plugins=v)}
    tried = refused = 0
    for place, change in places.items():
        for kind, value in attacks(path, tmp_path/"settings.yaml").items():
            if not many and place != "network" and kind not in ("path", "json", "file"): continue
            forget()
            config = yaml.safe_load(yaml.safe_dump(base))
            change(config, value)
            (tmp_path/"mine.yaml").write_text(yaml.safe_dump(config))
            try: launch(str(tmp_path/"mine.yaml"))
            except GeoforecastError as e: assert "\n" not in str(e); refused += 1
            assert not mark.exists(), (place, kind, value)
            tried += 1
    for option in ("model.network", "model.loss", "model", "data", "trainer.logger", "trainer.callbacks", "network") if many else ("network", "data", "trainer.callbacks"):
        for value in (path, f"{{class_path: {path}}}", f"[{{class_path: {path}}}]", "./settings.yaml"):
            forget()
            try: launch("fire/unet", **kept | {option: value})
            except GeoforecastError: refused += 1
            assert not mark.exists(), (option, value)
            tried += 1
    ledger("foreign classes in a configuration", tried, refused=refused, not_imported=tried - refused)
    assert "GEOFORECAST_PACKAGES=foreignmodule" in refusal(lambda: launch("fire/unet", **kept | {"model.network": path}), path)


def test_a_package_of_ones_own_is_allowed_by_the_environment(tmp_path, mark, monkeypatch):
    path = trap(tmp_path, mark, monkeypatch)
    from geoforecast.learn.configuration import import_class
    monkeypatch.setenv("GEOFORECAST_PACKAGES", "mine, foreignmodule")
    assert import_class(path).__name__ == "Net" and mark.exists()
    refusal(lambda: import_class("otherpackage.Net"), "otherpackage")


@pytest.mark.parametrize("called", ["os.system", "subprocess.Popen", "builtins.exec", "torch.load", "torch.hub.load", "geoforecast.cli.main", "importlib.import_module"])
def test_no_callable_stands_for_a_class(called, made, tmp_path, mark, ledger):
    for options in ({"model.network": called}, {"model.network": f"{{class_path: {called}, init_args: {{command: 'touch {mark}', args: ['touch', '{mark}']}}}}"}, {"trainer.callbacks": f"[{{class_path: {called}}}]"}):
        refusal(lambda: launch("fire/unet", data_dir=str(made/"fires"), output_dir=str(tmp_path/"run"), **OPTIONS | options))
        assert not mark.exists()
    ledger("callables in the place of classes", 3, refused=3)


# YAML

TAGS = ("!!python/object/apply:os.system ['touch MARK']", "!!python/object/new:os.system ['touch MARK']", "!!python/name:os.system", "!!python/module:foreignmodule", "!!python/object:foreignmodule.Net {}",
        "!!python/object/apply:builtins.exec [\"open('MARK', 'w')\"]", "!!python/tuple [1]", "!!binary YQ==", "!os.system x")


def test_tags_of_yaml_make_nothing(bundle, tmp_path, mark, monkeypatch, ledger):
    trap(tmp_path, mark, monkeypatch)
    yaml.unsafe_load(TAGS[0].replace("MARK", str(mark)))
    assert mark.exists(), "the payload works"
    mark.unlink()
    tried = 0
    for tag in (t.replace("MARK", str(mark)) for t in TAGS):
        forget()
        (tmp_path/"mine.yaml").write_text(f"model: {tag}\n")
        for read in (lambda: compose(str(tmp_path/"mine.yaml")), lambda: compose("fire/unet", trainer=str(tmp_path/"mine.yaml"))):
            try: read()
            except GeoforecastError as e: assert "mine.yaml" in str(e) or "binary" in tag
            assert not mark.exists(), tag
        (bundle/"config.yaml").write_text(f"model: {tag}\n")
        signed(bundle)
        refusal(lambda: load_bundle(bundle), "config.yaml")
        for value in (lambda: parse_value(tag), lambda: compose("fire/unet", learning_rate=tag)):
            try: value()
            except GeoforecastError: pass
        assert not mark.exists(), tag
        tried += 5
    ledger("tags of YAML", tried, not_built=tried)


# Notebooks

def test_a_parameter_is_a_value_and_never_code(tmp_path, mark, monkeypatch, ledger):
    import nbformat
    from geoforecast.cli import main
    code = nbformat.v4.new_code_cell
    notebook = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    names = [f"p{i}" for i in range(8)]
    notebook.cells = [code("name: str = 'a'\noutput_dir: str = ''\n" + "\n".join(f"{n} = ''" for n in names), metadata=dict(tags=["parameters"])),
                      code("import json, pathlib\npathlib.Path(output_dir, 'seen.json').write_text(json.dumps([" + ", ".join(names) + "], default=str))")]
    nbformat.write(notebook, tmp_path/"walk.ipynb")
    call = f"__import__('os').system('touch {mark}')"
    texts = [call, f"'+{call}+'", f"\"+{call}+\"", f"\\'+{call}#", f"a\n{call}", f"'''+{call}+'''", f"{{{call}}}".replace("{", "[").replace("}", "]"), f"\"\\u0027+{call}+\\u0027\""]
    exec(texts[0])
    assert mark.exists()
    mark.unlink()
    words = [w for n, t in zip(names, texts) for w in ("-p", f"{n}={json.dumps(t)}")]
    assert main(["run", str(tmp_path/"walk.ipynb"), "--name", "x", "--output_dir", str(tmp_path/"out"), *words]) == 0
    assert json.loads((tmp_path/"out"/"seen.json").read_text()) == texts and not mark.exists()
    ledger("parameters of a notebook that are code", len(texts), a_value=len(texts))
