"""A server with the command line and the probes of Braid's, and nothing behind them. Run by test_replica as a replica's child."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

METRICS = b"""# TYPE braid:num_requests_running gauge
braid:num_requests_running{model_name="a"} 3
braid:num_requests_waiting{model_name="a"} 4
braid:kv_cache_usage_perc{model_name="a"} 0.5
# TYPE braid:time histogram
braid:time_bucket{le="1.0"} 1
braid:time_bucket{le="+Inf"} 2
braid:time_sum 3
braid:time_count 2
"""
KIND = sys.argv[sys.argv.index("--") + 1]
left = threading.Event()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        statuses = {"/ready": 503 if KIND == "loading" else 200, "/health": 503 if KIND == "stuck" else 200}
        if self.path == "/endless":
            self.endless()
        elif self.path == "/metrics":
            self.tell(401 if KIND == "locked" and self.headers["authorization"] != "Bearer the-key" else 200, METRICS)
        elif self.path == "/was-left":
            self.tell(200, b"yes" if left.is_set() else b"no")
        else:
            self.tell(statuses.get(self.path, 404), b"{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        told = (f"POST {self.path}", self.headers["x-mine"], self.headers["host"])
        self.tell(201, "\n".join(told).encode() + b"\n" + body)

    def endless(self) -> None:
        self.send_response(200)
        self.send_header("connection", "close")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b"data: x\n\n")
                time.sleep(0.01)
        left.set()
        self.close_connection = True

    def tell(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if KIND == "broken":
    sys.exit(3)
port = int(sys.argv[sys.argv.index("--port") + 1])
threading.Thread(target=ThreadingHTTPServer(("127.0.0.1", port), Answers).serve_forever, daemon=True).start()
sys.stdin.read()
