"The documentation site: built anew into a temporary folder, checked as files and looked at in a real browser."
import functools
import http.server
import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from browser import CHROMIUM, FLAGS

pytest.importorskip("sphinx", reason="the extra docs is not installed")
for name in ("myst_nb", "sphinx_design", "pydata_sphinx_theme"): pytest.importorskip(name, reason="the extra docs is not installed")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tools"))
import build_docs

PAGES = sorted((ROOT/"docs").rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The site, built from nothing but the archives of npm that an earlier build kept."
    folder = tmp_path_factory.mktemp("docs")
    if (kept := ROOT/"build"/"docs"/"npm").is_dir(): shutil.copytree(kept, folder/"work"/"npm")
    command = [sys.executable, str(ROOT/"tools"/"build_docs.py"), "--out", str(folder/"site"), "--work", str(folder/"work")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return folder/"site"


def text_of(site: Path, page: str) -> str: return (site/page).read_text(encoding="utf-8")


# --- As files

def test_every_notebook_has_a_page(site):
    pages = [site/Path(build_docs.place(n)).with_suffix(".html") for n in build_docs.notebooks()]
    assert len(pages) > 100 and all(p.is_file() for p in pages)
    assert "Simulated fires" in (site/"nbs"/"fire"/"simulate.html").read_text(encoding="utf-8")


def parts_of(page: str) -> dict[str, str]:
    "Cut a page of the reference into its top-level objects."
    cut = re.split(r'<dt class="sig [^>]*id="(geoforecast[\w.]*)"', page)
    return dict(zip(cut[1::2], cut[2::2]))


@pytest.mark.parametrize("module", build_docs.modules())
def test_reference_has_every_public_name_with_its_parameters(site, module):
    found, loaded = parts_of(text_of(site, f"reference/{module}.html")), importlib.import_module(module)
    for name in loaded.__all__:
        assert f"{module}.{name}" in found
        thing = getattr(loaded, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)): continue
        try: wanted = set(inspect.signature(thing).parameters) - {"self", "cls"}
        except ValueError: continue # an exception's, which is C
        rows = set(re.findall(r"<td><p><strong>(\w+)</strong></p></td>", found[f"{module}.{name}"]))
        assert wanted <= rows, f"{module}.{name}"


def test_what_a_comment_says_of_a_parameter_stands_in_the_table(site):
    row = re.search(r"<tr[^>]*><td><p><strong>spread</strong>.*?</tr>|<strong>batch_size</strong>.*?</tr>", text_of(site, "reference/geoforecast.fire.data.html"), re.S)[0]
    assert "int" in row and "batch_size" in row and len(re.findall("<td>", row)) >= 3


def test_names_in_the_text_of_a_notebook_lead_to_the_reference(site):
    assert re.search(r'href="\.\./\.\./reference/geoforecast\.fire\.channels\.html#geoforecast\.fire\.channels\.FireInputs"', text_of(site, "nbs/fire/protocols.html"))


def test_directives_of_notebooks_are_obeyed(site):
    assert not [p.name for p in (site/"nbs").rglob("*.html") if re.search(r'<span class="c1">#\|', p.read_text(encoding="utf-8"))]
    cell = dict(cell_type="code", outputs=[], metadata={})
    assert build_docs.plain(cell | {"source": "#| hide\nx = 1"}, "nbs/core.ipynb") is None
    assert build_docs.plain(cell | {"source": "#| default_exp core"}, "nbs/core.ipynb") is None
    shown = build_docs.plain(cell | {"source": "#| echo: false\n#| fig-alt: A front: it moves east\nplot()"}, "nbs/core.ipynb")
    assert shown["source"] == "plot()" and shown["metadata"] == {"tags": ["remove-input"], "mystnb": {"image": {"alt": "A front: it moves east"}}}


def test_pictures_of_the_pages_say_what_they_show(site):
    for page in PAGES:
        shown = re.search(r'<article class="bd-article">.*?</article>', text_of(site, build_docs.place(page.relative_to(ROOT).as_posix()).replace(".md", ".html")), re.S)[0]
        for picture in re.findall(r"<img[^>]*>", shown): assert re.search(r'alt="[^"/]{10,}"', picture), f"{page.name}: {picture}"


def test_troubleshooting_has_the_places_that_messages_name(site):
    from geoforecast.segmentation.health import PLACES
    named = {place for p in (ROOT/"geoforecast").rglob("*.py") for place in re.findall(r"\bsee\([^()]*, '([\w-]+)'\)", p.read_text(encoding="utf-8"))}
    assert {"out-of-memory", "nan-loss", "no-pseudo-labels"} <= named
    usual = {"out-of-memory", "nan-loss", "slow", "not-learning", "overfitting", "loading"}
    for task, own in dict(fire=usual, precipitation=usual, segmentation=usual | named | set(PLACES.values())).items():
        assert own <= set(re.findall(r'id="([\w-]+)"', text_of(site, f"troubleshooting/{task}.html")))


def test_a_broken_link_is_found(tmp_path):
    (tmp_path/"a.html").write_text('<h1 id="here">A</h1><a href="b.html#there">good</a><a href="#here">good</a><a href="https://x.org">not looked at</a>')
    (tmp_path/"b.html").write_text('<h1 id="there">B</h1><img src="gone.png"><a href="a.html#nowhere">bad</a><script src="https://cdn.org/x.js"></script>')
    assert {b.partition(": ")[2] for b in build_docs.broken_links(tmp_path)} == {"gone.png", "a.html#nowhere", "loads https://cdn.org/x.js"}


# --- The commands that the pages show

def commands() -> list[tuple[str, str]]:
    "List the commands of the pages, those in the running text too where they have arguments; `-p …` belongs to the page's task."
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = [line for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S) for line in block.replace("\\\n", " ").splitlines()]
        spans = re.findall(r"`((?:geoforecast|-p) [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        spans = [f"geoforecast run {page.stem} {s}" if s.startswith("-p") else s for s in spans if page.parent.name == "troubleshooting" or not s.startswith("-p")]
        found += [(page.name, re.sub(r"^(\w+=\S+ )+", "", c)) for c in blocks + spans if re.match(r"(\w+=\S+ )*geoforecast ", c)]
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_command_can_be_typed(page, command):
    from geoforecast.cli import build_parser
    from geoforecast.learn.configuration import compose
    from geoforecast.notebooks import plan_run
    words = shlex.split(command)[1:]
    if words[-1] in ("doctor", "models", "fit", "run", "check", "convert", "NAME"): return # the name of a command
    options, rest = build_parser().parse_known_args(words)
    if words[0] == "fit": compose(options.config, **{k.lstrip("-"): v for k, v in zip(rest[::2], rest[1::2]) if k.startswith("--")}); return
    assert not rest
    if words[0] != "run": return
    values = plan_run(options.notebook, options.parameter).values
    default = {"fire": "fire/unet", "precipitation": "precipitation/unet", "segmentation": "segmentation/consistency_small"}[options.notebook]
    compose(values.get("config") or default, **values.get("overrides", {}))


# --- In a browser

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture(scope="module")
def address(site):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM: pytest.skip("no chromium here; install it with: apt-get install chromium")
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser, address):
    "A page that notes what goes wrong: errors of scripts, files that are not there, requests to anywhere else."
    context = browser.new_context(viewport=dict(width=1300, height=900), color_scheme="light")
    opened, wrong = context.new_page(), []
    opened.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or wrong.append(r.url))
    opened.on("response", lambda r: r.status < 400 or wrong.append(f"{r.status} {r.url}"))
    opened.on("pageerror", lambda e: wrong.append(str(e)))
    yield opened
    context.close()
    assert not wrong


