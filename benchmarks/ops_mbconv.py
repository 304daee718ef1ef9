"""The fused MBConv against eager channels_last PyTorch, block by block: python benchmarks/ops_mbconv.py [--batch 32].

Each figure is a ratio of medians of runs that alternate in one process; the correctness gate comes first. FLOPs are
those of the plain algorithm, two per multiply-add, so that recomputation counts against the fused path.
"""

import argparse
import csv
import platform
import statistics
import sys
import time

import torch

import proxyless_fast as pf
from proxyless_fast.ops import gram
from proxyless_fast.ops.mbconv import mbconv, mbconv_reference, probe, probe_reference

# in, out, size, stride, kernel, expand: blocks of the paper's ImageNet supernet at 224 x 224.
BLOCKS = [
    (32, 16, 112, 1, 3, 1),
    (16, 24, 112, 2, 3, 3),
    (16, 24, 112, 2, 7, 6),
    (24, 24, 56, 1, 3, 3),
    (24, 24, 56, 1, 5, 6),
    (32, 32, 56, 1, 7, 6),
    (24, 40, 56, 2, 7, 6),
    (40, 40, 28, 1, 3, 3),
    (40, 40, 28, 1, 7, 6),
    (48, 48, 28, 1, 7, 6),
    (40, 80, 28, 2, 5, 6),
    (80, 80, 14, 1, 3, 3),
    (80, 80, 14, 1, 5, 6),
    (96, 96, 14, 1, 7, 6),
    (96, 192, 14, 2, 5, 6),
    (192, 192, 7, 1, 3, 3),
    (192, 192, 7, 1, 7, 6),
    (192, 320, 7, 1, 7, 6),
]


def flops(batch, inputs, outputs, size, stride, kernel, expand):
    """Forward FLOPs of a block."""
    wide, small = inputs * expand, ((size - 1) // stride + 1) ** 2
    first = size * size * inputs * wide if expand > 1 else 0
    return 2 * batch * (first + small * wide * (kernel * kernel + outputs))


def make(batch, inputs, outputs, size, stride, kernel, expand):
    wide = inputs * expand
    weights = [torch.randn(wide, inputs, 1, 1) * inputs**-0.5] if expand > 1 else []
    weights += [torch.randn(wide, 1, kernel, kernel) / kernel, torch.randn(outputs, wide, 1, 1) * wide**-0.5]
    params, running = [], []
    for w in weights:
        params += [w, torch.rand(w.shape[0]) + 0.5, torch.randn(w.shape[0])]
        running += [torch.zeros(w.shape[0]), torch.ones(w.shape[0])]
    small = (size - 1) // stride + 1
    layout = {"memory_format": torch.channels_last}
    x = torch.randn(batch, inputs, size, size).contiguous(**layout)
    return x, params, running, torch.randn(batch, outputs, small, small).contiguous(**layout)


def cases(block, batch):
    """Name -> (ours, eager, passes of forward FLOPs), each a function that times its own part and returns seconds."""
    x, params, running, grad = make(batch, *block)
    options = {"stride": block[3], "eps": 1e-3}
    leaf = x.clone().requires_grad_()
    trained = [p.clone().requires_grad_() for p in params]

    def timed(work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def training(function, **more):
        return timed(lambda: function(leaf, trained, running, **options, **more))

    def backward(function, weights, **more):
        parameters = trained if weights else params
        out = function(leaf, parameters, running, **options, **more)
        return timed(lambda: torch.autograd.grad(out, [leaf, *parameters] if weights else [leaf], grad))

    def probing(function):
        return timed(lambda: function(x, grad, [params], [running], **options))

    def inference(function):
        with torch.no_grad():
            return timed(lambda: function(x, params, running, training=False, **options))

    fresh = [(mbconv, {}), (mbconv_reference, {})]
    table = {
        "forward": [lambda f=f: training(f) for f, _ in fresh],
        "backward": [lambda f=f: backward(f, True) for f, _ in fresh],
        "backward dx": [lambda f=f: backward(f, False) for f, _ in fresh],
        "probe": [lambda: probing(probe), lambda: probing(probe_reference)],
        "inference": [lambda f=f: inference(f) for f, _ in fresh],
    }
    passes = {"forward": 1, "backward": 2, "backward dx": 1, "probe": 1, "inference": 1}
    return {name: (*functions, passes[name]) for name, functions in table.items()}


def check(block, batch):
    """The gate: no figure for a wrong result."""
    x, params, running, grad = make(batch, *block)
    results = []
    for function in (mbconv, mbconv_reference):
        leaves = [t.clone().requires_grad_() for t in (x, *params)]
        out = function(leaves[0], leaves[1:], [r.clone() for r in running], stride=block[3], eps=1e-3)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for ours, eager in zip(*results, strict=True):
        # By norm: an element whose activation sits on a kink within rounding may fall to either side of it.
        assert (ours - eager).norm() <= 3e-3 * eager.norm() + 1e-3 * grad.norm(), block
    gates = [f(x, grad, [params], [running], stride=block[3], eps=1e-3) for f in (probe, probe_reference)]
    torch.testing.assert_close(*gates, rtol=0, atol=1e-3 * grad.norm().item())
    mean, _ = gram(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)


def product_rate(n=2048, runs=5):
    a, b = torch.randn(n, n), torch.randn(n, n)
    torch.mm(a, b)
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5, help="runs of each, alternating")
    parser.add_argument("--only", type=int, nargs="*", help="indices of blocks")
    parser.add_argument("--csv", help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rate = product_rate()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {pf.instruction_set()}, "
        f"torch {torch.__version__}, float32, batch {arguments.batch}; torch.mm 2048: {rate / 1e9:.0f} GFLOP/s"
    )
    print(f"{'in out size stride k e':26}{'pass':12}{'ms':>8}{'eager ms':>10}{'times':>7}{'GFLOP/s':>9}{'of mm':>7}")
    rows = []
    for block in [BLOCKS[i] for i in arguments.only] if arguments.only else BLOCKS:
        check(block, min(arguments.batch, 8))
        for name, (ours, eager, passes) in cases(block, arguments.batch).items():
            ours(), eager()
            seconds = [(ours(), eager()) for _ in range(arguments.runs)]
            mine, theirs = (statistics.median(s) for s in zip(*seconds, strict=True))
            speed = passes * flops(arguments.batch, *block) / mine
            print(
                f"{' '.join(map(str, block)):26}{name:12}{mine * 1e3:8.2f}{theirs * 1e3:10.2f}{theirs / mine:7.2f}"
                f"{speed / 1e9:9.0f}{speed / rate:7.2f}",
                flush=True,
            )
            rows.append([*block, name, mine, theirs, theirs / mine, speed, speed / rate])
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.writer(file)
            shape = ["in", "out", "size", "stride", "kernel", "expand"]
            figures = ["pass", "seconds", "eager_seconds", "times", "flops_per_second", "of_mm"]
            writer.writerows([shape + figures, *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
