"Peak memory as the data grows sixteenfold: flat, but for what the figures say."
import statistics
import sys
import tempfile
from pathlib import Path

from timing import peak, row

sys.path.insert(0, str(Path(__file__).parents[1]))

RAIN = """
import dask.array as da, numpy as np, warnings, xarray as xr
from geoforecast.precipitation.data import PrecipitationDataModule
warnings.simplefilter("ignore")
def field(*shape): return da.ones(({size}, *shape), dtype=np.float32, chunks=(100, *shape))
ds = xr.Dataset(dict(TEM=(("time", "level", "lat", "lon"), 270*field(3, 60, 120), dict(units="K")), precipitation=(("time", "lat", "lon"), field(60, 120), dict(units="mm"))),
                dict(time=np.datetime64("2000-01-01", "ns") + np.arange({size})*np.timedelta64(12, "h"), level=("level", [500, 700, 850], dict(units="hPa")), lat=np.arange(60.), lon=np.arange(120.)))
mark()
data = PrecipitationDataModule(ds, memory_map="{folder}/stack", eval_batch_size=8)
data.setup("fit")
for loader in (data.train_dataloader(), data.fields("test")):
    for batch in loader: pass
"""

FIRES = """
import torch
from geoforecast.fire.channels import FireInputs
from geoforecast.fire.data import FireDataModule
from geoforecast.fire.evaluation import tally
from geoforecast.fire.models import Logistic, Persistence
torch.set_grad_enabled(False)
mark()
data = FireDataModule("{folder}", crop_size=64, samples_per_epoch=256, test_fires=["fire_0", "fire_1"], val_fires=["fire_2"])
data.setup("fit")
for batch in data.train_dataloader(): pass
inputs, first, second = FireInputs("all"), Persistence(), Logistic(46, 5)
inputs.set_statistics(data.statistics)
tally(dict(persistence=lambda batch: first(batch.inputs[:, -1, 22, None] > 0), logistic=lambda batch: second(inputs(batch.inputs))), data.dataset("train"))
"""

MOSAIC = """
import torch
from geoforecast.segmentation.classes import number_classes
from geoforecast.segmentation.mosaic import predict_scene
from geoforecast.segmentation.tiles import open_scene
from test_segmentation_mosaic import Network
mark()
predict_scene(Network().eval(), open_scene("{folder}/{size}.tif"), number_classes(3), "{folder}/map")
"""

PIXELS = """
import torch
from geoforecast.learn.metrics import BinaryScores
metric, seen = BinaryScores(), torch.Generator().manual_seed(0)
mark()
for _ in range({size}//2**18):
    logits = torch.randn(16, 1, 128, 128, generator=seen)
    metric.update(logits, (logits > 2).float(), torch.ones_like(logits, dtype=torch.bool))
metric.compute()
"""


def fires(folder, size):
    "Write fires that differ in their name only."
    from geoforecast.fire.simulate import simulate_fire
    from geoforecast.fire.wsts import write_fire
    made = simulate_fire(0, shape=(8, 64, 64))
    for i in range(size): write_fire(Path(folder)/f"fire_{i}.hdf5", made.data, made.dates, made.grid, f"fire_{i}")


def mosaic(folder, size):
    from test_segmentation_mosaic import PLACE, made_scene
    made_scene(Path(folder)/f"{size}.tif", size, 1024, **PLACE)


def nothing(folder, size): pass


REPEATS = 3  # Where and when freed memory goes back to the system differs from run to run

KINDS = {
    "length of a series of rain": ("steps of 60 x 120, 4 channels", RAIN, nothing, (1600, 6400, 25600)),
    "number of fires": ("fires of 8 x 64 x 64", FIRES, fires, (8, 32, 128)),
    "size of a mosaic": ("rows of 1024 pixels", MOSAIC, mosaic, (10240, 20480, 40960)),
    "number of scored pixels": ("pixels", PIXELS, nothing, (2**22, 2**24, 2**26)),
}


def measure():
    for what, (label, script, prepare, sizes) in KINDS.items():
        found = []
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                prepare(folder, size)
                found.append(statistics.median(peak(script.format(folder=folder, size=size)) for _ in range(REPEATS))/2**20)
        yield row("memory", f"{what}: {sizes[-1]:,} {label} beside {sizes[0]:,}", "<= 1.15", found[-1]/found[0], unit=f"of {found[0]:.0f} MiB")
        yield dict(curve=what, title=f"Peak memory against the {what}", x=list(sizes), x_label=label, y=found, y_label="MiB beyond the imports")
