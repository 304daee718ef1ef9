"""What fits is told before it runs: held to what a step is then measured to take."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import proxyless_fast as pf
from proxyless_fast.bench.measure import peak_bytes
from proxyless_fast.cli import main

REPOSITORY = Path(__file__).resolve().parents[1]
NETS = {
    "small": lambda: pf.spaces.small(),
    "mobile": lambda: pf.spaces.mobile(resolution=96),
    "cell": lambda: pf.spaces.cell(),
}


def fresh_step(net, policy, batch, mode, place):
    """For peak_bytes: a step with two images to warm up, and the step itself; gradients are made in both."""
    torch.set_num_threads(2)
    own = NETS[net]().train()
    pf.set_policy(own, policy)
    images = torch.zeros(batch, own.in_channels, own.resolution, own.resolution)
    frozen = list(pf.weight_parameters(own) if mode == "full" else pf.arch_parameters(own))
    for p in frozen:
        p.requires_grad_(False)

    def step(count):
        for op in pf.mixed_ops(own).values():
            op.activate(min(place, len(op) - 1), mode=mode)
        cross_entropy(own(images[:count]), torch.zeros(count, dtype=torch.long)).backward()
        own.zero_grad(set_to_none=True)

    def warm():
        step(2)
        pf.release_memory()

    return warm, lambda: step(batch)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fast", "lean"])
@pytest.mark.parametrize(("net", "batch"), [("small", 256), ("mobile", 64), ("cell", 64)])
def test_a_planned_step_takes_what_is_measured(net, batch, policy, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    planned = pf.plan(NETS[net](), 1 << 30, policies=(policy,)).step_bytes[policy](batch)
    kinds = [("path", 5), ("full", 5)] if net != "cell" else [("path", 3), ("full", 3)]
    measured = max(
        peak_bytes("tests.test_planning:fresh_step", net=net, policy=policy, batch=batch, mode=mode, place=place)
        for mode, place in kinds
    )
    assert planned == pytest.approx(measured, rel=0.1)


def test_the_largest_batch_is_the_last_that_fits():
    net = pf.spaces.small(candidates=["3x3_MBConv3", "5x5_MBConv6"], resolution=16)
    found = pf.plan(net, 64 << 20)
    for policy, images in found.largest.items():
        need = found.step_bytes[policy]
        assert (
            images > 0
            and need(images) + found.kept_bytes <= 64 << 20 < need(images + images // 100 + 2) + found.kept_bytes
        )
    assert found.largest["lean"] > found.largest["fast"] > found.largest["off"]
    assert pf.plan(net, 1000).largest == {"fast": 0, "lean": 0, "off": 0}


def test_the_net_is_left_as_it_was():
    net = pf.spaces.small(candidates=["3x3_MBConv3"], resolution=16).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pf.plan(net, 1 << 30, policies=("lean",))
    assert not net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert {module.policy for module in net.modules() if hasattr(module, "policy")} == {"fast"}


def test_a_net_of_ones_own():
    net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 32 * 32, 2))
    found = pf.plan(net, 1 << 30, image=(3, 32, 32), policies=("off",), step=lambda net, x: net(x).square().mean())
    one, two = (found.step_bytes["off"](images) for images in (100, 200))
    assert two - one == pytest.approx(
        100 * 64 * 32 * 32 * 4 * 3, rel=0.1
    )  # an activation, its gradient, that before the ReLU


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("budget_bytes: got 0", (pf.spaces.small, 0, {})),
        ("policies: got 'auto'", (pf.spaces.small, 1, {"policies": ("auto",)})),
        ("image: got None, and Linear does not tell", (lambda: nn.Linear(2, 2), 1, {})),
        ("net: got one that is not on the CPU", (lambda: nn.Linear(2, 2).to("meta"), 1, {"image": (1, 2, 2)})),
    ],
)
def test_what_is_refused(said, arguments):
    make, budget, options = arguments
    with pytest.raises(ValueError, match=re.escape(said)):
        pf.plan(make(), budget, **options)


def test_the_command_line_says_it(capsys):
    assert main(["plan", "--budget", "0.5", "--candidates", "3x3_MBConv3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["policy fast", "policy lean", "policy off"]
    assert main(["plan", "--budget", "0"]) == 2
    assert "--budget: got 0.0" in capsys.readouterr().err


LIMITED = """
import resource, torch, proxyless_fast as pf
from tests.search.test_search import ToyNet, toy_loaders, config
net = ToyNet()
net.in_channels, net.resolution = 3, 8
loaders = toy_loaders()
def step(net, batch):
    net(batch[0][:2])
    torch.empty(1 << 50)
search = pf.Search(net, *loaders, config(target_ms=None), step=step)
try:
    search.fit()
except MemoryError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_step_without_memory_is_answered_with_what_fits():
    done = subprocess.run([sys.executable, "-c", LIMITED], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    expected = r"a step of 8 images in 1 part does not fit: in [\d.]+ GiB fit at most \d+ with policy 'fast', \d+ with"
    assert re.match(expected, done.stdout), done.stdout + done.stderr
