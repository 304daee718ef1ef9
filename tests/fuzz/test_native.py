"""The short form of the fuzzer of native arguments, and that it can find something."""

import pytest
import torch

from tests.fuzz import native


def test_damaged_arguments_are_refused_by_name():
    assert native.main(seconds=600.0, seed=0, cases=1000) == 0


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        ("gram", lambda x: (_ for _ in ()).throw(RuntimeError("no"))),
        ("gate_dot", lambda a, b: (a.sum() * b.sum()).clone()),
        ("norm_dot", lambda grad, y, **rest: y.flatten().as_strided((), ())),
    ],
)
def test_the_fuzzer_sees_what_is_wrong(monkeypatch, op, wrong):
    calls = [draw for draw in native.OPS if draw.__name__ == op]
    monkeypatch.setattr(native, "OPS", calls)
    monkeypatch.setattr(native, "HUGE", (3,))  # this process has no limit of memory
    monkeypatch.setattr(native, "outputs_of", lambda op, given: [torch.as_tensor(wrong(**given))])
    found = []
    for case in range(200):
        call, arguments, _ = native.drawn(case)
        try:
            found.append(native.verdict(call, arguments))
        except Exception:  # what the wrong op makes of the arguments is its own affair
            continue
    assert any(found)
