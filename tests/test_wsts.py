"Damaged and foreign fire files are refused with one readable line, and chunked files read like contiguous ones."
import pickle

import h5py
import numpy as np
import pytest
import torch

from geoforecast.core import DataError
from geoforecast.fire.wsts import find_fires, open_fire, write_fire
from geoforecast.geo.grid import Grid

GRID = Grid('EPSG:32611', (375, 0, 269625, 0, -375, 4178250), 12, 15)
DATES = np.arange('2020-09-05', '2020-09-09', dtype='datetime64[D]')


def data():
    values = np.random.default_rng(0).normal(size=(4, 23, 12, 15)).astype(np.float32)
    values[:, 22] = np.maximum(values[:, 22], 0) # hours
    return values


def raw_file(path, values=None, **attrs):
    with h5py.File(path, 'w') as f:
        f['data'] = data() if values is None else values
        f['data'].attrs.update({k: v for k, v in (dict(year=2020, fire_name='x', img_dates=[str(d) for d in DATES], lnglat=(-119., 37.)) | attrs).items() if v is not None})
    return path


def refused(path, *words):
    with pytest.raises(DataError) as error: open_fire(path)
    text = str(error.value)
    assert '\n' not in text and str(path) in text, text
    for word in words: assert word in text, text


@pytest.mark.parametrize('keep', [0, 100, 2000, -1000])
def test_cut_short(tmp_path, keep):
    path = write_fire(tmp_path/'a.hdf5', data(), DATES, GRID, 'a')
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    refused(path, 'HDF5')


def test_cut_short_after_opening(tmp_path):
    path = write_fire(tmp_path/'a.hdf5', data(), DATES, GRID, 'a')
    fire = open_fire(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match='a.hdf5'): fire.read()


def test_damaged_chunk(tmp_path):
    path = tmp_path/'a.hdf5'
    with h5py.File(path, 'w') as f:
        d = f.create_dataset('data', data=data(), chunks=(4, 23, 12, 15), compression='gzip')
        d.attrs.update(img_dates=[str(x) for x in DATES], lnglat=(-119., 37.))
        info = d.id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[info.byte_offset + 100:info.byte_offset + 200] = bytes(100)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match='cannot be read'): open_fire(path).read()


def test_wrong_content(tmp_path):
    refused(raw_file(tmp_path/'bands.hdf5', data()[:, :22]), '22', '23 bands')
    refused(raw_file(tmp_path/'flat.hdf5', data()[:, 0]), '23 bands')
    refused(raw_file(tmp_path/'days.hdf5', data()[:3]), '3 days', '4 dates')
    refused(raw_file(tmp_path/'order.hdf5', img_dates=[str(d) for d in DATES[::-1]]), 'ascend')
    refused(raw_file(tmp_path/'twice.hdf5', img_dates=['2020-09-05']*4), 'ascend')
    refused(raw_file(tmp_path/'words.hdf5', img_dates=['Monday']*4), '2020-09-05')
    refused(raw_file(tmp_path/'none.hdf5', img_dates=None), 'img_dates')
    refused(raw_file(tmp_path/'place.hdf5', lnglat=None), 'lnglat', 'crs=')
    refused(raw_file(tmp_path/'transform.hdf5', crs='EPSG:32611', transform=(1., 2.)), '6 numbers')
    refused(raw_file(tmp_path/'crs.hdf5', crs='nonsense', transform=GRID.transform), 'nonsense')
    with h5py.File(tmp_path/'other.hdf5', 'w') as f: f['images'] = data()
    refused(tmp_path/'other.hdf5', "'data'", 'images')
    (tmp_path/'text.hdf5').write_text('lon,lat\n')
    refused(tmp_path/'text.hdf5', 'HDF5')
    refused(tmp_path/'absent.hdf5', 'does not exist')


@pytest.mark.parametrize('kind', ['block', 'chunks', 'half', 'bytes'])
def test_layouts_read_alike(tmp_path, kind):
    path, values = tmp_path/'a.hdf5', data()
    days = [f'{d}.tif' for d in DATES]
    with h5py.File(path, 'w') as f:
        options = dict(chunks=(2, 3, 5, 5), compression='gzip') if kind == 'chunks' else dict(dtype='f2') if kind == 'half' else {}
        d = f.create_dataset('data', data=values, **options)
        d.attrs.update(year=np.bytes_(b'2020') if kind == 'bytes' else 2020, fire_name=np.bytes_(b'a'), lnglat=(-119., 37.),
                       img_dates=[x.encode() for x in days] if kind == 'bytes' else days)
    fire = pickle.loads(pickle.dumps(open_fire(path)))
    np.testing.assert_allclose(fire.read(slice(1, 3), slice(2, 9), slice(4, 15), [3, 0]), values[1:3, [3, 0], 2:9, 4:15], rtol=1e-3, atol=1e-4)
    assert fire.year == 2020 and fire.name == 'a' and fire.dates[0] == DATES[0] and fire.read().dtype == np.float32


def test_workers_read_for_themselves(tmp_path):
    fire = open_fire(write_fire(tmp_path/'a.hdf5', data(), DATES, GRID, 'a'))
    fire.read(slice(0, 1))

    class Days(torch.utils.data.Dataset):
        def __len__(self): return len(fire)
        def __getitem__(self, t): return torch.from_numpy(fire.read_raw(slice(t, t + 1)))

    loaded = torch.cat(list(torch.utils.data.DataLoader(Days(), batch_size=None, num_workers=2)))
    np.testing.assert_array_equal(loaded[:, :23].numpy(), data())


def test_approximate_travels(tmp_path):
    guess = open_fire(raw_file(tmp_path/'a.hdf5'))
    assert guess.grid.approximate
    written = write_fire(tmp_path/'b.hdf5', guess.read(), guess.dates, guess.grid, 'b')
    assert open_fire(written).grid == guess.grid and open_fire(written).grid.approximate
    assert guess.to_xarray(bands=['ndvi']).attrs['georeference'] == 'approximate'


def test_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(DataError): write_fire(tmp_path/'a.hdf5', data()[:, :, :5], DATES, GRID, 'a')
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError): find_fires(tmp_path)
