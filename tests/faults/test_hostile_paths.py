"""Nothing is written outside of the folder that was asked for: names of runs, names in files, links, members of archives, redirected downloads, scripts for a cluster."""
import io
import json
import os
import stat
import subprocess
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import h5py
import nbformat
import numpy as np
import pytest
from hostile import detections, refusal, snapshot

from geoforecast import notebooks, sweep as sweeps
from geoforecast.cli import main
from geoforecast.fire import download
from geoforecast.fire.data import FireWindows, loaded, windows_of
from geoforecast.fire.evaluation import write_predictions
from geoforecast.fire.prediction import forecast_bundle
from geoforecast.fire.wsts import open_fire, write_fire
from geoforecast.geo.grid import Grid
from geoforecast.learn import launch as launching
from geoforecast.learn.bundle import _build, load_bundle, save_bundle
from geoforecast.learn.configuration import compose
from geoforecast.learn.launch import launch, run_folder
from geoforecast.sweep import plan_sweep, write_slurm

pytestmark = pytest.mark.filterwarnings("ignore")
GRID, DAYS = Grid("EPSG:32611", (375, 0, 269625, 0, -375, 4178250), 6, 7), np.datetime64("2020-09-01") + np.arange(8)
NAMES = ["../up", "../../../up", "/tmp/absolute", "a/b", "a\\b", "..", ".", ".hidden", "", " ", "a\nb", "a\rb", "a\0b", "\x1b[2J", "x"*300, "ü"*150, "con", "NUL.txt", "com1", "C:x", "a:b", "a*", "a?", 'a"b', "<b>", "a|b", "-p", "--debug", "end.", "end "]


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A project of its own with a notebook to run."
    root = tmp_path/"project"
    root.mkdir()
    monkeypatch.chdir(root)
    for module in (notebooks, sweeps, launching): monkeypatch.setattr(module, "project_root", lambda *_: root)
    code = nbformat.v4.new_code_cell
    notebook = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    notebook.cells = [code("name: str = 'demo'\noutput_dir: str = ''\nvalue: str = ''", metadata=dict(tags=["parameters"])), code("pass")]
    nbformat.write(notebook, root/"walk.ipynb")
    return root


@pytest.fixture
def model():
    config = compose("fire/unet", hidden_dims=[2, 4], window_size=2)
    return config, _build({"model": config["model"]}, Path("here")).eval()


# Names that are typed

@pytest.mark.parametrize("name", NAMES)
def test_a_run_has_the_name_of_one_folder(name, here, tmp_path, capsys, ledger):
    before = snapshot(tmp_path)
    refusal(lambda: run_folder("fire", name))
    typed = name or ". "
    for words in (["run", "walk.ipynb", f"--name={typed}"], ["run", "walk.ipynb", "-p", f"name={typed if typed.strip() else '..'}"], ["run", "walk.ipynb", f"--name={typed}", "--sweep", "value=a,b"]):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert snapshot(tmp_path) == before
    ledger("names of runs", 4, refused=4)


def test_a_configuration_is_not_launched_under_such_a_name(here, tmp_path, ledger):
    write_fire(here/"f.hdf5", detections(24, 26), DAYS, Grid("EPSG:32611", GRID.transform, 24, 26), "f")
    before = snapshot(tmp_path)
    for name in ("../../up", "/tmp/absolute", "..", "a\nb"):
        refusal(lambda: launch("fire/unet", name=name, data_dir=str(here/"f.hdf5"), window_size=2, crop_size=16, hidden_dims=[2, 4], val_start_date="2020-09-05", test_start_date="2020-09-07"))
    assert snapshot(tmp_path) == before
    ledger("names of launched runs", 4, refused=4)


def test_values_of_a_sweep_name_folders_within_it(here, ledger):
    values = ["../../up", "/etc/passwd", "..", "a b", "<script>", "$(touch x)", "x"*200, "=cmd()", "é", "a/../../b"]
    plans = plan_sweep("walk.ipynb", ["value=" + ",".join(f'"{v}"' for v in values)], name="s").plans
    assert len({p.folder for p in plans}) == len(values)
    for plan in plans: assert plan.folder.resolve().parent == (here/"outputs"/"walk"/"s").resolve()
    ledger("values of sweeps as folders", len(values), inside=len(values))


