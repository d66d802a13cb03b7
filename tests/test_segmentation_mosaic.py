"Maps of mosaics: no seams, the image's place and missing pixels, memory that does not grow, files whole or absent. Real data is skipped where absent."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio import Affine

from geoforecast.core import ConfigError, DataError
from geoforecast.learn.bundle import Bundle
from geoforecast.nn.tiling import blend_weights
from geoforecast.segmentation.classes import number_classes
from geoforecast.segmentation.inputs import ImageInputs
from geoforecast.segmentation.models import DeepLabV3Plus
from geoforecast.segmentation.mosaic import choose_bands, forecast_bundle, nodata_of, predict_scene, stream_mosaic, write_polygons
from geoforecast.segmentation.simulate import simulate_mosaic
from geoforecast.segmentation.supervised import Learner
from geoforecast.segmentation.tiles import open_scene, write_image

DATA = Path(os.environ.get('GEOFORECAST_DATA', Path(__file__).parents[2]/'shared'/'data'))
PLACE = dict(crs='EPSG:32632', transform=Affine(.6000000000000894, 0, 465595.79999999964, 0, -.5999999999988022, 5245788.599999997))


class Network(torch.nn.Module):
    "Raw bands to log probabilities, by a small network with weights drawn by a seed, or by the sign of the first band where there is none."
    window_size, averaging = Learner.window_size, Learner.averaging

    def __init__(self, network=None, bands=3):
        super().__init__()
        self.network, self.inputs = network, ImageInputs([f'band_{i + 1}' for i in range(bands)] if bands != 3 else None)

    def forward(self, raw, time=None):
        x = self.inputs(raw)
        return (torch.cat([x[:, :1], -x[:, :1], x[:, :1]*0], 1) if self.network is None else self.network(x)).log_softmax(1)


@pytest.fixture(scope='module')
def deep():
    "A DeepLabV3+ that looks far, with norms that have seen some data."
    torch.manual_seed(0)
    network = DeepLabV3Plus(3, 4, encoder='tiny')
    for _ in range(5): network(torch.randn(4, 3, 64, 64))
    return Network(network).eval()


