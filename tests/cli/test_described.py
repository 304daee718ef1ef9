"""The files of a run say what the outputs of its net are called and what its images went through."""

import json
import shutil

import pytest
from PIL import Image

from proxyless_fast import export
from proxyless_fast.cli import main

FILES = ("arch.json", "weights.safetensors", "net.onnx")
OPTIONS = ["--batch-size", "4", "--workers", "0", "--valid-fraction", "0.25", "--resolution", "16", "--device", "cpu"]


def folder(root, classes):
    for part, count in (("train", 8), ("val", 2)):
        for number, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 18), (40 * number, 9 * i, 100)).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("images"), ("zebra", "aardvark"))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    epochs = ["--epochs", "1", "--warmup-epochs", "0", "--train-epochs", "1", "--repeats", "1", "--no-latency"]
    assert main(["search", "--all", "--run", str(run), "--data", str(images), *OPTIONS, *epochs]) == 0
    return run


def test_every_file_of_a_run_says_it(run):
    found = [export.description(run / name) for name in FILES]
    assert found[0] == found[1] == found[2] == export.description(export.load_architecture(run / "arch.json"))
    assert found[0]["classes"] == ["aardvark", "zebra"]
    images = found[0]["preprocessing"]
    assert (images["resolution"], images["channel_order"], images["value_range"]) == (16, "RGB", [0.0, 1.0])
    assert images["mean"] == [0.485, 0.456, 0.406] and images["short_side"] > 16


def test_derive_says_it_too(run):
    assert main(["derive", "--run", str(run)]) == 0
    assert export.description(run / "weights.safetensors")["classes"] == ["aardvark", "zebra"]


@pytest.mark.parametrize("command", ["train", "eval"])
def test_data_of_other_classes_are_refused(run, tmp_path, capsys, command):
    other = folder(tmp_path / "other", ("aardvark", "yak"))
    kept = (run / "weights.safetensors").read_bytes()
    options = ["--epochs", "1", "--batch-size", "4"] if command == "train" else []
    assert main([command, "--run", str(run), "--data", str(other), "--workers", "0", *options]) == 2
    line = capsys.readouterr().err
    assert "expected aardvark, zebra, got aardvark, yak" in line and line.count("\n") == 1
    assert (run / "weights.safetensors").read_bytes() == kept


def test_a_run_of_an_older_version_says_nothing(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    report = json.loads((tmp_path / "report.json").read_text())
    del report["data"]["classes"], report["data"]["preprocessing"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert main(["derive", "--run", str(tmp_path)]) == 0
    assert export.description(tmp_path / "arch.json") == {}


def test_a_damaged_report_is_named(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    report = json.loads((tmp_path / "report.json").read_text())
    report["data"]["classes"] = ["aardvark", 3]
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert main(["derive", "--run", str(tmp_path)]) == 2
    assert "report.json: data: classes.1 must be a valid string, got 3" in capsys.readouterr().err.replace("\n", " ")
