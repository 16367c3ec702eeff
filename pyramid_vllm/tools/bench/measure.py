"""One policy, one process: runs a batch through vLLM and counts what happens.

Run as ``python -m pyramid_vllm.tools.bench.measure``, with a ``MeasureTask`` as JSON
on its standard input. It writes ``ready``, then ``done`` with the finished requests
after every step, then ``result``.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from pyramid_vllm.tools.bench.conversations import Conversations, turn_lengths
from pyramid_vllm.tools.bench.watch import Measured, Watch
from pyramid_vllm.tools.engine_process import leave, read_task, tell


@dataclass(frozen=True)
class MeasureTask:
    """What to run."""

    model: str
    prompts: list[list[int]]
    """Of each conversation's first turn."""
    output_tokens: int | list[int]
    """Of every request, or of each, turn by turn."""
    kv_bytes: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_policy: str | None
    seed: int
    dtype: str = "float32"
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Of ``LLM``; they replace the ones that are set here."""
    warm_up: bool = False
    """Whether a short batch runs first, uncounted."""
    later_turns: list[list[list[int]]] = field(default_factory=list)
    """Of each later turn, what each conversation adds to the answer before it."""

    @property
    def turns(self) -> list[list[list[int]]]:
        """Of each turn, what each conversation adds to its history."""
        return [self.prompts, *self.later_turns]

    @property
    def output_lengths(self) -> list[int]:
        """Of each request, turn by turn."""
        if isinstance(self.output_tokens, int):
            return [self.output_tokens] * (len(self.prompts) * len(self.turns))
        return self.output_tokens

    @property
    def prompt_lengths(self) -> list[int]:
        """Of each request, turn by turn, with all that its conversation has before."""
        lengths = [[len(part) for part in turn] for turn in self.turns]
        return turn_lengths(lengths, self.output_lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        pairs = zip(self.prompt_lengths, self.output_lengths, strict=True)
        return max(map(sum, pairs))


def make_engine(task: MeasureTask) -> Any:
    """A vLLM engine in this process, so that its scheduler can be watched.

    What the task does not set is as vLLM has it, prefix caching too.
    """
    import pyramid_vllm  # noqa: F401, I001 (lets `LLM` take a KV policy)
    from vllm import LLM

    settings: dict[str, Any] = {
        "enforce_eager": True,
        "block_size": task.block_size,
        "max_model_len": task.longest,
    }
    return LLM(
        model=task.model,
        dtype=task.dtype,
        kv_cache_memory_bytes=task.kv_bytes,
        max_num_seqs=task.max_num_seqs,
        max_num_batched_tokens=task.max_num_batched_tokens,
        seed=task.seed,
        kv_policy=task.kv_policy,
        **(settings | task.engine_args),
    ).llm_engine


def add_request(engine: Any, name: str, prompt: list[int], num_tokens: int) -> None:
    """Queue a greedy request of a fixed length."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=num_tokens,
        ignore_eos=True,
        # Without a tokenizer there is nothing to detokenize with.
        detokenize=engine.tokenizer is not None,
    )
    engine.add_request(name, {"prompt_token_ids": prompt}, sampling)


def warm_up(engine: Any, task: MeasureTask) -> None:
    """Run a short batch: what is made or compiled on first use then is.

    Raises:
        RuntimeError: the batch is still in the prefix cache, where the measured one
            would find it.
    """
    # A whole prompt, for policies keep short ones whole; beside it another request.
    whole = min(task.prompts, key=len)
    for name, prompt in (("0", whole), ("1", whole[:32])):
        add_request(engine, name, prompt, 4)
    while engine.has_unfinished_requests():
        engine.step()
    if not engine.reset_prefix_cache():
        raise RuntimeError("the prefix cache could not be emptied after the warm-up")


@dataclass
class _Answers:
    """What requests gave, by their numbers; times are in seconds of steps."""

    sent: dict[int, float]
    first: dict[int, float] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)
    outputs: dict[int, list[int]] = field(default_factory=dict)
    num_cached: int = 0
    """Prompt tokens that were found in the prefix cache."""

    def take(self, news: list[Any], now: float) -> list[int]:
        """Note what a step gave; the numbers of the requests that it finished."""
        finished = []
        for output in news:
            number = int(output.request_id)
            self.first.setdefault(number, now)
            if output.finished:
                self.last[number] = now
                self.outputs[number] = list(output.outputs[0].token_ids)
                self.num_cached += output.num_cached_tokens or 0
                finished.append(number)
        return finished

    def since_sent(self, times: dict[int, float]) -> list[float]:
        """Times counted from when each request was sent."""
        return [times[number] - self.sent[number] for number in sorted(self.sent)]


def run_batch(
    engine: Any, task: MeasureTask, progress: Callable[[int], None]
) -> Measured:
    """Run all conversations at once, greedily.

    Args:
        engine: from ``make_engine``.
        task: the prompts and their output lengths.
        progress: told the finished requests after every step.
    """
    watch = Watch(engine.engine_core.engine_core)
    conversations = Conversations(
        task.turns,
        task.output_lengths,
        lambda number, prompt, length: add_request(engine, str(number), prompt, length),
    )
    conversations.start()
    answers = _Answers(dict.fromkeys(range(len(task.prompts)), 0.0))
    seconds = 0.0
    with watch.counting_rows():
        while engine.has_unfinished_requests():
            # Steps alone are timed: a policy has more pages to look at than stock.
            start = time.perf_counter()
            news = engine.step()
            seconds += time.perf_counter() - start
            for number in answers.take(news, seconds):
                following = conversations.follow(number, answers.outputs[number])
                if following is not None:
                    answers.sent[following] = seconds
            watch.step()
            progress(len(answers.outputs))
    result = watch.result()
    result.outputs = [answers.outputs[number] for number in sorted(answers.sent)]
    result.first_token_s = answers.since_sent(answers.first)
    result.finish_s = answers.since_sent(answers.last)
    num_prompt_tokens = sum(task.prompt_lengths)
    result.prefix_caching = bool(engine.vllm_config.cache_config.enable_prefix_caching)
    result.prefix_hit_rate = answers.num_cached / num_prompt_tokens
    result.seconds = seconds
    tokens = num_prompt_tokens + sum(map(len, result.outputs))
    result.total_tokens_per_s = tokens / seconds
    return result


def main() -> None:
    """Entry point of the child process."""
    task = MeasureTask(**read_task())
    engine = make_engine(task)
    if task.warm_up:
        warm_up(engine, task)
    tell("ready", True)
    measured = run_batch(engine, task, lambda done: tell("done", done))
    tell("result", asdict(measured))
    leave()


if __name__ == "__main__":
    main()