def made_scene(path, height, width, seed=0, **profile):
    noise = np.random.default_rng(seed).normal(size=(3, height//16 + 2, width//16 + 2)).repeat(16, 1).repeat(16, 2)[:, :height, :width]
    return open_scene(write_image(path, np.clip(128 + 50*noise, 1, 255).astype('uint8'), **profile))


def read(path):
    with rasterio.open(path) as f: return f.read(1)


def blended(forecaster, image, num_classes, **options):
    "The whole map of probabilities."
    whole = torch.full((num_classes, *image.shape[1:]), -1.)
    predict = torch.inference_mode()(lambda raw: forecaster(raw).exp())
    for rows, cols, p in stream_mosaic(predict, lambda r, c: image[:, r, c], *image.shape[1:], num_classes, **options):
        assert (whole[:, rows, cols] == -1).all() # no rectangle comes twice
        whole[:, rows, cols] = p
    return whole


def test_no_seams(deep, tmp_path):
    "In the interior of a large window, blended small windows say what it says, and their borders cannot be told from other lines."
    image = torch.from_numpy(made_scene(tmp_path/'a.png', 384, 384).read().astype('float32'))
    with torch.inference_mode(): single = deep(image[None])[0].exp()
    inner, jump = slice(64, 320), {}
    for overlap in (0, 64):
        p = blended(deep, image, 4, size=128, overlap=overlap, stripe=200)
        torch.testing.assert_close(p.sum(0), torch.ones(384, 384), atol=1e-5, rtol=0)
        starts, _ = blend_weights(384, 128, overlap)
        border = [s - 1 for s in starts if s]
        jump[overlap] = (p - single).diff(dim=2)[:, inner, border].abs().mean()
        if overlap: assert (p - single)[:, inner, inner].abs().mean() < .05
    assert jump[64] < jump[0]/4


def test_one_window_is_the_network_itself(deep, tmp_path):
    scene = made_scene(tmp_path/'a.tif', 128, 128, **PLACE)
    files = predict_scene(deep, scene, number_classes(4), tmp_path/'map', size=128)
    with torch.inference_mode(): p = deep(torch.from_numpy(scene.read()[None].astype('float32')))[0].exp().numpy()
    np.testing.assert_allclose(read(files[1]), p.max(0), atol=6e-4)
    assert (read(files[0]) == p.argmax(0)).mean() > .999


@pytest.mark.parametrize('height, width, size, overlap, stripe', [(300, 331, 96, 24, 128), (97, 500, 96, 95, 64), (50, 40, 96, 0, 2048), (1, 1, 32, 8, 1), (96, 192, 96, 48, 96)])
def test_weights_sum_to_one_everywhere(height, width, size, overlap, stripe):
    flat = lambda raw: torch.tensor([.5, .3, .2]).log()[None, :, None, None].expand(len(raw), 3, size, size)
    p = blended(flat, torch.zeros(2, height, width), 3, size=size, overlap=overlap, stripe=stripe, batch_size=3)
    torch.testing.assert_close(p, torch.tensor([.5, .3, .2])[:, None, None].expand_as(p), atol=1e-5, rtol=0)


@pytest.mark.parametrize('dtype, nodata', [('uint8', None), ('uint8', 0), ('uint8', 255), ('uint16', 65535), ('int16', -9999), ('float32', float('nan')), ('float32', -9999.), ('float32', None)])
def test_place_and_missing_pixels_are_the_image_s(tmp_path, dtype, nodata):
    values = np.random.default_rng(1).integers(1, 200, (3, 90, 70)).astype(dtype)
    if nodata is not None: values[:, 20:60, :33] = nodata
    elif dtype == 'float32': values[1, 20:60, :33] = np.nan
    scene = open_scene(write_image(tmp_path/'a.tif', values, nodata=nodata, **PLACE))
    network = Network()
    network.inputs.set_statistics(dict(bands=list(scene.bands), dtype=dtype, scaling=[[1, 0]]*3, low=[0]*3, high=[200]*3, mean=[.5]*3, std=[.3]*3))
    files = predict_scene(network, scene, number_classes(3), tmp_path/'map', size=32)
    with rasterio.open(scene.image) as source, rasterio.open(files[0]) as classes, rasterio.open(files[1]) as confidence:
        for f in (classes, confidence):
            assert (f.crs, f.transform, f.shape) == (source.crs, source.transform, source.shape)
            np.testing.assert_array_equal(f.dataset_mask() > 0, scene.valid())
        assert set(np.unique(classes.read(1)[scene.valid()])) <= {0, 1, 2}
        if nodata is None and dtype != 'float32': assert classes.nodata is confidence.nodata is None
        elif nodata is not None and nodata == nodata: assert confidence.nodata == nodata
        assert classes.nodata == (255 if nodata is not None or dtype == 'float32' else None)


def test_transparent_pixels_are_missing(tmp_path):
    opaque = np.full((1, 64, 64), 255, 'uint8'); opaque[:, :20] = 0
    scene = open_scene(write_image(tmp_path/'a.png', np.concatenate([np.full((3, 64, 64), 99, 'uint8'), opaque])))
    files = predict_scene(Network(), scene, number_classes(3), tmp_path/'map', size=32)
    for path in files:
        with rasterio.open(path) as f: np.testing.assert_array_equal(f.dataset_mask(), opaque[0])


def test_turned_and_placeless_images_keep_what_they_have(tmp_path):
    turned = Affine(.5, .2, 465595.8, .2, -.5, 5245788.6)
    for name, profile in dict(turned=dict(crs='EPSG:32632', transform=turned), none={}).items():
        scene = made_scene(tmp_path/f'{name}.tif', 60, 80, **profile)
        bundle = Bundle(tmp_path, Network(), {}, dict(classes=number_classes(3).to_dict(), size=32), {}, [])
        made = forecast_bundle(bundle, scene.image, tmp_path/'out', visualize=True)
        with rasterio.open(scene.image) as source, rasterio.open(made[0]) as f: assert (f.crs, f.transform) == (source.crs, source.transform)
        assert sum(c['share'] for c in json.loads(made[-1].read_text())['classes']) == pytest.approx(1)


def test_an_interrupted_map_leaves_what_was_there(deep, tmp_path):
    scene = made_scene(tmp_path/'a.tif', 200, 200, **PLACE)
    before = [f.read_bytes() for f in predict_scene(deep, scene, number_classes(4), tmp_path/'map', size=64)]
    class Stops(Network):
        left = 3
        def forward(self, raw, time=None):
            self.left -= 1
            if not self.left: raise KeyboardInterrupt
            return deep(raw)
    with pytest.raises(KeyboardInterrupt): predict_scene(Stops(), scene, number_classes(4), tmp_path/'map', size=64, batch_size=1)
    assert sorted(p.name for p in (tmp_path/'map').iterdir()) == ['classes.tif', 'confidence.tif']
    assert [(tmp_path/'map'/n).read_bytes() for n in ('classes.tif', 'confidence.tif')] == before
    with pytest.raises(KeyboardInterrupt): predict_scene(Stops(), scene, number_classes(4), tmp_path/'none', size=64, batch_size=1)
    assert not list((tmp_path/'none').iterdir())


def test_what_does_not_fit_is_refused(tmp_path):
    scene = made_scene(tmp_path/'a.tif', 40, 40)
    wanted = dict(bands=['red', 'green', 'blue'], dtype='uint8')
    with pytest.raises(DataError, match='uint16'): choose_bands(scene, wanted | dict(dtype='uint16'))
    with pytest.raises(DataError, match='bands=4,1,2'): choose_bands(scene, wanted, (4, 1, 2))
    with pytest.raises(ConfigError, match='names 5'): predict_scene(Network(), scene, number_classes(5), tmp_path/'map', size=32)
    with pytest.raises(ConfigError, match='overlap'): predict_scene(Network(), scene, number_classes(3), tmp_path/'map', size=32, overlap=32)
    bundle = Bundle(tmp_path, Network(), {}, dict(classes=number_classes(3).to_dict(), size=32), {}, [])
    other = open_scene(write_image(tmp_path/'b.png', np.ones((1, 40, 40), 'uint8')))
    with pytest.raises(DataError, match='b.png'): forecast_bundle(bundle, [scene.image, other.image], tmp_path/'out')
    assert not (tmp_path/'out').exists() # nothing is begun that cannot be ended
    with pytest.raises(ConfigError, match='views'): predict_scene(Network(), scene, number_classes(3), tmp_path/'map', size=32, views=9)
    assert nodata_of(scene, 3) == (None, None)


def test_gdal_reads_the_polygons(tmp_path):
    pyogrio = pytest.importorskip('pyogrio')
    ids = np.kron(np.array([[0, 1], [2, 255]]), np.ones((40, 40))).astype('uint8')
    path = write_polygons(tmp_path/'p.gpkg', write_image(tmp_path/'c.tif', ids, nodata=255, **PLACE), number_classes(3))
    about = pyogrio.read_info(path)
    assert (about['features'], about['crs'], about['geometry_type']) == (3, 'EPSG:32632', 'Polygon')


PEAK = '''
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_segmentation_mosaic import Network, number_classes, open_scene, predict_scene, simulate_mosaic
torch.set_num_threads(1)
scene = open_scene(simulate_mosaic({folder!r}, {height}, {width}, landscapes=1))
predict_scene(Network(), scene, number_classes(3), Path({folder!r})/'map', size=256, overlap=16)
print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])'''


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='the peak of one process alone is read from /proc')
def test_memory_does_not_grow_with_the_mosaic(tmp_path):
    "Six times the pixels, three times as wide: the probabilities of the whole map would take 120 MB more."
    peaks = []
    for height, width in ((1000, 2000), (2000, 6000)):
        code = PEAK.format(tests=str(Path(__file__).parent), folder=str(tmp_path/str(width)), height=height, width=width)
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1])//1024)
    assert peaks[1] - peaks[0] < 70, peaks


@pytest.mark.skipif(not (DATA/'segmentation'/'zurich'/'geotiff'/'sat14.tif').is_file(), reason='no zurich under GEOFORECAST_DATA or ../shared/data')
def test_real_geotiff(tmp_path):
    scene = open_scene(DATA/'segmentation'/'zurich'/'geotiff'/'sat14.tif')
    network = Network(bands=4)
    network.inputs.set_statistics(scene.channels() | dict(low=[0]*4, high=[2000]*4, mean=[.3]*4, std=[.2]*4))
    bundle = Bundle(tmp_path, network, {}, dict(task='segmentation', classes=number_classes(3).to_dict(), size=128), {}, [])
    files = forecast_bundle(bundle, scene.image, tmp_path/'out', visualize=True)
    assert [f.name for f in files] == ['classes.tif', 'confidence.tif', 'polygons.gpkg', 'map.png', 'metadata.json']
    with rasterio.open(scene.image) as source, rasterio.open(files[0]) as f:
        assert (f.crs, f.transform, f.shape, f.nodata) == (source.crs, source.transform, source.shape, source.nodata)
        assert f.colormap(1)[1][:3] == number_classes(3).colours[1] and f.profile['compress'] == 'deflate' and f.profile['tiled']
