"Tables of detections as they come: empty files, other columns, both spellings mixed, whole countries."
import numpy as np
import pandas as pd
import pytest

from geoforecast.core import DataError
from geoforecast.fire.detections import covered_days, detections_to_fire, read_detections
from geoforecast.fire.wsts import open_fire

HEAD = 'latitude,longitude,bright_ti4,scan,track,acq_date,acq_time,satellite,confidence,version,bright_ti5,frp,daynight\n'
ROW = '38.0{},23.81,340,0.4,0.4,{},{},N,nominal,2.0NRT,300,7.1,N\n'


def test_only_headers(tmp_path):
    (tmp_path/'2021-08-03.csv').write_text(HEAD)
    assert len(read_detections(tmp_path)) == 0 and covered_days(tmp_path).tolist() == [np.datetime64('2021-08-03').item()]
    with pytest.raises(DataError, match='none of 0'): detections_to_fire(tmp_path, tmp_path/'a.hdf5')


def test_empty_and_foreign_files(tmp_path):
    (tmp_path/'a.csv').write_text('')
    with pytest.raises(DataError, match='a.csv'): read_detections(tmp_path)
    (tmp_path/'a.csv').write_text('x,y\n1,2\n')
    with pytest.raises(DataError, match='acq_date'): read_detections(tmp_path)
    (tmp_path/'a.csv').write_text(HEAD + ROW.format(1, '2021-08-03', 42).replace('38.0', '138.0'))
    with pytest.raises(DataError, match='line 2'): read_detections(tmp_path)
    (tmp_path/'a.csv').unlink()
    with pytest.raises(DataError, match='no table'): read_detections(tmp_path)
    with pytest.raises(DataError, match='does not exist'): read_detections(tmp_path/'absent')


def test_midnight_gap_and_overlap(tmp_path):
    (tmp_path/'one.csv').write_text(HEAD + ROW.format(1, '2021-08-03', '0') + ROW.format(2, '2021-08-05', '23:59'))
    (tmp_path/'two.csv').write_text(HEAD + ROW.format(2, '2021-08-05', '2359') + ROW.format(3, '2021-08-07', '0001'))
    assert len(read_detections(tmp_path)) == 3
    fire = open_fire(detections_to_fire(tmp_path, tmp_path/'a.hdf5'))
    hours = fire.read(bands=[22])[:, 0]
    np.testing.assert_allclose(hours.max((1, 2)), [1/60, 0, 24 - 1/60, 0, 1/60], rtol=1e-6)
    assert not fire.missing.any() and fire.mask().sum() == 3


def test_download_date_in_the_name_is_not_the_day(tmp_path):
    (tmp_path/'download_2024-01-01.csv').write_text(HEAD + ROW.format(1, '2021-08-03', 42) + ROW.format(2, '2021-08-04', 42))
    assert [str(d) for d in covered_days(tmp_path)] == ['2021-08-03', '2021-08-04']


def test_quiet_days(tmp_path):
    "Quiet days before the fire are left out, those after it are kept; days given as covered overrule the files."
    for day in range(1, 8): (tmp_path/f'2021080{day}.csv').write_text(HEAD + (ROW.format(1, '2021-08-03', 42) if day == 3 else ''))
    fire = open_fire(detections_to_fire(tmp_path, tmp_path/'out'/'a.hdf5'))
    assert (str(fire.dates[0]), str(fire.dates[-1]), fire.missing.sum()) == ('2021-08-03', '2021-08-07', 0)
    fire = open_fire(detections_to_fire(tmp_path, tmp_path/'out'/'a.hdf5', covered=['2021-08-03', '2021-08-05']))
    assert fire.missing.tolist() == [False, True, False]


def test_southern_hemisphere_and_antimeridian(tmp_path):
    table = pd.DataFrame(dict(lon=[179.99, -179.99], lat=[-17.5, -17.52], time=pd.to_datetime(['2021-08-03 01:30', '2021-08-03 13:30'])))
    fire = open_fire(detections_to_fire(table, tmp_path/'fiji.hdf5', margin=2))
    assert fire.mask().sum() == 2 and fire.shape[3] < 20 and fire.grid.crs.startswith('EPSG:327')
