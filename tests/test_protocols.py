"""The benchmark's protocol, worked out from the rules of its specification in plain loops and compared to the digit.

Nothing of the library stands in the expected values: the made file is read with h5py, the folds are written out, the
sample is made in the order of work (crop choice, flips and turns, sine, mask, z-score, append the mask, NaN to 0, one-hot).
"""
import csv
import math
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from geoforecast.core import ConfigError, DataError
from geoforecast.fire.channels import BANDS, FireInputs
from geoforecast.fire.data import FireDataModule, FireWindows
from geoforecast.fire.protocols import CLASS_WEIGHTS, FIRES_A_YEAR, FOLDS, differences, fold_years, rules_of
from geoforecast.fire.windows import windows_of
from geoforecast.fire.wsts import open_fire

DATA = Path(os.environ.get('GEOFORECAST_DATA', Path(__file__).parents[2]/'shared'/'data'))
FIRES = DATA/'fire'/'wsts_per_fire_stats.csv'
ANGLES, LAND_COVER, HOUR, CROP, DAYS = (7, 13, 19), 16, 22, 32, 3


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Write four fires, one a year, 8 images of 45 x 70 pixels, with gaps in bands and whole hours of detection."
    root = tmp_path_factory.mktemp('made')
    for k, year in enumerate((2018, 2019, 2020, 2021)):
        rng = np.random.default_rng(k)
        data = rng.normal(rng.uniform(-50, 50, 23)[:, None, None], 7, (8, 23, 45, 70)).astype('f4')
        data *= np.minimum(1, np.array([band.limit for band in BANDS[:23]], 'f4')/100)[:, None, None]  # what nature can have
        for b in ANGLES: data[:, b] = rng.uniform(0, 360, (8, 45, 70))
        data[:, LAND_COVER] = rng.integers(1, 18, (45, 70))
        data[rng.random(data.shape) < .02] = np.nan
        centre = np.hypot(*np.mgrid[-20 - k:25 - k, -30 + k:40 + k])
        burns = (centre < np.arange(3, 11)[:, None, None]) & (rng.random((8, 45, 70)) < .5)
        data[:, HOUR] = np.where(burns, rng.integers(1, 24, (8, 45, 70)), 0)
        (root/str(year)).mkdir()
        with h5py.File(root/str(year)/f'fire_{k}.hdf5', 'w') as f:
            dataset = f.create_dataset('data', data=data)
            dates = [f'{year}-08-{d:02}' for d in (1, 2, 3, 4, 6, 7, 8, 9)]  # the fifth is missing, as happens in the benchmark
            dataset.attrs.update(year=year, fire_name=f'fire_{k}', img_dates=dates, lnglat=(-120., 37.))
    return root


def stored(root, year):
    "Read one made fire."
    with h5py.File(next((root/str(year)).glob('*.hdf5')), 'r') as f: return f['data'][:]


def expected_statistics(root, years):
    "Return mean and standard deviation of each band over all days of the training years, in float64."
    mean, std = [], []
    for b in range(23):
        values = [v for year in years for v in stored(root, year)[:, b].ravel().tolist() if not math.isnan(v) and (b != HOUR or v > 0)]
        m = math.fsum(values)/len(values)
        mean.append(m)
        std.append(math.sqrt(math.fsum((v - m)**2 for v in values)/len(values)))
    for b in (*ANGLES, LAND_COVER): mean[b], std[b] = 0., 1.
    return np.array(mean, np.float32), np.array(std, np.float32)


def expected_channels(x, mean, std):
    "Make 40 channels of raw (T, 23, H, W): sine, mask, z-score, append the mask, NaN to 0, one-hot."
    days = []
    for day in x:
        planes = []
        for b in range(23):
            plane = np.sin(np.deg2rad(day[b])) if b in ANGLES else day[b]
            planes.append((plane - mean[b])/std[b])
        planes = [np.where(np.isnan(p), np.float32(0), p) for p in [*planes, (day[HOUR] > 0).astype(np.float32)]]
        number = planes[LAND_COVER].astype(int) - 1  # of a gap -1, which Python counts from the end: class 17
        classes = [np.array([[float(range(17)[n] == c) for n in row] for row in number], np.float32) for c in range(17)]
        days.append(np.stack(planes[:LAND_COVER] + classes + planes[LAND_COVER + 1:]))
    return np.stack(days)


