"""The frozen, validated settings of a KV policy."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from pyramid_vllm.policy.errors import KVPolicyError
from pyramid_vllm.policy.scorers import SCORERS, Queries, Scorer, find_scorer

#: Names in PyramidInfer's released code of settings that we name otherwise.
ALIASES = {
    "streamingllm_sink_len": "sinks",
    "min_context_length": "min_context",
    "prefill_recent_ratio": "recent_ratio",
    "prefill_decay_strategy": "shape",
}

Decay = Literal["cosine", "linear"]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PolicyConfig(BaseModel):
    """Which share of a request's prompt tokens each layer keeps, and how it chooses.

    Lengths are in tokens. Every field can be set in a policy file, as inline JSON
    and with ``--kv-policy-config``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    budget: Literal["retention", "pyramidinfer", "arithmetic"] = "retention"
    """How the kept tokens are divided among layers: see ``policy.budgets``."""
    retention: float = Field(default=0.5, gt=0, le=1)
    """Fraction of the prompt's tokens kept, mean over layers."""
    shape: Decay = "cosine"
    """How the kept fraction falls from the first layer to the last."""
    steepness: float = Field(default=0.5, ge=0, le=1)
    """0: every layer keeps equally much; 1: the steepest fall that still meets
    ``retention``. Budget ``retention`` only."""
    layer_weights: tuple[Weight, ...] | Literal["auto"] | None = None
    """Relative share of each full-attention layer in the kept tokens. Replaces
    ``shape`` and ``steepness``; tiers then group layers with similar weights.
    ``auto``: the measured weights, if the model has a profile and nothing is pruned.
    Budget ``retention`` only."""
    prefill_decay_ratio: float | None = Field(default=None, ge=0, le=1)
    """Fraction left after the last decay; none: solved from ``retention``. Budget
    ``pyramidinfer`` only."""
    layerwise_downsample_interval: PositiveInt = 1
    """Layers from one decay to the next. Budget ``pyramidinfer`` only."""
    capacity: PositiveInt | None = None
    """Mean tokens kept per layer, whatever the prompt's length; none: ``retention``
    decides. Budget ``arithmetic`` only."""
    beta: PositiveInt = 1
    """Ratio of the mean layer budget to the smallest; 1: all layers have the same.
    Budget ``arithmetic`` only."""
    tiers: PositiveInt | Literal["auto", "layers"] = "auto"
    """Number of runs of layers that share one count; ``layers``: one for each layer."""
    sinks: int = Field(default=4, ge=0)
    """First tokens of the prompt that are always kept."""
    recent: int = Field(default=64, ge=1)
    """Newest tokens, which are always kept and whose queries score."""
    recent_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompt that is added to the recent window."""
    min_context: int = Field(default=128, ge=0)
    """Prompts up to this length are kept whole, and no layer keeps fewer tokens. Budget
    ``pyramidinfer``: counts the tokens before the recent window."""
    scorer: str = "attention"
    """How tokens are ranked: a name of ``policy.scorers``, or ``module:name``."""
    distance_weight: float = Field(default=1.2, ge=1)
    """Weight of the newest query in the scores; the oldest in the window has 1."""
    queries: PositiveInt | None = None
    """Newest tokens whose queries score; none: the recent window, which is also the
    maximum under ``prune_from`` or ``evict: chunk``."""
    query_ratio: float = Field(default=1.0, gt=0, le=1)
    """Maximum number of scoring queries, as a share of the prompt, because scoring
    takes time; queries of the recent window always score."""
    pooling: Literal["none", "avg", "max"] = "none"
    """How scores of adjacent tokens before the recent window are combined."""
    pool_kernel: PositiveInt = 5
    """Tokens in a pooling window; odd."""
    selection: Literal["layer", "head"] = "layer"
    """Whether all KV heads of a layer keep the same tokens, or each its own."""
    evict: Literal["prompt_end", "chunk", "segment"] = "prompt_end"
    """When to evict: once, at the prompt's end; after every chunk of a prefill; or
    ``segment`` by segment, in prompts and outputs alike, so that what is kept depends
    on the tokens alone and requests with the same prefix share it."""
    segment: PositiveInt = 512
    """Tokens of a segment, whole pages of the KV cache. It is compressed, by its share
    of ``retention`` in whole pages, once the ``recent`` tokens after it are computed.
    ``evict: segment`` only."""
    page: PositiveInt = 16
    """Tokens of a page of the KV cache, which engines set to their own. ``evict:
    segment`` only."""
    hit_split: Literal["keep", "ignore"] = "keep"
    """What happens to tokens that a prompt got from the prefix cache. ``keep``: they
    stay whole and shared, and only what the request computes itself is evicted, so
    that a hit may change what is kept. ``ignore``: the whole prompt is evicted as
    without a hit; the tokens whose queries score are computed again. Read from the
    engine's policy, not from a single request's."""
    prune_from: int | None = Field(default=None, ge=0)
    """First layer whose input may be pruned: from the next tier on, layers compute
    only the rows that they keep. None: every layer computes every row."""
    exceed_length_to_compress: int | None = Field(default=None, ge=2)
    """Group length in which generated tokens are compressed once they leave the recent
    window; none: all generated tokens are kept."""
    gen_compress_ratio: float = Field(default=0.9, gt=0, le=1)
    """Fraction of a group that the first layer keeps."""
    gen_decay_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of ``gen_compress_ratio`` that the last layer keeps."""
    gen_decay_strategy: Decay = "cosine"
    """How the kept fraction of a group falls from the first layer to the last."""
    gen_queries: PositiveInt = 16
    """Newest generated tokens whose queries score a group."""

    growth_reserve: NonNegativeInt | Literal["all"] = 64
    """Generated tokens for which each running sequence keeps free pages when another
    is admitted. A sequence that can generate at most twice as many gets pages for all.
    Read from the engine's policy, not from a single request's."""

    @field_validator("scorer")
    @classmethod
    def _known_scorer(cls, value: str) -> str:
        find_scorer(value)
        return value

    @field_validator(
        "layer_weights",
        "prefill_decay_ratio",
        "capacity",
        "queries",
        "prune_from",
        "exceed_length_to_compress",
        mode="before",
    )
    @classmethod
    def _none_by_name(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("pool_kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("valid are odd numbers, centred on a token")
        return value

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.scored_queries is Queries.ALL and self.queries is not None:
            raise ValueError(f"queries={self.queries}: '{self.scorer}' reads them all")
        if self.scored_queries is Queries.ALL and (
            self.prune_from is not None or self.evict == "chunk"
        ):
            raise ValueError(
                f"scorer='{self.scorer}' adds up over the whole prompt: valid with it "
                "are prune_from none and evict 'prompt_end'"
            )
        self._check_segments()
        if self.generation and not self.scoring.scores_groups:
            raise ValueError(
                f"scorer='{self.scorer}' has no scores for generated tokens: valid "
                "with it is exceed_length_to_compress none"
            )
        if self.budget == "arithmetic" and (
            self.prune_from is not None or self.evict == "chunk"
        ):
            raise ValueError(
                "budget='arithmetic' may keep less as a prompt grows: valid "
                "with it are prune_from none and evict 'prompt_end'"
            )
        if self.capacity is not None and self.budget != "arithmetic":
            raise ValueError("capacity is valid only with budget='arithmetic'")
        if self.given_weights is not None and self.budget != "retention":
            raise ValueError("layer_weights is valid only with budget='retention'")
        window = self.sinks + self.recent
        if self.capacity is not None and self.capacity < window:
            raise ValueError(
                f"capacity={self.capacity}: valid is at least sinks + recent, {window}"
            )
        return self

    def _check_segments(self) -> None:
        if self.evict != "segment":
            return
        for name, value, valid in (
            ("prune_from", self.prune_from, None),
            ("exceed_length_to_compress", self.exceed_length_to_compress, None),
            ("capacity", self.capacity, None),
            ("recent_ratio", self.recent_ratio, 0),
            ("hit_split", self.hit_split, "keep"),
        ):
            if value != valid:
                raise ValueError(
                    f"{name}={value}: valid with evict 'segment' is "
                    f"{'none' if valid is None else valid}"
                )
        if self.segment % self.page:
            raise ValueError(
                f"segment={self.segment}: valid with pages of {self.page} tokens are "
                "multiples of these"
            )
        if not self.scoring.scores_segments:
            valid_scorers = ", ".join(
                name for name, found in SCORERS.items() if found.scores_segments
            )
            raise ValueError(
                f"scorer='{self.scorer}' has no scores for segments: valid with evict "
                f"'segment' are {valid_scorers}"
            )

    @model_validator(mode="after")
    def _retention_agrees(self) -> Self:
        self.check_retention()
        return self

    def check_retention(self) -> None:
        """Check ``retention`` against the one setting that has to agree with it.

        Raises:
            ValueError: the recent window is larger.
        """
        if self.fixes_decay or self.capacity is not None:
            return
        if self.recent_ratio >= self.retention:
            raise ValueError(
                f"recent_ratio={self.recent_ratio} must be below "
                f"retention={self.retention}: the recent window is always kept"
            )

    def with_page(self, page: int) -> Self:
        """The policy on an engine whose pages have ``page`` tokens.

        Raises:
            KVPolicyError: segments are not whole pages.
        """
        changed = self.model_copy(update={"page": page})
        try:
            changed._check_segments()
        except ValueError as error:
            raise KVPolicyError(f"KV policy '{self.name}': {error}") from None
        return changed

    @property
    def given_weights(self) -> tuple[float, ...] | None:
        """``layer_weights`` as numbers; None: not set, or still ``auto``."""
        return None if self.layer_weights == "auto" else self.layer_weights

    @property
    def scoring(self) -> Scorer:
        """The scorer itself."""
        return find_scorer(self.scorer)

    @property
    def scored_queries(self) -> Queries:
        """Which queries the scorer reads."""
        return self.scoring.queries

    @property
    def needs_queries(self) -> bool:
        """Whether the scorer reads queries at all."""
        return self.scored_queries is not Queries.NONE

    @property
    def pools(self) -> bool:
        """Whether scores are pooled."""
        return self.pooling != "none" and self.scoring.is_pooled

    @property
    def generation(self) -> bool:
        """Whether generated tokens are compressed."""
        return self.exceed_length_to_compress is not None

    @property
    def segments(self) -> bool:
        """Whether prompts and outputs are compressed segment by segment."""
        return self.evict == "segment"

    @property
    def fixes_decay(self) -> bool:
        """Whether the decay is set, so that ``retention`` is not read."""
        return self.budget == "pyramidinfer" and self.prefill_decay_ratio is not None


def validated(settings: dict[str, Any], source: str) -> PolicyConfig:
    """Build a ``PolicyConfig``.

    Raises:
        KVPolicyError: names every invalid setting, its value and what is valid.
    """
    try:
        return PolicyConfig.model_validate(settings)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise KVPolicyError(f"KV policy {source}: {problems}") from None


def _describe(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"][:1])
    if problem["type"] == "extra_forbidden":
        valid = ", ".join(sorted(PolicyConfig.model_fields))
        return f"unknown setting '{path}'; valid settings are {valid}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not path:
        return message
    return f"setting '{path}' is {problem['input']!r}: {message}"
