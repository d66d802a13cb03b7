"Simulated fires: processes do not matter, sizes and shares are those of the real fires, speed."
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from geoforecast.fire.simulate import random_shape, simulate_fire, simulate_fires
from geoforecast.fire.spread import REGIMES

DATA = Path(os.environ.get('GEOFORECAST_DATA', Path(__file__).parents[2]/'shared'/'data'))


def test_processes_do_not_matter(tmp_path):
    alone = simulate_fires(tmp_path/'a', 3, shape=(6, 40, 32))
    together = simulate_fires(tmp_path/'b', 3, shape=(6, 40, 32), jobs=2)
    assert [p.relative_to(tmp_path/'a') for p in alone] == [p.relative_to(tmp_path/'b') for p in together]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(alone, together))


@pytest.mark.parametrize('regime', REGIMES)
def test_every_regime_burns_on_the_smallest_grid(regime):
    for seed in range(5):
        fire = simulate_fire(seed, (4, 24, 24), regime=regime)
        assert np.isfinite(fire.data).all() and fire.mask.any((1, 2)).mean() > .6


def test_a_full_size_fire_takes_seconds():
    began = time.process_time()
    fire = simulate_fire(1, (12, 300, 230))
    assert fire.data.shape == (12, 23, 300, 230) and time.process_time() - began < 4


def test_sizes_and_shares_are_those_of_the_benchmark():
    table = DATA/'fire'/'wsts_per_fire_stats.csv'
    if not table.is_file(): pytest.skip(f'{table} is not there')
    real = pd.read_csv(table)
    shapes = pd.DataFrame([random_shape(np.random.default_rng(i)) for i in range(500)], columns=list('THW'))
    for size in 'THW':
        assert real[size].min() <= shapes[size].min() and shapes[size].max() <= real[size].max()
        assert abs(shapes[size].mean() - real[size].mean()) < real[size].std()/3
    shares = np.array([simulate_fire([0, i], (12, 300, 230)).mask.mean() for i in range(4)])
    assert (real.base_rate.min() < shares).all() and (shares < real.base_rate.max()).all()
