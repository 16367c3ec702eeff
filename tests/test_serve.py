"""`vllm serve --kv-policy`, as an operator starts it and a client uses it."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]

VLLM = Path(sys.executable).with_name("vllm")
START_UP_S = 240


def environment() -> dict[str, str]:
    """As a user's shell: the engine core in a process of its own."""
    inherited = dict(os.environ)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        inherited.pop(name, None)
    return inherited


@dataclass
class Server:
    """A running server."""

    url: str
    log: Path

    def lines(self, word: str) -> list[str]:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if word in line]


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_UP_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
        except (urllib.error.URLError, OSError):
            time.sleep(1)
        else:
            return
    raise AssertionError(f"the server did not start:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def server(
    real_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [str(VLLM), "serve", real_model, "--kv-policy", "pyramid"]
    command += ["--kv-policy-config", '{"recent": 32, "min_context": 64}']
    command += [
        "--served-model-name",
        "smollm2",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    command += ["--block-size", "32", "--kv-cache-memory-bytes", "100000000"]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment()
        )
    try:
        wait_until_healthy(url, process, log)
        yield Server(url, log)
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


FACT = "The keeper of the lighthouse is named Marta Holm. "
QUESTION = (
    FACT + "The sea was calm, and gulls sat on the rocks. " * 30 + "Say hello to her."
)


def test_a_chat_completion_is_answered(client: OpenAI, server: Server) -> None:
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=24,
        temperature=0,
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 300
    assert answer.choices[0].message.content
    assert server.lines("compactions"), "nothing was evicted"


def test_a_streamed_completion_says_the_same(client: OpenAI) -> None:
    request = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 24,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**request)  # type: ignore[call-overload]
    stream = client.chat.completions.create(**request, stream=True)  # type: ignore[call-overload]
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(pieces) > 5
    assert "".join(pieces) == whole.choices[0].message.content


def test_the_start_up_log_says_what_the_policy_means(server: Server) -> None:
    (tiers,) = server.lines("KV policy pyramid: retention")
    assert "6 tiers of 5 layers by weight" in tiers
    (kept,) = server.lines("of a prompt of 512 tokens")
    assert "tokens a layer" in kept
    (memory,) = server.lines("KV bytes for such a request")
    assert "against" in memory
    assert not server.lines("prefix caching is switched off")


def test_a_request_may_ask_for_a_policy(client: OpenAI) -> None:
    """In ``vllm_xargs``; an impossible wish is a 400 that lists the valid ones."""

    def ask(**wish: object) -> str:
        answer = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=24,
            temperature=0,
            extra_body={"vllm_xargs": wish},
        )
        return answer.choices[0].message.content or ""

    assert ask(kv_policy="none") == ask(kv_retention=1.0)
    assert ask(kv_policy="none") != ask(kv_retention=0.2), "retention is not heard"
    for wish, words in (
        ({"kv_policy": "pyramyd"}, ["'pyramyd'", "none, pyramid, snapkv"]),
        ({"kv_retention": 1.5}, ["1.5", "less than or equal to 1"]),
    ):
        with pytest.raises(BadRequestError) as error:
            ask(**wish)
        for word in words:
            assert word in str(error.value)
    assert ask()


def test_hits_are_in_vllms_own_metrics(client: OpenAI, server: Server) -> None:
    """A prompt that was compacted before is hit."""

    def hits() -> float:
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
            text = response.read().decode()
        lines = [x for x in text.splitlines() if x.startswith("vllm:prefix_cache_hits")]
        return sum(float(line.split()[-1]) for line in lines if "_total" in line)

    request = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Once more. " + QUESTION}],
        "max_tokens": 4,
        "temperature": 0,
    }
    first = client.chat.completions.create(**request)  # type: ignore[call-overload]
    before = hits()
    again = client.chat.completions.create(**request)  # type: ignore[call-overload]
    # All but the newest 256 tokens, whose queries score, and a part of a page.
    assert first.usage is not None
    assert hits() - before >= first.usage.prompt_tokens - 256 - 32 > 0
    assert again.choices[0].message.content == first.choices[0].message.content


def test_help_lists_the_flags_in_a_group() -> None:
    result = subprocess.run(
        [str(VLLM), "serve", "--help=KVPolicy"],
        capture_output=True,
        text=True,
        env=environment() | {"COLUMNS": "100"},
        check=True,
    )
    assert "--kv-policy " in result.stdout
    assert "--kv-policy-config" in result.stdout
    assert "streaming" in result.stdout
