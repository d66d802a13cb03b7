"""A training that is killed at any moment and started again ends with the same bits as one that was left alone.

Each training is a process of its own, forked from a server that has imported the library once. It dies by SIGKILL
at a chosen optimiser step, file rename or second, or by SIGXFSZ in the middle of writing a checkpoint.
"""
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes by POSIX signals")
EPOCHS, STEPS = 4, 4
OPTIONS = dict(max_epochs=EPOCHS, samples_per_epoch=4*STEPS, batch_size=4, crop_size=16, window_size=2, hidden_dims=[4, 8], dropout_rate=.1,
               learning_rate=.02, ema_decay=.9, val_fires=["sim_1_001_terrain"], test_fires=["sim_1_002_smouldering"], **{"trainer.accelerator": "cpu"})
TIMING = ("samples_per_second", "waiting_for_data", "peak_memory_gb")
HARMLESS = ("cli_config.yaml", "metrics.csv", "training.log", "tensorboard", "latest.ckpt", "UNet_epoch_")

server = multiprocessing.get_context("forkserver") if os.name == "posix" else None
if server: server.set_forkserver_preload(["geoforecast.learn.launch", "geoforecast.fire.forecaster", "geoforecast.fire.data", "tensorboard.summary"])


def die(): os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner, name, n, action):
    "Do `action` before the `n`-th call of a method."
    method, count = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(count) == n: action()
        return method(*args, **kwargs)
    setattr(owner, name, wrapped)


def on_rename(folder, n):
    "Die when the `n`-th finished file is about to take its place below `folder`."
    count = itertools.count(1)

    def hook(event, args):
        if event == "os.rename" and str(folder) in str(args[1]) and next(count) == n: die()
    sys.addaudithook(hook)


def die_in_the_next_long_write():
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def arm(kind, n, folder):
    from geoforecast.learn.callbacks import LatestCheckpoint
    from geoforecast.learn.forecaster import Forecaster
    if kind == "step": on_call(Forecaster, "on_train_batch_start", n, die)
    if kind == "half": on_call(LatestCheckpoint, "on_train_epoch_end", n, die_in_the_next_long_write)
    if kind == "rename": on_rename(folder, n)
    if kind == "second":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at once, as SIGKILL does
        signal.setitimer(signal.ITIMER_REAL, n)


