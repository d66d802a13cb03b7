"What the notebooks of the rain networks and heads leave out: full size, half precision, files, other windows, real rain."
import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from geoforecast.core import ConfigError
from geoforecast.nn import convlstm
from geoforecast.precipitation import models
from geoforecast.precipitation.heads import MeanHead, QuantileHead, RainLoss

NETWORKS = ('ConvLSTMUNet', 'DualStreamConvLSTMUNet', 'SimVP', 'UNet')
DATA = Path(os.environ.get('GEOFORECAST_DATA', Path(__file__).parents[2]/'shared'/'data'))/'precipitation'/'iberia_1961_1995.nc'


def build(name, input_dim=10, window_size=6, **options):
    return getattr(models, name)(input_dim, window_size, **dict(upstream_columns=3) | options)


def test_the_cell_is_the_one_of_nn():
    assert models.ConvLSTMCell is convlstm.ConvLSTMCell
    cell = models.ConvLSTMCell(10, 8)
    h, c = cell(torch.randn(2, 10, 6, 9), cell.init_hidden(2, 6, 9))
    assert h.shape == c.shape == (2, 8, 6, 9)


@pytest.mark.parametrize('name', NETWORKS)
def test_networks_are_built_alike(name):
    "The forecaster hands over four values by these names; their order is the contract."
    parameters = inspect.signature(getattr(models, name)).parameters
    assert list(parameters)[:4] == ['input_dim', 'window_size', 'output_dim', 'upstream_columns']
    assert parameters['input_dim'].default == 56 and parameters['output_dim'].default == 1 and parameters['upstream_columns'].default == 0


