"""`quantize.gptq` and `quantize.apiq` from calibration text to a checkpoint that transformers, peft and vLLM load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_kit import run_stage, texts

from posttrain.errors import ArtifactError, DataError, QuantError
from posttrain.models.load import load_model
from posttrain.models.reload import probe_logits
from posttrain.models.save import save_model
from posttrain.quant.engine_check import check_engine
from posttrain.quant.verify import check_bytes, read_layer, read_tensors


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with biases and weights that matter."""
    loaded = load_model(tiny_model_dir)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in loaded.model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
        elif parameter.ndim == 2:
            parameter.data = parameter.data * 3
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(loaded.model, loaded.tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts(tmp_path_factory.mktemp("data") / "t.jsonl")


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("quantize.gptq", {"bits": 3}),
    "closed_form": ("quantize.apiq", {"rank": 4}),
    "no_adapter": ("quantize.apiq", {"rank": 0}),
    "lw": ("quantize.apiq", {"rank": 4, "fit": "lw", "epochs": 4, "guard": []}),
    "bw": ("quantize.apiq", {"rank": 4, "fit": "bw", "epochs": 2, "guard": []}),
    "weights": ("quantize.apiq", {"rank": 0, "fit": "bw", "start": "closed_form", "train": ["clip", "weights"], "epochs": 2}),
    "scales": ("quantize.apiq", {"rank": 4, "train": ["scale", "lora"], "epochs": 2}),
    "saliency": ("quantize.apiq", {"rank": 4, "fit": "bw", "epochs": 2, "saliency": {"kind": "both", "samples": 4}, "guard": []}),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_ends_in_a_checkpoint(way: str, model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Read back by transformers without a difference; each layer and block tells its error on fitted and on held-out text."""
    name, fields = WAYS[way]
    ctx = run_stage(name, model_dir, tmp_path / "o" / "out", data, **fields)
    s = ctx.summary
    assert s["reload_max_diff"] <= s["reload_limit"] and len(s["layers"]) == 14 and len(s["blocks"]) == 2
    assert all(block["error_held"] > 0 and block["kl"] >= 0 and block["seconds"] > 0 for block in s["blocks"])
    assert s["calibration"]["tokens"] == 2048 and s["calibration"]["held_out"] == 512
    rank = fields.get("rank", 0)
    assert (tmp_path / "o" / "out" / "base").is_dir() == bool(rank) and s.get("rank", 0) == rank
    assert s["total_bits_per_weight"] - s["bits_per_weight"] == pytest.approx(
        s.get("adapter_parameters", 0) * 32 / sum(row["shape"][0] * row["shape"][1] for row in s["layers"]), abs=1e-3
    )
    wanted, found = (probe_logits(load_model(folder).model) for folder in (model_dir, tmp_path / "o" / "out"))
    assert float((wanted - found).square().mean()) < 0.5 * float(wanted.var())
    if way == "saliency":
        assert all(0 < row["saliency_top1"] <= 1 for row in s["layers"])
    if way in ("bw", "weights", "scales", "saliency"):
        assert all(block["steps"] > 0 and not block["skipped_steps"] for block in s["blocks"])


def test_order_of_the_methods_at_two_bits(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Held-out error of the last block: GPTQ, our optimum without adapter, with it, polished; each better than the one before."""
    ways: list[tuple[str, dict[str, Any]]] = [
        ("quantize.gptq", {}),
        ("quantize.apiq", {"rank": 0}),
        ("quantize.apiq", {"rank": 8, "epochs": 0}),
        ("quantize.apiq", {"rank": 8, "epochs": 6}),
    ]
    errors = []
    for index, (name, fields) in enumerate(ways):
        ctx = run_stage(name, model_dir, tmp_path / str(index) / "out", data, bits=2, **fields)
        errors.append(ctx.summary["blocks"][-1]["error_held"])
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.8 * errors[0] and errors[2] < 0.8 * errors[1]


@pytest.mark.parametrize("way", ["gptq", "closed_form"])
def test_reading_block_by_block_gives_the_same_bytes(way: str, model_dir: Path, data: Path, tmp_path: Path) -> None:
    name, fields = WAYS[way]
    run_stage(name, model_dir, tmp_path / "a" / "out", data, **fields)
    ctx = run_stage(name, model_dir, tmp_path / "b" / "out", data, stream=True, export={"max_shard_gb": 1e-5}, **fields)
    assert "reload_max_diff" not in ctx.summary and list((tmp_path / "b" / "out").rglob("model-00002-of-*"))
    first, second = (load_model(tmp_path / side / "out") for side in "ab")
    assert torch.equal(probe_logits(first.model), probe_logits(second.model))


@pytest.mark.parametrize("states", ["kept", "lost"])
@pytest.mark.parametrize("stream", [False, True])
def test_goes_on_with_the_block_that_was_in_hand(
    stream: bool, states: str, model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure in the second block costs that block; the bytes are those of a run that was never interrupted."""
    from posttrain.quant.fit_block import BlockFit

    whole = run_stage("quantize.apiq", model_dir, tmp_path / "a" / "out", data, rank=4, stream=stream)
    real, seen = BlockFit.__call__, []

    def counted(self: BlockFit, job: Any, target: Any) -> None:
        seen.append(job.index)
        if len(seen) == 2:
            raise KeyboardInterrupt
        real(self, job, target)

    monkeypatch.setattr(BlockFit, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        run_stage("quantize.apiq", model_dir, tmp_path / "b" / "out", data, rank=4, stream=stream)
    (tmp_path / "b" / "out").rmdir()
    if states == "lost":
        for file in (tmp_path / "b" / "work" / "states").iterdir():
            file.unlink()
    again = run_stage("quantize.apiq", model_dir, tmp_path / "b" / "out", data, rank=4, stream=stream)
    assert seen == [0, 1, 1]
    assert files(tmp_path / "a" / "out") == files(tmp_path / "b" / "out")
    assert [b["error_held"] for b in whole.summary["blocks"]] == [b["error_held"] for b in again.summary["blocks"]]


def test_peft_loads_the_adapter_and_training_goes_on(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """By peft itself over transformers' own load of the base; and trained on by a stage, with the base untouched."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "o" / "out"
    run_stage("quantize.apiq", model_dir, out, data, rank=4, bits=2)
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    attached = PeftModel.from_pretrained(base, str(out)).eval()
    assert (probe_logits(attached) - probe_logits(load_model(out).model)).abs().max() < 1e-4
    fields = {"group_size": None, "calibration": None}
    ctx = run_plain("sft", out, tmp_path / "s" / "out", data, lora={"on_input": "continue"}, steps=2, batch={"rows": 2}, drop=fields)
    tuned = load_model(tmp_path / "s" / "out")
    assert tuned.kind == "adapter" and ctx.summary["steps"] == 2
    assert (probe_logits(tuned.model) - probe_logits(load_model(out).model)).abs().max() > 1e-5
    assert files(out / "base")["model.safetensors"] == (out / "base" / "model.safetensors").read_bytes()
    run_plain("export", tmp_path / "s" / "out", tmp_path / "e" / "out", data, drop=fields)
    assert files(tmp_path / "e" / "out")["base/model.safetensors"] == files(out)["base/model.safetensors"]
    assert torch.equal(probe_logits(load_model(tmp_path / "e" / "out").model), probe_logits(tuned.model))
    run_plain("export", out, tmp_path / "f" / "out", data, format="float", drop=fields)
    assert load_model(tmp_path / "f" / "out").kind == "model"


def run_plain(name: str, model: Path, out: Path, data: Path, *, drop: dict[str, Any], **fields: Any) -> Any:
    """`run_stage` without the fields of quantizers."""
    from posttrain.core.artifact import InputRef
    from posttrain.core.context import StageContext
    from posttrain.core.events import Events
    from posttrain.core.registry import method

    found = method(name)
    out.mkdir(parents=True)
    inputs = {"model": [InputRef("model", "m", "model", "model", spec={"id": str(model)})]}
    if "data" in found.inputs:
        inputs["data"] = [InputRef("data", "d", "source", "dataset", spec={"kind": "text", "path": str(data)})]
    ctx = StageContext("q", name, 0, inputs, out, out.parent / "work", Events(None))
    ctx.work.mkdir(parents=True, exist_ok=True)
    found.run(found.config.model_validate({"name": "q", "method": name, **fields}), ctx)
    return ctx


@pytest.mark.parametrize("format", ["gptq", "awq", "dequantized"])
def test_other_formats_by_an_independent_reader(format: str, model_dir: Path, data: Path, tmp_path: Path) -> None:
    """The bytes of GPTQ and AWQ give the weights of the compressed-tensors export; one wrong code is noticed."""
    options = {"bits": 4, "symmetric": format != "awq"}
    for kind in ("compressed-tensors", format):
        run_stage("quantize.gptq", model_dir, tmp_path / kind / "out", data, export={"format": kind}, **options)
    ours, theirs = (read_tensors(tmp_path / kind / "out") for kind in ("compressed-tensors", format))
    name = "model.layers.1.mlp.down_proj"
    wanted = read_layer(ours, name, 4)
    assert (read_layer(theirs, name, 4, format) == wanted).all()
    wanted = wanted.copy()
    wanted[3, 5] += 0.25
    with pytest.raises(QuantError, match="differs"):
        check_bytes(tmp_path / format / "out", {name: wanted}, 4, format)
    config = json.loads((tmp_path / format / "out" / "config.json").read_text())
    assert config.get("quantization_config", {}).get("quant_method") == (None if format == "dequantized" else format)
    if format == "dequantized":
        assert torch.equal(
            probe_logits(load_model(tmp_path / format / "out").model),
            probe_logits(load_model(tmp_path / "compressed-tensors" / "out").model),
        )


@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_vllm_reads_other_formats(format: str, model_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "o" / "out"
    run_stage("quantize.gptq", model_dir, out, data, bits=4, symmetric=format == "gptq", export={"format": format, "engine": "vllm-cpu"})
    run_stage("quantize.gptq", model_dir, tmp_path / "c" / "out", data, bits=4, symmetric=format == "gptq")
    found = check_engine(out, load_model(tmp_path / "c" / "out").model, timeout_s=280)
    assert found["tokens"] == 48 and found["agree"] > 0.9 and found["max_logprob_diff"] < 0.1


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_vllm_puts_the_adapter_over_the_base(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Four bits and rank 4 in vLLM compute what transformers computes with the adapter merged, and not what the base alone does."""
    out = tmp_path / "o" / "out"
    ctx = run_stage("quantize.apiq", model_dir, out, data, bits=4, rank=4, export={"engine": "vllm-cpu"})
    merged = load_model(out).model
    found = check_engine(out / "base", merged, adapter=out, rank=ctx.summary["max_lora_rank"], timeout_s=280)
    assert found["agree"] > 0.9 and found["max_logprob_diff"] < 0.1


def test_groups_that_do_not_divide(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """The next smaller power of two that does, by layer, said; the export holds both sizes and loads."""
    ctx = run_stage("quantize.gptq", model_dir, tmp_path / "o" / "out", data, bits=4, group_size=128)
    sizes = {row["name"].rpartition(".")[2]: row["group_size"] for row in ctx.summary["layers"]}
    assert sizes["down_proj"] == 128 and sizes["q_proj"] == 64
    assert any("group_size 128 does not divide 64 inputs" in note for note in ctx.summary["notes"])
    assert ctx.summary["reload_max_diff"] == 0


def test_refused_before_anything_is_fitted(model_dir: Path, data: Path, tmp_path: Path) -> None:
    few = texts(tmp_path / "few.jsonl", 3)
    with pytest.raises(DataError, match="fewer than"):
        run_stage("quantize.gptq", model_dir, tmp_path / "a" / "out", few)
    with pytest.raises(DataError, match="positions"):
        run_stage(
            "quantize.gptq", model_dir, tmp_path / "b" / "out", data, calibration={"length": 100000, "tokens": 100000, "held_out": 100000}
        )
    with pytest.raises(QuantError, match="did you mean `down_proj`"):
        run_stage("quantize.gptq", model_dir, tmp_path / "c" / "out", data, ignore=["dwn_proj"])
    out = tmp_path / "d" / "out"
    run_stage("quantize.gptq", model_dir, out, data)
    for number, fields in enumerate(({}, {"stream": True})):
        with pytest.raises((QuantError, ArtifactError), match="quantized already|float weights"):
            run_stage("quantize.gptq", out, tmp_path / f"e{number}" / "out", data, **fields)


def test_verify_loads_again(model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`posttrain verify RUN --load` after a run from the command line; a scale that changed with its hash is noticed by the logits."""
    from safetensors.torch import load_file, save_file

    from posttrain.cli import main
    from posttrain.core.hashing import list_files
    from posttrain.core.rundir import MANIFEST
    from posttrain.verbs.loaders import load_again

    runs = ["--runs", str(tmp_path / "runs")]
    calibration = [f"calibration.{key}={value}" for key, value in (("tokens", 1024), ("held_out", 256), ("length", 64))]
    command = ["quantize", "apiq", f"model={model_dir}", f"in.data={data}", "bits=3", "rank=2", "group_size=32", "epochs=0", *calibration]
    assert main([*command, *runs]) == 0
    run = next((tmp_path / "runs").iterdir())
    capsys.readouterr()
    assert main(["verify", run.name, "--load", *runs]) == 0
    assert "gives the recorded logits" in capsys.readouterr().out
    folder = next(f for f in (run / "stages").iterdir() if (f / MANIFEST).is_file())
    file = folder / "out" / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_scale"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "out" / "base.json").write_text(json.dumps({"path": "base"}))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = list_files(folder / "out")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="differ by"):
        load_again([folder])


def test_the_tiny_chain_runs(tmp_path: Path) -> None:
    """`configs/tiny/quantize.yaml`: the adapter over two bits is reinforced with rollouts from the quantized model, its base stays as it
    was, and both are exported; the budget of the other is kept."""
    from posttrain.cli import main

    file = Path(__file__).resolve().parents[2] / "configs" / "tiny" / "quantize.yaml"
    assert main(["run", str(file), "--runs", str(tmp_path), "--quiet"]) == 0
    made, folders = {}, {}
    for path in (tmp_path / "tiny-quantize" / "stages").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        made[manifest["name"]], folders[manifest["name"]] = manifest, path.parent / "out"
    assert made["two"]["kind"] == "quantized" and made["two"]["summary"]["rank"] == 4
    assert made["reinforced"]["summary"]["steps"] == 2
    base, exported = (files(folders[name] / "base") for name in ("two", "exported"))
    assert base == exported
    assert made["budget"]["summary"]["total_bits_per_weight"] <= 5.0
    assert made["two"]["summary"]["eval"]["after"]["tasks"]["loss"]["value"] < 5


def test_a_loss_that_is_not_finite_falls_back_to_the_start(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipped steps halve the rates; after the fourth the block keeps its start, and the report says so."""
    from posttrain.quant import reconstruct

    start = run_stage("quantize.apiq", model_dir, tmp_path / "a" / "out", data, rank=4, epochs=0)
    real = reconstruct._loss
    monkeypatch.setattr(reconstruct, "_loss", lambda job, *args: real(job, *args) * (float("nan") if job.index == 1 else 1.0))
    ctx = run_stage("quantize.apiq", model_dir, tmp_path / "b" / "out", data, rank=4, epochs=2)
    first, second = ctx.summary["blocks"]
    assert "fallback" not in first and first["steps"] > 0 and first["error_held"] < start.summary["blocks"][0]["error_held"]
    assert second["skipped_steps"] == 4 and "not finite" in second["fallback"] and ctx.summary["reload_max_diff"] == 0
