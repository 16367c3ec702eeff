"""vLLM's GPU worker with a KV policy."""

from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from pyramid_vllm.limits import PromptLimits
from pyramid_vllm.model_shape import num_full_attention_layers
from pyramid_vllm.spec import max_chunk, model_weights, request_policies
from pyramid_vllm.worker.memory import OwnBuffer, PromptBuffers
from pyramid_vllm.worker.tiered import TieredWorker

logger = init_logger(f"vllm.{__name__}")


class PyramidGPUWorker(TieredWorker, Worker):
    """Runs the plan on a GPU, by vLLM's V2 runner."""

    def init_device(self) -> None:
        """Say how far this path is proved, then go on."""
        if self.rank == 0:
            logger.warning(
                "KV policy %s: kernels and the V2 runner's adapter are tested on CPUs "
                "alone, interpreted, and were not run on a GPU by the project: its "
                "scripts/gpu-check checks and measures them here",
                self.kv_policy.name,
            )
        super().init_device()

    def own_buffers(self) -> list[OwnBuffer]:
        """The policy's own buffers: those of prompts too."""
        model, scheduler = self.model_config, self.scheduler_config
        threshold = scheduler.long_prefill_token_threshold
        return super().own_buffers() + self.prompt_buffers().all(
            f"max_num_seqs={scheduler.max_num_seqs}, "
            f"max_num_batched_tokens={scheduler.max_num_batched_tokens}, "
            f"long_prefill_token_threshold={threshold}, "
            f"max_model_len={model.max_model_len}"
        )

    def prompt_buffers(self) -> PromptBuffers:
        """The buffers of prompts, each as large as it may become."""
        model, config = self.model_config, self.vllm_config
        # Of full attention: what other layers hold is not scored.
        num_layers = num_full_attention_layers(model.hf_text_config)
        return PromptBuffers(
            policies=request_policies(
                self.kv_policy, num_layers, model_weights(config)
            ),
            limits=PromptLimits.of(config),
            layers=self.query_shape(1, 1),
            num_kv_heads=model.get_num_kv_heads(self.parallel_config),
            max_model_len=model.max_model_len,
            max_chunk=max_chunk(config),
            shares=bool(config.cache_config.enable_prefix_caching),
        )
