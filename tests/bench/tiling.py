"Large areas: exact tiles with a halo beside the same tiles without one, and beside the full frame."
import torch

from geoforecast.fire.models import ConvLSTMNet
from geoforecast.nn.tiling import predict_tiles, receptive_radius, stream_tiles
from timing import interleaved, peak, ratio, row

SIDE, SHAPE = 1024, (1, 5, 8)


def network():
    torch.manual_seed(0)
    return ConvLSTMNet(SHAPE[2], SHAPE[1], (16,)).eval()


def run(kind: str, radius: int, side: int = SIDE):
    "Forecast an area that is made where it is read, as a whole or in tiles of the library's size."
    net, read = network(), lambda rows, cols: torch.ones(*SHAPE, rows.stop - rows.start, cols.stop - cols.start)
    if kind == "full": net(read(slice(0, side), slice(0, side)))
    else: stream_tiles(net, read, lambda *values: None, side, side, halo=radius)


@torch.no_grad()
def measure():
    net, x = network(), torch.randn(*SHAPE, SIDE, SIDE)
    radius = receptive_radius(net, x[..., :64, :64])
    error = (predict_tiles(net, x, halo=radius) - net(x)).abs().max().item()
    yield row("tiling", f"exact tiles of {SIDE} x {SIDE}, halo {radius}: largest error", "<= 1e-6", error, unit="of a logit")
    seconds = interleaved(dict(halo=lambda: predict_tiles(net, x, halo=radius), bare=lambda: predict_tiles(net, x, halo=0), full=lambda: net(x)), 3, 1)
    yield row("tiling", "time beside the same tiles without a halo", "<= 1.35", **ratio(seconds["halo"], seconds["bare"]), unit="of their time")
    yield row("tiling", "time beside the full frame", "", **ratio(seconds["halo"], seconds["full"]), unit="of its time")
    script = "import torch, tiling\nmark()\nwith torch.no_grad(): tiling.run({kind!r}, {radius})"
    tiles, full = (peak(script.format(kind=kind, radius=radius)) for kind in ("tiles", "full"))
    yield row("tiling", f"memory beside the full frame's {full/2**20:.0f} MiB", "<= 0.15", tiles/full, unit="of its memory")
