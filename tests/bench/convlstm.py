"The ConvLSTM beside the plain cell: speed, bytes kept for the way back, time to a first compiled step; outputs and gradients are compared first."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from timing import interleaved, ratio, row
from torch import nn
from torch.profiler import ProfilerActivity, profile

from geoforecast.nn.convlstm import ConvLSTM

SHAPES = (((1, 5, 40, 64, 64), (64, 128, 256)), ((4, 6, 56, 20, 20), (32, 64)), ((1, 6, 56, 61, 221), (32, 64)))


class PlainCell(nn.Module):
    "The cell as it stands in the paper and in widely used code: concatenate input and state, convolve at each step."
    def __init__(self, input_dim, hidden_dim):
        super().__init__()
        self.hidden_dim, self.conv = hidden_dim, nn.Conv2d(input_dim + hidden_dim, 4*hidden_dim, 3, padding=1)

    def forward(self, x, h, c):
        i, f, o, g = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
        c = torch.sigmoid(f)*c + torch.sigmoid(i)*torch.tanh(g)
        return torch.sigmoid(o)*torch.tanh(c), c


class Plain(nn.Module):
    "Layers of plain cells over a window (B, T, C, H, W)."
    def __init__(self, input_dim, hidden_dims):
        super().__init__()
        self.cells = nn.ModuleList(PlainCell(a, b) for a, b in zip([input_dim, *hidden_dims], hidden_dims))

    def forward(self, x):
        for cell in self.cells:
            h = x.new_zeros(len(x), cell.hidden_dim, *x.shape[-2:])
            c, outputs = h, []
            for t in range(x.shape[1]):
                h, c = cell(x[:, t], h, c)
                outputs.append(h)
            x = torch.stack(outputs, 1)
        return x


class Ours(nn.Module):
    "The library's, with the weights of a plain one."
    def __init__(self, plain, checkpointing=False):
        super().__init__()
        dims = [cell.hidden_dim for cell in plain.cells]
        self.lstm = ConvLSTM(plain.cells[0].conv.in_channels - dims[0], dims, checkpointing=checkpointing)
        for (cell,), other in zip(self.lstm.layers, plain.cells): cell.conv = other.conv

    def forward(self, x): return self.lstm(x)[0]


def in_bfloat16(net):
    def run(x):
        with torch.autocast("cpu", torch.bfloat16): return net(x)
    return run


def forward(net, x):
    with torch.no_grad(): net(x)


def training(net, x): net(x).square().mean().backward()


def difference(one, two, x, weights):
    "Return the largest difference of outputs, and of gradients relative to each weight's largest."
    outputs = [net(x) for net in (one, two)]
    grads = [torch.autograd.grad(y.float().square().mean(), weights) for y in outputs]
    relative = max(((a - b).abs().max()/a.abs().max()).item() for a, b in zip(*grads))
    return (outputs[0] - outputs[1]).abs().max().item(), relative


def kept(net, x):
    "Return the bytes that a forward pass allocates and does not give back."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: y = net(x)  # noqa: F841, its graph must live
    return sum(e.self_cpu_memory_usage for e in p.key_averages())


FIRST_STEP = """
import sys, time, torch
sys.path.insert(0, sys.argv[2])
from convlstm import Ours, Plain, SHAPES, training
shape, dims = SHAPES[1]
net, x = Ours(Plain(shape[2], dims)), torch.randn(shape)
if sys.argv[1] == "pointwise": net.lstm.compile_pointwise()
else: net = torch.compile(net)
start = time.perf_counter()
training(net, x)
print(time.perf_counter() - start)
"""


def first_step(what):
    "Return the seconds to the first training step in a fresh process with nothing compiled before."
    import tempfile
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run([sys.executable, "-c", FIRST_STEP, what, str(Path(__file__).parent)], check=True, capture_output=True, text=True,
                              env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONWARNINGS": "ignore"})
    return float(done.stdout.split()[-1])


def measure():
    for shape, dims in SHAPES:
        torch.manual_seed(0)
        plain, x, name = Plain(shape[2], dims), torch.randn(shape), "x".join(map(str, shape[:2] + shape[-2:]))
        ours, weights = Ours(plain), list(plain.parameters())
        for kind, wrap, bound in (("float32", lambda net: net, 1e-5), ("bfloat16", in_bfloat16, 1e-2)):
            output, grads = difference(wrap(plain), wrap(ours), x, weights)
            yield row("convlstm", f"{name} {kind}: largest difference of outputs", f"<= {bound}", output, unit="")
            yield row("convlstm", f"{name} {kind}: largest difference of gradients", f"<= {bound}", grads, unit="of the largest gradient")
        ways = {"plain": plain, "ours": ours, "plain bf16": in_bfloat16(plain), "ours bf16": in_bfloat16(ours)}
        repeats = 9 if shape[-1] == 64 else 21
        for mode, aim in ((forward, ">= 1.2"), (training, ">= 1.1")):
            seconds = interleaved({k: lambda net=net: mode(net, x) for k, net in ways.items()}, repeats)
            plain.zero_grad()
            what = f"{name} {mode.__name__}"
            yield row("convlstm", f"{what}, float32", aim, **ratio(seconds["plain"], seconds["ours"]))
            yield row("convlstm", f"{what}, bfloat16 beside plain float32", ">= 2.0", **ratio(seconds["plain"], seconds["ours bf16"]))
            yield row("convlstm", f"{what}, bfloat16 beside plain bfloat16", ">= 1.25", **ratio(seconds["plain bf16"], seconds["ours bf16"]))
        whole = kept(plain, x)
        yield row("convlstm", f"{name} bytes kept for the way back", "<= 0.82", kept(ours, x)/whole, unit="of the plain one's")
        yield row("convlstm", f"{name} bytes kept, recomputing", "<= 0.27", kept(Ours(plain, checkpointing=True), x)/whole, unit="of the plain one's")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))): return
    part, stack = first_step("pointwise"), first_step("whole")
    yield row("convlstm", f"first step, pointwise part compiled ({part:.0f} s)", "<= 0.333", part/stack, unit="of compiling the whole stack's")