def train(folder, data, options, kind=None, n=0):
    "Launch and fit as a user does; runs in a process of its own."
    from geoforecast.learn.launch import launch
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the loaders' workers: as in a user's script, and fast
    tempfile.tempdir = str(folder.parent/"tmp")  # what a killed process leaves there must not fill the real one
    os.makedirs(tempfile.tempdir, exist_ok=True)
    os.chdir(folder.parent)
    with open(folder.parent/f"{folder.name}.log", "a", buffering=1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        run = launch("fire/unet", data_dir=str(data), output_dir=str(folder), **OPTIONS | options)
        log.write(f"goes on from {run.ckpt_path}\n")
        arm(kind, n, folder)
        try: run.fit()
        except Exception as e: log.write(f"{type(e).__name__}: {e}\n"); raise


def start(folder, data, kind=None, n=0, **options):
    "Train in a fresh process and return its exit code."
    process = server.Process(target=train, args=(folder, data, options, kind, n))
    process.start()
    process.join(300)
    return process.exitcode


def log_of(folder): return (folder.parent/f"{folder.name}.log").read_text()


def finish(folder, data, **options):
    assert start(folder, data, **options) == 0, log_of(folder)[-3000:]
    return folder


def checkpoint(path): return torch.load(path, weights_only=True)


def flat(value, name=""):
    "Yield each tensor and number of a checkpoint with its place; seconds and paths are left out."
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None: yield name, value
    else:
        for k, v in items: yield from flat(v, f"{name}/{k}")


def same_tensors(a, b):
    a, b = dict(flat(a)), dict(flat(b))
    assert a.keys() == b.keys()
    return not [k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]


def rows(folder):
    from geoforecast.learn.callbacks import read_metrics
    return [{k: v for k, v in r.items() if k not in TIMING} for r in read_metrics(folder/"metrics.csv")]


def assert_same_run(a, b):
    one, two = (checkpoint(f/"checkpoints"/"latest.ckpt") for f in (a, b))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"): assert same_tensors(one[key], two[key]), key
    assert any(k.startswith("average.module.") for k in one["state_dict"])
    best = [{p.name: checkpoint(p)["state_dict"] for p in (f/"checkpoints").glob("UNet*.ckpt")} for f in (a, b)]
    assert best[0].keys() == best[1].keys() and len(best[0]) == 1
    assert same_tensors(*best)
    assert rows(a) == rows(b)


def hidden(folder): return [p for p in folder.rglob(".*.tmp")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from geoforecast.fire.simulate import simulate_fires
    folder = tmp_path_factory.mktemp("data")
    simulate_fires(folder, 3, shape=(7, 24, 26), seed=1)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory): return finish(tmp_path_factory.mktemp("runs")/"undisturbed", data)


def test_an_undisturbed_run(undisturbed):
    table = rows(undisturbed)
    assert [r["epoch"] for r in table] == list(range(EPOCHS))
    assert [r["step"] for r in table] == [STEPS*(i + 1) for i in range(EPOCHS)]
    keys = set(table[0])
    assert {"train/total_loss", "train/ap", "val/loss", "val/ap", "lr"} <= keys and all(set(r) == keys for r in table), "each epoch has every metric"
    assert len({r["train/ap"] for r in table}) == EPOCHS
    assert not hidden(undisturbed)
    left = [p.name for f in (undisturbed, undisturbed/"checkpoints") for p in f.iterdir() if p.name != "checkpoints" and not p.name.startswith(HARMLESS)]
    assert not left
    assert (undisturbed/"tensorboard").is_dir() and not (undisturbed.parent/"lightning_logs").exists()


KILLS = {
    "before anything is saved": [("step", 2)],
    "in each epoch": [("step", STEPS + 2), ("step", STEPS + 1), ("step", STEPS)],
    "half-way through latest.ckpt": [("half", 1), ("half", 2), ("half", 1)],
    "as each file takes its place": [("rename", n) for n in range(1, 7)],
    "at odd moments": [("second", .11), ("second", .23), ("second", .47), ("second", .31)],
}


@pytest.mark.parametrize("kills", KILLS.values(), ids=KILLS)
def test_a_killed_run_goes_on_to_the_same_bits(kills, data, undisturbed, tmp_path):
    folder, expected = tmp_path/"killed", dict(half=-signal.SIGXFSZ, second=-signal.SIGALRM)
    for kind, n in kills:
        code = start(folder, data, kind, n)
        assert code == expected.get(kind, -signal.SIGKILL) or (kind, code) == ("second", 0), log_of(folder)[-3000:]
        latest = folder/"checkpoints"/"latest.ckpt"
        if latest.exists(): assert checkpoint(latest)["global_step"] % STEPS == 0  # whole, and of a whole epoch
        assert len(hidden(folder)) <= 2, "what killed writers leave behind must not pile up"
    finish(folder, data)
    assert_same_run(undisturbed, folder)
    left = [p.name for f in (folder, folder/"checkpoints") for p in f.iterdir() if p.name != "checkpoints" and not p.name.startswith(("." , *HARMLESS))]
    assert not left


def test_a_finished_run_started_again_trains_no_more(data, undisturbed):
    before = (undisturbed/"checkpoints"/"latest.ckpt").read_bytes(), rows(undisturbed)
    finish(undisturbed, data)
    assert before == ((undisturbed/"checkpoints"/"latest.ckpt").read_bytes(), rows(undisturbed))


def test_workers_change_nothing(data, undisturbed, tmp_path):
    folder = tmp_path/"workers"
    assert start(folder, data, "step", 2*STEPS + 2, num_workers=2) == -signal.SIGKILL, log_of(folder)[-3000:]
    assert_same_run(undisturbed, finish(folder, data, num_workers=2))


def test_early_stopping_counts_on(data, tmp_path):
    "A learning rate of 0 never improves: patience 2 stops after 3 epochs, also when killed in the third."
    options = dict(patience=2, learning_rate=0., max_epochs=9, monitor="val/loss", ema_decay=0, norm="channel")
    folder = tmp_path/"stopped"
    assert start(folder, data, "step", 2*STEPS + 2, **options) == -signal.SIGKILL, log_of(folder)[-3000:]
    finish(folder, data, **options)
    assert [r["epoch"] for r in rows(folder)] == [0, 1, 2]
    best, = (folder/"checkpoints").glob("UNet*.ckpt")
    assert "epoch_00" in best.name
    finish(folder, data, **options)
    assert [r["epoch"] for r in rows(folder)] == [0, 1, 2], "a run that stopped early stays stopped"


def test_other_settings_start_anew_and_keep_the_old(data, tmp_path):
    folder = tmp_path/"run"
    finish(folder, data, max_epochs=1)
    old = (folder/"checkpoints"/"latest.ckpt").read_bytes()
    for n, rate in ((1, .03), (2, .04)):
        assert start(folder, data, "step", 2, max_epochs=1, learning_rate=rate) == -signal.SIGKILL, log_of(folder)[-3000:]
        finish(folder, data, max_epochs=1, learning_rate=rate)
        assert f"checkpoints_{n}" in log_of(folder)
        assert (folder/"checkpoints_1"/"latest.ckpt").read_bytes() == old
        assert [r["epoch"] for r in rows(folder)] == [0]
    assert len(list(folder.glob("checkpoints_*"))) == 2


@pytest.mark.parametrize("damage", [lambda b: b[:len(b)//2], lambda b: b"", lambda b: b"not a checkpoint"], ids=["cut short", "empty", "foreign"])
def test_a_damaged_checkpoint_is_named_in_one_line(damage, data, tmp_path):
    folder = tmp_path/"run"
    (folder/"checkpoints").mkdir(parents=True)
    from geoforecast.core import ConfigError
    from geoforecast.learn.launch import launch
    run = launch("fire/unet", data_dir=str(data), output_dir=str(folder), **OPTIONS)
    latest = folder/"checkpoints"/"latest.ckpt"
    torch.save(dict(state_dict=run.forecaster.state_dict()), latest)
    latest.write_bytes(damage(latest.read_bytes()))
    with pytest.raises(ConfigError) as error: launch("fire/unet", data_dir=str(data), output_dir=str(folder), **OPTIONS).fit()
    text = str(error.value)
    assert "latest.ckpt" in text and "\n" not in text and len(text) < 400
