"""Damaged models, settings and results: each damage gives the same forecast as the good file, or one line that names it.

A bundle's forecast is compared bit by bit, so that a weight that flipped and stayed a number cannot pass.
"""
import contextlib
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from damage import Judge, copied, digest, random_damage
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from geoforecast.cli import main
from geoforecast.core import ConfigError, DataError
from geoforecast.fire.channels import BANDS
from geoforecast.fire.evaluation import score_bundle
from geoforecast.fire.models import BoxBlur
from geoforecast.fire.wsts import write_fire
from geoforecast.geo.grid import Grid
from geoforecast.learn.bundle import load_bundle, save_bundle
from geoforecast.learn.callbacks import read_metrics
from geoforecast.learn.configuration import compose
from geoforecast.learn.launch import launch
from geoforecast.sweep_scores import read_results, read_scores

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
GRID = Grid("EPSG:32611", (375, 0, 269625, 0, -375, 4178250), 16, 16)
OPTIONS = dict(hidden_dims=[2, 4], window_size=2, crop_size=16, batch_size=2, samples_per_epoch=2, max_epochs=1, log_level="warning", val_fires=["b"], test_fires=["c"], **{"trainer.accelerator": "cpu"})
QUICK = dict(database=None, derandomize=True, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
MADE = {}


def tried(judge, ledger, kind):
    judge.close()
    ledger(kind, judge.endings.total(), **judge.endings)
    assert not judge.bad, judge.report()
    assert judge.endings["refused"], judge.endings


def write_fires(folder):
    folder.mkdir()
    for k, name in enumerate("abc"):
        rng = np.random.default_rng(k)
        data = (np.array([b.limit for b in BANDS[:23]])[:, None, None]*rng.uniform(.01, .1, (6, 23, 16, 16))).astype(np.float32)
        data[:, 22] = np.where(rng.random((6, 16, 16)) < .2, 13.5, 0)
        write_fire(folder/f"{name}.hdf5", data, np.datetime64(f"2020-09-0{k + 1}") + np.arange(6), GRID, name)
    return folder


@pytest.fixture(scope="module", autouse=True)
def made(tmp_path_factory):
    "A run that has trained for an epoch, and its bundle."
    folder = tmp_path_factory.mktemp("models")
    data = write_fires(folder/"fires")
    torch.set_num_threads(1)
    run = launch("fire/unet", data_dir=str(data), output_dir=str(folder/"run"), **OPTIONS).fit()
    rows = [dict(model=m, split=s, ap=.5, n=3) for s in ("val", "test") for m in ("blur", "UNet")]
    save_bundle(folder/"run"/"bundle", run.forecaster, run.config, dict(task="fire", protocol="default", window_size=2), {"blur": ({"width": 3}, BoxBlur(3))}, rows)
    MADE.update(folder=folder, data=data, run=folder/"run", bundle=folder/"run"/"bundle", raw=torch.from_numpy(np.random.default_rng(0).uniform(0, 20, (1, 2, 24, 16, 16)).astype(np.float32)))
    MADE["forecast"] = forecast_of(MADE["bundle"])
    MADE["weights"] = digest(*(v.numpy() for v in run.forecaster.state_dict().values()))
    return MADE


def forecast_of(folder):
    bundle = load_bundle(folder)
    with torch.no_grad(): return digest(bundle.forecaster(MADE["raw"]).numpy(), bundle.baselines["blur"](MADE["raw"][:, -1, 22, None] > 0).numpy(), np.array(json.dumps(bundle.scores)))


# Bundles

def use_bundle(folder: Path) -> str | None:
    return None if forecast_of(folder) == MADE["forecast"] else "another forecast"


def old(folder):
    "A bundle as it was before there were checksums of everything; returns the folder."
    (folder/"SHA256SUMS").unlink()
    facts = json.loads((folder/"metadata.json").read_text())
    (folder/"metadata.json").write_text(json.dumps({k: v for k, v in facts.items() if k != "sha256"}))
    return folder


FILES = ("model.safetensors", "config.yaml", "metadata.json", "baselines.json", "baselines.safetensors", "scores.json", "inputs.json", "SHA256SUMS")


def test_any_flipped_byte_of_a_bundle_is_refused(made, tmp_path, many, ledger):
    judge = Judge(use_bundle)
    assert judge.try_file("good", made["bundle"]) == "right"
    for name in FILES:
        content = (made["bundle"]/name).read_bytes()
        for seed in range(300 if many else 10):
            folder = copied(made["bundle"], tmp_path/"trial")
            what, damaged = random_damage(content, seed)
            (folder/name).write_bytes(damaged)
            ended = judge.try_file(f"{name} {what}", folder)
            assert ended != "right" or damaged == content, f"{name} {what} was loaded"
    tried(judge, ledger, "bundle: random damage of each file")


def weights(change):
    def write(folder):
        tensors = load_file(old(folder)/"model.safetensors")
        save_file(change(tensors), folder/"model.safetensors")
    return write


def first(tensors): return next(k for k in sorted(tensors) if k.startswith("network.") and k.endswith("weight"))


def filled(value): return weights(lambda t: t | {first(t): torch.full_like(t[first(t)], value)})


def text(name, content): return lambda folder: (old(folder)/name).write_bytes(content if isinstance(content, bytes) else content.encode())


def settings_with(change):
    def write(folder):
        config = yaml.safe_load((old(folder)/"config.yaml").read_text())
        config = change(config) or config
        (folder/"config.yaml").write_text(yaml.safe_dump(config))
    return write


BUNDLES = {
    "as it is": (lambda f: None, "right"), "an edited card": (lambda f: (f/"model_card.md").write_text("mine"), "right"), "no card": (lambda f: (f/"model_card.md").unlink(), "right"), "without checksums": (lambda f: old(f), "right"), "further files": (lambda f: (f/"notes.txt").write_text("x"), "right"),
    "NaN": (filled(torch.nan), "refused"), "infinite": (filled(torch.inf), "refused"), "a tensor less": (weights(lambda t: {k: v for k, v in t.items() if k != first(t)}), "refused"), "a tensor more": (weights(lambda t: t | {"more": torch.ones(2)}), "refused"),
    "another shape": (weights(lambda t: t | {first(t): t[first(t)][:1].contiguous()}), "refused"), "no tensors": (weights(lambda t: {}), "refused"), "pickle": (text("model.safetensors", b"\x80\x04K\x01."), "refused"), "length of 2^60": (text("model.safetensors", (2**60).to_bytes(8, "little") + bytes(100)), "refused"),
    "checksum of one is missing": (lambda f: (f/"SHA256SUMS").write_text("".join((f/"SHA256SUMS").read_text().splitlines(True)[1:])), "refused"), "empty checksums": (lambda f: (f/"SHA256SUMS").write_text(""), "refused"), "checksums in words": (lambda f: (f/"SHA256SUMS").write_text("none\n"), "refused"),
    "width of -3": (text("baselines.json", '{"blur": {"class_path": "geoforecast.fire.models.BoxBlur", "init_args": {"width": -3}}}'), "refused"), "width in words": (text("baselines.json", '{"blur": {"class_path": "geoforecast.fire.models.BoxBlur", "init_args": {"width": "x"}}}'), "refused"),
    "a baseline of nothing": (text("baselines.json", '{"blur": null}'), "refused"), "a list of baselines": (text("baselines.json", "[]"), "refused"), "scores by name": (text("scores.json", "{}"), "refused"), "scores of numbers": (text("scores.json", "[1]"), "refused"), "task 7": (text("metadata.json", '{"task": 7}'), "refused"),
    "metadata a list": (text("metadata.json", "[]"), "refused"), "deep JSON": (text("scores.json", "["*100_000), "refused"), "deep YAML": (text("config.yaml", "["*10_000), "refused"), "empty settings": (text("config.yaml", ""), "refused"), "settings a list": (text("config.yaml", "- 1"), "refused"),
    "null bytes": (text("config.yaml", b"\0\0"), "refused"), "Latin-1": (text("config.yaml", b"model: \xe9"), "refused"), "a layer more": (settings_with(lambda c: c["model"]["init_args"]["network"]["init_args"].update(hidden_dims=[2, 4, 8])), "refused"), "-1 layers": (settings_with(lambda c: c["model"]["init_args"]["network"]["init_args"].update(hidden_dims=[-1])), "refused"),
    "an enormous layer": (settings_with(lambda c: c["model"]["init_args"]["network"]["init_args"].update(hidden_dims=[10**9, 10**9])), "refused"), "no network": (settings_with(lambda c: c["model"]["init_args"].pop("network") and None), "refused"), "no model": (settings_with(lambda c: {"x": 1}), "refused"), "unknown channels": (settings_with(lambda c: c["model"]["init_args"]["inputs"]["init_args"].update(channels="x")), "refused")} | {
    f"without {name}": (lambda f, name=name: (f/name).unlink(), "right" if name == "SHA256SUMS" else "refused") for name in FILES} | {
    f"folder {name}": (lambda f, name=name: ((f/name).unlink(), (f/name).mkdir()), "refused") for name in FILES[:6]}


def test_targeted_damage_of_a_bundle(made, tmp_path, ledger):
    judge, other = Judge(use_bundle), []
    for case, (change, expected) in BUNDLES.items():
        folder = copied(made["bundle"], tmp_path/"trial")
        change(folder)
        ended = judge.try_file(case, folder)
        if ended in ("right", "refused") and ended != expected: other.append(f"{case}: {ended}, not {expected}")
    assert not other, "\n".join([*other, judge.report()])
    tried(judge, ledger, "bundle: weights, settings, statistics, files")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8) | st.sampled_from(["task", "class_path", "init_args", "blur", "width", "model", "split", "sha256"]), x, max_size=3), max_leaves=6)


