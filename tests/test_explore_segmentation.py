"The explorer of land cover: what the page says is what the files hold, in a real JupyterLab, in voila, and without either."
import csv
import os
import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import papermill
import pytest
import rasterio
import torch

from browser import ROOT, Figure, notebook_page, press_slider, serve_lab, until, voila_page
from geoforecast.core import DataError
from geoforecast.learn.bundle import load_bundle, save_bundle
from geoforecast.learn.launch import launch
from geoforecast.segmentation.active import select_tiles
from geoforecast.segmentation.classes import ClassMapping
from geoforecast.segmentation.evaluation import describe
from geoforecast.segmentation.explorer import SegmentationExplorer
from geoforecast.segmentation.landscape import landscape_classes
from geoforecast.segmentation.mosaic import predict_scene
from geoforecast.segmentation.models import DeepLabV3Plus
from geoforecast.segmentation.simulate import simulate_dataset, simulate_mosaic
from geoforecast.segmentation.supervised import Supervised
from geoforecast.segmentation.tiles import find_scenes, write_image

ZURICH = Path(os.environ.get("GEOFORECAST_DATA", Path(__file__).parents[2]/"shared"/"data"))/"segmentation"/"zurich"
LABELLED = "images/scene_000.png", "images/scene_001.png"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Four scenes, two of them labelled, and a run of seconds with two checkpoints."
    folder = tmp_path_factory.mktemp("explore")
    simulate_dataset(folder/"land", n_scenes=4, size=96, seed=1)
    options = dict(num_steps=6, eval_every=3, save_latest_every=3, save_pred_every=3, st_start=3, threshold_st=.3, learning_rate=1e-2, warmup_iters=1, ema_decay=.5)
    size = dict(encoder="tiny", size=48, crop_size=48, batch_size=2, eval_batch_size=4, device="cpu", log_level="warning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = launch("segmentation/selftraining", data_dir=str(folder/"land"), output_dir=str(folder/"run"), **options, **size).fit()
    save_bundle(folder/"run"/"bundle", run.forecaster, run.config, describe(run))
    return folder


def mapped(folder, name):
    "What is true, said and how sure, of a scene, without the explorer."
    bundle = load_bundle(folder/"run"/"bundle")
    scene = next(s for s in find_scenes(folder/"land") if s.image == folder/"land"/name)
    files = predict_scene(bundle.forecaster, scene, ClassMapping.from_dict(bundle.metadata["classes"]), folder/"alone"/scene.name, bundle.metadata["size"])
    with rasterio.open(files[0]) as f, rasterio.open(files[1]) as g: said, sure = f.read(1), g.read(1)
    return rasterio.open(scene.mask).read(1) if scene.mask else None, said, sure


def counted(truth, said, window=(slice(None), slice(None)), keep=None):
    "A row a class as the table shows it: share of the mask, share of the map, IoU; by sets of pixels."
    truth, said = truth[window], said[window]
    keep = np.ones(said.shape, bool) if keep is None else keep[window]
    rows = []
    for k in range(7):
        there, called = truth == k, (said == k) & keep
        iou = f"{(there & called).sum()/((there & keep) | called).sum():.3f}" if (there & keep).any() else ""
        rows.append([f"{100*there.mean():.1f} %", f"{100*called.sum()/keep.sum():.1f} %", iou])
    return rows


# --------------------------------------------------------------------------------------------------------------- without a browser

def test_real_scenes_are_shown_in_their_own_projection(made):
    if not ZURICH.is_dir(): pytest.skip("no real scenes here")
    explorer = SegmentationExplorer(ZURICH, {"run": made/"run"})
    explorer.set(scene="geotiff/sat14.tif")
    assert "4 bands of uint16" in explorer.message.value and explorer.model is None
    explorer.set(model="colour")
    ax = explorer.frame["map"]
    with rasterio.open(ZURICH/"geotiff"/"sat14.tif") as f, rasterio.open(ZURICH/"geotiff"/"gt14.tif") as g:
        assert explorer.message.value == "" and ax.projection.to_epsg() == 32632
        np.testing.assert_allclose([*ax.get_xlim(), *ax.get_ylim()], [f.bounds.left, f.bounds.right, f.bounds.bottom, f.bounds.top])
        truth, (x, y) = g.read(1), f.xy(300, 500)
    explorer.clicked(ax, x, y)
    named = "no class" if truth[300, 500] == 255 else explorer.classes.names[truth[300, 500]]
    assert f"row 300, column 500, mask: {named}" in explorer.message.value
    explorer.zoom((slice(100, 220), slice(300, 480)))
    part, said = truth[100:220, 300:480], explorer.part.layers["said"]
    for k, row in enumerate(explorer.scores):
        there, called = part == k, (said == k) & (part != 255)
        assert row["iou"] is None if not there.any() else row["iou"] == pytest.approx((there & called).sum()/(there | called).sum())


def test_real_scenes_without_a_place_are_shown_in_pixels(made):
    if not ZURICH.is_dir(): pytest.skip("no real scenes here")
    explorer = SegmentationExplorer(ZURICH/"images"/"zh02.png")
    assert explorer.controls["model"].options == ("none",) and "geoforecast run segmentation" in explorer.message.value
    assert explorer.frame["image"].get_xlim() == (0, 832) and not hasattr(explorer.frame["image"], "projection")


def test_what_is_wrong_is_said_in_one_line_and_the_data_are_shown(made, tmp_path):
    learner = Supervised(partial(DeepLabV3Plus, encoder="tiny"), num_classes=7, ema_decay=0.)
    network = dict(class_path="geoforecast.segmentation.models.DeepLabV3Plus", init_args=dict(encoder="tiny"))
    config = dict(model=dict(class_path="geoforecast.segmentation.supervised.Supervised", init_args=dict(num_classes=7, network=network)))
    good = load_bundle(made/"run").metadata["classes"]
    save_bundle(tmp_path/"fire", learner, config, dict(task="fire"))
    save_bundle(tmp_path/"other", learner, config, dict(task="segmentation", size=48, classes=good | dict(names=["a", "b", "c", "d", "e", "f", "g"])))
    damaged = save_bundle(tmp_path/"damaged", learner, config, dict(task="segmentation", size=48, classes=good))
    (damaged/"model.safetensors").write_bytes(b"nothing")
    models = {n: tmp_path/n for n in ("fire", "other", "damaged", "absent <b>")}
    explorer = SegmentationExplorer(made/"land", models)
    explorer.set(scene=LABELLED[0])
    for name, said in dict(fire="task &#x27;fire&#x27;", other="knows the classes a, b", damaged="is damaged").items() | {("absent <b>", "absent &lt;b&gt;")}:
        explorer.set(model=name)
        assert said in explorer.message.value and "<b>" not in explorer.message.value, (name, explorer.message.value)
        assert explorer.model is None and explorer.scores[0]["mask"] > 0 and explorer.scores[0]["map"] is None
    explorer.set(model="colour")
    assert explorer.message.value == "" and explorer.scores[0]["map"] > 0
    with pytest.raises(DataError, match="does not exist"): SegmentationExplorer(tmp_path/"nowhere")
    bare = SegmentationExplorer(made/"land", hint="train one <first>")
    assert "train one &lt;first&gt;" in bare.message.value and bare.model.name == "colour" and bare.scores[0]["map"] > 0


def test_a_checkpoint_that_cannot_be_read_leaves_the_map(made, tmp_path):
    run = tmp_path/"run"
    for p in (made/"run").rglob("*"):
        if p.is_file() and p.parent.name in ("bundle", "checkpoints"): (run/p.parent.name).mkdir(parents=True, exist_ok=True); (run/p.parent.name/p.name).write_bytes(p.read_bytes())
    (run/"checkpoints"/"checkpoint_3.ckpt").write_bytes(b"half")
    explorer = SegmentationExplorer(made/"land", {"run": run})
    assert "checkpoint_3.ckpt cannot be read" in explorer.message.value and explorer.controls["step"].options == ("off",)
    assert explorer.scores[0]["map"] is not None


def test_a_mosaic_larger_than_the_screen_is_read_anew_where_one_looks(tmp_path):
    simulate_mosaic(tmp_path/"land", 1600, 1700, seed=2, landscapes=1)
    landscape_classes().write(tmp_path/"land"/"class_mapping.csv")
    explorer = SegmentationExplorer(tmp_path/"land")
    truth = rasterio.open(tmp_path/"land"/"masks"/"mosaic.tif").read(1)
    assert "one pixel in 2" in explorer.message.value
    np.testing.assert_array_equal(explorer.part.layers["truth"], truth[1::2, 1::2])
    explorer.zoom((slice(700, 1600), slice(90, 400)))
    np.testing.assert_array_equal(explorer.part.layers["truth"], truth[700:1600, 90:400])
    assert explorer.message.value == ""
    explorer.zoom()
    np.testing.assert_array_equal(explorer.part.layers["truth"], truth[1::2, 1::2])


# -------------------------------------------------------------------------------------------------------------------- in a browser

def prepare(folder, made):
    "The dashboard with the data and run of the test."
    papermill.execute_notebook(ROOT/"nbs"/"explore"/"segmentation.ipynb", folder/"dashboard.ipynb", dict(data=str(made/"land"), bundle=str(made/"run")), prepare_only=True)
    return folder/"dashboard.ipynb"


def test_voila_serves_the_dashboard(made, tmp_path): # before the page below, since only one browser can be open
    pytest.importorskip("playwright")
    with voila_page(prepare(tmp_path, made)) as page:
        figure = Figure(page)
        assert len(table(page)) == 7 and not page.locator(".jp-CodeMirrorEditor, .cm-editor").count()
        figure.changed(lambda: press_slider(page, "opacity"))


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    "The dashboard in JupyterLab, all cells run."
    pytest.importorskip("playwright")
    folder = tmp_path_factory.mktemp("lab")
    notebook = prepare(folder, made)
    with serve_lab(root=folder) as lab, notebook_page(lab, notebook.name) as opened: yield opened


def table(page): return [[c.strip() for c in row.locator("td").all_inner_texts()[1:]] for row in page.locator("table.scores tr").all()[1:]]
def caption(page): return page.locator("table.scores caption").inner_text()
def settled(figure): return until(lambda: (before := figure.picture()) and not figure.page.wait_for_timeout(500) and figure.picture() == before and before, "the picture to stay")
def message(page): return page.locator("p[role=status]").first.inner_text() if page.locator("p[role=status]").count() else ""


def choose(page, description, option):
    page.locator(".widget-dropdown").filter(has=page.get_by_text(description, exact=True)).locator("select").select_option(option)


def test_the_page_counts_as_the_files_do(page, made):
    figure = Figure(page)
    choose(page, "model", "run")
    for name in LABELLED:
        choose(page, "scene", name)
        truth, said, sure = mapped(made, name)
        until(lambda: table(page) == counted(truth, said), f"the scores of {name}; {table(page)} is not {counted(truth, said)}")
    before = settled(figure)
    for _ in range(6): press_slider(page, "confidence from")
    until(lambda: table(page) == counted(truth, said, keep=sure >= np.float32(.3)), "the scores of what is sure")
    until(lambda: figure.picture() != before, "unsure pixels to be seen through")
    for _ in range(6): press_slider(page, "confidence from", "ArrowLeft")
    until(lambda: figure.picture() == before, "the picture of before")


def test_a_click_tells_the_pixel_and_a_key_the_next_scene(page, made):
    figure, (truth, said, sure) = Figure(page), mapped(made, LABELLED[1])
    choose(page, "scene", LABELLED[1])
    until(lambda: table(page) == counted(truth, said), "the scene")
    figure.click(.46, .25)
    row, column = map(int, until(lambda: re.match(r"row (\d+), column (\d+)", message(page)), "the pixel").groups())
    names = ClassMapping.from_dict(load_bundle(made/"run").metadata["classes"]).names
    assert message(page) == f"row {row}, column {column}, mask: {names[truth[row, column]]}, map: {names[said[row, column]]} ({sure[row, column]:.2f})"
    assert 20 < row < 70 and 30 < column < 96
    truth, said, _ = mapped(made, LABELLED[0])
    figure.changed(lambda: figure.press("ArrowLeft"))
    until(lambda: table(page) == counted(truth, said), "the scene before")


def test_a_zoom_by_hand_counts_what_is_on_screen(page, made):
    figure, (truth, said, _) = Figure(page), mapped(made, LABELLED[0])
    choose(page, "scene", LABELLED[0])
    until(lambda: caption(page).startswith("rows 0 to 95, columns 0 to 95"), "the whole scene")
    page.get_by_title("Zoom to rectangle").first.click()
    box = figure.canvas.bounding_box()
    at = lambda x, y: (box["x"] + x*box["width"], box["y"] + y*box["height"])
    page.mouse.move(*at(.40, .15)); page.mouse.down(); page.mouse.move(*at(.45, .22)); page.mouse.move(*at(.50, .30)); page.mouse.up()
    rows = until(lambda: re.match(r"rows (\d+) to (\d+), columns (\d+) to (\d+)", caption(page)) if not caption(page).startswith("rows 0 to 95, columns 0 to 95") else None, "the zoom")
    r0, r1, c0, c1 = map(int, rows.groups())
    assert r1 - r0 < 60 and c1 - c0 < 60
    window = slice(r0, r1 + 1), slice(c0, c1 + 1)
    until(lambda: table(page) == counted(truth, said, window), "the scores of the window")
    page.get_by_title("Zoom to rectangle").first.click()
    page.get_by_title("Reset original view").first.click()
    until(lambda: table(page) == counted(truth, said), "the scores of the whole scene")
    settled(figure)


def test_steps_of_the_run_change_the_pseudo_labels(page):
    figure = Figure(page)
    pictures = [settled(figure)]
    for step in ("3", "6"):
        figure.changed(lambda: press_slider(page, "pseudo-labels of step"))
        pictures.append(settled(figure))
        until(lambda: (figure.click(.15, .3), page.wait_for_timeout(300)) and f"step {step}:" in message(page), "the step in what a click tells")
    press_slider(page, "pseudo-labels of step", "ArrowLeft")
    until(lambda: figure.picture() == pictures[1], "the first step again")
    assert len(set(pictures)) == 3


def test_the_list_is_the_command_s_and_a_click_changes_it(page, made):
    figure, path = Figure(page), made/"chosen.csv"
    rows = lambda: list(csv.reader(path.open(newline=""))) if path.exists() else []
    page.get_by_role("button", name="propose tiles").click()
    until(lambda: "are proposed, by margin of run" in message(page), "proposals")
    page.locator(".widget-text").filter(has=page.get_by_text("list", exact=True)).locator("input").fill(str(path)); page.keyboard.press("Enter")
    page.get_by_role("button", name="write list").click()
    until(rows, "the list")
    tiles = select_tiles(made/"run", made/"land", made/"command.csv", n=10)
    assert rows() == list(csv.reader((made/"command.csv").open(newline=""))) and len(rows()) == len(tiles) + 1
    page.get_by_label("a click adds or removes a tile").check()
    figure.changed(lambda: choose(page, "scene", tiles[0].scene.image.relative_to(made/"land").as_posix()))
    figure.changed(lambda: figure.click(.40, .15))
    gone = until(lambda: re.match(r"(\S+) is off the list", message(page)), "a tile to go")[1]
    path.unlink()
    page.get_by_role("button", name="write list").click()
    until(rows, "the list")
    assert rows()[1:] == [r for t, r in zip(tiles, list(csv.reader((made/"command.csv").open(newline="")))[1:]) if t.name != gone] and len(rows()) == len(tiles)
    page.get_by_label("a click adds or removes a tile").uncheck()