def test_a_script_for_a_cluster_runs_no_value(here, tmp_path, monkeypatch, ledger):
    mark = tmp_path/"executed"
    for name in (f"x\ntouch {mark}", "x\nRUNS\n"): refusal(lambda: plan_sweep("walk.ipynb", ["value=a,b"], name=name))
    plan = plan_sweep("walk.ipynb", ["value=a,b"], output_dir=str(here/f"x\ntouch {mark.name}\n"))
    refusal(lambda: write_slurm(plan, here/"s.sh"))
    refusal(lambda: write_slurm(plan_sweep("walk.ipynb", ["value=a,b"], name="s"), here/f"s.sh\ntouch {mark}"))
    payloads = [f"$(touch {mark})", f"x`touch {mark}`", f"'; touch {mark}; '", f'"; touch {mark}; "', f"& touch {mark} &", f"| touch {mark}", f"\\$(touch {mark})", "RUNS"]
    subprocess.run(["bash", "-c", f"eval echo {payloads[0]}"], check=True)
    assert mark.exists(), "unquoted, it runs"
    mark.unlink()
    monkeypatch.setattr(sweeps, "START", ("/bin/echo",))
    for payload in payloads:
        script = write_slurm(plan_sweep("walk.ipynb", [f"value={json.dumps(json.dumps(payload))[1:-1]}" if payload[0] in "'&|\"" else f"value={payload}"], name="s"), here/"s.sh")
        done = subprocess.run(["bash", str(script)], env=os.environ | dict(SLURM_ARRAY_TASK_ID="0"), capture_output=True, text=True, cwd=here)
        assert done.returncode == 0 and not mark.exists(), (payload, done.stderr)
        assert "value=" in done.stdout
    ledger("values in a script for a cluster", len(payloads) + 4, a_value=len(payloads), refused=4)


# Names in files

def test_names_of_fires_are_no_paths(tmp_path, model, ledger):
    out, names = tmp_path/"a"/"b"/"run", ("../../evil", "/tmp/evil_fire", "..", "a/../../../evil", "x"*190, "con", "a:b<c>")
    out.mkdir(parents=True)
    assert not (out/"predictions"/names[0]).resolve().is_relative_to(out), "joined as it is, the name leads out"
    paths = [write_fire(tmp_path/f"{i}.hdf5", detections(), DAYS, GRID, name) for i, name in enumerate(names)]
    fires = [loaded(open_fire(p), model[1].inputs.bands) for p in paths]
    assert [f.name for f in fires] == list(names)
    before = snapshot(tmp_path)
    dataset = FireWindows(fires, windows_of(fires, 2), 2, bands=model[1].inputs.bands)
    data = SimpleNamespace(dataset=lambda part, whole: dataset, eval_batch_size=4)
    write_predictions(SimpleNamespace(folder=out, datamodule=data, forecaster=model[1]), maps=0)
    new = set(snapshot(tmp_path)) - set(before)
    assert len(new) > len(names) and all(Path(n).is_relative_to("a/b/run") for n in new), new
    assert len({Path(n).parent for n in new if n.endswith("predictions.nc")}) == len(names)
    ledger("names of fires as folders", len(names), inside=len(names))


def test_names_of_fires_that_cannot_be_shown(tmp_path, ledger):
    names = ("a\nb", "\x1b[2J", "a\0b", "x"*1000, "\u202etxt.exe", "a\u2028b")
    for name in names:
        path = write_fire(tmp_path/"f.hdf5", detections(), DAYS, GRID, "f")
        with h5py.File(path, "r+") as f: f["data"].attrs["fire_name"] = np.bytes_(name.encode()) if "\0" in name else name
        refusal(lambda: open_fire(path), "f.hdf5", "fire_name")
    ledger("names of fires that cannot be shown", len(names), refused=len(names))


def test_forecasts_of_a_file_called_dots_stay_inside(tmp_path, model, ledger):
    bundle = load_bundle(save_bundle(tmp_path/"bundle", model[1], model[0], dict(task="fire", window_size=2)))
    path = write_fire(tmp_path/"data"/"f.hdf5", detections(), DAYS, GRID, "f").rename(tmp_path/"data"/"...hdf5")
    assert path.stem == ".."
    forecast_bundle(bundle, path, tmp_path/"a"/"out")
    assert [p.name for p in (tmp_path/"a").iterdir()] == ["out"] and list((tmp_path/"a"/"out").rglob("predictions.nc"))
    ledger("files called dots", 1, inside=1)


# Links

