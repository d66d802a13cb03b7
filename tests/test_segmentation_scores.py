"Cases of the land-cover scores and reports that would interrupt their notebooks: odd inputs, other sizes, symmetries, other bands."

import json
import shutil
import warnings
from functools import partial

import numpy as np
import pytest
import rasterio
import torch
from scipy import ndimage
from torchmetrics.classification import MulticlassJaccardIndex

from geoforecast.core import DataError
from geoforecast.learn.bundle import load_bundle
from geoforecast.learn.launch import launch
from geoforecast.learn.resample import bootstrap
from geoforecast.segmentation.classes import IGNORE
from geoforecast.segmentation.evaluation import pooled, report, score_bundle
from geoforecast.segmentation.landscape import landscape_classes
from geoforecast.segmentation.scores import (SegmentationScores, boundary_confusion_of, boundary_of, class_scores_of, confidence_histogram,
                                             confusion_of, intervals, iou_of, miou_of, state_scores, tables_of, tile_states)
from geoforecast.segmentation.simulate import simulate_mosaic

K = 4


def patches(seed, shape=(3, 48, 64), ignored=.1, scale=4):
    "Smooth random maps (B, H, W) of `K` classes, a share of the pixels unknown."
    rng = np.random.default_rng(seed)
    ids = ndimage.gaussian_filter(rng.normal(size=(K, *shape)), (0, 0, scale, scale)).argmax(0)
    return torch.as_tensor(np.where(rng.random(shape) < ignored, IGNORE, ids))


@pytest.mark.parametrize('seed', range(3))
def test_iou_is_the_library_s(seed):
    truth, said = patches(seed), patches(seed + 100, ignored=0)
    library = MulticlassJaccardIndex(K, average='none', ignore_index=IGNORE)(said, truth)
    assert np.allclose(iou_of(confusion_of(said, truth, K).sum(0)), library, atol=1e-6)


def test_types_and_leading_dimensions_do_not_matter():
    truth, said = patches(0), patches(1, ignored=0)
    expected = confusion_of(said, truth, K)
    assert expected.shape == (3, K, K) and expected.sum() == (truth != IGNORE).sum()
    assert torch.equal(confusion_of(said.byte(), truth.byte(), K), expected)
    assert torch.equal(confusion_of(said.int()[:, None], truth[:, None], K), expected[:, None])
    assert torch.equal(confusion_of(said[1], truth[1], K), expected[1])


@pytest.mark.parametrize('where', ('map', 'truth'))
@pytest.mark.parametrize('value', (-1, K, 254))
def test_a_number_that_is_no_class_is_named(where, value):
    truth, said = patches(0, ignored=0), patches(1, ignored=0)
    (said if where == 'map' else truth)[1, 2, 3] = value
    with pytest.raises(DataError, match=f'{where} holds class {value},'): confusion_of(said, truth, K)


def test_what_stands_on_unknown_pixels_is_never_looked_at():
    truth, logits = patches(0, ignored=.3), torch.randn(3, K, 48, 64)
    spoilt = logits.where((truth != IGNORE)[:, None], torch.nan)
    one, other = SegmentationScores(K), SegmentationScores(K)
    one.update(logits, truth); other.update(spoilt, truth)
    assert torch.equal(one.confusion, other.confusion) and torch.equal(one.histogram, other.histogram)
    said = logits.argmax(1)
    elsewhere = said.where(truth != IGNORE, 77)
    assert torch.equal(boundary_confusion_of(said, truth, K), boundary_confusion_of(elsewhere, truth, K))


def test_a_diverged_network_is_an_error_and_not_a_score():
    logits = torch.randn(3, K, 48, 64)
    logits[0, 1, 5, 5] = torch.nan
    with pytest.raises(DataError, match='diverged'): SegmentationScores(K).update(logits, patches(0, ignored=0))


