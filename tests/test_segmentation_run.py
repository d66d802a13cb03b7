"""A run of land cover: every option of the reference's command line reaches its place under its own name."""
from pathlib import Path

import papermill
import pytest
import torch

from geoforecast.core import ConfigError
from geoforecast.learn.configuration import compose
from geoforecast.learn.launch import Patience, launch
from geoforecast.segmentation.simulate import simulate_dataset

ROOT = Path(__file__).resolve().parents[1]
LEARNERS = ("supervised", "s4gan", "selftraining", "consistency")
TINY = dict(encoder="tiny", size=32, batch_size=2, eval_batch_size=4, overlap=0, **{"trainer.accelerator": "cpu"})
OPTIONS = dict(num_classes=7, batch_size=3, num_steps=700, eval_every=60, save_pred_every=40, save_latest_every=20, wandb_project="fields", ema_decay=.9, gradient_clip=3.,
               warmup_iters=11, early_stop_patience=7, learning_rate=1e-3, val_split=.5, scale_min=.75, scale_max=1.5)
OF_LEARNERS = dict(threshold_st=.3, st_loss_weight=.7, learning_rate_D=2e-4)
KNOWN = dict(supervised=0, s4gan=3, selftraining=2, consistency=2)  # how many of these a learner has


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return simulate_dataset(tmp_path_factory.mktemp("data")/"scenes", n_scenes=5, labelled=.8, size=96, seed=2)


def arrived(run):
    "Say where the reference's options have arrived, by their names: in the objects of a run that are at work."
    model, data, trainer, config = run.forecaster, run.datamodule, run.trainer, run.config
    found = dict(
        data_root=data.data_dir, class_mapping=data.mapping.names, num_classes=model.num_classes, batch_size=data.batch_size, num_steps=trainer.max_epochs*data.save_latest_every,
        checkpoint_dir=str(run.folder), eval_every=trainer.check_val_every_n_epoch*data.save_latest_every, save_pred_every=model.save_pred_every, save_latest_every=data.save_latest_every,
        wandb_project=config["wandb_project"], ema_decay=decay_of(model), gradient_clip=model.gradient_clip, warmup_iters=model.warmup_steps,
        early_stop_patience=next(c.patience for c in trainer.callbacks if isinstance(c, Patience)), learning_rate=model.learning_rate,
        val_split=round(len({t.scene for t in data.tiles["val"]})/4, 1), restore_from=str(run.ckpt_path), scale_min=model.weak.scale_min, scale_max=model.weak.scale_max)
    return found | {name: getattr(model, name) for name in OF_LEARNERS if hasattr(model, name)}


def decay_of(model):
    "Find the decay that a long warmed-up average has: what is left of a 1 after one update with zeros."
    old, new = next(model.teacher.parameters()), next(model.network.parameters())
    with torch.no_grad(): old.fill_(1.), new.fill_(0.), model.average.n_averaged.fill_(10**6)
    model.average.update_parameters(model.network)
    return round(old.flatten()[0].item(), 4)


@pytest.mark.parametrize("learner", LEARNERS)
def test_every_option_of_the_reference_arrives_under_its_name(learner, data, tmp_path):
    table = tmp_path/"table.csv"
    table.write_text((data/"class_mapping.csv").read_text().replace("water", "lake"))
    options = OPTIONS | dict(list(OF_LEARNERS.items())[:KNOWN[learner]]) | dict(data_root=str(data), checkpoint_dir=str(tmp_path/"run"), restore_from=str(tmp_path/"checkpoint_7.ckpt"))
    found = arrived(launch(f"segmentation/{learner}", class_mapping=str(table), **TINY | options))
    assert "lake" in found.pop("class_mapping")
    assert found == options


def test_a_learner_refuses_the_options_of_another(data):
    for learner, name in (("supervised", "threshold_st"), ("selftraining", "learning_rate_D")):
        with pytest.raises(ConfigError, match=name): compose(f"segmentation/{learner}", data_root=str(data), **{name: .1})


def test_scales_are_factors_or_pixels_and_can_be_switched_off(data, tmp_path):
    scales = lambda **options: (lambda weak: (weak.scale_min, weak.scale_max))(launch("segmentation/supervised", data_root=str(data), output_dir=str(tmp_path/"run"), **TINY | options).forecaster.weak)
    assert scales(scale_min=24, scale_max=48) == (.75, 1.5), "pixels of a tile of 32"
    assert scales(scale_min=.5, scale_max=2., no_multi_scale=True) == (1., 1.)


def test_the_run_notebook_has_every_option():
    names = set(papermill.inspect_notebook(str(ROOT/"nbs"/"runs"/"segmentation.ipynb")))
    assert {*OPTIONS, *OF_LEARNERS, "data_root", "class_mapping", "checkpoint_dir", "restore_from", "no_multi_scale"} <= names
