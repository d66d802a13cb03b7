"The commands on images and masks as they are typed: exit statuses, one line an error, and the loop from scenes to a list of tiles."
import csv
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from geoforecast.cli import main
from geoforecast.learn.bundle import save_bundle
from geoforecast.segmentation.landscape import landscape_classes
from geoforecast.segmentation.models import DeepLabV3Plus
from geoforecast.segmentation.supervised import Supervised
from geoforecast.segmentation.tiles import write_image

ZURICH = Path(os.environ.get('GEOFORECAST_DATA', Path(__file__).parents[2]/'shared'/'data'))/'segmentation'/'zurich'


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(line: str) -> int: return main(['data', 'segmentation', *line.split()])


def test_scenes_are_made_checked_and_chosen_from(here, capsys):
    assert typed('simulate --out land --n_scenes 4 --size 128 --mosaic 256') == 0
    assert capsys.readouterr().out.splitlines() == ['land: 5 images, 3 of them with a mask']
    assert typed('check land') == 0
    found = capsys.readouterr().out
    assert found.startswith('land\n') and '5, 2 of them unlabelled' in found and found.endswith('ready for training\n')
    torch.manual_seed(0)
    learner = Supervised(partial(DeepLabV3Plus, encoder='tiny'), num_classes=7, ema_decay=0.)
    network = dict(class_path='geoforecast.segmentation.models.DeepLabV3Plus', init_args=dict(encoder='tiny'))
    config = dict(model=dict(class_path='geoforecast.segmentation.supervised.Supervised', init_args=dict(num_classes=7, network=network)))
    save_bundle('run/bundle', learner, config, dict(task='segmentation', size=64, classes=landscape_classes().to_dict()))
    for by in ('margin', 'entropy', 'least_confidence', 'coreset', 'random'):
        assert typed(f'select run land --n 3 --by {by} --out {by}.csv') == 0
        with open(f'{by}.csv', newline='') as f: rows = list(csv.DictReader(f))
        assert len(rows) == 3 and all(row['scene'].startswith('unlabelled/') and float(row['score']) >= 0 for row in rows)
    assert capsys.readouterr().out.splitlines()[-1].startswith('random.csv: 3 tiles by random; the first is scene_')


def test_a_mosaic_is_cut_and_the_cut_goes_on(here, capsys):
    image = np.random.default_rng(0).integers(1, 255, (3, 100, 140), np.uint8)
    place = dict(crs='EPSG:32632', transform=rasterio.Affine(.6, 0, 465595.8, 0, -.6, 5245788.6))
    write_image('m.tif', image, **place)
    command = 'patchify m.tif --size 64 --overlap 16 --out cut'
    assert typed(command) == 0
    first = sorted(Path('cut/images').iterdir())
    assert len(first) == 2*3 and capsys.readouterr().out == 'cut/images: 6 patches of 64 x 64 pixels\n'
    first[2].unlink()
    assert typed(command) == 0 and sorted(Path('cut/images').iterdir()) == first
    with rasterio.open(first[-1]) as f: assert (f.transform.c, f.crs) == (465595.8 + 96*.6, rasterio.CRS.from_epsg(32632))


@pytest.mark.parametrize('line, said', [
    ('patchify m.png --size 0 --out cut', "'0' is not a whole number from 1 on"),
    ('patchify m.png --size 64 --overlap 64 --out cut', 'overlap 64 must be at least 0 and less than the size 64'),
    ('patchify none.tif --out cut', 'none.tif cannot be read as an image'),
    ('patchify m.png --mask small.png --out cut', 'small.png'),
    ('patchify m.png --tile 64 --out cut', "option '--tile'"),
    ('check none', 'none is not a folder'),
    ('check empty', 'empty holds no image'),
    ('check . --class_mapping none.csv', 'none.csv does not exist'),
    ('simulate --out . --n_scenes 2', 'is not empty'),
    ('simulate --out new --labelled 1.5', "'1.5' is not a share from 0 to 1"),
    ('select empty . --out list.csv', 'empty is not a bundle'),
    ('select empty . --out list.csv --by marginal', "did you mean 'margin'"),
    ('select empty . --out list.csv --bands 3;2', "'3;2' is not a whole number from 1 on"),
    ('slect', "did you mean 'select'")])
def test_what_does_not_fit_is_said_in_one_line(here, capsys, line, said):
    write_image('m.png', np.full((3, 96, 96), 7, np.uint8))
    write_image('small.png', np.zeros((1, 32, 32), np.uint8))
    Path('empty').mkdir()
    before = sorted(here.rglob('*'))
    assert typed(line) == 2
    error = capsys.readouterr().err
    assert said in error and error.count('\n') == 1 and 'Traceback' not in error
    assert sorted(here.rglob('*')) == before


def test_check_says_2_where_no_training_can_start(here, capsys):
    "A value that is no class, a damaged file, no mask at all: each is named."
    write_image('a/images/x.png', np.ones((3, 32, 32), np.uint8))
    assert typed('check a') == 2 and 'not ready' in capsys.readouterr().out
    landscape_classes().write('a/class_mapping.csv')
    write_image('a/masks/x.png', np.full((1, 32, 32), 77, np.uint8))
    assert typed('check a') == 2
    assert 'masks/x.png: 77 (1024 pixels)' in capsys.readouterr().out
    write_image('a/masks/x.png', np.full((1, 32, 32), 6, np.uint8))
    assert typed('check a') == 0
    Path('a/images/y.png').write_bytes(b'no picture')
    assert typed('check a') == 2 and 'y.png cannot be read' in capsys.readouterr().out


@pytest.mark.skipif(not ZURICH.is_dir(), reason='no scenes of Zurich under GEOFORECAST_DATA or ../shared/data')
def test_zurich(here, capsys):
    assert typed(f'check {ZURICH}') == 0
    found = capsys.readouterr().out
    for part in ('9, 6 of them unlabelled', '1 images with 4 bands of uint16, georeferenced', 'stored twice', 'class_5: 44 %'): assert part in found
