"""The sweep over rates asks each rate's requests of a server and writes figures and a picture."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from bench.rates import main
from tests.bench.fake_server import FakeServer, running


def test_every_rate_is_measured_and_drawn(tmp_path: Path) -> None:
    fake = FakeServer()
    with running(fake):
        arguments = ["--url", fake.url, "--rate", "200", "--rate", "400", "--seconds", "1", "--input-len", "20", "--output-len", "3"]
        done = CliRunner().invoke(main, [*arguments, "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert [row["rate"] for row in found["rates"]] == [200, 400]
    assert [row["completed"] for row in found["rates"]] == [200, 400]
    assert all(row["request_goodput"] > 0 for row in found["rates"])
    assert (tmp_path / "r.png").stat().st_size > 1000
