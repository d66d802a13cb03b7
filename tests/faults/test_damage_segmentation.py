"""Damaged images, masks and tables of classes: each damage either gives what a plain reading of the file gives, or one line that names it.

PNG and JPEG are read plainly by Pillow, GeoTIFF by rasterio alone, tables by the csv module.
"""
import csv
import io
import itertools
import re
import shutil
import struct
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rasterio
from damage import Judge, each, random_damage, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio import Affine

from geoforecast.core import DataError
from geoforecast.segmentation.check import describe_folder
from geoforecast.segmentation.classes import IGNORE, read_classes
from geoforecast.segmentation.data import SegmentationDataModule
from geoforecast.segmentation.inputs import ImageInputs
from geoforecast.segmentation.mosaic import window_reader
from geoforecast.segmentation.patches import patchify
from geoforecast.segmentation.simulate import simulate_dataset
from geoforecast.segmentation.tiles import find_scenes, open_scene

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
SIZE, NUMBER = 96, itertools.count()
PLACE = dict(crs="EPSG:32749", transform=Affine(.5, 0, 600_000, 0, -.5, 9_000_000))


@pytest.fixture(scope="module")
def land(tmp_path_factory): return simulate_dataset(tmp_path_factory.mktemp("land")/"good", n_scenes=3, labelled=1, size=SIZE, seed=3)


def with_files(land: Path, folder: Path, **files: bytes) -> Path:
    "Copy the good folder; of scene 0, put other files in place of the image or the mask (`image_tif=...`), or another table (`class_mapping_csv`)."
    root = Path(shutil.copytree(land, folder/f"land{next(NUMBER)}"))
    for name, content in files.items():
        what, suffix = name.rsplit("_", 1)
        where = {"image": root/"images", "mask": root/"masks"}.get(what, root)
        if where != root: (where/"scene_000.png").unlink()
        (where/f"{'scene_000' if where != root else what}.{suffix}").write_bytes(content)
    return root


def encoded(values: np.ndarray, suffix: str, **profile) -> bytes:
    "The bytes of an image (C, H, W) in a format."
    with rasterio.MemoryFile(ext=f".{suffix}") as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with memory.open(driver=dict(png="PNG", jpg="JPEG", tif="GTiff")[suffix], count=len(values), height=values.shape[1], width=values.shape[2], dtype=values.dtype, **profile) as f: f.write(values)
        return bytes(memory.getbuffer())


