"""A run of land cover: every option of the reference's command line reaches its place under its own name, and a run killed by SIGKILL ends with the bits of one left alone.

Each training is a process of its own, forked from a server that has imported the library once.
"""
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import papermill
import pytest
import torch
from safetensors.torch import load_file

from geoforecast.core import ConfigError
from geoforecast.learn.callbacks import read_metrics
from geoforecast.learn.configuration import compose
from geoforecast.learn.launch import Patience, launch
from geoforecast.segmentation.simulate import simulate_dataset

ROOT = Path(__file__).resolve().parents[1]
LEARNERS = ("supervised", "s4gan", "selftraining", "consistency")
TINY = dict(encoder="tiny", size=32, batch_size=2, eval_batch_size=4, overlap=0, **{"trainer.accelerator": "cpu"})
STEPS, EPOCH, EVALUATION = 12, 3, 6
RUN = TINY | dict(num_steps=STEPS, save_latest_every=EPOCH, eval_every=EVALUATION, save_pred_every=6, learning_rate=1e-2, warmup_iters=2, ema_decay=.9, log_level="warning")
TEACH = dict(st_start=2, threshold_st=0.)  # pseudo-labels long before the kill
OWN = dict(s4gan=TEACH | dict(discriminator_start=1), selftraining=TEACH, consistency=dict(st_start=2))
TIMING = ("samples_per_second", "waiting_for_data", "peak_memory_gb")
OPTIONS = dict(num_classes=7, batch_size=3, num_steps=700, eval_every=60, save_pred_every=40, save_latest_every=20, wandb_project="fields", ema_decay=.9, gradient_clip=3.,
               warmup_iters=11, early_stop_patience=7, learning_rate=1e-3, val_split=.5, scale_min=.75, scale_max=1.5)
OF_LEARNERS = dict(threshold_st=.3, st_loss_weight=.7, learning_rate_D=2e-4)
KNOWN = dict(supervised=0, s4gan=3, selftraining=2, consistency=2)  # how many of these a learner has

server = multiprocessing.get_context("forkserver") if os.name == "posix" else None
if server: server.set_forkserver_preload(["geoforecast.learn.launch", "geoforecast.segmentation.consistency", "geoforecast.segmentation.selftraining", "geoforecast.segmentation.s4gan", "tensorboard.summary", "torch._dynamo", "kornia", "transformers.models.resnet.modeling_resnet"])


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


def kill_at(n):
    "Die by SIGKILL before the `n`-th step of this process, or before a file of this name takes its place."
    if isinstance(n, str): return sys.addaudithook(lambda event, args: event == "os.rename" and str(args[1]).endswith(n) and os.kill(os.getpid(), signal.SIGKILL))
    from geoforecast.learn.forecaster import Forecaster
    method, count = Forecaster.on_train_batch_start, itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(count) == n: os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)
    Forecaster.on_train_batch_start = wrapped


def train(learner, folder, data, kill=0):
    "Launch and fit as a user does; runs in a process of its own."
    torch.set_num_threads(1)
    os.chdir(folder.parent)
    with open(folder.parent/f"{folder.name}.log", "a", buffering=1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        run = launch(f"segmentation/{learner}", data_root=str(data), checkpoint_dir=str(folder), **RUN | OWN.get(learner, {}))
        log.write(f"goes on from {run.ckpt_path}\n")
        if kill: kill_at(kill)
        try: run.fit()
        except Exception as e: log.write(f"{type(e).__name__}: {e}\n"); raise


def start(learner, folder, data, kill=0):
    "Train in a fresh process and return its exit code."
    process = server.Process(target=train, args=(learner, folder, data, kill))
    process.start()
    process.join(120)
    return process.exitcode


def log_of(folder): return (folder.parent/f"{folder.name}.log").read_text()[-3000:]


def flat(value, name=""):
    "Yield each tensor and number of a checkpoint with its place."
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None: yield name, value
    else:
        for k, v in items: yield from flat(v, f"{name}/{k}")


def differing(a, b):
    "List the places where two states differ; NaN equals NaN."
    a, b = dict(flat(a)), dict(flat(b))
    same = lambda x, y: torch.equal(x, y) if torch.is_tensor(x) else x == y or x != x and y != y
    return sorted(a.keys() ^ b.keys()) + [k for k in a.keys() & b.keys() if not same(a[k], b[k])]


def checkpoint(folder, name="latest.ckpt"): return torch.load(folder/"checkpoints"/name, weights_only=True)


def rows(folder): return [{k: v for k, v in r.items() if k not in TIMING} for r in read_metrics(folder/"metrics.csv")]


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


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "Return a function that gives the folder of a learner's undisturbed run, trained at the first call."
    runs = tmp_path_factory.mktemp("runs")

    def run_of(learner):
        if not (runs/learner).exists(): assert start(learner, runs/learner, data) == 0, log_of(runs/learner)
        return runs/learner
    return run_of


def assert_same_run(whole, killed):
    one, two = checkpoint(whole), checkpoint(killed)
    assert one["global_step"] == STEPS
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"): assert not differing(one[key], two[key]), key
    assert not differing(one["callbacks"]["HealthMonitor"], two["callbacks"]["HealthMonitor"])
    assert not differing(rows(whole), rows(killed)) and [r["step"] for r in rows(whole)] == list(range(EPOCH, STEPS + 1, EPOCH))
    names = [{p.name for p in (f/"checkpoints").iterdir() if not p.name.startswith(".")} for f in (whole, killed)]
    assert names[0] == names[1]
    assert {"latest.ckpt", "checkpoint_6.ckpt", "checkpoint_12.ckpt", "best_model.safetensors", "best_model_ema.safetensors", "final_model_ema.safetensors"} <= names[0]
    for name in (n for n in names[0] if n.endswith(".safetensors")): assert not differing(*(load_file(f/"checkpoints"/name) for f in (whole, killed))), name


@pytest.mark.skipif(os.name != "posix", reason="kills processes by POSIX signals")
@pytest.mark.parametrize("learner", LEARNERS)
def test_a_killed_run_goes_on_to_the_same_bits(learner, data, whole, tmp_path):
    killed = tmp_path/"killed"
    assert start(learner, killed, data, kill=EVALUATION + 2) == -signal.SIGKILL, log_of(killed)
    assert checkpoint(killed)["global_step"] == EVALUATION
    assert start(learner, killed, data) == 0, log_of(killed)
    assert "latest.ckpt" in log_of(killed)
    assert_same_run(whole(learner), killed)


@pytest.mark.skipif(os.name != "posix", reason="kills processes by POSIX signals")
def test_a_run_killed_among_its_last_files_makes_up_for_them(data, whole, tmp_path):
    killed = tmp_path/"killed"
    for name in ("best_model.safetensors", "final_model_ema.safetensors", "checkpoint_12.ckpt"):
        assert start("supervised", killed, data, kill=name) == -signal.SIGKILL, log_of(killed)
    assert start("supervised", killed, data) == 0, log_of(killed)
    assert_same_run(whole("supervised"), killed)
