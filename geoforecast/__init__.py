"Forecasts of wildfire spread, land cover and regional rain."

__version__ = "0.1.0"
