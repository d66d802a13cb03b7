"V4 inside a real training: when its unlabelled half begins, what it remembers, and that a killed run goes on as an uninterrupted one."
from functools import partial

import lightning as L
import pytest
import torch

from geoforecast.core import ConfigError
from geoforecast.segmentation.consistency import Consistency
from geoforecast.segmentation.data import SegmentationBatch, SegmentationDataModule
from geoforecast.segmentation.health import HealthLimits
from geoforecast.segmentation.models import DeepLabV3Plus
from geoforecast.segmentation.simulate import simulate_dataset

TINY = partial(DeepLabV3Plus, encoder='tiny')


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return simulate_dataset(tmp_path_factory.mktemp('consistency')/'scenes', n_scenes=4, labelled=.75, size=64, seed=2, classes=('background', 'building', 'road'))


def build(scenes, **options):
    torch.manual_seed(0)
    data = SegmentationDataModule(str(scenes), size=32, batch_size=2, eval_every=2, save_latest_every=2)
    learner = Consistency(TINY, **dict(num_classes=3, ema_decay=.9, st_start=2, st_ramp=3, learning_rate=1e-3, warmup_steps=0,
                                       limits=HealthLimits(gap_warning=None, gap_alarm=None, gap_severe=None)) | options)
    return learner, data


def fit(learner, data, epochs, checkpoint=None, **options):
    trainer = L.Trainer(max_epochs=epochs, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                        num_sanity_val_steps=0, limit_val_batches=0, **options)
    trainer.fit(learner, datamodule=data, ckpt_path=checkpoint)
    return trainer


class Stop(L.Callback):
    def __init__(self, epochs): self.epochs = epochs

    def on_train_epoch_end(self, trainer, learner):
        if trainer.current_epoch + 1 == self.epochs: trainer.should_stop = True


def test_unlabelled_half_begins_at_its_step(scenes, monkeypatch):
    asked = []
    monkeypatch.setattr(Consistency, 'lessons', lambda self, batch, old=Consistency.lessons: asked.append(self.step) or old(self, batch))
    learner, data = build(scenes, st_start=3)
    fit(learner, data, 3)
    assert asked == [3, 4, 5]
    assert not torch.equal(learner.experience.quantiles, torch.full((3,), 1/3))


def test_resumed_run_equals_uninterrupted(scenes, tmp_path):
    whole, data = build(scenes)
    fit(whole, data, 4)
    part, data = build(scenes)
    trainer = fit(part, data, 4, callbacks=[Stop(2)])
    trainer.save_checkpoint(tmp_path/'half.ckpt')
    rest, data = build(scenes)
    torch.manual_seed(99)
    fit(rest, data, 4, tmp_path/'half.ckpt')
    for (name, a), b in zip(whole.state_dict().items(), rest.state_dict().values()): assert torch.equal(a, b), name


def batch(seed=0):
    torch.manual_seed(seed)
    return SegmentationBatch(255*torch.rand(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32)), 255*torch.rand(2, 3, 32, 32), torch.arange(2))


def test_loss_is_over_all_valid_pixels():
    "Half of the pixels without data: they are in no label, and the share accepted is of the others."
    learner, b = Consistency(TINY, num_classes=3, st_start=0, ema_decay=.9, no_multi_scale=True, cutmix=0.).train(), batch()
    b.unlabelled[:, :, :, :16] = torch.nan
    _, terms = learner.losses(b)
    assert terms['ST_pixels'] <= 2*2*32*16 and terms['accept_rate'] <= 1
    learner.threshold_st = 0.
    assert learner.losses(b)[1]['accept_rate'] == 1 and learner.losses(b)[1]['ST_pixels'] == 2*2*32*16


def test_no_data_at_all_is_no_loss():
    learner, b = Consistency(TINY, num_classes=3, st_start=0, ema_decay=.9).train(), batch()
    b.unlabelled[:] = torch.nan
    total, terms = learner.losses(b)
    assert terms['ST'] == 0 and torch.isfinite(total)
    assert torch.equal(learner.experience.quantiles, torch.full((3,), 1/3))


@pytest.mark.parametrize('network', [partial(TINY, n_heads=3), partial(TINY, deep_supervision=True), partial(TINY, n_heads=2, deep_supervision=True)])
def test_heads(network):
    "Every head learns from both halves, the deep one from labels alone."
    learner = Consistency(network, num_classes=3, st_start=0, ema_decay=.9)
    learner.train().losses(batch())[0].backward()
    for head in [*learner.network.heads, *filter(None, [learner.network.deep])]: assert sum(p.grad.abs().sum() for p in head.parameters()) > 0


def test_one_view_costs_half():
    learner = Consistency(TINY, num_classes=3, st_start=0, ema_decay=.9, strong_views=1).train()
    sizes = []
    learner.network.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    learner.losses(batch())
    learner.strong_views = 2
    learner.losses(batch())
    assert sizes == [2 + 2, 2 + 4]


def test_without_a_teacher_or_a_pool(scenes):
    with pytest.raises(ConfigError, match='ema_decay'): fit(*build(scenes, ema_decay=0.), 1)
    learner, data = build(scenes)
    data.unlabelled_batch_size = 0
    with pytest.raises(ConfigError, match='unlabelled'): fit(learner, data, 1)
