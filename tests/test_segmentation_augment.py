"""Simulated landscapes and augmentations, as far as a notebook cannot hold them: other processes, odd shapes, missing libraries, the readers."""
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import torch

from geoforecast.core import ConfigError
from geoforecast.segmentation.augment import Strong, Weak, cutmix, view, view_matrix
from geoforecast.segmentation.classes import IGNORE, read_classes
from geoforecast.segmentation.simulate import simulate_dataset, simulate_landscape, simulate_mosaic


def digest(arrays): return hashlib.sha256(b''.join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


def test_a_seed_gives_the_same_scene_in_another_process():
    code = ('import hashlib, numpy as np\nfrom geoforecast.segmentation.simulate import simulate_landscape\n'
            "print(hashlib.sha256(b''.join(np.ascontiguousarray(a).tobytes() for a in simulate_landscape((70, 90), 7))).hexdigest())")
    other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == digest(simulate_landscape((70, 90), 7)) != digest(simulate_landscape((70, 90), 8))


@pytest.mark.parametrize('size', [(16, 300), (33, 47), 64])
@pytest.mark.parametrize('bands', [3, 4])
def test_scenes_of_any_shape(size, bands):
    image, mask = simulate_landscape(size, 2, bands=bands)
    shape = (size, size) if isinstance(size, int) else size
    assert image.shape == (bands, *shape) and mask.shape == shape and image.dtype == mask.dtype == np.uint8 and mask.max() <= 6 and image.min() >= 1


def test_wrong_options_are_named():
    with pytest.raises(ConfigError, match='bands=2'): simulate_landscape(32, 0, bands=2)
    with pytest.raises(ConfigError, match="scene_style 'sumer' does not exist; did you mean 'summer'"): simulate_landscape(32, 0, 'sumer')
    with pytest.raises(ConfigError, match="did you mean 'water'"): simulate_landscape(32, 0, classes=['background', 'watter'])
    with pytest.raises(ConfigError, match="'background' is missing"): simulate_landscape(32, 0, classes=['water'])
    with pytest.raises(ConfigError, match='blur=2'): Strong(blur=2)


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path/'notes.txt').write_text('mine')
    with pytest.raises(ConfigError, match='not empty'): simulate_dataset(tmp_path, 1, size=16, mosaic=0)
    assert [p.name for p in tmp_path.iterdir()] == ['notes.txt']


def test_the_readers_find_what_was_written(tmp_path):
    tiles = pytest.importorskip('geoforecast.segmentation.tiles')
    root = simulate_dataset(tmp_path/'data', 4, .5, 48, seed=3, mosaic=0, classes=['background', 'road', 'water'])
    mapping = read_classes(root/'class_mapping.csv')
    assert tuple(mapping.names) == ('background', 'road', 'water') and mapping.background == 0
    scenes = tiles.find_scenes(root)
    assert len(scenes) == 4 and sum(scene.mask is None for scene in scenes) == 2
    for scene in scenes:
        if scene.mask is None: continue
        seed = int(np.random.SeedSequence(3).generate_state(4)[int(scene.image.stem[-3:])])
        image, mask = simulate_landscape(48, seed, classes=mapping.names)
        whole = (slice(0, 48), slice(0, 48))
        assert np.array_equal(scene.read(whole), image) and np.array_equal(scene.read_mask(whole, mapping), mask)


def test_a_mosaic_whose_size_is_no_multiple_of_its_sections(tmp_path):
    path = simulate_mosaic(tmp_path, 300, 530, seed=1, bands=4, section=256, pixel=.25)
    with rasterio.open(path) as image, rasterio.open(tmp_path/'masks/mosaic.tif') as mask:
        assert image.shape == mask.shape == (300, 530) and image.count == 4 and image.res == (.25, .25) and image.nodata == 0 and mask.nodata == IGNORE
        assert mask.colormap(1)[1] == (0, 114, 178, 255)
        ids = mask.read(1)
        assert np.array_equal(ids == IGNORE, (image.read() == 0).all(0)) and (ids == IGNORE).any() and (ids == 3).any()


@pytest.mark.parametrize('bands', [1, 2, 3, 4, 13])
@pytest.mark.parametrize('shape', [(40, 40), (31, 50), (3, 7)])
def test_any_number_of_bands_and_any_shape(bands, shape):
    images, masks = torch.rand(3, bands, *shape), torch.randint(0, 5, (3, *shape), dtype=torch.uint8)
    seen, ids = Weak()(images, masks, torch.Generator().manual_seed(0))
    strong = Strong(1, .5, 1)(seen, torch.Generator().manual_seed(0))
    assert seen.shape == strong.shape == images.shape and ids.shape == masks.shape and ids.dtype == torch.uint8
    assert strong.isfinite().all() and strong.min() >= 0 and strong.max() <= 1
    assert set(ids.unique().tolist()) <= {0, 1, 2, 3, 4, IGNORE}


@pytest.mark.parametrize('quarter_turns', range(4))
@pytest.mark.parametrize('mirror', [False, True])
def test_turns_of_a_rectangle_are_exact_for_an_even_side_too(quarter_turns, mirror):
    ids = torch.arange(6*10, dtype=torch.uint8).view(1, 6, 10)
    size = (6, 10) if quarter_turns % 2 == 0 else (10, 6)
    matrix = view_matrix(torch.ones(1), torch.tensor([quarter_turns]), torch.tensor([mirror]), torch.tensor([[4.5, 2.5]]), size)
    images, masks = view(ids[:, None].float(), ids, matrix, size)
    expected = torch.rot90(ids, quarter_turns, (-2, -1))
    expected = expected.flip(-1) if mirror else expected
    assert torch.equal(masks, expected) and torch.allclose(images[:, 0], expected.float(), atol=1e-3)


def test_enlarging_by_two_repeats_each_pixel_of_the_mask():
    ids = torch.randint(0, 7, (1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    matrix = view_matrix(torch.tensor([2.]), torch.tensor([0]), torch.tensor([False]), torch.tensor([[3.5, 3.5]]), (16, 16))
    assert torch.equal(view(ids[:, None].float(), ids, matrix, (16, 16))[1], ids.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_the_ignored_stay_ignored_and_are_not_blended():
    masks = torch.full((4, 32, 32), IGNORE, dtype=torch.uint8)
    masks[:, :16] = 254
    ids = Weak()(torch.rand(4, 3, 32, 32), masks, torch.Generator().manual_seed(0))[1]
    assert set(ids.unique().tolist()) <= {254, IGNORE} and (ids == 254).any()


def test_without_a_mask_and_from_torchs_own_generator():
    images = torch.rand(2, 3, 20, 20)
    torch.manual_seed(5)
    first = Strong()(Weak()(images)[0])
    torch.manual_seed(5)
    assert torch.equal(first, Strong()(Weak()(images)[0])) and Weak()(images)[1] is None
    assert not torch.equal(first, Strong()(Weak()(images)[0]))


def test_cutmix_of_one_image_changes_nothing():
    images, masks = torch.rand(1, 3, 16, 16), torch.ones(1, 16, 16, dtype=torch.uint8)
    mixed = cutmix(images, masks)
    assert torch.equal(mixed[0], images) and torch.equal(mixed[1], masks) and mixed[2] is None
    images, masks = torch.rand(5, 3, 16, 16), torch.ones(5, 16, 16, dtype=torch.uint8)
    assert torch.equal(cutmix(images, masks, probability=0.)[0], images)


def test_a_missing_kornia_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, 'kornia', None)
    with pytest.raises(ConfigError, match=r'geoforecast\[augmentation\]'): Weak()(torch.rand(1, 3, 8, 8))
