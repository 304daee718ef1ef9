"""Files of weights and checkpoints, damaged and hostile."""

import json
import struct
import time
import zipfile

import pytest
import torch

from proxyless_fast.io.state import read_weights
from proxyless_fast.search import checkpoint


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing of the kind",
        struct.pack("<Q", 1 << 62),
        safetensors(b"[" * 100_000),
        safetensors({"a": {**TENSOR, "shape": [1 << 62]}}, b"1234"),
        safetensors({"a": {**TENSOR, "shape": [-1]}}, b"1234"),
        safetensors({"a": {**TENSOR, "dtype": "F4"}}, b"1234"),
        safetensors('{"a": {"dtype": "F\ufeff32", "shape": [1], "data_offsets": [0, 4]}}'.encode(), b"1234"),
        safetensors({"a": {**TENSOR, "data_offsets": [0, 1 << 40]}}, b"1234"),
        safetensors({"a": TENSOR, "b": TENSOR}, b"1234"),
    ],
)
def test_what_is_no_safetensors_is_named(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.safetensors cannot be read as safetensors") as caught:
        read_weights(path)
    assert str(caught.value).isprintable()


def test_a_file_of_torch_save_is_told_what_to_do_with(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"it is what torch\.save writes; give what torch\.load"):
        read_weights(tmp_path / "w.pth")


STATE = {
    "step": 0, "config": {}, "weight_optimizer": {"state": {}, "param_groups": []},
    "arch_optimizer": {"state": {}, "param_groups": []}, "baseline": None, "history": [], "sums": {},
    "rng": torch.get_rng_state(),
}  # fmt: skip


def test_a_checkpoint_does_not_unpack_to_more_than_it_is(tmp_path):
    saved = checkpoint.save(tmp_path, {**STATE, "net": {"w": torch.zeros(1 << 20)}})
    assert checkpoint.load(tmp_path)[0]["net"]["w"].shape == (1 << 20,)
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    saved.unlink()
    path = tmp_path / "checkpoint.pt"  # an older one, whose name has no digest
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content * (64 if "/data/" in name else 1))
    assert path.stat().st_size < 1 << 20
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"checkpoint\.pt: .* would unpack to 268,"):
        checkpoint.load(tmp_path)
    assert time.perf_counter() - start < 1


def test_a_checkpoint_that_names_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"format": 1, "net": Code()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="not a checkpoint that torch can read"):
        checkpoint.load(tmp_path)
    torch.save({"format": 1}, tmp_path / "checkpoint.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="not a checkpoint that torch can read"):
        checkpoint.load(tmp_path)