def expected_training_sample(data, last, seed):
    "Choose, cut, flip and turn one sample by the rules; the draws come in the order of the rules."
    rng = np.random.default_rng(seed)
    x, y = data[last - DAYS + 1:last + 1].copy(), (data[last + 1, HOUR] > 0).astype(np.float32)
    best, chosen = -1, None
    for _ in range(10):
        top, left = rng.integers(0, x.shape[-2] - CROP), rng.integers(0, x.shape[-1] - CROP)
        cut = x[:, :, top:top + CROP, left:left + CROP], y[top:top + CROP, left:left + CROP]
        fire = cut[0][:, HOUR].mean() + 1000*cut[1].mean()
        if fire > best: best, chosen = fire, cut
    x, y = (c.copy() for c in chosen)
    hflip, vflip, turns = rng.random() > .5, rng.random() > .5, math.floor(rng.random()*4)
    for b in ANGLES:
        if hflip: x[:, b] = 360 - x[:, b]
        if vflip: x[:, b] = (180 - x[:, b]) % 360
        if turns: x[:, b] = (x[:, b] - 90*turns) % 360
    for flipped, axis in ((hflip, -1), (vflip, -2)):
        if flipped: x, y = np.flip(x, axis), np.flip(y, axis)
    for _ in range(turns):  # a quarter counterclockwise: the last column becomes the first row
        x, y = np.swapaxes(x, -1, -2)[..., ::-1, :], y.T[::-1]
    return x, y


def module(root, **options):
    return FireDataModule(str(root), **dict(window_size=DAYS, crop_size=CROP, batch_size=2, protocol='wsts', fold=2) | options)


def channels(data, raw):
    "Run a sample's raw bands through the library's inputs."
    return FireInputs('all', 'wsts').set_statistics(data.statistics)(raw[None])[0].numpy()


def same(found, expected):
    "Compare 40 channels: to the bit, sines to the last digit of a turn in float32."
    sines = [7, 13, 35]
    np.testing.assert_allclose(found[:, sines], expected[:, sines], rtol=0, atol=5e-7)
    np.testing.assert_array_equal(np.delete(found, sines, 1), np.delete(expected, sines, 1))


def test_statistics_and_class_weight(made):
    data = module(made)
    data.setup('fit')
    mean, std = expected_statistics(made, (2018, 2020))
    np.testing.assert_array_equal(np.float32(data.statistics['mean'])[:23], mean)
    np.testing.assert_array_equal(np.float32(data.statistics['std'])[:23], std)
    hours = [stored(made, y)[:, HOUR] for y in (2018, 2020)]
    assert data.statistics['pos_class_weight'] == pytest.approx(sum(h.size for h in hours)/sum((h > 0).sum() for h in hours), rel=1e-12)


@pytest.mark.parametrize('part', ['train', 'val'])
def test_a_training_sample(made, part):
    data = module(made)
    data.setup('fit')
    dataset, statistics = data.dataset(part, crop=True), expected_statistics(made, (2018, 2020))
    turns = set()
    for seed in range(12):
        i = seed % len(dataset)
        fire = data.fires[data.windows[part][i].fire]
        x, y = expected_training_sample(stored(made, fire.year), data.windows[part][i].day, seed)
        sample = dataset[i, seed]
        np.testing.assert_array_equal(sample.target[0].numpy(), y)
        np.testing.assert_array_equal(sample.inputs[:, :23].numpy(), x)
        same(channels(data, sample.inputs), expected_channels(x, *statistics))
        turns.add(x[0, 3].tobytes())
    assert len(turns) == 12


def test_a_test_sample(made):
    data = module(made)
    data.setup('fit')
    raw = stored(made, 2021)
    assert len(data.windows['test']) == 8 - 5
    for i, target in enumerate((5, 6, 7)):  # 45 x 70 becomes 32 x 64; half of 13 is rounded to the even 6
        sample = data.dataset('test')[i]
        x, y = raw[target - DAYS:target, :, 6:38, 3:67], raw[target, HOUR, 6:38, 3:67] > 0
        np.testing.assert_array_equal(sample.target[0].numpy(), y)
        same(channels(data, sample.inputs), expected_channels(x, *expected_statistics(made, (2018, 2020))))


def test_every_window_size_is_tested_on_the_same_days(made):
    counts = {size: {part: len(found) for part, found in module(made, window_size=size).windows.items()} for size in (1, 3, 5)}
    assert counts == {1: dict(train=2*7, val=7, test=3), 3: dict(train=2*5, val=5, test=3), 5: dict(train=2*3, val=3, test=3)}


