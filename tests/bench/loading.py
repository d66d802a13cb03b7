"Data: the loaders beside plain ones, and how long a training waits for them."
import sys
import tempfile
import warnings
from pathlib import Path

import h5py
import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from geoforecast.fire.channels import BANDS, FireInputs
from geoforecast.fire.data import FireWindows
from geoforecast.fire.protocols import seek_fire
from geoforecast.fire.simulate import simulate_fires
from geoforecast.fire.windows import windows_of
from geoforecast.fire.wsts import open_fire
from geoforecast.learn.callbacks import read_metrics
from geoforecast.learn.launch import launch
from geoforecast.learn.loading import AheadLoader, as_is
from geoforecast.precipitation.data import PrecipitationDataset, stack_series, step_of, uniform_windows
from geoforecast.segmentation.data import SegmentationDataModule
from geoforecast.segmentation.simulate import simulate_dataset
from timing import interleaved, ratio, row

DAYS, CROP, BATCH = 5, 128, 16
ANGLES, LAND_COVER, HOUR = [i for i, b in enumerate(BANDS) if b.transform == "angle"], 16, 22


class PlainFires(Dataset):
    "Read T+1 whole frames, transform all of them, then crop: the benchmark's 40 channels from their definition."
    def __init__(self, windows, fires, mean, std):
        self.windows, self.fires, self.mean, self.std = windows, fires, mean[:HOUR + 1, None, None], std[:HOUR + 1, None, None]

    def __len__(self): return len(self.windows)

    def __getitem__(self, key):
        (position, seed), rng = key, np.random.default_rng(key[1])
        fire, day = self.windows[position]
        with h5py.File(self.fires[fire].path) as f: frames = torch.from_numpy(f["data"][day - DAYS + 1:day + 2])
        inputs, burns = frames[:-1], frames[-1, HOUR] > 0
        top, left = seek_fire(inputs[:, HOUR].numpy(), burns.numpy(), CROP, rng)
        left_right, upside_down, turns = rng.random() > .5, rng.random() > .5, int(4*rng.random())
        angles = inputs[:, ANGLES]
        if left_right: angles = 360 - angles
        if upside_down: angles = (180 - angles) % 360
        inputs[:, ANGLES] = (angles - 90*turns) % 360
        square = slice(top, top + CROP), slice(left, left + CROP)
        channels, target = self.transform(inputs)[:, :, *square], burns[square].float()
        axes = [-1]*left_right + [-2]*upside_down
        return tuple(torch.rot90(x.flip(axes), turns, (-2, -1)).contiguous() for x in (channels, target))

    def transform(self, x):
        active, cover = x[:, HOUR:] > 0, x[:, LAND_COVER].nan_to_num().long()
        classes = F.one_hot((cover - 1) % 17, 17).permute(0, 3, 1, 2)
        angles = torch.sin(torch.deg2rad(x[:, ANGLES]))
        x = (x - self.mean)/self.std
        x[:, ANGLES] = angles
        return torch.cat([x[:, :LAND_COVER], classes, x[:, LAND_COVER + 1:], active], 1).nan_to_num(0.)


def fire_loaders(folder, n=3, shape=(10, 200, 250)):
    "The plain loader, ours, and the module that expands raw bands, over the same simulated fires and the same draws."
    fires = [open_fire(p) for p in simulate_fires(folder, n, (2020,), shape=shape)]
    windows, inputs = windows_of(fires, DAYS), FireInputs("all", "wsts")
    inputs.mean.copy_(torch.linspace(-1, 5, len(BANDS)))
    inputs.std.copy_(torch.linspace(.5, 20, len(BANDS)))
    order = [(i % len(windows), i) for i in range(4*BATCH)]
    plain = DataLoader(PlainFires(windows, fires, inputs.mean, inputs.std), BATCH, sampler=order)
    ours = AheadLoader(FireWindows(fires, windows, DAYS, CROP, crop_choice="fire_seeking"), BATCH, sampler=order, collate_fn=as_is)
    return plain, ours, inputs


def check_equal(plain, ours, inputs):
    "Raise `AssertionError` unless both loaders give the same 40 channels and targets."
    for (channels, target), batch in zip(plain, ours):
        torch.testing.assert_close(inputs(batch.inputs), channels, rtol=0, atol=1e-6)
        assert torch.equal(batch.target[:, 0], target)


