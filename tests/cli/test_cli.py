"""The command line: the chain on a tiny dataset, and every wrong input: exit code 2, one line, no traceback."""

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from proxyless_fast.cli import main
from proxyless_fast.cli.parser import SUMMARIES
from proxyless_fast.report import block_lines, print_report
from proxyless_fast.search import Search, Training, checkpoint, progress
from tests.fuzz._checkpoints import only

FAST = ["--batch-size", "16", "--epochs", "1", "--warmup-epochs", "1", "--arch-every", "2", "--log-every", "2"]
SMALL_SPACE = ["--candidates", "3x3_MBConv3", "5x5_MBConv3"]


def write_idx(path, array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """96 training and 32 test images of 12x12 pixels, whose brightness is their class, as IDX files."""
    folder, rng = tmp_path_factory.mktemp("idx"), np.random.default_rng(0)
    for part, count in (("train", 96), ("t10k", 32)):
        labels = np.arange(count) % 4
        images = rng.integers(0, 60, (count, 12, 12)) + 60 * labels[:, None, None]
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
    return folder


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A run folder after `search --all`."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    options = [
        "--run",
        str(folder),
        "--data",
        str(dataset),
        "--repeats",
        "3",
        "--train-epochs",
        "2",
        *SMALL_SPACE,
        *FAST,
    ]
    assert main(["search", "--all", *options]) == 0
    return folder


