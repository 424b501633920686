"""A step that is planned and not yet committed: the plan made of what was chosen, and whose each of its samples and reads is.

Decides nothing: who runs was `roster`'s affair, what becomes of drawn ids is `scheduler`'s, its only caller.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from service.scheduling.grammar import GrammarError
from service.scheduling.plan import Drawn, PictureWork, PromptRead, Sample, Slice, StepPlan
from service.scheduling.reader import PromptReader
from service.scheduling.roster import Choice
from service.scheduling.sequence import Gang, Sequence
from service.vocabulary import PictureIds


@dataclass(frozen=True, slots=True)
class Flight:
    """sampled: the gang of each sample. readers: in the order of the plan's reads. ending: the gangs that end with their prompt, because
    they want no id. concluded: indexes of samples whose grammars allow no id. foreseen: the gangs whose tokens of it count as computed
    already, because another step was planned behind it."""

    plan: StepPlan
    chosen: Choice
    sampled: list[Gang]
    ending: list[Gang]
    readers: list[PromptReader]
    concluded: dict[int, GrammarError | None] = field(default_factory=dict)
    foreseen: set[Gang] = field(default_factory=set)

    def by_gang(self, drawn: SequenceOf[Drawn]) -> dict[Gang, list[Drawn]]:
        """What was drawn for each gang, in the order of its samples."""
        found: dict[Gang, list[Drawn]] = {}
        for gang, one in zip(self.sampled, drawn, strict=True):
            found.setdefault(gang, []).append(one)
        return found


def make_flight(
    step_id: int, chosen: Choice, work: tuple[PictureWork, ...], released: tuple[int, ...], pictures: PictureIds | None
) -> Flight:
    """released: sequences whose state the runner may forget. pictures: which ids are codes, of a model that must be told."""
    pieces = [
        (sequence, tokens) for gang, counts in chosen.items() for sequence, tokens in zip(gang.sequences, counts, strict=True) if tokens
    ]
    pieces.sort(key=lambda piece: piece[1] > 1)  # stable: one token each first, as attention wants it
    indexes = {sequence: index for index, (sequence, _) in enumerate(pieces)}
    slices = tuple(_make_slice(sequence, tokens, pictures) for sequence, tokens in pieces)
    whole = [gang for gang, counts in chosen.items() if sum(counts) == gang.num_pending]
    drawing = [gang for gang in whole if gang.params.max_tokens]
    sampled = [gang for gang in drawing for _ in range(gang.num_drafts + 1)]
    samples = tuple(
        _make_sample(gang, tuple(indexes[sequence] for sequence in gang.sequences), ahead)
        for gang in drawing
        for ahead in range(gang.num_drafts + 1)
    )
    reads = [
        (gang.reader, read)
        for gang, counts in chosen.items()
        if gang.reader is not None and counts[0] and (read := _make_read(gang.reader, gang, counts[0], indexes)) is not None
    ]
    encode, draw = tuple(one for one in work if one.pixels), tuple(one for one in work if one.codes)
    plan = StepPlan(step_id, slices, samples, released, encode, draw, tuple(read for _, read in reads))
    ending = [gang for gang in whole if not gang.params.max_tokens] if len(drawing) < len(whole) else []
    return Flight(plan, chosen, sampled, ending, [reader for reader, _ in reads])


def _make_slice(sequence: Sequence, num_tokens: int, pictures: PictureIds | None) -> Slice:
    start, end = sequence.num_computed, sequence.num_computed + num_tokens
    grid_starts = sequence.find_grid_starts(pictures, start, end) if pictures is not None else ()
    return Slice(
        sequence.sequence_id, start, tuple(sequence.tokens[start:end]), sequence.freeze_tables(), grid_starts, start < sequence.num_known
    )


def _make_read(reader: PromptReader, gang: Gang, num_tokens: int, indexes: dict[Sequence, int]) -> PromptRead | None:
    first = gang.sequences[0]
    return reader.next_read(first.sequence_id, indexes[first], first.num_computed, num_tokens)


def _make_sample(gang: Gang, slice_indexes: tuple[int, ...], ahead: int) -> Sample:
    """ahead: how many guesses come before the id."""
    first = gang.sequences[0]
    num_generated = gang.num_generated + gang.is_ahead + ahead
    return Sample(
        sequence_id=first.sequence_id,
        slice_indexes=slice_indexes,
        params=gang.params,
        position=len(first.tokens) - gang.num_drafts + ahead,
        num_generated=num_generated,
        history=tuple(first.tokens) if gang.params.has_penalties else None,
        prompt_len=gang.prompt_len,
        banned=gang.params.stop_ids if num_generated < gang.params.min_tokens else (),
        guidance=gang.request.guidance,
        back=gang.num_drafts - ahead,
    )


def settle_drafts(gang: Gang, drawn: SequenceOf[Drawn]) -> int:
    """How many leading guesses of a gang were drawn; its sequences keep those alone. Mutates: gang."""
    tokens, count = gang.sequences[0].tokens, gang.num_drafts
    guessed = tokens[len(tokens) - count :]
    num_right = next((place for place in range(count) if guessed[place] != drawn[place].token), count)
    if gang.drafter is not None:
        gang.drafter.learn(len(tokens) - count, [one.token for one in drawn])
    for sequence in gang.sequences:
        sequence.drop(count - num_right)
    gang.num_drafts = 0
    return num_right
