"""When an engine dies, every client gets an error and none gets an answer."""

import contextlib
import os
import signal
import socket
import subprocess
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import APIConnectionError, OpenAI, OpenAIError

from tests.engines import close, make_llm, random_prompts, scheduler_of, worker_of
from tests.models import TINY_LLAMA, save_tiny_llama
from tests.test_serve import VLLM, environment, wait_until_healthy

POLICY = ["--kv-policy", "pyramid-by-depth"]
POLICY += ["--kv-policy-config", '{"recent": 16, "min_context": 32}']
NUM_LAYERS = 6
#: Tokens that no engine comes to the end of before its test has killed it, however
#: late a loaded machine lets the client read the first ones.
LONG = 60_000
EXIT_S = 60


@dataclass
class Server:
    """A running server of a model without a tokenizer."""

    process: subprocess.Popen[bytes]
    client: OpenAI
    log: Path

    def stream(self, prompt: list[int], max_tokens: int) -> Iterator[int]:
        """Tokens of a completion, one by one.

        Raises:
            OpenAIError: the request ended with an error.
            AssertionError: it ended without one, but not whole.
        """
        stream = self.client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        num_tokens = 0
        for chunk in stream:
            for token in chunk.choices[0].token_ids:  # type: ignore[attr-defined]
                num_tokens += 1
                yield token
        assert num_tokens == max_tokens, "the stream ended early, without an error"

    def processes(self) -> list[psutil.Process]:
        """The server's children and theirs: engine core and worker."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def engine_core(self) -> psutil.Process:
        (core,) = [p for p in self.processes() if "EngineCore" in " ".join(p.cmdline())]
        return core

    def exit_code(self) -> int:
        """Wait until the server has ended."""
        return self.process.wait(timeout=EXIT_S)


@contextmanager
def starting(
    model: str, log: Path, arguments: list[str], variables: dict[str, str]
) -> Iterator[Server]:
    """A server on loopback in a process group of its own; it may not be up yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(VLLM), "serve", model, "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--skip-tokenizer-init"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "65536"]
    command += ["--block-size", "32", "--kv-cache-memory-bytes", "268435456"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command + arguments,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment() | variables,
            start_new_session=True,
        )
    client = OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
    )
    try:
        yield Server(process, client, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_up(server: Server) -> None:
    url = str(server.client.base_url).removesuffix("/v1/")
    wait_until_healthy(url, server.process, server.log)


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Llama with many positions."""
    folder = tmp_path_factory.mktemp("long-llama")
    return save_tiny_llama(folder, TINY_LLAMA | {"max_position_embeddings": 65536})


@dataclass(frozen=True)
class Death:
    """What a server's clients and its operator see of its end."""

    error: type[OpenAIError]
    message: str
    exit_code: int


def kill_core(server: Server) -> Death:
    """Kill the engine core after the third token of a request."""
    core, processes = server.engine_core(), server.processes()
    tokens = server.stream(random_prompts([300])[0], LONG)
    for _ in range(3):
        next(tokens)
    core.send_signal(signal.SIGKILL)
    with pytest.raises(OpenAIError) as caught:
        list(tokens)
    exit_code = server.exit_code()
    _, alive = psutil.wait_procs(processes, timeout=EXIT_S)
    assert not alive, "the server left processes behind"
    with pytest.raises(APIConnectionError):
        list(server.stream([1, 2, 3], 2))
    return Death(type(caught.value), str(caught.value), exit_code)


@pytest.mark.timeout(300)
def test_a_killed_engine_core_ends_requests_and_server_as_in_stock(
    long_llama: str, tmp_path: Path
) -> None:
    with (
        starting(long_llama, tmp_path / "stock", [], {}) as stock,
        starting(long_llama, tmp_path / "policy", POLICY, {}) as policy,
    ):
        wait_until_up(stock)
        wait_until_up(policy)
        assert kill_core(policy) == kill_core(stock)


FAULT = """
from itertools import count


def register():
    from pyramid_vllm.worker.layer import TieredLayer

    if hasattr(TieredLayer, "num_calls"):
        return
    TieredLayer.num_calls = count(1)
    after_attention = TieredLayer.after_attention

    def broken(self, *args):
        if next(self.num_calls) == {call}:
            raise ArithmeticError("the fault of this test")
        return after_attention(self, *args)

    TieredLayer.after_attention = broken
"""


def add_fault(folder: Path, call: int) -> dict[str, str]:
    """A vLLM plugin that breaks our layers at their n-th call; its environment."""
    (folder / "fault.py").write_text(FAULT.format(call=call))
    info = folder / "fault-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fault\nVersion: 1\n")
    points = """
        [vllm.general_plugins]
        fault = fault:register
    """
    (info / "entry_points.txt").write_text(textwrap.dedent(points))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path}


