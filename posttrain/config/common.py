"""Blocks of the pipeline grammar that all stages share, defined once. Names are TRL's or transformers' where they have one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from posttrain.config.base import REPORT_ONLY, ModelId, Name, PathStr, Positive, Share, Strict
from posttrain.config.lora import LoraConfig
from posttrain.config.optim import OptimConfig

REPEATS = 4.0
"""Epochs over the same data from which a person is warned (Muennighoff et al. 2023, arXiv 2305.16264)."""
RowType = Literal["text", "prompt", "messages", "preference", "verifiable"]
"""`text`: {text}; `prompt`: {prompt}; `messages`: {messages}; `preference`: {prompt, chosen, rejected};
`verifiable`: {prompt, answer, ...columns}. A prompt is a string or a list of messages."""


class ModelConfig(Strict):
    """Where a model comes from and how it is held."""

    id: ModelId
    """Hub id `owner/name`, folder, GGUF file, peft folder, or `package:NAME/FILE`."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Full 40-hex commit; required for a hub id."""
    offline: ModelId | None = None
    """Used instead of `id` where no hub can be reached (`HF_HUB_OFFLINE=1`); the choice is printed and enters the key."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights' type in memory; `auto`: float32 on CPU, the checkpoint's own type on a GPU."""
    attn: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation, transformers' `attn_implementation`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""


