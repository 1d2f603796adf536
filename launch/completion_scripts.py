"""Completion scripts for bash, zsh and fish, made of tables and a few lines of each shell.

The tables name, for a place on the command line, what may follow. Commands with the same options
(recipes with the same objective) share a group in them.
"""

import re
from collections.abc import Callable, Iterable, Sequence

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

__widebatch_words() {{  # $1: place; sets group, words, files
  group='' words_here='' files=''
  case "$1" in
{groups}
  esac
}}

__widebatch_options() {{  # $1: group; sets options
  options=''
  case "$1" in
{options}
  esac
}}

__widebatch_values() {{  # $1: group, $2: option; sets values and files, or fails: it takes none
  values='' files=''
  case "$1 $2" in
{values}
  *) return 1 ;;
  esac
}}
"""

_BASH = """\

_widebatch() {
  local place='' group words_here files options values word index
  local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
  for ((index = 1; index < COMP_CWORD; index++)); do
    __widebatch_command "$place" "${COMP_WORDS[index]}" || true
  done
  __widebatch_words "$place"
  COMPREPLY=()
  if __widebatch_values "$group" "$before"; then
    words_here=$values
  else
    __widebatch_words "$place"
    if [[ $current == -* || -z $words_here$files ]]; then
      __widebatch_options "$group"
      words_here=$options files=''
    fi
  fi
  if [[ -n $words_here ]]; then
    while IFS= read -r word; do COMPREPLY+=("$word"); done < <(
      compgen -W "$words_here" -- "$current"
    )
  elif [[ -n $files ]]; then
    compopt -o filenames 2>/dev/null || true
    while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -f -- "$current")
  fi
}
complete -F _widebatch widebatch
"""

_ZSH = """\

_widebatch() {
  local place='' group words_here files options values index
  for ((index = 2; index < CURRENT; index++)); do
    __widebatch_command "$place" "${words[index]}" || true
  done
  __widebatch_words "$place"
  if __widebatch_values "$group" "${words[CURRENT - 1]}"; then
    words_here=$values
  else
    __widebatch_words "$place"
    if [[ ${words[CURRENT]} == -* || -z $words_here$files ]]; then
      __widebatch_options "$group"
      words_here=$options files=''
    fi
  fi
  if [[ -n $words_here ]]; then
    compadd -- ${=words_here}
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
    set -l files ''
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
        set files ''
        set here
        switch "$group"
{options}
        end
    end
    if set -q here[1]
        printf '%s\\n' $here
    else if test -n "$files"
        __fish_complete_path "$current"
    end
end
complete -c widebatch -f -a '(__widebatch_complete)'
"""


def bash(commands: Sequence[Command]) -> str:
    """For ``complete``; needs no package of completions."""
    return _HEAD.format(name="bash") + _posix(commands) + _BASH


def zsh(commands: Sequence[Command]) -> str:
    """For a folder of ``$fpath``, or to be read after ``compinit``."""
    return "#compdef widebatch\n" + _HEAD.format(name="zsh") + _posix(commands) + _ZSH


def fish(commands: Sequence[Command]) -> str:
    """For ``~/.config/fish/completions``."""
    groups = _groups(commands)
    tables = _Tables(commands, groups, _fish_case)
    return _HEAD.format(name="fish") + _FISH.format(
        places=tables.places(lambda path: [f"set place {path}"]),
        groups=tables.groups(
            lambda group, words, files: [
                f"set group {group}",
                f"set here {words}",
                f"set files '{files}'",
            ]
        ),
        options=tables.options(lambda names: [f"set here {names}"]),
        values=tables.values(lambda words, files: [f"set here {words}", f"set files '{files}'"]),
    )


WRITERS: dict[str, Callable[[Sequence[Command]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def _posix(commands: Sequence[Command]) -> str:
    tables = _Tables(commands, _groups(commands), _posix_case)
    return _POSIX.format(
        places=tables.places(lambda path: [f"place='{path}'"]),
        groups=tables.groups(
            lambda group, words, files: [
                f"group={group}",
                f"words_here='{words}'",
                f"files={files}",
            ]
        ),
        options=tables.options(lambda names: [f"options='{names}'"]),
        values=tables.values(lambda words, files: [f"values='{words}'", f"files={files}"]),
    )


def _groups(commands: Sequence[Command]) -> dict[tuple[Option, ...], str]:
    """A name for each set of options."""
    different = dict.fromkeys(command.options for command in commands)
    return {options: f"g{number}" for number, options in enumerate(different)}


_Case = Callable[[Iterable[str], list[str]], str]


class _Tables:
    """The tables as the bodies of ``case`` statements; ``write`` gives what a case does."""

    def __init__(
        self, commands: Sequence[Command], groups: dict[tuple[Option, ...], str], case: _Case
    ) -> None:
        self._commands, self._groups, self._case = commands, groups, case

    def places(self, write: Callable[[str], list[str]]) -> str:
        paths = [command.path for command in self._commands if command.path]
        # Of the place before, a slash and the word; the place before all commands is empty.
        return self._lines(([path if "/" in path else f"/{path}"], write(path)) for path in paths)

    def groups(self, write: Callable[[str, str, str], list[str]]) -> str:
        return self._lines(
            (
                [command.path],
                write(
                    self._groups[command.options],
                    _joined(command.words),
                    "yes" if command.files else "",
                ),
            )
            for command in self._commands
        )

    def options(self, write: Callable[[str], list[str]]) -> str:
        return self._lines(
            ([group], write(_joined(name for option in options for name in option.names)))
            for options, group in self._groups.items()
        )

    def values(self, write: Callable[[str, str], list[str]]) -> str:
        same: dict[tuple[str, str], list[str]] = {}
        for options, group in self._groups.items():
            for option in options:
                if option.kind != SWITCH:
                    files = "yes" if option.kind == FILE else ""
                    places = same.setdefault((_joined(option.choices), files), [])
                    places += [f"{group} {name}" for name in option.names]
        return self._lines((places, write(words, files)) for (words, files), places in same.items())

    def _lines(self, cases: Iterable[tuple[Iterable[str], list[str]]]) -> str:
        return "\n".join(self._case(patterns, body) for patterns, body in cases)


def _posix_case(patterns: Iterable[str], body: list[str]) -> str:
    return f"  {' | '.join(map(_quoted, patterns))}) {' '.join(body)} ;;"


def _fish_case(patterns: Iterable[str], body: list[str]) -> str:
    lines = "".join(f"\n            {line}" for line in body)
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
