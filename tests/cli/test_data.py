"""Data on the command line: shards, recipes that later stages keep, and runs that were split otherwise."""

import json

import pytest

from proxyless_fast import cli
from tests.data.test_shards import chained, write

OPTIONS = [
    "--resolution", "16", "--batch-size", "8", "--workers", "0", "--no-latency", "--epochs", "1",
    "--warmup-epochs", "0", "--valid-fraction", "0.3",
]  # fmt: skip
RECIPE = ["--rand-augment", "rand-m5", "--random-erasing", "0.2", "--mixup", "0.2", "--ema-decay", "0.9"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A command of a run folder on shards; returns its exit code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "set" / "train" / "0.tar", chained(range(40)))
    write(tmp_path / "set" / "val" / "0.tar", chained(range(100, 108)))

    def command(name, *options):
        return cli.main([name, "--run", str(tmp_path / "run"), *options])

    command.data, command.report = ["--data", str(tmp_path / "set")], tmp_path / "run" / "report.json"
    return command


@pytest.mark.slow
def test_shards_and_recipes_go_through_all_stages(run):
    assert run("search", *run.data, *OPTIONS, *RECIPE) == 0
    assert run("derive") == 0
    assert run("train", "--workers", "0", "--epochs", "1", "--cutmix", "1.0") == 0
    assert run("eval", "--workers", "0") == 0
    report = json.loads(run.report.read_text())
    assert (report["data"]["rand_augment"], report["data"]["random_erasing"]) == ("rand-m5", 0.2)
    assert (report["search"]["mixup"], report["search"]["ema_decay"], report["train"]["cutmix"]) == (0.2, 0.9, 1.0)
    assert report["eval"]["images"] == 8


@pytest.mark.slow
def test_a_search_that_was_split_otherwise_is_not_gone_on_with(run, capfd):
    assert run("search", *run.data, *OPTIONS) == 0
    report = json.loads(run.report.read_text())
    del report["data"]["split"]
    run.report.write_text(json.dumps(report))
    assert run("search", "--resume") == 2
    error = capfd.readouterr().err
    assert error.startswith(f"proxyless-fast search: {run.report}: the images were split as versions before 0.3.0 did")
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("option", [["--rand-augment", "rand-m9"], ["--random-erasing", "0.3"], ["--mixup", "0.4"]])
def test_a_resume_with_another_recipe_is_refused(run, capfd, option):
    assert run("search", *run.data, *OPTIONS) == 0
    assert run("search", "--resume", *option) == 2
    assert option[0] in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--rand-augment", "much"], "rand_augment: got 'much', expected None or what timm writes as"),
        (["--random-erasing", "2"], "random_erasing: got 2.0, expected a probability in [0, 1]"),
        (["--mixup", "-1"], "SearchConfig.mixup: got -1.0, expected a number of at least 0"),
    ],
)
def test_wrong_recipes_end_in_one_sentence(run, capfd, options, complaint):
    assert run("search", *run.data, *OPTIONS, *options) == 2
    error = capfd.readouterr().err
    assert complaint in error and error.count("\n") == 1