def load_old(folder: Path) -> None:
    "Load a bundle without checksums as a notebook does, and show it."
    load_bundle(folder)._repr_html_()


@pytest.mark.parametrize("name", ["metadata.json", "baselines.json", "scores.json", "config.yaml"])
def test_any_tree_in_a_bundle_without_checksums(name, made, tmp_path, many, ledger):
    judge, folder = Judge(load_old), old(copied(made["bundle"], tmp_path/"trial"))

    @settings(max_examples=400 if many else 25, **QUICK)
    @given(JSON)
    def write(tree):
        (folder/name).write_text(json.dumps(tree) if name.endswith("json") else yaml.safe_dump(tree))
        judge.try_file(f"{name} {tree!r}"[:200], folder)

    write()
    tried(judge, ledger, f"bundle without checksums: any tree in {name}")


def test_a_damaged_bundle_on_the_command_line(made, tmp_path, capsys):
    folder = copied(made["bundle"], tmp_path/"trial")
    content = bytearray((folder/"model.safetensors").read_bytes())
    content[-2] ^= 1
    (folder/"model.safetensors").write_bytes(content)
    for words in (["score", str(folder), str(made["data"])], ["forecast", str(folder), str(made["data"]), "--out", str(tmp_path/"out")]):
        assert main(words) == 2
        said = capsys.readouterr().err.strip()
        assert said.count("\n") == 0 and "model.safetensors is damaged" in said
    assert not (tmp_path/"out").exists()


