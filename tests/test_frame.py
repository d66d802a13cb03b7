"What holds the project together: one place for the metadata, notebooks as the source, nothing of one machine."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT/"geoforecast"
PLAIN = {"torch", "jupyterlab", "ipywidgets", "xarray", "h5py", "matplotlib", "cartopy", "papermill", "nbdev"}
CONDA = {"eccodeslib": ["eccodes"], "torch": ["pytorch"], "playwright": ["playwright-python"], "jsonargparse[signatures]": ["jsonargparse", "docstring_parser", "typeshed-client"]}
IMPORT_NAMES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "netCDF4": "netcdf4"}
# Spelt in pieces, since this file is searched as well.
MACHINE_PATH = re.compile(r"(?<![\w.$}])/(?:work|root|home/\w+|Users/\w+|opt/(?:wheels|pypi))" + r"(?:/|\b)|[A-Z]:\\Users\\")


# --- What the tests look at

@cache
def settings() -> ConfigParser:
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return parser


def listed(name: str) -> list[str]:
    return [line.strip() for line in settings()["DEFAULT"][name].splitlines() if line.strip()]


def extra(name: str) -> list[str]:
    return [item.strip() for item in settings()["extras"][name].split(",")]


def split(requirement: str) -> tuple[str, str]:
    "Return a requirement's name, with its extras, and its version range."
    return re.fullmatch(r"([\w.\-]+(?:\[[\w,]+\])?)\s*(.*)", requirement).groups()


def installed_extras() -> list[str]:
    return re.search(r"^EXTRAS := (\S+)", (ROOT/"Makefile").read_text(), re.M)[1].split(",")


@cache
def tracked() -> list[Path]:
    "List the files under version control that are there."
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode: pytest.skip("not a git checkout")
    return [ROOT/name for name in done.stdout.split("\0") if name and (ROOT/name).exists()]


def notebooks() -> list[Path]:
    return [p for p in tracked() if p.suffix == ".ipynb"]


def cells(notebook: Path, kind: str) -> list[str]:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == kind]


def module_of(notebook: Path) -> Path | None:
    "Return the module that a notebook exports to, named by its default_exp."
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(cells(notebook, "code")), re.M)
    return LIBRARY.joinpath(*found[1].split(".")).with_suffix(".py") if found else None


def relative(paths) -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for p in paths)


# --- One place for the metadata

def test_plain_requirements():
    assert PLAIN <= {split(r)[0] for r in listed("requirements")}


def test_conda_environment_matches_settings():
    wanted = listed("requirements") + listed("dev_requirements")
    for name in installed_extras(): wanted += [] if name == "dev" else extra(name)
    python = re.search(r'requires-python = "(.+)"', (ROOT/"pyproject.toml").read_text())[1]
    expected = {"python": python, "pip": ""}
    for requirement in wanted:
        name, versions = split(requirement)
        first, *more = CONDA.get(name, [name])
        expected |= {first: versions, **dict.fromkeys(more, "")}
    found = dict(split(r) for r in yaml.safe_load((ROOT/"environment.yml").read_text())["dependencies"])
    assert found == expected


def test_lock_names_every_requirement():
    lines = [line for line in (ROOT/"requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.\-]+==[\w.!]+", line) for line in lines), "a constraint is name==version, for every machine"
    locked = {line.split("==")[0].lower().replace("_", "-"): line.split("==")[1] for line in lines}
    wanted = listed("requirements") + listed("dev_requirements") + [r for name in settings()["extras"] if name not in settings()["DEFAULT"] for r in extra(name)]
    missing = {split(r)[0].split("[")[0].lower() for r in wanted} - set(locked)
    assert not missing and locked["torch"] == "2.13.0"


def test_name_version_and_licence_agree():
    import geoforecast
    project = (ROOT/"pyproject.toml").read_text()
    citation = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    meta = settings()["DEFAULT"]
    assert f'name = "{meta["lib_name"]}"' in project
    assert citation["version"] == geoforecast.__version__
    assert citation["license"] == meta["license"] == "Apache-2.0"
    assert [a["name"] for a in citation["authors"]] == [meta["author"]]


