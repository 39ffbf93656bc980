"""`posttrain new`: a method, reward or selector that works at once, and shipped files written out.

In a checkout of posttrain the source, its test and its YAML go into the tree, where they are found by name; elsewhere a
small plugin package is made, named on the command line by `--plugin`. Nothing that exists is overwritten.
"""

from __future__ import annotations

import keyword
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from posttrain.core.durable import disk_errors, write_text
from posttrain.errors import ConfigError
from posttrain.shipped import shipped_file, shipped_files

TEMPLATES = Path(__file__).resolve().parent / "templates"
FOLDERS = {"method": "posttrain/trainers", "reward": "posttrain/rewards", "selector": "data_pipelines"}


@dataclass(frozen=True)
class Place:
    """Where the new files go.

    Args:
        source, test, yaml: paths below `root`.
        module: dotted name of the source.
        flags: command-line flags that make it known, with a space behind.
        schema: what the YAML's editor line names.
        extra: template -> path of files that only a plugin has.
    """

    root: Path
    source: str
    test: str
    yaml: str
    module: str
    flags: str = ""
    schema: str = "../posttrain.schema.json"
    package: str = ""
    extra: tuple[tuple[str, str], ...] = ()


def is_checkout(folder: Path) -> bool:
    """True for the root of posttrain's own source tree."""
    path = folder / "pyproject.toml"
    if not path.is_file() or not (folder / "posttrain" / "core").is_dir():
        return False
    try:
        return bool(tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}).get("name") == "posttrain")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False


def place_for(what: str, name: str, to: Path) -> Place:
    """Paths of a new method, reward or selector below `to`."""
    if is_checkout(to):
        source = f"{FOLDERS[what]}/{name}.py"
        kind = "rewards_" if what == "reward" else "select_" if what == "selector" else ""
        return Place(to, source, f"tests/unit/test_{kind}{name}.py", f"configs/tiny/{name}.yaml", source[:-3].replace("/", "."))
    package, root = f"posttrain_{name}", to / f"posttrain-{name.replace('_', '-')}"
    extra = (("plugin_pyproject.toml.txt", "pyproject.toml"), ("plugin_init.py.txt", f"{package}/__init__.py"))
    flags = f"--plugin {package} "
    return Place(
        root, f"{package}/{name}.py", f"test_{name}.py", f"{name}.yaml", f"{package}.{name}", flags, "posttrain.schema.json", package, extra
    )


def check_name(what: str, name: str) -> str:
    """The bare name.

    Raises:
        ConfigError: no lower-case identifier, or in use.
    """
    bare = name.removeprefix("select.") if what == "selector" else name
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", bare) or keyword.iskeyword(bare) or keyword.issoftkeyword(bare):
        near = re.sub(r"[^a-z0-9]+", "_", bare.lower()).strip("_")
        fix = f"e.g. `{near}`" if re.fullmatch(r"[a-z][a-z0-9_]{0,39}", near) and not keyword.iskeyword(near) else "e.g. `mymethod`"
        raise ConfigError(
            f"`{name}` cannot name a {what}: use lower-case letters, digits and `_`, no Python keyword", where="posttrain new", fix=fix
        )
    from posttrain.core.registry import methods
    from posttrain.rewards.registry import known_rewards

    full = f"select.{bare}" if what == "selector" else bare
    known = known_rewards().get(full) if what == "reward" else methods().get(full)
    if known:
        raise ConfigError(f"there is a {what} `{full}` already, in {known.module}", where="posttrain new", fix="choose another name")
    return bare


def render(template: str, values: dict[str, str]) -> str:
    """A template with `{{key}}` replaced."""
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace("{{" + key + "}}", value)
    return text


def _values(what: str, name: str, place: Place) -> dict[str, str]:
    plugin = f'\nuse_plugins(["{place.package}"])\n' if place.package else ""
    return {
        "name": name,
        "what": what,
        "class_name": "".join(part.capitalize() for part in name.split("_")),
        "dashed": name.replace("_", "-"),
        "module": place.module,
        "package": place.package,
        "flags": place.flags,
        "yaml": place.yaml,
        "schema": place.schema,
        "imports": "from posttrain.core.registry import use_plugins\n" if plugin else "",
        "setup": plugin,
    }


def _write(files: dict[Path, str]) -> list[Path]:
    there = [path for path, text in files.items() if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text]
    if there:
        raise ConfigError(
            f"would overwrite {', '.join(map(str, there))}", where="posttrain new", fix="choose another name or folder, or delete the file"
        )
    for path, text in files.items():
        with disk_errors(path):
            write_text(path, text)
    return list(files)


def write_new(what: str, name: str, to: Path) -> list[str]:
    """Writes source, test and YAML of a new method, reward or selector; returns lines that say what to do next.

    Args:
        what: `method`, `reward` or `selector`.
        name: lower-case identifier; `select.` before a selector's name is taken off.
        to: root of a posttrain checkout, or the folder in which the plugin's folder is made.

    Raises:
        ConfigError: bad name, name in use, or a file that would be overwritten.
    """
    bare = check_name(what, name)
    place = place_for(what, bare, to)
    values = _values(what, bare, place)
    made = {f"{what}.py.txt": place.source, f"{what}_test.py.txt": place.test, f"{what}.yaml.txt": place.yaml, **dict(place.extra)}
    written = _write({place.root / path: render(template, values) for template, path in made.items()})
    lines = [f"wrote {path}" for path in written]
    if place.package:
        lines.append(f"next  pip install -e {place.root}")
    elif what != "reward":
        lines.append(f"next  posttrain schema > {to / 'configs' / 'posttrain.schema.json'}")
    lines.append(f"test  python -m pytest {place.root / place.test}")
    return [*lines, f"run   posttrain run {place.flags}{place.root / place.yaml}"]


def list_shipped() -> list[str]:
    """Names of all shipped files, as `new config NAME` takes them."""
    return [name.removeprefix("configs/") for name in shipped_files("configs")] + shipped_files("launch")


def write_shipped(name: str, to: Path) -> list[Path]:
    """Writes a shipped file below `to` under the name it has in the repository, so that relative paths in it keep their meaning.

    Raises:
        ConfigError: no such file, or another one is there already.
    """
    known = shipped_files("configs")
    full = next((known_name for known_name in (f"configs/{name}", f"configs/{name}.yaml") if known_name in known), name)
    source = shipped_file(full)
    return _write({to / full: source.read_text(encoding="utf-8")})
