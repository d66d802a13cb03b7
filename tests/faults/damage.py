"""Damage a good file in many ways and see how each ends: right, or refused in one clear line.

Every trial runs in a worker process that imports the library once, so that a crash of the interpreter, a hang or an allocation of
absurd size is one bad ending and not the end of the tests.
"""
import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

SECONDS, PATIENCE, MEMORY = 30, 300, 6*2**30  # A trial may compute this long, wait this long on a machine with other work, and map this much
GOOD = ("right", "refused")
HANGS = (signal.SIGPROF, signal.SIGALRM)


def random_damage(content: bytes, seed: int) -> tuple[str, bytes]:
    "Return a name and the bytes of one random damage: cut, flipped, overwritten, doubled, dropped or exchanged."
    rng = np.random.default_rng(seed)
    kind = ("cut", "flip", "flips", "zeros", "noise", "dropped", "doubled", "swapped", "head", "tail")[seed % 10]
    n, data = len(content), bytearray(content)
    at, other = sorted(int(i) for i in rng.integers(0, n, 2))
    span = int(rng.integers(1, max(2, min(4096, n//4))))
    head = min(n, 2048)
    if kind == "cut": data = data[:at]
    if kind == "flip": data[at] ^= 1 << int(rng.integers(8))
    if kind == "flips":
        for i in rng.integers(0, n, 64): data[i] ^= int(rng.integers(1, 256))
    if kind == "zeros": data[at:at + span] = bytes(len(data[at:at + span]))
    if kind == "noise": data[at:at + span] = rng.bytes(len(data[at:at + span]))
    if kind == "dropped": del data[at:at + span]
    if kind == "doubled": data[at:at] = data[at:at + span]
    if kind == "swapped": data[at:at + span], data[other:other + span] = data[other:other + span], data[at:at + span]
    if kind == "head":
        for i in rng.integers(0, head, 8): data[i] ^= int(rng.integers(1, 256))
    if kind == "tail":
        for i in rng.integers(n - head, n, 8): data[i] ^= int(rng.integers(1, 256))
    return f"{kind} {seed}", bytes(data)


def digest(*arrays) -> str:
    "Return what stands for the values of arrays, NaN included."
    total = hashlib.sha256()
    for a in arrays: total.update(np.ascontiguousarray(a).tobytes())
    return total.hexdigest()


def _ended(use, path):
    "Return how the use of a file ended, and what it said."
    from geoforecast.core import GeoforecastError
    try: found = use(path)
    except GeoforecastError as e:
        text = str(e)
        if "\n" in text or len(text) > 700: return "unreadable", text
        return ("refused", text) if path.name in text or str(path) in text else ("nameless", text)
    except MemoryError as e: return "memory", repr(e)
    except Exception as e: return "traceback", f"{type(e).__name__}: {e}"
    return ("right", "") if found is None else ("wrong", str(found))


def _work(use, pipe, preload):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in HANGS: signal.signal(number, signal.SIG_DFL)  # pytest-timeout has a handler of its own, which would wait for Python's next instruction
    tempfile.tempdir = None
    if "torch" in sys.modules: sys.modules["torch"].set_num_threads(1)  # threads do not survive a fork
    preload()
    while (path := pipe.recv()) is not None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(PATIENCE)
        ended = _ended(use, path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        pipe.send(ended)


class Judge:
    """Try files one after another in a process of its own and keep how each ended.

    `use(path)` reads the file as a user's command would, raises what that raises, and returns None where the answer is right, else what is wrong.
    """
    def __init__(self, use: Callable[[Path], object], preload: Callable[[], object] = lambda: None):
        self.use, self.preload, self.process, self.endings, self.bad = use, preload, None, Counter(), []

    def _start(self):
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(self.use, theirs, self.preload), daemon=True)
        self.process.start()
        theirs.close()

    def try_file(self, name: str, path: Path) -> str:
        "Use a file and note how it ended."
        if self.process is None: self._start()
        self.pipe.send(path)
        try: ending, text = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            ending, text = "hang" if -self.process.exitcode in HANGS else "crash", f"exit code {self.process.exitcode}"
            self.process = None
        self.endings[ending] += 1
        if ending not in GOOD: self.bad.append((name, ending, text))
        return ending

    def try_all(self, good: Path, cases: Iterable[tuple[str, bytes]]):
        "Use files that hold the bytes of `cases` under the name of the good one, each a new file: netCDF4 may leave one that it cannot read open, and HDF5 would read on in it."
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)/good.name
            for name, content in cases:
                path.unlink(missing_ok=True)
                path.write_bytes(content)
                self.try_file(name, path)

    def close(self):
        if self.process is not None: self.pipe.send(None); self.process.join()
        self.process = None

    def report(self, limit: int = 20) -> str:
        "Say what ended badly."
        return "\n".join(f"{ending:11} {name}: {text[:300]}" for name, ending, text in self.bad[:limit]) + f"\n{dict(self.endings)}"


def copied(good: Path, folder: Path) -> Path:
    "Copy a file or folder to damage into an empty folder, and return the copy."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Path(shutil.copytree(good, folder/good.name)) if good.is_dir() else Path(shutil.copy2(good, folder/good.name))


def each(cases: Iterable, judge_one: Callable[[object], str], ledger: Callable, kind: str):
    "Judge each case of a table, and tell of all that end badly."
    bad, endings = [], Counter()
    for name in cases:
        try: endings[judge_one(name)] += 1
        except Exception as e: bad.append(f"{getattr(name, '__name__', name)}: {type(e).__name__} {e}")
    ledger(kind, len(cases), **endings)
    assert not bad, "\n".join(bad)


def refused(use: Callable[[], object], *names: str) -> str:
    "What a refusal says, which must be one line that holds one of the names."
    from geoforecast.core import DataError
    try: found = use()
    except DataError as e: said = str(e)
    else: raise AssertionError(f"was taken: {found}")
    assert "\n" not in said and len(said) < 700 and any(n in said for n in names), said
    return said
