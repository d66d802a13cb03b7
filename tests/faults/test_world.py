"The world around a run: a disk that fills up or takes nothing, a second process, a clock that jumps, a loader that is killed, memory that runs out, signals, and numbers that are none."
import contextlib
import datetime
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from killing import TRAININGS, assert_same_run, checkpoint, on_call, rows, server, training  # noqa: F401, a fixture
from writers import OUTPUTS

from geoforecast import core
from geoforecast.cli import main
from geoforecast.core import ConfigError, GeoforecastError, OutputError, exclusive, made_once
from geoforecast.learn.callbacks import WholeCheckpoints
from geoforecast.learn.forecaster import Forecaster
from geoforecast.learn.launch import launch

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals, limits and mounts of POSIX")


@pytest.fixture(scope="module")
def undisturbed(training, tmp_path_factory): return training("fire").finish(tmp_path_factory.mktemp("whole")/"run")


# --- A command in a process of its own

def _type(words, folder, before):
    os.setsid()
    os.chdir(folder)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the loaders' workers, as in a user's terminal
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open("out", "a") as out, open("err", "a") as err, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if before: before()
        status = main(words)
    sys.exit(status)


def typed(folder, *words, before=None):
    "Start a command with what it prints in the files `out` and `err` of a folder; `before` is called ahead of it."
    process = server.Process(target=_type, args=(list(words), folder, before))
    process.start()
    return process


def ended(process, folder):
    "Wait for a command and return its status and what it said last."
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    err = (folder/"err").read_text()
    assert "Traceback" not in err, err
    return process.exitcode, err


def fit(training, folder, **more):
    "The command of a training."
    options = training.options | more
    return ["fit", "--config", training.config, "--output_dir", str(folder), *(w for k, v in options.items() for w in (f"--{k}", v if isinstance(v, str) else json.dumps(v)))]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(.02)


def slowly(): on_call_always(Forecaster, "on_train_batch_start", lambda: time.sleep(.4))


def on_call_always(owner, name, action):
    method = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: (action(), method(*args, **kwargs))[1])


def write_notebook(path, *sources):
    notebook = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    notebook.cells = [nbformat.v4.new_code_cell('output_dir: str = ""\nseed: int = 0', metadata=dict(tags=["parameters"])), *map(nbformat.v4.new_code_cell, sources)]
    nbformat.write(notebook, path)
    return str(path)


# --- A disk that is full

@contextlib.contextmanager
def small_disk(size=60_000):
    "Let no file of this process grow beyond some bytes."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def no_room(handle): raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", [name for name in OUTPUTS if name != "run"])  # whose files are tried one by one
def test_a_full_disk_leaves_the_old_and_is_said_in_one_line(name, tmp_path, monkeypatch, ledger):
    output, path = OUTPUTS[name], tmp_path/"out"/name
    output.make(0)(path)
    before, write, refused = output.read(path), output.make(1), 0
    for kind in ("while it is written", "when it is brought to the disk"):
        with monkeypatch.context() as patch, small_disk() if kind == "while it is written" else contextlib.nullcontext():
            if kind != "while it is written": patch.setattr(os, "fsync", no_room)
            with pytest.raises(OutputError) as error: write(path)
        text = str(error.value)
        assert text.startswith(str(path)) and "cannot be written: the disk is full (" in text and "free some space" in text and "\n" not in text
        assert output.read(path) == before and [p.name for p in path.parent.iterdir()] == [name]
        refused += 1
    ledger("outputs on a full disk", 2, refused=refused)


def mounts(): return shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not mounts(), reason="needs a small disk of its own")
def test_a_disk_that_is_really_full_and_one_that_takes_nothing(tmp_path, ledger):
    disk, other = tmp_path/"disk", tmp_path/"read_only"
    for folder in (disk, other): folder.mkdir()
    script = (f'mount -t tmpfs -o size=8m none "{disk}" && mount --bind "{disk}" "{other}" && mount -o remount,bind,ro "{other}" && '
              f'exec "{sys.executable}" "{Path(__file__).with_name("writers.py")}" "{disk}" "{other}"')
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=300, env=os.environ | dict(PYTHONPATH=str(Path(core.__file__).parents[1])))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 2*len(OUTPUTS) - 2
    for f in found:
        says = "the disk is full (No space left on device)" if f["disk"] == "full" else "the place does not take it (Read-only file system); choose a folder that you may write to"
        assert f["kind"] == "OutputError" and says in f["text"] and f["name"] in f["text"] and "\n" not in f["text"], f
        assert f["same"] and f["left"] == [f["name"]], f
    ledger("outputs on a small or read-only disk", len(found), refused=len(found))


