"Aerial scenes of Zurich read from the first call, and what a notebook cannot hold of tiles: killed cuts, strange files. Real data are skipped where absent."
import os
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from geoforecast.core import DataError
from geoforecast.segmentation import patches, splits
from geoforecast.segmentation.check import describe_folder
from geoforecast.segmentation.classes import IGNORE, ClassMapping, number_classes
from geoforecast.segmentation.patches import patchify
from geoforecast.segmentation.splits import duplicates, split_tiles, without_leaks
from geoforecast.segmentation.tiles import find_classes, find_scenes, open_scene, tiles_of, write_image

ZURICH = Path(os.environ.get('GEOFORECAST_DATA', Path(__file__).parents[2]/'shared'/'data'))/'segmentation'/'zurich'
zurich = pytest.mark.skipif(not ZURICH.is_dir(), reason='no scenes of Zurich under GEOFORECAST_DATA or ../shared/data')


@pytest.fixture(scope='module')
def scenes(): return {s.name: s for s in find_scenes(ZURICH)}


@zurich
def test_zurich_scenes(scenes):
    assert len(scenes) == 9
    assert {n: s.mask and s.mask.name for n, s in scenes.items() if s.labelled} == {'zh02': 'zh02.png', 'zh14': 'zh14.png', 'sat14': 'gt14.tif'}
    assert (scenes['zh02'].shape, scenes['zh02'].bands, scenes['zh02'].dtype, scenes['zh02'].crs) == ((817, 832), ('red', 'green', 'blue'), 'uint8', None)
    sat = scenes['sat14']
    assert (len(sat.bands), sat.dtype, sat.grid.crs) == (4, 'uint16', 'EPSG:32632')
    with rasterio.open(sat.image) as f: np.testing.assert_array_equal(sat.read((slice(100, 150), slice(700, 782))), f.read()[:, 100:150, 700:782])


@zurich
@pytest.mark.parametrize('name,counts', [('zh02', [51232, 41927, 56802, 38693, 6021, 259689, 33041]), ('zh14', [86744, 114932, 26744, 5751, 0, 142198, 0])])
def test_zurich_masks(scenes, name, counts):
    scene, mapping = scenes[name], find_classes(ZURICH, list(scenes.values()))
    mask = scene.read_mask(mapping=mapping)
    assert len(mapping) == 7 and np.bincount(mask.ravel(), minlength=256)[:7].tolist() == counts
    np.testing.assert_array_equal(mask, np.array(Image.open(scene.mask)))
    assert scene.complete and (scene.read() == 0).all(0).any(), 'shadows are black and yet data'


@zurich
def test_zurich_same_scene_twice(scenes):
    labelled = [s for s in scenes.values() if s.labelled]
    assert [{s.name for s in g} for g in duplicates(list(scenes.values()))] == [{'sat14', 'zh14'}]
    tiles = [t for s in labelled for t in tiles_of(s, 128, 32)]
    for seed in range(4):
        split = split_tiles(tiles, .4, seed=seed)
        assert {t.scene.name for t in split.val} in ({'zh02'}, {'sat14', 'zh14'}) and not split.dropped
    block = split_tiles(tiles, .2, by='block', seed=1)
    assert len(block.val) > 10 and without_leaks(block.train, block.val) == block.train
    val = np.zeros((700, 900), bool)
    for t in block.val:
        if t.scene.name == 'sat14': val[t.window] = True
    assert not any(val[t.window].any() for t in block.train if t.scene.name == 'zh14')


@zurich
def test_zurich_patches(scenes, tmp_path):
    sat = scenes['sat14']
    paths = patchify(sat, tmp_path, 256, 32)
    assert len(paths) == 4*3
    joined, seen = np.zeros((4, 800, 1000), 'uint16'), np.full((800, 1000), IGNORE, 'uint8')
    for s in find_scenes(tmp_path):
        (row, column), mask = s.origin, s.read_mask()
        assert s.source == 'sat14' and s.bands == sat.bands and s.dtype == 'uint16' and s.grid.crs == 'EPSG:32632'
        assert np.allclose(s.transform[2::3], np.array(sat.transform[2::3]) + [.6*column, -.6*row])
        joined[:, row:row + 256, column:column + 256] = s.read()
        seen[row:row + 256, column:column + 256] = mask
    np.testing.assert_array_equal(joined[:, :622, :782], sat.read())
    np.testing.assert_array_equal(seen[:622, :782], sat.read_mask())
    assert (seen[622:] == IGNORE).all()


