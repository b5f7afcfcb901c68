"""One page of HTML that shows completions token by token: how likely each was, and what was likely in its place.

It needs nothing from elsewhere, and nothing in it that a model or a user wrote is more than text.
"""

from __future__ import annotations

import errno
import html
import json
import math
import os
import re
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama.cli.shown_tokens import ShownToken
from llama.outputs import FinishReason

# Joiners of letters and of emoji, which are nothing to see, but are no surprise either.
JOINERS = "\u200c\u200d"
ENDS = {
    "stop": "ended by itself",
    "length": "cut off by a limit of tokens",
    "error": "ended by an error",
    None: "broken off",
}

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fdfdfb; --card: #fff; --faint: #6e6e73; --line: #dcdcd6;
  --mark: rgb(0 0 0 / .42); --shade: 90% 62%; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececea; --paper: #161618; --card: #212124; --faint: #a2a2a8; --line: #3a3a3f;
    --mark: rgb(255 255 255 / .5); --shade: 68% 40%; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 54rem; padding: 2rem 1.25rem 9rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
h2, h3 { font-size: .82rem; font-weight: 600; margin: 0 0 .35rem; color: var(--faint); }
h3 { font-weight: 400; margin-top: .9rem; }
header p { margin: .3rem 0; font-size: .85rem; color: var(--faint); overflow-wrap: anywhere; }
section { margin-top: 1.6rem; padding: 1rem 1.2rem 1.2rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.prompt, .tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: .95rem/1.75 ui-monospace, Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
.prompt { border-left: 3px solid var(--line); padding-left: .8rem; color: var(--faint); }
.t { position: relative; border-radius: .2rem; padding: .12em 0; cursor: default;
  background: hsl(calc(4 + 44 * var(--p)) var(--shade) / calc(.9 * (1 - var(--p)))); }
.t:hover, .t:focus { outline: 2px solid var(--ink); outline-offset: 0; z-index: 1; }
.k { border: 1px dashed var(--mark); border-radius: .25rem; padding: 0 .25em; font-size: .85em; }
.s, .tab, .nl::before { color: var(--mark); font-weight: 400; }
.s { background: radial-gradient(circle, var(--mark) .1em, transparent .12em) no-repeat center; }
.nl::before { content: "\\21b5"; }
.tab { background: linear-gradient(var(--mark), var(--mark)) no-repeat center / calc(100% - .3em) 1px; }
.u { font-size: .75em; border: 1px solid var(--mark); border-radius: .2rem; padding: 0 .2em; }
.a { display: none; position: absolute; left: -.3rem; top: calc(100% + .3rem); z-index: 2; width: max-content;
  max-width: min(24rem, 90vw); padding: .45rem .6rem; background: var(--card); color: var(--ink); line-height: 1.5;
  border: 1px solid var(--line); border-radius: .5rem; box-shadow: 0 .4rem 1.4rem rgb(0 0 0 / .28); font-size: .82rem;
  white-space: pre; cursor: auto; }
.t:hover .a, .t:focus .a { display: grid; grid-template-columns: minmax(3rem, 1fr) 6rem auto; gap: .1rem .7rem; }
.tokens:hover .t:focus:not(:hover) .a { display: none; }
.r { display: contents; }
.n { overflow: hidden; text-overflow: ellipsis; }
.c > * { font-weight: 700; }
.bar { align-self: center; height: .55em; background: linear-gradient(#3b82c4, #3b82c4) no-repeat;
  background-size: calc(100% * var(--p)) 100%; border-radius: .15rem; box-shadow: inset 0 0 0 1px var(--line); }
.q { text-align: right; font-variant-numeric: tabular-nums; }
.legend span { display: inline-block; padding: 0 .5em; margin-right: .25em; color: var(--ink); }
"""

# The arrows go from token to token, so that Tab goes from text to text; what is shown stays inside the window.
SCRIPT = """
for (const box of document.querySelectorAll(".tokens")) {
  const tokens = [...box.querySelectorAll(".t")];
  tokens.forEach((token, i) => { token.tabIndex = i ? -1 : 0; });
  box.addEventListener("keydown", event => {
    const at = tokens.indexOf(document.activeElement);
    if (event.key === "Escape") document.activeElement.blur();
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -tokens.length, End: tokens.length }[event.key];
    if (at < 0 || !step) return;
    event.preventDefault();
    const next = tokens[Math.min(Math.max(at + step, 0), tokens.length - 1)];
    tokens[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  for (const name of ["mouseover", "focusin"]) box.addEventListener(name, event => {
    const shown = event.target.closest(".t")?.querySelector(".a");
    if (!shown) return;
    shown.style.translate = "";
    const { left, right } = shown.getBoundingClientRect();
    const over = Math.min(Math.max(right - document.documentElement.clientWidth + 8, 0), left - 8);
    if (over > 0) shown.style.translate = -over + "px 0";
  });
}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def token_page(
    model: str,
    settings: Mapping[str, object],
    prompts: Sequence[str],
    results: Sequence[tuple[Sequence[ShownToken], FinishReason | None]],
) -> str:
    """Return the page.

    model: what it is called; settings: what texts were sampled with, by name; results: the tokens of each, and why it
    ended, as many for each prompt, those of the first prompt first.
    """
    n = len(results) // len(prompts)
    said = ", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items())
    shades = "".join(f'<span class="t" style="--p:{p}">{100 * p:.0f} %</span>' for p in (1, 0.75, 0.5, 0.25, 0.1, 0.01))
    sections = []
    for i, prompt in enumerate(prompts):
        heading = f"Prompt {i + 1}" if len(prompts) > 1 else "Prompt"
        texts = "".join(_result(*results[i * n + k], f"[{k + 1} of {n}] " if n > 1 else "") for k in range(n))
        sections.append(
            f'<section>\n<h2>{heading}</h2>\n<div class="prompt">{as_html(prompt)}</div>\n{texts}</section>'
        )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>Completions by {html.escape(model)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>Completions by {html.escape(model)}</h1>
<p>{html.escape(said)}</p>
<p class="legend">probability of a token, by the model alone: {shades}</p>
<p>What was likely in its place is shown where the pointer is; Tab and the arrow keys go from token to token.</p>
</header>
<main>
{chr(10).join(sections)}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _result(tokens: Sequence[ShownToken], reason: FinishReason | None, number: str) -> str:
    """Return one completion, below a line on it."""
    known = [token.probability for token in tokens if token.probability is not None]
    mean = math.exp(sum(math.log(max(p, 1e-300)) for p in known) / len(known)) if known else None
    about = f"{len(tokens)} token{'s' * (len(tokens) != 1)}"
    if mean is not None:
        about += f", mean probability {html.escape(percent(mean))}"
    spans = "".join(map(_token, tokens))
    return f'<h3>{number}{about}, {ENDS[reason]}</h3>\n<div class="tokens">{spans}</div>\n'


def _token(token: ShownToken) -> str:
    """Return a token's text, or its name where it adds none, with what is shown for it."""
    kind, text = ("t", token.text) if token.text else ("t k", token.name)
    rows = list(token.alternatives)
    if token.probability is not None and token.name not in (name for name, _ in rows):
        rows.append((token.name, token.probability))
    shown = "".join(_row(name, p, name == token.name) for name, p in rows)
    probability = 1.0 if token.probability is None else token.probability
    return (
        f'<span class="{kind}" tabindex="0" style="--p:{probability:.3g}">{as_html(text)}'
        f'<span class="a" role="tooltip">{shown or "no probability is known"}</span></span>'
    )


def _row(name: str, probability: float, is_chosen: bool) -> str:
    """Return a token that was likely, with a bar as long as it was."""
    kind = "r c" if is_chosen else "r"
    bar = f'<span class="bar" style="--p:{probability:.3g}"></span>'
    number = f'<span class="q">{html.escape(percent(probability))}</span>'
    return f'<span class="{kind}"><span class="n">{as_html(name, all_blanks=True)}</span>{bar}{number}</span>'


def percent(probability: float) -> str:
    """Return a probability in percent with two digits, and what is next to none as such."""
    if probability < 0.0001:
        return "< 0.01 %"
    hundred = 100 * probability
    return f"{hundred:.0f} %" if hundred >= 9.95 else f"{hundred:.1f} %" if hundred >= 0.95 else f"{hundred:.2f} %"


def as_html(text: str, all_blanks: bool = False) -> str:
    """Return a text as HTML that is nothing but text: line ends and blanks that one would miss are marked.

    What a browser copies is the text, but for characters that cannot be shown, which are named. all_blanks: single
    spaces are marked, too.
    """
    return re.sub(r"(?s)." if all_blanks else r"\A +\Z|  +|[^ ]", _marked, text)


def _marked(found: re.Match[str]) -> str:
    text = found[0]
    if text == "\n":
        return '<span class="nl"></span>\n'
    if text == "\t":
        return '<span class="tab">\t</span>'
    if unicodedata.category(text[0]) == "Zs":
        return "".join(f'<span class="s">{each}</span>' for each in text)
    if text.isprintable() or text in JOINERS:
        return html.escape(text)
    return f'<span class="u">U+{ord(text):04X}</span>'


def check_writable(path: Path) -> None:
    """Raise OSError or ValueError where no page could be written to a path; nothing is left there."""
    partial = _partial(path)
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise ValueError(f"--html {path} is {kind}: give the path of a file")
        if not path.parent.is_dir():
            raise ValueError(f"--html {path}: there is no folder {path.parent}: make it, or give another path")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "read-only")
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise OSError(f"--html {path} cannot be written ({error.strerror}): give another path") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file so that there is all of it or what was there before."""
    partial = _partial(path)
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, os.path.realpath(path))  # a link stays one
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """Return the path that a file has until it is whole, in the folder where it will lie."""
    whole = Path(os.path.realpath(path))
    return whole.with_name(f"{whole.name}.partial-{os.getpid()}")
