"""The command line as it is typed: help, errors and exit statuses through the installed command, the rest through `main`."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import yaml

from geoforecast import cli, doctor, notebooks
from geoforecast.cli import main
from geoforecast.core import ConfigError, DataError, GeoforecastError
from geoforecast.terminal import parse_value

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ["fit", "validate", "test", "predict", "run", "score", "forecast", "data", "models", "doctor"]
PREPARE = ["firms", "download", "simulate", "detections", "convert", "weather", "check", "inventory"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
COMMAND = [sys.executable, "-c", "import sys; from geoforecast.cli import main; sys.exit(main())"]


def terminal(*words: str, cwd: Path = ROOT, **more) -> subprocess.CompletedProcess:
    "Run the command in a process of its own, as a terminal does."
    return subprocess.run([*COMMAND, *words], cwd=cwd, env=ENVIRONMENT | more, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    "An empty folder to type commands in, with this checkout's outputs out of reach."
    monkeypatch.chdir(tmp_path)
    for module in (cli, notebooks): monkeypatch.setattr(module, "project_root", lambda *_: tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def fires(tmp_path_factory) -> Path:
    from geoforecast.fire.simulate import simulate_fires
    folder = tmp_path_factory.mktemp("fires")
    simulate_fires(folder, n=3, years=[2020], seed=7, shape=(9, 48, 48))
    return folder


def write_notebook(path: Path, *sources: str, parameters: str = 'name: str = "demo"\ndata: str = ""\nrate: float = .1') -> Path:
    notebook = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    notebook.cells = [nbformat.v4.new_code_cell(parameters, metadata=dict(tags=["parameters"])), *map(nbformat.v4.new_code_cell, sources)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


# --- Help

def test_help_is_quick_and_names_every_command():
    start = time.perf_counter()
    done = terminal("--help")
    seconds = time.perf_counter() - start
    assert done.returncode == 0 and done.stderr == "" and seconds < 1.5
    assert set(COMMANDS) <= set(re.findall(r"^    (\w+)", done.stdout, re.M))


def test_importing_the_command_line_imports_nothing_heavy():
    loaded = subprocess.run([sys.executable, "-c", "import sys, geoforecast.cli; print(*sys.modules)"], env=ENVIRONMENT, capture_output=True, text=True).stdout.split()
    assert not {"torch", "lightning", "numpy", "pandas", "papermill"} & set(loaded)


@pytest.mark.parametrize("words", [[c] for c in COMMANDS if c != "data"] + [["data", "fire", a] for a in PREPARE])
def test_every_command_explains_itself_with_an_example(words, capsys):
    try: status = main([*words, "--help"])
    except SystemExit as e: status = e.code
    shown = capsys.readouterr().out
    assert status == 0 and f"  geoforecast {' '.join(words)}" in shown


def test_no_command_is_not_done(capsys):
    assert main([]) == 2
    assert "usage: geoforecast" in capsys.readouterr().out


def test_the_installed_command_is_this_one():
    script = Path(sys.executable).with_name("geoforecast")
    if not script.exists(): pytest.skip("the package is not installed with its command")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert (done.returncode, done.stdout.split()[0]) == (0, "geoforecast")


def test_help_of_a_configuration_lists_options_with_present_values(capsys):
    assert main(["fit", "--config", "fire/unet", "--help", "--hidden_dims", "[8, 16]"]) == 0
    shown = capsys.readouterr().out
    assert "--model.network.hidden_dims [8, 16]" in shown and "--data.batch_size 16" in shown and "--trainer.max_epochs" in shown and "--print_config" in shown


# --- Errors: one line on stderr, exit status 2, nothing written

ERRORS = {
    "forcast": "did you mean 'forecast'",
    "data fires simulate": "did you mean 'fire'",
    "data fire simlate": "did you mean 'simulate'",
    "data fire simulate --ot x": "did you mean '--out'",
    "data fire simulate": "--out",
    "data fire simulate --out x --n 0": "'0' is not a whole number from 1 on",
    "data fire simulate --out x --shape 3 48 48": "at least 4 days",
    "data fire detections nowhere.csv --out a.hdf5": "nowhere.csv does not exist",
    "data fire detections nowhere.csv --out a.h6": "ends in .hdf5",
    "data fire convert nowhere --out x": "nothing to convert in nowhere",
    "data fire convert nowhere --out x --protocol wst": "did you mean 'wsts'",
    "data fire convert nowhere --out x --compression zip": "did you mean 'gzip'",
    "data fire check nowhere": "nowhere does not exist",
    "data fire inventory nowhere": "nothing of WildfireSpreadTS in nowhere",
    "data fire weather nowhere.hdf5 era5.nc --out a.hdf5": "nowhere.hdf5 does not exist",
    "data fire weather nowhere.hdf5 era5.nc --out a": "ends in .hdf5",
    "data fire firms --out x --bounds 1 2 3 --start 2021-08-03 --end 2021-08-04": "expected 4 arguments",
    "data fire firms --out x --bounds 1 2 3 4 --start 3.8.2021 --end 2021-08-04": "is not a date",
    "data fire firms --out x --bounds 179 2 -179 4 --start 2021-08-03 --end 2021-08-04": "antimeridian",
    "data fire firms --out x --bounds 1 2 3 4 --start 2021-08-03 --end 2021-08-04 --sources VIIRS_SNP_SP": "did you mean 'VIIRS_SNPP_SP'",
    "data fire download --out x --url http://127.0.0.1:9/no.zip": "127.0.0.1:9",
    "forecast bundle fire.hdf5": "--out",
    "forecast bundle fire.hdf5 --out x --batch_size 4": "did you mean '--batch-size'",
    "forecast bundle fire.hdf5 --out x --date tomorrow": "'tomorrow' is not a date; write it as 2020-09-25",
    "forecast nowhere fire.hdf5 --out x": "nowhere is not a bundle",
    "score nowhere fire.hdf5": "nowhere is not a bundle",
    "score nowhere": "DATA",
    "doctor now": "'now' is too much",
    "fit": "--config is missing",
    "fit fire/unet": "'fire/unet' belongs to no option",
    "fit --cofig fire/unet": "did you mean '--config'",
    "fit --config fire/unett": "did you mean 'fire/unet'",
    "fit --config mine.yaml": "mine.yaml does not exist",
    "fit --config fire/unet --trainer fire/test_shrt": "did you mean 'fire/test_short'",
    "fit --config fire/unet --hidden_dim 8": "did you mean 'hidden_dims'",
    "fit --config fire/unet --data.batch_sise=8": "did you mean 'data.batch_size'",
    "fit --config fire/unet --print_confg x": "did you mean '--print_config'",
    "fit --config fire/unet --max_epochs": "'--max_epochs' needs a value",
    "fit --config fire/unet --max_epochs --patience=3": "'--max_epochs' needs a value",
    "test": "there is no run 'run'",
    "validate --config fire/unet --name none": "there is no checkpoint",
    "run firee": "did you mean 'fire'",
    "run nowhere.ipynb": "nowhere.ipynb does not exist",
    "run fire -p windw_size=3": "did you mean 'window_size'",
    "run fire -p window_size": "has no value",
    "run fire -p hidden_dims=[8": "cannot be read as a value",
    "run fire --nam x": "did you mean '--name'",
}


@pytest.mark.parametrize("typed", ERRORS)
def test_errors_are_one_line_that_says_what_to_do(typed, here, capsys):
    (here/"nbs"/"runs").mkdir(parents=True)
    shutil.copy(ROOT/"nbs"/"runs"/"fire.ipynb", here/"nbs"/"runs")
    status, shown = main(typed.split()), capsys.readouterr()
    assert status == 2 and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert ERRORS[typed] in shown.err
    assert shown.out in ("", "simulating 8 fires ...\n") and sorted(p.name for p in here.iterdir()) == ["nbs"]


def test_debug_shows_the_traceback(here):
    done = terminal("data", "fire", "check", "nowhere", "--debug", cwd=here)
    assert done.returncode == 2 and "Traceback" in done.stderr and done.stderr.splitlines()[-1] == "error: nowhere does not exist"
    assert "Traceback" not in terminal("data", "fire", "check", "nowhere", cwd=here).stderr


@pytest.mark.parametrize("error, status, line", [
    (KeyboardInterrupt(), 130, "interrupted; the same command goes on"), (DataError("a\nb"), 2, "error: a b"), (MemoryError(), 1, "the memory ran out"),
    (GeoforecastError("the loss is not a finite number"), 1, "error: the loss is not a finite number"),
    (PermissionError(13, "Permission denied", "x.nc"), 2, "error: x.nc: Permission denied"), (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero")])
def test_exit_statuses(error, status, line, monkeypatch, capsys):
    def fail(options): raise error
    monkeypatch.setattr(cli, "print_health", fail)
    assert main(["doctor"]) == status
    assert line in capsys.readouterr().err


def test_output_that_nobody_reads_is_no_error():
    done = subprocess.run(f"{subprocess.list2cmdline(COMMAND)} models | head -n 1", shell=True, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "error" not in done.stderr


# --- Training commands

def test_print_config_can_be_given_back(here, capsys):
    assert main(["fit", "--config", "fire/unet", "--hidden-dims=[8,16]", "--trainer.max_epochs", "3", "--data_dir", "fires", "--name", "one", "--print_config"]) == 0
    text = capsys.readouterr().out
    (here/"mine.yaml").write_text(text)
    made = yaml.safe_load(text)
    assert made["model"]["init_args"]["network"]["init_args"]["hidden_dims"] == [8, 16] and made["trainer"]["max_epochs"] == 3
    assert made["data"]["init_args"]["data_dir"] == str(here/"fires")
    assert main(["fit", "--config", "mine.yaml", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == made


def test_presets_and_options_in_any_order(here, capsys):
    words = "fit --config fire/unet --focal_dice_weight .3 --loss_function FocalDice --trainer fire/full --train_years [2018,2019] --val_years [2020] --test_years [2021] --precision bf16-mixed"
    assert main(words.split() + ["--print_config"]) == 0
    made = yaml.safe_load(capsys.readouterr().out)
    assert made["model"]["init_args"]["loss"]["init_args"] == {"focal_dice_weight": .3}
    assert (made["patience"], made["trainer"]["max_epochs"], made["trainer"]["precision"]) == (25, 200, "bf16-mixed")
    assert made["data"]["init_args"]["train_years"] == [2018, 2019]


@pytest.mark.parametrize("option, hint", [("--monitor=val/f2", "'val/f1'"), ("--loss_function=Focl", "'Focal'"), ("--logger=wandbb", "'wandb'"), ("--load_from_hdf5=false", "geoforecast data fire convert")])
def test_what_would_fail_later_is_refused_before_training(option, hint, here, fires, capsys):
    assert main(["fit", "--config", "fire/logistic", "--data_dir", str(fires), "--output_dir", "out", option]) == 2
    shown = capsys.readouterr().err
    assert hint in shown and shown.count("\n") == 1 and not Path("out").exists()


def test_a_value_that_does_not_fit_is_refused(here, fires, capsys):
    assert main(["fit", "--config", "fire/unet", "--data_dir", str(fires), "--batch_size", "many", "--output_dir", "out"]) == 2
    shown = capsys.readouterr().err
    assert "batch_size" in shown and "many" in shown and shown.count("\n") == 1


def fake_evaluation(calls: list) -> SimpleNamespace:
    "Stand in for a task's evaluation and note how it is called."
    def note(name, answer): return lambda *args, **options: calls.append((name, args, options)) or answer
    rows = [dict(model="UNet", split="test", ap=.5)]
    return SimpleNamespace(report=note("report", rows), write_predictions=note("write_predictions", None), score_bundle=note("score_bundle", rows),
                           forecast_bundle=note("forecast_bundle", []), summary=lambda rows: "the table", verdict=lambda rows: "")


def test_fit_then_validate_test_predict(here, fires, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "evaluation_of", lambda task: fake_evaluation(calls))
    small = ["--max_epochs", "1", "--samples_per_epoch", "8", "--batch_size", "4", "--crop_size", "32"]
    assert main(["fit", "--config", "fire/logistic", "--data_dir", str(fires), "--output_dir", "out", *small]) == 0
    shown = capsys.readouterr().out
    assert "epoch 1/1" in shown and "the table" in shown and Path("out", "metrics.csv").is_file()
    settings = Path("out", "cli_config.yaml").read_text()
    for command, called in dict(test="report", predict="write_predictions").items():
        calls.clear()
        assert main([command, "--output_dir", "out"]) == 0
        assert [c[0] for c in calls] == [called] and calls[0][1][0].folder == here/"out"/command
    capsys.readouterr()
    assert main(["validate", "--ckpt_path", str(cli.best_checkpoint(here/"out"))]) == 0
    shown = capsys.readouterr()
    assert re.search(r"val/ap +\d\.\d{4}", shown.out) and shown.err == ""
    assert Path("out", "cli_config.yaml").read_text() == settings, "the run's own settings stay as they were"
    assert main(["fit", "--config", "fire/logistic", "--data_dir", str(fires), "--output_dir", "more", *small, "--max_epochs", "2", "--ckpt_path", "out/checkpoints/latest.ckpt"]) == 0
    shown = capsys.readouterr()
    assert "epoch 2/2" in shown.out and "epoch 1/2" not in shown.out and shown.err == ""
    Path("damaged.ckpt").write_bytes(b"nothing")
    assert main(["test", "--output_dir", "out", "--ckpt_path", "damaged.ckpt"]) == 2


def hear_interrupts():
    "Let a child process be interrupted also where this one, started in the background, cannot be."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupted_training_goes_on(here, fires):
    words = ["fit", "--config", "fire/logistic", "--data_dir", str(fires), "--output_dir", "out", "--max_epochs", "500", "--samples_per_epoch", "8", "--batch_size", "4", "--crop_size", "32"]
    first = []
    for _ in range(2):
        process = subprocess.Popen([*COMMAND, *words], cwd=here, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_interrupts)
        lines = (line for line in process.stdout if line.startswith("epoch"))
        first.append(int(re.match(r"epoch (\d+)", next(lines))[1]))
        next(lines)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130 and "the same command goes on" in error and error.count("\n") == 2
    assert first[0] == 1 < first[1]


# --- Models in use

def test_score_and_forecast_pass_on_what_was_typed(here, capsys, monkeypatch):
    calls, bundle = [], SimpleNamespace(metadata=dict(task="fire"))
    monkeypatch.setattr(cli, "_open", lambda path: (bundle, fake_evaluation(calls)))
    monkeypatch.setattr(cli, "evaluation_of", lambda task: fake_evaluation(calls))
    assert main(["score", "bundle", "a.hdf5", "--out", "scores.json"]) == 0
    assert json.loads(Path("scores.json").read_text()) == [dict(model="UNet", split="test", ap=.5)]
    assert capsys.readouterr().out.split() == ["the", "table", "scores.json"]
    assert main(["forecast", "bundle", "a.hdf5", "b.hdf5", "--out", "out", "--visualize", "--batch-size", "2", "--date", "2020-09-25"]) == 0
    assert [c[1:] for c in calls] == [((bundle, ["a.hdf5"]), {}), ((bundle, ["a.hdf5", "b.hdf5"], "out"), dict(visualize=True, batch_size=2, date="2020-09-25"))]


# --- Notebooks

def test_run_passes_parameters_and_keeps_the_notebook(here, capfd):
    write_notebook(here/"nbs"/"runs"/"walk.ipynb", "print(name, rate, data)", "from pathlib import Path\nPath(data).with_name('made.txt').write_text('x')")
    assert main(["run", "walk", "--name", "first", "-p", "rate=1e-2", "-p", "data=mine.hdf5"]) == 0
    shown = capfd.readouterr()
    assert f"first 0.01 {here}/mine.hdf5" in shown.out and shown.out.splitlines()[-1] == "outputs/walk/first/run.ipynb" and shown.err == ""
    assert (here/"made.txt").exists() and (here/"outputs"/"walk"/"first"/"run.ipynb").is_file()


def test_a_cell_that_fails_is_named_and_the_notebook_kept(here, capfd):
    path = write_notebook(here/"walk.ipynb", "print('so far')", "raise ValueError('too dry')")
    assert main(["run", str(path), "--output_dir", "out"]) == 1
    shown = capfd.readouterr()
    assert "so far" in shown.out and shown.err.splitlines()[0] == "error: walk.ipynb, cell [3] failed: ValueError: too dry"
    assert "same command again" in shown.err and "too dry" in (here/"out"/"run.ipynb").read_text()


def test_a_notebook_whose_process_dies(here, capfd):
    path = write_notebook(here/"walk.ipynb", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert main(["run", str(path), "--output_dir", "out"]) == 1
    assert "process died" in capfd.readouterr().err


def test_an_interrupted_run_says_how_to_resume(here):
    path = write_notebook(here/"walk.ipynb", "print('waiting', flush=True)\nimport time; time.sleep(100)")
    process = subprocess.Popen([*COMMAND, "run", str(path), "--output_dir", "out"], cwd=here, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_interrupts)
    while "waiting" not in process.stdout.readline(): assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in error and "Traceback" not in error, error
    assert (here/"out"/"run.ipynb").is_file()


# --- Data

def test_simulate_and_check(here, capsys):
    assert main("data fire simulate --out sim --n 3 --years 2020 --shape 9 48 48 --seed 7".split()) == 0
    assert capsys.readouterr().out.count("9 days of 48 x 48 pixels") == 3
    assert main(["data", "fire", "check", "sim"]) == 0
    assert "3 fires recognised; a training can start: 4 windows in train, 4 windows in val, 4 windows in test" in capsys.readouterr().out
    assert main(["data", "fire", "check", "sim", "--window_size", "9"]) == 0
    assert "no training can start: it needs 9 observed days" in capsys.readouterr().out


def test_check_names_what_is_wrong(here, fires, capsys):
    from geoforecast.fire.wsts import find_fires, open_fire, write_fire
    fire = open_fire(find_fires(fires)[0])
    values = fire.read()
    values[:, :22], values[3] = np.nan, np.nan
    write_fire("mine/bare.hdf5", values, fire.dates, fire.grid, "bare")
    Path("mine/cut.hdf5").write_bytes(Path("mine/bare.hdf5").read_bytes()[:1000])
    assert main(["data", "fire", "check", "mine"]) == 2
    shown = capsys.readouterr()
    assert "1 missing" in shown.out and "1 of 23 hold values; all NaN: viirs_m11, viirs_i2" in shown.out and "1 fires recognised, 1 files cannot be read" in shown.out
    assert "cut.hdf5: not a readable HDF5 file" in shown.err


def firms(path: Path, day: str, *, type: int = 0) -> Path:
    path.write_text("latitude,longitude,acq_date,acq_time,confidence,satellite,frp,type\n" + "".join(
        f"{37 + i/100:.2f},-119.30,{day},{t},n,N,1.0,{type if i == 0 else 0}\n" for i, t in enumerate(("0000", "0930", "2112"))))
    return path


def test_detections_of_several_files(here, capsys):
    from geoforecast.fire.wsts import open_fire
    firms(here/"a.csv", "2020-09-05"), firms(here/"b.csv", "2020-09-07", type=2)
    assert main(["data", "fire", "detections", "a.csv", "b.csv", "--out", "mine.hdf5", "--margin", "5"]) == 0
    shown, fire = capsys.readouterr(), open_fire("mine.hdf5")
    assert "6 detections read" in shown.out and "mine.hdf5: 2020-09-05 to 2020-09-07, 3 days" in shown.out
    assert shown.err == "warning: 1 of 6 detections are static sources (volcano, flare, offshore) and were dropped\n"
    assert fire.mask().sum((1, 2)).tolist() == [3, 0, 2] and fire.missing.tolist() == [False, True, False]


def test_convert(here, fires, capsys):
    from geoforecast.fire.convert import write_tiffs
    from geoforecast.fire.wsts import find_fires, open_fire
    fire = open_fire(find_fires(fires)[0])
    write_tiffs(fire, here/"tiffs"/"2020"/"one")
    assert main(["data", "fire", "convert", "tiffs", "--out", "made"]) == 0
    assert "1/1 2020/one: " in capsys.readouterr().out
    assert (open_fire("made/2020/one.hdf5").mask() == fire.mask()).all()


# --- What there is

def test_models(capsys):
    assert main(["models"]) == 0
    shown = capsys.readouterr()
    assert all(f"fire/{name}" in shown.out for name in ("convlstm", "logistic", "unet")) and "parameters" in shown.out and shown.err == ""


def test_doctor_ends_well_where_much_is_missing(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    assert {"python", "device", "memory", "disk"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    monkeypatch.setattr(doctor.metadata, "requires", lambda package: ["nowhere>=2", 'kornia>=900; extra == "augmentation"'])
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "nowhere is missing; install with: pip install 'geoforecast'" in shown and "pip install 'geoforecast[augmentation]'" in shown


def test_values_are_yaml_1_2():
    assert [parse_value(t) for t in ("1e-2", "2020-09-05", "010", "[1, 2.5]", "None", "a b", "")] == [.01, "2020-09-05", "010", [1, 2.5], None, "a b", None]
    with pytest.raises(ConfigError): parse_value("{a")
