"Outputs are whole or absent: whoever writes one may be killed at any moment, and a reader sees the old one or the new one."
import ast
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hostile import in_child
from writers import FORECASTS, OUTPUTS, read_run, write_and_die

import geoforecast
from geoforecast.core import atomic_path
from geoforecast.learn.bundle import Bundle

posix = pytest.mark.skipif(os.name != "posix", reason="kills processes by POSIX signals")


def writers_left(folder):
    "The processes whose temporary files and folders, one within another, lie in a folder."
    return {p.name.rsplit("-", 2)[1] for p in folder.rglob(".*.tmp")}


@posix
@pytest.mark.parametrize("name", [name for name in OUTPUTS if name != "run"])
def test_a_killed_writer_leaves_the_old_or_the_new(name, tmp_path, many, ledger):
    output, folder = OUTPUTS[name], tmp_path/"out"
    path, trials, ended = folder/name, 100 if many else 5, dict(old=0, new=0)
    events, seconds = write_and_die(name, tmp_path/"dry"/name, 1)
    old, new = (write_and_die(name, p, v) and output.read(p) for v, p in ((0, path), (1, tmp_path/"new"/name)))
    assert old != new and events >= 4
    rng = np.random.default_rng(0)
    for i in range(trials):
        event, moment = (int(rng.integers(1, events + 1)), 0.) if i % 2 == 0 else (0, float(rng.uniform(0, seconds)) + 1e-6)
        write_and_die(name, path, 1, event, moment)
        found = output.read(path)
        assert found in (old, new), f"killed at event {event} or after {moment} s: neither the old nor the new"
        assert len(writers_left(folder)) <= 1, "what killed writers leave behind must not pile up"
        ended["new" if found == new else "old"] += 1
        if found == new: write_and_die(name, path, 0)
    write_and_die(name, path, 1)
    assert output.read(path) == new and [p.name for p in folder.iterdir()] == [name]
    ledger(f"killed while writing {name}", trials, **ended)


@posix
def test_each_file_of_a_killed_run_is_whole(tmp_path, many, ledger):
    "Scores, bundle, metadata and card are written one after the other; each is that of the old run or that of the new one."
    run, trials, rng = tmp_path/"out"/"run", 100 if many else 5, np.random.default_rng(1)
    events, _ = write_and_die("run", run, 0)
    for event in rng.integers(1, events + 1, trials):
        write_and_die("run", run, 1, int(event))
        found = read_run(run)
        assert set(found) <= {0, 1} and found == sorted(found, reverse=True), "the new ones come first"
        if 1 in found: write_and_die("run", run, 0)
    ledger("killed while writing results", trials, whole=trials)


def test_what_is_written_reaches_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    seen, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(f"{Path(b).name} takes its place"), replace(a, b)))
    if not Path("/proc/self/fd").exists(): pytest.skip("asks /proc for the names of open files")
    with atomic_path(tmp_path/"file") as p: p.write_text("x")
    assert seen == ["file", "file takes its place", tmp_path.name]
    seen.clear()
    with atomic_path(tmp_path/"folder") as p:
        (p/"inner").mkdir(parents=True)
        (p/"inner"/"part").write_text("x")
    assert sorted(seen[:3]) == ["folder", "inner", "part"] and seen[3:] == ["folder takes its place", tmp_path.name]


def test_a_folder_is_exchanged_where_the_system_cannot_do_it_in_one_step(tmp_path, monkeypatch):
    monkeypatch.setattr("geoforecast.core.sys.platform", "other")
    for version in ("one", "two"):
        with atomic_path(tmp_path/"bundle") as p:
            p.mkdir()
            (p/version).touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["bundle", "two"]


def test_what_another_process_is_writing_stays(tmp_path):
    with atomic_path(tmp_path/"a.json") as first:
        first.write_text("first")
        pid = os.fork() if os.name == "posix" else None
        if pid == 0:
            with atomic_path(tmp_path/"b.json") as p: p.write_text("second")
            os._exit(0)
        if pid: os.waitpid(pid, 0)
        assert first.read_text() == "first"
    assert (tmp_path/"a.json").read_text() == "first"


@posix
@pytest.mark.parametrize("name", FORECASTS)
def test_two_forecasts_into_one_folder_do_not_mix(name, tmp_path, monkeypatch, ledger):
    "A forecast that comes as another is about to write its last file is refused; afterwards it is taken."
    task, model, facts, data = FORECASTS[name](tmp_path)
    first, second = (Bundle(tmp_path/"bundle", model, {}, facts | dict(task=name, version=version), {}, []) for version in (1, 2))
    write, endings = task.write_json, []

    def again(out):
        monkeypatch.setattr(task, "write_json", write)
        return task.forecast_bundle(second, data, out)

    monkeypatch.setattr(task, "write_json", lambda path, facts: (endings.append(in_child(again, tmp_path/"out")), write(path, facts)))
    *_, about = task.forecast_bundle(first, data, tmp_path/"out")
    [(ending, text, _)] = endings
    assert ending == "refused" and f"folder {about.parent} is in use by another process" in text and "\n" not in text, (ending, text)
    assert json.loads(about.read_text())["model"]["version"] == 1
    again(tmp_path/"out")
    assert json.loads(about.read_text())["model"]["version"] == 2
    ledger("two forecasts into one folder", 1, refused=1)


def writing_calls(tree):
    "Yield the calls that write files, each with the names of the functions around it and whether one of them asks for an atomic path."
    def walk(node, names, atomic):
        for child in ast.iter_child_nodes(node):
            inside, whole = names, atomic
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inside, whole = [*names, child.name], atomic or any(isinstance(n, ast.Name) and n.id in ("atomic_path", "_geotiff") for n in ast.walk(child))
            if isinstance(child, ast.Call):
                name = getattr(child.func, "attr", getattr(child.func, "id", ""))
                modes = [a.value for a in [*child.args[1:2], *(k.value for k in child.keywords if k.arg == "mode")] if isinstance(a, ast.Constant)]
                opens = name in ("open", "File") and any(isinstance(m, str) and set(m) & set("wax+") for m in modes)
                if opens or name in ("to_netcdf", "to_zarr", "savefig", "write_text", "write_bytes", "save_file", "to_csv", "tofile") or ast.unparse(child.func) in ("torch.save", "np.save", "nbformat.write"):
                    yield ".".join(inside), whole, ast.unparse(child)[:100]
            yield from walk(child, inside, whole)
    return walk(tree, [], False)


def test_every_writer_asks_for_an_atomic_path():
    "Files that are not whole or absent: logs that grow by lines, what is written into a folder that is whole itself, and a disk that is tried."
    free = {"RunLog.__enter__", "EpochReport._keep_line", "_save", "_write_sums", "_lack_of_room"}
    calls = [(path.name, *call) for path in sorted(Path(geoforecast.__file__).parent.rglob("*.py")) for call in writing_calls(ast.parse(path.read_text()))]
    assert len(calls) > 25
    assert [c for c in calls if not c[2] and c[1] not in free] == []
