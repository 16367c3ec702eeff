"""One request under a policy, layer by layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from tests.oracle.counts import LayerCounts
from tests.oracle.model import F64, DenseModel

#: Selections that are decided by less than this, relative to the score, are not
#: decided: float32 may choose the other token.
MARGIN = 1e-5


@dataclass
class OracleResult:
    """What a request does under the policy."""

    logprobs: list[torch.Tensor] = field(default_factory=list)
    """Of every generated token: ``[vocabulary]``."""
    rows: list[int] = field(default_factory=list)
    """Rows of the prompt that each layer computed."""
    held: list[int] = field(default_factory=list)
    """Tokens that each layer holds at the end."""
    decided: bool = True
    """Whether every selection was decided by more than ``MARGIN``."""


class _Layer:
    """Keys, values and queries of one layer; KV heads may hold different tokens."""

    def __init__(self, model: DenseModel) -> None:
        heads, size = model.num_kv_heads, model.head_size
        self.key = torch.zeros(heads, 0, size, dtype=F64)
        self.value = torch.zeros(heads, 0, size, dtype=F64)
        self.position = torch.zeros(heads, 0, dtype=torch.int64)
        self.query = torch.zeros(0, model.num_heads, size, dtype=F64)
        self.query_position = torch.zeros(0, dtype=torch.int64)

    def append(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        self.key = torch.cat((self.key, key.transpose(0, 1)), 1)
        self.value = torch.cat((self.value, value.transpose(0, 1)), 1)
        rows = positions.expand(len(self.key), -1)
        self.position = torch.cat((self.position, rows), 1)
        self.query = torch.cat((self.query, query))
        self.query_position = torch.cat((self.query_position, positions))

    def attention(self, newest: int) -> torch.Tensor:
        """Attention matrix of the newest queries: ``[heads, newest, num_held]``."""
        query = self.query[len(self.query) - newest :].transpose(0, 1)
        position = self.query_position[len(self.query_position) - newest :]
        groups = len(query) // len(self.key)
        key = self.key.repeat_interleave(groups, 0)
        logits = query @ key.transpose(1, 2) / self.key.shape[-1] ** 0.5
        seen = self.position.repeat_interleave(groups, 0)[:, None, :]
        return logits.masked_fill(seen > position[None, :, None], -torch.inf).softmax(
            -1
        )

    def keep(self, kept: list[list[int]]) -> None:
        """Keep some tokens of each KV head."""
        index = torch.tensor(kept)
        wide = index[..., None].expand(-1, -1, self.key.shape[-1])
        self.key, self.value = self.key.gather(1, wide), self.value.gather(1, wide)
        self.position = self.position.gather(1, index)


class Oracle:
    """A model under a policy.

    Args:
        model: the model.
        config: the policy's settings.
    """

    def __init__(self, model: DenseModel, config: Any) -> None:
        self.model = model
        self.config = config
        self.counts = LayerCounts(config, model.num_layers)

    def run(
        self,
        prompt: list[int],
        chunks: list[int],
        output: list[int],
        prune: bool = True,
        shared: int = 0,
    ) -> OracleResult:
        """Force a request's output and return what each step would have said.

        Args:
            prompt: its tokens.
            chunks: prompt tokens of each step, in order.
            output: the tokens that were generated.
            prune: whether rows are pruned where the policy says so.
            shared: first tokens that another request computed: they stay whole.
        """
        assert sum(chunks) == len(prompt)
        run = _Run(self, prompt, prune, shared)
        if self.config.evict == "segment":
            run.by_segments(output)
        else:
            for chunk in chunks:
                run.prefill(chunk)
            run.generate(output)
        run.result.held = [layer.key.shape[1] for layer in run.layers]
        return run.result


class _Run:
    """One request on its way."""

    def __init__(
        self, oracle: Oracle, prompt: list[int], prune: bool, shared: int
    ) -> None:
        self.model, self.config = oracle.model, oracle.config
        self.counts, self.prompt, self.prune = oracle.counts, prompt, prune
        self.shared = shared
        self.layers = [_Layer(self.model) for _ in range(self.model.num_layers)]
        self.result = OracleResult(rows=[0] * self.model.num_layers)
        self.done = 0

    def _attend(
        self, index: int, x: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        layer = self.layers[index]
        layer.append(*self.model.qkv(index, x, positions), positions)
        attention = layer.attention(len(x))
        groups = self.model.num_heads // self.model.num_kv_heads
        value = layer.value.repeat_interleave(groups, 0)
        attended = (attention @ value).transpose(0, 1)
        return self.model.finish_layer(index, x, attended)

    # The prompt.

    def prefill(self, chunk: int) -> None:
        before, after = self.done, self.done + chunk
        rows = self.counts.rows(before, after)
        kept = self._kept(after)
        positions = torch.arange(before, after)
        x = self.model.embed(self.prompt[before:after])
        for index, layer in enumerate(self.layers):
            x = self._attend(index, x, positions)
            self.result.rows[index] += len(x)
            following = (rows + rows[-1:])[index + 1] if self.prune else len(x)
            evicts = kept[index] < layer.key.shape[1]
            if not evicts and following >= len(x):
                continue
            by_head = self._prompt_scores(layer, after)
            by_layer = [scores.mean(0, keepdim=True) for scores in by_head]
            own = after - self.shared
            recent, sinks = self.counts.recent(own), self.config.sinks
            chosen = list(range(len(x)))
            if following < len(x):
                of_chunk = [scores[:, -len(x) :] for scores in by_layer]
                left, window = max(0, sinks - before), min(chunk, recent)
                (chosen,) = self._choose(of_chunk, following, left, window)
            if evicts:
                scores = by_layer if self.config.selection == "layer" else by_head
                held = self._choose_own(scores, kept[index], recent)
                layer.keep(held * (len(layer.key) // len(held)))
            x, positions = x[chosen], positions[chosen]
        self.done = after
        if after == len(self.prompt):
            self.result.logprobs.append(self.model.logprobs(x[-1:])[0])

    def _choose_own(
        self, scores: list[torch.Tensor], count: int, recent: int
    ) -> list[list[int]]:
        """All shared tokens, and a choice from the request's own."""
        shared = self.shared
        sinks = max(0, self.config.sinks - shared)
        own = self._choose(scores, count - shared, sinks, recent)
        return [[*range(shared), *(shared + i for i in row)] for row in own]

    def _kept(self, after: int) -> list[int]:
        """Tokens that each layer keeps after a chunk."""
        num_own = max(0, after - self.shared)
        counts = [self.shared + count for count in self.counts.prompt(num_own)]
        if self.shared and num_own < 2 * self.config.min_context:
            counts = [after] * len(counts)  # few tokens are not worth their scores
        if after == len(self.prompt) or self.config.evict == "chunk":
            return counts
        pruned = self.counts.pruned_layers()
        return [c if i in pruned else after for i, c in enumerate(counts)]

    def _prompt_scores(self, layer: _Layer, after: int) -> list[torch.Tensor]:
        """``[num_kv_heads, num_own]``: how much each held token matters, of those that
        are not shared.

        More than one where rounding may have given others.
        """
        own = after - self.shared
        found = self._scores(layer, own, self.counts.recent(own))
        parts = [scores[:, self.shared :] for scores in found]
        if self.config.scorer != "attention":
            return parts
        return [self._pooled(scores, self.counts.recent(own)) for scores in parts]

    def _scores(self, layer: _Layer, own: int, recent: int) -> list[torch.Tensor]:
        """``[num_kv_heads, num_held]``, by the newest of ``own`` queries."""
        config = self.config
        heads, groups = len(layer.key), layer.query.shape[1] // len(layer.key)
        if config.scorer == "recency":
            return [layer.position.to(F64)]
        if config.scorer == "key_norm":
            return [-layer.key.pow(2).sum(-1).sqrt()]
        if config.scorer == "accumulated":
            columns = layer.attention(own).sum(1)
            return [columns.view(heads, groups, -1).mean(1)]
        share = int(Fraction(str(config.query_ratio)) * own)
        newest = min(config.queries or recent, max(recent, share), own)
        if config.prune_from is not None or config.evict == "chunk":
            newest = min(newest, recent)  # of older ones rows or keys may be gone
        attention = layer.attention(newest)
        if config.scorer == "votes":
            # A query votes for keys with more than the average of what it sees.
            share = attention * (attention > 0).sum(-1, keepdim=True)
            return [
                (share >= least).to(F64).sum(1).view(heads, groups, -1).mean(1)
                for least in (1, 1 - MARGIN, 1 + MARGIN)
            ]
        weights = torch.linspace(1, config.distance_weight, newest, dtype=F64)
        columns = (attention * (weights / weights.sum())[:, None]).sum(1)
        return [columns.view(heads, groups, -1).mean(1)]

    def _pooled(self, scores: torch.Tensor, recent: int) -> torch.Tensor:
        if self.config.pooling == "none" or scores.shape[1] <= recent:
            return scores
        reach = self.config.pool_kernel // 2
        context = scores.shape[1] - recent
        pooled = scores.clone()
        for i in range(context):
            near = scores[:, max(0, i - reach) : min(context, i + reach + 1)]
            if self.config.pooling == "avg":
                pooled[:, i] = near.sum(1) / self.config.pool_kernel
            else:
                pooled[:, i] = near.max(1).values
        return pooled

    def _choose(
        self, scores: list[torch.Tensor], count: int, sinks: int, recent: int
    ) -> list[list[int]]:
        """The sinks, the recent window and the best between them, by row."""
        choices = []
        for variant in scores:
            choices.append([])
            for row in variant.tolist():
                end = len(row) - recent
                best = self._best(row, range(sinks, end), count - sinks - recent)
                choices[-1].append([*range(sinks), *best, *range(end, len(row))])
        if any(choice != choices[0] for choice in choices):
            self.result.decided = False
        return choices[0]

    def _best(self, row: list[float], places: Sequence[int], count: int) -> list[int]:
        order = sorted(places, key=lambda i: (-row[i], -i))
        if 0 < count < len(order):
            last, first = row[order[count - 1]], row[order[count]]
            # Scores that are equal by nature are decided: the newer token stays.
            by_nature = self.config.scorer in ("recency", "votes")
            pools = self.config.pooling == "max"
            if last == first and (by_nature or pools):
                return sorted(order[:count])
            if last - first < MARGIN * max(abs(last), abs(first)):
                self.result.decided = False
        return sorted(order[:count])

    # Segments.

    def by_segments(self, output: list[int]) -> None:
        """Feed prompt and output alike, from one compression to the next."""
        size, page = self.config.segment, self.config.page
        recent = math.ceil(self.config.recent / page) * page
        tokens = self.prompt + output[:-1]
        fed = number = 0
        while fed < len(tokens):
            due = (number + 1) * size + recent
            end = min(due, len(tokens))
            self._feed(tokens[fed:end], fed)
            fed = end
            if end == due:
                self._compress_segment(number)
                number += 1
        del self.result.logprobs[: len(self.prompt) - 1]
        self.result.rows = [len(self.prompt)] * len(self.layers)

    def _compress_segment(self, number: int) -> None:
        config, size = self.config, self.config.segment
        for layer, kept in zip(self.layers, self.counts.segment(), strict=True):
            heads, start = len(layer.key), number * kept
            own = layer.key[:, start : start + size]
            if config.scorer == "key_diff":
                unit = own / own.norm(dim=-1, keepdim=True)
                scores = -(unit * unit.mean(1, keepdim=True)).sum(-1)
            elif config.scorer == "key_norm":
                scores = -own.norm(dim=-1)
            else:
                columns = self._newest_attention(layer, config.gen_queries)
                scores = columns[:, start : start + size]
            if config.selection == "layer":
                scores = scores.mean(0, keepdim=True).expand(heads, -1)
            sinks = 0 if number else min(config.sinks, kept)
            places = range(sinks, size)
            held = layer.key.shape[1]
            layer.keep(
                [
                    [
                        *range(start + sinks),
                        *(start + i for i in self._best(row, places, kept - sinks)),
                        *range(start + size, held),
                    ]
                    for row in scores.tolist()
                ]
            )

    def _newest_attention(self, layer: _Layer, newest: int) -> torch.Tensor:
        """``[num_kv_heads, num_held]``: what the newest queries attend to, weighed."""
        weights = torch.linspace(1, self.config.distance_weight, newest, dtype=F64)
        weights = weights / weights.sum()
        columns = (layer.attention(newest) * weights[:, None]).sum(1)
        return columns.view(len(layer.key), -1, columns.shape[1]).mean(1)

    # Generation.

    def generate(self, output: list[int]) -> None:
        """Force the tokens; the last one is never fed back."""
        n, fed = len(self.prompt), 0
        while fed < len(output) - 1:
            groups = self.counts.groups(n, fed)
            end = fed + 1
            while end < len(output) - 1 and self.counts.groups(n, end) == groups:
                end += 1
            self._feed(output[fed:end], n + fed)
            fed = end
            if self.counts.groups(n, fed) > groups:
                self._compress(n, fed)

    def _feed(self, tokens: list[int], start: int) -> None:
        positions = torch.arange(start, start + len(tokens))
        x = self.model.embed(tokens)
        for index in range(len(self.layers)):
            x = self._attend(index, x, positions)
        self.result.logprobs.extend(self.model.logprobs(x))

    def _compress(self, n: int, generated: int) -> None:
        """Compress the generated tokens that have just left the recent window."""
        config = self.config
        group, number = (
            config.exceed_length_to_compress,
            self.counts.groups(n, generated),
        )
        kept = self.counts.group_kept()
        prompt = [self.shared + c for c in self.counts.prompt(n - self.shared)]
        newest = min(config.gen_queries, self.counts.recent(n + generated))
        for index, layer in enumerate(self.layers):
            start = prompt[index] + (number - 1) * kept[index]
            places = range(start, start + group)
            heads = len(layer.key)
            if config.scorer == "recency":
                scores = layer.position.to(F64)
            else:
                scores = self._newest_attention(layer, newest)
            if config.selection == "layer":
                scores = scores.mean(0, keepdim=True).expand(heads, -1)
            held = layer.key.shape[1]
            layer.keep(
                [
                    [
                        *range(start),
                        *self._best(row, places, kept[index]),
                        *range(start + group, held),
                    ]
                    for row in scores.tolist()
                ]
            )
