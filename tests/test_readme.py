"""The README's commands, run as they stand there, in a copy of the project, with GEOFORECAST_QUICK=1.

The copy shares this environment, so nothing is installed, and holds one notebook and one test for `make test` to run.
"""
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT/"README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
FRAME = ["Makefile", "settings.ini", "setup.py", "pyproject.toml", "requirements.lock", "README.md", "geoforecast", "nbs/core.ipynb", "tests/run.py"]


def link_environment(folder: Path):
    "Make `folder` look like a virtual environment that make has just installed: this one."
    folder.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".installed": (folder/entry.name).symlink_to(entry)
    (folder/".installed").touch()


def detections(folder: Path, days: int = 28):
    "Write the CSV of a made fire as FIRMS would: a front that moves 400 m a day to the north-east."
    random = np.random.default_rng(0)
    tables = []
    for day, date in enumerate(pd.date_range("2020-09-01", periods=days)):
        angle, radius = random.uniform(0, np.pi/2, 60), 1000 + 400*day + random.normal(0, 200, 60)
        tables.append(pd.DataFrame(dict(latitude=37.2 + radius*np.sin(angle)/111e3, longitude=-119.3 + radius*np.cos(angle)/88e3, bright_ti4=340.1,
                                        scan=.4, track=.4, acq_date=date.strftime("%Y-%m-%d"), acq_time="21:12", satellite="N", instrument="VIIRS",
                                        confidence="nominal", version="2.0NRT", bright_ti5=299.7, frp=8.4, daynight="D")))
    folder.mkdir(parents=True)
    pd.concat(tables).to_csv(folder/"fire_nrt_SV-C2_1.csv", index=False)


def copy_project(folder: Path, *more: str) -> Path:
    "Copy the frame and what else is named, with this environment and one test of its own."
    if not (Path(sys.prefix)/"bin"/"activate").exists(): pytest.skip("not in a virtual environment such as make sets up")
    for name in [*FRAME, *more]:
        source, target = ROOT/name, folder/name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir(): shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else: shutil.copy(source, target)
    (folder/"tests"/"test_one.py").write_text("def test_one(): pass\n")
    link_environment(folder/".venv")
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    "A copy in which the commands run in the README's order, with a user's CSV where the README has it."
    folder = copy_project(tmp_path_factory.mktemp("project"), "nbs/index.ipynb", "nbs/runs")
    detections(folder/"data"/"my_fire")
    return folder


def environment(project: Path, **more) -> dict:
    "Return the environment of a newcomer's shell: no checkout but this one."
    kept = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "IN_TEST")}
    return kept | {"GEOFORECAST_QUICK": "1", "PYTHONPATH": str(project), "MPLBACKEND": "agg"} | more


def run(command: str, project: Path) -> str:
    "Run a block of the README in a shell and return what it prints."
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=project, env=environment(project), stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=800)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    return done.stdout


def test_the_commands_are_the_ones_tested_here():
    assert [re.match(r"\S+ \S+", b)[0] for b in BLOCKS] == ["make demo", "make test", "source .venv/bin/activate", "geoforecast run", "geoforecast run", "geoforecast run",
                                                            "geoforecast run", "geoforecast data", "geoforecast run", "make lab"]


def test_make_demo(project):
    printed = run(BLOCKS[0], project)
    assert "persistence" in printed and "ap" in printed
    named = [Path(p) for p in re.findall(r"\S+\.png", printed)]
    assert named and all((project/p).is_file() for p in named)
    assert (project/"outputs"/"fire"/"demo"/"scores.json").is_file()


def test_make_test(tmp_path):
    assert run(BLOCKS[1], copy_project(tmp_path)).splitlines()[-1] == "1 notebooks passed, 0 failed; 1 tests passed, 0 failed, 0 skipped"


def test_your_own_fire(project):
    run(BLOCKS[2], project)
    assert (project/"data"/"my_fire.hdf5").is_file()
    assert list((project/"outputs"/"my_fire").rglob("*.tif")) and list((project/"outputs"/"my_fire").rglob("*.nc"))


def test_train_on_your_own_fire(project):
    assert "persistence" in run(f"source .venv/bin/activate\n{BLOCKS[3].strip()} -p preset=quick", project)


