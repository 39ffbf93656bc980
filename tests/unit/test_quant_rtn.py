"""Round to nearest against float64 numpy, packing against whole-number arithmetic, schemes and configs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from posttrain.errors import QuantError
from posttrain.quant.base import QTensor, dequantize, quantize_rtn
from posttrain.quant.formats.compressed_tensors import quantization_config, reader_layout, to_tensors
from posttrain.quant.formats.packing import pack, word_count
from posttrain.quant.rtn import RtnConfig
from posttrain.quant.scheme import check_groups, engines, plan_scheme

WIDTHS = [2, 3, 4, 8]


def weight(rows: int = 12, columns: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def reference(w: np.ndarray, bits: int, group: int, symmetric: bool) -> np.ndarray:
    """The docstring's formulas in float64."""
    out, columns = w.shape
    w = w.astype(np.float64).reshape(out, -1, columns if group == -1 else group)
    lo, hi = np.minimum(w.min(-1, keepdims=True), 0), np.maximum(w.max(-1, keepdims=True), 0)
    if symmetric:
        scale, zero = np.maximum(hi, -lo) / (2 ** (bits - 1) - 0.5), 2.0 ** (bits - 1)
    else:
        scale = (hi - lo) / (2**bits - 1)
        zero = np.round(-lo / scale)
    codes = np.clip(np.round(w / scale) + zero, 0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(out, columns)


@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_equals_the_float64_reference(bits: int, symmetric: bool, group: int) -> None:
    """Elsewhere than at a tie (symmetric: the largest weight of a group lies halfway between two levels by construction)."""
    w = weight().numpy()
    found = dequantize(quantize_rtn(torch.from_numpy(w), bits, group, symmetric)).numpy()
    expected = reference(w, bits, group, symmetric)
    assert np.abs(np.abs(found - w) - np.abs(expected - w)).max() < 1e-5
    groups = np.abs(w).reshape(len(w), -1, 64 if group == -1 else group)
    largest = (groups == groups.max(-1, keepdims=True)).reshape(w.shape) & symmetric
    assert (np.abs(found - expected)[~largest] < 1e-5).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_error_is_at_most_half_a_step(bits: int, symmetric: bool) -> None:
    w = weight()
    q = quantize_rtn(w, bits, 16, symmetric)
    step = q.scales.repeat_interleave(16, 1)
    assert ((dequantize(q) - w).abs() <= step * (0.5 if symmetric else 1.0) + 1e-6).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_search_never_does_worse(bits: int, symmetric: bool) -> None:
    w = weight(32, 128)
    plain, searched = (dequantize(quantize_rtn(w, bits, 32, symmetric, mse=mse)) for mse in (False, True))
    groups = [((found - w) ** 2).reshape(32, 4, 32).sum(-1) for found in (plain, searched)]
    assert (groups[1] <= groups[0] * (1 + 1e-6)).all()
    assert groups[1].sum() < groups[0].sum() or bits == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_belong_to_the_stored_scale(dtype: torch.dtype) -> None:
    w = weight()
    q = quantize_rtn(w, 4, 16, True, scale_dtype=dtype)
    scale = q.scales.float().repeat_interleave(16, 1)
    assert q.scales.dtype == dtype
    assert torch.equal(q.codes.float(), (torch.round(w / scale) + 8).clamp(0, 15))


@pytest.mark.parametrize("symmetric", [True, False])
def test_edge_groups(symmetric: bool) -> None:
    w = torch.zeros(4, 32)
    w[1] = 3.0
    w[2] = -3.0
    w[3] = 1e-30
    for dtype in (torch.float32, torch.float16):
        q = quantize_rtn(w, 4, 16, symmetric, mse=True, scale_dtype=dtype)
        found = dequantize(q)
        assert torch.isfinite(found).all() and (found[0] == 0).all()
        assert (found[1:3] - w[1:3]).abs().max() < 0.3


def test_non_finite_weights_are_refused() -> None:
    w = weight()
    w[0, 0] = float("nan")
    with pytest.raises(QuantError, match="NaN") as caught:
        quantize_rtn(w, 4, 16, True, name="model.layers.0.q")
    assert "model.layers.0.q" in str(caught.value)


@pytest.mark.parametrize("layout", ["dense", "padded"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_packing_against_whole_numbers(bits: int, layout: str) -> None:
    """Each row read as one big little-endian number."""
    codes = torch.randint(0, 2**bits, (3, 45), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack(codes, bits, layout)
    assert words.dtype == torch.int32 and words.shape == (3, word_count(45, bits, layout))
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        number = sum((word % 2**32) << (32 * i) for i, word in enumerate(packed))
        if layout == "dense":
            assert number == sum(code << (bits * j) for j, code in enumerate(row))
        else:
            per = 32 // bits
            assert number == sum(code << (32 * (j // per) + bits * (j % per)) for j, code in enumerate(row))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_tensors_are_what_the_installed_reader_unpacks(bits: int, symmetric: bool) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = quantize_rtn(weight(), bits, 16, symmetric)
    tensors = to_tensors("x", q, reader_layout(bits))
    assert "x.weight_g_idx" not in tensors and ("x.weight_zero_point" in tensors) is not symmetric
    shape, half = torch.Size(tensors["x.weight_shape"].tolist()), 2 ** (bits - 1)
    codes = helpers.unpack_from_int32(tensors["x.weight_packed"], bits, shape).int() + half
    assert torch.equal(codes, q.codes.int()) and torch.equal(tensors["x.weight_scale"], q.scales)
    if not symmetric:
        zeros = helpers.unpack_from_int32(tensors["x.weight_zero_point"], bits, q.zero_points.shape, packed_dim=0).int() + half
        assert torch.equal(zeros, q.zero_points.int())


@pytest.mark.parametrize("bits", WIDTHS)
def test_layout_agrees_with_the_installed_reader(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (5, 40), dtype=torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits, reader_layout(bits)), helpers.pack_to_int32(signed, bits))


def test_config_of_the_format() -> None:
    channel = quantization_config(4, -1, True, ["lm_head"])["config_groups"]["group_0"]["weights"]
    assert (channel["strategy"], channel["group_size"]) == ("channel", None)
    assert quantization_config(2, 64, False, [])["config_groups"]["group_0"]["weights"]["actorder"] is None


SHAPES = {
    f"model.layers.{i}.{name}": shape
    for i in range(2)
    for name, shape in {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (176, 64),
        "mlp.up_proj": (176, 64),
        "mlp.down_proj": (64, 176),
    }.items()
} | {"lm_head": (400, 64)}


@pytest.mark.parametrize(("group", "fits"), [(128, False), (32, False), (16, True), (-1, True)])
def test_group_must_divide_every_layer(group: int, fits: bool) -> None:
    """C35."""
    if fits:
        assert len(plan_scheme(SHAPES, group_size=group).layers) == 14
        return
    with pytest.raises(QuantError) as caught:
        plan_scheme(SHAPES, group_size=group)
    text = str(caught.value)
    assert ("down_proj" in text or group == 128) and "input features" in text and "16, 8, -1" in text


def test_sizes_named_work() -> None:
    for size in (16, 8, -1):
        check_groups({k: v for k, v in SHAPES.items() if k != "lm_head"}, size)


@pytest.mark.parametrize(
    ("ignore", "dense"),
    [
        (["model.layers.0.self_attn.k_proj"], {"q_proj", "k_proj", "v_proj"}),
        (["up_proj"], {"gate_proj", "up_proj"}),
        ([r"re:.*layers\.0\..*down_proj"], {"down_proj"}),
    ],
)
def test_fused_layers_share_one_scheme(ignore: list[str], dense: set[str]) -> None:
    """C101."""
    scheme = plan_scheme(SHAPES, group_size=16, ignore=ignore)
    assert {name.rpartition(".")[2] for name in scheme.dense} == dense | {"lm_head"}
    assert not set(scheme.layers) & set(scheme.dense) and len(scheme.layers) + len(scheme.dense) == len(SHAPES)
    spread = {note.split()[0] for note in scheme.notes if "fused" in note}
    assert spread == {
        name for name in scheme.dense if name != "lm_head" and not any(name.endswith(e) or e.startswith("re:") for e in ignore)
    }


def test_output_layer_is_never_quantized() -> None:
    scheme = plan_scheme(SHAPES, group_size=16, ignore=[])
    assert "lm_head" in scheme.dense and any("lm_head and embeddings" in note for note in scheme.notes)


def test_routers_stay_dense() -> None:
    scheme = plan_scheme(SHAPES | {"model.layers.0.mlp.gate": (8, 64)}, group_size=16)
    assert "model.layers.0.mlp.gate" in scheme.dense


@pytest.mark.parametrize("ignore", [["dwn_proj"], ["re:("], list(SHAPES)])
def test_bad_ignore(ignore: list[str]) -> None:
    with pytest.raises(QuantError, match="fix"):
        plan_scheme(SHAPES, group_size=16, ignore=ignore)


def rtn(**fields: object) -> RtnConfig:
    return RtnConfig.model_validate({"name": "q", "method": "quantize.rtn", **fields})


def test_symmetry_follows_the_width() -> None:
    assert [rtn(bits=bits).is_symmetric for bits in WIDTHS] == [False, False, True, True]
    assert rtn(bits=2, symmetric=True).is_symmetric


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 3, "export": {"engine": "vllm"}},
        {"bits": 8, "export": {"engine": "vllm-cpu"}},
        {"bits": 5},
        {"group_size": 0},
        {"group_size": -2},
        {"export": {"format": "gguf"}},
    ],
)
def test_configs_that_cannot_be_loaded(fields: dict) -> None:
    """C38: a width that the engine cannot load is refused before anything runs."""
    with pytest.raises(ValidationError):
        rtn(**fields)


def test_engines() -> None:
    assert engines(4, True) == {"transformers": True, "vllm": True, "vllm-cpu": True}
    assert engines(3, False, dense_layout=False) == {"transformers": True, "vllm": False, "vllm-cpu": False}


def test_qtensor_is_frozen() -> None:
    q = quantize_rtn(weight(), 4, 16, True)
    assert isinstance(q, QTensor) and q.shape == (12, 64)
    with pytest.raises(AttributeError):
        q.bits = 3


def test_group_size_is_refused_by_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """C35: found in the headers of the weight files, before anything is launched."""
    from safetensors.torch import save_file

    from posttrain.cli import main

    monkeypatch.chdir(tmp_path)
    shapes = {"model.layers.0.mlp.up_proj": (176, 64), "model.layers.0.mlp.down_proj": (64, 176), "model.embed_tokens": (300, 50)}
    (tmp_path / "m").mkdir()
    save_file({f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text("{}")
    lines = ["version: 1", "name: odd", "model: {id: ./m}", "stages: [{name: q, method: quantize.rtn, group_size: 32}]"]
    (tmp_path / "p.yaml").write_text("\n".join(lines))
    assert main(["plan", "p.yaml"]) == 2
    said = capsys.readouterr().err
    assert "stages.q.group_size" in said and "176 input features of model.layers.0.mlp.down_proj" in said and "16, 8, -1" in said
    assert main(["plan", "p.yaml", "stages.q.group_size=16"]) == 0
    assert main(["plan", "p.yaml", "stages.q.ignore=[down_proj]"]) == 0


def test_a_mixture_of_experts_is_refused_by_name(tmp_path: Path) -> None:
    """C65: its experts would be left dense, and the export could not be read back."""
    from safetensors.torch import save_file

    from posttrain.quant.scheme import check_stored

    names = [f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in range(4)]
    save_file({name: torch.zeros(8, 16) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(QuantError, match=r"\(4, first model\.layers\.0\.mlp\.experts\.0\.up_proj"):
        check_stored(tmp_path, 8)