def use(loader, then=lambda batch: None):
    for batch in loader: then(batch)


def fire_rows():
    with tempfile.TemporaryDirectory() as folder:
        plain, ours, inputs = fire_loaders(folder)
        check_equal(plain, ours, inputs)
        workers = DataLoader(plain.dataset, BATCH, sampler=plain.sampler, num_workers=2)
        seconds = interleaved(dict(plain=lambda: use(plain), channels=lambda: use(ours, lambda batch: inputs(batch.inputs)), raw=lambda: use(ours), workers=lambda: use(workers)), 5, 1)
    rate = 4*BATCH/np.array(seconds["plain"])
    yield row("loading", "fire: plain loader of whole frames, 40 channels", "", float(np.median(rate)), unit="samples/s")
    for name, aim, what in (("channels", ">= 5", "40 channels: crops, expanded on the CPU"), ("raw", ">= 12", "23 raw bands, to be expanded on the model's device")):
        yield row("loading", f"fire: {what}", aim, **ratio(seconds["plain"], seconds[name]))
    yield row("loading", "fire: 40 channels, beside the plain loader with two processes", "", **ratio(seconds["workers"], seconds["channels"]), unit="times that one's rate")


def rain_rows():
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from test_precipitation_data import by_isel, made
    for size, aim in (((("DPT", "GPH", "TEM"), 3, 6, 9, 500), ">= 50"), ((("DPT", "GPH", "TEM", "U", "V"), 11, 61, 221, 24), ">= 8")):
        ds, keys = made(*size), [0, 5, 10, 15]
        data = PrecipitationDataset(stack_series(ds), ds.time.values, uniform_windows(ds.time.values, step_of(ds))[0])
        assert np.array_equal(data.__getitems__(keys).inputs[1], by_isel(ds, 5)[0])
        seconds = interleaved(dict(isel=lambda: [by_isel(ds, i) for i in keys], ours=lambda: data.__getitems__(keys)), 31)
        yield row("loading", f"rain: windows of {len(data.stack.values[0])} x {size[2]} x {size[3]} beside isel().values", aim, **ratio(seconds["isel"], seconds["ours"]))


def tile_rows():
    with tempfile.TemporaryDirectory() as folder:
        simulate_dataset(folder, 6, size=768)
        data = SegmentationDataModule(folder, unlabelled_batch_size=0)
        data.setup("fit")
        tiles = data.tiles["train"]
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        def decode():
            for tile in tiles:
                window = rasterio.windows.Window.from_slices(*tile.window)
                with rasterio.open(tile.scene.image) as f: f.read(window=window).astype(np.float32)
                with rasterio.open(tile.scene.mask) as f: f.read(window=window)
        loader = AheadLoader(data.dataset("train"), data.batch_size, collate_fn=as_is)
        seconds = interleaved(dict(decode=decode, ours=lambda: use(loader)))
        yield row("loading", "land cover: tiles of 256 beside decoding them in the loop", "", **ratio(seconds["decode"], seconds["ours"]))


def waiting_rows():
    from geoforecast.precipitation.simulate import simulate_atmosphere
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        simulate_fires(folder/"fires", 6, shape=(10, 100, 100))
        simulate_atmosphere(n_times=600).to_netcdf(folder/"rain.nc")
        simulate_dataset(folder/"scenes", 6, size=512)
        short = {
            "fire/unet": dict(data_dir=folder/"fires", samples_per_epoch=160, max_epochs=2),
            "precipitation/simvp": dict(data_dir=folder/"rain.nc", validation_frequency=10, max_epochs=2),
            "segmentation/consistency_small": dict(data_dir=folder/"scenes", eval_every=10, save_latest_every=10, max_steps=20)}
        for config, options in short.items():
            options = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
            run = launch(config, output_dir=str(folder/config), **options)
            run.fit()
            yield row("loading", f"training {config}: share of the time that it waits for data", "<= 0.05", read_metrics(run.folder/"metrics.csv")[-1]["waiting_for_data"], unit="of the last epoch")


def measure():
    torch.set_grad_enabled(False)
    for rows in (fire_rows, rain_rows, tile_rows): yield from rows()
    torch.set_grad_enabled(True)
    yield from waiting_rows()
