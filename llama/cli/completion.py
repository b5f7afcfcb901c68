"""`llama completion`: scripts by which shells complete commands, flags and values, from the tables of --help."""

from __future__ import annotations

import importlib
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from llama.benchmark.peer_worker import PEERS
from llama.chat.formats import CHAT_FORMATS
from llama.checkpoint.export.gguf_types import GGUF_FILE_TYPES
from llama.checkpoint.export.writer import EXPORT_FORMATS
from llama.cli.conversation import OVERFLOWS
from llama.cli.flags import Flag, flags_of, placeholder
from llama.cli.main import COMMANDS
from llama.cli.printing import say
from llama.distributed.device import DTYPES
from llama.engine.options import QUANTIZE_MODES
from llama.testing.model_presets import PRESETS

FILE_TYPES = (*DTYPES, *(name for name in GGUF_FILE_TYPES if name not in DTYPES))
# What a flag may be, where that is known: in every command, or in one.
VALUES: dict[str, Sequence[str]] = {
    "device": ("cuda", "mps", "cpu"),
    "dtype": tuple(DTYPES),
    "chat_format": tuple(CHAT_FORMATS),
    "quantize": QUANTIZE_MODES,
    "draft_quantize": QUANTIZE_MODES,
    "speculate": ("lookup",),
    "overflow": OVERFLOWS,
    "preset": tuple(PRESETS),
    "compare": ("all", *PEERS, "plain"),
    "convert --format": EXPORT_FORMATS,
    "convert --dtype": FILE_TYPES,
    "convert --quantize": ("int8", "int4"),
    "make --format": EXPORT_FORMATS,
    "make --dtype": FILE_TYPES,
}
LONGEST_MEANING = 60  # characters


def main(shell: str) -> None:
    """Print a script by which SHELL completes the commands of llama, their flags, and paths or known values.

    Args:
        shell: bash, zsh or fish.

    Examples:
        llama completion bash > ~/.local/share/bash-completion/completions/llama
        llama completion zsh > ~/.zfunc/_llama
        llama completion fish > ~/.config/fish/completions/llama.fish
    """
    if shell not in SCRIPTS:
        raise ValueError(f"the shell must be one of {', '.join(SCRIPTS)}, got {shell!r}")
    say(SCRIPTS[shell](_flags_of_commands()))


def _flags_of_commands() -> dict[str, list[Flag]]:
    names = [name for commands in COMMANDS.values() for name in commands]
    mains = {name: importlib.import_module(f"llama.cli.{name}").main for name in names}
    return {name: list(flags_of(main).values()) for name, main in mains.items()}


def _values(command: str, flag: Flag) -> Sequence[str]:
    """The words that a flag may be; none where it is on or off, or where any text may follow."""
    if command == "completion":
        return tuple(SCRIPTS)
    return VALUES.get(f"{command} --{flag.name}", VALUES.get(flag.name, ()))


def _is_path(flag: Flag) -> bool:
    return placeholder(flag) == "PATH"


def _meaning(flag: Flag) -> str:
    """The beginning of what --help says of a flag, as one short phrase."""
    words, meaning = flag.meaning.partition(";")[0].partition(": ")[0].rstrip(".").split(), ""
    for word in words:
        if len(meaning) + len(word) > LONGEST_MEANING:
            return meaning + " ..."
        meaning = f"{meaning} {word}".strip()
    return meaning


def _meanings_of_commands() -> dict[str, str]:
    return {name: what for commands in COMMANDS.values() for name, what in commands.items()}


