"""Files appear whole, under their name, for whoever may read the user's other files."""

import os
import stat

import pytest

from proxyless_fast.io.files import atomic


def test_a_file_may_be_read_like_any_other(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic(tmp_path / "whole") as temporary:
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors makes it
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "whole")}
    assert len(modes) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "whole"]


def test_what_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "kept"
    path.write_text("before")
    with pytest.raises(RuntimeError, match="no more"), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("no more")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
