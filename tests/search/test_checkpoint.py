"""checkpoint.pt and search.jsonl, damaged inside: the file and the key are named before a search goes on from them."""

import copy
import json
import shutil

import pytest
import torch

from proxyless_fast.search import Search, checkpoint
from tests.fuzz._checkpoints import rewrite
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
        (lambda s: s.update(baseline=torch.zeros(2)), r"baseline must be one number, got .* \(2,\)"),
        (lambda s: s["sums"].update(x=[1.0]), r"sums\.x .*at least 2 items"),
        (lambda s: s.update(rng=torch.zeros(3, dtype=torch.uint8)), "rng must be the states of random"),
        (lambda s: s["rng"].update(torch=torch.zeros(5056)), "rng must be the states of random"),
        (lambda s: s.update(rng="x"), r"rng\.Generators must be"),
        (lambda s: s.update(extra=1), "extra is unknown"),
    ],
)
def test_what_a_search_cannot_go_on_from_is_named(change, said, stopped, tmp_path):
    state, _ = checkpoint.load(stopped)
    change(state)
    path = rewrite(tmp_path, state)
    with pytest.raises(ValueError, match=rf"^{path}:? .*{said}"):
        resume(tmp_path)


def test_settings_of_an_optimizer_come_from_the_config(stopped, tmp_path):
    state = copy.deepcopy(checkpoint.load(stopped)[0])
    for group in state["weight_optimizer"]["param_groups"]:
        group["momentum"] = "x"
    rewrite(tmp_path, state)
    assert {group["momentum"] for group in resume(tmp_path).weight_optimizer.param_groups} == {config().momentum}


def copied(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "gone"])
def test_the_one_before_a_damaged_one_is_used_and_it_is_named(how, stopped, tmp_path, caplog):
    folder = copied(stopped, tmp_path)
    newest, before = checkpoint.paths(folder / "checkpoints")
    wanted = checkpoint.read(before)
    data = bytearray(newest.read_bytes())
    data[len(data) // 3] ^= 4
    if how == "gone":
        newest.unlink()
    else:
        newest.write_bytes({"flipped": data, "cut": data[: len(data) // 2], "empty": b""}[how])
    state, path = checkpoint.load(folder)
    assert path == before and state["step"] == wanted["step"] == 8
    assert [str(newest) in record.getMessage() for record in caplog.records] == [True] * (how != "gone")
    finished = resume(folder).fit()
    assert finished.step == 16 and newest not in checkpoint.paths(folder / "checkpoints")

    for path in checkpoint.paths(folder / "checkpoints"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"000000016-\w+\.pt: damaged, its content is not what was written"):
        resume(folder)


def test_what_is_not_finite_is_never_saved_over_what_is(stopped, tmp_path):
    folder = copied(stopped, tmp_path)
    search, before = resume(folder), sorted((folder / "checkpoints").iterdir())
    search.weight_optimizer.state[search.weights[0]]["momentum_buffer"] = torch.full_like(search.weights[0], torch.inf)
    with pytest.raises(ValueError, match=r"step 12 is not saved: weight_optimizer\.state\.\d+\.momentum_buffer"):
        search.save()
    assert sorted((folder / "checkpoints").iterdir()) == before
    state, _ = checkpoint.load(folder)
    state["net"]["classifier.bias"][0] = torch.nan
    rewrite(tmp_path / "other", state)
    with pytest.raises(ValueError, match=r"net\.classifier\.bias must be finite, got nan"):
        resume(tmp_path / "other")


def test_a_checkpoint_of_an_older_version_goes_on_to_the_same_bits(stopped, tmp_path):
    wanted = resume(copied(stopped, tmp_path)).fit().net.state_dict()
    state, _ = checkpoint.load(stopped)
    old = {name: value for name, value in state.items() if name not in ("kind", "seed", "loaders", "log")}
    (tmp_path / "old").mkdir()
    torch.save({"format": 1, **old, "rng": state["rng"]["torch"]}, tmp_path / "old" / "checkpoint.pt")
    lines = (stopped / "search.jsonl").read_bytes()
    (tmp_path / "old" / "search.jsonl").write_bytes(lines + b'{"step": 12, "kind": "weight"}\n{"step": 13, "ki')
    found = resume(tmp_path / "old").fit().net.state_dict()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert (tmp_path / "old" / "search.jsonl").read_bytes() == (tmp_path / "run" / "search.jsonl").read_bytes()


def test_a_bad_line_in_the_log_is_no_reason_to_stop(stopped, tmp_path, caplog):
    folder = copied(stopped, tmp_path)
    log = folder / "search.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    bad = b"x" * (len(lines[1]) - 1) + b"\n"
    log.write_bytes(b"".join([lines[0], bad, *lines[2:], b'{"step": 99}\n{"st']))
    resume(folder).fit()
    after = log.read_bytes().splitlines(keepends=True)
    assert after[: len(lines)] == [lines[0], bad, *lines[2:]] and json.loads(after[len(lines)])["step"] == 12
    assert not caplog.records


def test_a_log_that_lacks_records_is_told_of(stopped, tmp_path, caplog):
    folder = copied(stopped, tmp_path)
    (folder / "search.jsonl").unlink()
    resume(folder).fit()
    assert "records are missing" in caplog.text
    (folder / "search.jsonl").unlink()
    (folder / "search.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"search\.jsonl: is no regular file"):
        resume(copied(stopped, tmp_path / "again")).journal.open(folder / "search.jsonl")


def test_a_finished_run_is_left_as_it_is(stopped, tmp_path):
    folder = copied(stopped, tmp_path)
    resume(folder).fit()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    assert resume(folder).fit().step == 16
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda train, valid: setattr(train, "seed", 5), "the train loader has seed 5, expected 1, as the search was"),
        (lambda train, valid: setattr(valid, "batch_size", 16), "the valid loader has batch_size 16, expected 8"),
        (
            lambda train, valid: setattr(train, "batch_size", 16),
            "the train loader has batch_size 16, expected 8",
        ),
    ],
)
def test_other_data_are_named(change, said, stopped):
    loaders = toy_loaders()
    change(*loaders)
    with pytest.raises(ValueError, match=said):
        resume(stopped, loaders)
