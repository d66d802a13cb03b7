"""Self-training: who labels, who learns, from which view, from which step on, and how loudly."""
from functools import partial

import lightning as L
import pytest
import torch

from geoforecast.core import ConfigError
from geoforecast.learn.configuration import compose
from geoforecast.segmentation.classes import IGNORE, ClassMapping, default_colours
from geoforecast.segmentation.data import SegmentationBatch, SegmentationDataModule
from geoforecast.segmentation.models import DeepLabV3Plus
from geoforecast.segmentation.selftraining import PRESETS, SelfTraining, describe_labels, pseudo_labels
from geoforecast.segmentation.simulate import simulate_dataset

NETWORK = partial(DeepLabV3Plus, encoder="tiny", n_heads=2)
OPTIONS = dict(num_classes=3, crop_size=32, ema_decay=.9, warmup_steps=0, learning_rate=1e-2)
QUIET = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0)


def make_learner(**options):
    torch.manual_seed(0)
    return SelfTraining(NETWORK, **OPTIONS | options)


def make_batch(seed, unlabelled_seed=None):
    generator = torch.Generator().manual_seed(seed)
    other = torch.Generator().manual_seed(seed if unlabelled_seed is None else unlabelled_seed)
    return SegmentationBatch(255*torch.rand(2, 3, 40, 40, generator=generator), torch.randint(0, 3, (2, 40, 40), generator=generator),
                             255*torch.rand(2, 3, 40, 40, generator=other), torch.arange(2))


def trained(learner, batches):
    L.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET).fit(learner, torch.utils.data.DataLoader(batches, batch_size=None))
    return {k: v.clone() for k, v in learner.network.state_dict().items()}


def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)


def seen_by(network, seen):
    return network.register_forward_pre_hook(lambda module, args: seen.append((args[0].detach().clone(), module.training)))


def test_the_teacher_labels_one_view_and_the_student_learns_another():
    learner, teacher, student = make_learner(st_start=0, threshold_st=0.).train(), [], []
    seen_by(learner.teacher, teacher), seen_by(learner.network, student)
    learner.losses(make_batch(0))
    assert len(teacher) == 1 and not teacher[0][1], "the teacher looks once, in evaluation mode"
    assert all(training for _, training in student)
    lessons = [x for x, _ in student if x.shape == teacher[0][0].shape]
    assert lessons and not any(torch.equal(x, teacher[0][0]) for x in lessons), "the student trains on the pixels that were labelled"
    changed = (lessons[-1] != teacher[0][0]).any(1).float().mean()
    assert changed > .3


def test_labels_come_from_the_average_and_not_from_the_student():
    learner, batch = make_learner(st_start=0, threshold_st=0., cutmix=0.).train(), make_batch(0)
    with torch.no_grad():
        for head in learner.teacher.heads: head[-1].bias.copy_(torch.tensor([0., 0., 100.]))
    _, ids, trust = learner.lesson(batch)
    assert set(ids[ids != IGNORE].tolist()) == {2} and trust[ids != IGNORE].min() == 1
    with torch.no_grad():
        for head in learner.network.heads: head[-1].bias.copy_(torch.tensor([0., 100., 0.]))
    assert set(learner.lesson(batch)[1].unique().tolist()) <= {2, IGNORE}


def test_nothing_beyond_the_border_and_nothing_without_data_is_a_label():
    learner, batch = make_learner(st_start=0, threshold_st=0., scale_min=.5, scale_max=.5, crop_size=40).train(), make_batch(0)
    _, ids, trust = learner.lesson(batch)
    assert .6 < (ids == IGNORE).float().mean() < .85, "at half the size three quarters lie beyond the border"
    assert trust[ids == IGNORE].sum() == 0
    nothing = batch._replace(unlabelled=torch.full_like(batch.unlabelled, torch.nan))
    _, ids, trust = learner.lesson(nothing)
    assert (ids == IGNORE).all() and trust.sum() == 0
    assert all(torch.isfinite(v) for v in learner.losses(nothing)[:1])


def test_unlabelled_images_have_no_influence_before_their_time():
    labelled = [make_batch(i) for i in range(3)]
    other = [make_batch(i, 100 + i) for i in range(3)]
    late, late_other = (trained(make_learner(st_start=3, threshold_st=0.), b) for b in (labelled, other))
    assert same(late, late_other)
    early, early_other = (trained(make_learner(st_start=2, threshold_st=0.), b) for b in (labelled, other))
    assert not same(early, early_other) and not same(early, late)