class SplitConfig(Strict):
    """Shares held out by the hash of each row's prompt (or text); the same row is always in the same part."""

    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share that may steer a run (stop, best, guard)."""
    test: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share that is only reported."""

    @model_validator(mode="after")
    def _leaves_rows(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation + test = {self.validation + self.test:g} leaves nothing to train on; keep it below 1")
        return self


class SourceConfig(Strict):
    """Rows that exist before the run: local shards or a hub dataset."""

    kind: RowType
    """Row type; every row is checked against it."""
    path: PathStr | list[PathStr] | None = None
    """File, folder or glob of shards: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt. Escape glob characters of a real name as `[[]`."""
    hub: str | None = None
    """Hub dataset id; `revision` is then required."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Full 40-hex commit of the hub dataset."""
    hub_split: str = "train"
    """Split of the hub dataset to read."""
    config: str | None = None
    """Configuration name of the hub dataset."""
    columns: dict[str, str] = {}
    """Rename on reading: our field -> their column, e.g. `{prompt: question, answer: solution}`."""
    answer: str | None = None
    """Short for `columns: {answer: NAME}` (verifiable rows)."""
    split: SplitConfig = SplitConfig()
    """Held-out shares; refer to them as `NAME:validation` and `NAME:test`."""
    on_bad: Literal["stop", "skip"] = "stop"
    """A row that cannot be read or is not of `kind`: stop the run, or skip and count it."""

    @model_validator(mode="after")
    def _one_origin(self) -> SourceConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of `path` (local shards) and `hub` (hub dataset id)")
        if self.hub and not self.revision:
            raise ValueError("a hub dataset needs `revision`, a full 40-hex commit")
        if self.answer and "answer" in self.columns:
            raise ValueError("give `answer` or `columns.answer`, not both")
        return self


class InputItem(Strict):
    """One part of a data mixture."""

    from_: str = Field(alias="from")
    """Source or stage, optionally with a part: `tasks`, `tasks:test`."""
    share: Share | None = None
    """Share of the mixture's rows; the parts' shares must sum to 1."""
    repeat: Annotated[float, Field(gt=0)] | None = None
    """How many times the rows are seen; 0.5 takes a hash-chosen half. Default 1."""

    @model_validator(mode="after")
    def _one_of(self) -> InputItem:
        if self.share is not None and self.repeat is not None:
            raise ValueError("give `share` or `repeat`, not both")
        return self


Input = str | list[InputItem | str]
"""What a port takes: a name, or for data a list of names and `{from, share | repeat}`."""


class DataConfig(Strict):
    """How rows become token sequences."""

    format: Literal["auto", "chat", "plain"] = "auto"
    """`chat`: prompts are rendered by the chat template; `plain`: used as they are; `auto`: chat where the tokenizer has a template."""
    template: PathStr | None = None
    """Jinja chat template to set; only the first stage that holds the model may set it."""
    add_tokens: list[str] = []
    """Texts that become one new token each, e.g. `[<call>, </call>]` (supervised stages). Their embedding rows are trained, under
    LoRA too; they stay in decoded text."""
    max_length: Positive = 1024
    """Longest sequence in tokens; longer ones are cut at the end (text) or dropped and counted (prompt alone too long)."""
    packing: bool = False
    """Fill sequences of `max_length` with several rows (SFT)."""
    group_by_length: bool = False
    """Sort the rows of each optimizer step by length, so that its passes of `per_device` rows pad little (SFT); the step's
    loss and gradient stay the same up to rounding."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that carry loss in rows with a prompt; text rows always carry loss everywhere."""
    weights: Literal["ignore", "repeat", "loss"] = "ignore"
    """Use of a selector's `weight` and `repeat` columns."""
    on_bad: Literal["stop", "skip"] = "stop"
    """A row that cannot be rendered: stop, or skip and count it."""

    @model_validator(mode="after")
    def _tokens(self) -> DataConfig:
        odd = [token for token in self.add_tokens if not token.strip() or self.add_tokens.count(token) > 1]
        if odd:
            raise ValueError(f"add_tokens: {odd[0]!r} is blank or named twice")
        return self


class BatchConfig(Strict):
    """The *global* batch of one optimizer step; accumulation is derived from it and printed."""

    rows: Positive | None = None
    """Sequences (for GRPO: completions) per optimizer step, over all processes."""
    tokens: Positive | None = None
    """Tokens per optimizer step, over all processes; only with packing (sequences of equal length)."""
    per_device: Positive = 8
    """Sequences in one forward pass of one process."""

    @model_validator(mode="after")
    def _one_size(self) -> BatchConfig:
        if self.rows is not None and self.tokens is not None:
            raise ValueError("give `rows` or `tokens`, not both")
        return self


class CheckpointConfig(Strict):
    """Resumable state during training."""

    every: Annotated[Positive, REPORT_ONLY] = 100
    """Optimizer steps between checkpoints."""
    keep: Annotated[Positive, REPORT_ONLY] = 2
    """Complete checkpoints kept; older ones are deleted only after a newer one is complete."""


def _reward_options(reward: str | None, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """Options with their names and types checked and their paths expanded, still as YAML holds them."""
    if reward is None or not options:
        return options
    from posttrain.rewards.registry import checked_options

    found = checked_options(reward, options, (info.context or {}).get("base"))
    return {key: str(value) if isinstance(value, Path) else value for key, value in found.items()}


class RewardUse(Strict):
    """One reward of a weighted sum."""

    use: str
    """Name of a reward; `posttrain schema` and a wrong name list them."""
    weight: float = 1.0
    """Factor in the sum of rewards."""
    role: Literal["add", "gate"] = "add"
    """`gate` (`grpo`): stays out of the sum; where it is below `at_least`, the whole reward is `gate_value`."""
    at_least: float = 1.0
    """Value from which a gate is passed, and from which a reward counts as right in pass rates and hardness."""
    columns: dict[str, str] = {}
    """The reward's column -> the rows' column, e.g. `{answer: solution}`."""
    options: dict[str, Any] = {}
    """Settings of the reward, its keyword-only parameters, e.g. `{timeout_s: 2.0}` for `math_exact`."""

    @field_validator("options")
    @classmethod
    def _known_options(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return _reward_options(info.data.get("use"), value, info)


Metric = Literal["loss", "perplexity", "accuracy", "pass@k"]


class Measurement(Strict):
    """How rows are measured."""

    rows: Positive | None = None
    """At most this many rows, chosen by hash."""
    samples: Positive = 1
    """Sampled completions a prompt for `accuracy` (sampled) and `pass@k`."""
    max_tokens: Positive = 64
    """Completion limit in tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature."""
    reward: str = "exact"
    """Reward that verifies a completion (1.0 = right)."""
    reward_options: dict[str, Any] = {}
    """Its options; see `rewards[].options`."""
    max_length: Positive = 1024
    """Tokens of a row used for the loss."""

    @field_validator("reward_options")
    @classmethod
    def _known_options(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return _reward_options(info.data.get("reward"), value, info)


class EvalSet(Measurement):
    """One named set of rows and what to measure on it."""

    from_: str = Field(alias="from")
    """Source or stage with a part, e.g. `tasks:test`."""
    metrics: list[Metric] = ["loss"]
    """`loss`, `perplexity`: held-out next-token loss; `accuracy`: verified greedy and sampled; `pass@k`: from `samples`."""


class EvalConfig(Strict):
    """What is measured, and when."""

    sets: dict[Name, EvalSet] = {}
    """Named sets."""
    when: list[Literal["before", "after"]] = ["before", "after"]
    """Around each stage that makes or changes a model."""
    batch: Positive = 64
    """Sequences in one forward pass."""


class StageEval(Strict):
    """A stage's own choice of evaluation."""

    sets: list[str] | None = None
    """Names out of the pipeline's `eval.sets`; none given = all; `[]` = no evaluation."""
    when: list[Literal["before", "after"]] | None = None
    """Overrides the pipeline's `eval.when`."""
    every: Annotated[Positive, REPORT_ONLY] | None = None
    """Also evaluate the named validation sets every so many optimizer steps (trainers)."""


class Steering(Strict):
    """A validation metric, measured during training, that decides something about it."""

    metric: str
    """`SET.METRIC` of a validation set, e.g. `text-val.loss` or `tasks-val.accuracy`."""
    every: Positive
    """Optimizer steps between evaluations of that metric."""
    mode: Literal["min", "max", "auto"] = "auto"
    """`auto`: smaller is better for loss and perplexity, larger otherwise."""


class BestCommit(Steering):
    """Commit the best checkpoint of the run instead of the last one."""


class StopAt(Steering):
    """Stop as soon as a validation metric has reached a level; `steps` or `epochs` is then the longest run."""

    at: float
    """The level."""


class Guard(Steering):
    """Keep the best weights by a validation metric, and stop once it has become so much worse; a smaller loss is better."""

    rise: Annotated[float, Field(gt=0)] = 0.02
    """Share of the best value by which the metric may be worse."""


class CommitConfig(Strict):
    """Which weights a trainer commits."""

    best: BestCommit | None = None
    """Keep the best by a validation metric; none = the last step's weights."""


class LaunchConfig(Strict):
    """How the stage's process is started."""

    with_: Literal["none", "accelerate", "torchrun"] = Field(default="none", alias="with")
    """`none`: one plain process; CPU multi-process must use `torchrun`."""
    config: PathStr | None = None
    """accelerate config file."""
    processes: Positive = 1
    """World size; the child refuses to run with another one."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds a rank waits for rank 0 to plan."""

    @model_validator(mode="after")
    def _consistent(self) -> LaunchConfig:
        if self.with_ == "none" and self.processes > 1:
            raise ValueError(f"processes: {self.processes} needs `with: torchrun` (CPU or GPU) or `with: accelerate` (GPU)")
        if self.config and self.with_ != "accelerate":
            raise ValueError("`config` is accelerate's; set `with: accelerate`")
        return self


class TrackingConfig(Strict):
    """Where metrics go besides events.jsonl, which is always written."""

    to: list[Literal["jsonl", "tensorboard", "wandb", "trackio"]] = ["jsonl"]
    """Trackers."""
    project: str | None = None
    """Project name at the tracker; default is the run's name."""


class LimitsConfig(Strict):
    """Bounds that stop a run early and cleanly."""

    disk_gb: Annotated[float, Field(gt=0)] | None = None
    """Refuse to start a stage whose estimated output exceeds this many GB."""
    wall_hours: Annotated[float, Field(gt=0)] | None = None
    """Stop with exit code 75 after this many hours; running again goes on."""


class StageConfig(Strict):
    """Fields every stage has; a method's Config inherits from it and adds its own."""

    name: Name
    """Name of the stage, unique in the file; other stages refer to its output by it."""
    method: str
    """`sft`, `grpo`, `select.dsir`, `quantize.rtn`, ..."""
    inputs: dict[str, Input] = Field(default={}, alias="in")
    """Port -> source, stage, or mixture. `model` defaults to the newest model before the stage, else the pipeline's."""
    seed: int | None = None
    """Overrides the pipeline's seed for this stage."""
    launch: Annotated[LaunchConfig, REPORT_ONLY] = LaunchConfig()
    """How the process is started; does not change the result."""


class TrainConfig(StageConfig):
    """Fields every trainer has."""

    takes_four_bit: ClassVar[bool] = False
    """Whether `lora.load_in_4bit` may be set: only stages that do nothing but train on rows."""
    repeats_meant: ClassVar[bool] = False
    """Whether many passes over the same data are what the method is about."""

    data: DataConfig = DataConfig()
    """Rows to tokens."""
    optim: OptimConfig = OptimConfig()
    """Optimizer."""
    batch: BatchConfig = BatchConfig()
    """Global batch."""
    steps: Positive | None = None
    """Optimizer steps; give `steps` or `epochs`."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data."""
    lora: LoraConfig | None = None
    """Train an adapter instead of all weights."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Resumable state."""
    commit: CommitConfig = CommitConfig()
    """Last or best weights."""
    stop: StopAt | None = None
    """Stop early at a level of a validation metric."""
    guard: Guard | None = None
    """Stop where a validation metric has become worse than it was, and commit the best weights; for many epochs."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout of the model, set on its modules and verified there; none = as the model has it. Adapters have `lora.dropout`."""
    eval: StageEval = StageEval()
    """Evaluation around this stage."""
    log_every: Annotated[Positive, REPORT_ONLY] = 10
    """Optimizer steps between logged metrics."""
    trl: dict[str, Any] = {}
    """Fields of the installed TRL config, passed through; keys that posttrain owns are refused with a pointer."""

    @property
    def part(self) -> tuple[int, int] | None:
        """(items, tokens of each) that the stage takes of its data, whatever there is; None where it takes all rows."""
        return None

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        if self.steps is not None and self.optim.schedule != "constant" and self.optim.warmup >= self.steps:
            raise ValueError(f"optim.warmup: {self.optim.warmup:g} of {self.steps} steps never reach the peak learning rate; lower it")
        if self.guard is not None and self.commit.best is not None:
            raise ValueError("guard commits the best weights by its metric; remove commit.best")
        if self.lora is not None and self.lora.load_in_4bit and not self.takes_four_bit:
            raise ValueError("lora.load_in_4bit is for supervised training; remove it")
        if self.data.add_tokens and self.lora is not None and self.lora.on_input == "continue":
            raise ValueError("data.add_tokens needs a new adapter; set lora.on_input: merge")
        return self


def steering(config: StageConfig) -> dict[str, Steering]:
    """Dotted field -> validation metric that steers the stage, so that its evaluation can change committed bytes."""
    found = {
        "commit.best": getattr(getattr(config, "commit", None), "best", None),
        "stop": getattr(config, "stop", None),
        "guard": getattr(config, "guard", None),
    }
    return {field: item for field, item in found.items() if isinstance(item, Steering)}