def has(site: Path, script: str):
    if (site/"_static"/"assets"/script).read_bytes().startswith(b"// not fetched"): pytest.skip(f"{script} could not be fetched: npm is missing or has no network")


def test_front_page_and_dark_mode(page, address):
    page.goto(f"{address}/index.html", wait_until="networkidle")
    assert page.locator("img.sd-card-img-top").count() == 3 and page.locator("html").get_attribute("data-theme") == "light"
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator(".theme-switch-container button").first.click()
    page.get_by_text("Dark", exact=True).first.click()
    assert page.locator("html").get_attribute("data-theme") == "dark" and page.evaluate("getComputedStyle(document.body).backgroundColor") != light


def test_search_finds_a_network(page, address):
    page.goto(f"{address}/search.html?q=ConvLSTM")
    page.wait_for_selector("#search-results .search li a")
    page.wait_for_function("document.querySelector('#search-results')?.innerText.includes('matching')")
    links = page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.getAttribute('href'))")
    assert any("nbs/nn/convlstm.html" in link for link in links) and any("reference/geoforecast.nn.convlstm.html" in link for link in links)


def test_maths_is_typeset(page, address, site):
    has(site, "mathjax.js")
    page.goto(f"{address}/nbs/precipitation/baselines.html")
    page.wait_for_selector("mjx-container svg", state="attached")


def test_widgets_show_their_saved_state(page, address, site):
    has(site, "embed-amd.js")
    page.goto(f"{address}/nbs/geo/explore.html")
    page.wait_for_selector(".noUi-handle, .jupyter-widgets input", state="attached")
    page.wait_for_selector(".jupyter-matplotlib-canvas-container canvas", state="attached")
    page.wait_for_function("""[...document.querySelectorAll('.jupyter-matplotlib-canvas-container canvas')].some(c => c.width && c.height &&
        new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size > 50)""")
