"""`make.arithmetic`: verifiable problems whose answers are known, for supervised warm-up, RL and evaluation.

The space of `digits`-digit problems has len(ops) * 10^(2 digits) members; `rows` of them are drawn without replacement
by the seed, so no problem comes twice and a split by prompt is a split by problem. With `pad` all numbers have a fixed
width ("05+07=" and "012"), which a model that reads digit by digit learns fastest; the answer's width is digits + 1 for
sums and differences (a minus sign takes one place) and 2 digits for products, the widest of `ops` for all.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import Positive
from posttrain.config.common import SplitConfig, StageConfig
from posttrain.core.registry import stage

if TYPE_CHECKING:
    from posttrain.core.context import StageContext

OPS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
ALL_ROWS_LIMIT = 1_000_000


class MakeArithmeticConfig(StageConfig):
    """Which problems are made."""

    method: Literal["make.arithmetic"] = "make.arithmetic"
    """Method name."""
    ops: Annotated[list[Literal["+", "-", "*"]], Field(min_length=1)] = ["+"]
    """Operations, each once."""
    digits: Annotated[int, Field(ge=1, le=8)] = 2
    """Largest number of digits of an operand."""
    rows: Positive | None = None
    """Number of different problems; none = all there are."""
    pad: bool = True
    """Write operands and answers with leading zeros to a fixed width."""
    prompt: str = "{a}{op}{b}="
    """The prompt; `{a}`, `{op}`, `{b}` are replaced."""
    answer: str = "{answer}"
    """The gold answer; `{answer}` is replaced, and `{a}`, `{op}`, `{b}`. With `<think>{a}{op}{b}</think>\\boxed{{{answer}}}` the same
    rows teach a format by `sft` and are verified by `math_exact`, which reads what is in the box."""
    shards: Positive = 1
    """Number of shard files."""
    split: SplitConfig = SplitConfig()
    """Held-out shares of the rows."""

    @field_validator("ops")
    @classmethod
    def _once(cls, ops: list[str]) -> list[str]:
        if len(set(ops)) != len(ops):
            raise ValueError(f"an operation is listed twice: {ops}")
        return ops

    @field_validator("prompt")
    @classmethod
    def _prompt_holds(cls, prompt: str) -> str:
        if _placeholders(prompt) != {"a", "b", "op"}:
            raise ValueError(f"the prompt must hold {{a}}, {{op}} and {{b}} and no other placeholder, got {sorted(_placeholders(prompt))}")
        return prompt

    @field_validator("answer")
    @classmethod
    def _answer_holds(cls, answer: str) -> str:
        names = _placeholders(answer)
        if "answer" not in names or names - {"answer", "a", "b", "op"}:
            raise ValueError(f"the answer must hold {{answer}} and may hold {{a}}, {{op}} and {{b}}, got {sorted(names)}")
        return answer

    @model_validator(mode="after")
    def _enough(self) -> MakeArithmeticConfig:
        space = problem_count(self.ops, self.digits)
        if (self.rows or 0) > space:
            raise ValueError(
                f"rows: {self.rows} exceeds the {space} different problems of {self.digits} digits; lower it or raise `digits`"
            )
        if self.rows is None and space > ALL_ROWS_LIMIT:
            raise ValueError(f"there are {space} problems of {self.digits} digits; set `rows`")
        return self


def _placeholders(template: str) -> set[str]:
    try:
        return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"`{template}` is no format text: {error}; write {{{{ and }}}} for braces") from None


@stage("make.arithmetic", config=MakeArithmeticConfig, output="dataset", rows="verifiable", estimate=lambda cfg: {"seconds": 2.0})
def run(cfg: MakeArithmeticConfig, ctx: StageContext) -> None:
    """Writes the rows {prompt, answer, id}; see the module docstring."""
    from posttrain.data.dataset import write_dataset

    space = problem_count(cfg.ops, cfg.digits)
    count = cfg.rows or space
    chosen = random.Random(ctx.seed).sample(range(space), count)

    def rows() -> Any:
        for done, index in enumerate(chosen, 1):
            ctx.events.progress("make problems", done, count, "rows")
            yield problem(index, cfg)

    facts = write_dataset(rows(), ctx.out, "verifiable", rows_per_shard=-(-count // cfg.shards))
    ctx.meta.update(row_type="verifiable", rows=count, split=cfg.split.dump())
    ctx.summary.update(rows_out=facts["rows"], problems=space)
    ctx.events.log(f"{count} of {space} problems")


def problem_count(ops: Sequence[str], digits: int) -> int:
    """Different problems there are."""
    return len(ops) * int(10 ** (2 * digits))


def problem(index: int, cfg: MakeArithmeticConfig) -> dict[str, str]:
    """Problem number `index` of the space: {prompt, answer, id}."""
    rest, b = divmod(index, 10**cfg.digits)
    which, a = divmod(rest, 10**cfg.digits)
    op = cfg.ops[which]
    width = max(2 * cfg.digits if o == "*" else cfg.digits + 1 for o in cfg.ops) if cfg.pad else 0
    left, right = (f"{n:0{cfg.digits}d}" if cfg.pad else str(n) for n in (a, b))
    result = OPS[op](a, b)
    return {
        "prompt": cfg.prompt.format(a=left, b=right, op=op),
        "answer": cfg.answer.format(a=left, b=right, op=op, answer=f"{result:0{width}d}" if cfg.pad else str(result)),
        "id": f"{a}{op}{b}",
    }
