"""What the image's HEALTHCHECK runs: exit status 0 when the server says that it is healthy, 1 when it does not or nobody answers.

Stdlib only, and none of the package, so that it costs little each time. `healthcheck.py [URL]`; without one, /health of this container.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

# Less than the HEALTHCHECK's own limit, so that the reason is still printed.
TIMEOUT_S = 4.0


def is_healthy(url: str, timeout_s: float) -> bool:
    """Does it answer 200 in time? Prints why not on stderr."""
    # A proxy is for the outside, never for the way to oneself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as response:
            response.read(1)
            return bool(response.status == 200)
    except urllib.error.HTTPError as error:
        with error:
            print(f"status {error.code}: {error.read(300).decode(errors='replace')}", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"no answer: {error}", file=sys.stderr)
    return False


def own_url() -> str:
    """Of this container's server: its port is BRAID_PORT's, where that is set."""
    return f"http://127.0.0.1:{os.environ.get('BRAID_PORT') or 8000}/health"


def main(arguments: list[str]) -> int:
    return 0 if is_healthy(arguments[0] if arguments else own_url(), TIMEOUT_S) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