def _bash(commands: dict[str, list[Flag]]) -> str:
    """Paths are left to readline's own completion of files, which knows of spaces."""
    flags_of_command, after_flag = [], defaultdict[str, list[str]](list)
    for command, flags in commands.items():
        names = [f"--{flag.name}" for flag in flags if flag.shown.startswith("--")]
        words = [word for flag in flags if flag.is_word for word in _values(command, flag)]
        flags_of_command.append(f'{command}) flags="{" ".join([*names, "--help"])}" words="{" ".join(words)}" ;;')
        for flag in flags:
            if placeholder(flag):
                known = " ".join(_values(command, flag))
                action = f'known="{known}"' if known else "is_file=1" if _is_path(flag) else "is_text=1"
                after_flag[action].append(f'"{command} --{flag.name}"')
    return f"""\
# Completes llama in bash.
_llama() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}}
    local flags= words= known= is_file= is_text=
    # bash makes a word of its own of the = of --flag=value.
    if [[ $cur == "=" ]]; then
        cur=
    elif [[ $before == "=" ]]; then
        before=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=( $(compgen -W "{" ".join(commands)} --help --version" -- "$cur") )
        return
    fi
    case $command in
{_lines(flags_of_command)}
    esac
    case "$command $before" in
{_lines(f"{'|'.join(patterns)}) {action} ;;" for action, patterns in after_flag.items())}
    esac
    if [[ -n $known ]]; then
        COMPREPLY=( $(compgen -W "$known" -- "$cur") )
    elif [[ -n $is_text ]]; then
        compopt +o default 2>/dev/null
    elif [[ -z $is_file && $cur == -* ]]; then
        COMPREPLY=( $(compgen -W "$flags" -- "$cur") )
    elif [[ -z $is_file && -n $words ]]; then
        COMPREPLY=( $(compgen -W "$words" -- "$cur") )
    fi
}}
complete -o default -F _llama llama
"""


def _zsh(commands: dict[str, list[Flag]]) -> str:
    def spec(command: str, flag: Flag) -> str:
        words = _values(command, flag)
        action = f":{flag.name}:" + (f"({' '.join(words)})" if words else "_files" if _is_path(flag) else " ")
        if not flag.shown.startswith("--"):
            return shlex.quote(action)
        meaning = re.sub(r"[][:\\]", r"\\\g<0>", _meaning(flag))
        repeats = "*" * (list[str] in flag.types)
        return shlex.quote(
            f"{repeats}--{flag.name}=[{meaning}]{action}" if placeholder(flag) else f"--{flag.name}[{meaning}]"
        )

    cases = []
    for command, flags in commands.items():
        specs = [*(spec(command, flag) for flag in flags), "'--help[say what it does]'"]
        cases.append(f"{command}) _arguments -S {' '.join(specs)} ;;")
    return f"""\
#compdef llama
# Completes llama in zsh.
_llama() {{
    local -a commands=(
{_lines(f"{name}:{shlex.quote(what)}" for name, what in _meanings_of_commands().items())}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    local command=$words[2]
    shift words
    (( CURRENT-- ))
    case $command in
{_lines(cases)}
    esac
}}
if [[ $funcstack[1] == _llama ]]; then
    _llama "$@"
else
    compdef _llama llama
fi
"""


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(f"        {line}" for line in lines)


def _fish(commands: dict[str, list[Flag]]) -> str:
    lines = ["# Completes llama in fish.", "complete -c llama -f"]
    for name, what in _meanings_of_commands().items():
        lines.append(f"complete -c llama -n __fish_use_subcommand -a {name} -d {shlex.quote(what)}")
    for command, flags in commands.items():
        begin = f"complete -c llama -n '__fish_seen_subcommand_from {command}'"
        for flag in flags:
            words = " ".join(_values(command, flag))
            takes = f"-a {shlex.quote(words)}" if words else "-F" if _is_path(flag) else ""
            if flag.is_word and takes:
                lines.append(f"{begin} {takes}")
            if flag.shown.startswith("--"):
                value = ("-r " if takes == "-F" else "-x ") + takes if placeholder(flag) else ""
                lines.append(f"{begin} -l {flag.name} {value} -d {shlex.quote(_meaning(flag))}".replace("  ", " "))
        lines.append(f"{begin} -l help -d 'say what it does'")
    return "\n".join(lines) + "\n"


SCRIPTS: dict[str, Callable[[dict[str, list[Flag]]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
