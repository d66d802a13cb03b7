"Every kind of output, each with a function that prepares its writing and one that reads it back whole; and processes that die while they write."
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from hostile import detections
from killing import die, server

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def noise(version, *shape): return np.random.default_rng(version).random(shape, np.float32)


def digest(*arrays):
    total = hashlib.sha256()
    for a in arrays: total.update(np.ascontiguousarray(a).tobytes())
    return total.hexdigest()


def field(version):
    from geoforecast.geo.grid import Grid
    from geoforecast.geo.io import georeference
    return georeference(noise(version, 4, 200, 200), Grid("EPSG:32611", (375, 0, 300000, 0, -375, 4125000), 200, 200), ("band", "y", "x"), dict(band=list("abcd")), name="noise")


def make_json(version):
    from geoforecast.core import write_json
    return lambda path: write_json(path, dict(ap=noise(version, 20_000)))


def make_table(version):
    from geoforecast.learn.callbacks import _keep_row
    return lambda path: _keep_row(path, dict(epoch=0, step=version) | {f"val/{i}": float(v) for i, v in enumerate(noise(version, 10_000))})


def make_field(name):
    def make(version):
        from geoforecast.geo import io
        data = field(version)
        return lambda path: getattr(io, f"write_{name}")(path, data)
    return make


def make_map(version):
    from geoforecast.geo.maps import save_figure
    from matplotlib.figure import Figure
    figure = Figure()
    figure.add_subplot().imshow(noise(version, 200, 200))
    return lambda path: save_figure(path, figure)


def forecaster(version):
    import torch
    from geoforecast.learn.bundle import _build
    from geoforecast.learn.configuration import compose
    torch.manual_seed(version)
    config = compose("fire/unet", hidden_dims=[16, 32], ema_decay=0)
    return _build(dict(model=config["model"]), Path("here")).eval(), config


def make_bundle(version):
    from geoforecast.learn.bundle import save_bundle
    model, config = forecaster(version)
    return lambda path: save_bundle(path, model, config, dict(task="fire", version=version), scores=[dict(model="UNet", split="test", ap=float(version))])


def make_results(version):
    from geoforecast.learn.bundle import save_results
    model, config = forecaster(version)
    return lambda path: save_results(path, model, config, dict(task="fire", version=version), {}, [dict(model="UNet", split="test", ap=float(version))])


def make_checkpoint(version):
    import torch
    from geoforecast.learn.callbacks import WholeCheckpoints
    state = dict(state_dict=dict(weight=torch.from_numpy(noise(version, 500, 500))), global_step=version)
    return lambda path: WholeCheckpoints().save_checkpoint(state, path)


def make_fire(version):
    from geoforecast.fire.wsts import write_fire
    from geoforecast.geo.grid import Grid
    data = noise(version, 4, 23, 32, 32)
    return lambda path: write_fire(path, data, np.datetime64("2020-08-01") + np.arange(4), Grid("EPSG:32610", (375, 0, 5e5, 0, -375, 4e6), 32, 32), "noise")


def make_image(version):
    from geoforecast.segmentation.tiles import write_image
    values = (255*noise(version, 3, 300, 300)).astype(np.uint8)
    return lambda path: write_image(path, values, compress="deflate")


def make_outlines(version):
    from geoforecast.segmentation.classes import number_classes
    from geoforecast.segmentation.mosaic import write_polygons
    from geoforecast.segmentation.tiles import write_image
    values = (3*noise(version, 1, 60, 60)).astype(np.uint8)

    def write(path):
        classes = path.parent.parent/f"classes_{version}.tif"
        if not classes.exists(): write_image(classes, values)
        write_polygons(path, classes, number_classes(3))
    return write


def make_notebook(version):
    from geoforecast.notebooks import _write
    from nbformat.v4 import new_code_cell, new_notebook
    nb = new_notebook(cells=[new_code_cell(str(noise(version, 20_000).tolist()), id="noise")])
    return lambda path: _write(nb, path)


