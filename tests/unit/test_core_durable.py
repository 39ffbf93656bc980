"""Atomic writes, disk errors in words, canonical JSON and digests."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from posttrain.core import durable
from posttrain.core.durable import disk_errors, free_bytes, fsync_tree, write_json, write_text
from posttrain.core.hashing import canonical_json, digest_of, file_digest, files_digest, list_files
from posttrain.errors import ArtifactError, DataError


def test_write_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ä b.txt"
    write_text(path, "one")
    write_text(path, "zwei ✓")
    assert path.read_text(encoding="utf-8") == "zwei ✓"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(durable.os, call, full)
    with pytest.raises(ArtifactError, match=r"a\.json: the disk is full \([\d,]+ bytes free there\)") as caught:
        write_json(path, {"new": 2})
    monkeypatch.undo()
    assert caught.value.exit_code == 4
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EDQUOT, "x"), "the quota is used up"),
        (OSError(errno.EFBIG, "x"), "the file-size limit is reached"),
        (OSError(errno.EROFS, "x"), "the file system is read-only"),
        (PermissionError(errno.EACCES, "x", "/etc/shadow"), "/etc/shadow: permission denied"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
        (Exception('IoError(Os { code: 28, kind: StorageFull, message: "No space" })'), "the disk is full"),
        (RuntimeError("[Errno 27] Error writing bytes to file. Detail: [errno 27] File too large"), "the file-size limit is reached"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "could not be written to its end"),
    ],
)
def test_disk_errors_are_known_also_from_native_writers(tmp_path: Path, error: Exception, words: str) -> None:
    with pytest.raises(ArtifactError) as caught, disk_errors(tmp_path / "x"):
        raise error
    assert words in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "x"), RuntimeError("exit code: 13"), DataError("a row"), ValueError("x")]
)
def test_other_errors_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b" / "c") > 0


def test_fsync_tree_takes_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).write_text("1")
    seen: list[int] = []
    monkeypatch.setattr(durable.os, "fsync", seen.append)
    fsync_tree(tmp_path)
    assert len(seen) == 6


def test_canonical_json_and_digests(tmp_path: Path) -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "ä"}) == '{"a":"\\u00e4","b":[1,2.5,null]}'
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 1, "b": 2.5})
    assert canonical_json(float("nan")) == '"NaN"'
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "two").write_bytes(b"2")
    (tmp_path / "one").write_bytes(b"1")
    files = list_files(tmp_path)
    assert [f["path"] for f in files] == ["one", "sub/two"]
    assert files[0]["sha256"] == file_digest(tmp_path / "one")
    assert files_digest(files) == files_digest(files[::-1])
    (tmp_path / "one").rename(tmp_path / "three")
    assert files_digest(list_files(tmp_path)) != files_digest(files)
