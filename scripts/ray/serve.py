"""An OpenAI-compatible server: vLLM engines with a KV policy, run by Ray Serve."""

from typing import Annotated, Any

import typer
from engines import (
    AddressOption,
    Device,
    DeviceOption,
    EngineOption,
    PolicyConfigOption,
    PolicyOption,
    engine_kwargs,
    find_device,
    start_ray,
)

from pyramid_vllm.cli.failing import or_fail
from pyramid_vllm.cli.model import make_model

#: GPUs by this one line, or by ``--device gpu``.
DEVICE = "cpu"


def make_app(
    model_id: str, model: str, device: Device, settings: dict[str, Any], replicas: int
) -> Any:
    """The application: one engine a replica behind one ingress."""
    from ray.serve.llm import LLMConfig, build_openai_app

    config = LLMConfig(
        model_loading_config={"model_id": model_id, "model_source": model},
        engine_kwargs=settings,
        placement_group_config={"bundle_per_worker": device.bundle},
        # The engine's bundle has the CPU that it needs.
        deployment_config={
            "num_replicas": replicas,
            "ray_actor_options": {"num_cpus": 0},
        },
    )
    ingress = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.25}}
    return build_openai_app(
        {"llm_configs": [config], "ingress_deployment_config": ingress}
    )


def main(
    model: Annotated[
        str | None, typer.Option(help="A model; default: the bundled small one.")
    ] = None,
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
    start_ray(address)

    from ray import serve

    serve.start(http_options={"host": host, "port": port})
    app = make_app(model_id, source, kind, settings, replicas)
    serve.run(app, name="llm", blocking=True)


if __name__ == "__main__":
    typer.run(main)