def pillow(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def plain(path: Path) -> np.ndarray:
    "Read the pixels of a file, (C, H, W), by another library where there is one."
    if path.suffix == ".tif":
        with warnings.catch_warnings(), rasterio.open(path) as f:
            warnings.simplefilter("ignore")
            return f.read()
    values = np.asarray(Image.open(path))
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


# A training, and the check before it, on a folder of which one file is damaged

def train_on(path: Path) -> str | None:
    "Read a folder as a training does; what is served of the damaged file must be its pixels."
    root = next(p for p in path.parents if (p/"images").is_dir()) if path.parent.name in ("images", "masks") else path.parent
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        said = ""
        try: said = "" if (found := describe_folder(root)).ready else str(found)
        except DataError as e: said = str(e)
        try:
            data = SegmentationDataModule(str(root), size=32, batch_size=2, split_by="block", block_size=32)
            data.setup("fit")
            served = {(t.scene.image, t.row, t.column): (data.pixels.image(t), data.pixels.mask(t) if t.scene.labelled else None) for part in data.tiles.values() for t in part}
        except DataError as e:
            if not said: return f"the check says ready, the training refuses it: {e}"
            if path.suffix == ".csv" and "is no class" in str(e): raise DataError(f"{e} (the table, {path.name}, lost classes)") from e
            raise
        left_out = any("images are left out" in str(w.message) and path.stem in str(w.message) for w in told)
        if said and not left_out: return f"a training starts, but the check says: {said[-300:]}"
        return wrong_pixels(served, path)


def wrong_pixels(served, path):
    images = {image for image, *_ in served}
    wanted = {image: (plain(image).astype(np.float32), plain(image.parents[1]/"masks"/image.name)[0]) for image in images if image.parent.name == "images" and (image.parents[1]/"masks"/image.name).exists()}
    for (image, row, column), (pixels, mask) in served.items():
        if image not in wanted: continue
        whole, ids = wanted[image][0][:len(pixels)], wanted[image][1]
        part = (slice(row, row + 32), slice(column, column + 32))
        known = np.isfinite(pixels)
        if np.abs(pixels - whole[(slice(None), *part)])[known].max(initial=0) > (4 if image.suffix == ".jpg" else 0): return f"{image.name} is not what it holds"
        if mask is not None and not np.array_equal(mask, ids[part]): return f"the mask of {image.name} is not what it holds"


def in_place(land: Path, folder: Path, name: str, content: bytes) -> Path:
    "Put a damaged file of scene 0 into a folder of its own, since a process remembers what it knows of a path."
    what, suffix = name.rsplit("_", 1)
    root = with_files(land, folder, **{name: content})
    return root/{"image": "images", "mask": "masks"}.get(what, "")/f"{'scene_000' if what in ('image', 'mask') else what}.{suffix}"


def good_bytes(land, kind):
    image, mask = plain(land/"images"/"scene_000.png"), plain(land/"masks"/"scene_000.png")
    return {"image_png": lambda: (land/"images"/"scene_000.png").read_bytes(), "mask_png": lambda: (land/"masks"/"scene_000.png").read_bytes(),
            "image_jpg": lambda: pillow(Image.fromarray(image.transpose(1, 2, 0)), "JPEG", quality=90),
            "image_tif": lambda: encoded(image, "tif", compress="deflate", tiled=True, blockxsize=32, blockysize=32, **PLACE),
            "mask_tif": lambda: encoded(mask, "tif"),
            "class_mapping_csv": lambda: (land/"class_mapping.csv").read_bytes()}[kind]()


@pytest.mark.parametrize("kind", ["image_png", "image_jpg", "image_tif", "mask_png", "mask_tif", "class_mapping_csv"])
def test_random_damage(kind, land, many, ledger, tmp_path):
    content, judge = good_bytes(land, kind), Judge(train_on)
    for name, damaged in itertools.chain([("whole", content)], (random_damage(content, seed) for seed in range(1000 if many else 40))):
        path = in_place(land, tmp_path, kind, damaged)
        judge.try_file(name, path)
        shutil.rmtree(next(p for p in path.parents if p.parent == tmp_path))
    judge.close()
    ledger(kind.replace("_", " "), judge.endings.total(), **judge.endings)
    assert judge.endings["right"] and not judge.bad, judge.report()


# Damage of a certain kind of the image or the mask of scene 0: what the file holds, and what the line says; None where its pixels are served as a plain reading has them

def claiming(content: bytes, width: int, height: int) -> bytes:
    "A PNG that claims another size, its checksum in order."
    head = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]


def colours(land): return Image.open(land/"images"/"scene_000.png")
def numbers(land): return plain(land/"masks"/"scene_000.png")
def turned(land):
    exif = Image.Exif()
    exif[0x0112] = 6
    return pillow(colours(land), "JPEG", exif=exif)
def misnamed(land):
    "A GeoTIFF with a band whose name is not UTF-8."
    with rasterio.MemoryFile(ext=".tif") as memory:
        with memory.open(driver="GTiff", count=3, height=SIZE, width=SIZE, dtype="uint8") as f:
            f.write(pixels(land))
            f.set_band_description(1, "ROUGE")
        return bytes(memory.getbuffer()).replace(b"ROUGE", b"ROUG\xe9")
def tif(values, **profile): return encoded(np.atleast_3d(values.T).T if values.ndim == 2 else values, "tif", **profile)
def pixels(land): return plain(land/"images"/"scene_000.png")


