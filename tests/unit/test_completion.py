"""What shells propose: commands, their flags, paths, and the values that a flag may have."""

from __future__ import annotations

import contextlib
import io
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from llama.chat.formats import CHAT_FORMATS
from llama.cli.completion import SCRIPTS, main
from llama.cli.flags import flags_of
from llama.cli.main import NAMES
from llama.cli.perplexity import main as perplexity
from llama.engine.options import QUANTIZE_MODES

# What is typed, the last word unfinished, and all that is proposed for it; None: files.
TYPED: dict[str, set[str] | None] = {
    "llama perpl": {"perplexity"},
    "llama complete --max_s": {"--max_seq_len"},
    "llama complete --json --dev": {"--device"},
    "llama complete --quantize ": set(QUANTIZE_MODES),
    "llama complete --device=c": {"cuda", "cpu"},
    "llama chat --chat_format ": set(CHAT_FORMATS),
    "llama convert --format ": {"meta", "hf", "gguf"},
    "llama make new --dtype q8": {"q8_0"},
    "llama completion ": set(SCRIPTS),
    "llama perplexity --": {f"--{name}" for name in flags_of(perplexity)} | {"--help"},
    "llama complete --max_gen_len ": set(),
    "llama complete --ckpt_dir one": None,
    "llama verify one": None,
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    for shell in SCRIPTS:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            main(shell)
        (folder / shell).write_text(printed.getvalue(), encoding="utf-8")
    (folder / "one file").touch()
    return folder


def lines_of(command: list[str], folder: Path) -> list[str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_proposes_what_may_follow(scripts: Path) -> None:
    """Where there is nothing to propose, bash itself completes files: as the script says, but after a number's flag."""
    lines = [
        "compopt() { echo no files; }",
        "source ./bash",
        "complete -p llama",
        'try() { COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); echo "[$(_llama; echo "${COMPREPLY[@]}")]"; }',
    ]
    for typed in TYPED:
        words = typed.replace("=", " = ").split(" ")
        lines.append("try " + " ".join(map(shlex.quote, words)))
    registered, *found = "\n".join(lines_of(["bash", "--norc", "-c", "\n".join(lines)], scripts)).split("[")
    assert registered.split() == ["complete", "-o", "default", "-F", "_llama", "llama"]
    for (typed, expected), answer in zip(TYPED.items(), found, strict=True):
        proposed = answer.rstrip().removesuffix("]").split()
        if expected == set():
            assert proposed == ["no", "files"], typed
        else:
            assert sorted(proposed) == sorted(expected or ()), typed


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_proposes_what_may_follow(scripts: Path) -> None:
    asked = "; ".join(f"echo [; complete -C {shlex.quote(typed)}" for typed in TYPED)
    _, *found = "\n".join(lines_of(["fish", "--no-config", "-c", f"source ./fish; {asked}"], scripts)).split("[\n")
    for (typed, expected), answer in zip(TYPED.items(), found, strict=True):
        proposed = {line.partition("\t")[0].rpartition("=")[2] for line in answer.splitlines()}
        if typed.endswith("--"):
            proposed -= {"-h"}
        assert proposed == ({"one file"} if expected is None else expected), typed


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_completes_what_is_unique(scripts: Path) -> None:
    """As a user types it, in a pseudo-terminal."""
    typed = {
        "llama perpl\\t": "llama perplexity ",
        "llama complete --quan\\tfp\\t": "llama complete --quantize=fp8 ",
        "llama make x --format g\\t": "llama make x --format gguf ",
        "llama verify one\\t": "llama verify one\\ file ",
    }
    lines = [
        "zmodload zsh/zpty",
        "zpty z zsh -f -i",
        "zpty -w z 'PROMPT= RPROMPT= PROMPT_SP= ; unsetopt zle; autoload -Uz compinit; compinit -u -D; source ./zsh'",
        # A key that shows the line as it is.
        "zpty -w z 'setopt zle; unset zle_bracketed_paste'",
        """zpty -w z 'show() { print -r "<$BUFFER>" >> shown; zle kill-buffer }'""",
        "zpty -w z 'zle -N show; bindkey ^X show; bindkey ^I complete-word'",
        *(f"zpty -w -n z $'{keys}\\x18'" for keys in typed),
        f"for i in {{1..100}}; do [[ -f shown && $(wc -l < shown) -ge {len(typed)} ]] && break; sleep 0.1; done",
        "cat shown",
    ]
    assert lines_of(["zsh", "-f", "-c", "\n".join(lines)], scripts) == [f"<{line}>" for line in typed.values()]


def test_every_command_and_flag_is_in_every_script(scripts: Path) -> None:
    for shell in SCRIPTS:
        text = (scripts / shell).read_text(encoding="utf-8")
        assert [name for name in NAMES if name not in text] == []
        assert "max_seq_len" in text and "draft_quantize" in text


def test_an_unknown_shell_is_told() -> None:
    with pytest.raises(ValueError, match="the shell must be one of bash, zsh, fish, got 'csh'"):
        main("csh")
