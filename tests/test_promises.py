"The page of promises and the tests that it names belong together."
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent/"docs"/"promises.md").read_text(encoding="utf-8")


def written_in(folder): return {path: set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)) for path in folder.rglob("test_*.py")}


def test_each_promise_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 60 and not named - set().union(*written_in(TESTS).values())
    for path in re.findall(r"`(tests/\S+\.py)`", PAGE): assert (TESTS.parent/path).is_file()
    for line in PAGE.splitlines():
        if line.startswith("| ") and not line.startswith(("| promise", "| file")): assert "test" in line.split("|")[2], line


def test_each_file_of_faults_stands_on_the_page():
    for path, names in written_in(TESTS/"faults").items(): assert [n for n in names if f"`{n}`" in PAGE], path
