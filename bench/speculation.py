"""What guessing ids ahead is worth for text: the same requests with and without, in one process, in turn; the ids must be the same.

    python -m bench.speculation                       copying, editing and free writing, 1, 4 and 16 at once

Prompt lookup alone: what followed the last ids where they stood before is guessed (`service/scheduling/drafts`).
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import click

from bench.lane import Loop, load_lane
from bench.probe import describe_machine
from service.catalog import resolve
from service.codec.prompt import load_codec
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


def run(loaded: Loaded, message: Load, prompts: list[list[int]], draft_len: int, max_tokens: int, max_drafting: int) -> dict[str, Any]:
    """Decodes all prompts together. steps, seconds: from the first drawn id of all to the end."""
    loop = Loop(loaded, message, max_drafting)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    for number, prompt in enumerate(prompts):
        loop.add(str(number), prompt, params, draft_len=draft_len)
    while not all(loop.ids.values()):
        loop.step()
    num_before = len(loop.durations)
    while loop.scheduler.has_work:
        loop.step()
    return {"ids": loop.ids, "steps": len(loop.durations) - num_before, "seconds": sum(loop.durations[num_before:])}


@click.command(context_settings={"show_default": True})
@click.option("--users", multiple=True, type=click.IntRange(1, 64), default=(1, 4, 16), help="Requests at once; repeatable.")
@click.option("--draft-len", default=8)
@click.option("--max-drafting", default=0, help="Sequences, above which nothing is guessed; 0 for what is usual.")
@click.option("--rounds", default=4, help="Pairs of runs, with and without in turn.")
@click.option("--max-tokens", default=120)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
def main(users: tuple[int, ...], draft_len: int, max_drafting: int, rounds: int, max_tokens: int, json_path: Path | None) -> None:
    """Measure prompt lookup."""
    codec = load_codec(resolve(NAME).path, name=NAME)
    loaded, message = load_lane(NAME, has_prefix_cache=False)
    rows = []
    click.echo(f"{'task':>8} {'users':>6} {'tokens a step':>14} {'with':>8} {'faster':>9} {'least':>7} {'most':>7}")
    for task, text in TASKS.items():
        for count in users:
            prompts = [
                codec.encode_chat([{"role": "system", "content": f"You are assistant number {number}."}, {"role": "user", "content": text}])
                for number in range(count)
            ]
            pairs = []
            for _ in range(rounds):
                without = run(loaded, message, prompts, 0, max_tokens, max_drafting)
                guessed = run(loaded, message, prompts, draft_len, max_tokens, max_drafting)
                if without["ids"] != guessed["ids"]:
                    raise click.ClickException("guessing changed an id")
                pairs.append((without, guessed))
            ratios = [one["seconds"] / other["seconds"] for one, other in pairs]
            num_tokens = sum(map(len, pairs[0][0]["ids"].values())) - count
            per_step = [num_tokens / count / each["steps"] for each in pairs[0]]
            row = {"task": task, "users": count, "tokens_per_step": per_step, "speed_up": statistics.median(ratios), "all": ratios}
            rows.append(row)
            spread = f"{row['speed_up']:>7.2f} x {min(ratios):>7.2f} {max(ratios):>7.2f}"
            click.echo(f"{task:>8} {count:>6} {per_step[0]:>14.2f} {per_step[1]:>8.2f} {spread}")
    if json_path is not None:
        options = {"draft_len": draft_len, "rounds": rounds, "max_tokens": max_tokens, "max_drafting": max_drafting}
        json_path.write_text(json.dumps({"machine": describe_machine(), "options": options, "figures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