def read_field(name):
    def read(path):
        from geoforecast.geo import io
        data = getattr(io, f"read_{name}")(path)
        return digest((data if name == "geotiff" else data.noise).values)
    return read


def read_map(path):
    from matplotlib.image import imread
    return digest(imread(path))


def read_bundle(path):
    from geoforecast.learn.bundle import load_bundle
    bundle = load_bundle(path)
    assert bundle.metadata["version"] == bundle.scores[0]["ap"]
    return digest(*(v.numpy() for v in bundle.forecaster.state_dict().values()))


def read_checkpoint(path):
    import torch
    return digest(torch.load(path, weights_only=True)["state_dict"]["weight"].numpy())


def read_fire(path):
    from geoforecast.fire.wsts import open_fire
    return digest(open_fire(path).read(slice(None)))


def read_image(path):
    import rasterio
    with rasterio.open(path) as f: return digest(f.read())


def read_outlines(path):
    import sqlite3
    from contextlib import closing
    with closing(sqlite3.connect(path)) as db: return str(db.execute("SELECT class_id, geom FROM polygons ORDER BY fid").fetchall())


def read_table(path):
    from geoforecast.learn.callbacks import read_metrics
    return str(read_metrics(path))


def read_run(path):
    "The version of each file of a run."
    from geoforecast.learn.bundle import load_bundle
    card = (path/"model_card.md").read_text()
    return [int(v) for v in (json.loads((path/"scores.json").read_text())[0]["ap"], load_bundle(path/"bundle").metadata["version"],
                             json.loads((path/"metadata.json").read_text())["version"], card.partition("- version: ")[2].partition("\n")[0])]


class Output(NamedTuple):
    "One kind of output."
    name: str  # Of the file or folder
    make: Callable  # Version to a function that writes it to a path
    read: Callable  # Path to what tells versions apart; fails for half an output


OUTPUTS = {o.name: o for o in (
    Output("scores.json", make_json, lambda path: str(json.loads(path.read_text()))), Output("metrics.csv", make_table, read_table), Output("predictions.nc", make_field("netcdf"), read_field("netcdf")),
    Output("predictions.zarr", make_field("zarr"), read_field("zarr")), Output("predictions.tif", make_field("geotiff"), read_field("geotiff")), Output("map.png", make_map, read_map),
    Output("bundle", make_bundle, read_bundle), Output("latest.ckpt", make_checkpoint, read_checkpoint), Output("fire.hdf5", make_fire, read_fire), Output("scene.tif", make_image, read_image),
    Output("polygons.gpkg", make_outlines, read_outlines), Output("run.ipynb", make_notebook, lambda path: json.loads(path.read_text())["cells"][0]["source"]),
    Output("run", make_results, read_run))}


def fire_forecast(folder):
    import geoforecast.fire.prediction as task
    from geoforecast.fire.wsts import write_fire
    from geoforecast.geo.grid import Grid
    data = write_fire(folder/"fire.hdf5", detections(), np.datetime64("2020-09-01") + np.arange(8), Grid("EPSG:32611", (375, 0, 269625, 0, -375, 4178250), 6, 7), "fire")
    return task, forecaster(0)[0], {}, data


def rain_forecast(folder):
    import geoforecast.precipitation.prediction as task
    from geoforecast.geo.io import write_netcdf
    from geoforecast.precipitation.channels import channels_of
    from geoforecast.precipitation.forecaster import PrecipitationForecaster
    from geoforecast.precipitation.heads import MeanHead
    from geoforecast.precipitation.models import UNet
    from geoforecast.precipitation.normalize import PrecipitationInputs
    from geoforecast.precipitation.simulate import simulate_atmosphere
    atmosphere = simulate_atmosphere(n_times=8, lat=(30., 45.), lon=(100., 125.), levels=(500, 850), variables=("DPT", "TEM"), seed=3)
    names = channels_of(atmosphere)
    model = PrecipitationForecaster(partial(UNet, hidden_dims=[4, 8]), PrecipitationInputs(names), MeanHead("log"), window_size=2, ema_decay=0).eval()
    model.set_statistics(dict(mean=[0.]*len(names), std=[1.]*len(names), rain_scale=1., lat=atmosphere.lat.values))
    return task, model, dict(region=None, step="12h", coarsen=1), write_netcdf(folder/"rain.nc", atmosphere)


