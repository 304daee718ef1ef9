"""checkpoint.pt and search.jsonl, damaged inside: the file and the key are named before a search goes on from them."""

import copy

import pytest
import torch

from proxyless_fast.search import Search, checkpoint
from tests.search.test_search import ToyNet, config, toy_loaders, toy_times


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a search that was stopped in its second epoch."""
    folder, net = tmp_path_factory.mktemp("stopped"), ToyNet()
    with pytest.raises(KeyboardInterrupt):
        Search(net, *toy_loaders(interrupt_after=12), config(), toy_times(net), folder).fit()
    return folder


def resume(folder, loaders=None):
    net = ToyNet()
    return Search.resume(folder, net, *(loaders or toy_loaders()), table=toy_times(net))


def first(optimizer):
    return next(values for values in optimizer["state"].values() if None not in values.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("step"), "step is missing"),
        (lambda s: s.update(step=1.5), "step must be a whole number, got 1.5"),
        (lambda s: s.update(step=10**6), "step 1000000 after 1 epochs does not fit a search of 16 steps, 8 an epoch"),
        (lambda s: s["history"].clear(), "step 12 after 0 epochs does not fit"),
        (lambda s: s["history"][0].update(epoch="0"), r"history\.0\.epoch .* got '0'"),
        (lambda s: s["config"].pop("lr"), r"config\.lr is missing"),
        (lambda s: s["config"].update(x=1), r"config\.x is unknown"),
        (lambda s: s["config"].update(lr="0.1"), r"SearchConfig\.lr: got '0\.1'"),
        (lambda s: s["net"].pop("first.alpha"), r"does not fit the net: it lacks first\.alpha"),
        (lambda s: s.update(net=[1]), r"net must be a valid dictionary|net must be an object"),
        (lambda s: s["weight_optimizer"].pop("state"), r"weight_optimizer\.state is missing"),
        (lambda s: s["weight_optimizer"]["param_groups"].pop(), r"weight_optimizer\.param_groups does not fit"),
        (lambda s: first(s["weight_optimizer"]).clear(), r"weight_optimizer\.state\.\d+ must hold momentum_buffer"),
        (
            lambda s: first(s["weight_optimizer"]).update(momentum_buffer=torch.zeros(1, 2, 3)),
            r"weight_optimizer\.state\.\d+\.momentum_buffer must be floating, of shape .* got .* of shape \(1, 2, 3\)",
        ),
        (lambda s: first(s["arch_optimizer"]).pop("exp_avg_sq"), r"arch_optimizer\.state\.\d must hold exp_avg, exp"),
        (lambda s: first(s["arch_optimizer"])["exp_avg_sq"].fill_(float("nan")), r"exp_avg_sq must be finite"),
        (lambda s: s["arch_optimizer"]["state"].update({99: {}}), r"arch_optimizer\.state\.99 must hold"),
        (lambda s: s.update(baseline=torch.zeros(2)), r"baseline must be one finite number, got .* \(2,\)"),
        (lambda s: s["sums"].update(x=[1.0]), r"sums\.x .*at least 2 items"),
        (lambda s: s.update(rng=torch.zeros(3, dtype=torch.uint8)), "rng must be a state of torch's generator"),
        (lambda s: s.update(rng=torch.zeros(5056)), "rng must be a state of torch's generator"),
        (lambda s: s.update(rng="x"), "rng must be"),
        (lambda s: s.update(extra=1), "extra is unknown"),
    ],
)
def test_what_a_search_cannot_go_on_from_is_named(change, said, stopped, tmp_path):
    state = checkpoint.load(stopped)
    change(state)
    checkpoint.save(tmp_path, state)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/checkpoint\.pt:? .*{said}"):
        resume(tmp_path)


def test_settings_of_an_optimizer_come_from_the_config(stopped, tmp_path):
    state = copy.deepcopy(checkpoint.load(stopped))
    for group in state["weight_optimizer"]["param_groups"]:
        group["momentum"] = "x"
    checkpoint.save(tmp_path, state)
    assert {group["momentum"] for group in resume(tmp_path).weight_optimizer.param_groups} == {config().momentum}


def test_every_bit_of_a_checkpoint_is_checked(stopped, tmp_path):
    data = (stopped / "checkpoint.pt").read_bytes()
    good = checkpoint.load(stopped)["net"]["classifier.weight"]
    place = data.index(good.numpy().tobytes())
    # in a tensor; and the mark of a folder, which makes torch read nothing
    for at, bit in ((place + 5, 1), (data.index(b"PK\x01\x02") + 38, 0x10)):
        damaged = bytearray(data)
        damaged[at] ^= bit
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt: damaged, '.*' is not what was written"):
            checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x", r"line 2 is no record of a search .*without the file the search goes on"),
        ("[" * 100_000, "line 2 is no record"),
        ("[]", "step of line 2 must be a whole number of at least 0, got None"),
        ('{"step": "1"}', "step of line 2 must be a whole number of at least 0, got '1'"),
        (None, "is no regular file"),
    ],
)
def test_a_log_that_is_none_is_named_and_kept(line, said, stopped, tmp_path):
    for name in ("checkpoint.pt", "search.jsonl"):
        (tmp_path / name).write_bytes((stopped / name).read_bytes())
    log = tmp_path / "search.jsonl"
    lines = log.read_text().splitlines()
    if line is None:
        log.unlink()
        log.mkdir()
    else:
        log.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=rf"search\.jsonl: {said}"):
        resume(tmp_path).fit()
    assert line is None or log.read_text().splitlines()[1] == line
