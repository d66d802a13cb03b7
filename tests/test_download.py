"Downloads from servers that break off, refuse, limit, lie or do not know ranges; and what a folder holds."
import io
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import h5py
import numpy as np
import pytest

from geoforecast.core import ConfigError, DataError
from geoforecast.fire import download
from geoforecast.fire.convert import convert_tiffs, write_tiffs
from geoforecast.fire.download import RemoteFile, download_wsts, inventory, list_wsts
from geoforecast.fire.wsts import open_fire, write_fire
from geoforecast.geo.grid import Grid

GRID = Grid('EPSG:32610', (375, 0, 5e5, 0, -375, 4e6), 24, 32)


class Handler(BaseHTTPRequestHandler):
    "Answers ranges; `faults` are taken one a request: a status, bytes to break off after, or a function of the part."

    def do_GET(self):
        server = self.server
        asked = re.match(r'bytes=(\d+)-', self.headers.get('Range', ''))
        first = int(asked[1])
        server.asked.append(first)
        assert 'geoforecast' in self.headers['User-Agent']
        fault = server.faults.pop(0) if server.faults else server.always
        if isinstance(fault, tuple): return self.refuse(*fault)
        part = server.content[first:] if server.ranges else server.content
        self.send_response(206 if server.ranges else 200)
        if server.ranges: self.send_header('Content-Range', f'bytes {first}-{len(server.content) - 1}/{len(server.content)}')
        self.send_header('Content-Length', str(len(part)))
        self.end_headers()
        if callable(fault): part, fault = fault(first, part), None
        try:
            for i in range(0, len(part[:fault]), 1 << 16):
                self.wfile.write(part[:fault][i:i + (1 << 16)])
                time.sleep(server.pause)
        except ConnectionError: pass

    def refuse(self, status, headers):
        self.send_response(status)
        for k, v in headers.items(): self.send_header(k, v)
        self.end_headers()

    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp('source')
    for seed, (year, name) in enumerate(((2018, 'fire_10'), (2018, 'fire_11'), (2020, 'fire_20'))):
        data = np.random.default_rng(seed).normal(size=(5, 23, 24, 32)).astype(np.float32)
        data[:, 22], data[2] = np.where(data[:, 22] > 2, 13.5, 0), np.nan
        path = write_fire(folder/'made.hdf5', data, np.datetime64(f'{year}-08-01') + np.arange(5), GRID, name)
        write_tiffs(open_fire(path), folder/'tiff'/str(year)/name)
    return folder/'tiff'


def packed(source, compression=zipfile.ZIP_DEFLATED, stream=False):
    "A zip in memory; written as to a pipe, sizes follow the data instead of preceding it."
    target = io.BytesIO()
    if stream: target.seekable = lambda: False
    with zipfile.ZipFile(target, 'w', compression) as z:
        for f in sorted(source.rglob('*.tif')): z.write(f, f'WildfireSpreadTS/{f.relative_to(source).as_posix()}')
    return target.getvalue()


@pytest.fixture
def server(source, monkeypatch):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.content, server.asked, server.faults, server.always, server.ranges, server.pause = packed(source), [], [], None, True, 0
    server.url = f'http://127.0.0.1:{server.server_port}/WildfireSpreadTS.zip?download=1'
    server.waited = []
    server.waiting = waiting = download.waiting_time
    monkeypatch.setattr(download, 'waiting_time', lambda *args: server.waited.append(round(waiting(*args))) or 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def same(folder, source, only=''):
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    expected = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob('*.tif')}
    assert found == {k: v for k, v in expected.items() if k.startswith(only)}


def quiet(line): pass


@pytest.mark.parametrize('kind', ['deflated', 'stored', 'stream', 'zip64', 'comment'])
def test_every_kind_of_zip(server, source, tmp_path, monkeypatch, kind):
    if kind == 'stored': server.content = packed(source, zipfile.ZIP_STORED)
    if kind == 'stream': server.content = packed(source, stream=True)
    if kind == 'zip64':
        monkeypatch.setattr(zipfile, 'ZIP_FILECOUNT_LIMIT', 2)
        server.content = packed(source)
        monkeypatch.undo()
        assert b'PK\x06\x06' in server.content
    if kind == 'comment':
        with zipfile.ZipFile(stream := io.BytesIO(server.content), 'a') as z: z.comment = b'a comment'
        server.content = stream.getvalue()
    folders = download_wsts(tmp_path/'out', url=server.url, report=quiet)
    assert [f.relative_to(tmp_path/'out').as_posix() for f in folders] == ['2018/fire_10', '2018/fire_11', '2020/fire_20']
    same(tmp_path/'out', source)


