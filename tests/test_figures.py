"Figures stored in the notebooks: each is told to a reader who cannot see it, and a notebook has few and light ones."
import json
import re
from pathlib import Path

from test_frame import ROOT, notebooks

TEXT_LENGTH = range(40, 301) # characters: a sentence or three, read aloud before the page goes on
FIGURES, SIZE = 6, 600_000 # at most in a notebook: pictures, bytes
HEAD = re.compile(r"(?:#\|.*\n)*") # the directives that a cell begins with
ALT_TEXT = re.compile(r"^#\| fig-alt: (.*)$", re.M)


def pictures(cell: dict) -> int:
    "Return how many pictures a cell holds among its outputs."
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def cells_with_pictures(notebook: Path) -> list[dict]:
    return [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if pictures(c)]


def alt_texts(cell: dict) -> list[str]:
    "Return the alt texts among the directives at the head of a cell."
    return ALT_TEXT.findall(HEAD.match("".join(cell["source"]))[0])


def name(notebook: Path) -> str:
    return notebook.relative_to(ROOT).as_posix()


def test_alt_texts_stand_at_the_head_of_a_cell():
    def found(source): return alt_texts({"source": source.splitlines(keepends=True)})
    assert found("#| fig-alt: A line that falls\nplot()") == found("#| echo: false\n#| fig-alt: A line that falls\n\nplot()") == ["A line that falls"]
    assert found("plot()\n#| fig-alt: A line that falls\n") == found("# fig-alt: A line that falls\nplot()") == []


def test_every_figure_has_an_alt_text():
    texts = {f"{name(n)}, cell {c['id']}": alt_texts(c) for n in notebooks() for c in cells_with_pictures(n)}
    wrong = {where: t for where, t in texts.items() if len(t) != 1 or len(t[0].strip()) not in TEXT_LENGTH}
    assert not wrong, f"{', '.join(wrong)}: begin each with one line '#| fig-alt: …': kind, axes with units, what is seen, in {TEXT_LENGTH[0]} to {TEXT_LENGTH[-1]} characters"


def test_no_two_figures_have_the_same_alt_text():
    said = [t for n in notebooks() for c in cells_with_pictures(n) for t in alt_texts(c)]
    assert said and not {t for t in said if said.count(t) > 1}


def test_a_notebook_has_few_figures():
    counts = {name(n): sum(map(pictures, cells_with_pictures(n))) for n in notebooks()}
    assert not {n: count for n, count in counts.items() if count > FIGURES}


def test_notebooks_are_light():
    heavy = {name(n): n.stat().st_size for n in notebooks() if n.stat().st_size > SIZE}
    assert not heavy, f"bytes, of at most {SIZE}: fewer or smaller figures"
