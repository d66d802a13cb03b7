"What to label next: ensembles, twins, painted masks, mixed folders, light brought to the training's, and the aerial scenes of Zurich where they are there."
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from geoforecast.core import BundleError, ConfigError, DataError
from geoforecast.learn.bundle import save_bundle
from geoforecast.learn.ensemble import Ensemble
from geoforecast.segmentation.active import Ranked, k_center, rank_tiles, read_tiles, select_tiles, tile_features, tile_uncertainty, write_selection
from geoforecast.segmentation.data import SegmentationDataModule
from geoforecast.segmentation.inputs import ImageInputs
from geoforecast.segmentation.landscape import landscape_classes
from geoforecast.segmentation.models import DeepLabV3Plus
from geoforecast.segmentation.patches import patchify
from geoforecast.segmentation.simulate import simulate_dataset
from geoforecast.segmentation.splits import read_selection
from geoforecast.segmentation.supervised import Supervised
from geoforecast.segmentation.tiles import find_scenes, open_scene, tiles_of, write_image

ZURICH = Path(os.environ.get('GEOFORECAST_DATA', Path(__file__).parents[2]/'shared'/'data'))/'segmentation'/'zurich'
MODEL = dict(class_path='geoforecast.segmentation.supervised.Supervised', init_args=dict(num_classes=7, network=dict(
    class_path='geoforecast.segmentation.models.DeepLabV3Plus', init_args=dict(encoder='tiny'))))


def untrained(seed=0):
    torch.manual_seed(seed)
    return Supervised(partial(DeepLabV3Plus, encoder='tiny'), num_classes=7, ema_decay=0.).eval()


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    return save_bundle(tmp_path_factory.mktemp('model')/'bundle', untrained(), dict(model=MODEL), dict(task='segmentation', size=64, classes=landscape_classes().to_dict()))


@pytest.fixture
def land(tmp_path): return simulate_dataset(tmp_path/'land', n_scenes=3, labelled=.34, size=128, seed=4)


def test_an_ensemble_is_asked_as_one(land):
    "Its uncertainty is that of the mean probability, its features are those of all members."
    members, tiles = [untrained(s) for s in (1, 2)], tiles_of(find_scenes(land)[0], 64)
    both = Ensemble(members).eval()
    raw = torch.cat(list(read_tiles(both.inputs, tiles)))
    with torch.inference_mode(): p = sum(m(raw).exp() for m in members)/2
    first, second = np.sort(p.numpy(), 1)[:, -2:].transpose(1, 0, 2, 3)[::-1]
    np.testing.assert_allclose(tile_uncertainty(both, tiles, batch_size=3), (1 - first + second).mean((1, 2)), atol=1e-4)
    torch.testing.assert_close(tile_features(both, tiles), torch.cat([tile_features(m, tiles) for m in members], 1), atol=1e-4, rtol=1e-4)


def test_batches_and_their_order_change_nothing(land):
    model, tiles = untrained(), tiles_of(find_scenes(land)[0], 48)
    scores = tile_uncertainty(model, tiles, 'entropy', batch_size=4)
    np.testing.assert_allclose(scores, tile_uncertainty(model, tiles[::-1], 'entropy', batch_size=1)[::-1], atol=1e-5)
    assert [r.tile for r in rank_tiles(model, tiles, 3, 'entropy')] == [tiles[i] for i in np.argsort(-scores)[:3]]


def test_scenes_in_another_light_are_brought_to_that_of_the_training(tmp_path):
    "An image and the same at half the contrast read alike; patches of one image share its light."
    rng = np.random.default_rng(0)
    image = rng.integers(60, 200, (3, 96, 96)).astype(np.float32)
    statistics = dict(bands=['red', 'green', 'blue'], dtype='float32', scaling=[[1, 0]]*3, low=[0]*3, high=[255]*3, mean=[.5]*3, std=[.2]*3)
    paths = [write_image(tmp_path/f'{name}.tif', values, photometric='rgb') for name, values in (('a', image), ('b', image/2 + 20))]
    tiles = [t for p in paths for t in tiles_of(open_scene(p), 48)]
    plain = ImageInputs().set_statistics(statistics)
    common = ImageInputs().set_statistics(statistics | dict(harmonise=True, moments=dict(mean=[100]*3, std=[30]*3)))
    a, b = torch.cat(list(read_tiles(plain, tiles))).chunk(2)
    assert (a - b).abs().mean() > 10
    a, b = torch.cat(list(read_tiles(common, tiles))).chunk(2)
    torch.testing.assert_close(a, b, atol=.05, rtol=0)
    assert abs(a.mean() - 100) < .1 and abs(a.std() - 30) < .1
    patches = sorted(patchify(paths[0], tmp_path/'patches', 48))
    cut = torch.cat(list(read_tiles(common, [tiles_of(open_scene(p), 48)[0] for p in patches])))
    torch.testing.assert_close(cut, a, atol=.05, rtol=0)


