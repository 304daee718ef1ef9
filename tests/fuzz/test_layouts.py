"""The short form of the fuzzer of layouts, and that it can find something."""

import pytest

from tests.fuzz import _ops, layouts


def test_layouts_in_memory_change_nothing():
    assert layouts.main(seconds=600.0, seed=0, cases=3000) == 0


@pytest.mark.parametrize("name", [draw.__name__ for draw in _ops.OPS])
def test_the_fuzzer_sees_what_is_wrong(monkeypatch, name):
    """An op that reads one argument as if it were dense."""
    outputs_of = layouts.outputs_of

    def as_if_dense(op, arguments):
        def misread(t):
            return t.as_strided(t.shape, t.new_empty(t.shape).stride()) if not t.is_contiguous() else t

        first = next(key for key, value in arguments.items() if hasattr(value, "shape"))
        return outputs_of(op, {**arguments, first: misread(arguments[first])})

    monkeypatch.setattr(layouts, "OPS", [draw for draw in _ops.OPS if draw.__name__ == name])
    monkeypatch.setattr(layouts, "outputs_of", as_if_dense)
    assert layouts.main(seconds=600.0, seed=0, cases=300) == 1
