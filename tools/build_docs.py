"""Build the documentation site: the pages of docs/, every notebook as it is stored, a reference of the library.

    python tools/build_docs.py                      _site/index.html
    python tools/build_docs.py --out D --work W     elsewhere

Nothing is executed. Three JavaScript libraries come from npm once and are kept in the work folder; without npm, maths
shows as text and widgets stay away. Warnings of Sphinx and broken links are errors.
"""
import argparse
import base64
import hashlib
import html
import importlib
import inspect
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from fastcore.docments import docments
from jupyter_core.paths import jupyter_path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "data/README.md"]
FOLDERS = {"runs": "Runs", "explore": "Explorers", "fire": "Wildfire", "precipitation": "Rain", "segmentation": "Land cover",
           "learn": "Learning", "nn": "Networks", "geo": "Places", "": "Ground floor and commands"}
# What pages need in the browser: package, SHA-256 of its archive, the file in it, its name on the site.
SCRIPTS = [
    ("mathjax@3.2.2", "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09", "es5/tex-svg-full.js", "mathjax.js"),
    ("requirejs@2.3.8", "777158e89275e16bd51aec3ef714fbcb5dc45789e7078659933bc814916d7dec", "require.js", "require.js"),
    ("@jupyter-widgets/html-manager@1.0.15", "2b9d65cb7913e1c7d671757a10008b32c9c2448d4429513371e55c07d6107638", "dist/embed-amd.js", "embed-amd.js"),
]
LINK = re.compile(r"(\]\(|^:link: |^:img-top: |^```\{(?:image|figure)\} )([^)#\s]+)(#[^)\s]*)?", re.M)
FIGURE = re.compile(r"([^\s(]+\.ipynb)#figure-(\d+)")


# --- Where a file of the repository stands on the site

def place(path: str) -> str:
    "Return the place of a file on the site: docs/ is its root, and the numbers of notebooks go."
    return re.sub(r"(^|/)\d\d_(?=[^/]*\.ipynb$)", r"\1", re.sub(r"^docs/", "", path))


def picture(notebook: str, number: int) -> str:
    "Return the place of a notebook's figure."
    return f"figures/{Path(place(notebook)).relative_to('nbs').with_suffix('')}-{number}.png"


def absolute(target: str, here: str) -> str:
    "Return the path in the repository of what the page `here` calls `target`."
    return os.path.normpath(os.path.join(os.path.dirname(here), target))


def relink(text: str, here: str) -> str:
    "Return the markdown of a page with its local links as they lead on the site."
    def mend(link):
        before, target, anchor = link.groups("")
        if re.match(r"\w+:", target): return link[0]
        there, figure = absolute(target, here), FIGURE.fullmatch(target + anchor)
        new, anchor = (picture(there, int(figure[2])), "") if figure else (place(there), anchor)
        new = os.path.relpath(new, os.path.dirname(place(here)) or ".")
        return before + (re.sub(r"\.(md|ipynb)$", "", new) if before == ":link: " else new) + anchor
    return LINK.sub(mend, text)


# --- Notebooks

@cache
def read(path: str) -> dict:
    "Read a notebook of the repository. The picture of a canvas that was drawn before anybody saw it gets what its widget needs to show it."
    nb = json.loads((ROOT/path).read_text(encoding="utf-8"))
    for canvas in canvases(nb):
        data = base64.b64decode(canvas["_data_url"].rpartition(",")[2])
        canvas["_data_url"] = "data:image/png;base64," + base64.b64encode(data).decode()
        if not any(canvas["_size"]): canvas["_size"] = struct.unpack(">II", data[16:24])
    return nb


def notebooks() -> list[str]:
    "List the notebooks in reading order."
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def source(cell: dict) -> str: return "".join(cell["source"])


def heading(path: str) -> tuple[str, str]:
    "Return a notebook's title and its promise."
    text = source(read(path)["cells"][0])
    return re.search(r"^# (.+)", text, re.M)[1], re.search(r"^> (.+)", text, re.M)[1]


def module_of(path: str) -> str:
    "Return the module that a notebook exports to, or nothing."
    found = re.search(r"^#\|\s*default_exp (\S+)", "\n".join(source(c) for c in read(path)["cells"] if c["cell_type"] == "code"), re.M)
    return f"geoforecast.{found[1]}" if found else ""


