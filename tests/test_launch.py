"Options by any of their names reach their place, and each mistake in a configuration is one line that names it."
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from geoforecast.core import ConfigError, GeoforecastError
from geoforecast.fire.models import Logistic
from geoforecast.fire.simulate import simulate_fires
from geoforecast.learn.callbacks import read_metrics
from geoforecast.learn.configuration import compose, configs, resolve_option
from geoforecast.learn.launch import launch
from geoforecast.learn.losses import Focal, FocalDice

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
        if name.startswith("segmentation/"): # images have no window of time
            assert [resolve_option(n, composed) for n in ("num_steps", "data_root", "num_classes")] == ["trainer.max_steps", "data.data_dir", "data.num_classes"]
            continue
        assert resolve_option("channels", composed) == "model.inputs.channels"
        assert resolve_option("window_size", composed) == "data.window_size"


NAMES = """dropout_rate deep_supervision_weight loss_function focal_dice_weight learning_rate weight_decay batch_size num_workers data_dir load_from_hdf5
max_epochs precision gradient_clip_val accumulate_grad_batches patience monitor ckpt_path train_years val_years test_years val_start_date test_start_date""".split()

def test_the_names_of_the_references_resolve():
    config = compose("fire/unet", loss_function="FocalDice")
    found = {n: resolve_option(n, config) for n in NAMES}
    assert found["loss_function"] == "model.loss" and found["focal_dice_weight"] == "model.loss.focal_dice_weight"
    assert found["precision"] == "trainer.precision" and found["patience"] == "patience" and found["test_years"] == "data.test_years"


def test_a_trainer_preset_says_how_a_run_is_watched():
    assert [compose("fire/unet", p)["trainer"]["max_epochs"] for p in ("fire/test_short", "fire/full")] == [5, 200]
    assert compose("fire/unet", "fire/full")["patience"] == 25 and "patience" not in compose("fire/unet", "fire/test_short")
    assert compose("fire/unet", "fire/full", patience="7")["patience"] == 7 and "patience" not in compose("fire/unet", "fire/full")["trainer"]


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
    assert (run.datamodule.window_size, run.forecaster.window_size, run.datamodule.batch_size, run.datamodule.crop_size) == (1, 1, 2, 64)
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
    refused(lambda: start(loss_function="Fokal"), "'Fokal'", "did you mean 'Focal'")


def test_an_option_may_stand_before_the_class_it_belongs_to(start):
    run = start(**SMALL, focal_dice_weight=".3", gamma=1, loss_function="FocalDice")
    assert isinstance(run.forecaster.loss, FocalDice) and (run.forecaster.loss.focal_dice_weight, run.forecaster.loss.focal.gamma) == (.3, 1)


@pytest.mark.parametrize("options", [dict(pos_class_weight="auto"), dict(loss_function="Focal", alpha="auto")], ids=lambda o: list(o)[-1])
def test_a_class_weight_comes_from_the_training_data_and_goes_into_the_checkpoint(options, start):
    run = start(**SMALL | options).fit()
    days = {(w.fire, d) for w in run.datamodule.windows["train"] for d in (w.day - 1, w.day)}
    hours = [run.datamodule.fires[f].read(slice(d, d + 1), bands=[22]) for f, d in days]
    weight = torch.load(run.best_path, weights_only=True)["state_dict"]["loss.pixels_per_fire"].item()
    assert weight == pytest.approx(sum(h.size for h in hours)/sum((h > 0).sum() for h in hours)) and weight > 1


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


def test_a_score_that_is_not_logged_is_refused_before_anything_is_trained(start, tmp_path):
    for wrong, right in {"val/f2": "val/f1", "val_ap": "val/ap", "val/los": "val/loss"}.items(): refused(lambda: start(**SMALL, monitor=wrong), f"'{wrong}'", f"did you mean '{right}'")
    refused(lambda: start(**SMALL, load_from_hdf5=False), "convert")
    refused(lambda: start(**SMALL, logger="tensorbord"), "did you mean 'tensorboard'")
    assert not (tmp_path/"run").exists()


# Runs

@pytest.mark.parametrize("score", ["f1", "ap"])
def test_the_best_checkpoint_is_named_after_epoch_and_score(score, start):
    run = start(**SMALL | dict(max_epochs=2), monitor=f"val/{score}", learning_rate=.03).fit()
    found = re.fullmatch(rf"UNet_epoch_(\d\d)_val_{score}_(\d\.\d{{3}})\.ckpt", run.best_path.name)
    best = max(run.metrics, key=lambda row: row[f"val/{score}"])
    assert found and run.metrics[int(found[1])][f"val/{score}"] == best[f"val/{score}"] and found[2] == f"{best[f'val/{score}']:.3f}"