def test_a_labelled_picture_under_another_name_is_not_proposed(bundle, land, tmp_path):
    known = next(s for s in find_scenes(land) if s.labelled)
    write_image(land/'unlabelled'/'twin.png', known.read())
    assert not [t for t in select_tiles(bundle, land, tmp_path/'list.csv') if t.scene.name == 'twin']


def test_a_tile_with_some_labels_counts_as_labelled(bundle, land, tmp_path):
    "Where a mask says nothing, somebody still has to draw; this one is painted, and see-through there."
    scene, classes = next(s for s in find_scenes(land) if s.labelled), landscape_classes()
    ids = scene.read_mask()
    ids[:, 64:] = 255
    ids[0, 64] = 1
    write_image(scene.mask, np.concatenate([classes.to_colours(ids).transpose(2, 0, 1), 255*(ids != 255)[None].astype(np.uint8)]))
    chosen = [(t.row, t.column) for t in select_tiles(bundle, land, tmp_path/'list.csv') if t.scene.name == scene.name]
    assert chosen == [(64, 64)]


def test_images_of_another_kind_are_left_out(bundle, land, tmp_path):
    write_image(land/'unlabelled'/'deep.tif', np.ones((4, 64, 64), np.uint16))
    with pytest.warns(UserWarning, match='1 of 4 images are left out: .*deep.tif has 4 bands of uint16'): tiles = select_tiles(bundle, land, tmp_path/'list.csv')
    assert len(tiles) == 8 and 'deep' not in {t.scene.name for t in tiles}
    with pytest.raises(DataError, match='4 bands of uint16'): select_tiles(bundle, land/'unlabelled'/'deep.tif', tmp_path/'list.csv')


def test_nothing_left_to_label(bundle, land, tmp_path):
    with pytest.raises(DataError, match='no tile without a label'): select_tiles(bundle, land/'images', tmp_path/'a.csv', labels=_everything(land/'images', tmp_path/'all.csv'))
    assert not (tmp_path/'a.csv').exists()
    with pytest.raises(BundleError): select_tiles(land, land, tmp_path/'a.csv')
    (tmp_path/'odd.csv').write_text('scene,row,column,size\nnowhere.png,0,0,64\n')
    with pytest.raises(ConfigError, match="'nowhere.png'"): select_tiles(bundle, land, tmp_path/'a.csv', labels=tmp_path/'odd.csv')


def _everything(folder, path): return write_selection(path, [Ranked(t, 0.) for s in find_scenes(folder) for t in tiles_of(s, 64)], folder)


def test_a_training_takes_the_list_as_it_is(land, tmp_path):
    "The labels of the listed tiles are used, and no others; a hand-written list needs no score."
    simulate_dataset(tmp_path/'more', n_scenes=4, labelled=1., size=128, seed=8)
    options = dict(data_dir=str(tmp_path/'more'), size=64, unlabelled_batch_size=0)
    tiles = SegmentationDataModule(**options).tiles['train']
    path = write_selection(tmp_path/'list.csv', rank_tiles(untrained(), tiles, 5, 'coreset'), tmp_path/'more')
    chosen = {(t.scene.image.relative_to(tmp_path/'more').as_posix(), t.row, t.column, t.size) for t in SegmentationDataModule(**options, labels=str(path)).tiles['train']}
    assert chosen == set(read_selection(path)) and len(chosen) == 5
    (tmp_path/'hand.csv').write_text('\n'.join(','.join(line.split(',')[:4]) for line in path.read_text().splitlines()))
    grown = write_selection(tmp_path/'grown.csv', [], tmp_path/'more', earlier=tmp_path/'hand.csv')
    assert read_selection(grown) == read_selection(path)


def test_a_core_set_takes_each_candidate_once():
    "Also where candidates lie on each other, or where more are wanted than there are."
    assert sorted(k_center(torch.zeros(5, 2), 9, torch.zeros(1, 2))[0]) == list(range(5))
    points = torch.rand(9000, 4, generator=torch.Generator().manual_seed(0))
    chosen, distances = k_center(points, 40, points[:3])
    assert len(set(chosen)) == 40 and not {0, 1, 2} & set(chosen) and np.all(np.diff(distances) <= 1e-6)


@pytest.mark.skipif(not ZURICH.is_dir(), reason='no scenes of Zurich under GEOFORECAST_DATA or ../shared/data')
def test_zurich(tmp_path, bundle):
    "Tiles of the six scenes without a mask are proposed; the GeoTIFF of four bands is left out."
    with pytest.warns(UserWarning, match='sat14.tif'): tiles = select_tiles(bundle, ZURICH, tmp_path/'list.csv', n=20, size=256)
    assert len(tiles) == 20 and {t.scene.image.parent.name for t in tiles} == {'unlabelled'}
    assert len(read_selection(tmp_path/'list.csv')) == 20
