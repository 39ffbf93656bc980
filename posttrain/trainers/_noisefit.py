"""NoiseFiT on TRL's SFTTrainer: the clean pass and the noisy ones in one call, the loss of all three terms in tiles.

The three terms are sums over the supervised tokens of the whole global batch, divided by their number N like the loss of
`sft`, so accumulation, a short last window and the number of processes do not change them:

    L = (1/N) sum_i w_i sum_t [ a CE_it + (1 - a) soft_it + lambda cons_it ]

With the neutral setting (no noisy passes, or a = 1 and lambda = 0) TRL's own loss is computed and nothing else happens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from posttrain.core.context import StageContext
from posttrain.core.durable import write_json
from posttrain.errors import ConfigError
from posttrain.losses.noisefit import Form, Head, Weights, noisefit_loss
from posttrain.models.rng import preserved_rng
from posttrain.trainers._noisefit_config import NEEDS_PLAIN, NoiseConfig
from posttrain.trainers._noisefit_forward import (
    add_noisy_forward,
    decoder_layers,
    dropout_before,
    evaluating,
    forward_units,
    sharing_problem,
)
from posttrain.trainers._noisefit_noise import Injector, Work, operator_of, segments_of
from posttrain.trainers._noisefit_select import Batch, Policy, choose, scales_of
from posttrain.trainers._sft import IGNORED, WEIGHT, SFTTrainer, run_sft

POLICY = "noise_policy.json"


class NoiseFiTTrainer(SFTTrainer):
    """SFTTrainer with NoiseFiT's noise and loss.

    Its constructor is SFTTrainer's, plus:

    Args:
        noise: the config; the paper's first settings by default.

    Attributes:
        policy: layers and scales, once they are chosen; written to `noise_policy.json` in the output folder, and part of the
            checkpoints.
        shared: whether the layers up to the first noisy one run once for all passes; None until that is known.

    Raises:
        ConfigError: a model or a loss of TRL's that does not go with it.
    """

    keeps_apart = False

    def __init__(self, *args: Any, noise: NoiseConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noise = noise = noise or NoiseConfig()
        self.policy: Policy | None = None
        self.shared: bool | None = None
        self._at = (-1, -1)
        if noise.neutral:
            return
        whole = self.accelerator.unwrap_model(self.model)
        self.inner = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        self._refuse(getattr(whole, "peft_config", {}))
        self.injector = Injector(decoder_layers(self.inner))
        add_noisy_forward(self.inner, self.injector)

    def _refuse(self, adapters: Mapping[str, Any]) -> None:
        args = vars(self.args)
        wrong = [f"trl.{name}" for name, plain in NEEDS_PLAIN.items() if args.get(name, plain) not in (plain, 0)]
        wrong += ["a mixture of experts with a load-balancing loss (set trl.router_aux_loss_coef: 0)"] if self.aux_loss_enabled else []
        wrong += ["a model of text and images"] if self._is_vlm else []
        wrong += ["virtual tokens"] if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()) else []
        if wrong:
            raise ConfigError(f"noisefit does not go with {', '.join(wrong)}", where="noise", fix="remove it, or use method: sft")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """SFTTrainer's `train`, with the hooks on the decoder layers while it runs."""
        if self.noise.neutral:
            return super().train(*args, **kwargs)
        self._at = (-1, -1)
        with self.injector.installed():
            return super().train(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The loss of one micro-batch; outside training that of `sft`."""
        if self.noise.neutral or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        weights, labels = inputs.pop(WEIGHT, None), inputs.pop("labels")
        if self.policy is None:
            self._agree_on_layers(model)
        if self.shared is None:
            self._try_sharing(model)
        batch = self._batch(inputs, labels, self._place())
        work = self._work(batch, self._token_weights(labels, batch.places, weights, num_items_in_batch))
        loss, terms = model(noisy=work)
        self._measure(terms, work)
        return loss

    def _place(self) -> int:
        """Number of the micro-batch in the step, over all ranks."""
        step, micro = self._at
        self._at = (self.state.global_step, micro + 1 if step == self.state.global_step else 0)
        return self._at[1] * self.accelerator.num_processes + self.accelerator.process_index

    def _batch(self, inputs: Mapping[str, Any], labels: torch.Tensor, place: int) -> Batch:
        """The model's inputs, and where they are scored: at targets, and with `compat` where the scripts' masks put the divergences."""
        wanted = _shifted(labels)
        scored = wanted != IGNORED
        if self.noise.compat != "none":
            scored = scored | (labels != IGNORED)
        places = scored.flatten().nonzero().flatten()
        segments = segments_of(inputs, place, self.args.per_device_train_batch_size)
        return Batch(dict(inputs), places, wanted.flatten()[places].clamp(min=0), segments)

    def _token_weights(self, labels: torch.Tensor, places: torch.Tensor, rows: torch.Tensor | None, items: Any) -> Weights:
        """Weights of the terms at each place, (N,)."""
        noise, processes = self.noise, self.accelerator.num_processes
        ce = (_shifted(labels) != IGNORED).double()
        soft = ce if noise.compat == "none" else (labels != IGNORED).double()
        if noise.compat == "none":
            count = torch.as_tensor(ce.sum() if items is None else items, device=labels.device).clamp(min=1)
            spread = processes // self.get_tp_size() if self.args.average_tokens_across_devices and items is not None else 1
            each = ce * spread / count if rows is None else ce * rows[:, None].to(ce) * spread / count
            ce = soft = each
        else:
            parts = 1 if items is None else self.current_gradient_accumulation_steps
            ce, soft = (mask / mask.sum().clamp(min=1) / parts for mask in (ce, soft))
        ce, soft = ce.flatten()[places], soft.flatten()[places]
        return Weights(noise.ce_weight * ce, (1 - noise.ce_weight) * soft, noise.consistency * soft)

    def _work(self, batch: Batch, weights: Weights) -> Work:
        assert self.policy is not None
        form = Form(self.noise.temperature, scripts=self.noise.compat == "v1")

        def score(states: torch.Tensor, head: Head) -> Any:
            return noisefit_loss(states, batch.targets, head, weights, form)

        key, branches = (self.args.seed, self.state.global_step), [scales_of(self.policy)] * self.noise.passes
        return Work(batch.inputs, batch.places, branches, operator_of(self.noise), batch.segments, key, bool(self.shared), score)

    def _agree_on_layers(self, model: Any) -> None:
        """Chooses the layers on the first rows of the data, the same on all ranks; rank 0's choice counts."""
        with torch.no_grad(), preserved_rng(), evaluating(model):
            share = self.noise.selection == "auto" and not self._problem(model, {0: 0.1})
            size = self.inner.config.get_text_config().hidden_size
            found = choose(model, self.noise, self._calibration(), len(self.injector.layers), size, self.args.seed, share)
        self._take(self._from_rank_0(found))
        if self.accelerator.is_main_process:
            write_json(Path(self.args.output_dir) / POLICY, found)

    def _from_rank_0(self, policy: Policy) -> Policy:
        if self.accelerator.num_processes == 1:
            return policy
        from accelerate.utils import broadcast_object_list

        held = [policy]
        broadcast_object_list(held)
        return held[0]

    def _take(self, policy: Policy) -> None:
        self.policy, self.shared = policy, None
        if self.events is not None:
            self.events.log(f"noise on the output of layers {', '.join(map(str, policy['layers']))} of {policy['num_layers']}")

    def _calibration(self) -> list[Batch]:
        """Batches of the first `calibration_rows` rows."""
        rows, size = self.train_dataset, self.args.per_device_train_batch_size
        count = min(self.noise.calibration_rows, len(rows))
        found = []
        for start in range(0, count, size):
            inputs = self._prepare_inputs(self.data_collator([rows[i] for i in range(start, min(start + size, count))]))
            inputs.pop(WEIGHT, None)
            labels = inputs.pop("labels")
            wanted = _shifted(labels).flatten()
            places = (wanted != IGNORED).nonzero().flatten()
            found.append(Batch(inputs, places, wanted[places], segments_of(inputs, 0, size)))
        return found

    def _problem(self, model: Any, scales: Mapping[int, float]) -> str:
        return sharing_problem(model, self.injector, self.inner.get_input_embeddings().weight.size(0), scales)

    def _try_sharing(self, model: Any) -> None:
        assert self.policy is not None
        mode, first = self.noise.share_prefix, min(self.policy["layers"])
        problem = "share_prefix: off" if mode == "off" else self._problem(model, scales_of(self.policy))
        if problem and mode == "on":
            raise ConfigError(f"the layers before the noise cannot be shared: {problem}", where="noise.share_prefix", fix="set it to auto")
        dropping = dropout_before(self.inner.base_model, self.injector.layers, first) if mode == "auto" else ""
        problem = problem or (f"dropout in {dropping}" if dropping else "")
        self.shared = not problem
        if self.events is not None:
            units = forward_units(len(self.injector.layers), first, self.noise.passes, self.shared)
            how = f"layers 0 to {first} run once for all passes" if self.shared else f"all layers run for each pass ({problem})"
            self.events.log(f"{how}: a step costs {units:.2f} forward passes")

    def _measure(self, terms: Mapping[str, torch.Tensor], work: Work) -> None:
        """TRL's metrics and ours, as means over the micro-batch on all ranks."""
        tokens = torch.tensor(float(sum(work.segments.lengths)), device=work.places.device)
        values = [terms[name].sum() for name in ("entropy", "top1", "ce", "soft", "consistency")]
        ratios = [work.ratios[layer] for layer in sorted(work.ratios)]
        count = torch.tensor(float(len(work.places)), device=tokens.device)
        sums = torch.stack([tokens, count, *(value.detach().to(tokens) for value in (*values, *ratios))])
        processes = self.accelerator.num_processes
        if processes > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        seen, scored, *rest = sums.tolist()
        self._total_train_tokens += int(seen)
        metrics = self._metrics["train"]
        metrics["num_tokens"] = [self._total_train_tokens]
        names = ("entropy", "mean_token_accuracy", "loss/ce", "loss/soft", "loss/consistency")
        for name, value in zip(names, rest, strict=False):
            metrics[name].append(value / max(scored, 1.0))
        for layer, value in zip(sorted(work.ratios), rest[len(names) :], strict=True):
            metrics[f"noise/ratio_{layer}"].append(value / processes)

    def own_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The chosen layers and how the passes are carried out, so that a resumed run does the same."""
        values, tensors = super().own_state()
        return {**values, **({"noise_policy": self.policy, "noise_shared": self.shared} if self.policy else {})}, tensors

    def restore_own_state(self, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Takes back the chosen layers."""
        super().restore_own_state(values, tensors)
        if "noise_policy" in values:
            self._take(values["noise_policy"])
            self.shared = values["noise_shared"]


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) at the place that predicts them; none at the last."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


def run_noisefit(cfg: Any, ctx: StageContext) -> None:
    """The stage `noisefit`; see `noisefit.py`."""
    run_sft(cfg, ctx, NoiseFiTTrainer, noise=cfg.noise)
    kept = ctx.work / POLICY
    if cfg.noise.neutral or not ctx.world.main:
        return
    policy = json.loads(kept.read_text(encoding="utf-8"))
    write_json(ctx.out / POLICY, policy)
    ctx.summary["noise"] = {name: policy[name] for name in ("selection", "layers", "scales")}
