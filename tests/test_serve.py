"""`vllm serve --kv-policy`, as an operator starts it and a client uses it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]

VLLM = Path(sys.executable).with_name("vllm")
START_UP_S = 240


def environment() -> dict[str, str]:
    """The environment of a user's shell: the engine core has a process of its own."""
    inherited = dict(os.environ)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        inherited.pop(name, None)
    # Asked for what workers count: `/collective_rpc` is for development.
    return inherited | {"VLLM_SERVER_DEV_MODE": "1"}


@dataclass
class Server:
    """A running server."""

    url: str
    log: Path

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with some labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            text = response.read().decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def workers(self) -> list[dict[str, Any]]:
        """What an engine's workers count."""
        request = urllib.request.Request(
            f"{self.url}/collective_rpc",
            json.dumps({"method": "kv_policy_stats"}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            results: list[dict[str, Any]] = json.load(response)["results"]
        return results

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
    with serve(real_model, tmp_path_factory.mktemp("serve") / "log") as running:
        yield running


@contextmanager
def serve(model: str, log: Path, *arguments: str, **variables: str) -> Iterator[Server]:
    """A server with the policy, on a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(VLLM), "serve", model, "--kv-policy", "pyramid"]
    # Answers are compared that must not depend on what was hit before.
    settings = {"recent": 32, "min_context": 64, "hit_split": "ignore"}
    command += ["--kv-policy-config", json.dumps(settings)]
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
    command += arguments
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment() | variables,
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
    assert "5 tiers of 5-10 layers by weight" in tiers
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
        ({"kv_retention": 1.5}, ["1.5", "at most 1"]),
    ):
        with pytest.raises(BadRequestError) as error:
            ask(**wish)
        for word in words:
            assert word in str(error.value)
    assert ask()


def test_hits_are_in_vllms_own_metrics(client: OpenAI, server: Server) -> None:
    """A prompt that was compacted before gives hits."""

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


def check_metrics(server: Server, engine: str) -> None:
    """An engine's metrics are what its workers have counted."""
    (worker,) = server.workers()
    prefix, num_layers = "vllm:kv_policy_", len(worker["rows_computed"])
    metrics = {
        "num_pages_freed": "pages_freed_total",
        "num_compactions": "compactions_total",
    }
    for key, name in metrics.items():
        assert worker[key] > 0
        assert server.metric(prefix + name, engine=engine) == worker[key], name
    rows = server.metric(f"{prefix}prefill_rows_scheduled_total", engine=engine)
    assert rows == worker["rows_scheduled"] * num_layers
    rows = server.metric(f"{prefix}prefill_rows_computed_total", engine=engine)
    assert rows == sum(worker["rows_computed"])


def test_metrics_are_what_the_worker_counts(client: OpenAI, server: Server) -> None:
    """This holds in another process, and where prompts leave pages that are shared."""
    for name in ("first", "second"):
        client.completions.create(
            model="smollm2", prompt=f"{name}: {QUESTION}", max_tokens=2
        )
    check_metrics(server, "0")
    assert server.metric("vllm:kv_policy_requests_total", kv_policy="pyramid") >= 2


@pytest.mark.slow
def test_metrics_of_several_front_ends_and_engines(
    real_model: str, tmp_path: Path
) -> None:
    arguments = ("--data-parallel-size", "2", "--api-server-count", "2")
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with serve(real_model, tmp_path / "log", *arguments, **variables) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")

        def ask(index: int) -> None:
            prompt = f"{index}: {QUESTION}"
            client.completions.create(model="smollm2", prompt=prompt, max_tokens=4)

        with ThreadPoolExecutor(12) as pool:
            list(pool.map(ask, range(12)))
        num_requests = [
            server.metric("vllm:kv_policy_requests_total", engine=engine)
            for engine in ("0", "1")
        ]
        assert sum(num_requests) == 12
        assert min(num_requests) > 0
        check_metrics(server, "0")


@pytest.mark.slow  # scripts/check-package shows the same of the installed package
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