def test_what_is_logged_stands_in_the_table_and_in_tensorboard(start):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = start(**SMALL | dict(max_epochs=2)).fit()
    events = EventAccumulator(str(run.folder/"tensorboard")).Reload()
    names = {"train/main_loss", "train/total_loss", "train/f1", "train/ap", "val/loss", "val/f1", "val/precision", "val/recall", "val/ap", "lr"}
    assert names <= set(events.Tags()["scalars"]) and names <= set(run.metrics[0])
    for name in names: assert [e.value for e in events.Scalars(name)] == pytest.approx([row[name] for row in run.metrics])
    assert yaml.safe_load((run.folder/"tensorboard"/"hparams.yaml").read_text()) == run.config


def test_weights_and_biases_gets_the_same_names_and_the_configuration(start, monkeypatch):
    from lightning.pytorch import loggers
    made = []

    class Recorder(loggers.CSVLogger):
        def __init__(self, **options):
            super().__init__(options["save_dir"], name="wandb", version="")
            self.options, self.seen = options, {}
            made.append(self)
        def log_hyperparams(self, params): self.hyperparameters = params
        def log_metrics(self, metrics, step=None): self.seen |= metrics
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    monkeypatch.setattr(loggers, "WandbLogger", Recorder)
    run = start(**SMALL, logger="wandb").fit()
    assert made[0].options["name"] == "run" and made[0].options["save_dir"] == run.folder and made[0].hyperparameters == run.config
    assert {"train/total_loss", "train/ap", "val/f1", "val/ap", "lr"} <= set(made[0].seen)


def test_weights_and_biases_that_is_missing_is_named_with_its_extra(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(lambda: start(**SMALL, logger="wandb"), "geoforecast[wandb]")


def test_a_run_validates_tests_and_predicts(start):
    run = start(**SMALL).fit()
    tested, validated = run.test(), run.validate()
    assert {f"test/{k}" for k in "loss f1 precision recall specificity auc ap iou dice ece uce brier tp fp fn tn f1_best threshold_best".split()} <= set(tested)
    assert validated["val/ap"] == pytest.approx(run.metrics[-1]["val/ap"]) and f"{validated['val/ap']:.3f}" in run.best_path.name
    probability = torch.cat(run.predict())
    truth = torch.stack([batch.target for batch in run.datamodule.dataset("test")])
    assert probability.shape == truth.shape and int(((probability >= .5) & (truth > 0)).sum()) == tested["test/tp"]


def test_gradients_of_two_batches_make_one_step(start):
    run = start(**SMALL | dict(batch_size=2, samples_per_epoch=16), accumulate_grad_batches=4, **{"trainer.gradient_clip_val": .5}).fit()
    assert run.trainer.global_step == 2 and run.forecaster.average.n_averaged == 2


def test_recomputed_activations_train_to_the_same_weights(start, tmp_path):
    options = SMALL | dict(hidden_dims=[3], config="fire/convlstm")
    one, two = (start(**options, checkpointing=c, output_dir=str(tmp_path/str(c))).fit() for c in (False, True))
    assert two.forecaster.network.recurrent.checkpointing and not one.forecaster.network.recurrent.checkpointing
    for a, b in zip(one.forecaster.state_dict().values(), two.forecaster.state_dict().values()): assert torch.equal(a, b)


def test_a_run_starts_from_a_checkpoint_and_then_goes_on_from_its_own(start, tmp_path):
    first = start(**SMALL).fit()
    latest, more = first.folder/"checkpoints"/"latest.ckpt", dict(output_dir=str(tmp_path/"more"), ckpt_path=str(first.folder/"checkpoints"/"latest.ckpt"))
    run = start(**SMALL | dict(max_epochs=2), **more)
    assert run.ckpt_path == latest
    assert [row["epoch"] for row in run.fit().metrics] == [1]
    again = start(**SMALL | dict(max_epochs=2), **more)
    assert again.ckpt_path == tmp_path/"more"/"checkpoints"/"latest.ckpt" and len(again.fit().metrics) == 1
    refused(lambda: start(**SMALL | dict(hidden_dims=[2, 6]), **more | dict(output_dir=str(tmp_path/"other"))).fit(), "latest.ckpt", "another model")
    refused(lambda: start(**SMALL, output_dir=str(tmp_path/"other"), ckpt_path="nowhere.ckpt").fit(), "nowhere.ckpt")
    assert len(read_metrics(first.folder/"metrics.csv")) == 1, "the run that was started from stays as it was"


def test_the_whole_of_a_run_takes_the_start_of_a_checkpoint_to_the_same_bits(start, tmp_path):
    whole = start(**SMALL | dict(max_epochs=2), schedule="constant", output_dir=str(tmp_path/"whole")).fit()
    half = start(**SMALL, schedule="constant", output_dir=str(tmp_path/"half")).fit()
    on = start(**SMALL | dict(max_epochs=2), schedule="constant", output_dir=str(tmp_path/"on"), ckpt_path=str(half.folder/"checkpoints"/"latest.ckpt")).fit()
    one, two = (torch.load(r.folder/"checkpoints"/"latest.ckpt", weights_only=True)["state_dict"] for r in (whole, on))
    assert all(torch.equal(a, b) for a, b in zip(one.values(), two.values()))


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