def the_third_checkpoint_finds_no_room():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    on_call(WholeCheckpoints, "save_checkpoint", 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1])))


def test_a_training_whose_checkpoint_finds_no_room_says_so_and_goes_on(training, undisturbed, tmp_path):
    run = tmp_path/"run"
    status, err = ended(typed(tmp_path, *fit(training("fire"), run), before=the_third_checkpoint_finds_no_room), tmp_path)
    assert status == 2 and re.fullmatch(rf"error: {run}/checkpoints/\S+\.ckpt cannot be written: the disk is full \(.*", err.strip()) and err.count("\n") == 1
    assert checkpoint(run/"checkpoints"/"latest.ckpt")["global_step"] == training("fire").steps
    assert_same_run(undisturbed, training("fire").finish(run))


def small(): resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_run_whose_page_finds_no_room(tmp_path):
    path = write_notebook(tmp_path/"walk.ipynb", f"'{'x'*3000}'")
    status, err = ended(typed(tmp_path, "run", path, "--output_dir", str(tmp_path/"walk"), before=small), tmp_path)
    assert status == 2 and re.fullmatch(r"error: \S*walk/run\.ipynb cannot be written: the disk is full \(.*", err.strip())


def test_a_place_that_takes_nothing(training, tmp_path, capsys, monkeypatch):
    "Below a file there is no folder, for root neither."
    monkeypatch.chdir(tmp_path)
    (tmp_path/"file").write_text("")
    notebook = write_notebook(tmp_path/"walk.ipynb", "1")
    for words in (fit(training("fire"), tmp_path/"file"/"run"), ["run", notebook, "--output_dir", "file/run"], ["run", notebook, "--output_dir", "file/run", "--sweep", "seed=0,1"],
                  ["data", "fire", "simulate", "--out", "file/fires", "--n", "1"], ["data", "precipitation", "simulate", "--out", "file/rain.nc"]):
        assert main(words) == 2, words
        shown = capsys.readouterr()
        line, = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert "file" in line and "Traceback" not in shown.err


# --- Two processes in one folder

def test_a_second_training_of_a_folder_is_refused_and_a_killed_one_frees_it(training, tmp_path, capsys):
    run, one = tmp_path/"run", training("fire")
    words = fit(one, run, max_epochs=500, num_workers=2)
    first = typed(tmp_path, *words, before=slowly)
    wait_for((run/"metrics.csv").exists)
    for second in (words, fit(one, run, learning_rate=.1)):
        began = time.monotonic()
        assert main(second) == 2
        assert f"run {run} is in use by another process" in capsys.readouterr().err and time.monotonic() - began < 30
    lines = len(rows(run))
    wait_for(lambda: len(rows(run)) > lines)
    os.kill(first.pid, signal.SIGKILL)
    first.join()

    def free():
        with contextlib.suppress(ConfigError), exclusive(run/".training.lock"): return True
    wait_for(free, 30)  # loaders that were left alone notice it within seconds
    assert one.start(run, max_epochs=1) == 0


# --- A clock that jumps

def jumping():
    "Let the clock go a day back and forth."
    now, days = time.time, itertools.cycle((0, 86_400, -86_400))
    time.time = lambda: now() + next(days)


def test_a_clock_that_jumps_changes_nothing(training, undisturbed, tmp_path):
    run, one = tmp_path/"run", training("fire")
    future = time.time() + 2*86_400
    for path in Path(one.options["data_dir"]).rglob("*.hdf5"): os.utime(path, (future, future))
    process = typed(tmp_path, *fit(one, run), before=jumping)
    status, err = ended(process, tmp_path)
    assert status == 0, err
    assert_same_run(undisturbed, run)
    left = [float(m) for m in re.findall(r"about ([-\d.]+) min left", (tmp_path/"out").read_text())]
    assert len(left) == one.epochs and all(0 <= m < 60 for m in left)


