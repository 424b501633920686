"""The comparison with other servers: which runs count, the table, the commands; and all of it once, with scripts for servers and load."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import tokenizers
import torch
from click.testing import CliRunner

from bench import peers
from bench.peer_list import KITS, PEERS, Kit, Launch, Peer, braid_peer
from bench.peer_table import Load, Run, differ, read_runs, shortfall, table
from bench.peer_weights import quantize_command, tokenizer_files, write_folder
from bench.peers import Server, bench_command, install_commands, loads_for, measure
from service.catalog import Resolved
from service.checkpoint import open_gguf
from service.cli import main as braid_command
from service.codec.tokenizer_files import tokenizer_from_gguf
from service.model.families import read_config
from service.model.weights import open_weights

CALM = {"read_bandwidth": 10.0, "arithmetic_rate": 100.0}
SLOW = {"read_bandwidth": 8.9, "arithmetic_rate": 100.0}
ONE_USER, PREFILL = Load(1, 3, 139, 128), Load(1, 3, 2048, 2)
LAUNCH = Launch(Path("program"), Path("weights"), "smol", 81, threads=2, users=4, tokens=500)


def run(server: str, rate: float, load: Load = ONE_USER, after: dict[str, float] = CALM, **more: Any) -> Run:
    figures = {"output_throughput": rate, "median_ttft_ms": 1e3 / rate, "median_tpot_ms": 5.0, "completed": 3, "total_input_tokens": 6144}
    return Run(0, server, load, probes=[CALM, after], figures=figures, **more)


def test_a_run_is_void_when_either_probe_moves_by_more_than_a_tenth() -> None:
    assert not differ(CALM, {"read_bandwidth": 9.0, "arithmetic_rate": 110.0})
    assert differ(CALM, SLOW)
    assert differ(SLOW, CALM)
    assert differ(CALM, {"read_bandwidth": 10.0, "arithmetic_rate": 112.0})


def test_the_table_by_hand() -> None:
    runs = [run("braid", rate) for rate in (100.0, 300.0, 120.0)]
    runs += [run("braid", 999.0, after=SLOW), run("braid", 999.0, failed="gone")]
    runs += [run("quick", 60.0), run("slow", 20.0), run("absent", 1.0, after=SLOW)]
    lines = table(runs).splitlines()
    assert lines[2:6] == [
        "| 1 user | braid | 120.0 | 8 ms | 5.0 ms |  | 3 of 5 |",
        "| 1 user | quick | 60.0 | 17 ms | 5.0 ms | 2.00 x | 1 of 1 |",
        "| 1 user | slow | 20.0 | 50 ms | 5.0 ms | 6.00 x | 1 of 1 |",
        "| 1 user | absent | - | - | - | - | 0 of 1 |",
    ]
    assert lines[-1] == "- 1 user: 2.00 x the best of the others (quick)"


def test_a_prefill_is_measured_by_the_time_to_the_first_token() -> None:
    lines = table([run("braid", 2.0, PREFILL), run("peer", 1.0, PREFILL)]).splitlines()
    assert lines[2] == "| prefill of 2,048 | braid | 4,096.0 | 500 ms |  |  | 1 of 1 |"
    assert lines[3] == "| prefill of 2,048 | peer | 2,048.0 | 1,000 ms |  | 2.00 x | 1 of 1 |"


def test_less_work_is_no_speed() -> None:
    whole = {"completed": 3, "total_output_tokens": 384}
    assert not shortfall(whole, ONE_USER)
    assert "2 of 3 requests" in shortfall({**whole, "completed": 2}, ONE_USER)
    assert "300 tokens came instead of 384" in shortfall({**whole, "total_output_tokens": 300}, ONE_USER)


def test_runs_survive_their_file() -> None:
    runs = [run("braid", 100.0), run("peer", 50.0, PREFILL, after=SLOW, failed="gone")]
    written = json.loads(json.dumps({"runs": [each.told() for each in runs]}))
    assert written["runs"][1]["void"]
    assert read_runs(written) == runs


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[dict[str, float]], list[int]]]:
    """What the probes will say, and the seeds that were used."""
    probes: list[dict[str, float]] = []
    seeds: list[int] = []

    def bench(server: Server, load: Load, seed: int) -> dict[str, Any]:
        seeds.append(seed)
        return {"completed": load.prompts, "total_output_tokens": load.prompts * load.output_len}

    monkeypatch.setattr(peers, "bench", bench)
    monkeypatch.setattr(peers, "probe", lambda: probes.pop(0))
    yield probes, seeds
    assert len(seeds) == len(set(seeds))


def test_a_void_run_is_measured_twice_more_at_most(canned: tuple[list[dict[str, float]], list[int]]) -> None:
    probes, seeds = canned
    probes += [CALM, SLOW, SLOW]
    assert [each.is_void for each in measure(Server(braid_peer(), LAUNCH), [ONE_USER], 0)] == [True, False]
    probes += [CALM, SLOW, CALM, SLOW]
    assert [each.is_void for each in measure(Server(braid_peer(), LAUNCH), [ONE_USER], 1)] == [True, True, True]
    assert not probes
    assert len(seeds) == 2 + 2 + 3


def test_every_round_and_load_has_prompts_of_its_own(canned: tuple[list[dict[str, float]], list[int]]) -> None:
    probes, seeds = canned
    for number in range(2):
        probes += [CALM] * 3
        assert [each.load for each in measure(Server(braid_peer(), LAUNCH), [ONE_USER, PREFILL], number)] == [ONE_USER, PREFILL]
    assert len(seeds) == 6


def test_requests_of_each_load() -> None:
    assert loads_for([1, 4], 0, 2048) == [Load(1, 3, 139, 128), Load(4, 8, 139, 128), Load(1, 3, 2048, 2)]
    assert loads_for([16], 5, 0) == [Load(16, 80, 139, 128)]


def test_the_load_generator_knows_every_flag(tmp_path: Path) -> None:
    command = bench_command(Server(braid_peer(), LAUNCH), Load(4, 8, 139, 128), 7, tmp_path / "figures.json")
    group = braid_command.commands["bench"]
    assert isinstance(group, click.Group)
    with group.commands["serve"].make_context("serve", command[len(peers.BENCH) :]) as context:
        told = context.params
    assert (told["num_prompts"], told["max_concurrency"], told["seed"], told["ignore_eos"]) == (8, 4, 7, True)
    assert (told["random_input_len"], told["random_output_len"], told["base_url"]) == (139, 128, "http://127.0.0.1:81")


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_is_told_the_model_and_the_port_and_keeps_no_prompts(name: str) -> None:
    server = Server(PEERS[name], LAUNCH)
    command = server.command
    assert command[0] == "program"
    assert {"weights", "81"} <= set(command)
    assert server.model == ("weights" if name == "transformers-float32" else "smol")
    if name.startswith("llama"):
        assert command[command.index("-c") + 1] == str(4 * 500)
        assert "--no-cache-prompt" in command
    if name.startswith("vllm"):
        assert "--no-enable-prefix-caching" in command


def test_braid_is_told_more_arguments() -> None:
    command = braid_peer("braid", ("--dtype", "float32")).command(LAUNCH)
    assert command[-3:] == ["--no-prefix-cache", "--dtype", "float32"]


def test_a_kit_is_installed_into_its_own_folder_with_torch_pinned() -> None:
    environment, install, removal = install_commands(KITS["openvino"], Path("/peers/openvino"), "2.13.0")
    assert environment == [sys.executable, "-m", "venv", "/peers/openvino"]
    assert install[:5] == ["/peers/openvino/bin/python", "-m", "pip", "install", "torch==2.13.0"]
    assert removal[-1] == "torchvision"
    assert len(install_commands(KITS["transformers"], Path("/peers/transformers"), "2.13.0")) == 2


def test_the_head_keeps_its_bits(tmp_path: Path) -> None:
    command = quantize_command(tmp_path, Path("a.gguf"), Path("b.gguf"), "q4_0")
    assert command[:6] == ["llama-quantize", "--allow-requantize", "--token-embedding-type", "q8_0", "a.gguf", "b.gguf"]
    assert command[6] == "q4_0"


def test_the_peers_tokenizer_is_braids(smollm2_path: Path) -> None:
    metadata = open_gguf(smollm2_path, with_tokens=True).metadata
    written = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_files(metadata)["tokenizer.json"]))
    own = tokenizer_from_gguf(metadata)
    for text in ("<|im_start|>user\nCount to 1234, naïve 🙂  please.<|im_end|>\n", "  two spaces\tand\n\n\nlines", "don't x=y+1"):
        ids = own.encode(text, allow_special=True)
        assert written.encode(text).ids == ids
        assert written.decode(ids, skip_special_tokens=False) == text


@pytest.mark.long
@pytest.mark.parametrize(("is_endless", "ends"), [(False, (2,)), (True, ())])
def test_the_peers_folder_is_the_same_model(smollm2_path: Path, tmp_path: Path, is_endless: bool, ends: tuple[int, ...]) -> None:
    write_folder(smollm2_path, tmp_path / "hf", is_endless=is_endless)
    config = read_config(smollm2_path)
    assert read_config(tmp_path / "hf") == replace(config, eos_ids=ends)
    given, written = open_weights(smollm2_path, config), open_weights(tmp_path / "hf", config)
    for name in ("embedding", "layers.7.q", "layers.7.k", "layers.29.down", "final_norm"):
        assert torch.equal(given.get(name).float(), written.get(name))


def test_a_vocabulary_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="SmolLM"):
        tokenizer_files({"tokenizer.ggml.pre": "llama-bpe"})


SERVER = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""
LOADER = """
import json, sys, urllib.request
words = [word for word in sys.argv[1:] if word != "--ignore-eos"]
told = dict(zip(words[::2], words[1::2]))
urllib.request.urlopen(told["--base-url"] + "/health").close()
count = int(told["--num-prompts"])
made = {"completed": count, "total_output_tokens": count * int(told["--random-output-len"]), "total_input_tokens": count * 139}
made |= {"output_throughput": 50.0, "median_ttft_ms": 20.0, "median_tpot_ms": 5.0}
open(told["--json"], "w").write(json.dumps(made))
"""


def scripted(name: str, script: Path) -> Peer:
    return Peer(name, Kit(name, (), name, "bin/python"), "q8_0", lambda launch: [sys.executable, str(script), str(launch.port)])


def test_all_of_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Braid, one peer that serves, one that ends at once, and one that is not installed."""
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "loader.py").write_text(LOADER)
    (tmp_path / "dying.py").write_text("raise SystemExit('no such model')")
    for name in ("peer", "dying"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").touch()
        described = tmp_path / name / "lib" / "python3.11" / "site-packages" / f"{name}-1.2.dist-info"
        described.mkdir(parents=True)
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    model = tmp_path / "smol.gguf"
    given = {"peer": tmp_path / "server.py", "dying": tmp_path / "dying.py", "absent": tmp_path / "server.py"}
    for name, script in given.items():
        monkeypatch.setitem(PEERS, name, scripted(name, script))
    monkeypatch.setattr(peers, "braid_peer", lambda name, arguments: replace(scripted("braid", tmp_path / "server.py"), name=name))
    monkeypatch.setattr(peers, "BENCH", [sys.executable, str(tmp_path / "loader.py")])
    monkeypatch.setattr(peers, "resolve", lambda name: Resolved(name, model, "", 1))
    monkeypatch.setattr(peers, "prepare", lambda kind, environment, source, folder: source)
    monkeypatch.setattr(peers, "probe", lambda: CALM)
    monkeypatch.setattr(next(each for each in peers.run.params if each.name == "names"), "type", click.STRING)
    words = f"--users 1 --users 2 --rounds 2 --prefill 0 --peers-folder {tmp_path} --json {tmp_path}/out.json --peers peer --peers dying"
    done = CliRunner().invoke(peers.run, [*words.split(), "--peers", "absent"])
    assert done.exit_code == 0, done.output
    assert "absent is not installed: python -m bench.peers install absent" in done.output
    assert "no such model" in done.output
    assert "- 2 users: 1.00 x the best of the others (peer)" in done.output
    report = json.loads((tmp_path / "out.json").read_text())
    started = [start["server"] for start in report["starts"]]
    assert started == ["braid", "braid-int4", "peer", "dying", "braid-int4", "peer", "dying", "braid"]
    assert report["versions"] == {"peer": "1.2", "dying": "1.2"}
    assert (list(report["missing"]), len(report["runs"])) == (["absent"], 12)
    assert report["machine"]["threads"] >= 1
