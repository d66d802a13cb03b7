"Features and coverage on the Creek Fire of 2020, whole windows of real detections. Skips where the data is absent."
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from geoforecast.fire.channels import FireInputs
from geoforecast.fire.coverage import AGE, HOUR, Coverage, age_of, detections_and_history
from geoforecast.fire.features import REACH, front_distance, progression_rate
from geoforecast.fire.wsts import open_fire

CREEK = Path(os.environ.get('GEOFORECAST_DATA', Path(__file__).parents[2]/'shared'/'data'))/'fire'/'creek2020.hdf5'
pytestmark = pytest.mark.skipif(not CREEK.is_file(), reason='no Creek Fire under GEOFORECAST_DATA or ../shared/data')


@pytest.fixture(scope='module')
def raw(): return open_fire(CREEK).read_raw()


def test_detections_and_history_hold_all_that_the_age_needs(raw):
    for day in range(4, len(raw) - 1, 3):
        hours, history = detections_and_history(raw[day - 4:day + 1], raw[day + 1:day + 2, HOUR])
        np.testing.assert_array_equal(age_of(hours[:-1], history), raw[day - 4:day + 1, AGE])


def test_every_mix_is_consistent(raw):
    every = Coverage(**{name: .5 for name in Coverage().options})
    for seed in range(60):
        rng = np.random.default_rng(seed)
        day, row, col = rng.integers(4, len(raw) - 1), rng.integers(0, 147), rng.integers(0, 84)
        part = raw[..., row:row + 96, col:col + 96]
        seen, target = every(part[day - 4:day + 1], part[day + 1:day + 2, HOUR], rng)
        hours, age = seen[:, HOUR], seen[:, AGE]
        assert seen.dtype == target.dtype == np.float32 and seen.shape == (5, 24, 96, 96) and target.shape == (1, 96, 96)
        assert 0 <= hours.min() and hours.max() <= 24 and 0 <= target.min() and target.max() <= 24
        assert np.isfinite(age[hours > 0]).all() and ((age == 0) <= (hours > 0)).all()
        assert (np.diff(age, axis=0)[np.isfinite(age[:-1])] == 1).all()


def test_front_distance_and_rate_of_spread(raw):
    hour, age = torch.from_numpy(raw[:, HOUR]), torch.from_numpy(raw[:, AGE])
    theirs = np.stack([np.minimum(distance_transform_edt(~m), REACH) for m in raw[:, HOUR] > 0])
    np.testing.assert_allclose(front_distance(hour), theirs, rtol=1e-6)
    rate = progression_rate(age)
    assert rate[0].isnan().all() and (rate[1:] >= 0).all() and rate[1].max() > rate[40].max()


def test_features_without_weather_are_finite(raw):
    out = FireInputs('features')(torch.from_numpy(raw[None, 10:15]))
    assert out.isfinite().all() and not out[:, :, 2].any() and out[:, :, 0].min() == -1
