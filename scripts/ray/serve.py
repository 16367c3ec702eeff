"""An OpenAI-compatible server: vLLM engines with a KV policy, run by Ray Serve."""

from dataclasses import dataclass
from typing import Any

import engines
import typer
from engines import Device, engine_kwargs, find_device, start_ray

from pyramid_vllm.tools import options
from pyramid_vllm.tools.cli.model import make_model
from pyramid_vllm.tools.options import command, option

#: Change this line for GPUs, or pass ``--device gpu``.
DEVICE = "cpu"
APPLICATION = "llm"


@dataclass(frozen=True)
class Settings:
    """Serve a model until interrupted."""

    model: str | None = option(None, options.MODEL_NAME)
    model_id: str = option("default", "Its name in requests.")
    kv_policy: str = option("pyramid", engines.POLICY)
    kv_policy_config: str | None = option(None, options.POLICY_OVERRIDES)
    device: str = option(DEVICE, engines.DEVICE)
    replicas: int = option(1, "Engines.", min=1)
    engine_args: str | None = option(None, engines.ENGINE_ARGS)
    host: str = option("127.0.0.1", "Where requests are taken; other hosts: 0.0.0.0.")
    port: int = option(8000, min=1, max=65535)
    address: str | None = option(None, engines.ADDRESS, envvar="RAY_ADDRESS")


def make_config(
    model_id: str, model: str, device: Device, settings: dict[str, Any], replicas: int
) -> Any:
    """Ray's settings of the engines."""
    from ray.serve.llm import LLMConfig

    return LLMConfig(
        model_loading_config={"model_id": model_id, "model_source": model},
        engine_kwargs=settings,
        placement_group_config={"bundle_per_worker": device.bundle},
        # The engine's bundle has the CPU that it needs.
        deployment_config={
            "num_replicas": replicas,
            "ray_actor_options": {"num_cpus": 0},
        },
    )


def make_app(config: Any) -> Any:
    """The application: one engine in each replica, and one ingress in front of them."""
    from ray.serve.llm import build_openai_app

    ingress = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.25}}
    return build_openai_app(
        {"llm_configs": [config], "ingress_deployment_config": ingress}
    )


def run(settings: Settings) -> None:
    """Serve the model."""
    device = find_device(settings.device)
    policy = settings.kv_policy, settings.kv_policy_config
    kwargs = engine_kwargs(device, *policy, settings.engine_args)
    model = settings.model or str(make_model())
    config = make_config(settings.model_id, model, device, kwargs, settings.replicas)
    start_ray(settings.address)

    from ray import serve

    serve.start(http_options={"host": settings.host, "port": settings.port})
    try:
        serve.run(make_app(config), name=APPLICATION, blocking=True)
    finally:
        serve.delete(APPLICATION)  # a cluster would go on serving it


if __name__ == "__main__":
    typer.run(command(Settings, run))
