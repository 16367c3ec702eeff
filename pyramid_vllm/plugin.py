"""Entry point of the ``vllm.general_plugins`` group."""


def register() -> None:
    """Add the policy's arguments to vLLM.

    vLLM calls this in every process, possibly several times: front end, engine core and
    workers. vLLM is otherwise unchanged until a policy is configured.
    """
    from pyramid_vllm.engine_args import install

    install()
