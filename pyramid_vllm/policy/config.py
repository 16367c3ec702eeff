"""The frozen, validated settings of a KV policy."""

from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from pyramid_vllm.policy.errors import KVPolicyError

#: Scorers by name, and whether a scorer reads the queries of the recent window.
SCORERS: dict[str, bool] = {"attention": True, "recency": False}


class PolicyConfig(BaseModel):
    """Which share of a request's prompt tokens each layer keeps, and how it chooses.

    Lengths are in tokens. Every field can be set in a policy file, as inline JSON
    and with ``--kv-policy-config``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    retention: float = Field(default=0.5, gt=0, le=1)
    """Mean fraction of the prompt's tokens kept, over layers."""
    shape: Literal["cosine", "linear"] = "cosine"
    """How the kept fraction falls from the first layer to the last."""
    steepness: float = Field(default=0.5, ge=0, le=1)
    """0 keeps equally much in every layer; 1 is the steepest fall that still meets
    ``retention``."""
    tiers: PositiveInt | Literal["auto", "layers"] = "auto"
    """Number of runs of layers that share one count; ``layers`` is one a layer."""
    sinks: int = Field(default=4, ge=0)
    """First tokens of the prompt that are always kept."""
    recent: int = Field(default=64, ge=1)
    """Newest tokens that are always kept and whose queries do the scoring."""
    recent_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompt that the recent window grows by."""
    min_context: int = Field(default=128, ge=0)
    """A prompt up to this length is kept whole, and no layer ever keeps less."""
    scorer: str = "attention"
    distance_weight: float = Field(default=1.2, ge=1)
    """Weight of the newest query in the scores; the oldest in the window has 1."""
    selection: Literal["layer", "head"] = "layer"
    """Whether the KV heads of a layer keep the same tokens or each its own."""
    evict: Literal["prompt_end", "chunk"] = "prompt_end"
    """Evict once, at the prompt's end, or after every chunk of a chunked prefill."""

    @field_validator("scorer")
    @classmethod
    def _known_scorer(cls, value: str) -> str:
        if value not in SCORERS:
            raise ValueError(f"valid scorers are {', '.join(sorted(SCORERS))}")
        return value

    @model_validator(mode="after")
    def _window_fits_retention(self) -> Self:
        if self.recent_ratio >= self.retention:
            raise ValueError(
                f"recent_ratio={self.recent_ratio} must be below "
                f"retention={self.retention}: the recent window is always kept"
            )
        return self

    @property
    def needs_queries(self) -> bool:
        """Whether the scorer reads the queries of the recent window."""
        return SCORERS[self.scorer]


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