IMAGES = {
    "16 bits, as all": (lambda land: ("png", encoded(pixels(land).astype("uint16")*257, "png")), "left out"),
    "grey": (lambda land: ("png", pillow(colours(land).convert("L"))), "left out"),
    "opaque": (lambda land: ("png", pillow(colours(land).convert("RGBA"))), None),
    "palette": (lambda land: ("png", pillow(colours(land).convert("P"))), "palette"),
    "1 bit": (lambda land: ("png", pillow(colours(land).convert("1"))), "left out"),
    "CMYK": (lambda land: ("jpg", pillow(colours(land).convert("CMYK"), "JPEG")), "readable"),
    "turned by its camera": (lambda land: ("jpg", turned(land)), "EXIF orientation 6"),
    "a PNG called JPEG": (lambda land: ("jpg", pillow(colours(land))), None),
    "a GIF called PNG": (lambda land: ("png", pillow(colours(land).convert("P"), "GIF")), "cannot be read as an image"),
    "text called PNG": (lambda land: ("png", b"a picture"), "cannot be read as an image"),
    "empty": (lambda land: ("png", b""), "cannot be read as an image"),
    "60000 x 60000": (lambda land: ("png", claiming(pillow(colours(land)), 60_000, 60_000)), "60,?000|pixels|bytes"),
    "0 x 0": (lambda land: ("png", claiming(pillow(colours(land)), 0, 0)), "cannot be read as an image"),
    "twice as high": (lambda land: ("png", claiming(pillow(colours(land)), SIZE, 2*SIZE)), "has 96 x 96 pixels"),
    "smaller than its mask": (lambda land: ("png", pillow(colours(land).crop((0, 0, 50, 50)))), "has 96 x 96 pixels, but its image"),
    "a band's name in another encoding": (lambda land: ("tif", misnamed(land)), "cannot be read as an image"),
    "40 bands": (lambda land: ("tif", tif(np.concatenate([pixels(land)]*14)[:40])), "left out"),
    "complex": (lambda land: ("tif", tif(pixels(land).astype("complex64"))), "complex64"),
    "complex of double length": (lambda land: ("tif", tif(pixels(land).astype("complex128"))), "complex128"),
    "64-bit integers": (lambda land: ("tif", tif(pixels(land).astype("int64"))), "int64"),
    "NaN": (lambda land: ("tif", tif(np.where(np.arange(SIZE) < 9, np.nan, pixels(land)).astype("float32"))), "left out"),
    "a transform of zeros": (lambda land: ("tif", tif(pixels(land), crs="EPSG:32749", transform=Affine(0, 0, 5, 0, 0, 5))), "no size"),
    "a transform of NaN": (lambda land: ("tif", tif(pixels(land), crs="EPSG:32749", transform=Affine(np.nan, 0, 5, 0, -1, 5))), "no size|NaN"),
    "no CRS": (lambda land: ("tif", tif(pixels(land), transform=PLACE["transform"])), None),
    "a turned grid": (lambda land: ("tif", tif(pixels(land), crs="EPSG:32749", transform=Affine(.5, .1, 0, .1, -.5, 0))), None),
    "a CRS of nobody": (lambda land: ("tif", tif(pixels(land), crs='LOCAL_CS["nonsense",UNIT["metre",1]]', transform=PLACE["transform"])), None),
}
MASKS = {
    "another size": (lambda land: ("png", encoded(numbers(land)[:, :50], "png")), "has 50 x 96 pixels, but its image"),
    "a value that no class has": (lambda land: ("png", encoded(np.where(np.arange(SIZE) < 2, np.uint8(77), numbers(land)), "png")), "value 77 \\(192 pixels\\) is no class"),
    "colours that no class has": (lambda land: ("png", encoded(np.concatenate([numbers(land)]*3), "png")), "is no class"),
    "JPEG": (lambda land: ("jpg", pillow(Image.fromarray(30*numbers(land)[0]), "JPEG")), "JPEG changes colours|is no class"),
    "five bands": (lambda land: ("tif", tif(np.concatenate([numbers(land)]*5))), "not 5"),
    "complex": (lambda land: ("tif", tif(numbers(land).astype("complex64"))), "complex64"),
    "16 bits": (lambda land: ("png", encoded(numbers(land).astype("uint16"), "png")), None),
    "32 bits": (lambda land: ("tif", tif(numbers(land).astype("int32"))), None),
    "64 bits that wrap around": (lambda land: ("tif", tif(numbers(land).astype("int64") + 2**32)), "is no class"),
    "negative": (lambda land: ("tif", tif(numbers(land).astype("int16") - 1)), "value -1"),
    "halves": (lambda land: ("tif", tif(numbers(land).astype("float32") + .5)), "value .*\\.5"),
    "whole floats": (lambda land: ("tif", tif(numbers(land).astype("float32"))), None),
    "NaN": (lambda land: ("tif", tif(np.where(np.arange(SIZE) < 3, np.nan, numbers(land)).astype("float32"))), "ignored"),
    "infinite": (lambda land: ("tif", tif(np.where(np.arange(SIZE) < 3, np.inf, numbers(land)).astype("float32"))), "ignored"),
    "all of no class": (lambda land: ("png", encoded(np.full_like(numbers(land), IGNORE), "png")), None),
    "cut short": (lambda land: ("png", encoded(numbers(land), "png")[:-20]), "cut short|damaged"),
    "elsewhere": (lambda land: ("tif", tif(numbers(land), **PLACE)), None),
}