def test_parts_cost_few_requests(server, source, tmp_path):
    table = list_wsts(server.url)
    assert table.groupby(['year', 'fire']).size().to_dict() == {(2018, 'fire_10'): 4, (2018, 'fire_11'): 4, (2020, 'fire_20'): 4}
    about = len(server.asked)
    download_wsts(tmp_path/'out', years=[2018], fires=['fire_11'], url=server.url, report=quiet)
    same(tmp_path/'out', source, '2018/fire_11')
    assert len(server.asked) <= 2*about + 1


@pytest.mark.parametrize('cut', [1, 1000, 70_000])
def test_broken_connections(server, source, tmp_path, cut):
    server.faults = [None]*4 + [cut, 0, cut, cut, 0, cut]
    download_wsts(tmp_path/'out', url=server.url, report=quiet)
    same(tmp_path/'out', source)
    assert not server.faults and server.waited


def test_a_server_that_breaks_off_all_the_time_but_sends_something(server, source, tmp_path):
    server.always = 30_000
    download_wsts(tmp_path/'out', years=[2018], url=server.url, report=quiet)
    same(tmp_path/'out', source, '2018')
    assert set(server.waited) == {1}, 'the wait begins anew after every byte'


def test_gives_up_and_goes_on(server, source, tmp_path):
    server.faults = [None]*4 + [150_000]
    server.always = 0
    lines = []
    with pytest.raises(DataError, match='gave up after 6 attempts.*run the same again'): download_wsts(tmp_path/'out', url=server.url, report=lines.append)
    kept = [p for p in (tmp_path/'out').rglob('*') if p.is_file()]
    assert kept and all(p.read_bytes() == (source/p.relative_to(tmp_path/'out')).read_bytes() for p in kept)
    assert server.waited[-5:] == [1, 2, 4, 8, 16]
    server.always, server.asked[:] = None, []
    download_wsts(tmp_path/'out', url=server.url, report=lines.append)
    same(tmp_path/'out', source)


@pytest.mark.parametrize('status, headers, wait', [(429, {'Retry-After': '7'}, 7), (503, {}, 1), (500, {'Retry-After': '0'}, 0), (429, {'X-RateLimit-Reset': 'in'}, 100_000)])
def test_refusals_that_pass(server, source, tmp_path, status, headers, wait):
    if 'X-RateLimit-Reset' in headers: headers = {'X-RateLimit-Reset': str(int(time.time()) + wait)}
    server.faults = [(status, headers)]*2
    download_wsts(tmp_path/'out', years=[2020], url=server.url, report=quiet)
    same(tmp_path/'out', source, '2020')
    assert abs(server.waited[0] - wait) <= 60 and len(server.waited) == 2


@pytest.mark.parametrize('status', [401, 403, 404, 410])
def test_refusals_that_stay(server, tmp_path, status):
    server.always = (status, {})
    with pytest.raises(DataError, match=f'{status}.*is the address right'): download_wsts(tmp_path/'out', url=server.url)
    assert len(server.asked) == 1 and not (tmp_path/'out').exists()


@pytest.mark.parametrize('headers, seconds', [({'Retry-After': '99999999999'}, '99999999999'), ({'Retry-After': '9'*400}, 'inf'), ({'Retry-After': 'Fri, 31 Dec 9999 23:59:59 GMT'}, r'\d{12}'), ({'X-RateLimit-Reset': '9'*12}, r'\d{12}')], ids=['seconds', 'infinite', 'date', 'reset'])
def test_a_wait_that_nobody_can_wait_ends_with_a_line(server, tmp_path, monkeypatch, headers, seconds):
    monkeypatch.setattr(download.time, 'sleep', lambda s: pytest.fail(f'slept {s} s'))
    monkeypatch.setattr(download, 'waiting_time', server.waiting)
    server.always = (503, headers)
    with pytest.raises(DataError, match=rf'asks to wait {seconds} s \(the server answers 503.*it goes on'): download_wsts(tmp_path/'out', url=server.url)
    assert len(server.asked) == 1


