"""What guessing ids ahead is worth for text: the same requests with and without, in one process, in turn; the ids must be the same.

    python -m bench.speculation                       copying, editing and free writing, 1, 4 and 16 at once
    python -m bench.speculation --draft-layers 8      with a draft model too: the first layers of the model itself

Without a draft model what followed the last ids where they stood before is guessed (`service/scheduling/drafts`). A draft model cut out
of the model is a poor one, and as slow as its head; it shows what a draft model costs that is seldom right. All layers are one that is
always right and gains nothing.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from bench.lane import Loop, load_lane, with_draft
from bench.probe import describe_machine
from service.catalog import resolve
from service.codec.prompt import load_codec
from service.engine.draft_pace import DraftPace
from service.engine.messages import Load
from service.runner.load import Loaded
from service.scheduling.sampling import SamplingParams

NAME = "smollm2-135m-instruct"
PASSAGE = (
    "The harbour of Lynmouth lies where two rivers meet. In 1952 a storm on the moor above filled both of them within a night, and the "
    "water carried boulders of ten tons through the middle of the village. Thirty-four people lost their lives, and more than a hundred "
    "houses were damaged or swept away. The village was rebuilt with a wider bed for the rivers, and the old lighthouse at the end of the "
    "pier, which the flood had taken, was put up again stone by stone. "
)
TASKS = {
    "copy": f"Repeat the following text word for word.\n\n{PASSAGE}",
    "edit": f"Rewrite the following text and change nothing but the year, which must be 1953.\n\n{PASSAGE}",
    "answer": f"{PASSAGE}\n\nAccording to the text, what happened to the lighthouse? Quote the sentence.",
    "free": "Write a short story about a fox who learns to swim.",
}


@dataclass(frozen=True, slots=True)
class Options:
    draft_len: int
    max_drafting: int
    max_tokens: int
    temperature: float


def run(loop: Loop, prompts: list[list[int]], draft_len: int, params: SamplingParams) -> dict[str, Any]:
    """Decodes all prompts together. steps, seconds: from the first drawn id of all to the end."""
    for number, prompt in enumerate(prompts):
        loop.add(str(number), prompt, params, draft_len=draft_len)
    while not all(loop.ids.values()):
        loop.step()
    num_before = len(loop.durations)
    while loop.scheduler.has_work:
        loop.step()
    drafts = loop.scheduler.stats.drafts["model"]
    return {"ids": loop.ids, "steps": len(loop.durations) - num_before, "seconds": sum(loop.durations[num_before:]), "drafts": drafts}


def pair(lanes: tuple[Loaded, Loaded], message: Load, prompts: list[list[int]], options: Options, pace: DraftPace) -> list[dict[str, Any]]:
    """A run without guesses and one with them. pace: what was learned about the draft model so far, if there is one."""
    params = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature, seed=1)
    with_drafts = Loop(lanes[1], message, options.max_drafting)
    if with_drafts.lane.drafting is not None:
        with_drafts.lane.drafting.pace = pace
    runs = [run(Loop(lanes[0], message), prompts, 0, params), run(with_drafts, prompts, options.draft_len, params)]
    if runs[0]["ids"] != runs[1]["ids"]:
        raise click.ClickException("guessing changed an id")
    return runs


@click.command(context_settings={"show_default": True})
@click.option("--users", multiple=True, type=click.IntRange(1, 64), default=(1, 4, 16), help="Requests at once; repeatable.")
@click.option("--draft-len", default=8)
@click.option("--max-drafting", default=0, help="Sequences, above which nothing is guessed; 0 for what is usual.")
@click.option("--rounds", default=4, help="Pairs of runs, with and without in turn.")
@click.option("--max-tokens", default=120)
@click.option("--temperature", default=0.0)
@click.option("--draft-layers", default=0, help="Of the model, from its beginning, that make the draft model; 0 for none.")
@click.option("--tasks", multiple=True, type=click.Choice(list(TASKS)), default=tuple(TASKS), help="Repeatable.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
def main(users: tuple[int, ...], tasks: tuple[str, ...], rounds: int, draft_layers: int, json_path: Path | None, **values: Any) -> None:
    """Measure prompt lookup, and a draft model behind it."""
    options = Options(**values)
    codec = load_codec(resolve(NAME).path, name=NAME)
    loaded, message = load_lane(NAME, has_prefix_cache=False)
    lanes, pace, rows = (loaded, with_draft(loaded, range(draft_layers)) if draft_layers else loaded), DraftPace(), []
    click.echo(f"{'task':>8} {'users':>6} {'tokens a step':>14} {'with':>8} {'faster':>9} {'least':>7} {'most':>7} {'draft model':>12}")
    for task in tasks:
        for count in users:
            prompts = [
                codec.encode_chat(
                    [{"role": "system", "content": f"You are assistant number {number}."}, {"role": "user", "content": TASKS[task]}]
                )
                for number in range(count)
            ]
            pairs = [pair(lanes, message, prompts, options, pace) for _ in range(rounds)]
            ratios = [one["seconds"] / other["seconds"] for one, other in pairs]
            num_tokens = sum(map(len, pairs[0][0]["ids"].values())) - count
            per_step = [num_tokens / count / each["steps"] for each in pairs[0]]
            drafts = [sum(each[1]["drafts"][place] for each in pairs) for place in (0, 1)]
            row = {"task": task, "users": count, "tokens_per_step": per_step, "speed_up": statistics.median(ratios), "all": ratios}
            rows.append({**row, "model_drafts": drafts})
            spread = f"{row['speed_up']:>7.2f} x {min(ratios):>7.2f} {max(ratios):>7.2f}"
            click.echo(f"{task:>8} {count:>6} {per_step[0]:>14.2f} {per_step[1]:>8.2f} {spread} {drafts[1]:>5} of {drafts[0]}")
    if json_path is not None:
        told = {**asdict(options), "rounds": rounds, "draft_layers": draft_layers}
        json_path.write_text(json.dumps({"machine": describe_machine(), "options": told, "figures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