def served_or_refused(land, folder, name, content, said):
    suffix, content = content
    path = in_place(land, folder, f"{name}_{suffix}", content)
    if said in (None, "left out", "palette", "readable", "ignored"):
        wrong = train_on(path) if said in (None, "left out") else look(path)
        assert wrong is None, wrong
        return "left_out" if said == "left out" else "right"
    line = refused(lambda: train_on(path), path.name)
    assert re.search(said, line), line
    return "refused"


def look(path):
    "Read a scene whose pixels are not those of the file as they stand: a palette's colours, inks, holes in a mask."
    scene = open_scene(path) if path.parent.name == "images" else open_scene(path.parents[1]/"images"/"scene_000.png", path)
    if path.parent.name == "images": return None if np.abs(scene.read().astype(int) - np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)).max() < (60 if path.suffix == ".jpg" else 1) else "other colours"
    ids, there = scene.read_mask(), plain(path)[0]
    return None if np.array_equal(ids, np.where(np.isfinite(there), there, IGNORE)) else "another mask"


@pytest.mark.parametrize("what", ["image", "mask"])
def test_certain_damage(what, land, tmp_path, ledger):
    cases = dict(image=IMAGES, mask=MASKS)[what]
    each(cases, lambda name: served_or_refused(land, tmp_path, what, cases[name][0](land), cases[name][1]), ledger, f"{what}, certain damage")


# Folders

def link(at, to): at.unlink(missing_ok=True); at.symlink_to(to)


FOLDERS = {
    "no images": (lambda root: shutil.rmtree(root/"images"), "holds no image"),
    "two images of one name": (lambda root: shutil.copy(root/"images"/"scene_000.png", root/"images"/"scene_000.jpeg"), "has two masks"),
    "two masks of one name": (lambda root: shutil.copy(root/"masks"/"scene_000.png", root/"masks"/"scene_000.tif"), "scene_000"),
    "a folder called as an image": (lambda root: (root/"images"/"scene_009.png").mkdir(), "scene_009.png"),
    "a link to itself": (lambda root: link(root/"images"/"scene_000.png", "scene_000.png"), "scene_000.png"),
    "a link to nowhere": (lambda root: link(root/"masks"/"scene_000.png", "nowhere.png"), "scene_000.png"),
    "a folder that holds itself": (lambda root: link(root/"images"/"again", "."), None),
    "a hidden file of another system": (lambda root: (root/"images"/"._scene_000.png").write_bytes(b"junk"), None),
    "a mask without its image": (lambda root: (root/"images"/"scene_001.png").unlink(), None),
    "a table that is a folder": (lambda root: ((root/"class_mapping.csv").unlink(), (root/"class_mapping.csv").mkdir()), None),
    "a table that links to itself": (lambda root: link(root/"class_mapping.csv", "class_mapping.csv"), None),
    "images of many kinds": (lambda root: (root/"images"/"notes.txt").write_text("cloudy"), None),
}


def test_certain_damage_of_a_folder(land, tmp_path, ledger):
    def judge_one(name):
        damage, said = FOLDERS[name]
        root = with_files(land, tmp_path)
        damage(root)
        path = root/"class_mapping.csv"
        if said is None:
            assert (wrong := train_on(path)) is None, wrong
            return "right"
        assert re.search(said, line := refused(lambda: train_on(path), str(root))), line
        return "refused"
    each(FOLDERS, judge_one, ledger, "folder, certain damage")


# Tables of classes

def entries(text):
    "The rows of a table as the csv module reads them, whatever stands between its cells."
    lines = [line for line in text.lstrip("\ufeff").splitlines() if line.strip()]
    return list(csv.DictReader(lines, delimiter=max(",;\t", key=lines[0].count)))


