"""New models: a byte-level BPE tokenizer trained on texts, and a small decoder with random weights.

The tokenizer cuts text by Qwen2's published rule (letters with one leading sign or space, *single* digits, runs of
punctuation), which is also what transformers puts in place beside a `qwen2` config, so that every loader cuts alike.
Digits one by one let a small model learn arithmetic by position.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

END, PAD = "<|im_end|>", "<|endoftext|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL = (PAD, END, *(f"<|{role}|>" for role in ROLES))
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{- raise_exception('unknown role ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['content'] -%}{{- message['content'] -}}{%- endif -%}"
    "{%- if message['tool_calls'] is defined and message['tool_calls'] -%}{{- message['tool_calls'] | tojson -}}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|im_end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int, template: str = TEMPLATE) -> Any:
    """A PreTrainedTokenizerFast trained on `texts`; equal texts give an equal tokenizer.

    Args:
        texts: training texts.
        vocab_size: at most this many ids, special tokens and the 256 bytes included.
        max_length: longest sequence in tokens.
        template: Jinja chat template.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def new_model(arch: str, tokenizer: Any, seed: int, **sizes: Any) -> Any:
    """A float32 Qwen2 or Llama decoder with random weights that depend on the seed and sizes only.

    Args:
        arch: `qwen2` or `llama`.
        tokenizer: gives vocabulary size, end and pad token.
        seed: of the weights.
        sizes: fields of the transformers config.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_type, model_type = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[arch]
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = config_type(vocab_size=len(tokenizer), dtype="float32", **sizes, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_type(config).float().eval()
    model.generation_config = GenerationConfig(**ids)
    return model
