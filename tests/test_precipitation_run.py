"""A run of rain from the terminal and through papermill: every option of the reference's command line under its own name, every file it writes."""
import json
from pathlib import Path

import papermill
import pytest
import torch
import xarray as xr
import yaml

from geoforecast.cli import main
from geoforecast.learn.bundle import load_bundle
from geoforecast.learn.configuration import compose
from geoforecast.learn.launch import launch
from geoforecast.precipitation.simulate import simulate_atmosphere

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = dict(
    include_upstream=True, downstream_lat_min=25., downstream_lat_max=40., downstream_lon_min=110., downstream_lon_max=125., upstream_lat_min=25., upstream_lat_max=40.,
    upstream_lon_min=70., upstream_lon_max=110., hidden_channels=[4, 8], kernel_size=3, learning_rate=2e-3, batch_size=8, num_epochs=2, gradient_clip_norm=.5, weight_decay=1e-4,
    window_size=3, target_offset=2, train_ratio=.6, val_ratio=.2, train_end_year=None, val_end_year=None, test_start_date=None, high_precip_threshold=5., high_precip_weight=2.,
    use_amp=False, gradient_accumulation_steps=2, num_workers=0, pin_memory=False, checkpoint_frequency=10, validation_frequency=10, early_stopping_patience=7, log_level='warning', device='cpu')
PLACES = dict(
    include_upstream='data.region.include_upstream', upstream_lon_min='data.region.upstream_lon_min', hidden_channels='model.network.hidden_dims', kernel_size='model.network.kernel_size',
    learning_rate='model.learning_rate', batch_size='data.batch_size', gradient_clip_norm='trainer.gradient_clip_val', weight_decay='model.weight_decay', window_size='model.window_size',
    target_offset='model.target_offset', train_ratio='data.train_ratio', high_precip_threshold='model.high_precip_threshold', high_precip_weight='model.high_precip_weight',
    gradient_accumulation_steps='trainer.accumulate_grad_batches', validation_frequency='data.validation_frequency', early_stopping_patience='patience', device='trainer.accelerator',
    checkpoint_frequency='checkpoint_frequency', log_level='log_level')


def at(config: dict, name: str):
    "Look up a dotted name without `init_args`."
    for part in name.split('.'): config = config.get('init_args', config)[part] if part not in config else config[part]
    return config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")/"atmosphere.nc"
    simulate_atmosphere(path, 240, levels=(850,))
    return path


def test_every_option_of_the_reference_reaches_its_place():
    config = compose("precipitation/baseline", **OPTIONS)
    assert {name: at(config, place) for name, place in PLACES.items()} == {name: OPTIONS[name] for name in PLACES}
    assert config["trainer"]["precision"] == "32-true"


def test_the_run_notebook_has_every_option():
    names = set(papermill.inspect_notebook(str(ROOT/"nbs"/"runs"/"precipitation.ipynb")))
    assert set(OPTIONS) | {"data", "output_dir", "resume"} <= names


@pytest.mark.parametrize("preset, widths, batch", [("baseline", [32, 64], 4), ("upstream", [32, 64], 4), ("low_memory", [16, 32], 2), ("high_capacity", [64, 128], 4), ("quick_test", [8, 16], 16)])
def test_presets(preset, widths, batch):
    config = compose(f"precipitation/{preset}")
    assert (at(config, "model.network.hidden_dims"), at(config, "data.batch_size")) == (widths, batch)
    assert config["trainer"].get("accumulate_grad_batches", 1) == (4 if preset == "low_memory" else 1)


def test_fit_score_forecast_and_compare_from_the_terminal(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [w for name, value in OPTIONS.items() if value is not None for w in (f"--{name}", json.dumps(value).strip('"'))]
    assert main(["fit", "--config", "precipitation/baseline", "--data", str(data), "--output_dir", "out", "--keep_every", "2", *words]) == 0
    out = capsys.readouterr().out
    assert "epoch 1" not in out and "persistence" in out, "log_level warning prints no line an epoch"
    config = yaml.safe_load(Path("out/cli_config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 4, "two passes over 135 windows, validated every 80"
    assert at(config, "model.inputs.upstream_columns") == 16, "the data said so"
    kept = {p.name for p in Path("out").rglob("*")}
    assert {"training.log", "metrics.csv", "scores.json", "predictions.nc", "metadata.json", "model_card.md", "model.safetensors", "inputs.json", "latest.ckpt"} <= kept
    assert any(n.startswith("checkpoint_epoch_") for n in kept) and any(n.startswith("prediction_map_") for n in kept)
    assert main(["score", "out/bundle", str(data), "--out", "scores.json"]) == 0
    assert {"persistence", "ridge", "ConvLSTMUNet"} <= {r["model"] for r in json.loads(Path("scores.json").read_text())}
    for name in ("a", "b"): assert main(["forecast", "out/bundle", str(data), "--out", name]) == 0
    found = sorted(Path(".").glob("[ab]/*/predictions.nc"))
    assert len(found) == 2 and main(["compare", *map(str, found), "--truth", str(data), "--out", "compared"]) == 0
    assert "cannot be told apart" in capsys.readouterr().out and Path("compared/comparison.json").exists()


def test_a_bundle_gives_the_same_forecast_and_refuses_other_channels(data, tmp_path, capsys):
    run = launch("precipitation/quick_test", output_dir=str(tmp_path/"run"), data_dir=str(data), max_epochs=1, window_size=2).fit()
    from geoforecast.precipitation.evaluation import report
    report(run, maps=0)
    bundle, batch = load_bundle(tmp_path/"run"), next(iter(run.datamodule.fields("test")))
    with torch.no_grad(): assert torch.equal(bundle.forecaster(batch.inputs), run.forecaster(batch.inputs))
    with xr.open_dataset(data) as ds: ds.drop_vars("U").to_netcdf(tmp_path/"poor.nc")
    assert main(["score", str(tmp_path/"run"), str(tmp_path/"poor.nc")]) == 2
    assert "U_850" in capsys.readouterr().err
