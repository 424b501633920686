"""From a `Load` message to runners: back end, config, weights, memory budget, K/V pool, warm-up, as one straight line per model.

Called once by `service/worker.py`. Numbers derived here (blocks, dtype) are returned in `ModelInfo`, never written back.
More than 350 lines, because the line passes the special kinds in turn: draft models, encoders, painters, shares of a split model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from kernels.cpu.library import load as native_library
from kernels.ops import Ops, select_ops
from service.engine.messages import Load, ModelInfo, ModelSource
from service.errors import StartupError
from service.memory import available_bytes
from service.model.config import ModelConfig
from service.model.encoder import Encoder, build_encoder
from service.model.encoder_config import EncoderConfig, read_encoder_config
from service.model.families import read_config
from service.model.prepared import Shelf, open_shelf
from service.model.rotation import TensorSource
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.vq_files import FOLDER, read_image_tokenizer
from service.model.weights import open_encoder_weights, open_weights
from service.runner.encoder import EncoderRunner
from service.runner.image_tokenizer import Painter
from service.runner.kv_cache import QUANTISED, KVCache, KVLayout, partition_layers
from service.runner.parallel import Leader, Peers, Share, ShareSource, add_up, gather_head, join, lead, split_ops
from service.runner.runner import Runner
from service.runner.warmup import CompileWatch, Limits, keep_kernels, run_steps, warm_up
from service.scheduling.plan import KVGroup, RunnerCounts, Slice, StepPlan

BLOCK_SIZE = 16
# Without --memory: half of what is free once the weights are in, and no more than this, is K/V. On a CPU untouched pages cost nothing.
MOST_KV_BYTES_CPU = 4 * 2**30
# Ids guessed ahead on a CPU while few are served: of 2 to 16, 8 was the fastest for pictures (docs/results/pictures.json). On a GPU steps
# with guesses have no graph, and nothing was measured.
DRAFT_LEN_CPU = 8
# That a draft model guesses for at once: as many as may run while the scheduler has ids guessed.
DRAFTED_SEQUENCES = 4
_DRAFT_NAME = "/draft"  # no model has a slash at its front


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that can run: what the engine makes a lane of. draft: another, which guesses ids for it. ahead: the runner, where its steps
    may be begun one ahead. counts: of its runner."""

    info: ModelInfo
    runner: Runner | EncoderRunner | Leader
    groups: tuple[KVGroup, ...]
    painter: Painter | None = None
    draft: Loaded | None = None
    ahead: Runner | None = None
    counts: Callable[[], RunnerCounts] = RunnerCounts


@dataclass(frozen=True, slots=True)
class Storage:
    """What --dtype means on a device: its name, how the model is held, and the dtype of K/V; local_kv_dtype: of layers with a window,
    where that is another."""

    name: str
    precision: Precision
    kv_dtype: torch.dtype
    local_kv_dtype: torch.dtype | None = None


def choose_storage(dtype: str, device: torch.device, kv_dtype: str = "auto") -> Storage:
    """auto is bfloat16 on a GPU and int8 on a CPU, also for files of 4 bits: it reads prompts and serves crowds faster. Beside int8 and
    int4 K/V is int8 on a CPU. On a GPU, layers with a window are not quantised: of their few keys nothing is saved in a long context,
    and what is read of them costs more to widen than to read. Raises: StartupError for fp8 on a CPU, of weights and of K/V."""
    if dtype == "auto":
        dtype = "int8" if device.type == "cpu" else "bfloat16"
    storage = _choose_weights(dtype, device)
    if kv_dtype == "auto":
        return storage
    if kv_dtype == "fp8" and device.type == "cpu":
        raise StartupError("--kv-dtype fp8 runs on a GPU alone; use int8, bfloat16 or float32 on a CPU")
    chosen = torch.float8_e4m3fn if kv_dtype == "fp8" else getattr(torch, kv_dtype)
    local = storage.precision.dtype if chosen in QUANTISED and device.type != "cpu" else None
    return replace(storage, kv_dtype=chosen, local_kv_dtype=local)


