"A training that is killed at any moment and started again ends with the same bits as one that was left alone, in each of the three tasks."
import os
import signal

import pytest
import torch
from killing import LEARNERS, TRAININGS, assert_same_run, assert_whole, checkpoint, files, hidden, log_of, rows, training  # noqa: F401, a fixture

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes by POSIX signals")
KILLS, MANY = [dict(zip(TRAININGS, n)) for n in ((6, 6, 2, 2, 2, 2), (33, 33, 8, 9, 8, 9))]
HARMLESS = ("cli_config.yaml", "metrics.csv", "training.log", "tensorboard", "latest.ckpt", "UNet_epoch_", ".training.lock")


@pytest.fixture(scope="module")
def whole(training, tmp_path_factory):
    "Return a function that gives the folder of a training that nobody disturbed, run at the first call."
    runs = tmp_path_factory.mktemp("runs")
    return lambda name: runs/name if (runs/name).exists() else training(name).finish(runs/name)


def left_over(run): return [p.name for f in (run, run/"checkpoints") for p in f.iterdir() if p.name != "checkpoints" and not p.name.startswith(HARMLESS)]


def test_an_undisturbed_run(training, whole):
    run, fires = whole("fire"), training("fire")
    table = rows(run)
    assert [r["epoch"] for r in table] == list(range(fires.epochs))
    assert [r["step"] for r in table] == [fires.steps*(i + 1) for i in range(fires.epochs)]
    keys = set(table[0])
    assert {"train/total_loss", "train/ap", "val/loss", "val/ap", "lr"} <= keys and all(set(r) == keys for r in table), "each epoch has every metric"
    assert len({r["train/ap"] for r in table}) == fires.epochs
    assert any(k.startswith("average.module.") for k in checkpoint(run/"checkpoints"/"latest.ckpt")["state_dict"])
    assert not hidden(run) and not left_over(run)
    assert (run/"tensorboard").is_dir() and not (run.parent/"lightning_logs").exists()


def test_what_the_trainings_hold(whole):
    "What an exact resume has to bring back is there: a rate that a plateau has lowered, pseudo-labels, a discriminator, and all files."
    assert len({r["lr"] for r in rows(whole("precipitation"))}) > 1 and checkpoint(whole("precipitation")/"checkpoints"/"latest.ckpt")["plateau"]["num_bad_epochs"] > 0
    for learner in LEARNERS[1:]: assert rows(whole(learner))[-1]["train/ST_pixels"] > 0, learner
    assert rows(whole("s4gan"))[-1]["train/D"] > 0 and len(checkpoint(whole("s4gan")/"checkpoints"/"latest.ckpt")["optimizer_states"]) == 2
    assert {"latest.ckpt", "checkpoint_6.ckpt", "checkpoint_12.ckpt", "best_model.safetensors", "best_model_ema.safetensors", "final_model_ema.safetensors"} <= set(files(whole("supervised")))


@pytest.mark.parametrize("name", TRAININGS)
def test_a_killed_run_goes_on_to_the_same_bits(name, training, whole, many, ledger, tmp_path):
    kills, equal = (MANY if many else KILLS)[name], 0
    for run, died in training(name).killed_runs(tmp_path, kills, seed=list(TRAININGS).index(name)):
        assert_same_run(whole(name), run)
        equal += len(died)
    ledger(f"kills of {training(name).config}", kills, bit_equal=equal)
    assert equal == kills


def test_a_run_killed_as_each_file_takes_its_place(training, whole, tmp_path):
    run = tmp_path/"killed"
    for n in (1, 2, 3, 4, 1, 2):
        assert training("fire").start(run, "rename", n) == -signal.SIGKILL, log_of(run)
        assert_whole(run, training("fire").steps)
    assert_same_run(whole("fire"), training("fire").finish(run))
    assert not left_over(run)


def test_a_run_killed_among_its_last_files_makes_up_for_them(training, whole, tmp_path):
    run = tmp_path/"killed"
    for name in ("best_model.safetensors", "final_model_ema.safetensors", "checkpoint_12.ckpt"): assert training("supervised").start(run, "rename", name) == -signal.SIGKILL, log_of(run)
    assert_same_run(whole("supervised"), training("supervised").finish(run))


def test_a_finished_run_started_again_trains_no_more(training, whole):
    run = whole("fire")
    before = (run/"checkpoints"/"latest.ckpt").read_bytes(), rows(run)
    training("fire").finish(run)
    assert before == ((run/"checkpoints"/"latest.ckpt").read_bytes(), rows(run))


def test_workers_change_nothing(training, whole, tmp_path):
    fires, run = training("fire"), tmp_path/"workers"
    assert fires.start(run, "step", 2*fires.steps + 2, num_workers=2) == -signal.SIGKILL, log_of(run)
    assert_same_run(whole("fire"), fires.finish(run, num_workers=2))


def test_early_stopping_counts_on(training, tmp_path):
    "A learning rate of 0 never improves: patience 2 stops after 3 epochs, also when killed in the third."
    options = dict(patience=2, learning_rate=0., max_epochs=9, monitor="val/loss", ema_decay=0, norm="channel")
    fires, run = training("fire"), tmp_path/"stopped"
    assert fires.start(run, "step", 2*fires.steps + 2, **options) == -signal.SIGKILL, log_of(run)
    fires.finish(run, **options)
    assert [r["epoch"] for r in rows(run)] == [0, 1, 2]
    best, = (run/"checkpoints").glob("UNet*.ckpt")
    assert "epoch_00" in best.name
    fires.finish(run, **options)
    assert [r["epoch"] for r in rows(run)] == [0, 1, 2], "a run that stopped early stays stopped"


def test_other_settings_start_anew_and_keep_the_old(training, tmp_path):
    fires, run = training("fire"), tmp_path/"run"
    fires.finish(run, max_epochs=1)
    old = (run/"checkpoints"/"latest.ckpt").read_bytes()
    for n, rate in ((1, .03), (2, .04)):
        assert fires.start(run, "step", 2, max_epochs=1, learning_rate=rate) == -signal.SIGKILL, log_of(run)
        fires.finish(run, max_epochs=1, learning_rate=rate)
        assert f"checkpoints_{n}" in log_of(run)
        assert (run/"checkpoints_1"/"latest.ckpt").read_bytes() == old
        assert [r["epoch"] for r in rows(run)] == [0]
    assert len(list(run.glob("checkpoints_*"))) == 2


@pytest.mark.parametrize("damage", [lambda b: b[:len(b)//2], lambda b: b"", lambda b: b"not a checkpoint"], ids=["cut short", "empty", "foreign"])
def test_a_damaged_checkpoint_is_named_in_one_line(damage, training, tmp_path):
    from geoforecast.core import ConfigError
    from geoforecast.learn.launch import launch
    fires, latest = training("fire"), tmp_path/"run"/"checkpoints"/"latest.ckpt"
    latest.parent.mkdir(parents=True)
    start = lambda: launch(fires.config, output_dir=str(tmp_path/"run"), **fires.options)
    torch.save(dict(state_dict=start().forecaster.state_dict()), latest)
    latest.write_bytes(damage(latest.read_bytes()))
    with pytest.raises(ConfigError) as error: start().fit()
    text = str(error.value)
    assert "latest.ckpt" in text and "\n" not in text and len(text) < 400
