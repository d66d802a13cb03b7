"Who sees which tile of a folder: leaks of every kind, draws of labels, exact resume, other kinds of files, and the Zurich scenes (skipped where absent)."
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from rasterio import Affine

from geoforecast.core import ConfigError, DataError
from geoforecast.segmentation.classes import IGNORE
from geoforecast.segmentation.data import SegmentationDataModule, class_counts, loader_of
from geoforecast.segmentation.inputs import ImageInputs
from geoforecast.segmentation.patches import patchify
from geoforecast.segmentation.simulate import simulate_dataset, simulate_landscape
from geoforecast.segmentation.tiles import find_scenes, open_scene, tiles_of, write_image

ZURICH = Path(os.environ.get('GEOFORECAST_DATA', Path(__file__).parents[2]/'shared'/'data'))/'segmentation'/'zurich'
quiet = pytest.mark.filterwarnings('ignore::UserWarning')
pytestmark = pytest.mark.filterwarnings('ignore:.*keep their labels')


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return simulate_dataset(tmp_path_factory.mktemp('scenes')/'all', n_scenes=7, labelled=.72, size=128, seed=3)


def made(folder, seed=0, **options):
    torch.manual_seed(seed)
    return SegmentationDataModule(str(folder), **dict(size=64, batch_size=4) | options)


def ground(data, part, side=16):
    "What tiles show, square by square, whatever their files are called; squares of few values aside."
    found = set()
    for t in data.tiles[part]:
        image = data.pixels.image(t).transpose(1, 2, 0)
        squares = (image[r:r + side, c:c + side] for r in range(0, t.size, side) for c in range(0, t.size, side))
        found |= {s.tobytes() for s in squares if np.isfinite(s).all() and len(np.unique(s)) > 20}
    return found


def same(one, other): return len(one) == len(other) and all(torch.equal(a, b) for x, y in zip(one, other) for a, b in zip(x.inputs.nan_to_num(-1), y.inputs.nan_to_num(-1))) and \
    all(torch.equal(x.target, y.target) and torch.equal(x.unlabelled.nan_to_num(-1), y.unlabelled.nan_to_num(-1)) and torch.equal(x.sample, y.sample) for x, y in zip(one, other))


def labelled_names(folder): return [s.name for s in find_scenes(folder) if s.labelled]


# Leaks

def test_copies_of_test_and_validation_scenes_are_in_no_other_part(folder, tmp_path):
    held = labelled_names(folder)[0]
    plain = made(folder, test=held)
    root = tmp_path/'all'
    shutil.copytree(folder, root)
    checked = next(t.scene for t in plain.tiles['val'])
    shutil.copy(folder/'images'/f'{held}.png', root/'unlabelled'/'another_name.png')
    write_image(root/'unlabelled'/'other_format.tif', checked.read())
    shutil.copy(folder/'images'/f'{held}.png', root/'images'/'labelled_copy.png')
    shutil.copy(folder/'masks'/f'{held}.png', root/'masks'/'labelled_copy.png')
    data = made(root, test=held)
    parts = {part: ground(data, part) for part in data.tiles}
    assert all(parts.values()) and not parts['test'] & (parts['train'] | parts['val'] | parts['unlabelled'])
    assert not parts['val'] & (parts['train'] | parts['unlabelled'])
    assert len(made(root, test=held).tiles['unlabelled']) < len([t for s in find_scenes(root) if not s.labelled for t in tiles_of(s, 64)])


def test_a_georeferenced_cut_of_a_validation_block_is_not_in_the_pool(tmp_path):
    image, mask = simulate_landscape(512, seed=1)
    place = dict(crs='EPSG:32749', transform=Affine(.5, 0, 430000, 0, -.5, 9150000))
    write_image(tmp_path/'images'/'mosaic.tif', image, **place)
    write_image(tmp_path/'masks'/'mosaic.tif', mask, **place)
    rows, columns = slice(20, 500), slice(36, 480) # off the raster of the tiles
    write_image(tmp_path/'unlabelled'/'survey.tif', image[:, rows, columns], crs=place['crs'], transform=place['transform'] @ Affine.translation(columns.start, rows.start))
    data = made(tmp_path, overlap=16)
    assert data.split_by == 'block' and data.tiles['val']
    def covered(tiles):
        seen = np.zeros((512, 512), bool)
        for t in tiles:
            r, c = (20, 36) if t.scene.name == 'survey' else (0, 0)
            inside = slice(t.row + r, min(t.row + t.size, t.scene.height) + r), slice(t.column + c, min(t.column + t.size, t.scene.width) + c)
            seen[inside] = True
        return seen
    val, pool, train = (covered(data.tiles[p]) for p in ('val', 'unlabelled', 'train'))
    assert not (val & pool).any() and not (val & train).any()
    assert any(t.scene.name == 'survey' for t in data.tiles['unlabelled']) and data.dropped