def imported(module: Path) -> set[str]:
    "Name the packages that a module imports, wherever in it."
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0: names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"geoforecast"}


def test_imports_are_requirements():
    declared = {split(r)[0].split("[")[0] for r in listed("requirements")}
    used = {IMPORT_NAMES.get(n, n) for p in tracked() if p.is_relative_to(LIBRARY) and p.suffix == ".py" for n in imported(p)}
    assert not used - declared, "imported by the library, not in settings.ini (an extra's library goes through core.require)"


def test_libraries_in_c_live_side_by_side():
    "xarray loads every reader that is installed. Each wheel brings its own C libraries, and two of the same name have crashed a process at its end."
    done = subprocess.run([sys.executable, "-c", "import xarray; print(*xarray.backends.list_engines()); import pyproj; pyproj.CRS(4326)"], capture_output=True, text=True)
    assert done.returncode == 0 and "PROJ" not in done.stderr and "rasterio" in done.stdout, done.stderr


def test_package_data_is_installed():
    patterns = [p.strip() for p in settings()["package_data"]["geoforecast"].split(",")]
    covered = {p for pattern in patterns for p in LIBRARY.glob(pattern)}
    data = {p for p in tracked() if p.is_relative_to(LIBRARY) and p.suffix != ".py"}
    assert not relative(data - covered)


# --- Notebooks are the source

def test_every_module_comes_from_a_notebook():
    modules = {p for p in tracked() if p.is_relative_to(LIBRARY) and p.suffix == ".py"}
    modules -= {p for p in modules if p.name in ("__init__.py", "_modidx.py")}
    exported = {module_of(n) for n in notebooks()} - {None}
    assert relative(modules) == relative(exported)


def test_modules_are_what_an_export_makes(tmp_path):
    modules = [m for n in notebooks() if (m := module_of(n))]
    for path in [*notebooks(), ROOT/"pyproject.toml", LIBRARY/"__init__.py"]:
        copy = tmp_path/path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=tmp_path, env=environment, check=True)
    stale = [m for m in modules if m.read_bytes() != (tmp_path/m.relative_to(ROOT)).read_bytes()]
    assert not relative(stale), "run nbdev-export"


def test_every_notebook_opens_with_title_and_promise():
    for notebook in notebooks():
        first = cells(notebook, "markdown")[0].splitlines()
        where = notebook.relative_to(ROOT)
        assert first[0].startswith("# "), f"{where} has no title"
        assert next((line for line in first[1:] if line.strip()), "").startswith("> "), f"{where} has no promise"


def test_every_notebook_is_on_the_map():
    index = ROOT/"nbs"/"index.ipynb"
    links = re.findall(r"\]\(([^)#:]+\.ipynb)\)", "\n".join(cells(index, "markdown")))
    present = {n.relative_to(index.parent).as_posix() for n in notebooks()} - {"index.ipynb"}
    assert not present - set(links), "give each a line in nbs/index.ipynb"
    assert not set(links) - present, "linked in nbs/index.ipynb and not there"


def test_notebooks_for_runs_and_exploring_export_nothing():
    for notebook in notebooks():
        if notebook.parent.name not in ("runs", "explore"): continue
        assert module_of(notebook) is None and "nbdev_export" not in "\n".join(cells(notebook, "code")), notebook.name


# --- Nothing too big, nothing of one machine

def test_no_big_files():
    assert not [f"{p.relative_to(ROOT)}: {p.stat().st_size} bytes" for p in tracked() if p.stat().st_size > 1e6]


def text_of(path: Path) -> str:
    try: return path.read_text(encoding="utf-8")
    except UnicodeDecodeError: return ""


def test_no_machine_paths():
    found = [f"{p.relative_to(ROOT)}: {m[0]}" for p in tracked() for m in [MACHINE_PATH.search(text_of(p))] if m]
    assert not found


def test_local_links_of_the_pages_exist():
    for page in (p for p in tracked() if p.suffix == ".md"):
        links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
        missing = [link for link in links if "://" not in link and not (page.parent/link).exists()]
        assert not missing, f"{page.name}: {missing}"
