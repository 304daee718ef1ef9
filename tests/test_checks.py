"""Nets in wrappers of torch's: taken for the net inside, or refused in a sentence."""

import json

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from proxyless_fast import export, latency, spaces
from proxyless_fast.checks import unwrapped
from proxyless_fast.costs import count_macs, count_parameters, describe_layers
from proxyless_fast.io.state import read_weights
from proxyless_fast.supernet import derive, mixed_ops


@pytest.fixture(scope="module")
def net():
    supernet = spaces.small(resolution=8)
    return derive(supernet, {label: i % len(op) for i, (label, op) in enumerate(mixed_ops(supernet).items())}).eval()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('gloo') / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compile": torch.compile,
    "AveragedModel": AveragedModel,
    "both": lambda net: nn.DataParallel(torch.compile(net)),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_net_is_the_net_inside(net, wrap, tmp_path):
    wrapped = wrap(net)
    assert count_macs(wrapped) == count_macs(net) and count_parameters(wrapped) == count_parameters(net)
    assert [layer.choices for layer in describe_layers(wrapped)] == [layer.choices for layer in describe_layers(net)]
    assert export.architecture(wrapped) == export.architecture(net)
    (config, state), (own, weights) = export.official(wrapped), export.official(net)
    assert config == own and list(state) == list(weights)
    export.save_weights(wrapped, tmp_path / "w.safetensors")
    assert sorted(read_weights(tmp_path / "w.safetensors")) == sorted(net.state_dict())
    export.load_weights(wrapped, tmp_path / "w.safetensors")
    export.save_architecture(wrapped, tmp_path / "a.json")
    again = export.load_architecture(tmp_path / "a.json").eval()
    export.load_weights(again, tmp_path / "w.safetensors")
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    assert export.onnx(wrapped, tmp_path / "n.onnx") < 1e-4
    assert latency.measure(wrapped, repeats=1) > 0
    table = latency.profile(wrapped, repeats=1)
    assert latency.ExpectedLatency(wrapped, table).fixed == latency.ExpectedLatency(net, table).fixed
    pytest.importorskip("timm")
    with torch.no_grad():
        torch.testing.assert_close(export.timm(wrapped)(x), net(x), rtol=1e-5, atol=1e-5)


def test_a_users_own_module_is_never_unwrapped(net):
    class Doubled(nn.DataParallel):
        def forward(self, x):
            return 2 * self.module(x)

    class Ema(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    for own in (Doubled(net), Ema(net)):
        assert unwrapped(own) is own
        with pytest.raises(ValueError, match=f"got {type(own).__name__}; give its .module"):
            count_macs(own)
        with pytest.raises(ValueError, match=f"got {type(own).__name__}; give its .module"):
            export.architecture(own)


def test_hooks_on_a_wrapper_are_not_passed_over(net):
    wrapped = nn.DataParallel(net)
    wrapped.register_forward_hook(lambda module, args, output: 2 * output)
    for use in (count_macs, export.architecture, lambda w: latency.measure(w, repeats=1)):
        with pytest.raises(ValueError, match=r"net is a DataParallel with hooks of its own: give the net inside, its"):
            use(wrapped)
    assert json.dumps(export.architecture(wrapped.module))
