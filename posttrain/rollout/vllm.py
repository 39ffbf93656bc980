"""Rollout engine on vLLM: one forward pass a token for the whole batch, constrained requests included.

Free requests are sampled by vLLM itself. Constrained ones are decided by the logits processor of `vllm_plugin`; several particles of one
request are several requests that share the prompt's cache and run in *segments*: after `segment` tokens their weights are looked
at, and where they are resampled, the children go on from their parent's tokens, which the prefix cache still holds. Resampling
at any fixed schedule leaves the estimates unbiased (`smc`); with `segment: 1` it is that of the transformers engine.

Log-probabilities are those of the sampling distribution after temperature, top-p and top-k. The engine runs in this process
(`VLLM_ENABLE_V1_MULTIPROCESSING=0`) unless the environment says otherwise.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain.config.engine import VllmConfig
from posttrain.core.environment import VLLM_VARIABLES
from posttrain.errors import ConfigError, RolloutError
from posttrain.models.rng import preserved_rng
from posttrain.rollout._vllm import Declared, last_line, named_weights, odd_modules_hidden, save_weights, threads_kept, unavailable
from posttrain.rollout.base import Completion, Progress, Request, Sampling
from posttrain.rollout.constraints import Constraint, Vocabulary
from posttrain.rollout.group import Group, Particle
from posttrain.rollout.hf import evaluation_mode
from posttrain.rollout.stopping import StopRule, end_ids

PLUGIN = "posttrain.rollout.vllm_plugin"
WHERE = "rollout.engine"
PROBE_TOKENS = 8
TOLERANCE = {torch.float32: 1e-4}
COARSE = 0.25
"""Largest difference of a log-probability between vLLM and the live model, in float32 and in half precision."""


class _Part:
    """One request of vLLM: a free completion, or a segment of a particle."""

    def __init__(self, owner: int, number: int, uid: str, seed: int) -> None:
        self.owner, self.number, self.uid, self.seed = owner, number, uid, seed


class VLLMEngine:
    """vLLM behind the protocol of engines.

    Args:
        folder: checkpoint, as transformers writes it (ours too, quantized ones included).
        tokenizer: decodes completions.
        options: see VllmConfig.
        max_batch: most sequences at once.
        progress: see Progress.
        trust_remote_code: run code that comes with the model.
        seed: of vLLM itself; requests have their own.

    Raises:
        ConfigError: vLLM is missing or too old, or refuses the model.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Any,
        options: VllmConfig | None = None,
        *,
        max_batch: int = 64,
        progress: Progress | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        problem = unavailable()
        if problem:
            raise ConfigError(problem, where=WHERE, fix="or set `engine: hf`")
        self.options = options or VllmConfig()
        self.tokenizer, self.progress, self.max_batch = tokenizer, progress, max_batch
        self.version, self.tokens, self.seconds = 0, 0, 0.0
        self._uids, self._name = itertools.count(), uuid.uuid4().hex[:12]
        self._llm = self._start(Path(folder), trust_remote_code, seed)
        config = self._llm.llm_engine.model_config
        self.max_model_len = int(config.max_model_len)
        self.dtype: torch.dtype = config.dtype
        self.eos_ids = end_ids(Declared(config), tokenizer)
        self._vocabulary: Vocabulary | None = None
        self._keys: dict[int, tuple[str, Constraint]] = {}

    @classmethod
    def of_model(cls, model: Any, tokenizer: Any, options: VllmConfig | None = None, **settings: Any) -> VLLMEngine:
        """An engine with the weights of a live model, which goes through a folder that is deleted afterwards."""
        with tempfile.TemporaryDirectory(prefix="posttrain-vllm-") as folder:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            base.config.save_pretrained(folder)
            if base.generation_config is not None:
                base.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            save_weights(model, Path(folder))
            return cls(folder, tokenizer, options, **settings)

    @property
    def tokens_per_s(self) -> float:
        """Sampled tokens per second since the start."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def _start(self, folder: Path, trust_remote_code: bool, seed: int) -> Any:
        for name, value in VLLM_VARIABLES.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if self.options.cpu_cache_gib is not None:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(self.options.cpu_cache_gib)
        import vllm  # noqa: F401

        with preserved_rng(), odd_modules_hidden(), threads_kept():
            return self._made(folder, trust_remote_code, seed)

    def _made(self, folder: Path, trust_remote_code: bool, seed: int) -> Any:
        from vllm import LLM

        gpu = torch.cuda.is_available()
        dtype = self.options.dtype if gpu or self.options.dtype != "auto" else "float32"
        try:
            return LLM(
                model=str(folder), dtype=dtype, max_model_len=self.options.max_model_len, max_num_seqs=self.max_batch,
                gpu_memory_utilization=self.options.gpu_memory_utilization, tensor_parallel_size=self.options.tensor_parallel_size,
                enforce_eager=self.options.enforce_eager or not gpu, enable_prefix_caching=True, trust_remote_code=trust_remote_code,
                logits_processors=[f"{PLUGIN}:AWRS"], worker_extension_cls=f"{PLUGIN}.Worker", logprobs_mode="processed_logprobs",
                generation_config="vllm", disable_log_stats=True, seed=seed,
            )  # fmt: skip
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            raise ConfigError(
                f"vLLM does not start: {last_line(error)}", where=WHERE, fix="set `engine: hf`, or mend what vLLM names"
            ) from error

    # ---- requests

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in the same order.

        Raises:
            ConfigError: a request asks for what cannot be combined with a constraint.
            RolloutError: the engine is closed, a request does not fit the model, or the engine lost its results.
        """
        if self._llm is None:
            raise RolloutError("the engine is closed")
        if not requests:
            return []
        started = time.monotonic()
        for request in requests:
            self._check(request)
        groups = {i: Group(request, None) for i, request in enumerate(requests) if request.constraint is not None}
        if groups:
            self._share_vocabulary()
        parts: dict[str, _Part] = {}
        found: list[Completion | None] = [None] * len(requests)
        waiting: dict[int, dict[int, Any]] = {}
        try:
            for i, request in enumerate(requests):
                if i in groups:
                    self._submit(i, groups[i], parts, waiting)
                else:
                    self._submit_free(i, request, parts)
            for part, output in self._outputs(parts):
                request = requests[part.owner]
                if request.constraint is None:
                    found[part.owner] = self._free(request, output)
                else:
                    group, arrived = groups[part.owner], waiting[part.owner]
                    arrived[part.number] = (part, output)
                    if all(number in arrived for number in _going(group)):
                        self._collect(group, arrived)
                        if group.open:
                            self._submit(part.owner, group, parts, waiting)
                        else:
                            found[part.owner] = group.completion(self.tokenizer, self.eos_ids, self.version)
                if self.progress is not None and found[part.owner] is not None:
                    self.progress(sum(item is not None for item in found), len(requests), self.tokens)
        finally:
            if parts:
                self._llm.llm_engine.abort_request(list(parts))
                self._llm.collective_rpc("awrs_pop", args=([(part.uid, part.seed, 0) for part in parts.values()],))
            for key, _ in self._keys.values():
                _shared().constraints.pop(key, None)
            self._keys.clear()
            self.seconds += time.monotonic() - started
        return [item for item in found if item is not None]

    def _check(self, request: Request) -> None:
        given, wanted = len(request.prompt_ids), request.sampling.max_tokens
        if given + wanted > self.max_model_len or not given:
            raise RolloutError(
                f"a prompt of {given} tokens and max_tokens {wanted} do not fit the engine's {self.max_model_len}",
                where="rollout",
                fix="lower max_tokens, shorten the prompt, or raise `vllm.max_model_len` up to the model's positions",
            )

    def _outputs(self, parts: dict[str, _Part]) -> Iterator[tuple[_Part, Any]]:
        engine = self._llm.llm_engine
        while parts:
            for output in engine.step():
                if output.finished:
                    yield parts.pop(output.request_id), output
            if parts and not engine.has_unfinished_requests():
                raise RolloutError(f"vLLM lost {len(parts)} requests", where=WHERE)

    def _submit_free(self, owner: int, request: Request, parts: dict[str, _Part]) -> None:
        from vllm import SamplingParams

        sampling = request.sampling
        rule = StopRule(self.tokenizer, sampling.stop, self.eos_ids)
        params = SamplingParams(
            max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
            seed=request.seed, logprobs=0, stop=list(rule.stop) or None, stop_token_ids=sorted(rule.eos_ids),
            detokenize=bool(rule.stop), output_kind=_final(),
        )  # fmt: skip
        self._add(_Part(owner, 0, self._uid(), request.seed), list(request.prompt_ids), params, parts)

    def _submit(self, owner: int, group: Group, parts: dict[str, _Part], waiting: dict[int, dict[int, Any]]) -> None:
        """The next segment of each particle that goes on; one particle has the whole completion as its segment."""
        from vllm import SamplingParams

        request, waiting[owner] = group.request, {}
        alone = len(group.particles) == 1
        for number in _going(group):
            particle = group.particles[number]
            left = request.sampling.max_tokens - len(particle.tokens)
            part = _Part(owner, number, self._uid(), particle.seed)
            spec = {
                "sampler": request.sampler.model_copy(update={"particles": 1}).dump(), "temperature": request.sampling.temperature,
                "seed": particle.seed, "uid": part.uid, "before": list(particle.tokens), **self._constraint(request.constraint),
            }  # fmt: skip
            params = SamplingParams(
                max_tokens=left if alone else min(left, self.options.segment), temperature=0, stop_token_ids=sorted(self.eos_ids),
                detokenize=False, output_kind=_final(), extra_args={"awrs": spec},
            )  # fmt: skip
            self._add(part, [*request.prompt_ids, *particle.tokens], params, parts)

    def _add(self, part: _Part, ids: list[int], params: Any, parts: dict[str, _Part]) -> None:
        self._llm.llm_engine.add_request(part.uid, {"prompt_token_ids": ids}, params)
        parts[part.uid] = part

    def _uid(self) -> str:
        return f"{self._name}-{next(self._uids)}"

    def _constraint(self, constraint: Constraint | None) -> dict[str, Any]:
        """How the constraint reaches the processor: by name within this process, else by its config."""
        assert constraint is not None
        if self._in_process:
            key, _ = self._keys.setdefault(id(constraint), (self._uid(), constraint))
            _shared().constraints[key] = constraint
            return {"key": key}
        from posttrain.rollout._build import config_of

        config = config_of(constraint)
        if config is None or config.files():
            raise ConfigError(
                "this constraint cannot be handed to vLLM's own processes: it was not built from a config, or reads files",
                where="rollout.constraint",
                fix="set tensor_parallel_size: 1 and leave VLLM_ENABLE_V1_MULTIPROCESSING at 0",
            )
        return {"constraint": config.model_dump(mode="json", exclude_none=True)}

    @property
    def _in_process(self) -> bool:
        return self.options.tensor_parallel_size == 1 and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"

    def _share_vocabulary(self) -> None:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary.of(self.tokenizer, self.eos_ids)
        if self._in_process:
            _shared().vocabularies[str(self._llm.llm_engine.model_config.tokenizer)] = self._vocabulary

    # ---- results

    def _free(self, request: Request, output: Any) -> Completion:
        one = output.outputs[0]
        ids = list(one.token_ids)
        self.tokens += len(ids)
        greedy = request.sampling.temperature == 0
        logprobs = [0.0 if greedy else float(step[token].logprob) for token, step in zip(ids, one.logprobs, strict=True)]
        rule = StopRule(self.tokenizer, request.sampling.stop, self.eos_ids)
        reason = "stop" if one.finish_reason == "stop" else "length"
        return Completion(request.id, list(request.prompt_ids), ids, logprobs, rule.text(ids), reason, self.version)

    def _collect(self, group: Group, arrived: dict[int, Any]) -> None:
        """Adds a segment's tokens and weights to the particles."""
        wanted = [(part.uid, part.seed, len(output.outputs[0].token_ids)) for part, output in arrived.values()]
        results = self._llm.collective_rpc("awrs_pop", args=(wanted,))[0]
        gains = [0.0] * len(group.particles)
        step = 0
        for (part, _), result in zip(arrived.values(), results, strict=True):
            if result is None:
                raise RolloutError(
                    "vLLM's worker has no result of a constrained request", where=WHERE, fix="report this with vLLM's version"
                )
            gains[part.number] = self._extend(group, group.particles[part.number], result)
            step = max(step, len(group.particles[part.number].tokens))
        self.tokens += sum(count for _, _, count in wanted)
        group.add(gains, step - 1)

    def _extend(self, group: Group, particle: Particle, result: dict[str, Any]) -> float:
        particle.tokens += result["tokens"]
        particle.logprobs += result["logprobs"]
        particle.whole = result["whole"]
        group.count(result["drawn"], result["calls"], result["first"], result["masked"])
        if result["reason"]:
            particle.reason, particle.error = result["reason"], result["error"]
            return float("-inf")
        if particle.tokens[-1] in self.eos_ids:
            particle.reason = "stop"
        elif len(particle.tokens) == group.request.sampling.max_tokens:
            particle.reason = "length"
        return float(result["log_weight"])

    # ---- weights

    def load_weights(self, source: Any, version: int) -> None:
        """Takes new weights, and stamps what is drawn from now on with `version`.

        Args:
            source: a live model (adapters are merged into what is handed over, and stay attached), or a checkpoint folder.
            version: e.g. the policy's step.

        Raises:
            RolloutError: vLLM refuses the weights, or afterwards a live model's log-probabilities differ from its own.
        """
        live = None if isinstance(source, str | Path) else source
        try:
            if live is None:
                self._reload(weights_path=str(source))
            elif self._in_process:
                self._reload(weights_iterator=list(named_weights(live)))
            else:
                with tempfile.TemporaryDirectory(prefix="posttrain-vllm-") as folder:
                    save_weights(live, Path(folder))
                    self._reload(weights_path=folder)
        except (ValueError, KeyError, RuntimeError, OSError, AssertionError) as error:
            raise RolloutError(
                f"vLLM refuses the weights: {last_line(error)}", where=WHERE, fix="the engine must be of the same model"
            ) from error
        self._llm.reset_prefix_cache()
        self.version = version
        if live is not None:
            self._probe(live)

    def _reload(self, **kwargs: Any) -> None:
        self._llm.collective_rpc("reload_weights", kwargs=kwargs)
        self._llm.collective_rpc("repack_heads")

    def _probe(self, model: Any) -> None:
        """Draws a few tokens and compares their log-probabilities with the live model's.

        Raises:
            RolloutError: they differ by more than TOLERANCE allows.
        """
        size = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(0, min(size, len(self.tokenizer)), (4,), generator=torch.Generator().manual_seed(0)).tolist()
        sampling = Sampling(max_tokens=min(PROBE_TOKENS, self.max_model_len - 4), temperature=0.7)
        before = self.tokens, self.seconds, self.progress
        self.progress = None
        found = self.generate([Request(ids, 1, sampling)])[0]
        self.tokens, self.seconds, self.progress = before
        whole = torch.tensor([[*ids, *found.token_ids]], device=model.device)
        with torch.no_grad(), evaluation_mode(model):
            logits = model(input_ids=whole, use_cache=False).logits[0, len(ids) - 1 : -1].float() / sampling.temperature
        expected = logits.log_softmax(-1).gather(1, whole[0, len(ids) :, None]).squeeze(1).cpu()
        worst = float((expected - torch.tensor(found.logprobs)).abs().max())
        limit = TOLERANCE.get(self.dtype, COARSE) if model.dtype == self.dtype else COARSE
        if not worst <= limit:
            raise RolloutError(
                f"with the new weights, log-probabilities of the engine and of the model differ by {worst:.3g}, the limit is {limit}",
                where=WHERE,
                fix="the engine does not hold the model's weights, or computes it another way; use `engine: hf`",
            )

    def close(self) -> None:
        """Shuts vLLM down and frees its memory."""
        import gc

        llm, self._llm = self._llm, None
        if llm is None:
            return
        if self._vocabulary is not None and self._in_process:
            _shared().vocabularies.pop(str(llm.llm_engine.model_config.tokenizer), None)
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _going(group: Group) -> list[int]:
    return [number for number, particle in enumerate(group.particles) if not particle.reason]


def _final() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY


def _shared() -> Any:
    from posttrain.rollout.vllm_plugin import Shared

    return Shared
