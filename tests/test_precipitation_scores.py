"Scores and baselines of rain beyond their notebooks: odd shapes against the library `scores`, long streams, and the real file over Iberia. The last skips where the data is absent."
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from geoforecast.learn.forecaster import Batch
from geoforecast.precipitation.baselines import fit_baselines, fit_ridge
from geoforecast.precipitation.data import PrecipitationDataModule
from geoforecast.precipitation.evaluation import RainTally, score_rows, summary, verdict
from geoforecast.precipitation.regions import RegionConfig
from geoforecast.precipitation.scores import RainScores, ensemble_scores_of, ensemble_states, rain_scores, rain_scores_of, rain_states

DATA = Path(os.environ.get('GEOFORECAST_DATA', Path(__file__).parents[2]/'shared'/'data'))/'precipitation'/'iberia_1961_1995.nc'


def rain(shape, seed):
    "Mostly dry, at times heavy, with amounts that lie on the thresholds."
    rng = np.random.default_rng(seed)
    amounts = np.where(rng.random(shape) < .1, rng.choice([.1, 1, 5, 10, 25], shape), rng.gamma(.5, 8, shape))
    return np.where(rng.random(shape) < .6, 0, amounts).astype(np.float32)


@pytest.mark.parametrize('shape', [(6, 9), (20, 20), (1, 3), (7, 5), (1, 1)])
def test_any_shape_as_the_library_has_it(shape):
    forecast, truth = rain((40, *shape), 1), rain((40, *shape), 2)
    truth[np.random.default_rng(3).random(truth.shape) < .15] = np.nan
    p, t = (torch.from_numpy(x)[:, None] for x in (forecast, truth))
    ours = rain_scores_of(rain_states(p, t, ~t.isnan()).sum(0))
    library = rain_scores(*(xr.DataArray(x, dims=('time', 'lat', 'lon')) for x in (forecast, truth)))
    for key, value in library.items():
        assert np.isclose(ours[key], value, rtol=1e-5, atol=1e-7, equal_nan=True), key
    assert all(np.isnan(ours[k]) for k in set(ours) - set(library)), 'only windows larger than the field have no score'


def test_a_long_stream_keeps_its_digits():
    metric, exact = RainScores(), 0
    for i in range(300):
        p, t = (torch.from_numpy(rain((8, 1, 16, 20), 2*i + k)) for k in (0, 1))
        metric.update(p, t)
        exact = exact + rain_states(p, t).sum(0)
    wanted = rain_scores_of(exact)
    for key, value in metric.compute().items():
        assert np.isclose(value, wanted[key], rtol=1e-4, atol=2e-5, equal_nan=True), key


def test_more_members_of_the_same_kind_change_little():
    truth = torch.from_numpy(rain((200, 1, 6, 5), 1))
    members = torch.from_numpy(np.stack([rain((200, 6, 5), 10 + k) for k in range(24)], 1))
    few, many, twice = (ensemble_scores_of(ensemble_states(m, truth).sum(0)) for m in (members[:, :12], members, members.repeat(1, 2, 1, 1)))
    assert many['crps'] < few['crps'] < 1.1*many['crps']
    assert all(np.isclose(many[k], twice[k]) for k in many), 'an ensemble said twice is the same ensemble'


def test_one_forecast_has_scores_and_no_interval():
    p, t = (torch.from_numpy(rain((1, 1, 6, 5), k)) for k in (1, 2))
    states = {name: rain_states(x, t).numpy() for name, x in (('zero', torch.zeros_like(p)), ('net', p))}
    rows = score_rows(RainTally(np.array(['2001-01-01'], 'datetime64[ns]'), states), 'all')
    assert rows[-1]['model'] == 'net' and rows[-1]['n'] == 1 and not any(k.endswith('_lo') for k in rows[-1])
    assert verdict(rows) == '' and 'net' in str(summary(rows))


def test_a_cell_that_misses_days_is_fitted_on_the_others():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(300, 2, 3, 4, 5)).astype(np.float32))
    target = (x[:, -1, :1, :, 2:] + .1*torch.from_numpy(rng.normal(size=(300, 1, 4, 3)).astype(np.float32))).clamp(min=0)
    hidden = torch.ones_like(target, dtype=torch.bool)
    hidden[::3, 0, 1, 1] = False
    def fitted(valid): return fit_ridge(*([Batch(x[part], target[part].where(valid[part], 99.), valid[part], torch.zeros(len(x[part]), 2), torch.zeros(0))]
                                          for part in (slice(0, 200), slice(200, None))), torch.zeros(3), torch.ones(3))['mm'][1]
    whole, partly = (fitted(valid).weight.unflatten(1, (4, 3)) for valid in (torch.ones_like(hidden), hidden))
    others = torch.ones(4, 3, dtype=torch.bool)
    others[1, 1] = False
    assert torch.allclose(whole[:, others], partly[:, others], atol=1e-5)
    assert .8 < (partly[:, 1, 1]*whole[:, 1, 1]).sum()/(whole[:, 1, 1]**2).sum() < 1.2, 'neither the values that are hidden nor the gaps pull'


@pytest.mark.skipif(not DATA.is_file(), reason='no Iberian data under GEOFORECAST_DATA or ../shared/data')
def test_baselines_over_iberia():
    "Near the specification's figures for other years: persistence 5.368 mm, climatology 4.266, ridge 3.957; these years are drier, and the ratios are the same."
    region = RegionConfig(35., 47.5, -5., 5.)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        data = PrecipitationDataModule(str(DATA), region, train_end_year=1985, val_end_year=1988)
    found = {}
    for name, (_, module) in fit_baselines(data).items():
        scores = rain_scores_of(sum(rain_states(module(b), b.target, b.valid).sum(0) for b in data.fields('test')))
        found[name] = {k: float(v) for k, v in scores.items()}
    rmse = {name: scores['rmse'] for name, scores in found.items()}
    assert rmse['persistence'] == pytest.approx(4.634, abs=.02) and rmse['climatology'] == pytest.approx(3.79, abs=.03) and rmse['ridge'] == pytest.approx(3.47, abs=.03)
    assert rmse['ridge']/rmse['persistence'] == pytest.approx(3.957/5.368, abs=.03) and rmse['climatology']/rmse['persistence'] == pytest.approx(4.266/5.368, abs=.03)
    assert found['ridge']['csi_5'] == pytest.approx(.165, abs=.02) and abs(found['ridge']['bias']) < .2
    assert found['ridge_log']['mae'] == pytest.approx(1.49, abs=.03) and found['ridge_log']['csi_1'] == pytest.approx(.404, abs=.02)
