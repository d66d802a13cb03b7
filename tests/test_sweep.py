"""Sweeps and runs as processes: killed, interrupted, failing, in parallel, on a Dask cluster, as a SLURM script."""
import csv
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from geoforecast import notebooks, sweep as sweeps
from geoforecast.cli import main
from geoforecast.core import ConfigError
from geoforecast.notebooks import report_of
from geoforecast.sweep import plan_sweep, split_values
from geoforecast.sweep_scores import gather, read_results

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
COMMAND = [sys.executable, "-c", "import sys; from geoforecast.cli import main; sys.exit(main())"]
PARAMETERS = 'name: str = "demo"\noutput_dir: str = ""\nrate: float = .1  # of each step\nwidths: list = [8]\nseed: int = 0'
SCORES = """import json, os
from pathlib import Path
folder = Path(output_dir)
with open(folder/'times', 'a') as f: f.write('x')
(folder/'pid').write_text(str(os.getpid()))
print('walking', flush=True)"""
END = """ap = .5 + rate + .01*seed
rows = [dict(model='persistence', split='test', ap=.3, n=6), dict(model='walker', split='test', ap=ap, ap_lo=ap - .1, ap_hi=ap + .1, n=6)]
(folder/'scores.json').write_text(json.dumps(rows))"""


def write_notebook(path: Path, middle: str = "") -> Path:
    "A notebook that counts its executions, does what it is told in the middle, and scores what follows from its parameters."
    notebook = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    notebook.cells = [text("# A walk\n> Nowhere."), code(PARAMETERS, metadata=dict(tags=["parameters"])), text("## Walking"), code(f"{SCORES}\n{middle}"), text("## Scores"), code(END)]
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for module in (notebooks, sweeps): monkeypatch.setattr(module, "project_root", lambda *_: tmp_path)
    write_notebook(tmp_path/"walk.ipynb")
    return tmp_path


def start(*words: str, **options) -> subprocess.Popen:
    "Type a command in a process of its own that hears interrupts."
    return subprocess.Popen([*COMMAND, *words], env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **options)


def wait_for(condition, seconds: float = 90):
    "Wait until something holds; the bound is for a machine that hangs."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(.1)


def times(folder: Path) -> int: return len((folder/"times").read_text()) if (folder/"times").exists() else 0
def alive(pid: int) -> bool: return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# --- What is typed

