"""Measure speed and memory beside plain implementations, print a table and store it.

    python tests/bench                                     every suite
    python tests/bench convlstm loading                    these suites
    python tests/bench --out docs/bench.json               where the documentation's figures come from

A suite is a module beside this file with `measure()`, which yields rows of `timing.row`, or a dict of a curve with the key `curve`.
Nothing here is a test: a slow machine fails nothing.
"""
import argparse
import importlib
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

SUITES = ("imports", "convlstm", "loading", "tiling", "memory", "cost")
LIBRARIES = ("torch", "lightning", "numpy", "xarray", "h5py", "rasterio", "geoforecast")


def machine() -> dict:
    "Describe what was measured on."
    import psutil
    import torch
    from torch.backends import cpu
    return dict(date=time.strftime("%F"), system=platform.platform(), python=platform.python_version(), processor=processor(), capability=cpu.get_cpu_capability(),
                cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), threads=torch.get_num_threads(),
                memory_gib=round(psutil.virtual_memory().total/2**30, 1), gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                versions={name: version(name) for name in LIBRARIES})


def processor() -> str:
    "Return the processor's name where the system tells."
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor()


def line(row: dict) -> str:
    "Write a row of the table."
    spread = f"[{row['lo']:.3g}, {row['hi']:.3g}]" if row["lo"] is not None else ""
    verdict = {True: "reached", False: "MISSED", None: ""}[row["reached"]]
    return f"{row['suite']:9} {row['what']:70} {row['value']:8.3g} {spread:18} {row['unit']:28} {row['aim']:8} {verdict}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench.json"), help="suites that are not measured keep what stands there")
    args = parser.parse_args()
    if unknown := set(args.suites) - set(SUITES): parser.error(f"no suite is called {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    from geoforecast.core import write_json
    kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.suites or SUITES:
        found = []
        for row in importlib.import_module(name).measure():
            found.append(row)
            print(line(row) if "what" in row else f"{name:9} curve: {row['curve']}", flush=True)
            kept[name] = dict(machine=machine(), rows=[r for r in found if "what" in r], curves=[r for r in found if "curve" in r])
            write_json(args.out, kept)  # what is measured stays where a suite is interrupted
    print(f"stored in {args.out}")


if __name__ == "__main__": main()