def canvases(nb: dict) -> list[dict]:
    "Return the saved states of the figures in a notebook's widgets."
    states = nb["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    return [w["state"] for w in states.values() if w["state"].get("_data_url")]


def figures(path: str) -> list[bytes]:
    "Return the pictures that a notebook shows, those of figures in widgets last."
    nb = read(path)
    shown = [o["data"][k] for c in nb["cells"] for o in c.get("outputs", []) for k in ("image/png", "image/jpeg") if k in o.get("data", {})]
    return [base64.b64decode("".join(s)) for s in [*shown, *(c["_data_url"].partition(",")[2] for c in canvases(nb))]]


def plain(cell: dict, here: str) -> dict | None:
    "Return a cell without nbdev's directives, doing as they say; nothing where it is hidden or empty."
    if cell["cell_type"] != "code": return cell | {"source": link_names(relink(source(cell), here), module_of(here))}
    said = dict(re.findall(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", source(cell), re.M))
    text = re.sub(r"^#\|.*\n?", "", source(cell), flags=re.M).strip("\n")
    if "hide" in said or not (text or cell["outputs"]): return None
    tags = ["in-library"]*("export" in said) + ["remove-input"]*(said.get("echo") == "false")
    shown = {"mystnb": {"image": {"alt": said["fig-alt"]}}} if "fig-alt" in said else {}
    return cell | {"source": text, "metadata": {"tags": tags} | shown}


def page(path: str) -> dict:
    "Return a notebook as the site shows it; the first cell of a module's notebook leads to its reference."
    cells = [plain(c, path) for c in read(path)["cells"]]
    if module := module_of(path):
        up = os.path.relpath("reference", os.path.dirname(place(path)))
        cells[0]["source"] += f"\n\nIn the library: [`{module}`]({up}/{module}.md)"
    if path == "nbs/index.ipynb":
        cells[0]["source"] = cells[0]["source"].replace("# geoforecast", "# Notebooks", 1)
        cells.append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": contents()})
    return read(path) | {"cells": [c for c in cells if c]}


def contents() -> str:
    "Return the table of contents of the notebooks, one a folder."
    def entries(folder): return [place(p).removeprefix("nbs/") for p in notebooks() if Path(p).parent == Path("nbs", folder) and p != "nbs/index.ipynb"]
    return "\n\n".join(toctree(entries(folder), caption) for folder, caption in FOLDERS.items())


def toctree(entries: list[str], caption: str = "") -> str:
    "Return a hidden table of contents."
    return "\n".join(["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *entries, "```"])


# --- Reference

@cache
def modules() -> dict[str, str]:
    "Return the modules of the library with the notebooks that make them, from the ground up."
    return {module_of(p): p for p in notebooks() if module_of(p)}


@cache
def names() -> dict[str, list[str]]:
    "Return every public name with the modules that have it."
    found = {}
    for module in modules():
        for name in importlib.import_module(module).__all__: found.setdefault(name, []).append(module)
    return found


def link_names(text: str, own: str = "") -> str:
    "Turn public names in backticks, outside blocks of code, into links to the reference; those of the module `own` go first."
    def mend(span):
        found = names().get(span[1], [])
        module = own if own in found else found[0] if len(found) == 1 else ""
        return f"{{py:obj}}`{span[1]}{span[2]} <{module}.{span[1]}>`" if module else span[0]
    blocks = re.split(r"(^```(?!`).*?^```$)", text, flags=re.M | re.S)
    return "".join(b if re.match("```[^`]", b) else re.sub(r"(?<![`\[}])`(\w+)((?:\([^`<>\n]*\))?)`(?![`\]])", mend, b) for b in blocks)


def text_of(value) -> str:
    "Return a default as a reader writes it."
    written = value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value)
    return written if len(written) < 60 and " at 0x" not in written else "..."


def signature(thing, name: str) -> str:
    "Return a signature without types, which stand in the table."
    parts, star = [], False
    for p in parameters(thing):
        if p.kind is p.KEYWORD_ONLY and not star: parts.append("*")
        star = star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        parts.append({p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name + ("" if p.default is p.empty else f"={text_of(p.default)}"))
    return f"{name}({', '.join(parts)})"


def parameters(thing) -> list[inspect.Parameter]:
    "Return the parameters that a caller gives."
    try: found = list(inspect.signature(thing).parameters.values())
    except (TypeError, ValueError): return []
    return [p for p in found if p.name not in ("self", "cls")]


def table(thing) -> str:
    "Return the parameters of a function or class and what it gives, with types, defaults and meanings."
    def kind(annotation):
        written = "" if annotation in (inspect.Parameter.empty, None) else inspect.formatannotation(annotation).strip("'\"")
        return f"`{re.sub(r'(?:[a-zA-Z_]+[.])+(?=[a-zA-Z_])', '', written)}`" if written else ""
    notes = docments(thing, full=True)
    def note(name): return " ".join((notes.get(name, {}).get("docment") or "").split())
    rows = [(f"**{p.name}**", kind(p.annotation), "" if p.default is p.empty else f"`{text_of(p.default)}`", note(p.name)) for p in parameters(thing)]
    if not inspect.isclass(thing) and (note("return") or "return" in getattr(thing, "__annotations__", {})):
        rows.append(("*returns*", kind(inspect.signature(thing).return_annotation), "", note("return")))
    if not rows: return ""
    body = ["| " + " | ".join(c.replace("|", "\\|") for c in r) + " |" for r in rows]
    return "\n".join(["| parameter | type | default | meaning |", "|---|---|---|---|", *body])


def entry(kind: str, signed: str, doc: str | None, rows: str = "", fence: str = "````", inner: list[str] = []) -> str:
    "Return one object of the reference, with what belongs to it."
    return "\n".join([f"{fence}{{py:{kind}}} {signed}", "", inspect.cleandoc(doc or ""), "", rows, "", *inner, fence, ""])


def describe(name: str, thing) -> str:
    "Return the reference of a public name: a function, a class with its methods, or a value."
    if not (inspect.isroutine(thing) or inspect.isclass(thing)): return entry("data", name, f"`{type(thing).__name__}`" + (f", `{text_of(thing)}`" if text_of(thing) != "..." else ""))
    if not inspect.isclass(thing): return entry("function", signature(thing, name), thing.__doc__, table(thing))
    inner = []
    for method, member in vars(thing).items():
        bare = getattr(member, "__func__", member)
        if method.startswith("_") or not getattr(bare, "__doc__", None): continue
        if inspect.isfunction(bare): inner.append(entry("method", signature(bare, method), bare.__doc__, table(bare)))
        elif isinstance(member, property): inner.append(entry("property", method, member.__doc__))
    return entry("class", signature(thing, name), vars(thing).get("__doc__"), table(thing), "`````", inner)


def reference(module: str) -> str:
    "Return the page of a module."
    loaded, notebook = importlib.import_module(module), modules()[module]
    title, promise = heading(notebook)
    head = f"# {module.removeprefix('geoforecast.')}\n\n{promise}\n\nMade in the notebook [{title}](../{place(notebook)}).\n\n```{{py:module}} {module}\n```\n"
    return link_names("\n".join([head, *(describe(n, getattr(loaded, n)) for n in loaded.__all__)]), module)


def reference_index() -> str:
    "Return the list of modules."
    rows = [f"| [`{m}`]({m}.md) | {heading(p)[1]} |" for m, p in modules().items()]
    return "\n".join(["# Reference", "", "Every public function and class, by module.", "", "| module | |", "|---|---|", *rows, "", toctree(list(modules()))])


# --- What Sphinx reads

def stage(folder: Path) -> None:
    "Write everything that Sphinx reads into `folder`; what did not change keeps its time, so that only the rest is built anew."
    docs = [p.relative_to(ROOT).as_posix() for p in (ROOT/"docs").rglob("*") if p.is_file()]
    files = {place(p): (ROOT/p).read_bytes() for p in [*PAGES, *docs] if not p.endswith(".md")}
    texts = {p: (ROOT/p).read_text(encoding="utf-8") for p in [*PAGES, *docs] if p.endswith(".md")}
    files |= {place(p): link_names(relink(t, p)) for p, t in texts.items()}
    files |= {picture(n, int(i)): figures(n)[int(i) - 1] for p, t in texts.items() for f, i in FIGURE.findall(t) for n in [absolute(f, p)]}
    files["gallery.md"] = re.sub(r"<!-- (\w+) -->", lambda m: cards(m[1]), files["gallery.md"])
    for p in notebooks():
        files[place(p)] = json.dumps(page(p))
        if Path(p).parent.name in ("runs", "explore") and figures(p): files[picture(p, len(figures(p)))] = figures(p)[-1]
    files |= {f"reference/{m}.md": reference(m) for m in modules()} | {"reference/index.md": reference_index()}
    old = {p for p in folder.rglob("*") if p.is_file() and "assets" not in p.parts}
    for name, data in files.items(): write(folder/name, data if isinstance(data, bytes) else data.encode())
    for path in old - {folder/n for n in files}: path.unlink()


def write(path: Path, data: bytes) -> None:
    "Write a file unless it holds that already."
    if path.is_file() and path.read_bytes() == data: return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def cards(folder: str) -> str:
    "Return the notebooks of a folder as cards with title, promise and last picture."
    made = []
    for p in (n for n in notebooks() if Path(n).parent.name == folder):
        title, promise = heading(p)
        shown = [f":img-top: {picture(p, len(figures(p)))}", f":img-alt: The last figure of: {title}"] if figures(p) else []
        link = [f":link: {place(p).removesuffix('.ipynb')}", ":link-type: doc"]
        made.append("\n".join([f":::{{grid-item-card}} {title}", *link, *shown, promise, ":::"]))
    return "" if not made else "\n\n".join(["::::{grid} 1 2 2 2\n:gutter: 3", *made, "::::"])


def fetch(folder: Path, archives: Path) -> list[str]:
    "Put the scripts into `folder`, from npm where they are not kept yet; return what could not be had."
    missing = []
    archives.mkdir(parents=True, exist_ok=True)
    for package, digest, member, name in SCRIPTS:
        archive = archives/(package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
        if not archive.is_file() and shutil.which("npm"): subprocess.run(["npm", "pack", "--silent", package], cwd=archives, capture_output=True)
        good = archive.is_file() and hashlib.sha256(archive.read_bytes()).hexdigest() == digest
        if not good: missing.append(package)
        write(folder/name, tarfile.open(archive).extractfile(f"package/{member}").read() if good else b"// not fetched: npm is missing or has no network")
    canvas = [p for d in jupyter_path("nbextensions") if (p := Path(d, "jupyter-matplotlib", "index.js")).is_file()]
    write(folder/"jupyter-matplotlib.js", canvas[0].read_bytes())
    return missing


# --- What is wrong with the result

def broken_links(site: Path) -> list[str]:
    "List the links and pictures of the pages that lead to no file or to no place in it, and whatever loads from another host."
    pages = {p: re.sub(r"(<script\b[^>]*>).*?</script>", r"\1", p.read_text(encoding="utf-8"), flags=re.S) for p in site.rglob("*.html") if "_static" not in p.parts}
    anchors = {p: set(re.findall(r'\bid="([^"]+)"', text)) | {"", "top"} for p, text in pages.items()}
    found = []
    for here, text in pages.items():
        found += [f"{here.relative_to(site)}: loads {m}" for m in re.findall(r'<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]+)"', text)]
        for link in set(re.findall(r'\b(?:href|src)="([^"]*)"', text)):
            if re.match(r"[a-z]+:|//", link) or link == "#papermill-error-cell": continue # papermill's, in the notebook that failed
            target, _, anchor = unquote(html.unescape(link)).partition("#")
            there = Path(os.path.normpath(here.parent/target.split("?")[0])) if target else here
            if not there.is_file() or there in anchors and anchor not in anchors[there]: found.append(f"{here.relative_to(site)}: {link}")
    return found


def main() -> int:
    "Build the site and return the exit status."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT/"_site", help="the site")
    parser.add_argument("--work", type=Path, default=ROOT/"build"/"docs", help="what is kept from one build to the next")
    args = parser.parse_args()
    stage(args.work/"source")
    site = args.work/"html"/"site"
    for package in fetch(args.work/"source"/"_static"/"assets", args.work/"npm"): print(f"warning: {package} could not be fetched with npm")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "auto", "-d", args.work/"doctrees", args.work/"source", site]
    warned, broken = subprocess.run(list(map(str, command))).returncode, broken_links(site)
    if warned: shutil.rmtree(args.work/"doctrees") # so that the next build says it again
    shutil.rmtree(args.out, ignore_errors=True)
    shutil.copytree(site, args.out)
    if broken: print("broken links:", *broken, sep="\n  ")
    print(f"{args.out/'index.html'}: {len(list(args.out.rglob('*.html')))} pages, {len(broken)} broken links{', warnings above' if warned else ''}")
    return int(bool(warned or broken))


if __name__ == "__main__": sys.exit(main())