def test_patches_of_one_image_do_not_face_each_other(tmp_path):
    for i in range(4):
        scene = tmp_path/'whole'/f'field{i}'
        image, mask = simulate_landscape(160, seed=i)
        patchify(write_image(f'{scene}.tif', image), tmp_path/'cut', 64, 16, write_image(f'{scene}_mask.tif', mask))
    data = made(tmp_path/'cut')
    sources = {part: {t.scene.source for t in data.tiles[part]} for part in ('train', 'val')}
    assert data.split_by == 'scene' and len(sources['train'] | sources['val']) == 4 and not sources['train'] & sources['val']


# Labels

def test_labels_are_drawn_by_seed_and_nested(folder):
    drawn = lambda share, **options: made(folder, labelled_share=share, **options)
    quarter, half, again, other = drawn(.25, label_seed=1), drawn(.5, label_seed=1), drawn(.25, label_seed=1, seed=9), drawn(.25, label_seed=2)
    assert quarter.tiles['train'] == again.tiles['train'] != other.tiles['train']
    assert set(quarter.tiles['train']) < set(half.tiles['train'])
    assert quarter.tiles['val'] == other.tiles['val'] == drawn(1., seed=5).tiles['val']
    assert drawn(.25, seed=1).tiles['train'] == quarter.tiles['train'] # the run's seed where none is given
    assert len(drawn(1e-6).tiles['train']) == 1


def test_the_rest_joins_the_pool_or_is_nowhere(folder):
    whole, joined, left = made(folder), made(folder, labelled_share=.25), made(folder, labelled_share=.25, unlabel_rest=False)
    rest = set(whole.tiles['train']) - set(joined.tiles['train'])
    assert len(rest) >= 3 and rest <= set(joined.tiles['unlabelled']) and not rest & set(left.tiles['unlabelled'])
    assert set(left.tiles['unlabelled']) == set(whole.tiles['unlabelled']) == set(joined.tiles['unlabelled']) - rest


def test_lost_classes_are_named(folder):
    with pytest.warns(UserWarning, match='1 of .* training tiles keep their labels, and these hold no pixel of '): data = made(folder, labelled_share=1e-6)
    own = set(np.unique(data.tiles['train'][0].read_mask(data.mapping))) - {IGNORE}
    assert set(data.train_classes) == own < set(made(folder).train_classes)


def test_a_list_of_tiles_is_what_trains(folder, tmp_path):
    whole = made(folder)
    wanted = whole.tiles['train'][2:5]
    row = lambda t, size=64: f'{t.scene.image.relative_to(folder).as_posix()},{t.row},{t.column},{size},.5'
    text = lambda rows: (tmp_path/'list.csv').write_text('\n'.join(['scene,row,column,size,score', *rows]) + '\n')
    text(map(row, wanted))
    data = made(folder, labels=str(tmp_path/'list.csv'))
    assert data.tiles['train'] == wanted and data.tiles['val'] == whole.tiles['val'] and set(whole.tiles['train']) - set(wanted) <= set(data.tiles['unlabelled'])
    text(map(row, [*wanted, whole.tiles['val'][0]]))
    with pytest.warns(UserWarning, match='1 of the 4 tiles'): assert made(folder, labels=str(tmp_path/'list.csv')).tiles['train'] == wanted
    text([row(wanted[0], 32)])
    with pytest.raises(ConfigError, match='tiles of 32 pixels, but size is 64'): made(folder, labels=str(tmp_path/'list.csv'))
    text(['images/x.png,0,zero,64,.5'])
    with pytest.raises(DataError, match='list.csv line 2'): made(folder, labels=str(tmp_path/'list.csv'))


