"""Notebooks in a real JupyterLab: open, run, click, press, and read what the page shows.

    @pytest.fixture(scope="module")
    def lab(): with serve_lab() as address: yield address

    with notebook_page(lab, "nbs/explore/fire.ipynb") as page: ...

`voila_page` opens a notebook as voila serves it.
"""
import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
SECONDS = 120


def free_port() -> int:
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


@contextlib.contextmanager
def served(command: list[str], address: str, environment: dict):
    "Run a server until the block ends; its address answers when the block begins."
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            for _ in range(4*SECONDS):
                if server.poll() is not None: break
                with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5): break
                time.sleep(.25)
            if server.poll() is not None: log.seek(0); pytest.fail(f"the server ended:\n{log.read()[-3000:]}")
            yield address
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired): server.wait(10)
            server.kill()


def kernel_environment(**more: str) -> dict:
    "The environment of a server whose notebooks use this checkout, quickly and on one core."
    return {**os.environ, "GEOFORECAST_QUICK": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


@contextlib.contextmanager
def serve_lab(root: Path = ROOT, **environment: str):
    "Serve JupyterLab on a folder, with settings of its own; yields (address, token)."
    port, token = free_port(), secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as home:
        own = {f"JUPYTER_{k}_DIR": f"{home}/{k}" for k in ("CONFIG", "DATA", "RUNTIME")} | {k: f"{home}/{k}" for k in ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}", "--allow-root",
                   "--expose-app-in-browser", f"--ServerApp.root_dir={root}", "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
        with served(command, f"http://127.0.0.1:{port}/api?token={token}", kernel_environment(**own, **environment)): yield f"http://127.0.0.1:{port}", token


@contextlib.contextmanager
def browser_page(width: int = 1400, height: int = 1800):
    "Open an empty page in headless Chromium."
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM: pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(1000*SECONDS)
            yield page
        finally: browser.close()


@contextlib.contextmanager
def notebook_page(lab: tuple[str, str], notebook: str, run: bool = True):
    "Open a notebook of the served folder, run all its cells unless told otherwise, and close it without saving."
    address, token = lab
    with browser_page() as page:
        page.goto(f"{address}/lab/workspaces/{secrets.token_hex(4)}/tree/{notebook}?token={token}&reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
        if run: run_all(page)
        yield page


@contextlib.contextmanager
def voila_page(notebook: Path, width: int = 1400, height: int = 1800):
    "Open a notebook as voila serves it, without code; what it asks of other hosts is refused."
    pytest.importorskip("voila")
    port = free_port()
    command = [sys.executable, "-m", "voila", str(notebook), "--no-browser", f"--port={port}", "--strip_sources=True", f"--Voila.root_dir={notebook.parent}"]
    with served(command, f"http://127.0.0.1:{port}/voila/static/voila.js", kernel_environment()), browser_page(width, height) as page:
        page.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: route.abort())
        page.goto(f"http://127.0.0.1:{port}")
        yield page


def run_all(page):
    "Run all cells; fails with what a cell printed as its error."
    if not page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')"):
        errors = page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()
        pytest.fail("a cell failed:\n" + "\n".join(errors)[-3000:])


def until(condition, what: str, seconds: float = 60):
    "Wait until `condition()` is true, and return its value."
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end: pytest.fail(f"waited {seconds:g} s in vain for {what}")
        time.sleep(.1)
    return value


class Figure:
    "A live figure in a page: what it shows, and hands on it."
    def __init__(self, page, number: int = 0):
        self.page = page
        self.canvas = page.locator(".jupyter-matplotlib-canvas-div").nth(number).locator("canvas").last
        self.canvas.wait_for()
        self.canvas.scroll_into_view_if_needed()
        until(lambda: self.colours() > 2, "the figure to be drawn")

    @property
    def _drawn(self): return self.canvas.locator("xpath=..").locator("canvas").first

    def colours(self) -> int:
        "Count the colours of the picture, up to some."
        return self._drawn.evaluate("c => { const d = new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer), s = new Set(); for (const v of d) { s.add(v); if (s.size > 50) break } return s.size }")

    def picture(self) -> str: "The picture as a data URL; equal where it is the same."; return self._drawn.evaluate("c => c.toDataURL()")

    def changed(self, act, seconds: float = 60) -> str:
        "Do something and wait until the picture is another; return it."
        before = self.picture()
        act()
        return until(lambda: (now := self.picture()) != before and now, "the figure to change", seconds)

    def click(self, x: float, y: float):
        "Click at a place given as shares of width and height from the upper left corner."
        box = self.canvas.bounding_box()
        self.page.mouse.click(box["x"] + x*box["width"], box["y"] + y*box["height"])

    def press(self, key: str): self.canvas.focus(); self.page.keyboard.press(key)


def press_slider(page, description: str, key: str = "ArrowRight"):
    "Press a key on the handle of the slider with this description."
    slider = page.locator(".widget-hslider").filter(has=page.get_by_text(re.compile(rf"^{re.escape(description)}$"))).first
    slider.locator(".noUi-handle").first.focus()
    page.keyboard.press(key)