def test_a_class_is_trusted_by_its_own_threshold():
    learner = make_learner(threshold_st=.5, thresholds=dict(road=.9))
    learner.mapping = ClassMapping(("field", "road", "house"), default_colours(3), (0., .7, None), 0)
    assert learner.confidence() == (0., .9, .5)
    probability = torch.tensor([[.4, .35, .25], [.1, .8, .1], [.05, .93, .02], [.2, .25, .55], [.3, .25, .45]]).T.reshape(1, 3, 1, 5)
    ids, trust = pseudo_labels(probability, learner.confidence(), torch.ones(1, 1, 5, dtype=torch.bool))
    assert ids.flatten().tolist() == [0, 1, 1, 2, 2] and trust.flatten().tolist() == [1, 0, 1, 1, 0]
    learner.thresholds = dict(raod=.9)
    with pytest.raises(ConfigError, match="raod"): learner.confidence()


def test_few_trusted_pixels_make_a_small_step():
    learner = make_learner(loss=None).train()
    images, ids = torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long)
    learner.loss.weights = dict(CE=1.)
    learner.network.eval() # batch norm and dropout aside
    full, tenth = torch.ones(2, 32, 32), torch.zeros(2, 32, 32)
    tenth[:, :, :3] = 1
    assert learner.taught(images, ids, tenth) < .25*learner.taught(images, ids, full)


def test_counts_are_of_images_and_pixels():
    ids, trust = torch.tensor([[[0, 0], [1, IGNORE]], [[1, 1], [1, 1]]]), torch.tensor([[[1., 1], [1, 1]], [[0., 0], [0, 0]]])
    found = {k: float(v) for k, v in describe_labels(ids, trust, 3).items()}
    assert found["ST_images"] == 1 and found["ST_pixels"] == found["ST_cnt"] == 3 and found["accept_rate"] == pytest.approx(3/7)
    assert [found[f"pseudo_{i}"] for i in range(3)] == pytest.approx([2/3, 1/3, 0])


def test_every_head_learns_from_the_lesson():
    learner, batch = make_learner(st_start=0, threshold_st=0.).train(), make_batch(0)
    images, ids, trust = learner.lesson(batch)
    learner.taught(images, ids, trust).backward()
    slopes = [head[0][0].weight.grad for head in learner.network.heads]
    assert all(s.abs().sum() > 0 for s in slopes) and not torch.allclose(*slopes)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return simulate_dataset(tmp_path_factory.mktemp("scenes")/"scenes", n_scenes=5, labelled=.8, size=96, seed=2)


def run(scenes, folder, epochs, ckpt_path=None):
    torch.manual_seed(4)
    data = SegmentationDataModule(str(scenes), size=48, batch_size=2, eval_every=2, save_latest_every=2)
    learner = SelfTraining(NETWORK, **OPTIONS | dict(num_classes=data.num_classes, st_start=1, threshold_st=.2, schedule="constant"))
    trainer = L.Trainer(max_epochs=epochs, default_root_dir=folder, enable_checkpointing=False, **QUIET)
    trainer.fit(learner, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
    trainer.save_checkpoint(folder/"last.ckpt")
    return {k: v.clone() for k, v in learner.state_dict().items()}


def test_a_resumed_training_equals_one_that_was_left_alone(scenes, tmp_path):
    whole = run(scenes, tmp_path/"whole", 4)
    half = run(scenes, tmp_path/"half", 2)
    rest = run(scenes, tmp_path/"half", 4, tmp_path/"half"/"last.ckpt")
    assert not same(half, whole) and same(rest, whole)


def test_it_asks_for_a_teacher_and_for_unlabelled_images(scenes):
    data = SegmentationDataModule(str(scenes), size=48, batch_size=2, unlabelled_batch_size=0)
    fit = lambda learner, data: L.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET).fit(learner, datamodule=data)
    with pytest.raises(ConfigError, match="unlabelled"): fit(make_learner(num_classes=data.num_classes), data)
    with pytest.raises(ConfigError, match="ema_decay"): fit(make_learner(num_classes=data.num_classes, ema_decay=0.), data)


def test_presets_are_configurations():
    for name, preset in PRESETS.items(): assert compose(f"segmentation/{name}") == compose("segmentation/selftraining", **preset)
    first, second, third = (compose(f"segmentation/phase{i}") for i in (1, 2, 3))
    assert first["trainer"]["max_steps"] == 75_000 and third["patience"] == 60
    assert second["model"]["init_args"]["threshold_lower"] == .1 and "threshold_lower" not in first["model"]["init_args"]
