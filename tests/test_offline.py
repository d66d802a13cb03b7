"Drawing maps opens no connection, even where cartopy has never downloaded anything."
import os
import subprocess
import sys

PREPARE = """
import socket, tempfile, urllib.request

def refuse(*args, **kwargs): raise AssertionError(f'a connection was tried: {args}')

for name in ('socket', 'create_connection', 'getaddrinfo'): setattr(socket, name, refuse)
urllib.request.urlopen = refuse

import cartopy, matplotlib, numpy as np
cartopy.config['data_dir'] = cartopy.config['pre_existing_data_dir'] = tempfile.mkdtemp()
matplotlib.use('agg')
import cartopy.crs as ccrs
import matplotlib.pyplot as plt
from geoforecast.geo.grid import Grid
from geoforecast.geo.io import georeference
from geoforecast.geo.maps import *
"""

PLACES = {
    "fire": "grid, projection = Grid('EPSG:32611', (375, 0, 268875, 0, -375, 4164375), 40, 50), None",
    "fire outside its zone": "grid, projection = Grid('EPSG:32611', (375, 0, 1268875, 0, -375, 4164375), 40, 50), None",
    "fire in degrees": "grid, projection = Grid('EPSG:32611', (375, 0, 268875, 0, -375, 4164375), 40, 50), ccrs.PlateCarree()",
    "Lambert without a code": "import pyproj; grid, projection = Grid(pyproj.CRS('+proj=laea +lat_0=46 +lon_0=8 +units=m').to_wkt(), (1000, 0, -2e4, 0, -1000, 2e4), 40, 50), None",
    "region": "grid, projection = Grid('EPSG:4326', (1, 0, 70, 0, 1, 10), 40, 50), None",
    "region across the seam": "grid, projection = Grid('EPSG:4326', (1, 0, 160, 0, -1, 10), 40, 50), None",
    "world from Greenwich": "grid, projection = Grid('EPSG:4326', (5, 0, 0, 0, -5, 90), 36, 72), None",
    "world, Robinson": "grid, projection = Grid('EPSG:4326', (5, 0, -180, 0, -5, 90), 36, 72), ccrs.Robinson()",
    "polar": "grid, projection = Grid('EPSG:3413', (25000, 0, -5e5, 0, -25000, 5e5), 40, 40), None",
}

STEPS = """
values = np.random.default_rng(0).random(grid.shape)
field = georeference(values, grid, ('y', 'x'), name='probability', attrs=dict(units='1'))
fig, ax = map_axes(grid, projection)
terrain_shading(ax, 1000*field)
draw_field(ax, field)
draw_outline(ax, field > .9)
lines = draw_coastlines(ax)
if projection is None: draw_scale_bar(ax)
draw_locator(ax)
draw_box(ax, grid.extent_lonlat, 'all')
with tempfile.TemporaryFile() as f: fig.savefig(f, dpi=50); assert f.tell() > 5000
plt.close(fig)
"""


def run(code, tmp_path):
    env = os.environ | dict(CARTOPY_DATA_DIR=str(tmp_path), OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, "-c", PREPARE + code], capture_output=True, text=True, env=env, timeout=600)


def test_maps_are_drawn_without_a_network(tmp_path):
    code = "".join(f"print({place!r}, flush=True)\n{setting}\n{STEPS}" for place, setting in PLACES.items())
    done = run(code, tmp_path)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}: {done.stderr[-2000:]}"


def test_cartopys_own_coastlines_would_be_noticed(tmp_path):
    done = run("ax = plt.axes(projection=ccrs.PlateCarree()); ax.coastlines('10m'); plt.savefig('/dev/null', format='png')", tmp_path)
    assert done.returncode != 0 and "a connection was tried" in done.stderr