@pytest.mark.timeout(300)
def test_an_exception_in_a_layer_ends_all_requests_and_the_server(
    long_llama: str, tmp_path: Path
) -> None:
    """The calls that count are those of prompts, so the second prompt fails half-
    way."""
    fault = add_fault(tmp_path, NUM_LAYERS + NUM_LAYERS // 2)
    running, failing, later = random_prompts([300, 200, 100])
    with starting(long_llama, tmp_path / "log", POLICY, fault) as server:
        wait_until_up(server)
        tokens = server.stream(running, LONG)
        next(tokens)
        with pytest.raises(OpenAIError) as caught:
            list(server.stream(failing, 8))
        assert "EngineCore" in str(caught.value)
        with pytest.raises(OpenAIError):
            list(tokens)
        with pytest.raises(OpenAIError):
            list(server.stream(later, 8))
        server.exit_code()
        assert "the fault of this test" in server.log.read_text(errors="replace")


def break_layer(llm: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Make one of the engine's layers raise, or leave out its part."""

    def broken(*_: Any) -> None:
        if how == "raises":
            raise ArithmeticError("the fault of this test")

    layer = worker_of(llm).tier_layers[NUM_LAYERS // 2]
    monkeypatch.setattr(layer, "after_attention", broken)


def add_request(llm: Any, name: str, prompt: list[int]) -> None:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False
    )
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)


@pytest.fixture
def llm(tiny_llama: str) -> Iterator[Any]:
    policy = {"recent": 16, "min_context": 32}
    made = make_llm(tiny_llama, kv_policy="pyramid-by-depth", kv_policy_config=policy)
    yield made
    close(made)


FAULTS = {
    "raises": (ArithmeticError, "the fault of this test"),
    "skips": (RuntimeError, "5 of 6 layers compacted"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", FAULTS)
def test_a_fault_in_a_layer_raises_from_the_step(
    llm: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request gets an output from the step, whether it is in its prompt or not."""
    error, message = FAULTS[how]
    first, second = random_prompts([200, 180])
    add_request(llm, "first", first)
    (output,) = llm.llm_engine.step()
    assert not output.finished
    break_layer(llm, monkeypatch, how)
    add_request(llm, "second", second)
    with pytest.raises(error, match=message):
        llm.llm_engine.step()
    lengths = [r.num_output_tokens for r in scheduler_of(llm).requests.values()]
    assert lengths == [1, 0]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", FAULTS)
def test_no_step_runs_after_a_failed_one(
    llm: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths and pages are in doubt from then on, even if the fault is gone."""
    first, second, third = random_prompts([200, 180, 150])
    add_request(llm, "first", first)
    llm.llm_engine.step()
    with monkeypatch.context() as patch:
        break_layer(llm, patch, how)
        add_request(llm, "second", second)
        with contextlib.suppress(FAULTS[how][0]):
            llm.llm_engine.step()
    add_request(llm, "third", third)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            llm.llm_engine.step()
