"""Derived nets are plain to every tool: what torch writes of them runs where this package has never been imported."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from proxyless_fast import export, spaces
from proxyless_fast.blocks import MBConv, Zero, candidate
from proxyless_fast.fusion import set_policy
from proxyless_fast.supernet import derive, mixed_ops, sample
from tests.export.test_export import lively

SPACES = {
    "mobile": lambda: spaces.mobile(num_classes=5, resolution=32, width=0.35),
    "small": lambda: spaces.small(resolution=14),
    "cell": lambda: spaces.cell(channels=8, cells_per_stage=1, resolution=9),
}

# In a process of its own: whatever asks for the package fails, whether it is installed or not.
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "proxyless_fast":
            raise AssertionError("the file asks for this package")
sys.meta_path.insert(0, Blocked())
import torch
x, wanted = torch.load(sys.argv[2])
kind, path = sys.argv[1], sys.argv[3]
with torch.no_grad():
    if kind == "jit":
        got = torch.jit.load(path)(x)
    elif kind == "export":
        got = torch.export.load(path).module()(x)
    else:
        import onnxruntime
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
print(float((got - wanted).abs().max() / wanted.abs().max()))
"""


@pytest.fixture(autouse=True)
def nothing_compiled():
    """All nets share a few forwards, of which torch keeps eight graphs in a process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=SPACES)
def net(request):
    supernet = SPACES[request.param]()
    ops = mixed_ops(supernet)
    return lively(derive(supernet, {label: (2 * i + 1) % len(ops[label]) for i, label in enumerate(ops)}))


def image(net, batch=3):
    return torch.randn(batch, net.in_channels, net.resolution, net.resolution)


def elsewhere(kind, path, net, folder):
    """The relative error of a file of the net, run in a process without this package, on a batch of another size."""
    x, plain = image(net, 3 if kind == "export" else 5), copy.deepcopy(net)
    set_policy(plain, "off")
    with torch.no_grad():
        torch.save((x, plain(x)), folder / "x.pt")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, kind, str(folder / "x.pt"), str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    return float(done.stdout)


def allowed(training):
    """Norms over the few pixels of three images amplify rounding, which threads of another process add up otherwise."""
    return 1e-3 if training else 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_a_trace_runs_without_the_package(net, training, tmp_path):
    net.train(training)
    traced = torch.jit.trace(copy.deepcopy(net), image(net), check_trace=False)
    traced.load_state_dict(net.state_dict())  # in training, tracing has moved the statistics
    traced.save(str(tmp_path / "t.pt"))
    assert elsewhere("jit", tmp_path / "t.pt", net, tmp_path) <= allowed(training)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_an_exported_program_runs_without_the_package(net, training, tmp_path):
    net.train(training)
    program = torch.export.export(net, (image(net),))
    assert not [n for n in program.graph.nodes if "proxyless" in str(n.target)]
    torch.export.save(program, tmp_path / "e.pt2")
    assert elsewhere("export", tmp_path / "e.pt2", net, tmp_path) <= allowed(training)


@pytest.mark.slow
def test_onnx_files_run_without_the_package(net, tmp_path):
    export.onnx(net, tmp_path / "ours.onnx")
    batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        net, (image(net),), str(tmp_path / "torchs.onnx"), dynamo=True, verbose=False, dynamic_shapes=batch
    )
    for name in ("ours.onnx", "torchs.onnx"):
        assert elsewhere("onnx", tmp_path / name, net, tmp_path) <= 1e-5


@pytest.mark.slow
def test_the_block_on_imports_bites(net, tmp_path):
    torch.save(net, tmp_path / "pickled.pt")
    script = BLOCKED.split("x, wanted")[0] + "torch.load(sys.argv[1], weights_only=False)"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "pickled.pt")], capture_output=True, text=True)
    assert done.returncode != 0 and "the file asks for this package" in done.stderr


@pytest.mark.parametrize("training", [False, True])
def test_fx_records_what_the_net_does(net, training):
    net.train(training)
    recorded = torch.fx.symbolic_trace(copy.deepcopy(net))
    assert not [n for n in recorded.graph.nodes if "proxyless" in str(n.target)]
    x = image(net, 8)
    set_policy(net, "off")
    with torch.no_grad():
        wanted = net(x)
        assert (recorded(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    "block", [Zero(), Zero(2), Zero(1, 8), candidate("Zero", 6, 4, 2), nn.Sequential(Zero(), MBConv(6, 6))]
)
def test_fx_records_zeros_as_zeros(block):
    block = lively(block)
    x = torch.randn(2, 6, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), block(x), rtol=1e-5, atol=1e-6)


def test_a_compiled_net_compiles_once(net):
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
    x = image(net, 8)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-4)


SUPERNETS = [("small", "path"), ("small", "full"), ("small", "two"), ("mobile", "full"), ("cell", "full")]


@pytest.mark.parametrize(("space", "mode"), SUPERNETS)
def test_a_compiled_supernet_takes_the_path_that_was_sampled(space, mode):
    supernet = getattr(spaces, space)(resolution=32 if space == "mobile" else 8)
    compiled = torch.compile(copy.deepcopy(supernet), backend="aot_eager")
    x = image(supernet, 4)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for seed in range(6):
            results = []
            for net in (supernet, compiled._orig_mod):
                net.zero_grad()
                sample(net, mode, torch.Generator().manual_seed(seed))
            for run, net in ((supernet, supernet), (compiled, compiled._orig_mod)):
                output = run(x)
                output.square().sum().backward()
                results.append([output.detach(), *(op.alpha.grad for op in mixed_ops(net).values())])
            for a, b in zip(*results, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_what_torch_compile_keeps_holds_for_one_type():
    from proxyless_fast.candidates import offered

    class Doubled(MBConv):
        def forward(self, x, shortcut=False):
            return 2 * super().forward(x, shortcut)

    asked = torch.compile(lambda module: offered(module, "run_gated") is not None, backend="eager")
    assert [asked(m) for m in (MBConv(4, 4), Zero(), Doubled(4, 4), MBConv(4, 4))] == [True, False, False, True]