@pytest.mark.parametrize('size', [(61, 221), (64, 128)])
@pytest.mark.parametrize('name', NETWORKS)
def test_forward_and_backward_at_full_size(name, size):
    "One window of two steps, 56 channels, in bfloat16, which halves the memory."
    torch.manual_seed(0)
    net = build(name, 56, 2, upstream_columns=size[1]//2)
    with torch.autocast('cpu', torch.bfloat16): y = net(torch.randn(1, 2, 56, *size))
    assert y.shape == (1, 1, size[0], size[1] - size[1]//2)
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize('name', NETWORKS)
def test_every_weight_learns(name):
    torch.manual_seed(0)
    net = build(name)
    net(torch.randn(4, 6, 10, 8, 11)).square().mean().backward()
    assert not [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize('name', NETWORKS)
def test_upstream_is_input_and_not_output(name):
    "What lies upstream changes the forecast downstream, and no upstream column is returned."
    torch.manual_seed(0)
    net = build(name).eval()
    x = torch.randn(1, 6, 10, 6, 8)
    other = x.clone()
    other[..., 2] += 1
    with torch.no_grad(): y, changed = net(x), net(other)
    assert y.shape[-1] == 5 and not torch.equal(y, changed)


@pytest.mark.parametrize('name', ['ConvLSTMUNet', 'DualStreamConvLSTMUNet'])
@pytest.mark.parametrize('window_size', [1, 3, 6])
def test_recurrent_networks_take_any_window(name, window_size):
    assert build(name, window_size=None)(torch.randn(2, window_size, 10, 6, 9)).shape == (2, 1, 6, 6)


@pytest.mark.parametrize('name', ['SimVP', 'UNet'])
def test_the_others_name_a_wrong_window(name):
    with pytest.raises(ConfigError, match='windows of 6 steps with 10 channels, these have 4 steps with 10'):
        build(name)(torch.randn(1, 4, 10, 6, 9))


@pytest.mark.parametrize('name', ['ConvLSTMUNet', 'DualStreamConvLSTMUNet'])
def test_checkpointing_changes_no_gradient(name):
    torch.manual_seed(0)
    plain, again = build(name), build(name, checkpointing=True)
    again.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 10, 6, 9)
    for net in (plain, again): net(x).square().mean().backward()
    for p, q in zip(plain.parameters(), again.parameters()): torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize('name', NETWORKS)
def test_weights_survive_a_file(name, tmp_path):
    net = build(name).eval()
    torch.save(net.state_dict(), tmp_path/'net.pt')
    loaded = build(name).eval()
    loaded.load_state_dict(torch.load(tmp_path/'net.pt', weights_only=True))
    x = torch.randn(1, 6, 10, 6, 9)
    assert torch.equal(net(x), loaded(x))


@pytest.mark.parametrize('depth', [1, 2, 3, 4])
def test_any_depth(depth):
    net = models.ConvLSTMUNet(4, hidden_dims=(4, 6, 8, 10)[:depth])
    assert net(torch.randn(1, 2, 4, 5, 7)).shape == (1, 1, 5, 7)
    assert len(net.encoder.levels) == depth and len(net.decoder.levels) == depth - 1


@pytest.mark.parametrize('head', [MeanHead('mm'), MeanHead('log'), MeanHead('mm', 'log'), MeanHead('log', 'log'), QuantileHead(8), QuantileHead(8, 'mm')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_heads_give_finite_gradients_from_anywhere(head, dtype):
    "Far below zero, at it and far above, on dry and wet cells, whatever the network's precision."
    head.set_statistics(.4, .7, 4.)
    z = torch.linspace(-9, 9, 10*head.output_dim).view(1, head.output_dim, 2, 5).to(dtype).requires_grad_()
    target = torch.tensor([0., .1, 5., 80., 0.]).expand(1, 1, 2, 5)
    loss = RainLoss(head)(head(z), target, torch.ones_like(target, dtype=torch.bool), torch.tensor([0., 45.]))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and z.grad.isfinite().all()
    point = head.point(head(z))
    assert point.shape == target.shape and (point >= 0).all()


@pytest.mark.parametrize('head', [MeanHead('mm'), MeanHead('log'), MeanHead('mm', 'log'), MeanHead('log', 'log'), QuantileHead(8), QuantileHead(8, 'mm')])
def test_far_below_zero_dry_is_exact_and_free_and_wet_pulls_up(head):
    head.set_statistics(.4, .7, 4.)
    z = torch.zeros(1, head.output_dim, 1, 2)
    z[:, 0] = -20
    z.requires_grad_()
    decoded, target = head(z), torch.tensor([[[[0., 12.]]]])
    assert (decoded < 0).all() and not head.point(decoded).any()
    head.error(decoded, target).sum().backward()
    assert not z.grad[..., 0].any() and z.grad[0, 0, 0, 1] < 0


def test_statistics_travel_with_the_weights(tmp_path):
    torch.save(MeanHead('log').set_statistics(.4, .7, 4.).state_dict(), tmp_path/'head.pt')
    head = MeanHead('log')
    head.load_state_dict(torch.load(tmp_path/'head.pt', weights_only=True))
    assert [round(b.item(), 6) for b in (head.mean_log, head.std_log, head.scale_mm)] == [.4, .7, 4.]


def test_wrong_options_are_named():
    with pytest.raises(ConfigError, match="space 'inch'"): MeanHead('inch')
    with pytest.raises(ConfigError, match='n_quantiles 1'): QuantileHead(1)
    with pytest.raises(ConfigError, match='high_precip_weight -1'): RainLoss(MeanHead(), high_precip_weight=-1)
    with pytest.raises(ConfigError, match='include_upstream'): models.DualStreamConvLSTMUNet(10)
    with pytest.raises(ConfigError, match='hidden_dims'): models.DualStreamConvLSTMUNet(10, upstream_columns=2, hidden_dims=(8,))


@pytest.mark.skipif(not DATA.is_file(), reason='no rain under GEOFORECAST_DATA or ../shared/data')
def test_quantiles_and_means_of_real_rain():
    "One distribution for all of Iberia's days: its CRPS must come close to that of the days' own quantiles, its mean to theirs."
    with xr.open_dataset(DATA) as ds: rain = torch.from_numpy(ds.precipitation.values.clip(0)).float().flatten()
    statistics = rain.log1p().mean().item(), rain.log1p().std().item(), rain.std().item()
    head, z = QuantileHead(20).set_statistics(*statistics), torch.zeros(1, 20, 1, 1, requires_grad=True)
    optimizer, g = torch.optim.Adam([z], .05), torch.Generator().manual_seed(0)
    for _ in range(300):
        some = rain[torch.randint(len(rain), (4096,), generator=g)].view(1, 1, 1, -1)
        optimizer.zero_grad(); head.error(head(z), some).mean().backward(); optimizer.step()
    best = torch.from_numpy(np.quantile(rain.numpy(), head.levels.numpy())).float().view(1, 20, 1, 1)
    crps = {name: head.error(q, rain.view(1, 1, 1, -1)).mean().item() for name, q in dict(learnt=head(z).detach(), best=best).items()}
    assert crps['best'] - 1e-4 <= crps['learnt'] < 1.02*crps['best']
    assert abs(head.point(head(z)).item() - rain.mean().item()) < .15*rain.mean().item()
