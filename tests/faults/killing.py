"""Trainings that are killed at any moment and started again with the same command.

Each start is a process of its own, forked from a server that has imported the library once. It dies by SIGKILL at a chosen optimiser
step or file rename, by SIGXFSZ in the middle of a checkpoint's bytes, or by SIGALRM, which nothing catches, at a moment of the clock.
"""
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

TIMING = ("samples_per_second", "waiting_for_data", "peak_memory_gb")
PRELOAD = ["geoforecast.learn.launch", "geoforecast.fire.forecaster", "geoforecast.fire.data", "geoforecast.precipitation.forecaster", "geoforecast.precipitation.data",
           "geoforecast.precipitation.heads", "geoforecast.segmentation.consistency", "geoforecast.segmentation.selftraining", "geoforecast.segmentation.s4gan", "geoforecast.segmentation.data",
           "geoforecast.geo.io", "geoforecast.geo.maps", "geoforecast.learn.bundle", "geoforecast.segmentation.mosaic", "geoforecast.notebooks", "nbformat",
           "tensorboard.summary", "torch._dynamo", "kornia", "transformers.models.resnet.modeling_resnet"]
ENDINGS = dict(step=-signal.SIGKILL, rename=-signal.SIGKILL, half=-signal.SIGXFSZ, moment=-signal.SIGALRM) if os.name == "posix" else {}

server = multiprocessing.get_context("forkserver") if os.name == "posix" else None
if server: server.set_forkserver_preload(PRELOAD)


def die(): os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner, name, n, action):
    "Do `action` before the `n`-th call of a method."
    method, count = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(count) == n: action()
        return method(*args, **kwargs)
    setattr(owner, name, wrapped)


def on_rename(folder, n):
    "Die when the `n`-th finished file, or one of this name, is about to take its place below `folder`."
    count = itertools.count(1)
    due = (lambda path: path.endswith(n)) if isinstance(n, str) else (lambda path: next(count) == n)

    def hook(event, args):
        if event == "os.rename" and str(folder) in str(args[1]) and due(str(args[1])): die()
    sys.addaudithook(hook)


def limit_files(size):
    "Let no file grow beyond `size` bytes; who tries dies in the middle of its writing."
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def arm(kind, n, folder):
    "Prepare this process to die: before step `n`, at rename `n`, within the `n`-th checkpoint, or after `n` seconds."
    from geoforecast.learn.callbacks import WholeCheckpoints
    from geoforecast.learn.forecaster import Forecaster
    if kind == "step": on_call(Forecaster, "on_train_batch_start", n, die)
    if kind == "half": on_call(WholeCheckpoints, "save_checkpoint", n, lambda: limit_files(20_000))
    if kind == "rename": on_rename(folder, n)
    if kind == "moment":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, n)


