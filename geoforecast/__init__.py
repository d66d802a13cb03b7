"Forecasts of wildfire spread, land cover and regional rain."

import os

__version__ = "0.1.0"

# Where the system can, torch then takes large tensors in pages of 2 MB: asked for page by page they cost more than what is computed in them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# GDAL keeps blocks of the images it reads and writes, up to a twentieth of the machine's memory unless told otherwise before it opens the first, in MB.
os.environ.setdefault("GDAL_CACHEMAX", "64")
