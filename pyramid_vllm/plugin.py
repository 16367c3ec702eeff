"""Entry point of the ``vllm.general_plugins`` group."""


def register() -> None:
    """Teach vLLM the policy's arguments.

    vLLM calls this in every process: front end, engine core and workers. It may run
    several times. Nothing else of vLLM changes until a policy is asked for.
    """
    from pyramid_vllm.engine_args import install

    install()
