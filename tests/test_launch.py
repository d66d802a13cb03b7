"Options by any of their names reach their place, and each mistake in a configuration is one line that names it."
import pytest
import torch
import yaml

from geoforecast.core import ConfigError, GeoforecastError
from geoforecast.fire.models import Logistic
from geoforecast.fire.simulate import simulate_fires
from geoforecast.learn.launch import compose, configs, launch, resolve_option
from geoforecast.learn.losses import Focal

SMALL = dict(window_size=2, hidden_dims=[2, 4], crop_size=16, batch_size=4, samples_per_epoch=8, max_epochs=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    simulate_fires(folder, 3, shape=(7, 24, 26), seed=1)
    return folder


@pytest.fixture
def start(data, tmp_path, monkeypatch):
    "Launch the small U-Net on simulated fires in a folder of its own, like a user who types in another folder."
    monkeypatch.chdir(tmp_path)
    return lambda config="fire/unet", *presets, **options: launch(config, *presets, **dict(data_dir=str(data), output_dir=str(tmp_path/"run")) | options)


def network_of(run): return run.config["model"]["init_args"]["network"]["init_args"]


def refused(action, *words, error=ConfigError):
    with pytest.raises(error) as found: action()
    text = str(found.value)
    assert "\n" not in text and len(text) <= 500, text
    for word in words: assert word in text, text
    return text


# Names

@pytest.mark.parametrize("name", ["hidden_dims", "model.network.hidden_dims", "model.init_args.network.init_args.hidden_dims"])
@pytest.mark.parametrize("value", [[4, 8], "[4, 8]"])
def test_an_option_has_a_short_a_dotted_and_a_long_name(name, value):
    assert compose("fire/unet", **{name: value}) == compose("fire/unet", hidden_dims=[4, 8])
    assert compose("fire/unet", **{name: value})["model"]["init_args"]["network"]["init_args"]["hidden_dims"] == [4, 8]


@pytest.mark.parametrize("wrong, right", [
    ("hiden_dims", "hidden_dims"), ("model.network.hidden_dim", "model.network.hidden_dims"), ("learningrate", "learning_rate"),
    ("batchsize", "batch_size"), ("trainer.max_epoch", "trainer.max_epochs"), ("data.init_args.crop_siz", "data.crop_size"), ("output_dirs", "output_dir")])
def test_an_unknown_option_is_refused_with_the_nearest(wrong, right):
    text = refused(lambda: compose("fire/unet", **{wrong: 1}), f"'{wrong}'", f"did you mean '{right}'")
    assert "NestedArg" not in text


@pytest.mark.parametrize("options, right", [
    (dict(config="fire/unett"), "fire/unet"), (dict(config="fire/unet", trainer="fire/ful"), "fire/full"), (dict(config="fire/unet", data="fire/monotemp"), "fire/monotemporal")])
def test_an_unknown_preset_is_refused_with_the_nearest(options, right): refused(lambda: compose(**options), f"did you mean '{right}'")


def test_every_shipped_configuration_composes_and_every_short_name_resolves():
    for name in configs():
        composed = compose(name)
        assert resolve_option("max_epochs", composed) == "trainer.max_epochs"
        assert resolve_option("channels", composed) == "model.inputs.channels"
        assert resolve_option("window_size", composed) == "data.window_size"


# Values

def test_values_arrive(start):
    run = start(**SMALL | dict(hidden_dims="[3, 5, 7]"), learning_rate="1e-4", dropout_rate=".25", schedule="poly",
                **{"trainer.gradient_clip_val": "2", "trainer.precision": "bf16-mixed"})
    assert network_of(run)["hidden_dims"] == [3, 5, 7] and network_of(run)["dropout_rate"] == .25
    assert (run.forecaster.learning_rate, run.forecaster.schedule, run.forecaster.window_size, run.datamodule.window_size) == (1e-4, "poly", 2, 2)
    assert (run.trainer.max_epochs, run.trainer.gradient_clip_val, run.trainer.precision) == (1, 2, "bf16-mixed")


@pytest.mark.parametrize("name, value", [("data.test_start_date", "2020-10-10"), ("data.data_dir", "C:\\fires\\2020"), ("data.data_dir", "2020"),
                                         ("data.data_dir", "@home/a: b"), ("name", "2020"), ("output_dir", "1e3")])
def test_text_stays_text(name, value):
    composed = compose("fire/unet", **{name: value})
    section, _, leaf = name.rpartition(".")
    assert (composed[section]["init_args"] if section else composed)[leaf] == value


def test_dates_are_read_as_text_from_options_and_files(data, tmp_path):
    config = compose("fire/unet", **SMALL, data_dir=str(data))
    file = tmp_path/"mine.yaml"
    file.write_text(yaml.safe_dump(config) + "\n")
    days = sorted(str(d) for d in launch(config, output_dir=str(tmp_path/"a")).datamodule.fires[0].dates)
    file.write_text(file.read_text().replace(f"data_dir: {data}", f"data_dir: {data}/2018\n    val_start_date: {days[-3]}\n    test_start_date: {days[-2]}"))
    targets = lambda run: {p: {str(run.datamodule.fires[w.fire].dates[w.day + 1]) for w in ws} for p, ws in run.datamodule.windows.items()}
    one = targets(launch(file, output_dir=str(tmp_path/"b")))
    two = targets(launch("fire/unet", **SMALL, data_dir=f"{data}/2018", val_start_date=days[-3], test_start_date=days[-2], output_dir=str(tmp_path/"c")))
    assert one == two and one["val"] == {days[-3]} and one["test"] == {days[-2], days[-1]} and max(one["train"]) < days[-3]


def test_presets_lie_over_the_configuration_and_options_over_presets(start):
    run = start("fire/unet", "fire/test_short", "fire/monotemporal", hidden_dims=[2, 4], batch_size=2)
    assert (run.trainer.max_epochs, run.trainer.limit_train_batches, run.trainer.gradient_clip_val) == (5, .2, 1)
    assert (run.datamodule.window_size, run.forecaster.window_size, run.datamodule.batch_size, run.datamodule.crop_size) == (1, 1, 2, 96)
    run = start("fire/unet", "fire/test_short", "fire/monotemporal", hidden_dims=[2, 4], max_epochs=3, window_size=2)
    assert (run.trainer.max_epochs, run.datamodule.window_size, run.forecaster.network.window_size) == (3, 2, 2)


def test_a_class_is_exchanged_by_its_name_and_takes_its_own_options(start):
    run = start(**SMALL, **{"model.loss": "geoforecast.learn.losses.Focal", "model.loss.gamma": 3})
    assert isinstance(run.forecaster.loss, Focal) and (run.forecaster.loss.gamma, run.forecaster.loss.alpha) == (3, None)
    run = start(**SMALL, loss="geoforecast.learn.losses.Focal", gamma="1.5", alpha=".25")
    assert (run.forecaster.loss.gamma, run.forecaster.loss.alpha) == (1.5, .25)
    small = {k: v for k, v in SMALL.items() if k != "hidden_dims"}
    run = start(**small, **{"model.network": "geoforecast.fire.models.Logistic", "kernel_size": 1})
    assert isinstance(run.forecaster.network, Logistic) and run.forecaster.network.head.kernel_size == (1, 1)
    refused(lambda: start(**SMALL, gamma=3), "'gamma'")
    refused(lambda: start(loss="geoforecast.learn.losses.Fokal"), "Fokal")


@pytest.mark.parametrize("name, value", [("batch_size", "many"), ("hidden_dims", "wide"), ("max_epochs", "ten"), ("trainer.deterministic", "perhaps"), ("schedule", "cosin")])
def test_a_value_of_the_wrong_type_is_refused(name, value, start): refused(lambda: start(**{name: value}), value, name.rpartition(".")[2])


@pytest.mark.parametrize("options, words", [
    (dict(norm="bach"), ["bach", "batch"]), (dict(channels="detection"), ["detection", "detections"]), (dict(data_dir="/nowhere"), ["/nowhere"]),
    (dict(val_fires=["x"]), ["'x'", "val"]), (dict(test_start_date="10.10.2020"), ["10.10.2020"])], ids=lambda v: "")
def test_what_model_and_data_refuse_arrives_as_their_one_line(options, words, start): refused(lambda: start(**options), *words, error=GeoforecastError)


# Files

@pytest.mark.parametrize("text, words", [
    ("model: [", ["not valid YAML", "line 1"]), ("\tmodel: x", ["not valid YAML"]), ("- a\n- b", ["no settings"]), ("", ["no settings"]),
    ("model: !!python/object/apply:os.system ['true']", ["not valid YAML"]), ("modle:\n  class_path: x", ["modle"]),
    ("model:\n  class_path: geoforecast.fire.forecaster.Fire", ["geoforecast.fire.forecaster.Fire"]),
    ("model:\n  class_path: geoforecast.fire.forecaster.FireForecaster\n  init_args:\n    learnin_rate: 3\n", ["learnin_rate"])], ids=lambda v: "")
def test_a_bad_file_is_refused(text, words, tmp_path):
    file = tmp_path/"bad.yaml"
    file.write_text(text)
    refused(lambda: launch(file, output_dir=str(tmp_path/"run")), *words)


def test_a_file_that_is_absent_or_no_text_is_refused(tmp_path):
    refused(lambda: launch(tmp_path/"none.yaml"), "none.yaml", "does not exist")
    (tmp_path/"bin.yaml").write_bytes(b"\xff\xfe\x00")
    refused(lambda: launch(tmp_path/"bin.yaml"), "bin.yaml")


def test_an_option_that_is_no_yaml_is_refused_or_text(start): refused(lambda: start(hidden_dims="[4, 8"), "[4, 8")


# Runs

def test_what_a_run_writes_loads_without_executing_anything(start, tmp_path):
    run = start(**SMALL, patience=3).fit()
    files = list(run.folder.rglob("*.ckpt"))
    assert {"latest.ckpt", run.best_path.name} == {f.name for f in files}
    for file in files: assert torch.load(file, weights_only=True)["state_dict"].keys() == run.forecaster.state_dict().keys()
    assert not [f for f in run.folder.rglob("*") if f.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    assert {p.name for p in tmp_path.iterdir()} == {"run"}, "nothing is written beside the run's folder"
    written = yaml.safe_load((run.folder/"cli_config.yaml").read_text())
    assert written == run.config and start(written).ckpt_path == run.folder/"checkpoints"/"latest.ckpt"


@pytest.mark.parametrize("options", [{"trainer.max_steps": 1}, {"trainer.limit_val_batches": 0}, {"trainer.fast_dev_run": True}], ids=str)
def test_a_run_without_a_best_checkpoint_ends_well(options, start):
    run = start(**SMALL | options).fit()
    assert run.best_path is None and not run.forecaster.training


def test_an_epoch_without_a_batch_is_refused(start):
    refused(lambda: start(**SMALL | dict(samples_per_epoch=3)).fit(), "samples_per_epoch", "batch_size", error=GeoforecastError)


def test_a_checkpoint_of_another_model_is_refused(start):
    run = start(**SMALL).fit()
    other = start(**SMALL | dict(hidden_dims=[2, 8]))
    kept = run.folder/"checkpoints_1"/"latest.ckpt"
    refused(lambda: other.load(kept), "latest.ckpt")


def test_two_runs_of_one_process_equal_two_processes(start, tmp_path):
    "The seed of a run is its own, whatever ran before in the same notebook."
    one = start(**SMALL, dropout_rate=.3, output_dir=str(tmp_path/"one"))
    two = start(**SMALL, dropout_rate=.3, output_dir=str(tmp_path/"two"))
    one.fit(), two.fit()
    assert all(torch.equal(a, b) for a, b in zip(one.forecaster.state_dict().values(), two.forecaster.state_dict().values()))
