"""The teacher as a writer in vLLM. An engine of its own: the one that captures is a pooling model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featurestore.format.written import WriterSpec
from pipeline.engines.base import EngineConfig
from pipeline.engines.llm import SupervisedLLM
from pipeline.writing.base import Wrote
from pipeline.writing.plan import Array, WritingJob, cut_at_end, seed_of


class VllmWriter:
    """One vLLM engine that samples; texts of one prompt share its prefill."""

    def __init__(self, config: EngineConfig, spec: WriterSpec, verbose: bool = False) -> None:
        self._spec = spec
        # generation_config: the checkpoint's own wishes would bend the distribution.
        self._llm = SupervisedLLM(
            config, verbose, runner="generate", generation_config="vllm", enable_prefix_caching=True
        )

    def write(self, jobs: Sequence[WritingJob], wrote: Wrote) -> list[Array]:
        from vllm import SamplingParams

        spec = self._spec
        sampling = [
            SamplingParams(
                temperature=spec.temperature,
                top_p=spec.top_p,
                max_tokens=spec.max_tokens,
                seed=seed_of(spec.seed, job.key),
                stop_token_ids=list(spec.ends),
                detokenize=False,
            )
            for job in jobs
        ]
        prompts = [{"prompt_token_ids": job.prompt.tolist()} for job in jobs]
        outputs: list[Any] = self._llm.call(lambda llm: llm.generate(prompts, sampling, use_tqdm=False))
        texts = [cut_at_end(output.outputs[0].token_ids, spec.ends) for output in outputs]
        wrote(len(texts), sum(map(len, texts)))
        return texts

    def close(self) -> None:
        self._llm.close()
