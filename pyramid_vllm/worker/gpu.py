"""vLLM's GPU worker with a KV policy."""

from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from pyramid_vllm.model_shape import num_full_attention_layers
from pyramid_vllm.spec import length_rule
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

    def own_bytes(self) -> int:
        """Bytes of the policy's own buffers: queries, scores and kept indices."""
        model, scheduler = self.model_config, self.scheduler_config
        # Of full attention: what other layers hold is not scored.
        num_layers = num_full_attention_layers(model.hf_text_config)
        # One prompt as long as any, and as many short ones as a step computes.
        tokens = model.max_model_len + scheduler.max_num_batched_tokens
        heads = model.get_num_kv_heads(self.parallel_config)
        # Scores, pooled scores and kept indices: four bytes each.
        scores = 3 * 4 * num_layers * heads * tokens
        rule = length_rule(self.kv_policy, num_layers)
        # Of a prompt that is cut into chunks, one step's and the next one's.
        waiting = self.query_shape(2, rule.num_queries(model.max_model_len))
        logger.info(
            "KV policy %s: %s bytes of the KV memory hold scores of %d tokens, %s "
            "queries of prompts that are cut",
            self.kv_policy.name,
            f"{scores:,}",
            tokens,
            f"{waiting.num_bytes:,}",
        )
        return super().own_bytes() + scores + waiting.num_bytes
