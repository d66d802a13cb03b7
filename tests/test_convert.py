"Conversions that are killed, run in spawned processes, meet damaged images, full disks and names that Windows refuses."
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import h5py
import numpy as np
import pytest
import rasterio

from geoforecast.core import ConfigError, DataError
from geoforecast.fire import convert
from geoforecast.fire.convert import convert_tiffs, day_files, file_name, verify_fire, write_tiffs
from geoforecast.fire.wsts import open_fire, write_fire
from geoforecast.geo.grid import Grid

GRID = Grid('EPSG:32611', (375, 0, 269625, 0, -375, 4178250), 24, 30)


def values(seed=0):
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(5, 23, 24, 30)).astype(np.float32)
    data[:, 22] = np.where(rng.random((5, 24, 30)) < .1, 13.5, 0)
    data[2] = np.nan
    return data


def images(folder, year, name, seed=0):
    days = np.datetime64(f'{year}-09-05') + np.arange(5)
    path = write_fire(folder/'made.hdf5', values(seed), days, GRID, name)
    return write_tiffs(open_fire(path), folder/'tiff'/str(year)/name)


@pytest.fixture
def tree(tmp_path):
    for i, (year, name) in enumerate(((2018, 'fire_1'), (2020, 'fire_2'), (2020, 'fire_3'))): images(tmp_path, year, name, i)
    return tmp_path/'tiff'


SPAWN = """
import multiprocessing, sys
from geoforecast.fire.convert import convert_tiffs
if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    convert_tiffs(sys.argv[1], sys.argv[2], jobs=2)
"""