def fails(capsys, *arguments):
    """The one line that a wrong input gives."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse's own errors
        code = error.code
    output = capsys.readouterr()
    assert code == 2
    lines = output.err.splitlines()
    assert len(lines) == 1 and "Traceback" not in output.err + output.out, output.err
    assert lines[0].startswith("proxyless-fast")
    return lines[0]


def test_whole_chain(finished, capsys):
    for name in ("latency.yaml", "search.jsonl", "checkpoints", "arch.json", "weights.safetensors", "net.onnx"):
        assert (finished / name).stat().st_size > 0
    report = json.loads((finished / "report.json").read_text())
    assert {"profile", "search", "derive", "train", "eval", "export", "total"} <= report.keys()
    assert report["derive"]["predicted"] <= report["derive"]["target"]
    assert report["profile"]["fastest"] < report["derive"]["target"] < report["profile"]["slowest"]
    assert report["space"]["num_classes"] == 4 and report["space"]["resolution"] == 12
    assert 0 <= report["eval"]["top1"] <= report["eval"]["top5"] <= 1 and report["eval"]["images"] == 32
    assert report["export"]["measured"] > 0
    assert sum(report[stage]["seconds"] for stage in ("search", "train")) < report["total"]["seconds"]

    assert main(["report", "--run", str(finished)]) == 0
    table = capsys.readouterr().out
    for word in ("target latency", "predicted latency", "measured latency", "test accuracy", "parameters", "MACs"):
        assert word in table
    assert all(f"blocks.{i}" in table for i in range(1, 8)) and "net.onnx" in table and "total" in table


def test_stages_one_by_one_equal_the_chain(finished, dataset, tmp_path):
    """The same seed and table give the same architecture and bitwise the same weights."""
    run = ["--run", str(tmp_path)]
    assert main(["profile", *run, "--num-classes", "4", "--resolution", "12", "--repeats", "2", *SMALL_SPACE]) == 0
    table, data = ["--table", str(finished / "latency.yaml")], ["--data", str(dataset)]
    assert main(["search", *run, *data, *table, *FAST]) == 0
    assert main(["derive", *run]) == 0
    assert main(["train", *run, "--epochs", "2", "--batch-size", "16"]) == 0
    assert main(["eval", *run]) == 0
    assert main(["export", *run, "--repeats", "3"]) == 0
    assert json.loads((tmp_path / "arch.json").read_text()) == json.loads((finished / "arch.json").read_text())
    assert (tmp_path / "weights.safetensors").read_bytes() == (finished / "weights.safetensors").read_bytes()


def test_derive_for_another_target(finished, dataset, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    fastest = json.loads((finished / "report.json").read_text())["profile"]["fastest"]
    assert main(["derive", "--run", str(tmp_path), "--target", f"{fastest * 1.001}"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert fastest * 0.999 <= report["derive"]["predicted"] <= fastest * 1.001
    assert "eval" not in report
    if report["derive"]["blocks"] != json.loads((finished / "report.json").read_text())["derive"]["blocks"]:
        assert "the most probable path" in capsys.readouterr().out
    line = fails(capsys, "derive", "--run", str(tmp_path), "--target", f"{fastest / 2}")
    assert "fastest path" in line


def test_train_from_scratch_and_without_latency(dataset, tmp_path):
    run = ["--run", str(tmp_path)]
    assert main(["search", *run, "--data", str(dataset), "--no-latency", *SMALL_SPACE, *FAST]) == 0
    assert main(["derive", *run]) == 0
    inherited = (tmp_path / "weights.safetensors").read_bytes()
    assert main(["train", *run, "--from-scratch", "--epochs", "0"]) == 0
    assert (tmp_path / "weights.safetensors").read_bytes() != inherited
    assert json.loads((tmp_path / "report.json").read_text())["derive"]["target"] is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_and_resume(number, code, finished, dataset, tmp_path, capsys, monkeypatch):
    """Stopped within the search, and resumed, it ends with the bits of the run that was not stopped."""
    run = ["--run", str(tmp_path)]
    options = ["--data", str(dataset), "--table", str(finished / "latency.yaml"), *SMALL_SPACE, *FAST]

    weight_step = Search.weight_step

    def pressing(self, *arguments):
        sums = weight_step(self, *arguments)
        if self.step == 3:
            os.kill(os.getpid(), number)
        return sums

    with monkeypatch.context() as patch:
        patch.setattr(Search, "weight_step", pressing)
        assert main(["search", *run, *options]) == code
    assert "--resume" in capsys.readouterr().err
    assert "--batch-size: got 8 with --resume" in fails(capsys, "search", *run, "--resume", "--batch-size", "8")
    assert "--epochs: got 9 with --resume" in fails(capsys, "search", *run, "--resume", "--epochs", "9")
    assert main(["search", *run, "--resume"]) == 0
    ours, theirs = (checkpoint.load(f)[0] for f in (tmp_path, finished))
    assert ours["step"] == theirs["step"]
    for key, value in theirs["net"].items():
        assert torch.equal(ours["net"][key], value), key


@pytest.mark.parametrize("command", SUMMARIES)
def test_help_has_defaults_and_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "examples:" in text and f"proxyless-fast {command}" in text and "default" in text


def test_wrong_options(tmp_path, dataset, capsys):
    run, data = ("--run", str(tmp_path)), ("--data", str(dataset), "--batch-size", "16")
    assert "COMMAND" in fails(capsys)
    assert "invalid choice: 'sarch'" in fails(capsys, "sarch")
    assert "--bogus" in fails(capsys, "search", "--bogus")
    assert "invalid int value: 'x'" in fails(capsys, "search", "--epochs", "x")
    assert "'tiny', expected one of small, cell, mobile" in fails(capsys, "profile", *run, "--space", "tiny")
    assert "'9x3_MBConv6'" in fails(capsys, "profile", *run, "--candidates", "9x3_MBConv6")
    assert "resolution" in fails(capsys, "profile", *run, "--resolution", "0")
    assert "--width: got 1.4" in fails(capsys, "profile", *run, "--width", "1.4")
    assert "threads" in fails(capsys, "profile", *run, "--threads", "0")
    assert "--in-channels: got 3, expected 1" in fails(capsys, "search", "--all", *run, *data, "--in-channels", "3")
    assert "SearchConfig.mode: got 'half'" in fails(capsys, "search", *run, *data, "--no-latency", "--mode", "half")
    assert "TrainConfig.lr: got 0" in fails(capsys, "search", "--all", *run, *data, "--train-lr", "0")
    assert "--target: got 1 with --no-latency" in fails(capsys, "search", *run, *data, "--no-latency", "--target", "1")
    assert "device" in fails(capsys, "search", *run, *data, "--no-latency", "--device", "warp")
    assert "batch" in fails(capsys, "search", *run, *data, "--no-latency", "--batch-size", "1000")
    assert "--shift: got -1" in fails(capsys, "search", *run, *data, "--no-latency", "--shift", "-1")
    assert "--valid-fraction" in fails(capsys, "search", *run, *data, "--no-latency", "--valid-fraction", "0")
    assert "expected an image folder" in fails(capsys, "search", *run, "--no-latency", "--space", "mobile")


def test_missing_paths(tmp_path, dataset, capsys):
    run, nowhere = ("--run", str(tmp_path / "run")), str(tmp_path / "nowhere")
    assert nowhere in fails(capsys, "search", *run, "--data", nowhere)
    data = ("--data", str(dataset), "--batch-size", "16")
    assert "latency.yaml" in fails(capsys, "search", *run, *data)
    assert nowhere in fails(capsys, "search", *run, *data, "--table", nowhere)
    assert "`proxyless-fast search`" in fails(capsys, "search", *run, "--resume")
    for command, needed in (("derive", "search"), ("train", "search"), ("export", "derive")):
        assert f"`proxyless-fast {needed}`" in fails(capsys, command, *run)
    assert "`proxyless-fast derive`" in fails(capsys, "eval", *run, *data)
    assert "report.json" in fails(capsys, "report", *run)


def test_damaged_files(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run = ("--run", str(tmp_path))
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    assert "weights.safetensors" in fails(capsys, "export", *run)
    (tmp_path / "arch.json").write_text("{")
    assert "arch.json" in fails(capsys, "export", *run)
    newest = only(tmp_path)
    newest.write_bytes(b"x")
    assert str(newest) in fails(capsys, "derive", *run)
    (tmp_path / "report.json").write_text("[]")
    assert "report.json" in fails(capsys, "derive", *run)


def test_table_without_a_key_and_target_below_the_fastest(finished, dataset, tmp_path, capsys):
    options = ("--run", str(tmp_path / "run"), "--data", str(dataset), *SMALL_SPACE, *FAST)
    entries = yaml.safe_load((finished / "latency.yaml").read_text())
    lost = next(key for key in entries if key.startswith("expanded_conv") and "kernel:5" in key)
    del entries[lost]
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(entries))
    assert lost in fails(capsys, "search", *options, "--table", str(tmp_path / "table.yaml"))
    table = ("--table", str(finished / "latency.yaml"))
    assert "fastest path" in fails(capsys, "search", *options, *table, "--target", "0.00001")
    assert "0% to 100%" in fails(capsys, "search", *options, *table, "--target", "110%")
    assert "'soon'" in fails(capsys, "search", *options, *table, "--target", "soon")


def test_nan_names_step_and_layer(dataset, tmp_path, capsys):
    line = fails(
        capsys, "search", "--run", str(tmp_path), "--data", str(dataset), "--no-latency", *SMALL_SPACE, *FAST,
        "--lr", "1e30",
    )  # fmt: skip
    assert "loss: got nan at" in line and " step " in line and "first output that is not finite is that of" in line


@pytest.mark.slow
def test_as_a_process(tmp_path):
    """The same from outside: exit code and streams."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-m", "proxyless_fast.cli", "derive", "--run", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    reason = f"{tmp_path / 'report.json'}: has no space, expected what `proxyless-fast search` writes"
    assert done.stderr == f"proxyless-fast derive: {reason}\n"


