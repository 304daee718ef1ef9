"""The fused MBConv against eager channels_last PyTorch, block by block: python -m benchmarks.cpu.mbconv [--batch 32].

Runs of the two alternate in one process, and the fastest of each counts: other work on the machine disturbs it least;
the correctness gate comes first. FLOPs are those of the plain algorithm, two per multiply-add, so that recomputation
counts against the fused path.
"""

import argparse
import csv
import platform
import sys
import time

import torch

import proxyless_fast as pf
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


def cases(block, batch, clock):
    """Name -> (ours, eager, passes of forward FLOPs), each a function that times its own part and returns seconds."""
    x, params, running, grad = make(batch, *block)
    options = {"stride": block[3], "eps": 1e-3}
    leaf = x.clone().requires_grad_()
    trained = [p.clone().requires_grad_() for p in params]

    def timed(work):
        start = clock()
        work()
        return clock() - start

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
    """The gate: no figure for a wrong result. Against float64; a kink that rounding crosses is worth up to 1e-3."""
    x, params, running, grad = make(batch, *block)
    options = {"stride": block[3], "eps": 1e-3}

    def everything(function, gates, dtype):
        cast = [[t.to(dtype) for t in tensors] for tensors in ((x, *params), running)]
        leaves = [t.clone().requires_grad_() for t in cast[0]]
        out = function(leaves[0], leaves[1:], [r.clone() for r in cast[1]], **options)
        gate = gates(cast[0][0], grad.to(dtype), [cast[0][1:]], [cast[1]], **options) / grad.norm().to(dtype)
        return [gate, out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    truth = everything(mbconv_reference, probe_reference, torch.float64)
    eager = everything(mbconv_reference, probe_reference, torch.float32)
    ours = everything(mbconv, probe, torch.float32)
    for mine, theirs, exact in zip(ours, eager, truth, strict=True):
        errors = [((t - exact).norm() / exact.norm()).item() for t in (mine, theirs)]
        assert errors[0] <= 2 * errors[1] + 1e-3, (block, errors)


def product_rate(clock, n=2048, runs=5):
    a, b = torch.randn(n, n), torch.randn(n, n)
    torch.mm(a, b)
    seconds = []
    for _ in range(runs):
        start = clock()
        torch.mm(a, b)
        seconds.append(clock() - start)
    return 2 * n**3 / min(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5, help="runs of each, alternating")
    parser.add_argument("--only", type=int, nargs="*", help="indices of blocks")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time: for one thread on a machine that has other work"
    )
    parser.add_argument("--csv", help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    rate = product_rate(clock)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {pf.instruction_set()}, "
        f"torch {torch.__version__}, float32, batch {arguments.batch}; torch.mm 2048: {rate / 1e9:.0f} GFLOP/s"
    )
    print(f"{'in out size stride k e':26}{'pass':12}{'ms':>8}{'eager ms':>10}{'times':>7}{'GFLOP/s':>9}{'of mm':>7}")
    rows = []
    for block in [BLOCKS[i] for i in arguments.only] if arguments.only else BLOCKS:
        check(block, min(arguments.batch, 2))
        for name, (ours, eager, passes) in cases(block, arguments.batch, clock).items():
            ours(), eager()
            seconds = [(ours(), eager()) for _ in range(arguments.runs)]
            mine, theirs = (min(s) for s in zip(*seconds, strict=True))
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