# Checkpoints

def use_checkpoint(path: Path) -> str | None:
    "Load weights and go on from them, as `fit` does before it trains."
    if "other" not in MADE:
        with contextlib.redirect_stdout(io.StringIO()): MADE["other"] = launch("fire/unet", data_dir=str(MADE["data"]), output_dir=str(MADE["folder"]/"other"), **OPTIONS)
    run = MADE["other"]
    run._fitting(path, whole=True)
    run.load(path)
    if digest(*(v.numpy() for v in run.forecaster.state_dict().values())) != MADE["weights"]: return "other weights"


def test_random_damage_of_a_checkpoint(made, tmp_path, many, ledger):
    judge, best = Judge(use_checkpoint), next(p for p in (made["run"]/"checkpoints").glob("*.ckpt"))
    good = shutil.copy(best, tmp_path/"latest.ckpt")
    assert judge.try_file("good", Path(good)) == "right", judge.report()
    judge.try_all(Path(good), (random_damage(Path(good).read_bytes(), seed) for seed in range(600 if many else 20)))
    tried(judge, ledger, "checkpoint: random")


def saved(change):
    def write(path):
        found = torch.load(path, weights_only=True)
        torch.save(change(found), path)
    return write


CHECKPOINTS = {
    "as it is": (lambda p: None, "right"), "empty": (lambda p: p.write_bytes(b""), "refused"), "text": (lambda p: p.write_text("x"), "refused"), "folder": (lambda p: (p.unlink(), p.mkdir()), "refused"), "no state": (saved(lambda c: {k: v for k, v in c.items() if k != "state_dict"}), "refused"),
    "weights only": (saved(lambda c: {"state_dict": c["state_dict"]}), "refused"), "a list": (saved(lambda c: [1]), "refused"), "state of words": (saved(lambda c: c | {"state_dict": {"a": "b"}}), "refused"), "another shape": (saved(lambda c: c | {"state_dict": {k: v[..., None] for k, v in c["state_dict"].items()}}), "refused"),
    "another zip": (lambda p: zipfile.ZipFile(p, "w").close(), "refused"), "PNG": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500)), "refused")}


def test_targeted_damage_of_a_checkpoint(made, tmp_path, ledger):
    judge, other = Judge(use_checkpoint), []
    for i, (case, (change, expected)) in enumerate(CHECKPOINTS.items()):
        path = tmp_path/f"{i}"/"latest.ckpt"
        path.parent.mkdir()
        shutil.copy(next((made["run"]/"checkpoints").glob("*.ckpt")), path)
        change(path)
        ended = judge.try_file(case, path)
        if ended in ("right", "refused") and ended != expected: other.append(f"{case}: {ended}, not {expected}")
    assert not other, "\n".join([*other, judge.report()])
    tried(judge, ledger, "checkpoint: contents")


