"""An OpenAI-compatible server: vLLM engines with a KV policy, run by Ray Serve."""

from typing import Annotated, Any

import typer
from engines import (
    AddressOption,
    Device,
    DeviceOption,
    EngineOption,
    ModelOption,
    PolicyConfigOption,
    PolicyOption,
    engine_kwargs,
    find_device,
    start_ray,
)

from pyramid_vllm.tools.cli.model import make_model
from pyramid_vllm.tools.options import or_fail

#: GPUs by this one line, or by ``--device gpu``.
DEVICE = "cpu"
APPLICATION = "llm"


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


def main(
    model: ModelOption = None,
    model_id: Annotated[str, typer.Option(help="Its name in requests.")] = "default",
    kv_policy: PolicyOption = "pyramid",
    kv_policy_config: PolicyConfigOption = None,
    device: DeviceOption = DEVICE,
    replicas: Annotated[int, typer.Option(min=1, help="Engines.")] = 1,
    engine_args: EngineOption = None,
    host: Annotated[
        str, typer.Option(help="Where requests are taken; other hosts: 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    address: AddressOption = None,
) -> None:
    """Serve a model until interrupted."""
    kind = or_fail(lambda: find_device(device))
    settings = or_fail(
        lambda: engine_kwargs(kind, kv_policy, kv_policy_config, engine_args)
    )
    source = model or or_fail(lambda: str(make_model()))
    config = make_config(model_id, source, kind, settings, replicas)
    start_ray(address)

    from ray import serve

    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(make_app(config), name=APPLICATION, blocking=True)
    finally:
        serve.delete(APPLICATION)  # a cluster would go on serving it


if __name__ == "__main__":
    typer.run(main)