@zurich
def test_zurich_description():
    found = describe_folder(ZURICH)
    assert found.ready and len(found.unlabelled) == 6 and not found.orphans
    assert found.shares()['class_4'] == pytest.approx(6021/found.pixels.total()/(1 - found.pixels[IGNORE]/found.pixels.total()))
    assert 'stored twice geotiff' in str(found) and 'differ in bands or type' in str(found)


def noise(*shape, seed=0, dtype='uint8'): return np.random.default_rng(seed).integers(1, 255, shape).astype(dtype)


UTM = dict(crs='EPSG:32632', transform=rasterio.Affine(1, 0, 4e5, 0, -1, 5e6))


def test_a_cut_that_was_stopped_goes_on(tmp_path, monkeypatch):
    mosaic = write_image(tmp_path/'m.tif', noise(3, 300, 300), **UTM)
    write, calls = patches._write_patch, []
    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5: raise KeyboardInterrupt
        return write(*args, **kwargs)
    monkeypatch.setattr(patches, '_write_patch', dies)
    with pytest.raises(KeyboardInterrupt): patchify(mosaic, tmp_path/'out', 64)
    assert len(list((tmp_path/'out').rglob('*.tif'))) == 4
    monkeypatch.setattr(patches, '_write_patch', write)
    assert len(patchify(mosaic, tmp_path/'out', 64)) == 25
    assert not [p for p in (tmp_path/'out').rglob('*') if p.name.endswith('.tmp')]
    other = write_image(tmp_path/'m.tif', noise(3, 300, 301, seed=1), **UTM)
    with pytest.raises(DataError, match='width 300 then and 301 now'): patchify(other, tmp_path/'out', 64)


def test_empty_corners_of_a_mosaic_are_left_out(tmp_path):
    values = noise(3, 256, 256)
    values[:, :128, :128] = 0
    paths = patchify(write_image(tmp_path/'m.tif', values, nodata=0, **UTM), tmp_path/'out', 64, mask=write_image(tmp_path/'gt.tif', np.ones((256, 256), 'uint8'), **UTM))
    assert len(paths) == 12 == len(list((tmp_path/'out'/'masks').iterdir()))


def test_a_palette_of_classes_and_a_palette_for_show(tmp_path):
    mapping = ClassMapping(('a', 'b', 'c'), ((10, 0, 0), (0, 10, 0), (0, 0, 10)))
    ids = np.random.default_rng(0).integers(0, 3, (40, 50)).astype('uint8')
    image = write_image(tmp_path/'x.tif', noise(3, 40, 50))
    painting = Image.fromarray(2 - ids)
    painting.putpalette([c for i in (2, 1, 0) for c in mapping.colours[i]])
    painting.save(tmp_path/'painting.png')
    shown = Image.fromarray(ids)
    shown.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    shown.save(tmp_path/'shown.png')
    for name in ('painting.png', 'shown.png'): np.testing.assert_array_equal(open_scene(image, tmp_path/name).read_mask(mapping=mapping), ids)
    scene = open_scene(tmp_path/'painting.png')
    np.testing.assert_array_equal(scene.read(), mapping.to_colours(ids).transpose(2, 0, 1))


def test_unknown_values_name_the_file(tmp_path):
    scene = open_scene(write_image(tmp_path/'x.tif', noise(1, 30, 30)), write_image(tmp_path/'x_mask.tif', np.full((30, 30), 9, 'uint8')))
    with pytest.raises(DataError, match=r'x_mask.tif: value 9 \(900 pixels\)'): scene.read_mask(mapping=number_classes(3))
    found = describe_folder(tmp_path, number_classes(3))
    assert not found.ready and found.unknown == {tmp_path/'x_mask.tif': {9: 900}}
    jpeg = Image.fromarray(np.kron(np.eye(4, dtype='uint8'), np.ones((8, 8), 'uint8'))[..., None]*np.array([200, 30, 30], 'uint8'))
    jpeg.save(tmp_path/'m.jpg')
    with pytest.raises(DataError, match='JPEG changes colours'): open_scene(write_image(tmp_path/'y.tif', noise(1, 32, 32)), tmp_path/'m.jpg').read_mask(mapping=number_classes(3))


