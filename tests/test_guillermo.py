"What the notebook of the Guillermo networks leaves out: the full size, everything off at once, and the recipes' settings."
import pytest
import torch

import geoforecast.fire.guillermo as guillermo
from geoforecast.learn.configuration import compose, resolve_option

OFF = dict(pyramid_scales=(), attention=False, residual=False, deep_supervision=False)


def network_of(config: dict, input_dim: int) -> torch.nn.Module:
    "Build the network that a configuration names."
    network = config['model']['init_args']['network']
    return getattr(guillermo, network['class_path'].rpartition('.')[2])(input_dim, **network['init_args'])


@pytest.mark.parametrize('name', ['guillermo_v1', 'guillermo_v2'])
def test_forward_and_backward_at_the_benchmarks_size(name):
    "In bfloat16, which halves time and memory on a processor."
    torch.manual_seed(0)
    net = network_of(compose(f'fire/{name}'), 40)
    with torch.autocast('cpu', torch.bfloat16): logits, auxiliary = net(torch.randn(1, 5, 40, 128, 128))
    assert all(z.shape == (1, 1, 128, 128) for z in (logits, *auxiliary))
    sum(z.float().square().mean() for z in (logits, *auxiliary)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize('name, off', [('ConvLSTMGuillermoV1', OFF), ('ConvLSTMGuillermoV2', OFF | dict(bidirectional=False, temporal_attention=False, skips=False))])
@pytest.mark.parametrize('norm', ['channel', 'batch'])
def test_everything_off_at_once(name, off, norm):
    net = getattr(guillermo, name)(3, hidden_dims=(4, 8), norm=norm, **off)
    logits = net(torch.randn(2, 3, 3, 11, 6))
    assert logits.shape == (2, 1, 11, 6)
    logits.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize('name, widths', [('guillermo_v1', [64, 128, 256]), ('guillermo_v2', [64, 128, 256]), ('guillermo_v1_small', [8, 16, 32]), ('guillermo_v2_small', [8, 16, 32])])
def test_recipes_take_the_references_option_names(name, widths):
    config = compose(f'fire/{name}')
    assert config['model']['init_args']['network']['init_args']['hidden_dims'] == widths
    names = 'hidden_dims num_layers pyramid_scales dropout_rate deep_supervision_weight learning_rate weight_decay batch_size patience'.split()
    if 'v2' in name: names += ['stochastic_depth_rate', 'focal_dice_weight']
    for option in names: resolve_option(option, config)
    changed = compose(f'fire/{name}', hidden_dims='[4, 8]', num_layers=1, dropout_rate=.3)
    assert len(network_of(changed, 3).layers) == 1


def test_settings_of_the_references():
    v1, v2 = (compose(f'fire/guillermo_v{i}') for i in (1, 2))
    model = v2['model']['init_args']
    assert model['network']['init_args'] == dict(hidden_dims=[64, 128, 256], pyramid_scales=[1, 2, 4, 8], dropout_rate=.2, stochastic_depth_rate=.1)
    assert [model[k] for k in ('learning_rate', 'weight_decay', 'schedule', 'restart_epochs', 'minimum_learning_rate', 'deep_supervision_weight')] == [
        3e-3, .01, 'cosine_restarts', 10, 1e-4, .5]
    assert model['loss']['init_args'] == dict(focal_dice_weight=.5)
    assert v2['data']['init_args']['batch_size'] == 12 and v2['trainer'] == dict(max_epochs=200, gradient_clip_val=1.)
    assert (v1['monitor'], v1['patience'], v1['trainer']['max_epochs']) == ('val/f1', 15, 100)
    assert v1['model']['init_args']['deep_supervision_weight'] == .3
