"""What a grammar is to the scheduler: something that takes each drawn id and says when the text is complete. Stdlib only.

The ids that may be drawn next travel as a bit mask beside the plan, from whoever owns the grammar (`engine/constraint`) to the sampler;
nothing here computes one. Called by `scheduler.commit`.
"""

from __future__ import annotations

from typing import Protocol


class Grammar(Protocol):
    """The state of one choice's text. Made by the engine for each choice, carried by its gang, kept over preemptions."""

    def accept(self, token: int) -> bool:
        """Takes the id that was drawn. True when the text is complete and nothing may follow: the choice ends with "stop".

        Mutates: the grammar. Raises: GrammarError when the id does not fit or the grammar can't go on; that ends the choice with "error".
        """

    def forced(self) -> tuple[int, ...]:
        """Ids that have to come next and need not be drawn. Each is given to `accept` like the others."""

    @property
    def num_free(self) -> int:
        """How many ids may be drawn one after the other under the mask that the next one has; 1 when nothing is known of the second."""

    @property
    def is_open(self) -> bool:
        """Will nothing be forced behind the next id, whatever it is? Its place can then be computed before anybody knows it."""

    @property
    def draws_code(self) -> bool:
        """Is the next id the code of a picture?"""


class GrammarError(Exception):
    """A grammar could not go on. The message is fit for a client; status: of the HTTP answer, 400 when the grammar itself is at fault."""

    def __init__(self, message: str, *, status: int = 500) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
