"""`llama verify`: a checkpoint's files are whole, what their names say, and belong together."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from llama.checkpoint.verify.checksums import Finding, write_list
from llama.checkpoint.verify.verify import bytes_to_read, checked_files, verify
from llama.errors import visible
from llama.hub.find import local_path


def main(path: Path, *, deep: bool = False, write: bool = False) -> None:
    """Check the checkpoint PATH; the exit code is 1 when something is wrong, and all that is wrong is listed.

    Args:
        path: a folder of Meta's or Hugging Face's format, a GGUF file, or a model's name.
        deep: also read all weights, and count NaN and infinite values.
        write: if nothing is wrong, write checksums.sha256 (or FILE.gguf.sha256), for later runs and for sha256sum -c.

    Examples:
        llama verify Meta-Llama-3-8B --deep
    """
    path, findings = Path(local_path(path)), []
    total = bytes_to_read(path, deep) if path.exists() else 0
    with _bar(total, "checking") as bar:
        for finding in verify(path, deep, bar.update):
            findings.append(finding)
            bar.set_postfix_str(finding.file, refresh=False)
    print_table(findings)
    wrong = sum(finding.problem is not None for finding in findings)
    if wrong:
        print(f"{wrong} problem{'s' * (wrong > 1)}")
        sys.exit(1)
    print("all is well" + ("" if deep else ", as far as can be told without reading the weights: --deep does"))
    if write:
        files = checked_files(path)
        with _bar(sum(file.stat().st_size for file in files), "sha256") as bar:
            print(f"wrote {write_list(path, files, bar.update)}")


def _bar(total: int, what: str) -> tqdm:
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, file=sys.stderr, disable=None, leave=False)


def print_table(findings: list[Finding]) -> None:
    rows = [("file", "bytes", "what", "result")]
    for finding in findings:
        size = "" if finding.size is None else f"{finding.size:,}"
        result = "ok" if finding.problem is None else f"WRONG: {finding.problem}"
        rows.append((finding.file, size, finding.what, result))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for file, size, what, result in rows:
        print(visible(f"{file:{widths[0]}}  {size:>{widths[1]}}  {what:{widths[2]}}  {result}"))
