"Time things side by side: turn by turn in one process, so that a machine that slows down slows all of them."
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def interleaved(
    functions: dict[str, Callable[[], object]],  # What to time, by name
    repeats: int = 9,  # Rounds; each calls every function once, in turning order
    warmup: int = 2,  # Rounds that do not count
) -> dict[str, list[float]]:  # Seconds of each round
    "Call the functions turn by turn and return their wall times."
    names, seconds = list(functions), {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        for i in range(warmup + repeats):
            for name in names[i % len(names):] + names[:i % len(names)]:
                start = time.perf_counter()
                functions[name]()
                if i >= warmup: seconds[name].append(time.perf_counter() - start)
    finally: gc.enable()
    return seconds


def ratio(
    slow: list[float],  # Seconds a round
    fast: list[float],  # Of the same rounds
) -> dict:  # `value`, the median over rounds of slow/fast, and the quartiles `lo` and `hi`
    "Say how many times faster `fast` is, round by round."
    lo, value, hi = statistics.quantiles([a/b for a, b in zip(slow, fast)], n=4, method="inclusive")
    return dict(value=value, lo=lo, hi=hi)


def row(
    suite: str,  # Name of the suite
    what: str,  # What was compared, in words
    aim: str,  # Such as `>= 1.2` or `<= 0.15`; empty where none is set
    value: float,  # What was measured
    lo: float | None = None,  # Quartiles over the rounds
    hi: float | None = None,
    unit: str = "times the plain one's rate",
) -> dict:  # One line of the table and of the JSON
    "Set a measurement beside its aim."
    sign, _, bound = aim.partition(" ")
    reached = None if not aim else value >= float(bound) if sign == ">=" else value <= float(bound)
    return dict(suite=suite, what=what, value=value, lo=lo, hi=hi, unit=unit, aim=aim, reached=reached)


MARK = """
def mark():
    import gc, os, timing
    gc.collect()
    print(timing.held(os.getpid()), flush=True)
"""


def held(
    process: int,  # Its number
) -> int:  # Bytes, without pages of files, which the system takes back; 0 where it has ended
    "Return the memory that a process holds, on Linux."
    return next((int(line.split()[1])*1024 for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("RssAnon")), 0)


def peak(
    script: str,  # Python that imports, calls `mark()` and does its work; modules beside this one can be imported
) -> int:  # Bytes
    "Run a script in a fresh process, watched by this one, and return its peak memory beyond that at `mark()`."
    environment = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]))
    with subprocess.Popen([sys.executable, "-c", f"{MARK}\n{script}"], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent, env=environment) as child:
        before = most = int(child.stdout.readline())
        while child.poll() is None:
            most = max(most, held(child.pid))
            time.sleep(.0005)
    if child.returncode: raise subprocess.CalledProcessError(child.returncode, child.args)
    return most - before