def test_masks_of_pool_scenes_are_not_used(folder, tmp_path):
    root, names = tmp_path/'all', labelled_names(folder)
    shutil.copytree(folder, root)
    (root/'masks'/f'{names[2]}.png').write_bytes(b'no mask at all') # would raise if it were read
    with pytest.raises(DataError): made(root, labelled=names[:2])
    shutil.copy(folder/'masks'/f'{names[2]}.png', root/'masks'/f'{names[2]}.png')
    data = made(root, labelled=names[:2], test=names[3])
    used = {part: {t.scene.name for t in tiles} for part, tiles in data.tiles.items()}
    assert used['train'] | used['val'] == set(names[:2]) and used['test'] == {names[3]} and names[2] in used['unlabelled']
    assert all((b.target == IGNORE).all() for b in data.fields('unlabelled'))


# Order

@pytest.mark.parametrize('rare', (0., .5))
def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(folder, rare):
    options = dict(labelled_share=.5, label_seed=0, rare_class_sampling=rare, save_latest_every=3, eval_every=3, unlabelled_batch_size=3)
    def epoch(data, done):
        data.trainer = SimpleNamespace(world_size=1, global_rank=0, lightning_module=SimpleNamespace(epochs_done=done))
        return list(data.train_dataloader())
    through = made(folder, 7, **options)
    first, second = epoch(through, 0), epoch(through, 1)
    assert len(first) == len(second) == 3 and not same(first, second) and not same(first, epoch(made(folder, 8, **options), 0))
    assert same(second, epoch(made(folder, 7, **options), 1)) and same(second, epoch(made(folder, 7, num_workers=2, **options), 1))


class Recorder(L.LightningModule):
    def __init__(self, seen, stop=None):
        super().__init__()
        self.layer, self.seen, self.stop, self.epochs_done = torch.nn.Linear(1, 1), seen, stop, 0
    def on_load_checkpoint(self, checkpoint): self.epochs_done = checkpoint['loops']['fit_loop']['epoch_progress']['current']['processed']
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .1)
    def validation_step(self, batch, i, dataloader_idx=0): pass
    def training_step(self, batch, i):
        self.seen.append(batch)
        return self.layer(torch.ones(1, 1)).sum()


@quiet
def test_a_trainer_that_is_taken_up_again_sees_the_same_batches(folder, tmp_path):
    config = dict(data=dict(init_args=dict(data_dir=str(folder), size=64, batch_size=2, save_latest_every=2, eval_every=4)), model={}, trainer=dict(max_steps=8))
    trainer_options = SegmentationDataModule.complete(config)['trainer']
    assert trainer_options == dict(max_steps=-1, max_epochs=4, check_val_every_n_epoch=2)
    quietly = dict(accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0, default_root_dir=tmp_path)
    data = lambda: made(folder, 3, batch_size=2, save_latest_every=2, eval_every=4)
    through, broken = [], []
    L.Trainer(**trainer_options, **quietly).fit(Recorder(through), datamodule=data())
    first = L.Trainer(**trainer_options | dict(max_epochs=2), **quietly)
    first.fit(Recorder(broken), datamodule=data())
    first.save_checkpoint(tmp_path/'latest.ckpt')
    L.Trainer(**trainer_options, **quietly).fit(Recorder(broken), datamodule=data(), ckpt_path=tmp_path/'latest.ckpt', weights_only=True)
    assert len(through) == 8 and same(through, broken)


def test_rare_classes_come_more_often(folder):
    plain, rare = (made(folder, 1, rare_class_sampling=share, save_latest_every=60, eval_every=60, unlabelled_batch_size=0) for share in (0., 1.))
    rarest = min(plain.train_classes, key=lambda k: plain.counts[:, k].sum())
    often = lambda data: np.mean([data.counts[i, rarest] > 0 for b in data.train_dataloader() for i in b.sample.tolist()])
    assert often(rare) > 2*often(plain) and often(plain) == pytest.approx((plain.counts[:, rarest] > 0).mean(), abs=.02)


def test_validation_looks_at_as_many_training_tiles(folder):
    data = made(folder)
    val, train = data.val_dataloader()
    assert len(val.dataset) == len(train.dataset) == len(data.tiles['val']) and set(train.dataset.tiles) <= set(data.tiles['train'])
    assert all(len(b.unlabelled) == 0 for loader in (val, train) for b in loader) and same(list(train), list(made(folder, 5).val_dataloader()[1]))


# Kinds of files

