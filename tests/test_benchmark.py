"The benchmark's networks as a user meets them: from a configuration, through training with dates, to a bundle and back."
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import geoforecast
from geoforecast.fire.channels import BAND
from geoforecast.learn.bundle import load_bundle, save_bundle
from geoforecast.learn.forecaster import Forecaster

CONFIGS = Path(geoforecast.__file__).parent/'configs'/'fire'
TINY = dict(model_type='resnet', depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, layer_type='basic')


def read_model(name, channels='detections', **network):
    "Read the model section of a named configuration, with a few options of the network changed."
    model = yaml.safe_load((CONFIGS/f'{name}.yaml').read_text(encoding='utf-8'))['model']
    model['init_args']['inputs']['init_args']['channels'] = channels
    model['init_args']['network']['init_args'] |= network
    return model


def build(model):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Forecaster, 'model')
    return parser.instantiate(parser.parse_object({'model': model})).model


def made_window(height=37, width=53):
    raw = torch.rand(1, 5, 24, height, width)
    raw[:, :, BAND['detection_hour']] *= torch.rand(1, 5, height, width) < .1
    time = torch.from_numpy(np.arange('2019-12-29', '2020-01-03', dtype='datetime64[s]')[::86400].astype(np.int64))
    return raw, time[None]


@pytest.mark.parametrize('name, network', [('res18_unet', dict(encoder=TINY, hidden_dims=[16, 8, 8])), ('utae', {}), ('utae_small', {})])
def test_a_bundle_forecasts_as_the_model_that_was_saved(tmp_path, name, network):
    torch.manual_seed(0)
    model = read_model(name, **network)
    forecaster, (raw, time) = build(model), made_window()
    bundle = load_bundle(save_bundle(tmp_path/'bundle', forecaster, {'model': model}, dict(task='fire')))
    with torch.no_grad(): expected, got = (f.eval()(raw, time) for f in (forecaster, bundle.forecaster))
    assert expected.shape == (1, 1, 37, 53)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_static_channels_are_named_by_the_inputs():
    forecaster = build(read_model('res18_unet', channels='terrain detections', encoder=TINY, hidden_dims=[16, 8, 8]))
    names = [forecaster.inputs.channels[i] for i in forecaster.network.static]
    assert names == ['slope', 'aspect_sin', 'elevation', 'aspect_cos']
    raw, time = made_window()
    other = raw.clone()
    other[:, :-1, [BAND['slope'], BAND['elevation']]] += 1
    with torch.no_grad(): torch.testing.assert_close(forecaster.eval()(other), forecaster(raw), rtol=0, atol=0)


def test_an_unseen_day_has_no_influence_in_a_mixed_batch():
    forecaster, (raw, time) = build(read_model('utae_small')).eval(), made_window()
    unseen = raw.clone()
    unseen[:, 1] = torch.nan
    keep = [0, 2, 3, 4]
    with torch.no_grad():
        both = forecaster(torch.cat([unseen, raw]), torch.cat([time, time]))
        torch.testing.assert_close(both[:1], forecaster(raw[:, keep], time[:, keep]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both[1:], forecaster(raw, time), rtol=1e-4, atol=1e-5)


def test_one_window_alone_trains():
    forecaster, (raw, time) = build(read_model('utae_small')), made_window(32, 32)
    forecaster.train().network(forecaster.inputs(raw), time).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in forecaster.network.parameters())
