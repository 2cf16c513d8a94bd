"""Whether files can be written is tried, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_twa.machine import why_not_writable


def test_a_directory_that_can_be_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for path in (tmp_path, tmp_path / "there", tmp_path / "a" / "b", Path("c/d"), Path()):
        assert why_not_writable(path) is None
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


def test_a_file_in_its_place(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert why_not_writable(path) == f"Not a directory: {tmp_path / 'file'}"
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert why_not_writable(tmp_path / "link" / "x").startswith("No such file or directory")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_file_system_that_takes_no_files() -> None:
    assert why_not_writable(Path("/proc/twa")) is not None
