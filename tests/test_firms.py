"FIRMS as it behaves: limits, breakdowns, refusals, both schemas, days that are not over, and a key that never shows."
import threading
import traceback
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from geoforecast.cli import main
from geoforecast.core import ConfigError, DataError
from geoforecast.fire.detections import covered_days, detections_to_fire, read_detections
from geoforecast.fire.firms import fetch_detections, map_key
from geoforecast.fire.wsts import open_fire

KEY = 'abcdef0123456789'*2
NRT = 'latitude,longitude,bright_ti4,scan,track,acq_date,acq_time,satellite,instrument,confidence,version,bright_ti5,frp,daynight'
ARCHIVE = 'latitude,longitude,brightness,scan,track,acq_date,acq_time,satellite,instrument,confidence,version,bright_t31,frp,daynight,type'
AREA = (23, 37, 25, 39)


def row(day, archive=False): return f'38.0{day.item().day:02d},23.81,340,0.4,0.4,{day},1142,N,VIIRS,{"n" if archive else "nominal"},2,300,7.1,D' + ',0'*archive


@pytest.fixture
def firms(monkeypatch):
    "A server with FIRMS' rules: `burning` days, `first` to `last` available, `failures` to come first, `asked` for calls."
    state = SimpleNamespace(burning=[np.datetime64(f'2021-08-0{d}') for d in (3, 4, 6)], first='2021-08-01', last='2021-08-20', failures=[], asked=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if state.failures and (reply := state.failures.pop(0)) != 'go on':
                if reply is None: return
            else: reply = self.answer()
            status, text, *headers = reply
            self.send_response(status)
            for name, value in dict([('Content-Length', str(len(text))), *headers]).items(): self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def answer(self):
            _, _, kind, _, key, source, *rest = self.path.split('/')
            if key != KEY: return 400, 'Invalid MAP_KEY.'
            if kind == 'data_availability': return 200, f'data_id,min_date,max_date\n{source},{state.first},{state.last}'
            days = np.datetime64(rest[2]) + np.arange(int(rest[1]))
            state.asked.append((source, str(days[0]), len(days)))
            archive = source.endswith('SP')
            return 200, '\n'.join([ARCHIVE if archive else NRT, *(row(d, archive) for d in days if d in state.burning)])

        def log_message(self, *args): pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url, state.lines = f'http://127.0.0.1:{server.server_port}', []
    state.fetch = lambda out, start, end, *sources: fetch_detections(out, AREA, start, end, sources or ('VIIRS_SNPP_NRT',), report=state.lines.append, base_url=state.url, pause=.001)
    monkeypatch.setenv('FIRMS_MAP_KEY', KEY)
    yield state
    server.shutdown()
    server.server_close()


def test_two_schemas_make_one_fire(firms, tmp_path):
    files = firms.fetch(tmp_path/'t', '2021-08-02', '2021-08-09', 'VIIRS_SNPP_SP', 'VIIRS_NOAA20_NRT')
    assert len(files) == 4 and 'type' in files[0].read_text() and 'type' not in files[2].read_text()
    assert len(read_detections(tmp_path/'t')) == 3
    fire = open_fire(detections_to_fire(tmp_path/'t', tmp_path/'a.hdf5'))
    assert (str(fire.dates[0]), str(fire.dates[-1])) == ('2021-08-03', '2021-08-09') and not fire.missing.any()
    assert fire.mask().any((1, 2)).tolist() == [True, True, False, True, False, False, False]


def test_limits_breakdowns_and_cut_connections_are_waited_out(firms, tmp_path):
    firms.failures = ['go on', (403, 'Exceeding allowed transaction limit.'), (429, '', ('Retry-After', '0')), (500, ''), (200, NRT, ('Content-Length', '9999')), None, 'go on', (200, '')]
    firms.fetch(tmp_path, '2021-08-01', '2021-08-10')
    assert firms.asked == [('VIIRS_SNPP_NRT', '2021-08-01', 5), ('VIIRS_SNPP_NRT', '2021-08-06', 5)]
    assert [line.split(';')[0] for line in firms.lines if 'attempt' in line] == ['FIRMS: Exceeding allowed transaction limit.', 'FIRMS: HTTP 429', 'FIRMS: HTTP 500',
                                                                                 'FIRMS: no answer (ChunkedEncodingError)', 'FIRMS: no answer (ConnectionError)', 'FIRMS: an empty answer']


def test_a_wait_that_is_asked_for_is_kept(firms, tmp_path):
    firms.failures = [(503, '', ('Retry-After', '1'))]
    start = datetime.now()
    firms.fetch(tmp_path, '2021-08-01', '2021-08-01')
    assert datetime.now() - start >= timedelta(seconds=1)


def test_days_that_are_not_over_are_fetched_again(firms, tmp_path):
    today = np.datetime64(datetime.now(timezone.utc).date())
    firms.first, firms.last, firms.burning = str(today - 9), str(today), [today - 4]
    days = str(today - 6), str(today + 3)
    firms.fetch(tmp_path, *days)
    finished = [p for p in tmp_path.iterdir() if '_latest_' not in p.name]
    assert any('3 of 10 days are outside' in line for line in firms.lines) and len(list(tmp_path.glob('*_latest_*'))) == 1
    assert today - 2 in covered_days(tmp_path) and today not in covered_days(tmp_path), 'a day that has just begun is not a day without fire'
    firms.asked.clear()
    firms.burning.append(today)
    before = {p: p.stat().st_mtime_ns for p in finished}
    assert len(firms.fetch(tmp_path, *days)) == len(finished) + 1
    assert len(firms.asked) == 1 and before == {p: p.stat().st_mtime_ns for p in finished} and today in covered_days(tmp_path)


@pytest.mark.parametrize('failure, error, says', [
    ((400, 'Invalid MAP_KEY.'), ConfigError, 'refuses the key'), ((200, f'Invalid MAP_KEY {KEY}'), ConfigError, 'refuses the key'), ((400, 'Invalid area.'), DataError, 'Invalid area'),
    ((302, '', ('Location', f'http://elsewhere/{KEY}')), DataError, 'HTTP 302'), ((404, f'no page /api/{KEY}/x'), DataError, 'no page'), ((429, '', ('Retry-After', '7200')), DataError, '7200 s'), (None, DataError, 'out of reach')])
def test_the_key_never_shows(failure, error, says, firms, tmp_path):
    firms.failures = ['go on'] + [failure]*6
    with pytest.raises(error, match=says) as caught: firms.fetch(tmp_path/'t', '2021-08-01', '2021-08-02')
    shown = ''.join(traceback.format_exception(caught.value)) + ''.join(firms.lines)
    links = [caught.value]
    while links[-1].__context__: links.append(links[-1].__context__)
    assert KEY not in shown + ''.join(map(str, links)) and not list(tmp_path.rglob('*.csv'))


def test_an_answer_for_other_days_is_refused(firms, tmp_path):
    firms.failures = ['go on', (200, f'{NRT}\n{row(np.datetime64("2021-09-03"))}')]
    with pytest.raises(DataError, match='FIRMS gave 2021-09-03'): firms.fetch(tmp_path/'t', '2021-08-01', '2021-08-02')
    assert not (tmp_path/'t').exists()


def test_what_cannot_be_asked(firms, tmp_path, monkeypatch):
    for start, end, says in (('2021-08-05', '2021-08-02', 'before it starts'), ('yesterday', '2021-08-02', 'no period')):
        with pytest.raises(ConfigError, match=says): firms.fetch(tmp_path, start, end)
    with pytest.raises(ConfigError, match="did you mean 'VIIRS_NOAA20_NRT'"): firms.fetch(tmp_path, '2021-08-01', '2021-08-01', 'VIIRS_NOAA20_NRTT')
    with pytest.raises(ConfigError, match='antimeridian'): fetch_detections(tmp_path, (177, -19, -178, -16), '2021-08-01', '2021-08-02')
    monkeypatch.setenv('FIRMS_MAP_KEY', 'a key/with spaces')
    with pytest.raises(ConfigError, match='characters'): map_key()


def test_the_command(firms, tmp_path, capsys):
    words = ['data', 'fire', 'firms', '--out', str(tmp_path/'t'), '--bounds', *map(str, AREA), '--url', firms.url, '--end', '2021-08-07', '--start']
    assert main([*words, '2021-08-02', '--sources', 'VIIRS_SNPP_SP']) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith('2 tables, 3 detections on 3 days')
    firms.first = '2021-08-10'
    assert main([*words, '2021-08-02']) == 2
    shown = capsys.readouterr().err
    assert 'sources ending in _SP' in shown and shown.count('\n') == 1
