"""The seams of TRL and transformers that trainers stand on: names, signatures, fields. A failure names what moved."""

from __future__ import annotations

import inspect

import pytest

trl = pytest.importorskip("trl")

METHODS = [
    (trl.GRPOTrainer, "_generate_and_score_completions", ["self", "inputs"]),
    (trl.GRPOTrainer, "_compute_loss", ["self", "model", "inputs"]),
    (trl.GRPOTrainer, "_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
    (trl.GRPOTrainer, "_prepare_inputs", ["self", "generation_batch"]),
    (trl.GRPOTrainer, "_get_train_sampler", ["self", "dataset"]),
    (trl.GRPOTrainer, "_tokenize_prompts", ["self", "prompts"]),
    (trl.GRPOTrainer, "training_step", ["self", "model", "inputs", "num_items_in_batch"]),
    (trl.SFTTrainer, "compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
    (trl.SFTTrainer, "_set_signature_columns_if_needed", ["self"]),
    (trl.SFTTrainer, "_save_checkpoint", ["self", "model", "trial"]),
    (trl.SFTTrainer, "_load_optimizer_and_scheduler", ["self", "checkpoint"]),
    (trl.SFTTrainer, "_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
    (trl.SFTTrainer, "_get_grad_norm", ["self", "model", "grad_norm"]),
    (trl.SFTTrainer, "_clip_grad_norm", ["self", "model"]),
    (trl.SFTTrainer, "_get_output_dir", ["self", "trial"]),
    (trl.SFTTrainer, "save_model", ["self", "output_dir", "_internal_call"]),
    (trl.SFTTrainer, "log", ["self", "logs", "start_time"]),
]


@pytest.mark.parametrize(("cls", "name", "parameters"), METHODS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_signature(cls: type, name: str, parameters: list[str]) -> None:
    found = list(inspect.signature(getattr(cls, name)).parameters)
    assert found[: len(parameters)] == parameters, f"{cls.__name__}.{name} of TRL {trl.__version__} takes {found}"


def test_log_probability_method_takes_what_policy_logps_passes() -> None:
    found = inspect.signature(trl.GRPOTrainer._get_per_token_logps_and_entropies).parameters
    assert list(found)[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]


def test_keys_of_a_scored_batch() -> None:
    source = inspect.getsource(trl.GRPOTrainer._generate_and_score_completions)
    for key in (
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "advantages",
        "num_items_in_batch",
        "sampling_per_token_logps",
    ):
        assert f'"{key}"' in source, key


def test_advantages_may_be_given_for_each_token() -> None:
    assert "advantages.dim() == 1" in inspect.getsource(trl.GRPOTrainer._compute_loss)


def test_attributes_for_resume() -> None:
    source = inspect.getsource(trl.GRPOTrainer)
    assert "self._step = 0" in source
    assert "self._buffered_inputs = None" in source
    assert "self._total_train_tokens = 0" in inspect.getsource(trl.SFTTrainer)


def test_rollout_func_contract() -> None:
    source = inspect.getsource(trl.GRPOTrainer._generate)
    assert "self.rollout_func(prompts, self)" in source
    assert '{"prompt_ids", "completion_ids", "logprobs"}' in source


def test_rng_and_optimizer_state_are_read_without_unpickling() -> None:
    from transformers import Trainer

    for name in ("_load_rng_state", "_load_optimizer_and_scheduler"):
        source = inspect.getsource(getattr(Trainer, name))
        assert source.count("weights_only=True") >= source.count("torch.load("), name


def test_owned_fields_exist_or_are_known_to_be_gone() -> None:
    from dataclasses import fields

    from posttrain.trainers._fields import OWNED, OWNED_BY, owned_fields

    sft, grpo = ({field.name for field in fields(cls)} for cls in (trl.SFTConfig, trl.GRPOConfig))
    elsewhere = {"tools", "environment_factory", "warmup_ratio", "train_batch_size"}
    assert set(OWNED) - sft - grpo <= elsewhere
    assert set(OWNED_BY["GRPOConfig"]) <= grpo
    assert "loss_type" in owned_fields(trl.GRPOConfig)
    assert "loss_type" not in owned_fields(trl.SFTConfig)


def test_pass_through_fields_are_checked() -> None:
    from posttrain.trainers._fields import check_trl_fields

    block = {
        "learning_rate": 1e-3,
        "neftune_noise_alhpa": 5,
        "group_by_length": True,
        "dataloader_num_workers": "two",
        "tools": [],
        "loss_type": "dft",
    }
    found = {problem.path: str(problem) for problem in check_trl_fields(block, trl.SFTConfig, "stages.s.trl")}
    assert "optim.lr" in found["stages.s.trl.learning_rate"]
    assert "neftune_noise_alpha" in found["stages.s.trl.neftune_noise_alhpa"]
    assert "dataloader_num_workers" in str(found)
    assert "stages.s.trl.tools" in found
    assert "stages.s.trl.loss_type" not in found
    assert not check_trl_fields({"neftune_noise_alpha": 5.0, "delta": None}, trl.GRPOConfig, "x")


def test_public_names_are_reached_lazily() -> None:
    from posttrain.trainers.grpo import GRPOTrainer
    from posttrain.trainers.sft import SFTTrainer

    assert issubclass(GRPOTrainer, trl.GRPOTrainer)
    assert issubclass(SFTTrainer, trl.SFTTrainer)
    extra = set(inspect.signature(GRPOTrainer.__init__).parameters) - {"self", "args", "kwargs"}
    assert extra == {"engine", "correction", "correction_cap", "dynamic", "prompts"}


def test_vllm_is_not_imported_for_a_stage() -> None:
    """TRL's switch still exists; in a fresh process a GRPO stage's imports bring no vLLM."""
    import subprocess
    import sys

    code = (
        "from posttrain.trainers._trl import spare_vllm; spare_vllm(); import posttrain.trainers._grpo, sys;"
        "import trl.import_utils as u; assert u.is_vllm_available.__module__ == 'trl.import_utils'; sys.exit('vllm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
