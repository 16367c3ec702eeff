"""``pyramid-vllm inspect``: runs a prompt, reports the tokens that tiers kept."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from pyramid_vllm.compat import check_vllm_version
from pyramid_vllm.model_shape import ModelShape
from pyramid_vllm.policy import (
    LengthRule,
    PolicyConfig,
    fitted,
    num_pages,
    profile_weights,
    resolve_policy,
    tier_layout,
)
from pyramid_vllm.policy.requests import KEEP_ALL
from pyramid_vllm.policy.tiers import TierLayout, runs
from pyramid_vllm.tools.chat import chat_ids, has_template, stop_ids
from pyramid_vllm.tools.figures import right_table
from pyramid_vllm.tools.inspection.engine import run_engine
from pyramid_vllm.tools.inspection.page import page
from pyramid_vllm.tools.inspection.settings import BLOCK_SIZE, InspectSettings
from pyramid_vllm.tools.inspection.view import Inspection, inspection_of
from pyramid_vllm.tools.provenance import provenance
from pyramid_vllm.tools.sizes import format_bytes

_SEED = 0


def run_inspect(settings: InspectSettings) -> None:
    """Inspect a prompt; print the table or the JSON, and write the report's files.

    Raises: as ``inspect_prompt``.
    """
    found = inspect_prompt(settings) | provenance(_SEED)
    text, console = json.dumps(found, ensure_ascii=False), Console()
    default = None if settings.json_only else Path("inspect-results")
    folder = settings.out or default
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "inspect.json").write_text(text + "\n", encoding="utf-8")
        (folder / "inspect.html").write_text(page(found), encoding="utf-8")
    if settings.json_only:
        print(text)
        return
    print_table(found, console)
    console.print(f"results are in {folder}")


def inspect_prompt(settings: InspectSettings) -> Inspection:
    """Run the prompt and see what is left of it.

    Raises:
        KVPolicyError: the policy does not fit the model or the set-up.
        ValueError: another option is not valid.
        OSError: the model cannot be read.
        RuntimeError: the engine failed.
    """
    from transformers import AutoConfig, AutoTokenizer

    check_vllm_version()
    policy = resolve_policy(settings.kv_policy, settings.kv_policy_config)
    config = AutoConfig.from_pretrained(settings.model)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    shape = ModelShape.of(config, settings.engine_args.get("dtype", "float32"))
    rule = _rule(policy, config, shape.num_layers)
    prompt_ids = _token_ids(tokenizer, settings)
    longest = len(prompt_ids) + settings.max_tokens
    if longest > shape.max_position:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens and max_tokens is "
            f"{settings.max_tokens}: valid is up to {shape.max_position} "
            "together, the model's longest request"
        )
    rule.cache_lengths(len(prompt_ids))  # not every budget can be met
    num_layers = config.get_text_config().num_hidden_layers
    output_ids, held = run_engine(
        model=str(settings.model),
        kv_policy=None if policy is None else json.dumps(policy.model_dump()),
        prompt_ids=prompt_ids,
        max_tokens=settings.max_tokens,
        stop_ids=stop_ids(str(settings.model), tokenizer),
        engine_args=_engine_args(longest, shape.token_bytes * num_layers)
        | settings.engine_args,
    )
    ids = prompt_ids + output_ids
    request = {
        "model": str(settings.model),
        "tokens": [{"id": i, "text": token_text(tokenizer, i)} for i in ids],
        "num_prompt": len(prompt_ids),
        "num_kv_heads": shape.num_kv_heads,
        "block_size": BLOCK_SIZE,
        "layer_page_bytes": shape.token_bytes * BLOCK_SIZE,
    }
    everything = [[*range(len(ids) - 1)]] * shape.num_kv_heads
    return inspection_of(request, rule, held or [everything] * shape.num_layers)


def _rule(policy: PolicyConfig | None, config: Any, num_layers: int) -> LengthRule:
    if policy is None:
        return LengthRule(KEEP_ALL, TierLayout(num_layers, 1))
    policy = fitted(policy, profile_weights(config.get_text_config()))
    return LengthRule(policy, tier_layout(policy, num_layers))


def _token_ids(tokenizer: Any, settings: InspectSettings) -> list[int]:
    """Raises ValueError: a chat is asked for and the model has no template."""
    if not settings.chat:
        ids: list[int] = tokenizer.encode(settings.prompt_text)
        return ids
    if not has_template(tokenizer):
        raise ValueError(
            f"chat is on, but {settings.model} has no chat template: valid is off"
        )
    return chat_ids(tokenizer, settings.prompt_text)


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token as it stands in a text."""
    piece = tokenizer.convert_ids_to_tokens(token_id) or ""
    text: str = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    # A decoder of whole sentences drops the space in front of a first word.
    if piece.startswith("\u2581") and not text.startswith(" "):
        return f" {text}"
    return text


def _engine_args(longest: int, token_bytes: int) -> dict[str, Any]:
    """Of an engine with room for one request.

    Args:
        longest: its tokens.
        token_bytes: of the KV cache, over all layers.
    """
    (pages,) = num_pages((longest,), BLOCK_SIZE)
    return {
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "block_size": BLOCK_SIZE,
        # Room for groups of unequal tiers, which vLLM pads, and for the null page.
        "kv_cache_memory_bytes": 3 * (pages + 2) * BLOCK_SIZE * token_bytes,
        "max_model_len": longest,
        "max_num_seqs": 1,
        "max_num_batched_tokens": max(1024, longest),
        "seed": _SEED,
    }


def print_table(inspection: Inspection, console: Console) -> None:
    """Print a table of what each tier holds."""
    num_prompt, policy = inspection["num_prompt"], inspection["policy"]
    num_generated = len(inspection["tokens"]) - num_prompt
    table = right_table(
        ("tier", "layers", "prompt kept", "share", "tokens held", "pages", "KV bytes"),
        f"Policy {policy['name']}: {num_prompt} tokens of prompt, {num_generated} "
        "generated",
    )
    for tier in inspection["tiers"]:
        table.add_row(
            str(tier["tier"]),
            runs(tier["layers"]),
            f"{tier['num_prompt_held']:,}",
            f"{tier['num_prompt_held'] / num_prompt:.1%}",
            f"{tier['num_held']:,}",
            f"{tier['pages']:,}",
            format_bytes(tier["kv_bytes"]),
        )
    console.print(table)
    ours = sum(tier["kv_bytes"] for tier in inspection["tiers"])
    stock = inspection["stock_kv_bytes"]
    console.print(
        f"{format_bytes(ours)} of KV cache, {ours / stock:.1%} of stock vLLM's "
        f"{format_bytes(stock)}"
    )