def _choose_weights(dtype: str, device: torch.device) -> Storage:
    if dtype == "float32":
        return Storage(dtype, Precision(torch.float32), torch.float32)
    if dtype == "int8":
        if device.type == "cpu":
            return Storage(dtype, Precision(torch.float32, "int8"), torch.int8)
        return Storage(dtype, Precision(torch.bfloat16, "int8"), torch.bfloat16)
    if dtype == "int4":
        if device.type == "cpu":
            return Storage(dtype, Precision(torch.float32, "int4"), torch.int8)
        return Storage(dtype, Precision(torch.bfloat16, "int4"), torch.bfloat16)
    if dtype == "fp8":
        if device.type == "cpu":
            raise StartupError("--dtype fp8 runs on a GPU alone; on a CPU there are float32, bfloat16, int8 and int4")
        return Storage(dtype, Precision(torch.bfloat16, "fp8"), torch.bfloat16)
    return Storage(dtype, Precision(torch.bfloat16), torch.bfloat16)


def choose_encoder_storage(dtype: str) -> Storage:
    """An encoder is held in float32, unless bfloat16 is asked for. It has no K/V. In int8 the cosines of MiniLM's vectors are off by up to
    0.02, more than close texts differ by, and its post-norm layers leave no room for the rotation that helps a decoder."""
    name = "bfloat16" if dtype == "bfloat16" else "float32"
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    return Storage(name, Precision(kind), kind)


def choose_device(device: str) -> torch.device:
    """Raises: StartupError when CUDA is asked for and there is none, or none of that number."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise StartupError(f"--device {device}: this installation of torch finds no CUDA device; use --device cpu, or install a CUDA build")
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= (count := torch.cuda.device_count()):
        raise StartupError(f"--device {device}: torch finds {count} CUDA devices, cuda:0 to cuda:{count - 1}")
    return chosen


def load_models(load: Load, progress: Callable[[str, float], None], peers: Peers | None = None) -> list[Loaded]:
    """peers: the ranks that share each model, None for this process alone. Raises: StartupError or WeightsError with a message fit for
    people."""
    if load.threads or peers is not None:
        torch.set_num_threads(max((load.threads or torch.get_num_threads()) // load.tensor_parallel, 1))
    device = choose_device(load.device)
    if device.type == "cuda":
        keep_kernels(load.kernel_folder)
        if device.index is not None:
            torch.cuda.set_device(device)  # Triton launches on the current one, and graphs and events are its
    if load.deterministic and device.type == "cpu" and load.dtype in ("float32", "bfloat16"):
        raise StartupError(f"--deterministic with --dtype {load.dtype} needs a GPU; on a CPU int8 and int4 are deterministic")
    ops = select_ops("cpu" if device.type == "cpu" else "triton", load.deterministic)
    rank = 0
    if peers is not None:
        rank, device, ops = peers.rank, join(peers, device), split_ops(ops, add_up)
    models: list[_Read] = []
    sources = _sources(load)
    for source in sources:
        before = len(models)

        def report(fraction: float, before: int = before) -> None:
            progress("weights", (before + fraction) / len(sources))

        models.append(_load_model(source, load, ops, device, report, rank))
    if load.draft is not None:
        _check_draft(models[0], models[-1])
    painting = models if rank == 0 else []
    painters = {one.source.name: painter for one in painting if (painter := _load_painter(one.source, one.model, device)) is not None}
    held_bytes = sum(one.model.held_bytes for one in models) + sum(painter.held_bytes for painter in painters.values())
    mapped_bytes = sum(one.model.held_bytes for one in models if one.shelf is not None and one.shelf.is_filled)
    kv_bytes = _kv_budget(load, device, held_bytes, mapped_bytes)
    budgets = _kv_budgets(models, load, kv_bytes if peers is None else peers.least(kv_bytes))
    if peers is not None:
        for index, one in enumerate(models):
            gather_head(cast(Transformer, one.model), index, peers)  # encoders have been refused
    num_threads = torch.get_num_threads()
    loaded: list[Loaded] = []
    for one in models:
        name = one.source.name
        progress("kv_cache", len(loaded) / len(models))
        if isinstance(one.model, Encoder):
            loaded.append(_equip_encoder(name, one.model, load, num_threads))
        else:
            loaded.append(_equip(one.source, one.model, load, one.storage, budgets[name], painters.get(name)))
    if any(isinstance(one.model, Transformer) and _has_own_products(one.storage, device) for one in models):
        # Our own threads do the work; PyTorch's would spin beside them after each small op (16 rows: 8.7 ms a step instead of 13.4).
        torch.set_num_threads(1)
    if peers is not None:
        loaded = [replace(one, runner=lead(cast(Runner, one.runner), index, peers)) for index, one in enumerate(loaded)]
        if rank:
            return loaded  # rank 0's warm-up is everybody's
    _warm_up_all(loaded, load, device, progress)
    _keep_prepared(models)
    if load.async_scheduling == "on" or (load.async_scheduling == "auto" and device.type == "cuda"):
        loaded = [replace(one, ahead=one.runner) if isinstance(one.runner, Runner) else one for one in loaded]
    if load.draft is None:
        return loaded
    first, *others, draft = (replace(one, ahead=None) for one in loaded)
    return [replace(first, draft=draft), *others]


def _sources(load: Load) -> tuple[ModelSource, ...]:
    """Of all that is loaded, the draft model last, under a name that no other has."""
    return load.models if load.draft is None else (*load.models, ModelSource(_DRAFT_NAME, load.draft.path))


def _check_draft(first: _Read, second: _Read) -> None:
    """Raises: StartupError where the second can't guess ids for the first."""
    model, draft = first.model, second.model
    if not isinstance(model, Transformer) or model.config.pictures is not None:
        raise StartupError("--draft-model: the first of the models writes no plain text, so there is nothing to guess")
    if not isinstance(draft, Transformer) or draft.config.pictures is not None:
        raise StartupError("--draft-model: a draft model must write plain text")
    if draft.config.vocab_size != model.config.vocab_size:
        raise StartupError(
            f"--draft-model: it has {draft.config.vocab_size} ids and the first of the models {model.config.vocab_size}; both must have "
            "the same"
        )
    if not _has_own_products(first.storage, model.final_norm.device):
        raise StartupError("--draft-model: ids are guessed only in int8 and int4 on a CPU so far, where guesses can't change an answer")