def test_block_lines():
    blocks = [
        {"label": "blocks.1", "name": "5x5_MBConv3", "probability": 0.72, "input": [28, 28, 16], "output": [14, 14, 24],
         "expand": 3, "kernel": 5, "stride": 2, "idskip": 0},
        {"label": "blocks.10", "name": "Zero", "probability": 1.0},
    ]  # fmt: skip
    first, second = block_lines(blocks)
    assert (
        "28x28" in first and "16 -> 24" in first and "stride 2" in first and "kernel 5" in first and "expand 3" in first
    )
    assert first.endswith("███████░░░ 0.72") and second.endswith("██████████ 1.00")
    assert first.index("█") == second.index("█")


def test_bench_is_part_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0
    assert "--official" in capsys.readouterr().out


def test_a_folder_s_name_is_printed_as_it_is(tmp_path):
    said = io.StringIO()
    for name in ("[v1] a", "x[/b]", "[red]"):
        print_report({"total": {"seconds": 1.0}}, tmp_path / name, Console(file=said, width=300, markup=False))
        assert name in said.getvalue()
    assert not progress.console._markup  # what the stages print with


def test_a_second_search_is_told_how_to_go_on(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    line = fails(capsys, "search", "--all", "--run", str(folder))
    assert f"{folder}: holds an earlier search (checkpoints/" in line
    assert "add --resume to go on with it, or --run FOLDER to begin another" in line
    assert main(["search", "--all", "--resume", "--run", str(folder)]) == 0
    assert "it has ended" in capsys.readouterr().out
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)} <= {
        "report.json"
    }


@pytest.mark.parametrize("by", ["train", "search"])
def test_a_training_that_was_stopped_goes_on(by, finished, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "run")
    run, run_step = ["--run", str(folder)], Training.run_step

    def pressing(self, batch, requests):
        found = run_step(self, batch, requests)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    assert main(["derive", *run]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Training, "run_step", pressing)
        assert main(["train", *run, "--epochs", "2", "--batch-size", "16"]) == 0
    assert "`proxyless-fast train --resume` continues it (SIGTERM)" in capsys.readouterr().err
    assert "holds an unfinished training" in fails(capsys, "train", *run)
    line = fails(capsys, "train", *run, "--resume", "--epochs", "9", "--batch-size", "16")
    assert "--epochs: got 9 with --resume, expected 2" in line
    more = ["search", "--all", "--repeats", "2"] if by == "search" else ["train", "--batch-size", "16"]
    assert main([*more, "--resume", *run]) == 0
    assert (folder / "weights.safetensors").read_bytes() == (finished / "weights.safetensors").read_bytes()
    assert (folder / "train.jsonl").read_bytes() == (finished / "train.jsonl").read_bytes()
    assert not (folder / "train-checkpoints").exists()