def test_holes_and_edges_are_nan_and_255(tmp_path):
    image, mask = simulate_landscape(200, seed=2, bands=4)
    counts = 10*image.astype(np.uint16)
    counts[:, 30:50, 20:60] = 0
    write_image(tmp_path/'images'/'a.tif', counts, nodata=0)
    write_image(tmp_path/'masks'/'a.tif', mask)
    data = made(tmp_path, size=48, bands=[3, 2, 1], block_size=96)
    over = next(t for part in ('train', 'val') for t in data.tiles[part] if (t.row, t.column) == (192, 192)) # 8 of its 48 rows and columns are in the image
    raw, target = data.pixels.image(over), data.pixels.mask(over)
    assert np.array_equal(raw[:, :8, :8], counts[[2, 1, 0], -8:, -8:]) and np.isfinite(raw).sum() == 3*64 and (target != IGNORE).sum() == 64
    batch = next(b for part in ('train', 'val') for b in data.fields(part) for t in b.sample if (data.tiles[part][t].row, data.tiles[part][t].column) == (0, 0))
    tile = next(t for part in ('train', 'val') for t in data.tiles[part] if (t.row, t.column) == (0, 0))
    raw, target = data.pixels.image(tile), data.pixels.mask(tile)
    assert np.array_equal(np.isnan(raw), np.broadcast_to((counts[0, :48, :48] == 0), raw.shape)) and (target[np.isnan(raw[0])] == IGNORE).all()
    assert np.array_equal(np.nan_to_num(raw), counts[[2, 1, 0], :48, :48]) and len(data.channels) == 3
    seen = ImageInputs(data.channels).set_statistics(data.statistics)(batch.inputs)
    assert torch.isfinite(seen).all() and (seen[batch.inputs.isnan()] == 0).all() and batch.target[batch.inputs.isnan().any(1)].eq(IGNORE).all()


def test_memory_is_a_matter_of_speed_alone(folder):
    kept, read = made(folder), made(folder)
    read.memory_limit = 0
    assert same(list(kept.fields('val')), list(read.fields('val'))) and not read.pixels._read and kept.pixels._read


def test_a_common_light_undoes_another_exposure(tmp_path):
    image, mask = simulate_landscape(128, seed=2)
    dark = np.rint(.5*image + 10).astype(np.uint8)
    for i in range(3):
        write_image(tmp_path/'images'/f'{i}.png', image if i else dark)
        write_image(tmp_path/'masks'/f'{i}.png', mask if i else np.full_like(mask, IGNORE))
    write_image(tmp_path/'masks'/'0.png', np.rot90(mask).copy())
    data = made(tmp_path, labelled=['1'], test=['0'], split_by='block', block_size=64, harmonise=True, unlabelled=[])
    apart = made(tmp_path, labelled=['1'], test=['0'], split_by='block', block_size=64, unlabelled=[])
    whole = np.stack([t.read() for t in tiles_of(open_scene(tmp_path/'images'/'1.png'), 64)]).astype(np.float32)
    lit, plain = (np.stack([d.pixels.image(t) for t in d.tiles['test']]) for d in (data, apart))
    assert np.abs(lit - whole).mean() < 1 < 10 < np.abs(plain - whole).mean()
    served = next(iter(loader_of(data.tiles['test'], ImageInputs().set_statistics(data.statistics).statistics(), data.mapping)))
    assert np.allclose(served.inputs.numpy(), lit, atol=1e-2) and torch.equal(served.target, next(iter(data.fields('test'))).target)


def test_scenes_of_another_kind_are_left_out_or_refused(folder, tmp_path):
    root = tmp_path/'all'
    shutil.copytree(folder, root)
    write_image(root/'unlabelled'/'grey.tif', np.random.default_rng(0).integers(1, 9999, (1, 128, 128), dtype=np.uint16))
    with pytest.warns(UserWarning, match='1 images are left out, since training takes 3 bands of uint8: unlabelled/grey.tif'): data = made(root)
    assert 'grey' not in {t.scene.name for t in data.tiles['unlabelled']}
    with pytest.raises(DataError, match='grey.tif has 1 bands of uint16'): made(root, unlabelled=['grey'])


# Options

def test_options_that_do_not_fit(folder):
    wrong = dict(eval_every=(150, 'no multiple of save_latest_every 100'), labelled_share=(0., 'labelled_share'), batch_size=(0, 'batch_size 0'), unlabelled_batch_size=(-1, 'unlabelled_batch_size'),
                 rare_class_sampling=(1.5, 'rare_class_sampling'), num_classes=(5, 'the table names 7 classes'), test=('scene_9', "did you mean 'scene_00"), split_by=('source', 'split by'))
    for name, (value, said) in wrong.items():
        with pytest.raises(ConfigError, match=said): made(folder, **{name: value})
    with pytest.raises(DataError, match='is left to train on'): made(folder, test=labelled_names(folder))