@dataclass(frozen=True, slots=True)
class _Read:
    """A model in memory, and how it is held."""

    source: ModelSource
    model: Transformer | Encoder
    storage: Storage
    shelf: Shelf | None = None


def _load_model(source: ModelSource, load: Load, ops: Ops, device: torch.device, progress: Callable[[float], None], rank: int) -> _Read:
    path = Path(source.path)
    if (encoder := read_encoder_config(path)) is not None:
        if load.tensor_parallel > 1:
            raise StartupError(f"{source.name} is an encoder, which --tensor-parallel can't split; serve it by itself")
        storage = choose_encoder_storage(load.dtype)
        weights = open_encoder_weights(path, encoder)
        return _Read(source, build_encoder(encoder, weights, dtype=storage.precision.dtype, device=device, progress=progress), storage)
    config = read_config(path)
    storage = choose_storage(load.dtype, device, load.kv_dtype)
    if config.experts is not None and device.type != "cpu" and storage.precision.weights not in ("dense", "int8"):
        raise StartupError(f"--dtype {storage.name}: {source.name} is a mixture of experts, which a GPU serves in bfloat16 and int8 alone")
    shelf = None
    if load.max_prepared_bytes and load.tensor_parallel == 1 and _has_own_products(storage, device):
        shelf = open_shelf(path, config, repr(storage.precision), Path(load.prepared_folder), load.max_prepared_bytes)
    if load.max_context:
        # Of several models, one with a shorter context keeps its own; of one, it is a mistake.
        is_alone = len(load.models) == 1 and source.name != _DRAFT_NAME
        config = config.with_max_context(load.max_context if is_alone else min(load.max_context, config.max_context))
    tensors: TensorSource | Shelf = open_weights(path, config) if shelf is None else shelf
    if load.tensor_parallel > 1:
        share = Share(config, rank, load.tensor_parallel)
        config, tensors = share.config(source.name), ShareSource(open_weights(path, config), share)
    model = build_transformer(config, tensors, ops, precision=storage.precision, device=device, progress=progress)
    return _Read(source, model, storage, shelf)


def _keep_prepared(models: Sequence[_Read]) -> None:
    """Writes what was made of weights for the next start, beside the first requests."""
    shelves = [one.shelf for one in models if one.shelf is not None and not one.shelf.is_filled]

    def keep() -> None:
        for shelf in shelves:
            shelf.keep()

    if shelves:
        threading.Thread(target=keep, name="prepared").start()  # no daemon: a server that ends soon still writes it


def _load_painter(source: ModelSource, model: Transformer | Encoder, device: torch.device) -> Painter | None:
    """None for a model without pictures, or one that came without its image tokenizer: it still reads and writes words."""
    folder = Path(source.path) / FOLDER
    if not isinstance(model, Transformer) or model.config.pictures is None or not folder.is_dir():
        return None
    return Painter(read_image_tokenizer(folder, device), model.config.pictures, device)