def test_folds():
    written = '18-19 20 21, 18-19 21 20, 18-20 19 21, 18-20 21 19, 18-21 19 20, 18-21 20 19, 19-20 18 21, 19-20 21 18, 19-21 18 20, 19-21 20 18, 20-21 18 19, 20-21 19 18'
    for fold, text in enumerate(written.split(', ')):
        pair, val, test = text.split()
        assert fold_years(fold) == dict(train_years=[2000 + int(y) for y in pair.split('-')], val_years=[2000 + int(val)], test_years=[2000 + int(test)])
    assert len(FOLDS) == 12


@pytest.mark.skipif(not FIRES.is_file(), reason='no wsts_per_fire_stats.csv under GEOFORECAST_DATA or ../shared/data')
def test_counts_and_class_weights_of_the_benchmark():
    with open(FIRES, newline='') as f: fires = list(csv.DictReader(f))

    class Images:
        def __init__(self, row): self.dates, self.year = range(int(row['T'])), int(row['year'])
    found = [Images(row) for row in fires]
    samples = {year: len(windows_of([f for f in found if f.year == year], 5, cross_gaps=True)) for year in FIRES_A_YEAR}
    assert samples == {2018: 2893, 2019: 1055, 2020: 3287, 2021: 3337}
    assert samples == {year: sum(max(0, int(row['T']) - 5) for row in fires if int(row['year']) == year) for year in FIRES_A_YEAR}
    assert FIRES_A_YEAR == {year: sum(f.year == year for f in found) for year in FIRES_A_YEAR}
    for pair, weight in CLASS_WEIGHTS.items():
        rows = [row for row in fires if int(row['year']) in pair]
        assert round(sum(int(row['total_pixels']) for row in rows)/sum(int(row['fire_pixels']) for row in rows), 1) == weight


def test_names_say_what_was_changed(made):
    assert module(made, crop_size=128).protocol_name == 'wsts'
    assert module(made).protocol_name == 'wsts with crop_size=32'
    years = dict(fold=None, train_years=[2018, 2020], val_years=[2019], test_years=[2021])
    assert module(made, protocol='default', samples_per_epoch=8, **years).protocol_name == 'default'
    assert module(made, protocol='default', validate_on='crops', **years).protocol_name == 'default with validate_on=crops'
    data_rules = differences().query("place == 'data'").option.tolist()
    assert data_rules == list(rules_of('wsts')) == list(rules_of('default'))


def test_default_crosses_no_gap(made):
    fires = [open_fire(p) for p in sorted(made.glob('*/*.hdf5'))]
    assert {w.day for w in windows_of(fires, DAYS)} == {2, 6}  # days 1-3 to 4, and 6-8 to 9, of August
    assert FireWindows(fires, windows_of(fires, DAYS), DAYS)[0].valid.all()


def test_further_fires_only_train_and_come_in_the_share_asked_for(made, tmp_path):
    (tmp_path/'2031').mkdir()
    with h5py.File(tmp_path/'2031'/'other.hdf5', 'w') as f:
        dataset = f.create_dataset('data', data=stored(made, 2018))
        dataset.attrs.update(fire_name='other', img_dates=[f'2031-08-{d:02}' for d in range(1, 9)], lnglat=(-120., 37.))
    with pytest.raises(DataError, match='names of their own'): module(made, train_dir=[str(made/'2018')])
    data = module(made, train_dir=[str(tmp_path)], train_dir_share=.25)
    assert {data.fires[w.fire].year for w in data.windows['train']} == {2018, 2020, 2031}
    assert not any(w.fire >= data.n_main for part in ('val', 'test') for w in data.windows[part])
    sampler = data.sampler(2000)
    drawn = list(sampler)
    assert abs(np.mean([i >= data.n_train for i, _ in drawn]) - .25) < .03
    half = data.sampler(1000)
    half.set_epoch(1)
    assert list(half) == drawn[1000:]
    assert sorted(i for r in range(2) for i, _ in data.sampler(2000, r, 2)) == sorted(i for i, _ in drawn)


def test_statistics_of_fires_never_see_later_days(made):
    with pytest.raises(ConfigError, match='statistics_of'):
        FireDataModule(str(made), protocol='wsts', crop_size=CROP, batch_size=2, window_size=2, test_start_date='2020-08-08', val_start_date='2020-08-04')
