"""The official format: what comes from there, what goes there, and what is refused by its field."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from proxyless_fast import export, spaces
from proxyless_fast.blocks import Identity, MBConv, ResidualBlock, Zero
from proxyless_fast.costs import count_macs, count_parameters
from proxyless_fast.supernet import derive, mixed_ops
from tests.export.test_export import edited, image, random_path

NAMES = ("cpu", "gpu", "mobile")


@pytest.fixture
def small():
    return random_path(spaces.small(resolution=14), seed=0)


@pytest.fixture
def config(small):
    return export.official(small)[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_published_nets_load_and_come_back_unchanged(shared, name):
    path = shared / "official" / f"proxyless_{name}.config"
    counts = json.loads((shared / "official" / "nets.json").read_text())[name]
    net = export.from_official(path)
    assert count_parameters(net) == counts["parameters"] == sum(p.numel() for p in net.parameters())
    assert count_macs(net) == counts["macs"]
    published = json.loads(path.read_text())
    config, state = export.official(net)
    assert config == published
    assert {"first_conv.conv.weight", "blocks.1.mobile_inverted_conv.inverted_bottleneck.bn.running_var"} <= set(state)
    assert {"feature_mix_layer.bn.weight", "classifier.linear.bias"} <= set(state)


def test_an_official_checkpoint_gives_the_same_net(small):
    config, state = export.official(small)
    config = json.loads(json.dumps(config))  # as from a file
    again = export.from_official(config, state, resolution=small.resolution).eval()
    x = image(small)
    assert torch.equal(again(x), small(x))
    assert any(b["mobile_inverted_conv"]["name"] == "ZeroLayer" for b in config["blocks"])
    assert count_parameters(again) == count_parameters(small) and count_macs(again) == count_macs(small)


def half(state):
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}


@pytest.mark.parametrize(
    ("given", "tolerance"),
    [
        (lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")}, 0),  # of old versions
        (lambda s: {f"module.{k}": v for k, v in s.items()}, 0),
        (lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}, 0),
        (lambda s: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in s.items()}}, 0),
        (lambda s: {"model": s, "optimizer": {}}, 0),
        (lambda s: {"net": {"state_dict": s}}, 0),
        (lambda s: {k: v.numpy() for k, v in s.items()}, 0),
        (lambda s: {k: v.numpy().astype(v.numpy().dtype.newbyteorder(">")) for k, v in s.items()}, 0),
        (lambda s: {k: np.asarray(v.double(), np.longdouble) for k, v in s.items()}, 0),
        (lambda s: {k: v.double() for k, v in s.items()}, 0),  # counters too
        (half, 0.05),
        (lambda s: {k: v.bfloat16() for k, v in s.items()}, 0.3),
    ],
)
def test_states_as_others_save_them_load(small, given, tolerance):
    config, state = export.official(small)
    again = export.from_official(config, given(state)).eval()
    x = image(small)
    assert (again(x) - small(x)).abs().max() <= tolerance * small(x).abs().max()
    assert {p.dtype for p in again.parameters()} == {torch.float32}


BIAS = "classifier.linear.bias"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (lambda s: {**s, BIAS: s[BIAS] * torch.nan}, rf"{BIAS} must be finite in torch\.float32, got nan"),
        (lambda s: {**s, BIAS: s[BIAS].double() + 1e300}, rf"{BIAS} must be finite in torch\.float32, got inf"),
        (lambda s: {**s, BIAS: torch.zeros(10, dtype=torch.int8)}, r"of a type like torch\.float32, got .*int8"),
        (lambda s: {**s, BIAS: np.array(["a"] * 10)}, "must hold numbers, got an array of <U1"),
        (lambda s: {**s, BIAS: [0.0] * 10}, "must be a tensor or an array, got a list of 10"),
        (lambda s: {**s, BIAS: torch.zeros(10).to_sparse()}, r"must be a dense tensor.*sparse"),
        (lambda s: {**s, BIAS: torch.zeros(10, device="meta")}, "got a meta one"),
        (lambda s: {**s, "first_conv.bn.running_var": -s["first_conv.bn.running_var"]}, "must not be negative"),
        (lambda s: {**s, "first_conv.bn.num_batches_tracked": torch.tensor(0.5)}, r"like torch\.int64, got .*32"),
        (lambda s: {"state_dict": s, "model": s}, "has state_dict and model, expected one state dict"),
        (lambda s: [s], "expected tensors by name, got list"),
        (lambda s: {f"module.{k}" if k == BIAS else k: v for k, v in s.items()}, f"it lacks {BIAS}"),
        (lambda s: {}, "it lacks .* and [0-9]+ more"),
        (lambda s: {**s, "a\n\x07": s[BIAS]}, r"has what the net lacks: 'a\\n\\x07'"),
        (lambda s: {**s, 3: s[BIAS]}, "has what the net lacks: 3"),
    ],
)  # fmt: skip
def test_states_that_are_none_of_this_net_are_refused(small, given, complaint):
    config, state = export.official(small)
    with pytest.raises(ValueError, match=complaint):
        export.from_official(config, given(state))


def test_a_pruned_candidate_comes_back_pruned():
    """Its alpha is -inf, which no weight may be."""
    from proxyless_fast.io.state import load_state

    net, other = spaces.small(), spaces.small()
    mixed_ops(net)["blocks.1"].alpha.data[1] = -torch.inf
    load_state(other, net.state_dict(), "the state")
    assert torch.equal(mixed_ops(other)["blocks.1"].alpha, mixed_ops(net)["blocks.1"].alpha)
    mixed_ops(net)["blocks.1"].alpha.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"alpha must be finite .* got nan"):
        load_state(other, net.state_dict(), "the state")


def test_batch_norm_settings_follow_the_config(small, config):
    config["bn"] = {"momentum": 0.01, "eps": 1e-5}
    net = export.from_official(config)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.momentum, m.eps) for m in norms} == {(0.01, 1e-5)}
    assert export.official(net)[0]["bn"] == config["bn"]


# blocks around a ZeroLayer


@pytest.mark.parametrize("shortcut", ["identity", None, {"name": "ZeroLayer", "stride": 1}])
def test_a_block_around_a_zero_layer_is_the_identity(small, shortcut):
    """Official MobileInvertedResidualBlock.forward does not ask for the shortcut there."""
    config, state = export.official(small)
    i = next(i for i, b in enumerate(config["blocks"]) if b["mobile_inverted_conv"]["name"] == "ZeroLayer")
    if shortcut != "identity":
        config["blocks"][i]["shortcut"] = shortcut
    x = image(small)
    assert torch.equal(export.from_official(config, state).eval()(x), small(x))


def test_a_zero_layer_as_shortcut_is_none(small):
    config, state = export.official(small)
    i = next(i for i, b in enumerate(config["blocks"]) if b["shortcut"] and "expand_ratio" in b["mobile_inverted_conv"])
    config["blocks"][i]["shortcut"] = {"name": "ZeroLayer", "stride": 1}
    small.blocks[i].shortcut = False
    x = image(small)
    assert torch.equal(export.from_official(config, state).eval()(x), small(x))


# fields


def op(i=0, **fields):
    return lambda c: c["blocks"][i]["mobile_inverted_conv"].update(fields)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("bn"),
        lambda c: c.update(bn=None),
        lambda c: c["bn"].update(ws_eps=None),
        lambda c: c["classifier"].pop("dropout_rate"),
        lambda c: c["first_conv"].update(use_se=False),
        lambda c: c["first_conv"].update(dilation=1.0),
        op(mid_channels=None),
        op(1, mid_channels=48),
        op(act_func="relu6", use_se=False, groups=None),
        op(name="MBConvLayer"),
        op(kernel_size=[3, 3], stride=[1, 1]),
        op(expand_ratio=1.0, in_channels=16.0),
    ],
)
def test_fields_that_change_nothing_change_nothing(small, change):
    config, state = export.official(small)
    assert config["blocks"][1]["mobile_inverted_conv"]["expand_ratio"] == 3
    x = image(small)
    change(config)
    assert torch.equal(export.from_official(config, state).eval()(x), small(x))


def test_activations_are_honoured(small):
    config, state = export.official(small)
    config["first_conv"]["act_func"] = "h_swish"
    assert isinstance(export.from_official(config, state).first_conv.act, nn.Hardswish)
    del config["first_conv"]["act_func"]  # the official layer's own default
    assert isinstance(export.from_official(config).first_conv.act, nn.ReLU)


def test_the_resolution_is_the_config_s_or_the_one_asked_for(config):
    assert export.from_official(config).resolution == 224
    assert export.from_official(config, resolution=28).resolution == 28
    config["resolution"] = 160
    assert export.from_official(config).resolution == export.from_official(config, resolution=160).resolution == 160
    with pytest.raises(ValueError, match="resolution must be the 224 that was asked for, got 160"):
        export.from_official(config, resolution=224)
    for wrong in (0, -1, 2.5, "a", True):
        with pytest.raises(ValueError, match="resolution must be"):
            export.from_official({**config, "resolution": None}, resolution=wrong)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c.pop("blocks"), "the official config: blocks is missing"),
        (lambda c: c.update(blocks=3), r"blocks must be a valid list, got 3"),
        (lambda c: c.update(blocks=[]), "blocks .* at least 1 item"),
        (lambda c: c.update(blocks=[None]), r"blocks\.0 must be an object, got None"),
        (lambda c: c.update(name="MobileNetV3"), "name must be 'ProxylessNASNets', got 'MobileNetV3'"),
        (lambda c: c.pop("name"), "name is missing"),
        (lambda c: c.update(dataset="imagenet"), "dataset is unknown and might change what the file means"),
        (lambda c: c.update(feature_mix_layer=None), "feature_mix_layer must be an object, got None"),
        (lambda c: c.update({3: 4}), "must be|should be"),
        (lambda c: c["bn"].pop("eps"), r"bn\.eps is missing"),
        (lambda c: c["bn"].update(eps=-1), r"bn\.eps must be greater than or equal to 0, got -1"),
        (lambda c: c["bn"].update(eps=float("nan")), r"bn\.eps must be a finite number, got nan"),
        (lambda c: c["bn"].update(momentum="0.1"), r"bn\.momentum must be a number, got '0\.1'"),
        (lambda c: c["bn"].update(ws_eps=1e-5), r"bn\.ws_eps must be None, got 1e-05"),
        (lambda c: c["first_conv"].update(groups=2), r"first_conv\.groups must be 1, got 2"),
        (lambda c: c["first_conv"].update(groups=True), r"first_conv\.groups must be 1, got True"),
        (lambda c: c["first_conv"].update(act_func="swish"), r"first_conv\.act_func must be .*, got 'swish'"),
        (lambda c: c["first_conv"].update(ops_order="bn_act_weight"), r"ops_order must be 'weight_bn_act'"),
        (lambda c: c["first_conv"].update(kernel_size=4), r"first_conv\.kernel_size must be odd, got 4"),
        (lambda c: c["first_conv"].update(kernel_size=[3, 5]), r"kernel_size must be a whole number, got a list of 2"),
        (lambda c: c["first_conv"].update(out_channels=17), r"blocks\.0\..*in_channels must be 17, .* got 16"),
        (lambda c: c["classifier"].update(bias=False), r"classifier\.bias must be True, got False"),
        (lambda c: c["classifier"].update(in_features=9), r"classifier\.in_features must be [0-9]+, .* got 9"),
        (lambda c: c["classifier"].update(dropout_rate=1), r"dropout_rate must be less than 1, got 1"),
        (op(name="DepthConvLayer"), r"blocks\.0\.mobile_inverted_conv\.name must be .*, got 'DepthConvLayer'"),
        (op(name="IdentityLayer"), r"name must be one of .*, got 'IdentityLayer'"),
        (lambda c: c["blocks"][0]["mobile_inverted_conv"].pop("name"), r"mobile_inverted_conv\.name is missing"),
        (lambda c: c["blocks"][0]["mobile_inverted_conv"].pop("stride"), r"inverted_conv\.stride is missing"),
        (lambda c: c["blocks"][0].update(mobile_inverted_conv=None), "inverted_conv must be an object, got None"),
        (op(kernel_size="3"), r"blocks\.0\.mobile_inverted_conv\.kernel_size must be a whole number, got '3'"),
        (op(stride=True), "stride must be a whole number, got True"),
        (op(expand_ratio=2.5), r"expand_ratio must be a whole number, got 2\.5"),
        (op(expand_ratio=10**400), "expand_ratio must be .*, got an integer of [0-9]+ bits"),
        (op(expand_ratio=0), "expand_ratio must be greater than or equal to 1, got 0"),
        (op(mid_channels=7), r"conv\.mid_channels must be in_channels \* expand_ratio = 16 or null, got 7"),
        (op(act_func="tanh"), "act_func must be 'relu6', got 'tanh'"),
        (op(act_func="relu"), "act_func must be 'relu6', got 'relu'"),
        (op(act_func=None), "act_func must be 'relu6', got None"),
        (op(use_se=True), "use_se must be False, got True"),
        (op(groups=1), "groups must be None, got 1"),
        (op(dropout_rate=0.5), "dropout_rate is unknown"),
        (op(2, in_channels=99), r"blocks\.2\.mobile_inverted_conv\.in_channels must be [0-9]+, .* got 99"),
        (op(in_channels=65536, out_channels=65536), "in_channels must be 16"),
        (lambda c: c["classifier"].update(out_features=65536) or c["feature_mix_layer"].update(out_channels=65536)
            or c["classifier"].update(in_features=65536), "at most 134,217,728 parameters"),
        (lambda c: c["blocks"][0].pop("shortcut"), r"blocks\.0\.shortcut is missing"),
        (lambda c: c["blocks"][0].update(shortcut={"name": "ConvLayer"}), r"blocks\.0\.shortcut\.name must be one of"),
        (lambda c: c["blocks"][1].update(shortcut={"name": "IdentityLayer", "in_channels": 16, "out_channels": 16}),
            r"blocks\.1\.shortcut must be null where the block changes the shape \(stride 2, 16 to 24 channels\)"),
        (lambda c: c["blocks"][1].update(mobile_inverted_conv={"name": "ZeroLayer", "stride": 2}),
            r"blocks\.1\.mobile_inverted_conv\.stride must be 1: .* is the identity, got 2"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_built_is_named(config, change, complaint):
    changed = edited(config, change)
    with pytest.raises(ValueError, match=complaint) as caught:
        export.from_official(changed)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"[1, 2", r"bad\.config cannot be read as official net config: Expecting ',' delimiter"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b"", "cannot be read as official net config: Expecting value"),
        (b"\xff\xfe{\x00}\x00", "can't decode byte 0xff"),
        (b"[" * 100_000, "expected at most 32 levels of brackets, got 100000"),
        (b'{"a":' * 100_000, "expected at most 32 levels of brackets, got 100000"),
        (b'{"a": "' + b"\\" * 99_999, "cannot be read"),
        (b"[" + b"1," * 300_000 + b"1]", "expected at most 200,000 values"),
        (b'{"a": ' + b"1" * 5000 + b"}", "numbers of at most 64 digits, got one of 5000"),
        (b'{"a": 1e400}', "expected finite numbers, got '1e400'"),
        (b'{"a": NaN}', "expected finite numbers, got NaN"),
        (b'{"a": -Infinity}', "expected finite numbers, got -Infinity"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice in one object"),
        (b'{"a": 1} {"b": 2}', "Extra data"),
        (b" " * (5 << 20), "expected at most 4,194,304 bytes"),
        (b'{"\\ud800": 1}', r"must be a valid string, .* got '.ud800'"),
    ],
)
def test_files_that_are_no_configs_are_named(tmp_path, text, complaint):
    path = tmp_path / "bad.config"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        export.from_official(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    str(caught.value).encode()


def test_paths_without_a_config_are_named(tmp_path, config):
    with pytest.raises(FileNotFoundError, match="no official net config at"):
        export.from_official(tmp_path / "none.config")
    with pytest.raises(ValueError, match="no regular file"):
        export.from_official(tmp_path)
    text = json.dumps(config, indent=1).replace("\n", "\r\n")
    (tmp_path / "windows.config").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert export.official(export.from_official(tmp_path / "windows.config"))[0] == config


# what goes there


def test_what_has_no_official_form_is_named(small):
    with pytest.raises(ValueError, match="got CellNet"):
        export.official(derive(spaces.cell(channels=4, cells_per_stage=1)))
    with pytest.raises(ValueError, match=r"blocks\.1 has no form in the official config"):
        export.official(spaces.small())
    for block in (
        ResidualBlock(MBConv(16, 24, 3, 2, 3, act="silu"), False),
        ResidualBlock(Identity(), False),
        ResidualBlock(Zero(2, 24), False),
    ):
        small.blocks[1] = block
        with pytest.raises(ValueError, match=r"blocks\.1 has no form in the official config"):
            export.official(small)


def swap_activation(net):
    net.blocks[1].mobile_inverted_conv.depth_conv.act = nn.Hardswish()


def add_module(net):
    net.feature_mix_layer.add_module("drop", nn.Dropout(0.5))


def replace_classifier(net):
    net.classifier = nn.Linear(net.classifier.in_features, 3)


def unshortcut_a_zero(net):
    next(b for b in net.blocks if isinstance(b.mobile_inverted_conv, Zero)).shortcut = False


def change_stride(net):
    net.first_conv.conv.stride = (2, 2)


def other_activation(net):
    net.first_conv.act = nn.ReLU()


def hook(net):
    net.blocks[1].register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("edit", [swap_activation, add_module, replace_classifier, unshortcut_a_zero, hook])
def test_an_edited_net_that_the_format_cannot_say_is_refused(small, edit):
    edit(small)
    with pytest.raises(ValueError, match=r"official config|as it is, the (block|layer) has no"):
        export.official(small)


@pytest.mark.parametrize("edit", [change_stride, other_activation])
def test_an_edited_net_that_the_format_can_say_is_told_as_it_is(small, edit):
    x = 20 * image(small)  # above 6, where ReLU and ReLU6 differ
    before = small(x)
    edit(small)
    again = export.from_official(*export.official(small)).eval()
    assert torch.equal(again(x), small(x)) and not torch.equal(small(x), before)


def test_there_is_no_second_description_of_an_activation(small):
    with pytest.raises(AttributeError):
        small.first_conv.act_name = "silu"


def test_a_classifier_for_other_classes_is_told_as_it_is(small):
    net = copy.deepcopy(small)
    net.classifier.linear = nn.Linear(net.classifier.in_features, 3)
    config, state = export.official(net)
    assert config["classifier"]["out_features"] == 3
    x = image(small)
    assert torch.equal(export.from_official(config, state).eval()(x), net(x))
