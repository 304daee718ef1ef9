"""Old names work for one more version, and say the new one."""

import warnings

import pytest
import torch

import proxyless_fast as pf


def old(match):
    return pytest.warns(DeprecationWarning, match=match)


def test_the_face_of_the_package():
    net = pf.spaces.small(resolution=8)
    with old("proxyless_fast.macs is now proxyless_fast.count_macs"):
        assert pf.macs(net) == pf.count_macs(net) > 0
    with old("count_parameters"):
        assert pf.parameters(net) == pf.count_parameters(net) > 0
    with pytest.raises(AttributeError, match="no attribute 'milliseconds'"):
        pf.milliseconds  # noqa: B018


def test_the_op_that_hid_its_module():
    block, x = pf.MBConv(4, 4), torch.randn(2, 4, 5, 5)
    params = [p.detach() for p in block.parameters()]
    with old("proxyless_fast.ops.mbconv.mbconv"):
        found = pf.ops.mbconv(x, params)
    assert torch.equal(found, pf.ops.mbconv.mbconv(x, params))


def test_arguments_and_fields():
    net = pf.spaces.small(resolution=8)
    with old("budget_bytes"):
        pf.set_policy(net, "auto", budget=0, batch_size=2)
    assert net.blocks[0].mobile_inverted_conv.policy == "lean"
    with old("target_ms"), old("mul_log_factor"):
        config = pf.SearchConfig(target=80.0, alpha=0.3)
    assert config == pf.SearchConfig(target_ms=80.0, mul_log_factor=0.3)
    for name, value in {"target": 80.0, "alpha": 0.3, "beta": 0.3, "weight": 0.1}.items():
        with old(f"SearchConfig.{name} is now"):
            assert getattr(config, name) == value
    with pytest.raises(TypeError, match="got target and target_ms"):
        pf.SearchConfig(target=1.0, target_ms=1.0)


def test_gated_candidates():
    op = pf.MixedOp([pf.Identity(), pf.Zero()])
    op.activate(1, "full")
    with old("gated_indices"):
        assert op.gated() == [1, 0] == list(op.gated_indices)


def test_new_names_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pf.SearchConfig(target_ms=80.0)
        pf.count_macs(pf.spaces.small(resolution=8))
