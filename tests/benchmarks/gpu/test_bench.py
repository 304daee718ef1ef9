"""The GPU benchmark as one command, without a GPU: everything but the device itself, which is faked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import proxyless_fast.bench.baselines as baselines
from benchmarks.gpu import bench, correctness, passes, precompile, steps
from benchmarks.gpu.session import SHARES
from benchmarks.gpu.shapes import BlockShape
from tests.benchmarks.gpu.fakes import Host, make_session, printed

ROOT = Path(__file__).resolve().parents[3]


def test_every_part_from_end_to_end(tmp_path, quick, no_launches, monkeypatch):
    monkeypatch.setattr(steps, "SUBJECTS", ("ours", "generic", "official"))
    monkeypatch.setattr(correctness, "CHECKED", [(2, 6, 5, 9, 9, 5, 2, 3)])
    monkeypatch.setattr(correctness, "DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(passes, "imagenet", lambda batch: [BlockShape(batch, 24, 24, 8, 7, 1, 6)])
    session = make_session(tmp_path)
    assert bench.measure(session, list(SHARES), [4, 8], ["bf16", "fp32"], 0.05) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["correctness"] == [] and report["gate"] is None
    assert set(report["ceilings"]) == {"copy_bytes_s", "bf16_flop_s", "fp32_flop_s"}
    everything = {
        (dtype, step, who, batch)
        for dtype in ("bf16", "fp32") for step in ("weight", "arch") for who in ("ours", "generic") for batch in (4, 8)
    }  # fmt: skip
    assert {(r["dtype"], r["step"], r["who"], r["batch"]) for r in report["steps"]} == everything
    assert len(report["steps"]) == len(everything)
    assert all(r["ms"] > 0 and r["peak_mib"] > 0 and len(r["ms_by_path"]) == 2 for r in report["steps"])
    assert len(report["largest"]) == 2 * 2 * 2 and len(report["passes"]) > 20
    assert {r["kind"] for r in report["blocks"]} == {"forward", "backward", "input-gradient", "probe"}
    said = printed(session)
    assert said.count("left out") == 1 and "--official PATH" in said
    for text in ("fp32, batch 8", "largest batch", "of roof", "blocks, bf16", "as fast as the best peer, generic"):
        assert text in said, text


def test_the_options_reach_the_parts(tmp_path, quick, monkeypatch, capsys):
    told = {}
    monkeypatch.setattr(steps, "SUBJECTS", ("ours", "generic"))
    monkeypatch.setattr(precompile, "precompile", lambda arch, capability, **work: told.update(work) or 7)
    options = [
        "--only",
        "steps",
        "--batches",
        "4",
        "6",
        "--dtypes",
        "fp32",
        "--out",
        str(tmp_path / "new" / "gpu.json"),
    ]
    settings = baselines.Settings("small", 16, 4, 1)
    assert bench.benchmark(bench.parser().parse_args(options), Host(), settings) == 0
    assert told["checked"] == [] and told["layers"] is None and told["dtypes"] == [torch.float32] and told["batch"] == 4
    report = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert {(r["dtype"], r["batch"]) for r in report["steps"]} == {("fp32", 4), ("fp32", 6)}
    assert report["card"] == "a CPU" and report["settings"]["space"] == "small" and report["seconds"] > 0
    assert not {"correctness", "largest", "passes", "blocks"} & set(report)
    said = capsys.readouterr().out
    assert "7 Triton kernels" in said and "written" in said


def test_an_op_that_is_wrong_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(correctness, "CHECKED", [(2, 6, 5, 9, 9, 5, 2, 3)])
    monkeypatch.setattr(correctness, "DTYPES", {"fp32": torch.float32})
    right = correctness.mbconv
    monkeypatch.setattr(correctness, "mbconv", lambda *a, **o: right(*a, **o) * 1.001)
    session = make_session(tmp_path)
    assert bench.measure(session, ["correctness", "steps"], [4], ["fp32"], None) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert any("out: 1.0e-03" in text for text in report["correctness"]) and "steps" not in report
    monkeypatch.setattr(correctness, "mbconv", lambda *a, **o: 1 / 0)
    assert all("ZeroDivisionError" in text for text in correctness.measure(session))


def test_a_subject_that_is_wrong_ends_the_run(tmp_path, registry, capsys, monkeypatch):
    class Wrong(baselines.Subject):
        def differentiate(self, *arguments):
            return 1.01 * super().differentiate(*arguments)

    registry("wrong", Wrong)
    monkeypatch.setattr(steps, "SUBJECTS", ("generic", "wrong"))
    session = make_session(tmp_path)
    assert bench.measure(session, ["steps"], [4], ["fp32"], None) == 1
    error = capsys.readouterr().err
    assert "wrong, weight step" in error and error.count("\n") == 1 and "steps" not in session.report


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: it would run")
@pytest.mark.parametrize("name", ["benchmarks.gpu", "benchmarks.gpu.tune"])
def test_without_a_gpu_it_says_so(name):
    command = [sys.executable, "-m", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "no GPU" in done.stderr


@pytest.mark.parametrize("missing", ["proxyless_fast._C", "triton"])
def test_without_the_extension_or_triton_it_says_so(missing):
    run = "runpy.run_module('benchmarks.gpu', run_name='__main__')"
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; {run}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and missing.split(".")[-1] in done.stderr and "make bench-gpu" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"), [(["--official", "/nonexistent"], "/nonexistent"), (["--batches", "0"], "must be positive")]
)
def test_wrong_options_exit_with_code_2(capsys, options, said):
    with pytest.raises(SystemExit) as end:
        bench.main(options)
    assert end.value.code == 2 and said in capsys.readouterr().err