GOOD_TABLE = "id,name,colour\n0,water,#0000FF\n1,forest,#00FF00\n2,field,#FFFF00\n"
TABLES = {
    "as it is": (GOOD_TABLE, None), "BOM": ("\ufeff" + GOOD_TABLE, None), "CRLF": (GOOD_TABLE.replace("\n", "\r\n"), None), "semicolons": (GOOD_TABLE.replace(",", ";"), None), "tabs": (GOOD_TABLE.replace(",", "\t"), None),
    "blank lines": (GOOD_TABLE.replace("\n", "\n\n"), None), "rows in disorder": ("id,name,colour\n2,field,#FFFF00\n0,water,#0000FF\n1,forest,#00FF00\n", None), "British spelling": (GOOD_TABLE.replace("colour", "color"), None),
    "empty": ("", "no column 'id'"), "a header alone": ("id,name,colour\n", "names no class"), "no ids": (GOOD_TABLE.replace("id,", "number,"), "line 1: no column 'id'"), "no names": (GOOD_TABLE.replace("name", "title"), "line 1: no column 'name'"),
    "an id twice": (GOOD_TABLE.replace("2,", "1,"), "line 4: id 1 stands there already"), "a name twice": (GOOD_TABLE.replace("field", "water"), "name water stands for two"), "a colour twice": (GOOD_TABLE.replace("#FFFF00", "#0000FF"), "colour .* stands for two"),
    "a gap": (GOOD_TABLE.replace("2,", "5,"), "no class has the id 2"), "an id below 0": (GOOD_TABLE.replace("2,", "-2,"), "line 4: id '-2'"), "an id of 256": (GOOD_TABLE.replace("2,", "256,"), "line 4: id '256'"), "an id in words": (GOOD_TABLE.replace("2,", "two,"), "line 4: id 'two'"),
    "half an id": (GOOD_TABLE.replace("2,", "2.5,"), "line 4: id '2.5'"), "a colour of nonsense": (GOOD_TABLE.replace("#FFFF00", "yellowish"), "line 4: colour 'yellowish'"), "a colour too bright": (GOOD_TABLE.replace("#FFFF00", "300 0 0"), "line 4: colour '300 0 0'"),
    "a class without a name": (GOOD_TABLE.replace("field", ""), "line 4: the class has no name"), "some without a colour": (GOOD_TABLE.replace("#FFFF00", ""), "'field' has no colour"), "a threshold of 7": (GOOD_TABLE.replace("colour", "threshold").replace("#0000FF", "7"), "line 2: threshold '7'"),
    "another encoding": (GOOD_TABLE.replace("field", "f\xfcld").encode("latin1"), "not UTF-8"), "UTF-16": (GOOD_TABLE.encode("utf-16"), "not UTF-8|no text|no column"), "bytes of 0": (GOOD_TABLE.encode() + bytes(40), "class_mapping.csv"), "an open quote": (GOOD_TABLE.replace("field", '"field'), "class_mapping.csv"),
}


def test_certain_damage_of_a_table(tmp_path, ledger):
    path = tmp_path/"class_mapping.csv"
    def judge_one(name):
        content, said = TABLES[name]
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if said is None:
            found = read_classes(path)
            assert (found.names, found.colours) == (("water", "forest", "field"), ((0, 0, 255), (0, 255, 0), (255, 255, 0))), found
            return "right"
        assert re.search(said, line := refused(lambda: read_classes(path), "class_mapping.csv")), line
        return "refused"
    each(TABLES, judge_one, ledger, "class_mapping.csv, certain damage")


def spoil(rows, chance, value):
    "Shuffle the rows of a good table, and put a value in place of a cell."
    head, *rows = [list(r) for r in rows]
    chance.shuffle(rows)
    if value is not None: chance.choice(rows)[chance.randrange(2)] = value
    return [head, *rows]