def test_files_of_tomorrow_and_of_yesterday(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_notebook(tmp_path/"walk.ipynb", "import os; from pathlib import Path; p = Path(output_dir)/'scores.json'; p.write_text('[]'); os.utime(p, (1e9, 1e9))")
    assert main(["run", path, "--output_dir", "out"]) == 0
    assert "out/scores.json" in capfd.readouterr().out, "what was written is listed, whatever its date"
    (tmp_path/"data").mkdir()
    os.utime(tmp_path/"data", (4e9, 4e9))
    with made_once(tmp_path/"data") as new: assert new is None


# --- A loader that dies

def the_newest_loader_is_killed():
    "At the first step of the second epoch, while most of what it has to load is still to come."
    from geoforecast.fire.data import FireWindows
    on_call_always(FireWindows, "__getitems__", lambda: time.sleep(.3))
    on_call(Forecaster, "on_train_batch_start", 5, lambda: max(psutil.Process().children(), key=psutil.Process.create_time).kill())


def test_a_loader_that_is_killed_says_what_to_turn_and_the_run_goes_on(training, undisturbed, tmp_path):
    run, one = tmp_path/"run", training("fire")
    status, err = ended(typed(tmp_path, *fit(one, run, num_workers=2), before=the_newest_loader_is_killed), tmp_path)
    assert status == 2 and err.startswith("error: a process that loads data died") and "lower data.num_workers" in err and err.count("\n") == 1
    assert checkpoint(run/"checkpoints"/"latest.ckpt")["global_step"] == one.steps
    assert_same_run(undisturbed, one.finish(run, num_workers=2))


def test_the_death_of_a_loader_is_told_also_where_a_library_wraps_it(training, tmp_path, monkeypatch):
    "It interrupts whatever the training does at that moment, such as looking at the signature of a callable."
    one = training("fire")
    run = launch(one.config, output_dir=str(tmp_path/"run"), **one.options)

    def step(*args):
        try: raise RuntimeError("DataLoader worker (pid 71) is killed by signal: Killed. ")
        except RuntimeError: raise TypeError("unsupported callable") from None
    monkeypatch.setattr(type(run.forecaster), "training_step", step)
    with pytest.raises(ConfigError, match="a process that loads data died.*lower data.num_workers"): run.fit()


# --- Memory

@pytest.mark.parametrize("name", ("fire", "precipitation", "supervised", "s4gan"))
@pytest.mark.parametrize("kind, says", [(torch.cuda.OutOfMemoryError, "the GPU ran out of memory; lower data.batch_size"), (MemoryError, "the memory ran out; lower the batch size"),
                                        (RuntimeError, "the memory ran out; lower the batch size")], ids=["GPU", "Python", "torch"])
def test_memory_that_runs_out_in_a_training_says_what_to_turn(kind, says, name, training, tmp_path, monkeypatch):
    one = training(name)
    run = launch(one.config, output_dir=str(tmp_path/"run"), **one.options)

    def step(*args): raise kind("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999999999 bytes.\nError code 12")
    monkeypatch.setattr(type(run.forecaster), "training_step", step)
    with pytest.raises(ConfigError, match=says) as error: run.fit()
    assert "\n" not in str(error.value) and "docs/troubleshooting" in str(error.value)


@pytest.fixture(scope="module")
def bundle(training, undisturbed):
    from geoforecast.fire.evaluation import report
    run = launch(training("fire").config, output_dir=str(undisturbed), **training("fire").options).fit()
    report(run, maps=0, logistic_steps=5)
    return undisturbed/"bundle"


@pytest.mark.parametrize("command", ("score", "forecast"))
def test_memory_that_runs_out_in_use_says_what_to_turn(command, bundle, training, tmp_path, monkeypatch, capsys):
    words = [command, str(bundle), training("fire").options["data_dir"], "--out", str(tmp_path/"out")]
    for kind, says in ((torch.cuda.OutOfMemoryError, "--batch-size"), (MemoryError, "the memory ran out")):
        def forward(*args): raise kind("CUDA out of memory. Tried to allocate 2.00 GiB.")
        monkeypatch.setattr(Forecaster, "forward", forward)
        assert main(words) != 0
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1 and "should not happen" not in err


def test_memory_that_runs_out_in_a_cell_says_what_to_turn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_notebook(tmp_path/"walk.ipynb", "class OutOfMemoryError(RuntimeError): pass\nraise OutOfMemoryError('CUDA out of memory')")
    assert main(["run", path, "--output_dir", "out"]) == 1
    assert "failed: OutOfMemoryError: the GPU ran out of memory; lower data.batch_size" in capsys.readouterr().err


# --- Signals

@pytest.mark.parametrize("signals, workers", [([signal.SIGINT], 0), ([signal.SIGINT, signal.SIGINT], 2), ([signal.SIGTERM], 0), ([signal.SIGTERM, signal.SIGINT], 0)], ids=["Ctrl-C", "Ctrl-C twice", "SIGTERM", "both"])
def test_an_interrupted_training_keeps_its_checkpoint_and_goes_on(signals, workers, training, undisturbed, tmp_path):
    run, one = tmp_path/"run", training("fire")
    process = typed(tmp_path, *fit(one, run, num_workers=workers), before=slowly)
    wait_for((run/"checkpoints"/"latest.ckpt").exists)
    for s in signals:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, s) if s == signal.SIGINT else os.kill(process.pid, s)  # the first may have been enough
        time.sleep(.1)
    status, err = ended(process, tmp_path)
    assert status == 130 and "the same command goes on from the last whole epoch" in err, err
    assert checkpoint(run/"checkpoints"/"latest.ckpt")["global_step"] in (4, 8, 12)
    assert_same_run(undisturbed, one.finish(run, num_workers=workers))