def test_spawned_processes_as_on_windows(tree, tmp_path):
    (tmp_path/'go.py').write_text(SPAWN)
    done = subprocess.run([sys.executable, str(tmp_path/'go.py'), str(tree), str(tmp_path/'a')], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count('5 days') == 3, done.stderr
    alone = convert_tiffs(tree, tmp_path/'b')
    assert [p.read_bytes() for p in alone] == [(tmp_path/'a'/p.relative_to(tmp_path/'b')).read_bytes() for p in alone]


KILLED = """
import os, signal, sys
from geoforecast.fire import convert
verify, calls = convert.verify_fire, []
def die(*args):
    calls.append(verify(*args))
    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)
convert.verify_fire = die
convert.convert_tiffs(sys.argv[1], sys.argv[2])
"""


def test_goes_on_after_being_killed(tree, tmp_path):
    done = subprocess.run([sys.executable, '-c', KILLED, str(tree), str(tmp_path/'out')], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = tmp_path/'out'/'2018'/'fire_1.hdf5'
    assert [p for p in (tmp_path/'out').rglob('*.hdf5') if not p.parent.name.startswith('.')] == [whole]
    assert list((tmp_path/'out'/'2020').glob('.fire_2*.tmp')), 'the killed run left its temporary folder'
    before, lines = whole.stat(), []
    written = convert_tiffs(tree, tmp_path/'out', report=lines.append)
    assert whole.stat().st_mtime_ns == before.st_mtime_ns and ['already there' in line for line in lines] == [True, False, False]
    assert sorted(p for p in (tmp_path/'out').rglob('*') if p.is_file()) == written
    for path, folder in zip(written, sorted(tree.glob('*/*'))): verify_fire(path, folder, sample=4)


@pytest.mark.parametrize('damage', ['cut', 'empty', 'hole', 'text', 'bands', 'grid'])
def test_damaged_image_is_named_and_the_others_go_on(tree, tmp_path, damage):
    file = tree/'2020'/'fire_2'/'2020-09-06.tif'
    content = file.read_bytes()
    if damage in ('bands', 'grid'):
        with rasterio.open(file) as f: profile, data = f.profile, f.read()
        if damage == 'bands': profile, data = profile | dict(count=7), data[:7]
        else: profile['transform'] = rasterio.Affine(375, 0, 0, 0, -375, 0)
        with rasterio.open(file, 'w', **profile) as f: f.write(data)
    else:
        middle = len(content)//2
        file.write_bytes(dict(cut=content[:middle], empty=b'', hole=content[:middle] + b'\xff'*20_000 + content[middle + 20_000:], text=b'<html>')[damage])
    lines = []
    with pytest.raises(DataError, match='1 of 3 fires') as error: convert_tiffs(tree, tmp_path/'out', report=lines.append)
    assert str(file) in str(error.value) and '\n' not in str(error.value)
    assert ['FAILED' in line for line in lines] == [False, True, False]
    assert sorted(p.name for p in (tmp_path/'out').rglob('*') if p.is_file()) == ['fire_1.hdf5', 'fire_3.hdf5']
    file.write_bytes(content)
    assert len(convert_tiffs(tree, tmp_path/'out', report=lines.append)) == 3


@pytest.mark.parametrize('change', ['cut', 'bit', 'options', 'image', 'foreign'])
def test_what_is_not_right_is_made_again(tree, tmp_path, change):
    first = convert_tiffs(tree, tmp_path/'out')[0]
    good, options = first.read_bytes(), {}
    if change == 'cut': first.write_bytes(good[:-5000])
    if change == 'bit': first.write_bytes(good[:-5000] + bytes([good[-5000] ^ 4]) + good[-4999:])
    if change == 'options': options = dict(dtype='float16')
    if change == 'image': images(tmp_path, 2018, 'fire_1', seed=9)
    if change == 'foreign': write_fire(first, values(5), np.datetime64('2018-09-05') + np.arange(5), GRID, 'fire_1')
    lines = []
    convert_tiffs(tree, tmp_path/'out', report=lines.append, **options)
    assert 'already there' not in lines[0]
    assert (first.read_bytes() == good) == (change not in ('options', 'image'))
    verify_fire(first, tree/'2018'/'fire_1', sample=4)


@pytest.mark.parametrize('compression', [None, 'gzip', 'lzf'])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_every_form_reads_as_float32(tree, tmp_path, dtype, compression):
    path = convert_tiffs(tree/'2018'/'fire_1', tmp_path/'out', dtype=dtype, compression=compression)[0]
    fire, data = open_fire(path), values()
    assert (fire.offset is None) == (compression is not None) and fire.dtype == dtype and fire.read().dtype == np.float32
    np.testing.assert_array_equal(fire.read(), data.astype(dtype).astype(np.float32))
    np.testing.assert_array_equal(fire.read(slice(1, 4), slice(3, 9), slice(2, 30), [22, 14]), data.astype(dtype).astype(np.float32)[1:4, [22, 14], 3:9, 2:30])


def test_half_precision_never_overflows(tmp_path):
    data = values()
    data[0, 14, :2] = 70_000
    days = np.datetime64('2018-09-05') + np.arange(5)
    with pytest.raises(DataError, match='elevation'): write_fire(tmp_path/'half.hdf5', data, days, GRID, 'half', dtype='float16')
    write_tiffs(open_fire(write_fire(tmp_path/'a.hdf5', data, days, GRID, 'a')), tmp_path/'tiff'/'2018'/'a')
    lines = []
    path = convert_tiffs(tmp_path/'tiff', tmp_path/'out', dtype='float16', report=lines.append)[0]
    assert 'kept in float32: elevation reaches 70000' in lines[0] and open_fire(path).dtype == np.float32
    np.testing.assert_array_equal(open_fire(path).read(), data)
    convert_tiffs(tmp_path/'tiff', tmp_path/'out', dtype='float16', report=lines.append)
    assert 'already there' in lines[1]


def test_names_that_windows_takes(tmp_path):
    assert file_name('fire_21458798') == 'fire_21458798'
    for name in ('a:b', 'CON', 'con.x', 'LPT1', 'a/b', 'a<b>|"?*\\', 'dot.', 'space ', 'tab\t'):
        made = file_name(name)
        assert not set(made) & set('<>:"/\\|?*\t') and made[-1] not in '. ' and made.split('.')[0].upper() not in ('CON', 'LPT1')
    images(tmp_path, 2020, 'Creek: north?')
    path, = convert_tiffs(tmp_path/'tiff', tmp_path/'out')
    assert path.name == 'Creek_ north_.hdf5' and open_fire(path).name == 'Creek: north?'


def test_the_folder_one_stands_in(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tree/'2018'/'fire_1')
    path, = convert_tiffs('.', tmp_path/'out')
    assert path.relative_to(tmp_path/'out').as_posix() == '2018/fire_1.hdf5' and open_fire(path).name == 'fire_1'


def test_refused_before_anything_is_done(tree, tmp_path):
    for options in (dict(dtype='float64'), dict(compression='zip'), dict(protocol='wst')):
        with pytest.raises(ConfigError): convert_tiffs(tree, tmp_path/'out', **options)
    with pytest.raises(DataError, match='nothing to convert in'): convert_tiffs(tmp_path/'absent', tmp_path/'out')
    with pytest.raises(DataError, match='no day'): day_files(tmp_path)
    assert not (tmp_path/'out').exists()


def test_an_unsound_write_gets_no_name(tree, tmp_path, monkeypatch):
    def lossy(path, data, *args):
        data[0, 3, 5, 5] += 1
        return write_fire(path, data, *args)
    monkeypatch.setattr(convert, 'write_fire', lossy)
    with pytest.raises(DataError, match='differs from'): convert_tiffs(tree/'2018', tmp_path/'out')
    assert not [p for p in (tmp_path/'out').rglob('*') if p.is_file()]


FULL = """
import resource, sys
from geoforecast.fire.convert import convert_tiffs
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
convert_tiffs(sys.argv[1], sys.argv[2])
"""


def test_a_full_disk_leaves_nothing(tree, tmp_path):
    done = subprocess.run([sys.executable, '-c', FULL, str(tree), str(tmp_path/'out')], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and 'Error' in done.stderr
    assert not [p for p in (tmp_path/'out').rglob('*') if p.is_file()]
    assert len(convert_tiffs(tree, tmp_path/'out')) == 3