cell = st.one_of(st.integers(-2, 260).map(str), st.sampled_from(["water", "#0000FF", "0 114 178", "", " ", "yes", "no", '"', "'", "1e3", "0.5", "\u0663", "nan", "name"]), st.text(max_size=8))
likely = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=5, unique=True).map(lambda names: [["id", "name"], *([str(i), n] for i, n in enumerate(names))])
near = st.tuples(likely, st.randoms(use_true_random=False), st.one_of(st.none(), cell)).map(lambda t: spoil(*t))
table = st.one_of(st.builds(lambda rows, mark, end: end.join(mark.join(r) for r in rows), near, st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n", "\r"])),
                  st.builds(lambda header, rows, mark, end: end.join(mark.join(r) for r in [header, *rows]),
                  st.permutations(["id", "name", "colour", "threshold", "background"]).flatmap(lambda h: st.integers(1, 5).map(lambda n: h[:n])),
                  st.lists(st.lists(cell, min_size=0, max_size=6), max_size=6), st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n", "\r"])))


def test_tables_of_any_content(tmp_path, many, ledger):
    "A table is read to what the csv module reads, or refused in one line that names it."
    path, endings = tmp_path/"class_mapping.csv", Counter()

    @settings(max_examples=5000 if many else 300, deadline=None, database=None, derandomize=not many, suppress_health_check=list(HealthCheck))
    @given(table)
    def read(text):
        path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
        try: found = read_classes(path)
        except DataError as e:
            assert "class_mapping.csv" in str(e)
            endings["refused"] += 1
            return
        rows = {int(r["id"]): r["name"].strip() for r in entries(text) if r.get("id") and r["id"].strip()}
        assert list(found.names) == [rows[i] for i in range(len(found))]
        endings["right"] += 1
    read()
    ledger("tables of any content", endings.total(), **endings)


# Mosaics: what is cut and what a model is shown

def mosaic_bytes(land):
    values = np.concatenate([np.concatenate([pixels(land)]*2, 1)]*2, 2)
    return encoded(values, "tif", compress="lzw", tiled=True, blockxsize=64, blockysize=64, nodata=0, **PLACE)


def cut_and_shown(path):
    "Cut a mosaic, and read it as a forecast does; both must give the pixels of a plain reading."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scene = find_scenes(path)[0]
        inputs = ImageInputs().set_statistics(scene.channels() | dict(low=[0]*len(scene.bands), high=[255]*len(scene.bands), mean=[.5]*len(scene.bands), std=[1]*len(scene.bands))) if len(scene.bands) == 3 else None
        shown = window_reader(inputs, scene)(slice(0, scene.height), slice(0, scene.width)).numpy() if inputs else scene.read()
        out = path.parent/f"cut{next(NUMBER)}"
        cut = patchify(path, out, 64)
    there = plain(path).astype(np.float32)
    if not np.array_equal(shown[np.isfinite(shown)], there[np.isfinite(shown)]): return "what is shown is not what it holds"
    for patch in cut:
        row, column = (int(n) for n in re.findall(r"_[rc](\d+)", patch.stem))
        part = there[:, row:row + 64, column:column + 64]
        if not np.array_equal(plain(patch)[:, :part.shape[1], :part.shape[2]], part): return f"{patch.name} is not what the mosaic holds"
    shutil.rmtree(out, ignore_errors=True)


def test_random_damage_of_a_mosaic(land, many, ledger, tmp_path):
    path, judge = tmp_path/"mosaic.tif", Judge(cut_and_shown)
    path.write_bytes(mosaic_bytes(land))
    assert judge.try_file("whole", path) == "right", judge.report()
    content = path.read_bytes()
    for seed in range(1000 if many else 40):
        name, damaged = random_damage(content, seed)
        (at := tmp_path/f"m{seed}"/"mosaic.tif").parent.mkdir()
        at.write_bytes(damaged)
        judge.try_file(name, at)
        shutil.rmtree(at.parent)
    judge.close()
    ledger("mosaic, cut and shown", judge.endings.total(), **judge.endings)
    assert not judge.bad, judge.report()


def test_a_damaged_plan_of_a_cut(land, tmp_path):
    (tmp_path/"mosaic.tif").write_bytes(mosaic_bytes(land))
    patchify(tmp_path/"mosaic.tif", tmp_path/"cut", 64)
    for content in ("", "{", "[]", "7", '{"size": 64}'):
        (tmp_path/"cut"/"mosaic.patches.json").write_text(content)
        refused(lambda: patchify(tmp_path/"mosaic.tif", tmp_path/"cut", 64), "cut")