@pytest.mark.parametrize('said', ['soon', '-5', '\u00b2', '1e9', ''])
def test_a_wait_that_is_no_number_is_the_usual_one(server, source, tmp_path, said):
    assert server.waiting({'Retry-After': said}, 3) == 8


def test_a_server_that_falls_silent(server, source, tmp_path, monkeypatch):
    "A connection on which nothing comes counts as broken after a while; what follows comes through another one."
    monkeypatch.setattr(download, 'SILENCE', .3)
    server.faults = [None]*4 + [lambda first, part: Silence(part, 70_000)]*3
    download_wsts(tmp_path/'out', years=[2018], url=server.url, report=quiet)
    same(tmp_path/'out', source, '2018')
    assert len(server.waited) == 3
    server.always = lambda first, part: Silence(part, 0)
    with pytest.raises(DataError, match='timed out'): download_wsts(tmp_path/'other', url=server.url)


class Silence(bytes):
    "Bytes of which the first are sent at once, and the rest long after anybody waits for them."
    def __new__(cls, part, first):
        self = super().__new__(cls, part)
        self.first = first
        return self

    def __getitem__(self, piece):
        if isinstance(piece, slice) and (piece.start or 0) >= self.first and piece.stop is not None: time.sleep(1)
        found = super().__getitem__(piece)
        return Silence(found, self.first) if piece == slice(None) else found


def test_more_than_was_announced(server, source, tmp_path):
    server.always = lambda first, part: part + b'more'*1000
    download_wsts(tmp_path/'out', url=server.url, report=quiet)
    same(tmp_path/'out', source)


@pytest.mark.parametrize('to', ['file:///etc/hostname', 'file://localhost/etc/hostname', '{url}', 'gopher://127.0.0.1/'])
def test_redirects_that_lead_elsewhere_or_in_circles(server, tmp_path, to):
    server.always = (302, {'Location': to.format(url=server.url)})
    with pytest.raises(DataError, match='the server answers 302') as error: download_wsts(tmp_path/'out', url=server.url)
    assert '\n' not in str(error.value) and not (tmp_path/'out').exists()


def test_servers_of_another_kind(server, tmp_path):
    server.ranges = False
    with pytest.raises(DataError, match='HTTP ranges'): download_wsts(tmp_path/'out', url=server.url)
    server.ranges, server.content = True, b'<html>not found</html>'*100
    with pytest.raises(DataError, match='not a zip archive'): download_wsts(tmp_path/'out', url=server.url)
    with zipfile.ZipFile(other := io.BytesIO(), 'w') as z: z.writestr('readme.txt', 'x')
    server.content = other.getvalue()
    with pytest.raises(DataError, match='no images in the archive.*readme.txt'): download_wsts(tmp_path/'out', url=server.url)
    for url in ('ftp://127.0.0.1/x.zip', 'WildfireSpreadTS.zip', ''):
        with pytest.raises(DataError, match='http://'): download_wsts(tmp_path/'out', url=url)
    assert not (tmp_path/'out').exists()


def test_offline(server, tmp_path):
    server.shutdown(), server.server_close()
    start = time.monotonic()
    for url in (server.url, 'http://zenodo.invalid/x.zip'):
        with pytest.raises(DataError, match='cannot be reached.*connection to the internet'): download_wsts(tmp_path/'out', url=url)
    assert time.monotonic() - start < 10 and not (tmp_path/'out').exists()


def test_a_file_that_changes_meanwhile(server):
    with RemoteFile(server.url) as f:
        server.content += b'more'
        f.seek(200_000)
        with pytest.raises(DataError, match='changed on the server'): f.read(10)


def flip(first, part):
    if first > 10_000 or len(part) < 100_000: return part
    return part[:50_000] + bytes([part[50_000] ^ 255]) + part[50_001:]


