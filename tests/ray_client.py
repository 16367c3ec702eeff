"""A client of a server in the cluster: it waits for the server and asks once."""

import json
import sys
import time
import urllib.error
import urllib.request
from typing import Any

START_UP_S = 240


def wait_until_healthy(url: str) -> None:
    deadline = time.monotonic() + START_UP_S
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(1)
        else:
            return


def ask(url: str, body: dict[str, Any]) -> Any:
    """The server's answer."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def main() -> None:
    settings = json.load(sys.stdin)
    wait_until_healthy(settings["url"])
    answer = ask(settings["url"] + settings["path"], settings["body"])
    print("@" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