def completed(folder, steps=1000, model=None, **options):
    return SegmentationDataModule.complete(dict(data=dict(init_args=dict(data_dir=str(folder), size=64) | options), model=dict(init_args=model or {}), trainer=dict(max_steps=steps)))


@pytest.mark.parametrize('steps, options, rhythm', [(1000, {}, (500, 100)), (60, {}, (60, 60)), (1000, dict(eval_every=50), (50, 50)), (300, dict(save_latest_every=150), (300, 150)), (-1, {}, (500, 100))])
def test_steps_become_epochs(folder, steps, options, rhythm):
    found = completed(folder, steps, **options)
    said, trainer = found['data']['init_args'], found['trainer']
    assert (said['eval_every'], said['save_latest_every']) == rhythm and trainer['check_val_every_n_epoch'] == rhythm[0]//rhythm[1]
    assert trainer['max_steps'] == -1 and trainer.get('max_epochs', -1) == (steps//rhythm[1] if steps > 0 else -1)
    assert SegmentationDataModule(batch_size=4, **said).samples_per_epoch == 4*rhythm[1]


def test_what_a_configuration_leaves_open(folder):
    found = completed(folder, model=dict(scale_min=48, scale_max=1.5, inputs=dict(class_path='x.ImageInputs', init_args=dict(normalisation='batch'))))['model']['init_args']
    assert found == dict(scale_min=.75, scale_max=1.5, num_classes=7, inputs=dict(class_path='x.ImageInputs', init_args=dict(normalisation='batch', bands=['red', 'green', 'blue'])))
    with pytest.raises(ConfigError, match='take 1000 or 1100 steps'): completed(folder, 1050)


# Zurich

@pytest.mark.skipif(not ZURICH.is_dir(), reason='no Zurich scenes under GEOFORECAST_DATA or ../shared/data')
@pytest.mark.parametrize('train, test, classes', [('zh02', 'zh14', [0, 1, 2, 3, 4, 5, 6]), ('zh14', 'zh02', [0, 1, 2, 3, 5])])
def test_zurich(train, test, classes):
    with pytest.warns(UserWarning, match='1 images are left out, since training takes 3 bands of uint8: geotiff/sat14.tif'):
        data = made(ZURICH, labelled=[train], test=[test], size=128)
    with warnings.catch_warnings(action='ignore'): quarter = [made(ZURICH, seed, labelled=[train], test=[test], size=128, labelled_share=.25, unlabel_rest=False) for seed in (0, 1)]
    assert data.num_classes == 7 and data.train_classes == classes and data.split_by == 'block'
    pool = {t.scene.name for t in data.tiles['unlabelled']}
    assert pool == {f'test{i}' for i in range(1, 7)} == {t.scene.name for t in quarter[0].tiles['unlabelled']}
    parts = {part: ground(data, part) for part in data.tiles}
    assert not parts['test'] & (parts['train'] | parts['val'] | parts['unlabelled']) and not parts['val'] & (parts['train'] | parts['unlabelled'])
    whole = np.array([class_counts(t, data.mapping) for part in ('train', 'val') for t in data.tiles[part]]).sum(0)
    val = np.array([class_counts(t, data.mapping) for t in data.tiles['val']]).sum(0)
    share = val[whole > 0]/whole[whole > 0]
    assert (share > 0).all() and (share < 1).all() and np.median(share) == pytest.approx(.2, abs=.15)
    assert quarter[0].tiles['train'] != quarter[1].tiles['train'] and len(quarter[0].tiles['train']) == round(len(data.tiles['train'])/4)


@pytest.mark.skipif(not ZURICH.is_dir(), reason='no Zurich scenes under GEOFORECAST_DATA or ../shared/data')
@quiet
def test_zurich_as_counts():
    data = made(ZURICH, labelled=['sat14'], size=128)
    assert data.kind['dtype'] == 'uint16' and len(data.channels) == 4 and not data.tiles['unlabelled']
    seen = ImageInputs(data.channels).set_statistics(data.statistics)(next(iter(data.train_dataloader())).inputs)
    assert torch.isfinite(seen).all() and seen.abs().max() < 10
    with pytest.raises(DataError, match='sat14.tif has 4 bands of uint16'): made(ZURICH, labelled=['zh02'], test=['sat14'])