def test_unclear_pairs_are_refused(tmp_path):
    write_image(tmp_path/'images'/'a.tif', noise(3, 9, 9)); write_image(tmp_path/'masks'/'a.tif', np.zeros((9, 9), 'uint8')); write_image(tmp_path/'masks'/'a_mask.tif', np.zeros((9, 9), 'uint8'))
    with pytest.raises(DataError, match='two masks'): find_scenes(tmp_path)
    write_image(tmp_path/'other'/'b.tif', noise(3, 9, 9)); write_image(tmp_path/'other'/'b.tiff', noise(3, 9, 9))
    with pytest.raises(DataError, match='neither is clearly the mask'): find_scenes(tmp_path/'other')
    with pytest.raises(DataError, match='lies elsewhere'):
        open_scene(write_image(tmp_path/'p.tif', noise(3, 9, 9), **UTM), write_image(tmp_path/'p_gt.tif', np.zeros((9, 9), 'uint8'), crs='EPSG:32632', transform=rasterio.Affine(1, 0, 4e5 + 5, 0, -1, 5e6)))


def test_patches_of_photos_keep_together(tmp_path):
    for photo in range(5):
        for k in range(6): write_image(tmp_path/f'DJI_{photo}_{k}.tif', noise(3, 16, 16, seed=10*photo + k))
    tiles = [t for s in find_scenes(tmp_path, source=r'(DJI_\d+)_\d+') for t in tiles_of(s, 16)]
    for seed in range(5):
        train, val, _ = split_tiles(tiles, .2, seed=seed)
        assert len(val) == 6 and not {t.scene.source for t in train} & {t.scene.source for t in val}


def test_many_patches_are_split_quickly(tmp_path, monkeypatch):
    one = open_scene(write_image(tmp_path/'one.tif', noise(3, 32, 32)))
    from dataclasses import replace
    tiles = [tiles_of(replace(one, source=f'photo{i % 50}', origin=(32*(i//50//16), 32*(i//50 % 16))), 32)[0] for i in range(12800)]
    monkeypatch.setattr(splits, 'duplicates', lambda scenes: [])
    begin = time.perf_counter()
    split = split_tiles(tiles, .2)
    assert len(split.val) == 2560 and time.perf_counter() - begin < 20


def test_a_fourth_band_that_is_called_opacity(tmp_path):
    "GDAL calls any fourth band of 8 bits opacity; near infrared over water is 0 and yet data."
    values = noise(4, 200, 200)
    values[3, 50:80] = 0
    mosaic, mask = write_image(tmp_path/'rgbn.tif', values, **UTM), write_image(tmp_path/'rgbn_gt.tif', np.ones((200, 200), 'uint8'), **UTM)
    scene = open_scene(mosaic, mask)
    assert len(scene.bands) == 4 and scene.valid().all() and (scene.read_mask() == 1).all()
    patchify(scene, tmp_path/'out', 128)
    for s in find_scenes(tmp_path/'out'):
        inside = min(128, 200 - s.origin[0])*min(128, 200 - s.origin[1])
        assert len(s.bands) == 4 and s.valid().sum() == inside == (s.read_mask() == 1).sum()
    values[3] = 255
    values[3, :100] = 0
    true = open_scene(write_image(tmp_path/'rgba.tif', values, **UTM), mask)
    assert len(true.bands) == 3 and true.valid().sum() == 100*200 == (true.read_mask() == 1).sum()


def test_equal_names_in_two_folders_are_two_scenes(tmp_path):
    for k in range(6): write_image(tmp_path/f'region{k}'/'scene.tif', noise(3, 40, 40, seed=k))
    tiles = [t for s in find_scenes(tmp_path) for t in tiles_of(s, 20)]
    split = split_tiles(tiles, .2)
    assert len(split.val) in (4, 8) and len(split.train) + len(split.val) == 24


def test_masks_of_0_and_255_are_suspicious(tmp_path):
    write_image(tmp_path/'images'/'a.tif', noise(3, 20, 20)); write_image(tmp_path/'masks'/'a.tif', 255*(noise(20, 20) > 99).astype('uint8'))
    assert 'hold only 0 and 255' in str(describe_folder(tmp_path))
