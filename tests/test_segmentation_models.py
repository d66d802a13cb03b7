"Segmentation networks: every encoder, trained weights, a machine without network, a failing size."
import os
import subprocess
import sys
import time
from copy import deepcopy
import pytest
import torch
from torch import nn
from geoforecast.core import ConfigError
from geoforecast.nn.encoders import ENCODERS, Encoder, encoder_config
from geoforecast.segmentation.models import DeepLabV3Plus, Discriminator

transformers = pytest.importorskip('transformers')
TINY_VIT = dict(model_type='dinov2', hidden_size=32, num_attention_heads=2, num_hidden_layers=2, image_size=56, patch_size=14, use_mask_token=False)


@pytest.mark.parametrize('name', ENCODERS)
def test_every_encoder_is_built_from_its_table(name):
    with torch.device('meta'):
        config = encoder_config(name)
        config.out_features = [config.stage_names[-1]]
        parameters = sum(p.numel() for p in transformers.AutoBackbone.from_config(config).parameters())
    published = dict(resnet18=11_176_512, resnet34=21_284_672, resnet50=23_508_032, resnet101=42_500_160, dinov2_small=22.06e6, dinov2_base=86.6e6, convnextv2_tiny=27.9e6)
    if name in published: assert parameters == pytest.approx(published[name], rel=2e-3)


@pytest.mark.parametrize('encoder', ['tiny', 'resnet18', 'convnextv2_atto', TINY_VIT], ids=str)
@pytest.mark.parametrize('size', [(64, 64), (33, 70)])
def test_sizes_bands_and_gradients(encoder, size):
    net = DeepLabV3Plus(5, 6, encoder, n_heads=2, deep_supervision=True, hidden_dim=16)
    logits, (other, deep) = net(torch.rand(2, 5, *size))
    assert logits.shape == other.shape == deep.shape == (2, 6, *size)
    sum(scores.square().mean() for scores in (logits, other, deep)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_batch_of_one_trains():
    DeepLabV3Plus(3, 4, 'tiny').train()(torch.rand(1, 3, 32, 32)).mean().backward()


def test_an_image_does_not_hang_on_its_neighbours():
    net, x = DeepLabV3Plus(3, 4, 'tiny').eval(), torch.rand(3, 3, 40, 40)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('encoder', ['tiny', 'convnextv2_atto'])
def test_weights_and_copies_survive_dilation(encoder):
    "Names of the tensors are those of the network without dilation; a copy, as for an average of weights, computes the same."
    torch.manual_seed(0)
    coarse, fine = Encoder(encoder, 4).eval(), Encoder(encoder, 4, output_stride=8).eval()
    fine.load_state_dict(coarse.state_dict())
    assert coarse.strides[-1] == 32 and fine.strides[-1] == 8
    x = torch.rand(1, 4, 64, 96)
    torch.testing.assert_close(fine(x)[-1][..., ::4, ::4], coarse(x)[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(deepcopy(fine)(x)[-1], fine(x)[-1])


def test_names_of_the_tensors_stay():
    "Bundles of other tasks hold these names."
    names = list(Encoder('resnet18').state_dict())
    assert names[0] == 'network.embedder.embedder.convolution.weight'
    assert 'network.encoder.stages.0.1.layers.0.layer.0.convolution.weight' in names and len(names) == 120
    assert Encoder('resnet18').strides == [2, 4, 8, 16, 32]


def test_trained_weights_of_a_folder(tmp_path):
    table = {k: v for k, v in ENCODERS['tiny'].items()}
    saved = transformers.AutoBackbone.from_config(encoder_config(table))
    saved.save_pretrained(tmp_path)
    net = DeepLabV3Plus(3, 4, table | dict(hub=str(tmp_path)), pretrained=True)
    last = net.encoder.network.encoder.stages[-1]
    for a, b in zip(last.parameters(), saved.encoder.stages[-1].parameters()): torch.testing.assert_close(a, b)
    with pytest.raises(ConfigError, match='cannot be read'):
        (tmp_path/'model.safetensors').unlink()
        DeepLabV3Plus(3, 4, table | dict(hub=str(tmp_path)), pretrained=True)


OFFLINE = """
import socket
def refuse(*args, **kwargs): raise OSError('no network here')
for name in ('create_connection', 'getaddrinfo'): setattr(socket, name, refuse)
from geoforecast.core import ConfigError
from geoforecast.segmentation.models import DeepLabV3Plus
DeepLabV3Plus(3, 7, 'tiny')
try: DeepLabV3Plus(3, 7, 'convnextv2_atto', pretrained=True)
except ConfigError as e: print(e)
"""

def test_without_network_trained_weights_are_refused_at_once(tmp_path):
    start = time.monotonic()
    done = subprocess.run([sys.executable, '-c', OFFLINE], capture_output=True, text=True, env=os.environ | dict(HF_HOME=str(tmp_path)), timeout=60)
    assert 'facebook/convnextv2-atto-1k-224 are not on this machine' in done.stdout and 'pretrained to false' in done.stdout, done.stderr
    assert time.monotonic() - start < 45


def test_the_discriminator_refuses_nothing_and_scores_each_image_alone():
    judge = Discriminator(5, 4, width=8).eval()
    maps, images = torch.rand(3, 5, 47, 90), torch.rand(3, 4, 47, 90)
    score, features = judge(maps, images)
    assert score.shape == (3,) and features.shape == (3, 64)
    torch.testing.assert_close(judge(maps[1:2], images[1:2])[0], score[1:2])
    assert sum(isinstance(m, nn.Dropout2d) for m in judge.modules()) == 3
