"What an attacker would make: payloads that leave a mark where they run, and a child with little memory in which files are opened."
import hashlib
import multiprocessing
import pickle
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from geoforecast.core import GeoforecastError

MEMORY, SECONDS = 2*2**30, 5 # What opening a file may take beyond what the library itself takes, and how much of a processor's time


class Payload:
    "Leave a mark when it is unpickled."
    def __init__(self, mark: Path): self.mark = mark
    def __reduce__(self): return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def pickled(mark: Path) -> bytes:
    "Return a pickle that leaves a mark; it is tried first."
    content = pickle.dumps(Payload(mark))
    pickle.loads(content)
    assert mark.exists(), "the payload does nothing, so that the test could not fail"
    mark.unlink()
    return content


def trap(folder: Path, mark: Path, monkeypatch, name: str = "foreignmodule") -> str:
    "Put a module where Python finds it, which leaves a mark when it is imported; it is tried first. Return the path of a class in it."
    (folder/f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\nfrom torch import nn\nclass Net(nn.Module): pass\ndef call(*args): return Net()\n")
    monkeypatch.syspath_prepend(folder)
    forget(name)
    __import__(name)
    assert mark.exists()
    mark.unlink()
    forget(name)
    return f"{name}.Net"


def forget(name: str = "foreignmodule"): sys.modules.pop(name, None)


def signed(bundle: Path):
    "Write the checksums of a bundle anew, as whoever changed it would."
    (bundle/"SHA256SUMS").write_text("".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(bundle.iterdir()) if p.suffix in (".safetensors", ".yaml", ".json")))


def refusal(action: Callable, *words: str) -> str:
    "Return the one line with which an action is refused."
    try: found = action()
    except GeoforecastError as e:
        text = str(e)
        assert "\n" not in text and text.isprintable() and len(text) <= 700, text
        for word in words: assert word in text, f"{word!r} is not in: {text}"
        return text
    raise AssertionError(f"not refused: {found!r}")


def _child(action, path, pipe):
    grown = 4096*int(Path("/proc/self/statm").read_text().split()[0]) + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (grown, grown))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (6*SECONDS, 6*SECONDS))
    start = time.process_time()
    try: action(path); ending = "right", ""
    except GeoforecastError as e: ending = "refused", str(e)
    except BaseException as e: ending = type(e).__name__, str(e)[:300]
    pipe.send((*ending, time.process_time() - start))


def in_child(action: Callable[[Path], object], path: Path) -> tuple[str, str, float]:
    "Open a file in a process with little memory; return how that ended, what it said, and the seconds of processor time it took."
    context = multiprocessing.get_context("fork")
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(action, path, theirs), daemon=True)
    process.start()
    theirs.close()
    ending = ("hang", "", float(SECONDS))
    if pipe.poll(30*SECONDS): # the machine may be busy
        try: ending = pipe.recv()
        except EOFError: ending = ("crash", "", 0.)
    process.kill()
    process.join()
    return ending


def refused_in_child(action: Callable[[Path], object], path: Path, *words: str) -> str:
    "Assert that opening a file is refused in one line that names it, in a few seconds and with little memory."
    ending, text, seconds = in_child(action, path)
    assert ending == "refused" and seconds < SECONDS, (ending, text, seconds)
    assert path.name in text and text.isprintable() and len(text) <= 700, text
    for word in words: assert word in text, f"{word!r} is not in: {text}"
    return text


def snapshot(folder: Path) -> dict:
    "Return every file below a folder and what it holds."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def detections(rows: int = 6, columns: int = 7, days: int = 8) -> np.ndarray:
    "Bands of a fire that burns a little every day."
    data = np.ones((days, 23, rows, columns), np.float32)
    data[:, 22] = 0
    for t in range(days): data[t, 22, 1:3, 1:3 + t//3] = 13.5
    return data
