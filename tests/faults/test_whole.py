"A disk that fills while a file is written: an error, the old file untouched, and nothing left behind."
import subprocess
import sys
import pytest

CODE = """
import resource, sys
from pathlib import Path
import numpy as np
from geoforecast.geo.grid import Grid
from geoforecast.geo.io import georeference, write_geotiff, write_netcdf, write_zarr

folder, name = Path(sys.argv[1]), sys.argv[2]
write = dict(tif=write_geotiff, nc=write_netcdf, zarr=write_zarr)[name]
grid = Grid('EPSG:32611', (375, 0, 300000, 0, -375, 4125000), 400, 400)
field = georeference(np.random.default_rng(0).random((4, 400, 400)), grid, ('band', 'y', 'x'), name='noise')
write(folder/f'field.{name}', 0*field)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: write(folder/f'field.{name}', field)
except Exception as e: print('refused:', type(e).__name__, e)
else: print('written')
"""


@pytest.mark.parametrize("name", ["tif", "nc", "zarr"])
def test_a_full_disk_leaves_the_old_file(name, tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path), name], capture_output=True, text=True, timeout=300)
    assert "refused:" in done.stdout, done.stdout + done.stderr
    assert [p.name for p in tmp_path.iterdir()] == [f"field.{name}"]
    from geoforecast.geo.io import read_geotiff, read_netcdf, read_zarr
    old = dict(tif=read_geotiff, nc=read_netcdf, zarr=read_zarr)[name](tmp_path / f"field.{name}")
    assert not (old if name == "tif" else old.noise).any()
