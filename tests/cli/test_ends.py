"""Every end of the command line: its exit code, and one sentence, whatever its output goes to."""

import errno
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from proxyless_fast import cli
from proxyless_fast.bench import run as bench
from proxyless_fast.data import UnreadableImage
from proxyless_fast.io.files import atomic, require_writable
from proxyless_fast.latency import MissingKey
from proxyless_fast.search import checkpoint
from tests.cli.test_cli import write_idx
from tests.fuzz import run_folders
from tests.fuzz._checkpoints import rewrite

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders of the fuzzer: a finished run, and the finished run of another net."""
    folder = tmp_path_factory.mktemp("made")
    run_folders.make(folder)
    return folder


@pytest.fixture
def finished(made, tmp_path):
    return shutil.copytree(made / "finished", tmp_path / "[/x] é  █")


def refused(*arguments, code=2):
    """The one line on stderr of a command that ends with a code."""
    ended, _, err = run_folders.run(*map(str, arguments))
    assert ended == code, err
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("proxyless-fast") and lines[0].isprintable()
    return lines[0]


# what is raised

WORKER = "Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n{0}: x.png"
RAISED = [
    (ValueError("a: got 1,\n  expected 2"), 2, "derive: a: got 1, expected 2"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a  b"), 2, "a  b: No such file or directory"),
    (MissingKey(["Conv"], "the latency table t"), 2, "the latency table t has no latency for Conv"),
    (ModuleNotFoundError("No module named 'timm'"), 2, "No module named 'timm'"),
    (MemoryError(), 2, "derive: out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nGPU 0"), 2, "CUDA out of memory. Tried"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1]\nDefaultCPUAllocator: can't allocate memory"), 2, "can't alloc"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 2, "killed by signal"),
    (UnreadableImage(WORKER.format("proxyless_fast.data.images.UnreadableImage")), 2, "derive: x.png"),
    (RuntimeError(WORKER.format("proxyless_fast.data.images.UnreadableImage")), 2, "derive: x.png"),
    (KeyboardInterrupt(), 130, "derive: stopped"),
    (KeyError("step"), 70, "a fault of this program: KeyError: 'step'; the traceback is in"),
    (IndexError("list index out of range"), 70, "IndexError: list index out of range"),
    (AttributeError("no x"), 70, "AttributeError: no x"),
    (AssertionError(), 70, "a fault of this program: AssertionError; the traceback"),
    (NotImplementedError("a\n\nb"), 70, "NotImplementedError: a b;"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 70, "RuntimeError: mat1"),
    (RuntimeError(WORKER.format("RuntimeError")), 70, "RuntimeError: x.png"),
    (TypeError("x" * 5000), 70, "TypeError: xxx"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "code", "said"), RAISED, ids=lambda value: type(value).__name__)
def test_whatever_is_raised_is_one_sentence(error, code, said, finished, monkeypatch):
    def stage(run, args):
        raise error

    monkeypatch.setitem(cli.CHAIN, "derive", stage)
    assert said in refused("derive", "--run", finished, code=code)
    place = finished / "traceback.txt"
    assert place.exists() == (code == 70)
    if code == 70:
        assert "raise error" in place.read_text() and type(error).__name__ in place.read_text()


def test_a_traceback_goes_to_the_temporary_folder_where_there_is_no_run(tmp_path, monkeypatch):
    monkeypatch.setitem(cli.CHAIN, "profile", lambda run, args: {}["x"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    line = refused("profile", "--run", tmp_path / "none", code=70)
    (place,) = tmp_path.iterdir()
    assert line.endswith(f"the traceback is in {place}") and "KeyError: 'x'" in place.read_text()


def test_bench_ends_as_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *args: {}["x"])
    assert "KeyError" in refused("bench", "--quick", "--out", tmp_path, code=70)
    assert (tmp_path / "traceback.txt").exists()
    (tmp_path / "file").touch()
    assert "is no folder" in refused("bench", "--quick", "--out", tmp_path / "file")
    assert "--bogus" in refused("bench", "--bogus")


# what is known before anything is done

DEVICES = (
    "meta", "mps", "xpu", "hpu", "mtia", "xla", "lazy", "opengl", "privateuseone", "cuda:7", "cuda:", "cpu:-1", "7", "",
    "nonsense", "cu\nda",
)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_does_not_compute_is_refused_before_anything_is_written(device, made, tmp_path):
    line = refused("search", "--run", tmp_path / "r", "--data", made / "data", "--no-latency", "--device", device)
    assert line.startswith(f"proxyless-fast search: --device: got {device!r}, expected a device of this machine")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", "9223372036854775808"), ("--seed", "-1"), ("--resolution", "65537"), ("--num-classes", "0"),
        ("--in-channels", "9" * 30), ("--shift", "65537"), ("--threads", "0"), ("--threads", "1025"),
        ("--workers", "-1"), ("--repeats", "0"), ("--batch-size", "0"), ("--run", ""), ("--table", "t.yaml"),
    ],
)  # fmt: skip
def test_an_option_beyond_its_range_is_named(option, value, tmp_path):
    assert f"search: {option}: got " in refused("search", "--run", tmp_path, "--no-latency", option, value)


def test_numbers_that_no_optimizer_takes_are_named(made, tmp_path):
    options = ("--run", tmp_path, "--data", made / "data", "--no-latency", "--batch-size", "8")
    assert "SearchConfig.lr: got 1e+308" in refused("search", *options, "--lr", "1e308")
    assert "--target: got nan" in refused("derive", "--run", tmp_path, "--target", "nan")


def test_a_run_folder_that_is_none_or_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        assert f"{tmp_path / 'file'}: is no folder" in refused("profile", "--run", tmp_path / name)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(PermissionError, match="cannot be written into"):
        require_writable(tmp_path / "new" / "newer")
    assert f"{tmp_path}: cannot be written into" in refused("derive", "--run", tmp_path / "new")


# run folders whose files are of different runs, and contradict each other


def test_weights_of_another_net_are_refused_with_both_files(made, finished):
    (finished / "weights.safetensors").write_bytes((made / "other" / "weights.safetensors").read_bytes())
    line = refused("eval", "--run", finished)
    assert f"{finished}/weights.safetensors does not fit the net of {finished}/arch.json: " in line
    newest = rewrite(finished, checkpoint.load(made / "other")[0])
    line = refused("derive", "--run", finished)
    assert str(newest) in line and f"{finished}/report.json" in line


@pytest.mark.parametrize("key", ["parameters", "macs"])
@pytest.mark.parametrize("name", ["arch.json", "report.json"])
def test_costs_that_the_net_does_not_have_are_refused(name, key, finished):
    content = json.loads((finished / name).read_text())
    figures = content if name == "arch.json" else content["derive"]
    figures[key] += 1
    (finished / name).write_text(json.dumps(content))
    line = refused("export", "--run", finished)
    assert str(finished / name) in line and f"{key} must be " in line and "has, got " in line


def test_images_that_the_net_was_not_made_for_are_refused(made, finished, tmp_path):
    data = shutil.copytree(made / "data", tmp_path / "data")
    for part, count in (("train", 24), ("t10k", 8)):
        write_idx(data / f"{part}-labels-idx1-ubyte", np.arange(count) % 3)
    for stage in ("train", "eval"):
        line = refused(stage, "--run", finished, "--data", data)
        assert f"{data} has other classes than the run was started with, expected 0, 1, got 0, 1, 2" in line
    report = json.loads((finished / "report.json").read_text())
    (finished / "report.json").write_text(json.dumps({"eval": report["eval"]}))
    assert "report.json: has no data" in refused("eval", "--run", finished)


def test_an_option_that_contradicts_a_resumed_search(made, tmp_path):
    folder = shutil.copytree(made / "stopped", tmp_path / "stopped")
    assert "--no-latency" in refused("search", "--run", folder, "--resume", "--no-latency")
    state, _ = checkpoint.load(folder)
    newest = rewrite(folder, {**state, "config": {**state["config"], "lr": 0.5}})
    line = refused("search", "--run", folder, "--resume")
    assert f"{newest}: lr is 0.5, expected 0.1 as in {folder}/report.json" in line


# full disks


class Rust(Exception):
    pass


@pytest.mark.parametrize(
    "fails", [OSError(errno.ENOSPC, "No space"), Rust("I/O error: No space left on device (os error 28)"), "context"]
)
def test_a_full_disk_names_the_file_and_leaves_the_old_one(fails, tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(OSError, match=r"cannot be written: No space left on device: .*a\.json'") as caught:  # noqa: SIM117
        with atomic(path) as temporary:
            temporary.write_text("ne")
            try:
                raise OSError(errno.ENOSPC, "No space") if fails == "context" else fails
            except OSError:
                if fails == "context":
                    raise RuntimeError("[enforce fail at inline_container.cc:1]")  # noqa: B904
                raise
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_error_that_is_not_of_the_file_stays_what_it_is(tmp_path):
    for error in (KeyError("x"), FileNotFoundError(errno.ENOENT, "none", "elsewhere")):
        with pytest.raises(type(error)) as caught, atomic(tmp_path / "a"):
            raise error
        assert caught.value is error


LIMITED = """
import resource, sys
from proxyless_fast.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)  # as if the disk were full: "File too large"
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "stage", "name"),
    [
        (100, "derive", "arch.json"), (10_000, "derive", "weights.safetensors"), (10_000, "export", "net.onnx"),
        (1000, "train", "(train.jsonl|tensorboard.*|train-checkpoints/.*)"), (20_000, "search", r"checkpoints/\d+.pt"),
        (1000, "search", "search.jsonl"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_written_is_named(limit, stage, name, made, tmp_path):
    folder = shutil.copytree(made / ("stopped" if stage == "search" else "finished"), tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    more = [*run_folders.STAGES[stage], *(["--epochs", "40"] if stage == "train" else [])]
    command = [sys.executable, "-c", LIMITED, str(limit), stage, "--run", str(folder), *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2
    line = rf"proxyless-fast {stage}: {folder}/{name}: cannot be written: File too large\n"
    assert re.fullmatch(line, done.stderr), done.stderr
    assert not list(folder.glob(".*"))
    logs = {"search.jsonl", "train.jsonl"}
    for path in folder.iterdir():
        if path.is_file() and path.name not in logs and (path.name == name or stage != "derive"):
            assert path.read_bytes() == before[path.name]


# streams


def shell(line, folder, **environment):
    """Exit code, stdout and stderr of the first command of a line of bash, in which PF is the program."""
    line = line.replace("PF", f"{sys.executable} -m proxyless_fast.cli")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RUN": str(folder), **environment}
    done = subprocess.run(["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], capture_output=True, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ['report --run "$RUN"', "derive --help"])
@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        (">&-", 0, b""), ("2>&-", 0, b""), ("<&- >&- 2>&-", 0, b""), ("| true", 0, b""), ("| head -1", 0, b""),
        ("2>/dev/full", 0, b""),
        (">/dev/full", 2, b"proxyless-fast: stdout cannot be written: No space left on device\n"),
    ],
)  # fmt: skip
def test_streams_may_be_closed_or_full(command, streams, code, said, finished):
    ended, _, err = shell(f"PF {command} {streams}", finished)
    assert (ended, err) == (code, said)


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["", ">&-", "2>&-", ">/dev/full"])
def test_an_error_stays_one(streams, tmp_path):
    ended, _, err = shell(f'PF report --run "$RUN" {streams}', tmp_path)
    assert ended == 2 and b"Traceback" not in err and err.count(b"\n") == ("2>" not in streams)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_streams_may_be_of_any_encoding(encoding, finished):
    ended, out, err = shell('PF report --run "$RUN"', finished, PYTHONIOENCODING=encoding)
    text = out.decode(encoding)
    assert (ended, err) == (0, b"") and "macs" in text.lower() and "files in" in text
    assert str(finished).encode(encoding, "backslashreplace") in out  # brackets, spaces and all
    assert ("█" in text.replace(str(finished), "")) == (encoding == "utf-8")
    (finished / "report.json").unlink()
    ended, out, err = shell('PF report --run "$RUN"', finished, PYTHONIOENCODING=encoding)
    assert ended == 2 and out == b"" and err.count(b"\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_the_progress_line_is_shown_by_any_terminal(encoding, finished):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": encoding, "TERM": "xterm"}
    command = [sys.executable, "-m", "proxyless_fast.cli", "train", "--run", str(finished), "--epochs", "2"]
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            said += chunk
    except OSError:  # the end of a terminal
        pass
    finally:
        os.close(ours)
    assert (process.wait(), process.stderr.read()) == (0, b"")
    assert b"train" in said and b"epoch 2 of 2" in said
