"""torch's flop counter counts for an op what it counts for its reference, and for a net what it does run plainly."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from proxyless_fast import ops, spaces
from proxyless_fast.costs import count_macs
from proxyless_fast.fusion import set_policy
from proxyless_fast.ops.conv import conv_norm_act, conv_norm_act_reference
from proxyless_fast.ops.mbconv import mbconv, mbconv_reference, probe, probe_reference
from proxyless_fast.supernet import derive


def counted(run, *inputs, backward=True):
    with FlopCounterMode(display=False) as counter:
        output = run(*inputs)
        if backward:
            (output[0] if isinstance(output, tuple) else output).sum().backward()
    return counter.get_total_flops()


def parameters(expand, kernel, cin=4, out=6):
    wide = cin * expand
    shapes = [(wide, cin, 1, 1), (wide,), (wide,)] if expand > 1 else []
    shapes += [(wide, 1, kernel, kernel), (wide,), (wide,), (out, wide, 1, 1), (out,), (out,)]
    return [torch.rand(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("wanted", ["input", "weights", "both", "neither"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("expand", [1, 3])
def test_an_mbconv(expand, stride, wanted):
    x, params = torch.randn(2, 4, 9, 8), parameters(expand, 3)
    x.requires_grad_(wanted in ("input", "both"))
    for p in params:
        p.requires_grad_(wanted in ("weights", "both"))
    backward = wanted != "neither"
    expected = counted(lambda: mbconv_reference(x, params, stride=stride), backward=backward)
    for policy in ("fast", "lean"):
        assert counted(lambda p=policy: mbconv(x, params, stride=stride, policy=p), backward=backward) == expected > 0


def test_a_probe():
    x, params = torch.randn(2, 4, 8, 8), [parameters(3, 3), parameters(1, 5), parameters(6, 7)]
    grad = torch.randn(2, 6, 8, 8)
    expected = counted(lambda: probe_reference(x, grad, params), backward=False)
    assert counted(lambda: probe(x, grad, params), backward=False) == expected > 0


@pytest.mark.parametrize("stride", [1, 2])
def test_a_stem(stride):
    x, weight = torch.randn(2, 3, 9, 8), torch.randn(5, 3, 3, 3, requires_grad=True)
    norm = (torch.ones(5), torch.zeros(5), None, None, stride)
    expected = counted(lambda: conv_norm_act_reference(x, weight, *norm))
    assert counted(lambda: conv_norm_act(x, weight, *norm)) == expected > 0


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_ops(stride):
    x, weight = torch.randn(2, 4, 9, 8, requires_grad=True), torch.randn(4, 1, 5, 5, requires_grad=True)
    expected = counted(lambda: ops.depthwise_forward_reference(x, weight, stride=stride))
    assert counted(lambda: ops.depthwise_forward(x, weight, stride=stride)) == expected > 0
    w1, norm1 = torch.randn(4, 3), torch.ones(4, 4)
    narrow = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        both = [
            counted(lambda run=run: run(narrow, w1, norm1, weight, stride), backward=False)
            for run in (ops.expand_depthwise_forward, ops.expand_depthwise_forward_reference)
        ]
        dz = ops.depthwise_forward(x, weight, stride=stride)[0]
        arguments = (dz, None, None, x, None, None, weight, stride)
        single = [
            counted(lambda run=run: run(*arguments), backward=False)
            for run in (ops.depthwise_backward_input, ops.depthwise_backward_weight)
        ]
        whole = counted(lambda: ops.depthwise_backward(*arguments), backward=False)
        again = (dz, None, None, narrow, w1, norm1, weight, stride)
        assert counted(lambda: ops.expand_depthwise_backward(*again), backward=False) == whole
    assert both[0] == both[1] > 0
    assert sum(single) == whole > 0


@pytest.mark.parametrize("training", [True, False])
def test_a_net(training):
    net = derive(spaces.small(resolution=14)).train(training)
    plain = copy.deepcopy(net)
    set_policy(plain, "off")
    x = torch.randn(3, 1, 14, 14)
    assert counted(net, x) == counted(plain, x)
    with torch.no_grad():
        assert counted(net, x, backward=False) == 2 * 3 * count_macs(net)