def test_a_run_does_not_write_through_links(here, tmp_path, capsys, ledger):
    victim = tmp_path/"victim"
    victim.mkdir()
    (victim/"kept").write_text("kept")
    folder, tried = here/"outputs"/"walk"/"x", 0
    for link, target in {"checkpoints": victim, "bundle": victim, "figures": victim, ".lock": victim/"kept", "training.log": victim/"kept", "run.ipynb": victim/"kept", "latest": Path("../../../../victim")}.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder/link).symlink_to(target)
        assert main(["run", "walk.ipynb", "--name", "x"]) == 2
        assert "is a link" in capsys.readouterr().err
        refusal(lambda: launching.check_links(folder), link, "is a link")
        (folder/link).unlink()
        tried += 1
    assert snapshot(victim) == {"kept": b"kept"}
    ledger("links that lead out of a run", tried, refused=tried)


def test_a_training_does_not_write_through_links(here, tmp_path, ledger):
    (tmp_path/"victim").mkdir()
    write_fire(here/"f.hdf5", detections(24, 26), DAYS, Grid("EPSG:32611", GRID.transform, 24, 26), "f")
    folder = here/"outputs"/"fire"/"run"
    folder.mkdir(parents=True)
    (folder/"checkpoints").symlink_to(tmp_path/"victim")
    refusal(lambda: launch("fire/unet", data_dir=str(here/"f.hdf5"), window_size=2, crop_size=16, hidden_dims=[2, 4], val_start_date="2020-09-05", test_start_date="2020-09-07"), "checkpoints", "is a link")
    assert not list((tmp_path/"victim").iterdir()) and not (folder/"cli_config.yaml").exists()
    ledger("links that lead out of a training", 1, refused=1)


# Archives and downloads

def archive(members: dict, links=()) -> zipfile.ZipFile:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            if name in links: info.external_attr = (stat.S_IFLNK | 0o777) << 16
            z.writestr(info, content)
    return zipfile.ZipFile(file)


def test_members_of_an_archive_stay_inside(tmp_path, ledger):
    good, link = "2020/fire_1/2020-09-01.tif", "x/2020/fire_2/2020-09-02.tif"
    hostile = ["../../2020/../evil.tif", "/etc/2020/../evil.tif", "2020/../../2020-09-01.tif", "2020/fire/../2020-09-01.tif", "2020\\..\\..\\evil.tif", "2020/fire_1/../../../2020-09-01.tif", "2020/fi\nre/2020-09-01.tif", "2020/.ssh/2020-09-01.tif", "2020/fire_1/2020-09-01.tif/../../x.tif"]
    climbing = "../../../2020/fire_3/2020-09-03.tif"
    z = archive({good: b"a", link: str(tmp_path/"victim").encode(), climbing: b"c"} | dict.fromkeys(hostile, b"evil"), links=[link])
    assert not (tmp_path/"out"/climbing).resolve().is_relative_to(tmp_path/"out"), "joined as it is, the member leads out"
    table = download.contents(z)
    assert set(table.member) == {good, link, climbing}
    for (year, fire), images in table.groupby(["year", "fire"]): download._fetch_fire(z, tmp_path/"out"/str(year)/fire, images)
    assert set(snapshot(tmp_path)) == {f"out/2020/fire_{i}/2020-09-0{i}.tif" for i in (1, 2, 3)}
    assert not [p for p in tmp_path.rglob("*") if p.is_symlink()]
    ledger("members of an archive", len(hostile) + 3, not_taken=len(hostile), inside=3)


def test_members_that_are_larger_than_they_say(tmp_path, ledger):
    name = "2020/fire_1/2020-09-01.tif"
    z = archive({name: bytes(50_000_000)})
    z.getinfo(name).file_size = 1000
    refusal(lambda: download.fetch(z, z.getinfo(name), tmp_path/"x.tif"), name, "damaged")
    assert not list(tmp_path.iterdir())
    refusal(lambda: download.check_space(tmp_path, 10**18), "needed")
    ledger("members larger than they say", 2, refused=2)


def test_a_download_is_not_redirected_to_files(tmp_path, ledger):
    secret = tmp_path/"secret"
    secret.write_bytes(b"secret"*1000)
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", self.path[1:])
            self.end_headers()
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    targets = [f"file://{secret}", "ftp://127.0.0.1:9/x", "data:text/plain,x", "gopher://127.0.0.1:9/"]
    try:
        for target in targets:
            with pytest.MonkeyPatch.context() as m:
                m.setattr(download, "TRIES", 1)
                assert "secret" * 3 not in refusal(lambda: download.open_archive(f"http://127.0.0.1:{server.server_port}/{target}"))
    finally: server.shutdown(); server.server_close()
    for url in (f"file://{secret}", str(secret), "ftp://127.0.0.1/x", "jar:file:///x!/y"): refusal(lambda: download.RemoteFile(url))
    ledger("redirected downloads", len(targets) + 4, refused=len(targets) + 4)
