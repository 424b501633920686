"""`python -m training.adversary OUT`: the experiment with models of the catalog on introductions of Wikipedia, as JSON and a plot.

Loads the models, builds the tools, calls the experiment; nothing is decided here.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import torch

from kernels.ops import select_ops
from service.catalog import resolve
from service.codec.prompt import Codec, load_codec
from service.errors import StartupError
from service.model.encoder import build_encoder
from service.model.encoder_config import read_encoder_config
from service.model.families import read_config
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.weights import open_encoder_weights, open_weights
from service.settings import DEFAULT_MODEL
from training.adversary.classifier import Features
from training.adversary.experiment import Design, Experiment, Ids, Point, Tools, record
from training.adversary.features import Reader, decoder_features
from training.data.text import load_text
from training.generate import Sampling, generate

JUDGE = "all-minilm-l6-v2"
NO_END = -1
"""An id that is never drawn."""


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="The generator, as the catalog resolves it.")
@click.option("--prompts", type=click.IntRange(20), default=Design().prompts, show_default=True, help="That are judged.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(out: Path, model: str, prompts: int, seed: int) -> None:
    """Measure discriminator-reranked best-of-8 beside a sweep of temperatures. OUT holds texts, features, results.json and results.png."""
    design = replace(Design(), prompts=prompts, seed=seed)
    path = resolve(model).path
    codec = load_codec(path)
    about = {
        "generator": f"{model}, int8",
        "discriminator": "mean hidden states of the generator",
        "judge": f"{JUDGE}: reply, and its product with the prompt",
    }
    about |= {"texts": "held-out introductions of Wikipedia; learned from others", "machine": platform.machine()}
    experiment = Experiment(design, _tools(path, codec, design), *_documents(codec, design), out, about)
    points = experiment.run(click.echo)
    real = experiment.real_diversity()
    (out / "results.json").write_text(record(points, design, real, about), encoding="utf-8")
    _plot(points, real, out / "results.png")


def _documents(codec: Codec, design: Design) -> tuple[Ids, Ids]:
    """Introductions without their titles: the held-out ones to be judged, others to learn from. Raises: StartupError for too few."""
    texts = load_text(("wikipedia",))
    least = design.prompt_len + design.reply_len
    found = []
    for documents, count in ((texts.held_out, design.prompts), (texts.train, design.learned)):
        encoded = (codec.tokenizer.encode(each.partition("\n")[2]) for each in documents)
        long = [ids for ids, _ in zip((ids for ids in encoded if len(ids) >= least), range(count), strict=False)]
        if len(long) < count:
            raise StartupError(f"only {len(long)} introductions are long enough; ask for fewer prompts")
        found.append(long)
    return found[0], found[1]


def _tools(path: Path, codec: Codec, design: Design) -> Tools:
    config = read_config(path).with_max_context(design.prompt_len + design.reply_len + 8)
    ops = select_ops("cpu")
    model = build_transformer(config, open_weights(path, config), ops, precision=Precision(torch.float32, "int8"))
    judge_path = resolve(JUDGE).path
    encoder_config = read_encoder_config(judge_path)
    if encoder_config is None:
        raise StartupError(f"{JUDGE} is no encoder")
    encoder = build_encoder(encoder_config, open_encoder_weights(judge_path, encoder_config), dtype=torch.float32)
    return Tools(
        generate=partial(_continued, model, design),
        write=codec.tokenizer.decode,
        rank_features=partial(decoder_features, model),
        judge_features=partial(_judged, Reader(encoder, load_codec(judge_path)), codec),
    )


def _continued(model: Transformer, design: Design, prompts: Ids, temperature: float, seed: int) -> Ids:
    """All of one length, like the real ones, which diversity and the judge need: an end is an id like any other."""
    return generate(model, prompts, Sampling(temperature, seed=seed, max_tokens=design.reply_len), eos_id=NO_END)


def _judged(reader: Reader, codec: Codec, prompts: Ids, replies: Ids) -> Features:
    return reader([codec.tokenizer.decode(each) for each in prompts], [codec.tokenizer.decode(each) for each in replies])


def _plot(points: Sequence[Point], real: tuple[float, float], path: Path) -> None:
    from matplotlib.figure import Figure  # takes a second to import, after minutes of work

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for column, (name, label) in enumerate(
        (("distinct_2", "distinct-2 (more diverse to the right)"), ("self_bleu", "self-BLEU (more diverse to the left)")), 1
    ):
        axes = figure.add_subplot(1, 2, column)
        for candidates, style in ((1, "o-"), (max(each.candidates for each in points), "s")):
            some = sorted((each for each in points if each.candidates == candidates), key=lambda each: each.temperature)
            x, y = [getattr(each, name) for each in some], [each.accuracy for each in some]
            axes.errorbar(
                x, y, [each.error for each in some], fmt=style, capsize=2, label="one" if candidates == 1 else f"best of {candidates}"
            )
            for each, at, height in zip(some, x, y, strict=True):
                axes.annotate(f"T {each.temperature:g}", (at, height), textcoords="offset points", xytext=(5, 5), fontsize=8)
        axes.axvline(real[column - 1], color="grey", linestyle=":", label="real texts")
        axes.set(xlabel=label, ylabel="judge's accuracy (0.5: can't tell)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