def interrupted_in_a_destructor():
    class Dropped:
        def __del__(self): os.kill(os.getpid(), signal.SIGINT)
    on_call(Forecaster, "on_train_batch_start", 6, Dropped)


def test_an_interruption_that_python_cannot_raise_is_not_lost(training, tmp_path):
    run, one = tmp_path/"run", training("fire")
    status, err = ended(typed(tmp_path, *fit(one, run), before=interrupted_in_a_destructor), tmp_path)
    assert status == 130 and "the same command goes on from the last whole epoch" in err and err.strip().count("\n") == 0, err
    assert checkpoint(run/"checkpoints"/"latest.ckpt")["global_step"] < one.steps*one.epochs


def test_a_run_that_a_scheduler_ends_says_so_and_leaves_nothing_running(tmp_path):
    path = write_notebook(tmp_path/"walk.ipynb", "import os, time; from pathlib import Path; Path(output_dir, 'pid').write_text(str(os.getpid())); time.sleep(300)")
    process, run = typed(tmp_path, "run", path, "--output_dir", str(tmp_path/"walk")), tmp_path/"walk"
    wait_for(lambda: (run/"pid").exists() and (run/"pid").read_text())
    os.kill(process.pid, signal.SIGTERM)
    status, _ = ended(process, tmp_path)
    from geoforecast.notebooks import report_of
    assert status == 130 and report_of(run)["status"] == "was interrupted"
    wait_for(lambda: not psutil.pid_exists(int((run/"pid").read_text())))


# --- Numbers that are none

@pytest.mark.parametrize("part", ("training", "validation"))
@pytest.mark.parametrize("name", TRAININGS)
def test_a_loss_that_is_no_number_stops_and_names_the_batch(name, part, training, tmp_path):
    one = training(name)
    run = launch(one.config, output_dir=str(tmp_path/"run"), **one.options)
    forward, model = run.forecaster.loss.forward, run.forecaster

    def broken(*args):
        value = forward(*args)
        return value*float("nan") if model.training == (part == "training") and model.trainer.global_step > one.steps else value
    run.forecaster.loss.forward = broken
    with pytest.raises(GeoforecastError) as error: run.fit()
    text, kept = str(error.value), checkpoint(tmp_path/"run"/"checkpoints"/"latest.ckpt")
    step = one.steps + 1 if part == "training" else 2*one.steps
    what = "the loss" if part == "training" else "val/loss"
    assert text.startswith(f"{what} is not a finite number at step {step}, in a batch of ") and "\n" not in text and "lower learning_rate" in text
    assert re.search(r"\d{4}-\d\d-\d\d" if name in ("fire", "precipitation") else r"in a batch of \w*scene\w*", text), text
    assert kept["global_step"] == one.steps and all(v.isfinite().all() for k, v in kept["state_dict"].items() if v.is_floating_point() and k.startswith("network"))


def test_a_gradient_that_is_no_number_stops_before_it_is_taken(training, tmp_path):
    one = training("supervised")
    run = launch(one.config, output_dir=str(tmp_path/"run"), **one.options)
    next(run.forecaster.network.parameters()).register_hook(lambda g: g*float("inf") if run.trainer.global_step == 2 else g)
    with pytest.raises(GeoforecastError, match="the gradient is not a finite number at step 2, in a batch of "): run.fit()
    assert all(p.isfinite().all() for p in run.forecaster.network.parameters())