def test_bytes_that_change_on_the_way(server, source, tmp_path):
    server.faults = [None]*4 + [flip]
    download_wsts(tmp_path/'out', url=server.url, report=quiet)
    same(tmp_path/'out', source)
    shutil.rmtree(tmp_path/'out')
    server.always = flip
    with pytest.raises(DataError, match='fire_10/2018-08-01.tif arrives damaged'): download_wsts(tmp_path/'out', url=server.url, report=quiet)
    assert not [p for p in (tmp_path/'out').rglob('*') if p.is_file()]


def test_a_disk_without_room(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100_000))
    with pytest.raises(DataError, match='GB are needed'): download_wsts(tmp_path/'out', url=server.url)
    assert not (tmp_path/'out').exists()


def test_what_does_not_exist(server, tmp_path):
    with pytest.raises(ConfigError, match="year '2017' does not exist"): download_wsts(tmp_path/'out', years=[2017], url=server.url)
    with pytest.raises(ConfigError, match="did you mean 'fire_1"): download_wsts(tmp_path/'out', fires=['fire_1'], url=server.url)


def test_goes_on_after_being_killed(server, source, tmp_path):
    server.pause = .2
    code = 'import sys; from geoforecast.fire.download import download_wsts; download_wsts(sys.argv[1], url=sys.argv[2])'
    process = subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'out'), server.url])
    deadline = time.monotonic() + 60
    while len(done := list((tmp_path/'out').glob('*/fire_*/*.tif'))) < 2 and time.monotonic() < deadline: time.sleep(.02)
    process.send_signal(signal.SIGKILL), process.wait()
    assert 2 <= len(done) < 12
    for p in done: assert p.read_bytes() == (source/p.relative_to(tmp_path/'out')).read_bytes()
    server.pause, before = 0, {p: p.stat().st_mtime_ns for p in done}
    download_wsts(tmp_path/'out', url=server.url, report=quiet)
    same(tmp_path/'out', source)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


# --- Inventory

def test_inventory_of_damaged_files(source, tmp_path):
    convert_tiffs(source, tmp_path, compression='gzip', report=quiet)
    path = tmp_path/'2018'/'fire_10.hdf5'
    with h5py.File(path) as f: place = f['data'].id.get_chunk_info(5).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 50:place + 150] = bytes(100)
    path.write_bytes(content)
    (tmp_path/'2018'/'fire_11.hdf5').write_bytes(b'')
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    (tmp_path/'2020'/'fire_20'/'2020-08-02.tif').write_text('<html>')
    (tmp_path/'2020'/'.fire_20.x.tmp').mkdir()
    (tmp_path/'2020'/'.fire_20.x.tmp'/'2020-08-02.tif').write_text('left behind')
    alone, together = inventory(tmp_path), inventory(tmp_path, jobs=2)
    assert sorted(p.split('/')[-1] for p in alone.damaged.file) == ['2020-08-02.tif', 'fire_10.hdf5', 'fire_11.hdf5']
    assert alone.images.equals(together.images) and alone.damaged.equals(together.damaged)
    assert alone.table.xs(2020, level='year')[['fires', 'images', 'missing days']].values.tolist() == [[1, 4, 1], [1, 3, 2]]
    text = str(alone)
    assert text.count('damaged: ') == 3 and text.endswith('not complete') and 'fire_10.hdf5' in alone._repr_html_()


def test_inventory_finds_copies_in_other_years(source, tmp_path):
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    shutil.copy(source/'2018'/'fire_10'/'2018-08-01.tif', tmp_path/'2020'/'fire_20'/'2020-08-03.tif')
    found = inventory(tmp_path)
    assert found.duplicates.fire.tolist() == ['fire_10', 'fire_20'] and found.table.copies.tolist() == [0, 0, 1, 0, 1]
    assert found.missing.fire.tolist() == ['fire_10', 'fire_11']


def test_inventory_of_nothing(tmp_path):
    for folder in (tmp_path, tmp_path/'absent'):
        with pytest.raises(DataError, match='nothing of WildfireSpreadTS'): inventory(folder)
    (tmp_path/'2020-08-01.tif').write_text('x')
    found = inventory(tmp_path)
    assert len(found.damaged) == 1 and not found.complete and 'not complete' in str(found) and found._repr_html_()
