"""A writer in plain transformers: any causal LM with safetensors, a ternary student too.

B texts of a batch, P the longest prompt of it, S tokens of a text, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from featurestore.format.written import WriterSpec
from pipeline.engines.base import BATCH_TOKENS, EngineConfig
from pipeline.engines.batching import batches
from pipeline.engines.loading import load_causal_lm
from pipeline.engines.memory import memory_for
from pipeline.writing.base import Wrote
from pipeline.writing.plan import Array, WritingJob, cut_at_end, seed_of
from pipeline.writing.sampling import draw, uniforms

_SMALLER = "let a smaller checkpoint write, or one that is saved in fewer bits (--from-student)"
_FEWER = "lower --max-num-batched-tokens, or --continuation-max-tokens"


class TransformersWriter:
    """One causal language model; batches, padded on the left, hold `max_num_batched_tokens` at most.

    Raises:
        EngineError: memory ran out, while it was loaded or at a batch.
    """

    def __init__(self, config: EngineConfig, spec: WriterSpec) -> None:
        self._spec, self._limit = spec, config.max_num_batched_tokens or BATCH_TOKENS
        self._vocab_size = config.vocab_size
        with memory_for(f"loading {config.model} in {config.dtype}, to write", _SMALLER), _eager():
            model = load_causal_lm(config)
            _settle_ternary(model)
        # The checkpoint's own wishes (a repetition penalty, say) would bend the distribution.
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=spec.max_tokens,
            eos_token_id=list(spec.ends) or None,
            pad_token_id=spec.ends[0] if spec.ends else 0,
        )
        self._model = model

    def write(self, jobs: Sequence[WritingJob], wrote: Wrote) -> list[Array]:
        texts: dict[int, Array] = {}
        for places in batches([len(job.prompt) for job in jobs], self._limit, self._spec.max_tokens):
            with memory_for(f"writing {len(places):,} texts together", _FEWER):
                batch = self._write_batch([jobs[place] for place in places])
            texts |= zip(places, batch, strict=True)
            wrote(len(batch), sum(map(len, batch)))
        return [texts[place] for place in range(len(jobs))]

    def _write_batch(self, jobs: Sequence[WritingJob]) -> list[Array]:
        spec, width = self._spec, max(len(job.prompt) for job in jobs)
        ids_BP = np.zeros((len(jobs), width), dtype=np.int64)
        mask_BP = np.zeros_like(ids_BP)
        for row, job in enumerate(jobs):
            ids_BP[row, width - len(job.prompt) :] = job.prompt
            mask_BP[row, width - len(job.prompt) :] = 1
        uniform_BS = np.stack([uniforms(seed_of(spec.seed, job.key), spec.max_tokens) for job in jobs])
        drawn = _Drawn(torch.from_numpy(uniform_BS).to(self._model.device), width, spec, self._vocab_size)
        with torch.inference_mode(), _eager():
            out_BT = self._model.generate(
                input_ids=torch.from_numpy(ids_BP).to(self._model.device),
                attention_mask=torch.from_numpy(mask_BP).to(self._model.device),
                logits_processor=[drawn],
            )
        return [cut_at_end(row, spec.ends) for row in out_BT[:, width:].tolist()]

    def close(self) -> None:
        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Leaves of each row the one token that its own numbers draw, so that greedy search takes it.

    What only pads the head, beyond `vocab_size`, is never drawn.
    """

    def __init__(self, uniform_BS: Tensor, prompt: int, spec: WriterSpec, vocab_size: int) -> None:
        self._uniform_BS, self._prompt, self._spec = uniform_BS, prompt, spec
        self._vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform_B = self._uniform_BS[:, input_ids.shape[1] - self._prompt]
        token_B = draw(scores[:, : self._vocab_size], uniform_B, self._spec.temperature, self._spec.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)


def _eager() -> Any:
    """transformers' BitNet layers would compile their quantisers, for every shape of a batch anew."""
    return torch.compiler.set_stance("force_eager")


def _settle_ternary(model: Any) -> None:
    """Quantise the weights of transformers' online BitNet layers once, instead of for every token anew."""
    from transformers.integrations.bitnet import AutoBitLinear, WeightQuant

    for module in model.modules():
        if isinstance(module, AutoBitLinear) and module.online_quant:
            module.weight = torch.nn.Parameter(WeightQuant.apply(module.weight.detach()), requires_grad=False)
            # What is multiplied with the output of a layer that is not quantised online.
            module.weight_scale, module.online_quant = module.weight.new_ones(1), False
