"""Where models come from, their digests, and the checks on their folders: all without torch."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.config.common import ModelConfig
from posttrain.core.artifact import InputRef
from posttrain.errors import ArtifactError
from posttrain.models.check import check_folder, read_header
from posttrain.models.digest import model_digest
from posttrain.models.source import Source, base_record, chosen_id, is_hub_id, package_file, read_base, resolve_model

REVISION = "0123456789abcdef0123456789abcdef01234567"


def write_safetensors(file: Path, tensors: dict[str, int]) -> None:
    """Float32 vectors of the given lengths, all zero."""
    header, at = {}, 0
    for name, length in tensors.items():
        header[name] = {"dtype": "F32", "shape": [length], "data_offsets": [at, at + 4 * length]}
        at += 4 * length
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    write_safetensors(folder / "model-00001-of-00002.safetensors", {"a": 300, "b": 4})
    write_safetensors(folder / "model-00002-of-00002.safetensors", {"c": 300})
    write_index(
        folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}
    )
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_forms(tmp_path: Path, sharded: Path) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert resolve_model(str(sharded)).form == "folder"
    assert resolve_model({"id": str(gguf)}).form == "gguf"
    assert resolve_model(adapter).form == "adapter"
    hub = resolve_model(ModelConfig(id="owner/name", revision=REVISION))
    assert (hub.form, hub.id, hub.revision) == ("hub", "owner/name", REVISION)
    ref = InputRef("model", "m", "model", "model", spec={"id": str(sharded), "revision": None, "offline": None})
    assert resolve_model(ref).path == sharded


@pytest.mark.parametrize("value", ["/a/b", "./a/b", "../a", "package:x/y", "a/b/c", "dir/file.gguf"])
def test_not_a_hub_id(value: str) -> None:
    assert not is_hub_id(value)


def test_offline_takes_the_place_of_a_hub_id(monkeypatch: pytest.MonkeyPatch, sharded: Path) -> None:
    spec = {"id": "owner/name", "revision": REVISION, "offline": str(sharded)}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert chosen_id(spec) == (str(sharded), None)
    with pytest.raises(ArtifactError, match="owner/name, since the hub must not be asked") as caught:
        resolve_model({**spec, "offline": "./absent"})
    assert "model.offline" in caught.value.fix
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert chosen_id(spec) == ("owner/name", REVISION)
    assert model_digest(spec) == f"hub:owner/name@{REVISION}"


def test_package_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "carries_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "secret.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_file("package:carries_model/m.gguf") == (package / "m.gguf").resolve()
    for bad in (
        "package:carries_model/../secret.gguf",
        "package:carries_model/none.gguf",
        "package:not_installed_at_all/m.gguf",
        "package:carries_model",
    ):
        with pytest.raises(ArtifactError):
            package_file(bad)


@pytest.mark.parametrize("name", ["nowhere", "x.bin"])
def test_missing_or_foreign_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match="fix"):
        resolve_model(str(tmp_path / name))


def test_digest_follows_content_not_place(sharded: Path, tmp_path: Path) -> None:
    first = model_digest(sharded)
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy)
    (copy / "README.md").write_text("does not count")
    (copy / ".cache.json").write_text("{}")
    assert model_digest(copy) == first
    (copy / "config.json").write_text('{"model_type": "llama"}')
    assert model_digest(copy) != first


def test_adapter_digest_holds_the_base(sharded: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../sharded"}))
    first = model_digest(adapter)
    (sharded / "config.json").write_text('{"model_type": "llama"}')
    assert model_digest(adapter) != first


def test_base_records(sharded: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    record = base_record(Source("folder", str(sharded), sharded), "d" * 64, adapter)
    assert record == {"digest": "d" * 64, "path": "../sharded"}
    (adapter / "base.json").write_text(json.dumps(record))
    base, digest = read_base(adapter)
    assert base.path == sharded.resolve() and digest == "d" * 64
    assert base_record(Source("hub", "o/n", revision=REVISION), "hub:o/n", adapter) == {
        "digest": "hub:o/n",
        "id": "o/n",
        "revision": REVISION,
    }
    shutil.rmtree(sharded)
    with pytest.raises(ArtifactError, match="base is not at"):
        read_base(adapter)


def test_good_folder_passes(sharded: Path) -> None:
    check_folder(sharded)
    assert sorted(read_header(sharded / "model-00001-of-00002.safetensors")) == ["a", "b"]


def cut(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lose(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def unlisted(folder: Path) -> None:
    write_index(folder, {k: v for k, v in read_index(folder).items() if k != "b"})


def absent(folder: Path) -> None:
    write_index(folder, read_index(folder) | {"z": "model-00002-of-00002.safetensors"})


def escape(folder: Path) -> None:
    shutil.copy(folder / "model-00002-of-00002.safetensors", folder.parent / "x.safetensors")
    write_index(folder, read_index(folder) | {"c": "../x.safetensors"})


def empty_map(folder: Path) -> None:
    write_index(folder, {})


def pickled(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (cut, "expected .* bytes, found"),
        (lose, "missing"),
        (unlisted, "index does not list"),
        (absent, "lacks z"),
        (escape, "only .safetensors files inside"),
        (empty_map, "no weight_map"),
        (pickled, "pickle"),
        (no_config, "missing"),
        (broken_config, "unreadable JSON"),
    ],
)
def test_harmed_folder_is_refused(sharded: Path, harm, says: str) -> None:
    harm(sharded)
    with pytest.raises(ArtifactError, match=says) as caught:
        check_folder(sharded)
    assert "fix:" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 1 << 60), struct.pack("<Q", 4) + b"nope"])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ArtifactError):
        read_header(file)


def test_adapter_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match="pickle"):
        check_folder(tmp_path)


def test_no_torch() -> None:
    modules = "posttrain.models.digest, posttrain.models.check, posttrain.quant.scheme, posttrain.quant.rtn, posttrain.stages.init"
    code = f"import sys, {modules}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
