"""The tables of the model's page: figures as Markdown, and which goals they meet. The words around them are in pages/.

Functions from values to text; no file is read or written. Called by the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from training.arms import ABLATIONS
from training.evaluate.reconstruction import UNSEEN_STYLE

Figures = Mapping[str, Any]

MEANT = {
    "adversary": "The image tokenizer's second stage: its decoder against the adversary, or as many steps of reconstruction. Told from "
    "real: how often a fresh classifier, taught on two thirds of the scenes, is right on the others; 0.5 is a guess. Trained on the "
    "recipe's pictures, measured on scenes.",
    "attention": "Local layers with some global ones among them, or all layers global.",
    "tasks": "All tasks in one mix, or drawing or describing alone for as many steps.",
    "pretraining": "No pre-training; pre-training on pictures without words; or as many steps in all, spent on the tasks.",
}
"""What each ablation compares."""
KINDS = {"trained": "trained", "triple": "held-out triple", "pair": "held-out pair"}
RUNS = ("sampled", "greedy", "sampled, Chinese")
WORLD_GOALS = {"draw": 0.8, "describe": 0.85, "ask": 0.85, "count": 0.85, "edit": 0.7, "move": 0.6}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def share(found: Figures) -> str:
    """With its 95 % interval: "97.2 % (96.0-98.1)"."""
    return f"{percent(found['share'])} ({100 * found['low']:.1f}-{100 * found['high']:.1f})"


def tables(figures: Figures) -> dict[str, str]:
    """By the names that the pages know them under; empty where there is nothing to tell."""
    found = {
        "goals": table(("figure", "goal", "measured", ""), [(*each[:3], "met" if each[3] else "**missed**") for each in goals(figures)]),
        "training": _training(figures["training"].get("stages", {})),
        "reconstruction": _reconstruction(figures),
        "world": _world(figures["world"]),
        "free": _free(figures["world"]),
        "text": _text(figures["text"]),
        "card": _card(figures["world"]),
    }
    return found | (_memory(figures["memory"]) if figures["memory"] else {})


def _training(stages: Figures) -> str:
    rows = [
        (name, f"{each['step']:,.0f}", f"{each['seconds'] / 60:.1f}", each["hardware"], _watched(each)) for name, each in stages.items()
    ]
    return table(("stage", "steps", "minutes of steps", "on", "watched, at the end"), rows) if rows else ""


def _watched(stage: Figures) -> str:
    """Nats an id of each source, or how close pictures come."""
    watched = stage["watched"]
    if "minus_psnr" in watched:
        return f"{-watched['minus_psnr']:.2f} dB, {percent(watched['codes_used'])} of the codes used"
    return ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in watched.items() if name != "held_out")


def _reconstruction(figures: Figures) -> str:
    before = figures["training"].get("before_adversary", {})
    rows = []
    for name, after in figures["reconstruction"].items():
        was = before.get(name)
        quality, energy = (f"{was['psnr_db']:.2f}", f"{was['gradient_energy']:.2f}") if was else ("", "")
        use = f"{percent(after['codes_used'])}, {after['perplexity']:.0f}"
        rows.append((name, f"{after['n']:,}", quality, f"{after['psnr_db']:.2f}", energy, f"{after['gradient_energy']:.2f}", use))
    return table(("pictures", "n", "PSNR before, dB", "after", "edge energy before", "after", "codes used, perplexity"), rows)


def _memory(found: Figures) -> dict[str, str]:
    rows = [_drawn_row(f"trained, {run}", found["trained"][run]) for run in RUNS]
    if "held_out" in found:
        rows += [_drawn_row(f"held out, {run}", found["held_out"][run]) for run in RUNS]
        rows.append(_drawn_row("held out: a copy of the other style", found["held_out"]["copy_baseline"]))
    names = [_named_row(name, each) for name, each in found["named"].items()]
    return {
        "drawn": table(("prompts", "n", "right emoji", "right style", "exact picture", "all codes equal"), rows),
        "named": table(("naming", "n", "name, English", "name, Chinese", "any tag right", "F1 of tags"), names),
    }


def _drawn_row(name: str, run: Figures) -> tuple[str, ...]:
    return name, f"{run['emoji']['n']:,}", *(share(run[key]) for key in ("emoji", "style", "picture")), percent(run["codes"]["share"])


def _named_row(name: str, found: Figures) -> tuple[str, ...]:
    labels, tags = [found[lang]["label"] for lang in ("en", "zh")], found["tags"]
    return name, f"{labels[0]['n']:,}", *(share(each) for each in labels), share(tags["any"]), f"{tags['f1']:.2f}"


def _world(tasks: Figures) -> str:
    rows = [(name, KINDS[kind], *_world_row(found)) for name, kinds in tasks.items() for kind, found in kinds.items()]
    head = ("task", "combinations", "n", "all right", "English", "Chinese", "things, attributes, background right", "those of a copy")
    return table(head, rows)


def _world_row(found: Figures) -> tuple[str, ...]:
    shares = (percent(found["en"]["share"]), percent(found["zh"]["share"]))
    return str(found["right"]["n"]), share(found["right"]), *shares, _parts(found), _parts(found.get("copy", {}))


def _parts(found: Figures) -> str:
    return ", ".join(percent(found[part]) for part in ("things", "attributes", "background")) if "things" in found else ""


def _free(tasks: Figures) -> str:
    rows = []
    for name, kinds in tasks.items():
        own = [found["free"] for found in kinds.values()]
        cells = [f"{percent(each['form']['share'])}, {percent(each['right']['share'])}" for each in own]
        rows.append((name, str(min(each["form"]["n"] for each in own)), *cells))
    return table(("task: right kind of answer, all right", "n", *KINDS.values()), rows)


def _card(tasks: Figures) -> str:
    rows = [(name, *(share(kinds[kind]["right"]) for kind in KINDS)) for name, kinds in tasks.items()]
    return table(("task of the world, all right", *KINDS.values()), rows)


def _text(sources: Figures) -> str:
    rows = [
        (name, f"{each['documents']:,}", f"{each['bytes']:,}", f"{each['bits_per_byte']:.3f}", f"{each['nats_per_token']:.3f}")
        for name, each in sources.items()
    ]
    return table(("source", "documents", "bytes", "bits per byte", "nats per token"), rows)


Goal = tuple[str, str, str, bool]
"""What, the goal, the figure, and whether it was met."""


def goals(figures: Figures) -> list[Goal]:
    """What was aimed at, and what was measured."""
    found = _picture_goals(figures)
    if memory := figures["memory"]:
        named = memory["named"]
        found.append(_at_least("right emoji, trained prompts, sampled", 0.95, memory["trained"]["sampled"]["emoji"]["share"]))
        found.append(_at_least("names of trained pictures", 0.95, named["trained"]["en"]["label"]["share"]))
        found.append(_at_least("names of fresh augmentations of them", 0.85, named["augmented"]["en"]["label"]["share"]))
    for name, goal in WORLD_GOALS.items():
        worst = min(figures["world"][name][kind]["right"]["share"] for kind in ("triple", "pair"))
        found.append(_at_least(f"{name}, combinations never trained", goal, worst))
    return found


def _picture_goals(figures: Figures) -> list[Goal]:
    after, before = figures["reconstruction"], figures["training"].get("before_adversary", {})
    found = []
    for name in [each for each in after if each.startswith("emoji")]:
        if name in before:
            found.append(_at_least(f"PSNR before the adversary, {name}", 24.0, before[name]["psnr_db"], _decibels))
        found.append(_at_least(f"PSNR after it, {name}", 23.5, after[name]["psnr_db"], _decibels))
        energy = after[name]["gradient_energy"]
        found.append((f"edge energy, {name}", "0.90 to 1.10", f"{energy:.2f}", 0.9 <= energy <= 1.1))
        if UNSEEN_STYLE not in name:
            found.append(_at_least(f"codebook use, {name}", 0.9, after[name]["codes_used"]))
    found.append(_at_least("codes that a thing keeps", 0.7, figures["stability"]["share"]))
    found.append(_at_least("the judge on real scenes", 0.99, figures["reader"]["real"]["share"]))
    found.append(_at_least("the judge on reconstructed scenes", 0.97, figures["reader"]["reconstructed"]["share"]))
    return found


def _decibels(value: float) -> str:
    return f"{value:.2f} dB"


def _at_least(what: str, goal: float, value: float, words: Callable[[float], str] = percent) -> Goal:
    return what, f"at least {words(goal)}", words(value), value >= goal


def ablations(records: Sequence[Figures]) -> list[dict[str, str]]:
    """Those of which two arms or more have been run: name, meaning, seeds, n and table.

    Raises: ValueError when arms that stand beside each other were run with different recipes or budgets.
    """
    found = []
    for name, arms in ABLATIONS.items():
        own = {arm: [each for each in records if each["arm"] == arm] for arm in arms}
        own = {arm: each for arm, each in own.items() if each}
        if len(own) > 1:
            if len({each["setting"] for arm in own.values() for each in arm}) > 1:
                raise ValueError(f"the arms of {name} were run with different recipes or budgets; run them again with one")
            seeds = ", ".join(f"{arm} {len(each)}" for arm, each in own.items())
            count = min(each["n"] for arm in own.values() for each in arm)
            found.append({"name": name, "meaning": MEANT[name], "seeds": seeds, "n": str(count), "table": _arms(own)})
    return found


def _arms(own: Mapping[str, Sequence[Figures]]) -> str:
    """A column an arm. Figures of one task, "draw, right" and "draw, nats per code", share a row; "-" where an arm does not have one."""
    keys = list(dict.fromkeys(key for records in own.values() for each in records for key in each["figures"]))
    tasks = list(dict.fromkeys(key.partition(", ")[0] for key in keys))
    rows = []
    for task in tasks:
        parts = [key for key in keys if key.partition(", ")[0] == task]
        name = ": ".join(filter(None, (task, "; ".join(filter(None, (key.partition(", ")[2] for key in parts))))))
        rows.append((name, *("; ".join(_figure(records, key) for key in parts) for records in own.values())))
    rows.append(("steps; minutes", *(_cost(records) for records in own.values())))
    return table(("figure", *own), rows)


def _figure(records: Sequence[Figures], key: str) -> str:
    return _spread([each["figures"][key] for each in records if key in each["figures"]])


def _cost(records: Sequence[Figures]) -> str:
    return f"{records[0]['steps']:,.0f}; {_spread([each['seconds'] / 60 for each in records])}"


def _spread(values: Sequence[float]) -> str:
    """Mean, least and most."""
    return f"{sum(values) / len(values):.3g} ({min(values):.3g}-{max(values):.3g})" if values else "-"
