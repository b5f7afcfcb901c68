"""What a model's name says: `org/name`, `org/name:Q4_K_M`, `org/name@revision`, `org/name/original`, or its address."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath

DEMO = "demo"
WORD = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
MODEL_NAME = re.compile(rf"(?P<repo>{WORD}/{WORD})(?P<part>(?:/{WORD})*)(?P<rest>(?:[:@][^:@]+)*)", re.ASCII)
# One slash where a Path joined two.
ADDRESS = re.compile(r"(?:hf:/{1,2}(?:models/)?|(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co)/)(.*?)/?")
# As an address names a revision, and what lies in it.
AT_REVISION = re.compile(r"([^/]+/[^/]+)/(?:tree|blob|resolve)/([^/?]+)(/[^?]*)?(?:\?.*)?")
FILE_SUFFIXES = (".gguf", ".safetensors", ".pth", ".bin", ".json", ".model")


@dataclass(frozen=True)
class ModelName:
    """A model of the hub.

    repo: org/name.
    part: a folder or file in the repository; "" for its top.
    type: a quantization of GGUF files, as people write it: Q4_K_M, q8_0.
    revision: a branch, a tag or a commit.
    """

    repo: str
    part: str = ""
    type: str | None = None
    revision: str = "main"

    def __str__(self) -> str:
        part, kind = f"/{self.part}" if self.part else "", f":{self.type}" if self.type else ""
        return f"{self.repo}{part}{kind}" + (f"@{self.revision}" if self.revision != "main" else "")


def parse_name(text: str | os.PathLike[str]) -> ModelName | None:
    """Return what a text names on the hub; None where it is no such name. Whether a path is of that name is not asked.

    A file in a folder (`models/a.gguf`) and whatever begins or ends like a path are none.
    """
    text = text.as_posix() if isinstance(text, PurePath) else os.fspath(text)
    address = ADDRESS.fullmatch(text)
    if address is not None:
        text = address[1]
        if found := AT_REVISION.fullmatch(text):
            text = f"{found[1]}{found[3] or ''}@{found[2]}"
    match = MODEL_NAME.fullmatch(text)
    if match is None or (not match["part"] and match["repo"].endswith(FILE_SUFFIXES)):
        return None
    said: dict[str, str] = {}
    for mark, value in re.findall(r"([:@])([^:@]+)", match["rest"]):
        if mark in said:
            return None
        said[mark] = value
    return ModelName(match["repo"], match["part"][1:], said.get(":"), said.get("@", "main"))


def names_model(text: str | os.PathLike[str]) -> bool:
    """Tell whether a text names a model and no path: a path that exists wins."""
    is_name = os.fspath(text) == DEMO or parse_name(text) is not None
    return is_name and not Path(os.path.expanduser(text)).exists()