def test_rain(project):
    printed = run(f"source .venv/bin/activate\n{BLOCKS[4]}", project)
    assert "persistence" in printed and "RMSE" in printed and (project/"outputs"/"upstream"/"upstream"/"verdict.txt").is_file()
    simulated = next((project/"data"/"sample").glob("atmosphere_*.nc"))
    assert re.search(r"can start|ready", run(f"source .venv/bin/activate\ngeoforecast data precipitation check {simulated}", project))


def test_your_own_atmosphere_has_every_option_of_the_readme(project):
    names = re.findall(r"-p (\w+)=", BLOCKS[5])
    simulated = next((project/"data"/"sample").glob("atmosphere_*.nc"))
    box = " ".join(f"-p {k}={v}" for k, v in dict(downstream_lat_min=25, downstream_lat_max=40, downstream_lon_min=110, downstream_lon_max=125, upstream_lon_min=100, upstream_lon_max=110).items())
    assert set(re.findall(r"-p (\w+)=", box)) | {"data", "include_upstream", "others"} == set(names)
    run(f"source .venv/bin/activate\ngeoforecast run precipitation --name mine -p preset=quick -p data={simulated} -p include_upstream=true {box} -p others='[precipitation/dual_stream]'", project)
    run(f"source .venv/bin/activate\ngeoforecast forecast outputs/precipitation/mine/bundle {simulated} --out outputs/rain", project)
    assert list((project/"outputs"/"rain").rglob("predictions.nc"))


def test_land_cover(project):
    printed = run(f"source .venv/bin/activate\n{BLOCKS[6]}", project)
    assert "mIoU" in printed and (project/"outputs"/"segmentation"/"land"/"bundle").is_dir()


def test_your_own_images_have_every_option_of_the_readme(project):
    simulated = next((project/"data"/"sample").glob("landscapes_*"))
    held = sorted(p.stem for p in (simulated/"images").iterdir())[0]
    assert re.findall(r"-p (\w+)=", BLOCKS[7]) == ["data", "test", "others", "seeds"]
    block = re.sub(r"data/my_images", str(simulated), BLOCKS[7]).replace("[scene_7]", f"[{held}]").replace("-p seeds=3", "-p seeds=1 -p preset=quick").replace("mosaic.tif", str(simulated/"images"/f"{held}.png"))
    assert "points of mIoU" in run(f"source .venv/bin/activate\n{block}", project) and list((project/"outputs"/"map").rglob("classes.tif"))


def test_many_runs(project):
    assert "seed=0,1,2" in BLOCKS[8]
    printed = run(f"source .venv/bin/activate\n{BLOCKS[8].replace('seed=0,1,2', 'seed=0')}", project)
    assert "persistence" in printed and all((project/"outputs"/"fire"/"sweep"/name).is_file() for name in ("sweep.csv", "sweep.png"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_make_lab(project):
    port = free_port()
    options = f"--no-browser --ip=127.0.0.1 --port={port} --allow-root --IdentityProvider.token=t"
    shell = dict(LAB=options, JUPYTER_CONFIG_DIR=str(project/"config"), JUPYTER_DATA_DIR=str(project/"share"), JUPYTER_RUNTIME_DIR=str(project/"runtime"))
    with open(project/"lab.log", "w+") as log:
        lab = subprocess.Popen(["bash", "-c", BLOCKS[-1]], cwd=project, env=environment(project, **shell), stdout=log, stderr=log, start_new_session=True)
        try: assert "index.ipynb" in answer(f"http://127.0.0.1:{port}/api/contents/nbs?token=t", lab), log.name
        finally:
            os.killpg(lab.pid, signal.SIGTERM)
            lab.wait(30)


def answer(url: str, process: subprocess.Popen) -> str:
    "Ask a server that is starting until it answers."
    for _ in range(240):
        try: return urllib.request.urlopen(url, timeout=10).read().decode()
        except OSError: time.sleep(.5)
        if process.poll() is not None: break
    return "no answer"


def test_pictures_of_the_readme_exist():
    assert all((ROOT/p).is_file() for p in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README))
