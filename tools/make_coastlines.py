"""Make the coast and border lines that geoforecast.geo.maps draws, from Natural Earth.

Needs a network once: `npm pack world-atlas@2.0.2 && tar xzf world-atlas-2.0.2.tgz`, then
`python tools/make_coastlines.py package geoforecast/geo` writes natural_earth_110m.npz and natural_earth_50m.npz.

world-atlas (ISC licence) holds Natural Earth 4.1 (public domain) as TopoJSON: every line between two places is stored once, as an arc.
An arc that one country uses is coast, one that two countries use is a border. Points are whole numbers on a lattice of 1e5 steps,
and are kept as differences from point to point, which compress well: `np.cumsum(steps)*scale + origin` are degrees.
"""
import json
import sys
from collections import Counter
from pathlib import Path
import numpy as np


def arcs_of(geometry):
    "Yield the numbers of all arcs of a country; a negative number is the same arc walked backwards."
    def walk(item):
        if isinstance(item, int): yield item if item >= 0 else ~item
        else:
            for part in item: yield from walk(part)
    return walk(geometry.get("arcs", []))


def cut(line, width, seam):
    "Split an arc where it jumps over the antimeridian or runs along it or along the closing line at the South Pole."
    jump = np.abs(np.diff(line[:, 0])) > width / 2
    along = ((line[1:, 0] == line[:-1, 0]) & np.isin(line[1:, 0], (0, width))) | (line[1:, 1] <= seam) & (line[:-1, 1] <= seam)
    for piece in np.split(np.arange(len(line)), np.flatnonzero(jump | along) + 1):
        if len(piece) > 1: yield line[piece]


def decode(path):
    "Decode a TopoJSON file into {'coast': lines, 'border': lines} on its lattice, with the lattice's scale and origin."
    topology = json.loads(Path(path).read_text(encoding="utf-8"))
    scale, origin = (np.array(topology["transform"][k]) for k in ("scale", "translate"))
    users = Counter(arc for country in topology["objects"]["countries"]["geometries"] for arc in set(arcs_of(country)))
    lines = {"coast": [], "border": []}
    south = np.ceil((-89.9 - origin[1]) / scale[1])
    for number, arc in enumerate(topology["arcs"]):
        if users[number]: lines["coast" if users[number] == 1 else "border"] += cut(np.cumsum(arc, axis=0), round(360 / scale[0]), south)
    return lines, scale, origin


def main(source, target):
    for scale_name in ("110m", "50m"):
        lines, scale, origin = decode(Path(source) / f"countries-{scale_name}.json")
        arrays = dict(scale=scale, origin=origin)
        for kind, parts in lines.items():
            arrays[f"{kind}_steps"] = np.diff(np.concatenate(parts), axis=0, prepend=0).astype(np.int32)
            arrays[f"{kind}_lengths"] = np.array([len(p) for p in parts], np.int32)
        path = Path(target) / f"natural_earth_{scale_name}.npz"
        np.savez_compressed(path, **arrays)
        print(path, {k: len(v) for k, v in lines.items()}, f"{path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__": main(*sys.argv[1:3])
