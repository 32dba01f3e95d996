from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from msqkd.files import replacing, sha256, write_bytes, write_json, write_text


def test_a_file_is_written_whole_in_a_new_folder(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "x.txt"
    write_text(file, "grün\n")
    assert file.read_bytes() == "grün\n".encode()
    assert [child.name for child in file.parent.iterdir()] == ["x.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    write_bytes(file, b"old")

    def interrupted() -> None:
        with replacing(file) as temporary:
            temporary.write_bytes(b"half of the ne")
            assert file.read_bytes() == b"old"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert file.read_bytes() == b"old"
    assert [child.name for child in tmp_path.iterdir()] == ["x.bin"]


def test_the_temporary_file_keeps_the_suffix_and_the_folder(tmp_path: Path) -> None:
    with replacing(tmp_path / "net.ckpt") as temporary:
        assert temporary.suffix == ".ckpt"
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"1")


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "")
        assert os.umask(0o027) == 0o027, "the umask itself is untouched"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": 1, "a": [1.5, None]})
    assert (tmp_path / "x.json").read_text() == '{\n  "b": 1,\n  "a": [\n    1.5,\n    null\n  ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    assert "1.5" in (tmp_path / "x.json").read_text()


def test_sha256(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 7)
    write_bytes(tmp_path / "x", data)
    assert sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()