def _kv_budgets(models: Sequence[_Read], load: Load, kv_bytes: int) -> dict[str, int]:
    """Bytes of K/V by model: equal shares, but none gets more than it can use, which leaves more to the others."""
    wishes = {}
    for one in models:
        if isinstance(one.model, Transformer):
            layout = partition_layers(one.model.config, one.storage.local_kv_dtype)
            block_bytes = layout.block_bytes(one.model.config, BLOCK_SIZE, one.storage.kv_dtype)
            wishes[one.source.name] = _most_blocks(one.model.config, layout, _num_sequences(one.source, load)) * block_bytes
    budgets, left = {}, kv_bytes
    for place, name in enumerate(sorted(wishes, key=lambda name: wishes[name])):
        budgets[name] = min(wishes[name], left // (len(wishes) - place))
        left -= budgets[name]
    return budgets


def _kv_budget(load: Load, device: torch.device, weight_bytes: int, mapped_bytes: int) -> int:
    if load.memory_bytes:
        share_bytes = load.memory_bytes // load.tensor_parallel
        left = share_bytes - weight_bytes
        if left <= 0:
            given = "--memory of" if load.tensor_parallel == 1 else f"each of {load.tensor_parallel} equal parts of --memory,"
            raise StartupError(
                f"{given} {share_bytes / 2**20:.0f} MiB does not hold the weights ({weight_bytes / 2**20:.0f} MiB); give more"
            )
        return left
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what quantising took lies there, and would count as taken
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.85)
    return min(available_bytes(mapped_bytes) // 2, MOST_KV_BYTES_CPU) // load.tensor_parallel


def _equip(source: ModelSource, model: Transformer, load: Load, storage: Storage, kv_bytes: int, painter: Painter | None) -> Loaded:
    """Sizes and allocates the K/V pool."""
    config, device = model.config, model.final_norm.device
    layout = partition_layers(config, storage.local_kv_dtype)
    num_blocks = _num_blocks(config, layout, _num_sequences(source, load), storage.kv_dtype, kv_bytes)
    cache = KVCache(config, layout, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=storage.kv_dtype, device=device)
    info = ModelInfo(
        name=source.name,
        max_context=config.max_context,
        vocab_size=config.vocab_size,
        dtype=storage.name,
        weight_bytes=model.read_bytes,
        kv_tokens=num_blocks * BLOCK_SIZE // len(layout.groups),
        num_kv_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        vector_width=config.width,
        pictures=config.pictures,
        picture_pixels=painter.pixels_per_code if painter is not None else 0,
        # Of more than two ranks' sums the order depends on the size of the step.
        usual_draft_len=DRAFT_LEN_CPU if _has_own_products(storage, device) and load.tensor_parallel == 1 else 0,
    )
    runner = Runner(model, cache, num_groups=len(layout.groups), device=device)
    return Loaded(info, runner, layout.groups, painter, counts=runner.counts)


def _has_own_products(storage: Storage, device: torch.device) -> bool:
    """Do the compiled kernels multiply? Then a row's result depends on nothing else; elsewhere its rounding depends on the number of rows,
    and an id that was guessed ahead could decide a tie."""
    return device.type == "cpu" and storage.precision.weights != "dense" and native_library() is not None


def _equip_encoder(name: str, model: Encoder, load: Load, num_threads: int) -> Loaded:
    """Blocks of an encoder are numbers alone, as many as the most and longest texts of a step; its memory is that of the weights."""
    config = encoder_limits(model.config, load.max_context, load.max_batch_tokens)
    num_blocks = -(-config.max_context // BLOCK_SIZE) * load.max_sequences
    info = ModelInfo(
        name=name,
        max_context=config.max_context,
        vocab_size=config.vocab_size,
        dtype=choose_encoder_storage(load.dtype).name,
        weight_bytes=model.held_bytes,
        kv_tokens=num_blocks * BLOCK_SIZE,
        num_kv_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        can_generate=False,
        pool=config.pool,
        vector_width=config.width,
    )
    return Loaded(info, EncoderRunner(model, num_threads), (KVGroup(),))


def encoder_limits(config: EncoderConfig, max_context: int, max_batch_tokens: int) -> EncoderConfig:
    """A text is read in one step, so a step's tokens bound it too. max_context 0: the model's own."""
    return config.within(max_context).within(max_batch_tokens)


def _num_sequences(source: ModelSource, load: Load) -> int:
    """That a model may have at once."""
    return min(load.max_sequences, DRAFTED_SEQUENCES) if source.name == _DRAFT_NAME else load.max_sequences


def _num_blocks(config: ModelConfig, layout: KVLayout, num_sequences: int, dtype: torch.dtype, kv_bytes: int) -> int:
    """As many as the budget holds and can be used. Raises: StartupError for too little."""
    fits = kv_bytes // layout.block_bytes(config, BLOCK_SIZE, dtype)
    if fits < 4 * len(layout.groups):
        raise StartupError(
            f"the memory left for K/V ({kv_bytes / 2**20:.1f} MiB) holds {fits} blocks of {BLOCK_SIZE} tokens; give more --memory"
        )
    return int(min(fits, _most_blocks(config, layout, num_sequences)))


def _most_blocks(config: ModelConfig, layout: KVLayout, num_sequences: int) -> int:
    """That can ever be used."""
    return -(-config.max_context // BLOCK_SIZE) * len(layout.groups) * num_sequences


def _warm_up_all(loaded: Sequence[Loaded], load: Load, device: torch.device, progress: Callable[[str, float], None]) -> None:
    """On a GPU in three phases: steps, so that nothing is compiled while a graph is recorded; graphs; and steps as they will be."""
    watch = CompileWatch()
    if device.type == "cuda":
        watch.install()
    for number, one in enumerate(loaded):
        progress("warm_up", number / len(loaded) / 2)
        _warm_up(one, load, device)
    if device.type == "cuda":
        for number, one in enumerate(loaded):
            if not isinstance(one.runner, EncoderRunner):
                one.runner.capture_graphs(load.max_sequences, progress=_share_of(progress, "graphs", number / len(loaded), 1 / len(loaded)))
        for number, one in enumerate(loaded):
            if not isinstance(one.runner, EncoderRunner):
                share = _share_of(progress, "warm_up", 0.5 + number / len(loaded) / 2, 0.5 / len(loaded))
                warm_up(one.runner, _limits_of(one, load), share)
                one.runner.watch_compiles(watch)
        watch.report()
    progress("warm_up", 1.0)


def _share_of(progress: Callable[[str, float], None], phase: str, start: float, part: float) -> Callable[[float], None]:
    return lambda fraction: progress(phase, start + fraction * part)


def _warm_up(loaded: Loaded, load: Load, device: torch.device) -> None:
    """One prefill and one decode step, and a prefill of codes where there are any, so that the first request meets warm code; on a GPU
    every kind of forward pass.

    Writes block 0, which no sequence owns yet: what it holds is never read before it is written again.
    """
    if isinstance(loaded.runner, EncoderRunner):
        text = Slice(sequence_id=-1, start=0, tokens=(0,) * min(BLOCK_SIZE, loaded.info.max_context), tables=((0,),))
        loaded.runner.forward(StepPlan(step_id=-1, slices=(text,), samples=()))
        return
    pictures = loaded.info.pictures
    if loaded.painter is not None and pictures is not None:
        loaded.painter.warm_up()
    if device.type == "cuda":
        run_steps(loaded.runner, _limits_of(loaded, load))
        return
    tables = tuple((0,) for _ in loaded.groups)
    count = min(BLOCK_SIZE, load.max_batch_tokens)
    pieces = [Slice(sequence_id=-1, start=0, tokens=(0,) * length, tables=tables) for length in (count, 1)]
    if pictures is not None:
        codes = (pictures.first_code,) * min(count, pictures.num_places)
        pieces.append(Slice(sequence_id=-1, start=0, tokens=codes, tables=tables, grid_starts=(0,) * len(codes)))
    for step, piece in enumerate(pieces):
        loaded.runner.forward(StepPlan(step_id=-1 - step, slices=(piece,), samples=()))


def _limits_of(loaded: Loaded, load: Load) -> Limits:
    """Of the plans that its scheduler will make."""
    info = loaded.info
    return Limits(
        num_groups=len(loaded.groups),
        block_size=info.block_size,
        max_batch_tokens=load.max_batch_tokens,
        max_sequences=load.max_sequences,
        max_context=info.max_context,
        vocab_size=info.vocab_size,
        pictures=info.pictures,
    )
