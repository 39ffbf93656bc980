"""A bash completion script, made from the command line's own parser so that it cannot go out of date."""

from __future__ import annotations

import argparse

_SCRIPT = """\
# posttrain completion for bash; put `source <(posttrain env --completion bash)` into ~/.bashrc
_posttrain() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" verb="${{COMP_WORDS[1]}}" words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{verbs} --help --version" -- "$word"))
    return
  fi
  case "$verb" in
{cases}
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$words" -- "$word")) ;;
    *) COMPREPLY=($(compgen -W "${{words//--+([a-z-])/}}" -- "$word") $(compgen -f -- "$word")) ;;
  esac
}}
complete -o filenames -F _posttrain posttrain"""


def _words(parser: argparse.ArgumentParser) -> list[str]:
    flags = [o for action in parser._actions for o in action.option_strings if o.startswith("--")]
    choices = [str(c) for action in parser._actions if not action.option_strings for c in action.choices or ()]
    return [*choices, *flags]


def _families() -> dict[str, list[str]]:
    """Verb -> the METHODs it takes: the registered ones of its family, without the family's name."""
    from posttrain.core.registry import methods

    found = {verb: [name.removeprefix(f"{verb}.") for name in methods() if name.startswith(f"{verb}.")] for verb in ("select", "quantize")}
    return {**found, "select": ["compare", *found["select"]]}


def bash_script() -> str:
    """The script for every verb with its flags and choices."""
    from posttrain.cli import VERBS, build_parser

    subs = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    families = _families()
    cases = [f'    {verb}) words="{" ".join([*families.get(verb, []), *_words(subs.choices[verb])])}" ;;' for verb in VERBS]
    return _SCRIPT.format(verbs=" ".join(VERBS), cases="\n".join(cases))
