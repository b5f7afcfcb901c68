"""A conversation with a model: what was said, how it is answered, and what of it the context has room for."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llama.chat.dialog import Message, check_messages
from llama.chat.formats import check_system
from llama.chat.llama2_tags import UNSAFE_ERROR
from llama.cli.printing import say
from llama.cli.runner import is_first_rank
from llama.cli.signals import signals_raise
from llama.distributed.job import agree
from llama.distributed.torchrun_env import read_torchrun_env
from llama.generation import Llama
from llama.memory.plan import NoRoomError
from llama.outputs import TokenEvent
from llama.sampling import SamplingParams

log = logging.getLogger("llama")

# What is done where the context is full.
OVERFLOWS = ("forget", "error")
# The part of the context that is kept free for an answer, unless --max_gen_len asks for less.
ANSWER_SHARE = 1 / 4


class TooLongError(ValueError):
    """A message that the context has no room for; those after it may have."""


@dataclass
class Conversation:
    """The messages so far, as every rank has them; nothing of them is removed where the oldest are forgotten.

    Args:
        overflow: where the context is full, "forget" the oldest turns, or have "error" refuse the message.
        turns: all messages but the system prompt.
        n_forgotten: how many of the first turns the model no longer gets.
        tokens: the last prompt, and the answer to it: what the cache holds.
    """

    llm: Llama
    params: SamplingParams
    system: str | None = None
    overflow: str = "forget"
    turns: list[Message] = field(default_factory=list)
    n_forgotten: int = 0
    tokens: list[int] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """All messages, the system prompt first."""
        return self._opening() + self.turns

    @property
    def last_message(self) -> str:
        """The newest message of the user; ValueError where there is none."""
        if not self.turns:
            raise ValueError("nothing was said yet")
        return str(self.turns[self._last_question()]["content"])

    def reset(self) -> None:
        """Forget all but the system prompt."""
        self.turns, self.n_forgotten = [], 0

    def ask(self, text: str) -> None:
        """Add a message of the user, which `answer` answers."""
        self.turns = [*self.turns, Message(role="user", content=text)]

    def undo(self) -> None:
        """Remove the newest message of the user, and what followed; ValueError where there is none."""
        self.last_message  # noqa: B018  # raises
        self.turns = self.turns[: self._last_question()]
        self.n_forgotten = min(self.n_forgotten, self._turn_before(len(self.turns)))

    def unanswer(self) -> None:
        """Remove the answer to the newest message of the user; ValueError where there is no message."""
        text = self.last_message
        self.undo()
        self.ask(text)

    def replace(self, messages: Sequence[Message], n_forgotten: int = 0) -> None:
        """Go on from other messages, on every rank; ValueError where the chat format cannot write them."""
        check_messages([*messages, Message(role="user", content="Hello")])
        has_system = bool(messages) and messages[0]["role"] == "system"
        turns = list(messages[has_system:])
        if turns and (turns[0]["role"] != "user" or turns[-1]["role"] != "assistant"):
            raise ValueError("a conversation begins with a message of the user, and ends with an answer")
        self.llm.encode_dialogs([[*messages, Message(role="user", content="Hello")]])
        self.system = str(messages[0]["content"]) if has_system else None
        self.turns, self.n_forgotten = turns, n_forgotten

    def answer(self) -> str:
        """Print the answer to the newest message as it comes, add it, and return it: as much as came before Ctrl-C.

        Nothing is added where nothing came. Raises TooLongError where the context has no room for the message, and
        ValueError for what the sampling parameters or the chat format refuse.
        """
        llm, params = self.llm, self.params
        if llm.chat_format.is_unsafe(self.messages):
            say(UNSAFE_ERROR + "\n")
            return ""
        max_seq_len = llm.model.args.max_seq_len
        text, last = "", None
        prompt, new = list[int](), list[int]()
        with contextlib.nullcontext() if has_other_ranks() else signals_raise():
            try:
                prompt, events = self._begin()
                for last in events:
                    text += last.text
                    if last.token is not None:
                        new.append(last.token)
                    say(last.text)
            except KeyboardInterrupt:
                print(" (stopped)", end="", file=sys.stderr, flush=True)
                last = None
        say("\n")
        self.tokens = prompt + new if prompt else self.tokens  # Ctrl-C may come before there is one
        if last is not None and last.finish_reason == "length" and len(new) != params.max_gen_len:
            where, fix = f"the context of {max_seq_len} tokens", "--max_seq_len makes room"
            if len(self.tokens) < max_seq_len:
                where, fix = f"the memory for {len(self.tokens)} tokens", "/reset makes room"
            log.warning("%s is full, and the answer was cut: %s", where, fix)
        if text:
            self.turns = [*self.turns, Message(role="assistant", content=text)]
        return text

    def count(self) -> int:
        """Return about how many tokens the model would get with the next message."""
        asked = [*self._kept(self.n_forgotten), Message(role="user", content="Hello")]
        return len(self.llm.encode_dialogs([asked])[0])

    def _begin(self) -> tuple[list[int], Iterator[TokenEvent]]:
        """Return the tokens of the messages, and the events of their answer.

        Where memory has no room for them, the oldest turns go as where the context has none.
        """
        while True:
            prompt = self._fit()
            events = self.llm.run([prompt], self.params, add_prefix_space=True)
            try:
                return prompt, itertools.chain([next(events)], events)
            except NoRoomError as error:
                if self.overflow == "error" or self.n_forgotten == self._last_question():
                    raise TooLongError(f"cannot be answered: {error}") from None
                self._forget_to(self._turn_after(self.n_forgotten), "memory has no room for all that was said")

    def _fit(self) -> list[int]:
        """Return the tokens of the messages, from here on without the oldest turns that leave no room for an answer."""
        max_seq_len = self.llm.model.args.max_seq_len
        room = int(max_seq_len * ANSWER_SHARE)
        if self.params.max_gen_len is not None:
            room = min(room, self.params.max_gen_len)
        first, last = self.n_forgotten, self._last_question()
        [tokens] = self.llm.encode_dialogs([self._kept(first)])
        while self.overflow == "forget" and len(tokens) + room > max_seq_len and first < last:
            first = self._turn_after(first)
            [tokens] = self.llm.encode_dialogs([self._kept(first)])
        if len(tokens) >= max_seq_len:
            [alone] = self.llm.encode_dialogs([self._kept(last)])
            raise TooLongError(self._too_long(len(tokens), len(alone)))
        self._forget_to(first, f"the context of {max_seq_len} tokens is full")
        return tokens

    def _forget_to(self, first: int, why: str) -> None:
        """Have the model no longer get what was said before a turn, and say so where it had all until now."""
        if first and not self.n_forgotten:
            log.warning("%s: the oldest %d messages are forgotten, as will be those after them", why, first)
        self.n_forgotten = first

    def _too_long(self, n_tokens: int, n_alone: int) -> str:
        """Go on from the number of a message: why it is refused, with what was said before or alone."""
        max_seq_len, fix = self.llm.model.args.max_seq_len, "give a larger --max_seq_len"
        if n_alone < max_seq_len:
            return (
                f"is too long for what is left of the context: with what was said before it has {n_tokens} tokens, "
                f"--max_seq_len is {max_seq_len}: /reset forgets that, --overflow forget the oldest of it; or {fix}"
            )
        system = " and the system prompt" if self.system is not None else ""
        return (
            f"is too long for the context: with what the chat format writes{system} it has {n_alone} tokens, "
            f"--max_seq_len is {max_seq_len}: shorten it, or {fix}"
        )

    def _opening(self) -> list[Message]:
        return [] if self.system is None else [Message(role="system", content=self.system)]

    def _kept(self, first: int) -> list[Message]:
        return self._opening() + self.turns[first:]

    def _last_question(self) -> int:
        return self._turn_before(len(self.turns))

    def _turn_after(self, place: int) -> int:
        """Return the place of the next message of the user, of which there is one."""
        return next(i for i in range(place + 1, len(self.turns)) if self.turns[i]["role"] == "user")

    def _turn_before(self, stop: int) -> int:
        """Return the place of the last message of the user before a place; 0 where there is none."""
        return next((i for i in reversed(range(stop)) if self.turns[i]["role"] == "user"), 0)


def check_opening(llm: Llama, system: str | None, name: str = "--system") -> None:
    """ValueError where the format has no place for the system prompt, or the context no room for a message after it.

    Every rank raises what the first one finds. name: what to call the system prompt.
    """
    with agree():
        if not is_first_rank():
            return
        what, fixes, dialog = "the chat format", "give a larger one", [Message(role="user", content="Hello")]
        if system is not None:
            check_system(llm.chat_format, system)
            what, fixes = name, "shorten it, or give a larger --max_seq_len"
            dialog.insert(0, Message(role="system", content=system))
        used, max_seq_len = len(llm.chat_format.encode(dialog)), llm.model.args.max_seq_len
        if used >= max_seq_len:
            raise ValueError(
                f"{what} leaves no room for a message: with 'Hello' it has {used} tokens, --max_seq_len is "
                f"{max_seq_len}: {fixes}"
            )


def tell(line: str) -> None:
    """Say something that is no answer, once for all ranks."""
    if is_first_rank():
        print(line, file=sys.stderr)


def has_other_ranks() -> bool:
    """Whether other ranks may be there: they would not stop at the same token, and torchrun ends them all anyway."""
    env = read_torchrun_env()
    return env.torchrun or env.world_size > 1
