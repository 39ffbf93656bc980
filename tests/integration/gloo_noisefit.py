"""Started by torchrun: `gloo_stage`, with the choice of layers of rank `spoil_policy` turned upside down before the ranks agree.

Then one pass on weights that FSDP2 has split over the ranks, against the same on whole ones.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import gloo_stage


def main() -> None:
    """Runs each spec."""
    for spec in json.loads(Path(sys.argv[1]).read_text()):
        if int(os.environ["RANK"]) == spec["spoil_policy"]:
            spoil()
        gloo_stage.run(spec, Path(spec["root"]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    found = {str(share): sharded(share) for share in (True, False)}
    (Path(sys.argv[1]).parent / f"sharded-{os.environ['RANK']}.json").write_text(json.dumps(found))


def spoil() -> None:
    """This rank would take another layer than it should."""
    from posttrain.trainers import _noisefit

    original = _noisefit.choose

    def other(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        layer = next(i for i in range(found["num_layers"]) if i not in found["layers"])
        return {**found, "layers": [layer], "scales": {str(layer): 0.1}}

    _noisefit.choose = other


def sharded(share: bool) -> dict[str, Any]:
    """Loss on whole and on split weights, the largest difference of their gradients, and why layers cannot be shared."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain.losses.noisefit import Weights, noisefit_loss
    from posttrain.trainers._noisefit_forward import add_noisy_forward, decoder_layers, sharing_problem
    from posttrain.trainers._noisefit_noise import Injector, Operator, Work, segments_of

    ids = torch.arange(22).view(2, 11) * 7 % 61 + 3
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    places = mask.flatten().nonzero().flatten()
    each = torch.full((len(places),), 1 / len(places))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    losses, gradients, problem = [], [], ""
    for split in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)).train()
        injector = Injector(decoder_layers(model))
        if split:
            for part in (*model.model.layers, model):
                fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        add_noisy_forward(model, injector)

        def score(states: Any, head: Any) -> Any:
            return noisefit_loss(states, ids.flatten()[places], head, Weights(each, each, each))[0]

        with injector.installed():
            problem = sharing_problem(model, injector, 64, {1: 0.5})
            branches = [{1: 0.5}, {1: 0.5, 2: 0.3}]
            loss = model(noisy=Work(inputs, places, branches, Operator(), segments_of(inputs, 0, 2), (0, 0), share, score))
            loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.full_tensor() if split else p.grad for p in model.parameters()])
    apart = max((left - right).abs().max().item() for left, right in zip(*gradients, strict=True))
    return {"losses": losses, "gradients": apart, "problem": problem}


if __name__ == "__main__":
    main()
