"""What is sent: requests with prompts of an exact number of tokens, by the server's own count, because Braid has no tokenizers of others.

A session is a generator of requests that is given the text of each answer, so a conversation can send its history again.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from copy import copy
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from service.bench.options import CHAT, Options
from service.bench.server import RefusedError, Server
from service.errors import StartupError

# Common enough to be one token each, with a space before, in most vocabularies. Where they are not, `calibrate` finds those that are.
WORDS = tuple(
    "time year people way day man thing woman life child world school state family student group country problem hand part place "
    "case week company system program question work government number night point home water room mother area money story fact "
    "month lot right study book eye job word business issue side kind head house service friend father power hour game line end "
    "member law car city community name president team minute idea kid body information back parent face others level office door "
    "health person art war history party result change morning reason research girl guy moment air teacher force education".split()
)
FIRST = WORDS[0]
_FEW = 16  # words of one token each that are enough to write prompts with
PICTURES = (
    "cat face, noto style",
    "turtle, twemoji style",
    "red apple, noto style",
    "Draw a big red star in row 1, column 2, on sand.",
    "Draw a small blue circle in row 3, column 3, and a big green square in row 1, column 1, on white.",
)


@dataclass(frozen=True, slots=True)
class Request:
    """prompt_len: what the prompt was made to be, 0 if nobody knows. has_next: what is answered is needed for another one."""

    body: dict[str, Any]
    prompt_len: int = 0
    has_next: bool = False


Session = Generator[Request, str, None]


@dataclass(frozen=True)
class Lengths:
    """How words become tokens at this server. overhead: of a prompt without its words."""

    words: tuple[str, ...] = WORDS
    overhead: int = 0
    tokens_per_word: float = 1.0

    def num_words(self, tokens: int, what: str) -> int:
        """How many fill a prompt of so many tokens. Raises: StartupError when its frame alone is longer."""
        if tokens <= self.overhead:
            raise StartupError(f"{what} must be more than {self.overhead}, which a prompt of this server has without its words")
        return max(1, round((tokens - self.overhead) / self.tokens_per_word))

    def text(self, source: Random, count: int) -> str:
        """All begin with the same word: only behind others is a word known to be one token."""
        return " ".join((FIRST, *(source.choice(self.words) for _ in range(count - 1))))


class Dataset:
    """What the options want, written for one server. notes: what a reader of the figures has to know."""

    def __init__(self, options: Options, model: str) -> None:
        self.options = options
        self.lengths = Lengths()
        self.notes: list[str] = []
        self._is_chat = options.route == CHAT
        self._has_system = options.dataset_name == "shared-prefix"
        self._sampling = {"temperature": options.temperature} | ({"ignore_eos": True} if options.ignore_eos else {})
        self._model = {"model": model} if model else {}

    async def calibrate(self, server: Server) -> None:
        """Mutates: lengths, notes. Raises: StartupError when the server refuses the simplest request."""
        if self.options.dataset_name == "pictures":
            return

        async def count(*words: str) -> int:
            """Tokens of a prompt of FIRST (in every part of it) and these words, less one for each word."""
            parts = [FIRST, " ".join((FIRST, *words))] if self._has_system else [" ".join((FIRST, *words))]
            body = {**self._model, **self._sampling, "max_tokens": 1, **self._prompt(parts)}
            return await server.prompt_tokens(self.options.route, body) - len(words) - len(parts)

        try:
            overhead = await count(*WORDS)
        except RefusedError as error:
            if "ignore_eos" not in error.answer or "ignore_eos" not in self._sampling:
                raise
            del self._sampling["ignore_eos"]
            self.notes.append("the server refuses ignore_eos: answers may be shorter than asked for")
            overhead = await count(*WORDS)
        if overhead < 0:
            self.notes.append("the server does not count prompts: a word is taken for a token")
            return
        excess = await count(*WORDS, *WORDS) - overhead
        if not excess:
            self.lengths = Lengths(WORDS, overhead)
            return
        alone = await count()
        words = tuple([word for word in WORDS if await count(*[word] * 8) == alone])
        if len(words) < _FEW:
            per_word = 1 + excess / len(WORDS)
            self.notes.append(f"few words are one token at this server: a word is taken for {per_word:.2f}, and lengths are near misses")
            self.lengths = Lengths(WORDS, alone, per_word)
        else:
            self.lengths = Lengths(words, alone)

    def with_short_answers(self, most: int) -> Dataset:
        """To warm a server up with."""
        other = copy(self)
        other.options = replace(self.options, random_output_len=min(most, self.options.random_output_len), think_time=0.0)
        return other

    def sessions(self, salt: str = "") -> Iterator[Session]:
        """Without end, each seeded by its number. salt: others than without it."""
        options = self.options
        system = ""
        if self._has_system:
            num_words = self.lengths.num_words(options.shared_prefix_len, "--shared-prefix-len")
            system = self.lengths.text(Random(f"{options.seed}/system"), num_words)
        for number in itertools.count():
            source = Random(f"{options.seed}/{salt}/{number}")
            if options.dataset_name == "pictures":
                yield self._picture(source)
            else:
                yield self._conversation(source, system)

    def _picture(self, source: Random) -> Session:
        body = {**self._model, "prompt": source.choice(PICTURES), "seed": source.randrange(2**31)}
        yield Request({**body, "stream": True, "partial_images": self.options.partial_images})

    def _conversation(self, source: Random, system: str) -> Session:
        """Questions of one length; with num_turns each is sent behind all that was said before."""
        options, lengths = self.options, self.lengths
        # The frame is counted once: with a shared prefix as part of that.
        own = replace(lengths, overhead=0) if system else lengths
        num_words = own.num_words(options.random_input_len, "--random-input-len")
        num_turns = options.num_turns if options.dataset_name == "multi-turn" else 1
        prompt_len = options.random_input_len + (options.shared_prefix_len if system else 0)
        said = [system] if system else []
        for turn in range(num_turns):
            said.append(lengths.text(source, num_words))
            body = {**self._model, **self._sampling, "max_tokens": options.random_output_len, "stream": True}
            body |= {"stream_options": {"include_usage": True}, **self._prompt(said)}
            answer = yield Request(body, 0 if turn else prompt_len, turn + 1 < num_turns)
            said.append(answer)

    def _prompt(self, said: list[str]) -> dict[str, Any]:
        if not self._is_chat:
            return {"prompt": " ".join(said)}
        roles = itertools.chain(["system"] if self._has_system else [], itertools.cycle(("user", "assistant")))
        return {"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]}