def land_forecast(folder):
    import geoforecast.segmentation.mosaic as task
    from geoforecast.segmentation.classes import number_classes
    from geoforecast.segmentation.inputs import ImageInputs
    from geoforecast.segmentation.supervised import Learner
    from torch import nn

    class Sign(nn.Module):
        "Two classes by the sign of three bands."
        window_size, averaging, inputs = Learner.window_size, Learner.averaging, ImageInputs()
        def forward(self, raw, time=None): return self.inputs(raw)[:, :2].log_softmax(1)

    make_image(0)(folder/"land.tif")
    return task, Sign().eval(), dict(classes=number_classes(2).to_dict(), size=64), folder/"land.tif"


# Task to a function of a folder: the module that forecasts, a model, what its bundle knows, a file to forecast
FORECASTS = dict(fire=fire_forecast, precipitation=rain_forecast, segmentation=land_forecast)


def watched(folder, n):
    "Die at the `n`-th event below a folder: a file opened, flushed, renamed or deleted; return what counts them."
    count = itertools.count(1)
    seen = lambda: next(count) == n and die()
    sys.addaudithook(lambda event, args: event in EVENTS and any(str(folder) in str(a) for a in args[:2]) and seen())
    fsync = os.fsync
    os.fsync = lambda handle: (seen(), fsync(handle))
    return count


def _write(name, path, version, event, moment, pipe):
    write = OUTPUTS[name].make(version)
    count = watched(path.parent, event)
    if moment:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, moment)
    began = time.perf_counter()
    write(path)
    signal.setitimer(signal.ITIMER_REAL, 0)
    pipe.send((next(count) - 1, time.perf_counter() - began))


def write_and_die(name: str, path: Path, version: int, event: int = 0, moment: float = 0.) -> tuple[int, float] | None:
    "Write in a fresh process that dies at an event or at a moment; return how many events and seconds it took where it came to the end."
    mine, theirs = multiprocessing.Pipe()
    process = server.Process(target=_write, args=(name, path, version, event, moment, theirs))
    process.start()
    theirs.close()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL, -signal.SIGALRM), (name, process.exitcode)
    return mine.recv() if process.exitcode == 0 else None


def try_disk(disk, place, kind):
    "Write every output on a disk, then anew in a place that is full or takes nothing, and print how that ended."
    for output in (o for o in OUTPUTS.values() if o.name != "run"):
        folder, filler = output.name.replace(".", "_"), disk/"filler"
        output.make(0)(disk/folder/output.name)
        before, write = output.read(disk/folder/output.name), output.make(1)
        if kind == "full":
            with open(filler, "wb", buffering=0) as f:
                try:
                    while f.write(bytes(10_000)): pass
                except OSError: f.truncate(f.tell() - 40_000)
        try: error, text = "none", str(write(place/folder/output.name))
        except Exception as e: error, text = type(e).__name__, str(e)
        filler.unlink(missing_ok=True)
        print(json.dumps(dict(name=output.name, disk=kind, kind=error, text=text, same=output.read(disk/folder/output.name) == before, left=[p.name for p in (disk/folder).iterdir()])), flush=True)


if __name__ == "__main__":
    disk, read_only = map(Path, sys.argv[1:])
    try_disk(disk, disk, "full")
    try_disk(disk, read_only, "read-only")
