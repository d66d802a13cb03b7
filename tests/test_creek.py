"The Creek Fire of 2020: NASA's detections must give exactly the masks of a fire file made elsewhere. Skips where the data is absent."
import os
from pathlib import Path

import numpy as np
import pytest

from geoforecast.fire.detections import covered_days, detections_to_fire, read_detections
from geoforecast.fire.wsts import open_fire

DATA = Path(os.environ.get('GEOFORECAST_DATA', Path(__file__).parents[2]/'shared'/'data'))
POINTS, REFERENCE = DATA/'fire'/'creek2020_viirs', DATA/'fire'/'creek2020.hdf5'
pytestmark = pytest.mark.skipif(not (POINTS.is_dir() and REFERENCE.is_file()), reason='no Creek Fire under GEOFORECAST_DATA or ../shared/data')


@pytest.fixture(scope='module')
def fires(tmp_path_factory):
    return open_fire(detections_to_fire(POINTS, tmp_path_factory.mktemp('creek')/'creek.hdf5')), open_fire(REFERENCE)


def burning(fire, days):
    "Day and the coordinates of the centre of every fire pixel, whatever the extent of the grid."
    t, r, c = np.nonzero(fire.mask())
    return {(str(fire.dates[i]), x, y) for i, x, y in zip(t, fire.grid.x[c], fire.grid.y[r]) if str(fire.dates[i]) in days}


def test_masks_are_identical(fires):
    made, reference = fires
    days = {str(d) for d in reference.dates}
    assert (min(days), max(days), len(days)) == ('2020-09-05', '2020-11-06', 63)
    ours, theirs = burning(made, days), burning(reference, days)
    assert len(theirs) == 29147
    assert not ours - theirs and not theirs - ours


def test_grid_and_hours(fires):
    made, reference = fires
    assert made.grid == reference.grid and not any(v % 375 for v in made.grid.bounds)
    hour, whole = made.read(slice(0, 63), bands=[22]), reference.read(bands=[22])
    np.testing.assert_array_equal(np.floor(hour), whole)


def test_missing_days(fires):
    made, _ = fires
    covered = covered_days(POINTS)
    assert made.dates[-1] == np.datetime64('2020-11-27') and len(covered) == 64
    assert [str(d) for d in made.dates[made.missing]] == [f'2020-11-{d:02d}' for d in range(7, 27)]
    assert made.mask().sum() == 29147 + 2
    assert len(read_detections(POINTS)) == 39839
