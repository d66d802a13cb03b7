"What all tests share: the size of the trials with faults, and the table of how they ended."
import pytest


def pytest_addoption(parser):
    parser.addoption("--many", action="store_true", help="trials with faults at full size: 100 kills, thousands of damaged files")


def pytest_collection_modifyitems(config, items):
    "A hundred kills on a machine with other work outlast the limit of a test; a hang ends by the limits of its own trial."
    if config.getoption("--many"):
        for item in items: item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def many(request) -> bool:
    "Whether trials with faults run at full size."
    return request.config.getoption("--many")


@pytest.fixture
def ledger(request):
    "Give a function that notes how many trials of a kind were made, and how they ended, for the table after the tests."
    def note(kind: str, tried: int, **endings: int):
        request.node.user_properties.append(("faults", dict(kind=kind, tried=tried, **endings)))
    return note


def pytest_terminal_summary(terminalreporter):
    notes = [value for reports in terminalreporter.stats.values() for report in reports if getattr(report, "when", "") == "call"
             for name, value in report.user_properties if name == "faults"]
    if not notes: return
    terminalreporter.section("faults")
    for note in sorted(notes, key=lambda n: n["kind"]):
        endings = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in note.items() if name not in ("kind", "tried") and n)
        terminalreporter.write_line(f"{note['kind']:45} {note['tried']:6} tried: {endings}")