def test_a_damaged_latest_checkpoint_of_a_run(made, tmp_path):
    "The same command says which file is damaged and trains nothing; without the file it starts anew."
    run = copied(made["run"], tmp_path/"again")
    latest = run/"checkpoints"/"latest.ckpt"
    content = bytearray(latest.read_bytes())
    with zipfile.ZipFile(latest) as z: at = max(z.infolist(), key=lambda i: i.file_size).header_offset
    content[at + 300] ^= 64
    latest.write_bytes(content)
    options = OPTIONS | dict(data_dir=str(made["data"]), output_dir=str(run))
    (run/"cli_config.yaml").write_text((made["run"]/"cli_config.yaml").read_text().replace(str(made["run"]), str(run)))
    with pytest.raises(ConfigError, match="latest.ckpt cannot be read.*checksum"): launch("fire/unet", **options).fit()


# Settings in YAML

def use_settings(path: Path) -> None: compose(path, data_dir=str(MADE["data"]))


def test_random_damage_of_settings(made, tmp_path, many, ledger):
    "A damaged configuration composes, or is refused in one line; what composes is launched by the next test."
    good = tmp_path/"mine.yaml"
    good.write_text(yaml.safe_dump(compose("fire/unet", hidden_dims=[2, 4])))
    judge = Judge(use_settings)
    assert judge.try_file("good", good) == "right", judge.report()
    judge.try_all(good, (random_damage(good.read_bytes(), seed) for seed in range(2000 if many else 60)))
    tried(judge, ledger, "settings: random")


def launch_settings(path: Path) -> str | None:
    with contextlib.redirect_stdout(io.StringIO()): run = launch(path, data_dir=str(MADE["data"]), output_dir=str(path.parent/"out"), log_level="warning")
    shutil.rmtree(path.parent/"out", ignore_errors=True)
    return None if run.forecaster.network is not None else "no network"


PLACES = (("model",), ("data",), ("trainer",), ("model", "class_path"), ("model", "init_args"), ("model", "init_args", "network"), ("model", "init_args", "network", "class_path"), ("model", "init_args", "network", "init_args"), ("model", "init_args", "inputs"),
          ("model", "init_args", "loss"), ("data", "class_path"), ("data", "init_args"), ("trainer", "max_epochs"), ("base",), ("monitor",), ("name",), ("patience",), ("seed_everything",), ("unknown",), ("model", "init_args", "unknown"))
TREES = st.recursive(st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats(allow_nan=True) | st.text(max_size=6) | st.sampled_from(["geoforecast.nn.unet.UNet", "os.system", "fire/unet", "x.yaml", "2020-10-10", "1e-3"]),
                     lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=6) | st.sampled_from(["class_path", "init_args"]), x, max_size=2), max_leaves=4)


def test_any_tree_in_settings(made, tmp_path, many, ledger):
    "Hypothesis puts any value at any place of a configuration, and a launch is tried."
    judge, path, good = Judge(launch_settings), tmp_path/"mine.yaml", compose("fire/unet", **OPTIONS)

    @settings(max_examples=600 if many else 20, **QUICK)
    @given(st.sampled_from(PLACES), TREES)
    def write(place, tree):
        config = yaml.safe_load(yaml.safe_dump(good))
        node = config
        for key in place[:-1]: node = node[key]
        node[place[-1]] = tree
        path.write_text(yaml.safe_dump(config))
        judge.try_file(f"{'.'.join(place)}: {tree!r}"[:200], path)

    write()
    tried(judge, ledger, "settings: any tree at any place")


# Results of a run

def use_metrics(path: Path) -> str | None:
    rows = read_metrics(path)
    plain = [dict(zip(path.read_text().splitlines()[0].split(","), line.split(","))) for line in path.read_text().splitlines()[1:] if line]
    return None if [{k: float(v) for k, v in r.items() if v} for r in plain] == rows or "nan" in path.read_text() else "other rows"


def test_random_damage_of_metrics(made, tmp_path, many, ledger):
    good = tmp_path/"metrics.csv"
    good.write_text("epoch,step,train/total_loss,val/ap\n" + "".join(f"{i},{10*i},{1/(i + 1)},{.1*i if i % 2 else ''}\n" for i in range(6)))
    judge = Judge(use_metrics)
    assert judge.try_file("good", good) == "right", judge.report()
    judge.try_all(good, (random_damage(good.read_bytes(), seed) for seed in range(2000 if many else 100)))
    tried(judge, ledger, "metrics.csv: random")


def use_scores(folder: Path) -> None: read_scores(folder)


@pytest.mark.parametrize("name", ["scores.json", "comparison.json"])
def test_any_tree_in_scores(name, tmp_path, many, ledger):
    judge, folder = Judge(use_scores), tmp_path/"run"
    folder.mkdir()

    @settings(max_examples=600 if many else 60, **QUICK)
    @given(JSON)
    def write(tree):
        (folder/name).write_text(json.dumps(tree))
        judge.try_file(f"{tree!r}"[:200], folder)

    write()
    tried(judge, ledger, f"{name}: any tree")
