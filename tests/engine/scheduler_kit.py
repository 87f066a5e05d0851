"""vLLM's real schedulers without a model: the tests say what the model put out, and when."""

import json
from itertools import count
from pathlib import Path
from typing import Any

from vllm.config import (
    CacheConfig,
    DeviceConfig,
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama_in(folder: Path) -> Path:
    """Write the configuration of a tiny Llama."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


class Bench:
    """A scheduler, and the model's part of its steps."""

    _ids = count()

    def __init__(
        self,
        folder: Path,
        cls: type = Scheduler,
        *,
        headway: dict[str, Any] | None = None,
        tokens: int = 256,
        seats: int = 16,
        blocks: int = 4096,
        caching: bool = False,
        policy: str = "fcfs",
        speculated: int = 0,
        max_loras: int = 0,
        **scheduler: Any,
    ) -> None:
        model = ModelConfig(str(llama_in(folder / "llama")), skip_tokenizer_init=True, dtype="float32")
        is_async = issubclass(cls, AsyncScheduler)
        config = VllmConfig(
            model_config=model,
            device_config=DeviceConfig("cpu"),
            cache_config=CacheConfig(block_size=16, enable_prefix_caching=caching),
            parallel_config=ParallelConfig(),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=tokens,
                max_num_seqs=seats,
                max_model_len=8192,
                policy=policy,
                is_encoder_decoder=False,
                async_scheduling=is_async,
                **{"enable_chunked_prefill": True} | scheduler,
            ),
            speculative_config=SpeculativeConfig(
                method="ngram_gpu" if is_async else "ngram",
                num_speculative_tokens=speculated,
                prompt_lookup_max=3,
            )
            if speculated
            else None,
            lora_config=LoRAConfig(max_lora_rank=8, max_loras=max_loras) if max_loras else None,
            additional_config={"headway": headway or {}},
        )
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=model.dtype)
        self._sampling: dict[int, set[str]] = {}
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(16, sha256) if caching else None
        self.scheduler = cls(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=16,
            log_stats=True,
        )

    def add(
        self,
        prompt: int | list[int],
        output: int = 1000,
        *,
        name: str = "",
        priority: int = 0,
        adapter: int = 0,
        resumable: bool = False,
        structured: StructuredOutputsParams | None = None,
        **extra: Any,
    ) -> Request:
        """Bring a request. A prompt given as a number has tokens that no other has."""
        name = name or f"r{next(self._ids)}"
        if isinstance(prompt, int):
            prompt = [hash(name) % 40000 + 3] * prompt
        params = SamplingParams(
            max_tokens=output, ignore_eos=True, extra_args=extra or None, structured_outputs=structured
        )
        params.update_from_generation_config({}, 2)
        request = Request(
            request_id=name,
            prompt_token_ids=prompt,
            sampling_params=params,
            pooling_params=None,
            priority=priority,
            lora_request=LoRARequest(f"adapter-{adapter}", adapter, "/nowhere") if adapter else None,
            block_hasher=self._hasher,
            resumable=resumable,
        )
        self.scheduler.add_request(request)
        return request

    def schedule(self) -> Any:
        """Have the scheduler form a step."""
        output = self.scheduler.schedule()
        requests = self.scheduler.requests
        sampling = {each for each in output.num_scheduled_tokens if not requests[each].is_prefill_chunk}
        self._sampling[id(output)] = sampling
        return output

    def finish(self, output: Any) -> Any:
        """End a step: whoever has no prompt left gets a token."""
        ids = list(output.num_scheduled_tokens)
        sampling = self._sampling.pop(id(output))
        sampled = [[7] if each in sampling else [] for each in ids]
        return self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={each: n for n, each in enumerate(ids)},
                sampled_token_ids=sampled,
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
            ),
        )

    def step(self) -> dict[str, int]:
        """Run one step; return the tokens each request got in it, in vLLM's order."""
        output = self.schedule()
        self.finish(output)
        return dict(output.num_scheduled_tokens)

    def close(self) -> None:
        """End the scheduler."""
        self.scheduler.shutdown()