def test_nothing_known_is_no_score_and_no_warning():
    scores = SegmentationScores(K, background=0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        scores.update(torch.randn(1, K, 16, 16), torch.full((1, 16, 16), IGNORE))
        found = scores.compute()
    assert set(found) == {'miou', 'miou_foreground', 'accuracy', 'ece', *(f'iou_{i}' for i in range(K))} and np.isnan(list(found.values())).all()


def test_an_absent_class_is_left_out_but_its_invention_is_paid_for():
    truth = torch.zeros(1, 10, 10, dtype=torch.long)
    truth[:, 5:] = 1
    said = truth.clone()
    said[:, 0] = 3
    found = class_scores_of(confusion_of(said, truth, K)[0], background=0)
    assert np.isnan(found['iou_2']) and np.isnan(found['iou_3'])
    assert np.isclose(found['iou_0'], .8) and np.isclose(found['miou'], .9) and found['miou_foreground'] == 1 and np.isclose(found['accuracy'], .9)


def test_means_over_the_classes_of_the_training():
    truth, said = patches(2), patches(3, ignored=0)
    iou = iou_of(confusion_of(said, truth, K).sum(0))
    scores = SegmentationScores(K, background=1, classes=[0, 1, 3])
    scores.update(said, truth)
    found = scores.compute()
    assert np.isclose(found['miou'], iou[[0, 1, 3]].mean()) and np.isclose(found['miou_foreground'], iou[[0, 3]].mean()) and np.isclose(found['iou_2'], iou[2])


def test_processes_add_up():
    truth, logits = patches(4), torch.randn(3, K, 48, 64)
    whole, parts = SegmentationScores(K), [SegmentationScores(K) for _ in range(2)]
    whole.update(logits, truth)
    parts[0].update(logits[:1], truth[:1]); parts[1].update(logits[1:], truth[1:])
    parts[0].merge_state(parts[1])
    assert parts[0].compute() == whole.compute()
    whole.reset()
    assert whole.confusion.sum() == 0


def test_certainty_of_one_is_counted():
    truth = patches(5, ignored=0)
    logits = 1e4*torch.nn.functional.one_hot(truth, K).permute(0, 3, 1, 2).float()
    scores = SegmentationScores(K)
    scores.update(logits, truth)
    assert scores.compute()['ece'] < 1e-4 and confidence_histogram(logits, truth).sum() == truth.numel()


@pytest.mark.parametrize('seed, border, shape, width', [(0, False, (48, 64), 2), (1, True, (48, 64), 2), (2, False, (256, 256), 7), (3, True, (20, 20), 1)])
def test_bands_are_those_of_erosion(seed, border, shape, width):
    ids = patches(seed, (2, *shape), ignored=.01)
    found = boundary_of(ids, border=border)
    for one, band in zip(ids.numpy(), found.numpy()):
        for i in range(K):
            mask = one == i
            inner = ndimage.binary_erosion(mask | ((one == IGNORE) & (not border)), np.ones((3, 3)), width, border_value=not border)
            assert np.array_equal(band & mask, mask & ~inner)
        assert not band[one == IGNORE].any()


def test_bands_turn_with_the_map():
    ids = patches(6)
    for turn in (lambda x: x.flip(-1), lambda x: x.mT, lambda x: x.rot90(1, (-2, -1))): assert torch.equal(boundary_of(turn(ids)), turn(boundary_of(ids)))


def test_one_class_has_no_edge_but_that_of_the_image():
    ids = torch.full((1, 50, 50), 2)
    assert not boundary_of(ids).any() and boundary_of(ids, border=True).sum() == 50**2 - 48**2
    assert np.isnan(iou_of(boundary_confusion_of(ids, ids, K)[0])[:K]).all()


def test_boundary_scores_can_be_bootstrapped():
    truth = patches(7, (12, 48, 64))
    said = truth.where(torch.rand(truth.shape, generator=torch.Generator().manual_seed(0)) > .1, 0)
    states = boundary_confusion_of(said, truth, K)
    estimate, low, high = bootstrap(states, lambda sums: miou_of(sums, range(K)), n_resamples=200)
    assert np.isclose(estimate, miou_of(states.sum(0), range(K))) and 0 < low < estimate < high < 1


def test_rows_of_tiles_add_up_to_the_tables_of_the_whole():
    truth, said = patches(8, (5, 48, 64)), patches(9, (5, 48, 64), ignored=0)
    plain, bands = tables_of(tile_states(said, truth, K).sum(0).numpy(), K)
    assert np.array_equal(plain, confusion_of(said, truth, K).sum(0)) and np.array_equal(bands, boundary_confusion_of(said, truth, K).sum(0))


def test_one_unit_has_scores_but_no_interval():
    states = tile_states(patches(0, ignored=0), patches(1), K).numpy()
    found = intervals(states, np.zeros(3, int), partial(state_scores, num_classes=K))
    assert 'miou' in found and not [k for k in found if k.endswith(('_lo', '_hi'))]
    assert np.isclose(found['miou'], miou_of(tables_of(states.sum(0), K)[0]))


@pytest.fixture(scope='module')
def reported(tmp_path_factory):
    "An untrained run on a mosaic with four bands, no-data and nothing held out, reported; and its rows."
    folder = tmp_path_factory.mktemp('run')
    simulate_mosaic(folder/'data', 320, 384, seed=1, bands=4, section=256)
    landscape_classes().write(folder/'data'/'class_mapping.csv')
    def part(name, **options): return dict(class_path=f'geoforecast.segmentation.{name}', init_args=options)
    model = part('supervised.Supervised', network=part('models.DeepLabV3Plus', encoder='tiny'), warmup_steps=0)
    data = part('data.SegmentationDataModule', data_dir=str(folder/'data'), size=64, unlabelled_batch_size=0, harmonise=True, eval_every=10, save_latest_every=10)
    run = launch(dict(name='run', output_dir=str(folder/'run'), model=model, data=data, monitor='val/miou', trainer=dict(max_steps=10, accelerator='cpu', logger=False)))
    run.forecaster.inputs.set_statistics(run.datamodule.statistics)
    return run, report(run, maps=2)


def test_a_report_without_a_test_part(reported):
    run, rows = reported
    assert {r['split'] for r in rows} == {'val'} and len(pooled(rows)) == 1 and 'gap' in pooled(rows)[0]
    assert json.loads((run.folder/'scores.json').read_text()) == rows
    assert len(list(run.folder.glob('map_*.png'))) == 2 and (run.folder/'figures'/'scores.png').exists() and (run.folder/'model_card.md').exists()


def test_predictions_lie_where_the_image_lies(reported):
    run, _ = reported
    image, = (s.image for s in run.datamodule.roles['labelled'])
    classes, = run.folder.glob('predictions/**/classes.tif')
    with rasterio.open(image) as a, rasterio.open(classes) as b:
        assert (a.crs, a.transform, a.shape) == (b.crs, b.transform, b.shape)
        assert np.array_equal(a.dataset_mask() > 0, b.dataset_mask() > 0)


def test_class_rows_agree_with_the_pooled_one(reported):
    _, rows = reported
    total, = pooled(rows)
    for i, r in enumerate(r for r in rows if 'class' in r):
        assert r.get('iou') == total.get(f'iou_{i}') and r['class'] == landscape_classes().names[i]
    assert np.isclose(sum(r['share'] for r in rows if 'class' in r), 1)
    assert np.isclose(sum(r['share']*r.get('recall', 0) for r in rows if 'class' in r), total['accuracy'])


def test_a_bundle_scores_as_its_run_and_takes_its_bands_by_name(reported, tmp_path):
    run, rows = reported
    bundle = load_bundle(run.folder/'bundle')
    whole, = pooled(score_bundle(bundle, run.datamodule.data_dir))
    with rasterio.open(next(s.image for s in run.datamodule.roles['labelled'])) as f: image, profile = f.read(), f.profile
    order = [3, 0, 2, 1]
    named = [run.datamodule.channels[i] for i in order]
    for kind in ('images', 'masks'): (tmp_path/kind).mkdir()
    with rasterio.open(tmp_path/'images'/'mosaic.tif', 'w', **profile | dict(photometric='MINISBLACK')) as f:
        f.write(image[order])
        f.descriptions = named
    shutil.copy(next(s.mask for s in run.datamodule.roles['labelled']), tmp_path/'masks'/'mosaic.tif')
    assert pooled(score_bundle(bundle, tmp_path))[0] == whole
