"""Which lines of an input have a result already, and whether it was that input which they are of.

Knows nothing of files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator

from llama.jobs.lines import InputLine
from llama.sampling import SamplingParams

# Of a digest; two different lines have the same one by a chance of 1 to 4 billion.
DIGEST_BYTES = 4

# Returns the digest of a line, in hexadecimal.
Digest = Callable[[bytes], str]


def line_digest(params: SamplingParams) -> Digest:
    """Return what tells lines apart, and the same line under other sampling parameters.

    Parameters that have their default do not count, so that new ones change no digest.
    """
    defaults = dataclasses.asdict(SamplingParams())
    chosen = {name: value for name, value in dataclasses.asdict(params).items() if value != defaults[name]}
    key = hashlib.blake2b(json.dumps(chosen, sort_keys=True).encode(), digest_size=16).digest()
    return lambda content: hashlib.blake2b(content, key=key, digest_size=DIGEST_BYTES).hexdigest()


class FinishedLines:
    """The numbers of lines that have a result, with the digest of each: 4 bytes for each line up to the last."""

    def __init__(self, output: str) -> None:
        """Begin with none; output: what messages call the file that has the results."""
        self.output, self.count = output, 0
        self._digests = array("I")  # 0 is a line without a result

    def __contains__(self, number: int) -> bool:
        return number < len(self._digests) and self._digests[number] != 0

    def add(self, number: int, digest: str) -> bool:
        """Note a result; return False for a line that has one already."""
        if number in self:
            return False
        missing = number + 1 - len(self._digests)
        if missing > 0:
            self._digests.frombytes(bytes(missing * self._digests.itemsize))
        self._digests[number] = _as_int(digest)
        self.count += 1
        return True

    def unfinished(self, lines: Iterable[InputLine], digest: Digest) -> Iterator[InputLine]:
        """Yield the lines without a result; raise ValueError where a result is of another line, or of none."""
        found = 0
        for line in lines:
            if line.number not in self:
                yield line
                continue
            found += 1
            if self._digests[line.number] != _as_int(digest(line.content)):
                raise ValueError(
                    f"{self.output} has results of another input, or of other sampling flags: its line with index "
                    f"{line.number} is of another line. Give another file for the output, or remove it"
                )
        if found < self.count:
            raise ValueError(
                f"{self.output} has results of another input: {self.count - found} of its lines are of no line of this "
                "one. Give another file for the output, or remove it"
            )


def _as_int(digest: str) -> int:
    return int(digest, 16) or 1
