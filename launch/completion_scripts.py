"""Completion scripts for bash, zsh and fish, made of tables and a few lines of each shell.

The tables name, for a place on the command line, what may follow. Commands with the same options
(recipes with the same objective) share a group in them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from launch.completion import FILE, SWITCH, Command, Option

_HEAD = """\
# Completion of widebatch for {name}, written by: widebatch completion {name}
# Write it again after an update.
"""

_POSIX = """\
__widebatch_command() {{  # $1: command so far, $2: the next word; sets place, or fails
  case "$1/$2" in
{places}
  *) return 1 ;;
  esac
}}

__widebatch_words() {{  # $1: place; sets group, here and files
  group='' here='' files=''
  case "$1" in
{groups}
  esac
}}

__widebatch_options() {{  # $1: group; sets here
  here=''
  case "$1" in
{options}
  esac
}}

__widebatch_values() {{  # $1: group, $2: option; sets here and files, or fails: it takes none
  case "$1 $2" in
{values}
  *) return 1 ;;
  esac
}}
"""

_BASH = """\

_widebatch() {
  local place='' group here files word index
  local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
  for ((index = 1; index < COMP_CWORD; index++)); do
    __widebatch_command "$place" "${COMP_WORDS[index]}" || true
  done
  __widebatch_words "$place"
  if ! __widebatch_values "$group" "$before"; then
    if [[ $current == -* || -z $here$files ]]; then
      __widebatch_options "$group"
      files=''
    fi
  fi
  COMPREPLY=()
  if [[ -n $here ]]; then
    while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -W "$here" -- "$current")
  elif [[ -n $files ]]; then
    compopt -o filenames 2>/dev/null || true
    while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -f -- "$current")
  fi
}
complete -F _widebatch widebatch
"""

_ZSH = """\

_widebatch() {
  local place='' group here files index
  for ((index = 2; index < CURRENT; index++)); do
    __widebatch_command "$place" "${words[index]}" || true
  done
  __widebatch_words "$place"
  if ! __widebatch_values "$group" "${words[CURRENT - 1]}"; then
    if [[ ${words[CURRENT]} == -* || -z $here$files ]]; then
      __widebatch_options "$group"
      files=''
    fi
  fi
  if [[ -n $here ]]; then
    compadd -- ${=here}
  elif [[ -n $files ]]; then
    _files
  fi
}
if [[ ${funcstack[1]} == _widebatch ]]; then
  _widebatch "$@"  # loaded from a folder of $fpath, at the first TAB
else
  compdef _widebatch widebatch
fi
"""

_FISH = """\
function __widebatch_complete
    set -l line (commandline -opc) (commandline -ct)
    set -l current $line[-1]
    set -l before $line[-2]
    set -l place ''
    for word in $line[2..-2]
        switch "$place/$word"
{places}
        end
    end
    set -l group ''
    set -l here
    set -l files
    switch "$place"
{groups}
    end
    set -l takes 1
    switch "$group $before"
{values}
        case '*'
            set takes ''
    end
    if test -z "$takes"; and string match -qr -- '^-|^$' "$current$here$files"
        set files
        set here
        switch "$group"
{options}
        end
    end
    if set -q here[1]
        printf '%s\\n' $here
    else if set -q files[1]
        __fish_complete_path "$current"
    end
end
complete -c widebatch -f -a '(__widebatch_complete)'
"""


def bash(commands: Sequence[Command]) -> str:
    """For ``complete``; needs no package of completions."""
    return _HEAD.format(name="bash") + _filled(_POSIX, commands, _posix_case) + _BASH


def zsh(commands: Sequence[Command]) -> str:
    """For a folder of ``$fpath``, or to be read after ``compinit``."""
    head = "#compdef widebatch\n" + _HEAD.format(name="zsh")
    return head + _filled(_POSIX, commands, _posix_case) + _ZSH


def fish(commands: Sequence[Command]) -> str:
    """For ``~/.config/fish/completions``."""
    return _HEAD.format(name="fish") + _filled(_FISH, commands, _fish_case)


WRITERS: dict[str, Callable[[Sequence[Command]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}

_Case = Callable[[Iterable[str], Mapping[str, str]], str]
"""One case of a shell: patterns, and the variables that it sets to words."""


def _filled(script: str, commands: Sequence[Command], case: _Case) -> str:
    """A script with its four tables, each the body of a ``case`` statement."""
    groups = _groups(commands)
    tables = {
        "places": _places(commands),
        "groups": _at_places(commands, groups),
        "options": _options(groups),
        "values": _values(groups),
    }
    return script.format(
        **{
            name: "\n".join(case(patterns, variables) for patterns, variables in table)
            for name, table in tables.items()
        }
    )


def _groups(commands: Sequence[Command]) -> dict[tuple[Option, ...], str]:
    """A name for each set of options."""
    different = dict.fromkeys(command.options for command in commands)
    return {options: f"g{number}" for number, options in enumerate(different)}


_Table = Iterator[tuple[Iterable[str], Mapping[str, str]]]


def _places(commands: Sequence[Command]) -> _Table:
    for path in (command.path for command in commands if command.path):
        # Of the place before, a slash and the word; the place before all commands is empty.
        yield [path if "/" in path else f"/{path}"], {"place": path}


def _at_places(commands: Sequence[Command], groups: Mapping[tuple[Option, ...], str]) -> _Table:
    for command in commands:
        files = "yes" if command.files else ""
        group = groups[command.options]
        yield [command.path], {"group": group, "here": _joined(command.words), "files": files}


def _options(groups: Mapping[tuple[Option, ...], str]) -> _Table:
    for options, group in groups.items():
        yield [group], {"here": _joined(name for option in options for name in option.names)}


def _values(groups: Mapping[tuple[Option, ...], str]) -> _Table:
    same: dict[tuple[str, str], list[str]] = {}
    for options, group in groups.items():
        for option in options:
            if option.kind != SWITCH:
                files = "yes" if option.kind == FILE else ""
                places = same.setdefault((_joined(option.choices), files), [])
                places += [f"{group} {name}" for name in option.names]
    for (words, files), places in same.items():
        yield places, {"here": words, "files": files}


def _posix_case(patterns: Iterable[str], variables: Mapping[str, str]) -> str:
    body = " ".join(f"{name}={_quoted(words)}" for name, words in variables.items())
    return f"  {' | '.join(map(_quoted, patterns))}) {body} ;;"


def _fish_case(patterns: Iterable[str], variables: Mapping[str, str]) -> str:
    """A variable is a list of words there."""
    lines = "".join(f"\n            set {name} {words}" for name, words in variables.items())
    return f"        case {' '.join(map(_quoted, patterns))}{lines}"


def _quoted(text: str) -> str:
    return f"'{text}'"


def _joined(words: Iterable[str]) -> str:
    """Words in one string: they are names, with nothing that a shell would take for more."""
    found = list(words)
    for word in found:
        if not re.fullmatch(r"[\w.:/+-]+", word):
            raise ValueError(f"{word!r} cannot stand in a completion script as it is")
    return " ".join(found)
