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
from pyramid_vllm.policy.scorers import Queries, Scorer, find_scorer

#: Names of PyramidInfer's released code for settings that have another name here.
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
    """How the kept tokens are shared out among layers: see ``policy.budgets``."""
    retention: float = Field(default=0.5, gt=0, le=1)
    """Mean fraction of the prompt's tokens kept, over layers."""
    shape: Decay = "cosine"
    """How the kept fraction falls from the first layer to the last."""
    steepness: float = Field(default=0.5, ge=0, le=1)
    """0 keeps equally much in every layer; 1 is the steepest fall that still meets
    ``retention``. Budget ``retention`` only."""
    layer_weights: tuple[Weight, ...] | Literal["auto"] | None = None
    """Share of each full-attention layer in what is kept, relative to the others',
    in place of ``shape`` and ``steepness``; tiers are then of layers with like
    weights. ``auto``: the measured ones, if the model has a profile and nothing is
    pruned. Budget ``retention`` only."""
    prefill_decay_ratio: float | None = Field(default=None, ge=0, le=1)
    """What the last of the decays leaves; none: solved from ``retention``. Budget
    ``pyramidinfer`` only."""
    layerwise_downsample_interval: PositiveInt = 1
    """Layers from one decay to the next. Budget ``pyramidinfer`` only."""
    capacity: PositiveInt | None = None
    """Mean tokens kept a layer, whatever the prompt's length; none: by ``retention``.
    Budget ``arithmetic`` only."""
    beta: PositiveInt = 1
    """Mean over smallest budget of a layer; 1 is the same budget for all. Budget
    ``arithmetic`` only."""
    tiers: PositiveInt | Literal["auto", "layers"] = "auto"
    """Number of runs of layers that share one count; ``layers`` is one a layer."""
    sinks: int = Field(default=4, ge=0)
    """First tokens of the prompt that are always kept."""
    recent: int = Field(default=64, ge=1)
    """Newest tokens that are always kept and whose queries do the scoring."""
    recent_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompt that the recent window grows by."""
    min_context: int = Field(default=128, ge=0)
    """A prompt up to this length is kept whole, and no layer ever keeps less. Budget
    ``pyramidinfer``: of the tokens before the recent window."""
    scorer: str = "attention"
    """How tokens are ranked: a name of ``policy.scorers``, or ``module:name``."""
    distance_weight: float = Field(default=1.2, ge=1)
    """Weight of the newest query in the scores; the oldest in the window has 1."""
    queries: PositiveInt | None = None
    """Newest tokens whose queries score; none: those of the recent window, as at most
    where prompts are pruned or evicted chunk by chunk."""
    query_ratio: float = Field(default=1.0, gt=0, le=1)
    """Most queries that score, as a share of the prompt, for scoring takes time; those
    of the recent window always do."""
    pooling: Literal["none", "avg", "max"] = "none"
    """How neighbours before the recent window share their scores."""
    pool_kernel: PositiveInt = 5
    """Tokens that are pooled, an odd number."""
    selection: Literal["layer", "head"] = "layer"
    """Whether the KV heads of a layer keep the same tokens or each its own."""
    evict: Literal["prompt_end", "chunk"] = "prompt_end"
    """Evict once, at the prompt's end, or after every chunk of a chunked prefill."""
    prune_from: int | None = Field(default=None, ge=0)
    """First layer whose input is pruned: from the next tier on, deeper layers compute
    only the rows that they keep. None: every layer computes every row."""
    exceed_length_to_compress: int | None = Field(default=None, ge=2)
    """Generated tokens that leave the recent window are compressed in groups of this
    length; none: generated tokens are all kept."""
    gen_compress_ratio: float = Field(default=0.9, gt=0, le=1)
    """Fraction of a group that the first layer keeps."""
    gen_decay_ratio: float = Field(default=0.1, ge=0, le=1)
    """What the last layer keeps of ``gen_compress_ratio``."""
    gen_decay_strategy: Decay = "cosine"
    """How the kept fraction of a group falls from the first layer to the last."""
    gen_queries: PositiveInt = 16
    """Newest generated tokens whose queries score a group."""

    growth_reserve: NonNegativeInt | Literal["all"] = 64
    """Generated tokens that each running sequence is left pages for when another one
    is admitted; all that it may still generate, where that is at most twice as much.
    An engine's setting: that of a single request's policy is not read."""

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
            raise ValueError("valid are odd numbers: the token lies in the middle")
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
        if self.generation and not self.scoring.scores_groups:
            raise ValueError(
                f"scorer='{self.scorer}' has no scores for generated tokens: valid "
                "with it is exceed_length_to_compress none"
            )
        if self.budget == "arithmetic" and (
            self.prune_from is not None or self.evict == "chunk"
        ):
            raise ValueError(
                "budget='arithmetic' takes from deep layers as a prompt grows: valid "
                "with it are prune_from none and evict 'prompt_end'"
            )
        if self.capacity is not None and self.budget != "arithmetic":
            raise ValueError("capacity is a setting of budget='arithmetic' alone")
        if self.given_weights is not None and self.budget != "retention":
            raise ValueError("layer_weights is a setting of budget='retention' alone")
        window = self.sinks + self.recent
        if self.capacity is not None and self.capacity < window:
            raise ValueError(
                f"capacity={self.capacity}: valid is at least sinks + recent, {window}"
            )
        return self

    @model_validator(mode="after")
    def _window_fits_retention(self) -> Self:
        if self.fixes_decay or self.capacity is not None:
            return self
        if self.recent_ratio >= self.retention:
            raise ValueError(
                f"recent_ratio={self.recent_ratio} must be below "
                f"retention={self.retention}: the recent window is always kept"
            )
        return self

    @property
    def given_weights(self) -> tuple[float, ...] | None:
        """``layer_weights``, where they are known."""
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
    def fixes_decay(self) -> bool:
        """Whether the decay is given, so that ``retention`` is not read."""
        return self.budget == "pyramidinfer" and self.prefill_decay_ratio is not None


def validated(settings: dict[str, Any], source: str) -> PolicyConfig:
    """Build a ``PolicyConfig``.

    Raises:
        KVPolicyError: names every setting that is wrong, its value and what is valid.
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
