"""Secrets are hidden wherever they stand; names and texts that only look like them are left alone."""

from __future__ import annotations

import json
import time

import pytest

from posttrain.config import redact as module
from posttrain.config.redact import REDACTED, is_secret_name, redact

FAKE = "FAKEfake" * 5
SECRETS = [
    "hf_" + FAKE[:34],
    "sk-" + FAKE,
    "sk-proj-" + FAKE,
    "ghp_" + FAKE[:36],
    "github_pat_" + FAKE,
    "glpat-" + FAKE[:20],
    "AKIA" + "FAKE0FAKE0FAKE00",
    "xoxb-" + "1234567890-" + FAKE[:10],
    "eyJ" + FAKE[:12] + ".eyJ" + FAKE[:12] + "." + FAKE[:12],
]


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Forget the environment that an earlier test saw."""
    module._environment_secrets.cache_clear()


@pytest.mark.parametrize("secret", SECRETS, ids=lambda s: s[:6])
@pytest.mark.parametrize("form", ["{}", "token {} here", "a={}", '"{}"', "https://x.org/?q={}", "({})"])
def test_secrets_of_known_shape(secret: str, form: str) -> None:
    assert secret not in redact(form.format(secret))
    assert secret not in json.dumps(redact({"any": [form.format(secret)], form.format(secret): 1}))


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("https://someone:Sup3rS3cretPassw0rd@example.org/p", "Sup3rS3cretPassw0rd"),
        ("postgres://u:p4ssw0rd@db:5432/x", "p4ssw0rd"),
        (f"https://{FAKE}@github.com/a/b", FAKE),
        (f"Authorization: Bearer {FAKE}", FAKE),
        (f"https://x.org/?api_key={FAKE}&b=1", FAKE),
        ("stages.sft.trl.hub_token=abcdefgh", "abcdefgh"),
        ('{"password": "abcdefgh"}', "abcdefgh"),
        ("WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567", "0123456789abcdef"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----", "MIIabc"),
    ],
)
def test_secrets_in_text(text: str, gone: str) -> None:
    assert gone not in redact(f"before {text} after") and redact(f"before {text} after").startswith("before ")


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "hub_token",
        "HF_TOKEN",
        "hubToken",
        "--hub-token",
        "secret",
        "client_secret",
        "password",
        "DB_PASSWORD",
        "api_key",
        "apiKey",
        "WANDB_API_KEY",
        "aws_secret_access_key",
        "private_key",
        "trl.hub_token",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)
    assert redact({name: "abcdefghij"}) == {name: REDACTED}


@pytest.mark.parametrize(
    "name",
    [
        *("max_tokens", "tokenizer", "stop_tokens", "pad_token", "eos_token", "eos_token_id", "bos_token", "unk_token", "use_cls_token"),
        *("mask_token", "tokens_per_s", "tokens", "special_tokens", "num_tokens", "key", "keys", "stage_key", "row_key", "monkey"),
        "secretary",
    ],
)
def test_harmless_names(name: str) -> None:
    assert not is_secret_name(name)
    assert redact({name: "abcdefghij", "n": 3}) == {name: "abcdefghij", "n": 3}


@pytest.mark.parametrize(
    "text",
    [
        *(
            "max_tokens=64",
            "pad_token: '<pad>'",
            "task-specific-fine-tuning-of-models",
            "a costs $5 and b:c@d",
            "hf_home",
            "user@example.org",
            "token: the",
        ),
        *(
            "sha256:" + "0123456789abcdef" * 4,
            "0123456789abcdef0123456789abcdef01234567",
            "the password is required",
            "package:a/b.gguf",
            "lr=1e-5",
        ),
        *("https://example.org:8080/a@b", "skipped 5 rows; tokens=100 tokens_per_s=12.5"),
    ],
)
def test_harmless_text(text: str) -> None:
    assert redact(text) == text


def test_command_lines() -> None:
    argv = ["posttrain", "run", "x.yaml", "--hub-token", "abc", "--name", "abc", f"trl.hub_token={FAKE}"]
    assert redact(argv) == ["posttrain", "run", "x.yaml", "--hub-token", REDACTED, "--name", "abc", f"trl.hub_token={REDACTED}"]


def test_form_and_input_are_kept() -> None:
    value = {"a": [1, 2.5, None, True, ("x", "hf_" + FAKE)], "token": {"nested": 3}, "password": 12345678}
    found = redact(value)
    assert found == {"a": [1, 2.5, None, True, ("x", REDACTED)], "token": {"nested": 3}, "password": REDACTED}
    assert value["password"] == 12345678 and redact(found) == found


def test_values_of_secret_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plainlookingvalue1234")
    assert "plainlookingvalue1234" not in redact("sent plainlookingvalue1234 to x")


@pytest.mark.parametrize("piece", ["a", "key", "token-", "eyJ", "://", "a:", "sk-", " ", "bearer ", "-----BEGIN "])
def test_long_texts_take_linear_time(piece: str) -> None:
    start = time.monotonic()
    redact(piece * (200_000 // len(piece)))
    assert time.monotonic() - start < 5
