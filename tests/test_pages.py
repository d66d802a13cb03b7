"The map of the project and the run notebooks, opened and run in a real JupyterLab."
import subprocess
import sys
from pathlib import Path

import pytest

from browser import ROOT, notebook_page, serve_lab


@pytest.fixture(scope="module")
def lab():
    pytest.importorskip("playwright")
    with serve_lab() as served: yield served


def test_map_of_the_project_runs_and_its_links_open(lab):
    with notebook_page(lab, "nbs/index.ipynb") as page:
        assert page.locator(".jp-OutputArea-output img").count() == 1
        page.get_by_role("link", name="the fire run").first.click()
        page.wait_for_selector(".lm-TabBar-tabLabel >> text=fire.ipynb")


@pytest.mark.parametrize("task", ["fire", "segmentation", "precipitation", "upstream"])
def test_run_notebook_runs_in_the_lab(task, tmp_path):
    pytest.importorskip("playwright")
    copy = tmp_path/"lab"/f"{task}.ipynb"
    copy.parent.mkdir()
    subprocess.run([sys.executable, "-m", "papermill", "--prepare-only", str(ROOT/"nbs"/"runs"/f"{task}.ipynb"), str(copy), "-p", "preset", "quick", "-p", "output_dir", str(tmp_path/"run")], check=True, capture_output=True)
    with serve_lab(copy.parent) as lab, notebook_page(lab, copy.name) as page:
        assert page.locator(".jp-OutputArea-output img").count() >= 1
        assert page.locator(".jp-OutputArea-output table").count() >= 1
    assert list((tmp_path/"run").rglob("*.png"))