@pytest.mark.parametrize("words, message", [
    (["--sweep", "rat=1,2"], "parameter 'rat' does not exist in walk.ipynb; did you mean 'rate'?"),
    (["--sweep", "rate"], "'rate' has no values"),
    (["--sweep", "rate=.1,,.2"], "'rate=.1,,.2' has an empty value"),
    (["--sweep", "widths=[8"], "cannot be read as a value"),
    (["--sweep", "rate=.1", "--sweep", "rate=.2"], "parameter 'rate' is set twice"),
    (["--sweep", "rate=.1,.2", "-p", "rate=.3"], "parameter 'rate' is set twice"),
    (["--sweep", "rate=.1,.2", "-p", "sed=3"], "did you mean 'seed'?"),
    (["--sweep", "name=a,b"], "name cannot be swept"),
    (["--sweep", "rate=.1,.2", "--jobs", "0"], "'0' is not a whole number from 1 on"),
    (["--sweep", "rate=.1,.2", "--score", "app"], "score 'app' does not exist; did you mean 'ap'?"),
    (["--sweep", "rate=.1,.2", "--scheduler", "tcp://127.0.0.1:1", "--jobs", "2"], "--scheduler and --jobs exclude each other"),
    (["--sweep", "rate=.1,.2", "--slurm", "a.sh", "--jobs", "2"], "--slurm and --jobs exclude each other"),
    (["--jobs", "2"], "--jobs goes with --sweep"),
    (["--slurm", "a.sh"], "--slurm goes with --sweep"),
    (["--swep", "rate=1"], "did you mean '--sweep'?")], ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_what_does_not_fit_is_refused_before_anything_starts(words, message, here, capsys):
    assert main(["run", "walk.ipynb", *words]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and len(shown.err.splitlines()) == 1 and [p.name for p in here.iterdir()] == ["walk.ipynb"]


def test_a_scheduler_that_does_not_answer_is_named(here, capsys, monkeypatch):
    distributed = pytest.importorskip("distributed")
    client = distributed.Client
    monkeypatch.setattr(distributed, "Client", lambda address, timeout: client(address, timeout=1))
    assert main(["run", "walk.ipynb", "--sweep", "rate=.1,.2", "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "error: no Dask scheduler answers at tcp://127.0.0.1:9" in capsys.readouterr().err


def test_dask_that_is_missing_is_named_with_its_extra(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["run", "walk.ipynb", "--sweep", "rate=.1,.2", "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "geoforecast[cluster]" in capsys.readouterr().err


def test_a_notebook_without_a_folder_of_its_own_is_not_swept(here, capsys):
    text = (here/"walk.ipynb").read_text()
    (here/"walk.ipynb").write_text(text.replace('output_dir: str = \\"\\"\\n', ""))
    assert main(["run", "walk.ipynb", "--sweep", "rate=.1,.2"]) == 2
    assert "has no parameter output_dir" in capsys.readouterr().err


def test_every_combination_has_its_values_and_a_folder(here):
    swept = plan_sweep("walk.ipynb", ["widths=[8, 16],[8]", "rate=1e-3,.1", "seed=0,1"], ["name=wide"])
    assert [tuple(p.values[k] for k in swept.swept) for p in swept.plans] == [(w, r, s) for w in ([8, 16], [8]) for r in (.001, .1) for s in (0, 1)]
    folders = [p.folder.relative_to(here/"outputs"/"walk"/"wide").name for p in swept.plans]
    assert folders[0] == "widths=8_16,rate=0.001,seed=0" and len(set(folders)) == 8 and not any(re.search(r"[^\w.,=+-]", f) for f in folders)
    assert all(p.values["output_dir"] == str(p.folder) and p.values["name"] == p.name for p in swept.plans)


def test_names_of_folders_are_never_the_same_nor_too_long(here):
    many = ",".join(str(i) for i in range(200))
    swept = plan_sweep("walk.ipynb", [f"widths=[{many}],[{many},8],[1,2],[1.2]"])
    names = [p.name for p in swept.plans]
    assert len(set(names)) == 4 and max(map(len, names)) < 130
    assert split_values('a,"b,c"') == ["a", "b,c"]


def test_the_sweep_that_the_help_shows_is_planned_for_each_task():
    for task, count in (("fire", 6), ("precipitation", 6), ("segmentation", 6), ("upstream", 6)):
        swept = plan_sweep(task, ["learning_rate=1e-3,3e-3", "seed=0,1,2"])
        assert len(swept.plans) == count and swept.folder == ROOT/"outputs"/task/"sweep" and swept.plans[0].words[:2] == ["run", task]


# --- What comes of it

def test_a_sweep_ends_in_a_table_a_plot_and_files(here, capsys):
    assert main("run walk.ipynb --sweep rate=.1,.2 seed=0,1 --jobs 2 --name first".split()) == 0
    shown, folder = capsys.readouterr(), here/"outputs"/"walk"/"first"
    assert shown.err == "" and "sweep outputs/walk/first: 4 runs, 0 done before" in shown.out and shown.out.count(": done, ") == 4
    found, rows = read_results(folder), list(csv.DictReader(open(folder/"sweep.csv")))
    assert [(float(r["rate"]), int(r["seed"]), round(float(r["ap"]), 6), r["status"]) for r in rows] == [(.1, 0, .6, "done"), (.1, 1, .61, "done"), (.2, 0, .7, "done"), (.2, 1, .71, "done")]
    assert found.over_seeds()[["rate", "mean ap", "spread", "seeds"]].values.tolist() == [["0.1", .605, .007, 2], ["0.2", .705, .007, 2]]
    assert [r["model"] for r in found.baselines] == ["persistence"] and str(found) in shown.out and "<b>0.710 [0.610, 0.810]</b>" in found._repr_html_()
    assert (folder/"sweep.png").stat().st_size > 10_000
    assert "[1/4]" in (folder/"sweep.log").read_text()
    ax = found.draw()
    assert [line.get_label() for line in ax.lines if not line.get_label().startswith("_")] == ["walker", "persistence"] and ax.lines[0].get_ydata() == pytest.approx([.605, .705])
    assert "average precision" in ax.get_ylabel() and ax.get_xlabel() == "rate" and "4 runs" in ax.get_title()


@pytest.mark.parametrize("deaths", (1, 3))
def test_a_notebook_whose_process_dies_at_its_start_is_started_again(deaths, here, monkeypatch, capsys):
    kernel = here/"kernels"/"shy"
    kernel.mkdir(parents=True)
    code = f"import os, sys, runpy; d = {str(here/'deaths')!r}; n = os.path.getsize(d) if os.path.exists(d) else 0; open(d, 'a').write('x'); n < {deaths} and sys.exit(1); runpy.run_module('ipykernel_launcher', run_name='__main__')"
    (kernel/"kernel.json").write_text(json.dumps(dict(argv=[sys.executable, "-c", code, "-f", "{connection_file}"], display_name="shy", language="python")))
    monkeypatch.setenv("JUPYTER_PATH", str(here))
    (here/"walk.ipynb").write_text((here/"walk.ipynb").read_text().replace('"name": "python3"', '"name": "shy"'))
    status, err = main("run walk.ipynb --output_dir out".split()), capsys.readouterr().err
    assert status == (deaths == 3)
    if deaths == 3: assert "error: walk.ipynb: the notebook's process cannot be started (Kernel died before replying to kernel_info); `python -m ipykernel_launcher` may show why\n" in err and not (here/"out"/"times").exists()
    else: assert times(here/"out") == 1 and report_of(here/"out")["status"] == "done"


def test_what_is_done_is_not_done_again_and_a_seed_more_is(here, capsys):
    words = "run walk.ipynb --output_dir out --sweep rate=.1 seed=0".split()
    assert main(words) == 0
    before = (here/"out"/"rate=0.1,seed=0"/"run.ipynb").stat().st_mtime_ns
    words[-1] = "seed=0,1"
    assert main(words) == 0
    assert "2 runs, 1 done before" in capsys.readouterr().out
    assert (here/"out"/"rate=0.1,seed=0"/"run.ipynb").stat().st_mtime_ns == before and [times(here/"out"/f"rate=0.1,seed={s}") for s in (0, 1)] == [1, 1]
    write_notebook(here/"walk.ipynb", "steps = 3")
    assert main([*words[:-1], "seed=0"]) == 0 and times(here/"out"/"rate=0.1,seed=0") == 2, "an edited notebook is another run"


def test_one_run_that_fails_does_not_stop_the_others(here, capsys):
    write_notebook(here/"walk.ipynb", "assert seed != 1 or Path('mended').exists(), 'too | dry'")
    words = "run walk.ipynb --output_dir out --sweep rate=.1 seed=0,1,2".split()
    assert main(words) == 1
    shown = capsys.readouterr()
    assert "rate=0.1,seed=1: failed, walk.ipynb, cell [3] failed: AssertionError: too | dry" in shown.out
    assert "1 of 3 runs are not done; the same command goes on" in shown.err and [r["status"] for r in read_results("out").runs] == ["done", "failed", "done"]
    assert "failed" in str(read_results("out")) and (here/"out"/"sweep.png").exists()
    (here/"mended").touch()
    assert main(words) == 0
    assert [times(here/"out"/f"rate=0.1,seed={s}") for s in range(3)] == [1, 2, 1] and [r["status"] for r in read_results("out").runs] == ["done"]*3


def test_runs_are_in_parallel_and_share_the_cores(here):
    "Each run waits for a sign of the other: one after the other they would never end."
    write_notebook(here/"walk.ipynb", """import time
Path(f'here{seed}').write_text(os.environ['OMP_NUM_THREADS'])
for _ in range(600):
    if Path(f'here{1 - seed}').exists(): break
    time.sleep(.1)
else: raise TimeoutError""")
    assert main("run walk.ipynb --output_dir out --sweep seed=0,1 --jobs 2".split()) == 0
    assert {(here/f"here{s}").read_text() for s in (0, 1)} == {str(max(1, sweeps.cores()//2))}


def test_a_baseline_that_differs_between_runs_has_a_row_a_run(here):
    write_notebook(here/"walk.ipynb")
    text = (here/"walk.ipynb").read_text()
    (here/"walk.ipynb").write_text(text.replace("split='test', ap=.3", "split='test', ap=.3 + rate"))
    assert main("run walk.ipynb --output_dir out --sweep rate=.1,.2".split()) == 0
    assert [(r["rate"], round(r["ap"], 3)) for r in read_results("out").baselines] == [(.1, .4), (.2, .5)]


# --- Killed and interrupted

WAITING = "import time\nwhile seed and not Path('go').exists(): time.sleep(.05)"

def test_a_killed_sweep_goes_on_where_it_was(here):
    "SIGKILL in the middle: what it had started ends by itself, and the same command does the rest."
    write_notebook(here/"walk.ipynb", WAITING)
    words, runs = "run walk.ipynb --output_dir out --sweep rate=.1 seed=0,1,2 --jobs 1".split(), [here/"out"/f"rate=0.1,seed={s}" for s in range(3)]
    process = start(*words)
    wait_for(lambda: (runs[1]/"pid").exists() and (runs[1]/"pid").read_text())
    kernel, done = int((runs[1]/"pid").read_text()), (runs[0]/"run.ipynb").stat().st_mtime_ns
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    (here/"go").touch()
    again = start(*words)
    shown, _ = again.communicate(timeout=180)
    assert again.returncode == 0, shown
    assert "3 runs, 1 done before" in shown or "3 runs, 2 done before" in shown
    assert (runs[0]/"run.ipynb").stat().st_mtime_ns == done and times(runs[0]) == 1 and times(runs[2]) == 1
    assert [r["status"] for r in read_results("out").runs] == ["done"]*3
    wait_for(lambda: not alive(kernel) and not any(alive(c.pid) for c in children))


def test_a_killed_sweep_takes_its_runs_with_it(here):
    write_notebook(here/"walk.ipynb", WAITING)
    process, run = start(*"run walk.ipynb --output_dir out --sweep seed=1,2 --jobs 2".split()), here/"out"/"seed=1"
    wait_for(lambda: (run/"pid").exists() and (run/"pid").read_text())
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    wait_for(lambda: not any(alive(c.pid) for c in children))
    assert report_of(run)["status"] == "was interrupted" and "The same command goes on" in (run/"run.ipynb").read_text()


def test_ctrl_c_stops_the_runs_and_says_how_to_go_on(here):
    write_notebook(here/"walk.ipynb", WAITING)
    process, runs = start(*"run walk.ipynb --output_dir out --sweep seed=1,2,3 --jobs 2".split()), [here/"out"/f"seed={s}" for s in (1, 2, 3)]
    wait_for(lambda: all((r/"pid").exists() and (r/"pid").read_text() for r in runs[:2]))
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    shown, _ = process.communicate(timeout=90)
    assert process.returncode == 130 and "the same command goes on" in shown and "Traceback" not in shown, shown
    assert not any(alive(c.pid) for c in children), "nothing is left running"
    assert [report_of(r).get("status") for r in runs] == ["was interrupted", "was interrupted", None]


def test_two_processes_in_one_folder_are_refused(here):
    write_notebook(here/"walk.ipynb", WAITING)
    first = start(*"run walk.ipynb --output_dir out -p seed=1".split())
    wait_for(lambda: (here/"out"/"pid").exists())
    second = start(*"run walk.ipynb --output_dir out -p seed=0".split())
    shown, _ = second.communicate(timeout=60)
    assert second.returncode == 2 and "error: run out is in use by another process" in shown
    (here/"go").touch()
    shown, _ = first.communicate(timeout=60)
    assert first.returncode == 0 and times(here/"out") == 1, shown


# --- A single run's page and log

def test_the_page_of_a_run_says_what_was_run(here, capsys):
    assert main(["run", "walk.ipynb", "--output_dir", "out", "--name", "first", "-p", "rate=.2", "-p", "seed=0"]) == 0
    page = nbformat.read("out/run.ipynb", 4)
    nbformat.validate(page)
    assert page.cells[0].source == "# A walk: first\n> Nowhere."
    assert "| `rate` | `0.2` | `0.1` | of each step |" in page.cells[1].source and "`seed`" not in page.cells[1].source and "Done 20" in page.cells[1].source
    folded = [c for c in page.cells if c.metadata.get("jupyter", {}).get("source_hidden")]
    assert [c.metadata.tags for c in folded] == [["parameters"], ["injected-parameters"]]
    shown = capsys.readouterr().out
    assert re.search(r"^\[1/2\] Walking, 0:00:\d\d$", shown, re.M) and "[2/2] Scores" in shown and "\x1b" not in shown


def test_the_page_of_a_failed_run_begins_with_what_failed_and_the_command_works(here, capsys):
    write_notebook(here/"walk.ipynb", "assert (folder.parent/'mended').exists(), '<b>too dry</b>'")
    assert main(["run", "walk.ipynb", "--output_dir", "out", "-p", "rate=.2"]) == 1
    command, page = capsys.readouterr().err.splitlines()[-1], nbformat.read("out/run.ipynb", 4)
    assert "This run failed" in page.cells[0].source and "<b>" not in page.cells[0].source and "<b>too dry" in html.unescape(page.cells[0].source)
    assert command in page.cells[0].source and "Walking" in page.cells[0].source
    assert '<span id="papermill-error-cell"' in "".join(c.source for c in page.cells) and page.cells[1].source.startswith("# A walk")
    (here/"mended").touch()
    elsewhere = here/"elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(f"cd {elsewhere} && {subprocess.list2cmdline(COMMAND)} {command.removeprefix('geoforecast ')}", shell=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and report_of(here/"out")["status"] == "done" and times(here/"out") == 2, done.stderr
    log = (here/"out"/"training.log").read_text()
    assert log.count("=== geoforecast run") == 2 and log.count("walking") == 2 and "error: walk.ipynb, cell [3] failed" in log


def test_a_run_that_was_killed_leaves_a_page_that_says_so(here):
    write_notebook(here/"walk.ipynb", WAITING)
    process = start(*"run walk.ipynb --output_dir out -p seed=1".split())
    wait_for(lambda: (here/"out"/"pid").exists())
    process.kill()
    process.communicate()
    assert report_of("out")["status"] == "running" and "the run was stopped; this command goes on with it" in nbformat.read("out/run.ipynb", 4).cells[1].source


def test_once_does_nothing_twice_and_half_a_page_is_not_done(here, capsys):
    words = "run walk.ipynb --output_dir out --once".split()
    assert main(words) == 0 and main(words) == 0 and times(here/"out") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "run out: done before"
    assert main([*words, "-p", "seed=1"]) == 0 and times(here/"out") == 2
    page = here/"out"/"run.ipynb"
    page.write_text(page.read_text()[:400])
    assert main([*words, "-p", "seed=1"]) == 0 and times(here/"out") == 3


def test_an_epoch_stands_once_in_the_log(here):
    from geoforecast.fire.simulate import simulate_fires
    simulate_fires(here/"fires", n=3, years=[2020], seed=7, shape=(9, 48, 48))
    write_notebook(here/"walk.ipynb", """from geoforecast.learn.launch import launch
launch('fire/logistic', data_dir='fires', output_dir=output_dir, max_epochs=2, samples_per_epoch=8, batch_size=4, crop_size=32).fit()""")
    assert main(["run", "walk.ipynb", "--output_dir", "out"]) == 0
    log = (here/"out"/"training.log").read_text()
    assert [log.count(words) for words in ("epoch 1/2", "epoch 2/2", "walking")] == [1, 1, 1]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in log.splitlines())


# --- Elsewhere

@pytest.fixture
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, env={"PYTHONPATH": str(ROOT)}) as made: yield made


def test_the_same_sweep_on_a_dask_cluster(here, cluster, capsys):
    write_notebook(here/"walk.ipynb", "assert seed != 2 or Path('mended').exists(), 'too dry'")
    words = ["run", "walk.ipynb", "--output_dir", "out", "--sweep", "rate=.1,.2", "seed=0,2", "--scheduler", cluster.scheduler_address]
    assert main(words) == 1
    assert "seed=2: failed, walk.ipynb, cell [3] failed: AssertionError: too dry" in capsys.readouterr().out
    (here/"mended").touch()
    assert main(words) == 0
    assert "4 runs, 2 done before" in capsys.readouterr().out
    assert [round(r["test"]["ap"], 3) for r in read_results("out").runs] == [.6, .62, .7, .72] and [times(here/"out"/f"rate=0.1,seed={s}") for s in (0, 2)] == [1, 2]


def test_a_worker_that_dies_leaves_its_run_to_another(here, cluster):
    write_notebook(here/"walk.ipynb", f"(folder/'worker').write_text(str(os.getppid()))\n{WAITING}")
    process, run = start(*"run walk.ipynb --output_dir out --sweep seed=1 --scheduler".split(), cluster.scheduler_address), here/"out"/"seed=1"
    wait_for(lambda: (run/"worker").exists() and (run/"worker").read_text())
    kernel = int((run/"pid").read_text())
    psutil.Process(int((run/"worker").read_text())).parent().kill()
    wait_for(lambda: not alive(kernel))
    (here/"go").touch()
    shown, _ = process.communicate(timeout=180)
    assert process.returncode == 0 and times(run) == 2 and read_results("out").runs[0]["status"] == "done", shown


def test_ctrl_c_stops_the_runs_on_the_cluster(here, cluster):
    write_notebook(here/"walk.ipynb", WAITING)
    process, run = start(*"run walk.ipynb --output_dir out --sweep seed=1,2,3 --scheduler".split(), cluster.scheduler_address), here/"out"/"seed=1"
    wait_for(lambda: (run/"pid").exists() and (run/"pid").read_text())
    kernel = int((run/"pid").read_text())
    os.kill(process.pid, signal.SIGINT)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in shown, shown
    wait_for(lambda: not alive(kernel))
    assert report_of(run)["status"] == "was interrupted"


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_a_slurm_script_runs_one_combination_a_task(here, capsys):
    folder = here/"my run's"
    folder.mkdir()
    words = ["run", "walk.ipynb", "--output_dir", str(folder), "-p", "widths=[8, 16]", "--sweep", "rate=.1,.2", "seed=0,1"]
    assert main([*words, "--slurm", "walk.sh"]) == 0
    text = (here/"walk.sh").read_text()
    assert subprocess.run(["bash", "-n", "walk.sh"]).returncode == 0 and not list(folder.glob("rate*"))
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash" and "#SBATCH --array=0-3" in lines and "#SBATCH --requeue" in lines
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "sbatch reads no directive below the first command"
    def task(n): return subprocess.run(["bash", here/"walk.sh"], cwd="/", env=ENVIRONMENT | {"SLURM_ARRAY_TASK_ID": str(n), "SLURM_CPUS_PER_TASK": "1"}, capture_output=True, text=True)
    done = task(1)
    assert done.returncode == 0 and [p.name for p in folder.glob("rate*")] == ["rate=0.1,seed=1"], done.stderr
    assert report_of(folder/"rate=0.1,seed=1")["parameters"]["widths"] == [8, 16]
    assert task(1).returncode == 0 and times(folder/"rate=0.1,seed=1") == 1, "a requeued job whose run is done ends at once"
    assert task(4).returncode == 2
    capsys.readouterr()
    assert main(words) == 0
    assert "4 runs, 1 done before" in capsys.readouterr().out and times(folder/"rate=0.1,seed=1") == 1
    command = next(line.removeprefix("#   ") for line in lines if line.startswith("#   cd "))
    done = subprocess.run(command.replace("geoforecast", subprocess.list2cmdline(COMMAND), 1), shell=True, cwd="/", env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "4 runs, 4 done before" in done.stdout, done.stderr


def test_data_that_several_processes_need_are_made_by_one(tmp_path):
    code = """import sys, time
from geoforecast.core import made_once
with made_once(sys.argv[1]) as new:
    if new:
        new.mkdir()
        time.sleep(1)
        (new/'made').write_text('x')
        print('made')
assert open(sys.argv[1] + '/made').read() == 'x'"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path/"fires")], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [p.communicate(timeout=60)[0] for p in processes]
    assert sorted(said) == ["", "", "made\n"] and [p.returncode for p in processes] == [0]*3


def test_an_experiment_is_read_by_its_first_model(tmp_path):
    from geoforecast.sweep_scores import read_scores
    (tmp_path/"comparison.json").write_text(json.dumps(dict(names=["with upstream", "without"], scores=[{"score": "rmse", "with upstream": 1.2, "without": 1.4}])))
    network, _, baselines = read_scores(tmp_path)
    assert (network["model"], network["rmse"], baselines[0]["rmse"]) == ("with upstream", 1.2, 1.4)
