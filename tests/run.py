"""Run notebooks and tests, name each as it ends, and close with one line of counts.

    python tests/run.py                             everything
    python tests/run.py nbs/fire nbs/core.ipynb     these notebooks
    python tests/run.py tests/test_frame.py         these tests

Notebooks and files of tests run two at a time, each in a process of its own. Those of nbs/runs go through papermill with preset=quick
into a temporary output_dir. GEOFORECAST_QUICK=1 is set for whatever starts a run. Exit status 0 only if nothing failed.
On Linux a notebook's process is a copy of one that has imported torch and its like and done nothing else, which saves each of them seconds.
"""
import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
PROCESSES.set_forkserver_preload(["nbdev.showdoc", "lightning.pytorch", "matplotlib.pyplot", "pandas", "pyproj", "xarray"])
TIMEOUT = 1200  # seconds a notebook


def prepare(workers: int):
    "Set what a test process inherits: this checkout's package, quick runs, its share of the cores."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ |= {"GEOFORECAST_QUICK": "1", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1)//workers)), "PYTHONPATH": path}


def find_notebooks(path: Path) -> list[Path]:
    "List the notebooks at or below `path` as nbdev does, those that run a training first, since they take longest."
    from nbdev.doclinks import nbglob
    found = [path] if path.is_file() else [Path(p).resolve() for p in nbglob(path)]
    return sorted(found, key=lambda p: (p.parent.name != "runs", p))


def work(path: Path, folder: str):
    "Run a notebook in this process, leaving what it writes and makes in `folder`, and end with its status."
    with open(os.devnull) as nothing, open(f"{folder}/log", "w") as log:
        for stream, file in ((0, nothing), (1, log), (2, log)): os.dup2(file.fileno(), stream)
    if path.parent.name == "runs":
        options = {"preset": "quick", "output_dir": f"{folder}/run"}
        os.execv(sys.executable, [sys.executable, "-m", "papermill", str(path), f"{folder}/out.ipynb", "--no-progress-bar", *(w for o in options.items() for w in ("-p", *o))])
    multiprocessing.set_start_method(None, force=True)  # A process of one's own starts others as its user's would
    from nbdev.test import test_nb
    sys.exit(not test_nb(path)[0])


def run_notebook(path: Path) -> tuple[Path, bool, float, str]:
    "Run one notebook in a fresh process and return it with success, seconds and what it wrote."
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        process = PROCESSES.Process(target=work, args=(path, folder))
        process.start()
        process.join(TIMEOUT)
        late = process.is_alive()
        process.kill()
        process.join()
        log = Path(folder)/"log"
        text = log.read_text(errors="replace") if log.exists() else ""
    return path, process.exitcode == 0, time.monotonic() - start, f"{text}\nstopped after {TIMEOUT} s" if late else text


def run_notebooks(paths: list[Path], workers: int) -> tuple[int, int]:
    "Run notebooks in parallel, print each with its time as it ends, and return how many passed and failed."
    failed = 0
    with ThreadPoolExecutor(workers) as pool:
        for job in as_completed([pool.submit(run_notebook, p) for p in paths]):
            path, ok, seconds, text = job.result()
            failed += not ok
            print(f"{'passed' if ok else 'FAILED'} {seconds:6.1f} s  {path.relative_to(ROOT)}", flush=True)
            if not ok: print(text, flush=True)
    return len(paths) - failed, failed


def run_tests(paths: list[Path], workers: int) -> tuple[int, int, int]:
    "Run pytest, the files in parallel, and return how many tests passed, failed and were skipped."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder)/"report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", "-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder", "--durations=15", *map(str, paths)]
        status = subprocess.run(command, cwd=ROOT).returncode
        if not report.exists(): return 0, 1, 0
        suite = ElementTree.parse(report).getroot().find("testsuite")
    total, failures, errors, skipped = (int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors
    return total - failed - skipped, failed or int(status != 0), skipped


def main() -> int:
    "Run what the command line names and return the exit status."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks, folders of notebooks, test files; all by default")
    parser.add_argument("--workers", type=int, default=2, help="notebooks or files of tests at a time")
    args = parser.parse_args()
    for path in args.paths:
        if not path.exists(): parser.error(f"{path} does not exist")
    paths = [p.resolve() for p in args.paths] or [ROOT/"nbs", ROOT/"tests"]
    tests = [p for p in paths if p.suffix == ".py" or p.name == "tests"]
    notebooks = [n for p in paths if p not in tests for n in find_notebooks(p)]
    prepare(args.workers)
    good, bad = run_notebooks(notebooks, args.workers)
    passed, failed, skipped = run_tests(tests, args.workers) if tests else (0, 0, 0)
    print(f"{good} notebooks passed, {bad} failed; {passed} tests passed, {failed} failed, {skipped} skipped")
    return int(bool(bad or failed))


if __name__ == "__main__": sys.exit(main())
