"""Parity with what the official code computed: every array of the golden files."""

import copy

import numpy as np
import pytest
import torch

import proxyless_fast as pf

EDGES = ("mixed_edge_s1", "mixed_edge_s2")


def load(shared, name):
    return {k: v for k, v in np.load(shared / "golden" / f"{name}.npz").items()}


def build(data):
    names = [str(n) for n in data["candidates"]]
    cin, cout = data["x"].shape[1], data["grad_output"].shape[1]
    op = pf.MixedOp({n: pf.candidate(n, cin, cout, int(data["stride"])) for n in names})
    for i, module in enumerate(op.candidates):
        prefix = f"candidate{i}/"
        state = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in data.items() if k.startswith(prefix)}
        module.load_state_dict(state)  # strict: the official names are ours
        for m in module.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                assert m.eps == float(data["bn_eps"]) and m.momentum == float(data["bn_momentum"])
    with torch.no_grad():
        op.alpha.copy_(torch.from_numpy(data["alpha"]))
    return op, torch.from_numpy(data["x"]).requires_grad_(), torch.from_numpy(data["grad_output"])


def close(value, expected, name):
    value, expected = torch.as_tensor(value).detach().double(), torch.as_tensor(expected).double()
    error = (value - expected).norm() / expected.norm() if expected.norm() > 0 else (value - expected).norm()
    assert error <= 1e-4, f"{name}: relative error {error:.2e}"


@pytest.fixture(params=EDGES)
def golden(request, shared):
    data = load(shared, request.param)
    used = {k for k in data if k.startswith("candidate") or ("/" not in k and not k.startswith("output"))}
    yield data, used
    assert used == set(data), f"arrays that no check read: {sorted(set(data) - used)}"


def check(data, used, name, value):
    used.add(name)
    close(value, data[name], name)


def gate_gradient(op, x, g):
    """What arch steps compute on the way to alpha's gradient, read by making softmax's Jacobian trivial to invert."""
    outputs = [copy.deepcopy(c)(x) for c in op.candidates]
    return torch.stack([pf.ops.gate_dot(o.contiguous(), g.contiguous()) for o in outputs]).detach()


def test_every_array(golden):
    data, used = golden
    op, x, g = build(data)
    for i, module in enumerate(op.candidates):
        value = copy.deepcopy(module)(x)
        used.add(f"output{i}")
        close(value if data[f"output{i}"].ndim else value.abs().sum(), data[f"output{i}"], f"output{i}")

    for group in sorted({k.rsplit("/output", 1)[0] for k in data if k.endswith("/output")}):
        kind, _, rest = group.partition("/")
        clone, x, g = build(data)
        if kind == "full":
            clone.activate(int(rest.removeprefix("active")), mode="full")
        elif kind == "two":
            active, partner = map(int, rest.split("-"))
            clone.activate(active, mode="two", partner=partner)
        else:
            clone.activate(int(data["path/active"]))
            used.add("path/active")
        y = clone(x)
        y.backward(g)
        check(data, used, f"{group}/output", y)
        check(data, used, f"{group}/grad_x", x.grad)
        if kind == "path":
            for name, parameter in clone.candidates[clone.active].named_parameters():
                check(data, used, f"path/grad/{name}", parameter.grad)
            continue
        check(data, used, f"{group}/grad_alpha", clone.alpha.grad)
        if kind == "full":
            check(data, used, f"{group}/grad_gate", gate_gradient(build(data)[0], x, g))
            for name in [k for k in data if k.startswith(f"{group}/candidate")]:
                index, key = name.removeprefix(f"{group}/candidate").split("/", 1)
                check(data, used, name, clone.candidates[int(index)].state_dict()[key])
        else:
            torch.optim.SGD([clone.alpha], lr=0.01).step()
            check(data, used, f"{group}/alpha_after_sgd_lr0.01", clone.alpha)
            pf.rescale(clone)
            check(data, used, f"{group}/alpha_after_rescale", clone.alpha)
