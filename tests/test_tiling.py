"What the tiling notebook leaves out: sizes drawn at random, and memory over a long area."
import subprocess
import sys

import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from geoforecast.nn.tiling import predict_blended, predict_tiles

sides = st.integers(1, 60)

@settings(max_examples=60, deadline=None)
@given(height=sides, width=sides, size=st.integers(1, 30), halo=st.integers(2, 12))
def test_tiles_equal_the_full_frame(height, width, size, halo):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1))
    x = torch.randn(1, 2, height, width)
    with torch.no_grad(): expected = network(x)
    torch.testing.assert_close(predict_tiles(network, x, size=size, halo=halo), expected, rtol=0, atol=1e-6)

@settings(max_examples=60, deadline=None)
@given(height=sides, width=sides, size=st.integers(1, 30), share=st.floats(0, .99))
def test_blending_keeps_what_a_network_leaves_alone(height, width, size, share):
    x = torch.randn(1, 2, height, width)
    torch.testing.assert_close(predict_blended(nn.Identity(), x, size=size, overlap=int(share*size)), x)

MEMORY = """
import resource, torch
from geoforecast.nn.tiling import stream_blended, stream_tiles
def read(rows, cols): return torch.ones(1, 8, rows.stop - rows.start, cols.stop - cols.start)
def run(height):
    for stream in (stream_tiles, stream_blended): stream(torch.nn.Identity(), read, lambda *a: None, height, 256)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first = run(512)
print(run(40_000) - first)
"""

def test_memory_does_not_grow_with_the_area():
    "The long area holds 330 MB as a whole."
    out = subprocess.run([sys.executable, '-c', MEMORY], capture_output=True, text=True, check=True).stdout
    assert int(out) < 40_000, f'{out.strip()} kB more for the longer area'