def train(config, folder, options, kill):
    "Launch and fit as a user does; runs in a process of its own."
    from geoforecast.learn.launch import launch
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the loaders' workers: as in a user's script, and fast
    tempfile.tempdir = str(folder.parent/"tmp")  # what a killed process leaves there must not fill the real one
    os.makedirs(tempfile.tempdir, exist_ok=True)
    os.chdir(folder.parent)
    with open(folder.parent/f"{folder.name}.log", "a", buffering=1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            run = launch(config, output_dir=str(folder), **options)
            log.write(f"goes on from {run.ckpt_path}\n")
            if kill: arm(*kill, folder)
            run.fit()
        except Exception as e: log.write(f"{type(e).__name__}: {e}\n"); raise


@dataclass
class Training:
    "A training that can be killed and started again."
    config: str
    options: dict
    steps: int  # Of an epoch
    epochs: int
    others: dict = field(default_factory=dict)  # Options of single starts
    renames: int = 3  # Files that an epoch writes, about
    seconds: float = .8  # From the start of the first step to the end on an idle machine, about

    def start(self, folder, kind=None, n=0, **options):
        "Train in a fresh process and return its exit code."
        process = server.Process(target=train, args=(self.config, Path(folder), self.options | options, kind and (kind, n)))
        process.start()
        process.join(300)
        return process.exitcode

    def finish(self, folder, **options):
        "Train to the end, as the same command does."
        assert self.start(folder, **options) == 0, log_of(folder)
        return folder

    def random_kill(self, rng):
        "Draw a way to die and when."
        kind = rng.choice(["step", "step", "half", "rename", "moment"])
        if kind == "step": return kind, int(rng.integers(1, 2*self.steps + 1))
        if kind == "half": return kind, int(rng.integers(1, 4))
        if kind == "rename": return kind, int(rng.integers(1, 2*self.renames + 1))
        return kind, float(rng.uniform(.01, self.seconds))

    def killed_runs(self, folder, kills, seed):
        "Kill and start again until `kills` processes have died, and yield the runs that came to an end, with their kills."
        rng, left = np.random.default_rng(seed), kills
        for n in itertools.count():
            run, died = Path(folder)/f"killed_{n}", []
            while left:
                kind, when = self.random_kill(rng)
                code = self.start(run, kind, when)
                if code == 0: break
                assert code == ENDINGS[kind], log_of(run)
                assert_whole(run, self.steps)
                died.append((str(kind), when))
                left -= 1
            yield self.finish(run), died
            if not left: return


def log_of(folder): return (folder.parent/f"{folder.name}.log").read_text()[-3000:]


def checkpoint(path): return torch.load(path, weights_only=True)


def hidden(folder): return [p for p in folder.rglob(".*.tmp")]


def assert_whole(run, steps):
    "What a killed process leaves: checkpoints that can be read, each of a whole epoch, and no heap of halves."
    for path in (run/"checkpoints").glob("*.ckpt"): assert checkpoint(path)["global_step"] % steps == 0, path
    assert len(hidden(run)) <= 2, hidden(run)


def flat(value, name=""):
    "Yield each tensor, number and text of a checkpoint with its place."
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None: yield name, value
    else:
        for k, v in items: yield from flat(v, f"{name}/{k}")


def differing(a, b):
    "List the places where two states differ; NaN equals NaN."
    a, b = dict(flat(a)), dict(flat(b))
    same = lambda x, y: torch.is_tensor(x) and torch.is_tensor(y) and torch.equal(x, y) if torch.is_tensor(x) or torch.is_tensor(y) else x == y or x != x and y != y
    return sorted(a.keys() ^ b.keys()) + [k for k in a.keys() & b.keys() if not same(a[k], b[k])]


def rows(folder):
    "The rows of metrics.csv, but for what depends on the clock."
    from geoforecast.learn.callbacks import read_metrics
    return [{k: v for k, v in r.items() if k not in TIMING} for r in read_metrics(folder/"metrics.csv")]


def state_of(path, folder):
    "All of a checkpoint, with paths as seen from the run's folder, but for a score that Lightning writes and never reads."
    def seen(value):
        if isinstance(value, dict): return {seen(k): seen(v) for k, v in value.items() if k != "current_score"}
        if isinstance(value, (list, tuple)): return [seen(v) for v in value]
        return value.replace(str(folder), "") if isinstance(value, str) else value
    return seen(checkpoint(path))


def files(folder): return sorted(p.name for p in (folder/"checkpoints").iterdir() if not p.name.startswith("."))


def assert_same_run(a, b):
    "Two folders hold the same weights, averages, optimisers, schedules, callbacks' memories, tables and files, to the bit."
    from safetensors.torch import load_file
    assert files(a) == files(b)
    for name in files(a):
        one, two = (load_file(f/"checkpoints"/name) if name.endswith(".safetensors") else state_of(f/"checkpoints"/name, f) for f in (a, b))
        assert not (wrong := differing(one, two)), (name, [(k, dict(flat(one)).get(k), dict(flat(two)).get(k)) for k in wrong[:10]])
    assert not differing(rows(a), rows(b))


def fire(folder):
    "Fire: dropout, drawn windows and an average of the weights."
    from geoforecast.fire.simulate import simulate_fires
    simulate_fires(folder/"fires", 3, shape=(7, 24, 26), seed=1)
    return Training("fire/unet", dict(data_dir=str(folder/"fires"), max_epochs=4, samples_per_epoch=16, batch_size=4, crop_size=16, window_size=2, hidden_dims=[4, 8], dropout_rate=.1,
                                      learning_rate=.02, ema_decay=.9, val_fires=["sim_1_001_terrain"], test_fires=["sim_1_002_smouldering"], **{"trainer.accelerator": "cpu"}), 4, 4)


def precipitation(folder):
    "Rain: a schedule that depends on what the validation has seen, and gradients over two batches."
    from geoforecast.precipitation.simulate import simulate_atmosphere
    simulate_atmosphere(folder/"atmosphere.nc", 120, levels=(850,))
    return Training("precipitation/quick_test", dict(data_dir=str(folder/"atmosphere.nc"), max_epochs=8, batch_size=16, window_size=2, hidden_channels=[4], schedule="plateau",
                                                     learning_rate=.05, log_level="warning", **{"trainer.accelerator": "cpu", "trainer.limit_train_batches": 4}), 4, 8)


def segmentation(folder, learner):
    "Land cover: a teacher, pseudo-labels, and views drawn anew each step."
    from geoforecast.segmentation.simulate import simulate_dataset
    if not (folder/"scenes").exists(): simulate_dataset(folder/"scenes", n_scenes=5, labelled=.8, size=96, seed=2)
    teach = dict(st_start=2, threshold_st=0.)  # pseudo-labels long before a kill
    own = dict(s4gan=teach | dict(discriminator_start=1), selftraining=teach, consistency=dict(st_start=2)).get(learner, {})
    return Training(f"segmentation/{learner}", dict(data_root=str(folder/"scenes"), encoder="tiny", size=32, batch_size=2, eval_batch_size=4, overlap=0, num_steps=12, save_latest_every=3,
                                                    eval_every=6, save_pred_every=6, learning_rate=1e-2, warmup_iters=2, ema_decay=.9, log_level="warning", **{"trainer.accelerator": "cpu"}) | own,
                    3, 4, renames=3)


LEARNERS = ("supervised", "s4gan", "selftraining", "consistency")
TRAININGS = dict(fire=fire, precipitation=precipitation) | {learner: partial(segmentation, learner=learner) for learner in LEARNERS}


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    "Return a function that gives a training by its name, its data made at the first call."
    folder, made = tmp_path_factory.mktemp("data"), {}

    def training_of(name) -> Training:
        if name not in made: made[name] = TRAININGS[name](folder)
        return made[name]
    return training_of
