"""Files are whole, or what was there before."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from distily.system.files import write_json, write_whole


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    write_json(file, {"step": 1})
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        write_json(file, {"step": 2})
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "half a pair: \ud800")
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    write_whole(file, "half a pair: \ud800", errors="replace")
    assert file.read_text() == "half a pair: ?" and list(tmp_path.iterdir()) == [file]
