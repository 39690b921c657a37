"""Teachers that are loaded in 8 or 4 bit: what each engine makes of it, and what is refused before loading.

transformers loads through bitsandbytes: LLM.int8() (arXiv:2208.07339) or NF4 (arXiv:2305.14314). vLLM has no
bitsandbytes any more; its own 8-bit loading of any checkpoint is fp8 with a scale per output channel. LM head
and embeddings keep the checkpoint's precision in both.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from pipeline.errors import RequestError

BITSANDBYTES_8BIT = "bitsandbytes-8bit"
BITSANDBYTES_4BIT = "bitsandbytes-4bit"
_BY_ENGINE = {
    "transformers": {8: BITSANDBYTES_8BIT, 4: BITSANDBYTES_4BIT},
    "vllm": {8: "fp8_per_channel"},
}


def loading_quantization(engine: str, bits: int, saved: str, dtype: str) -> str:
    """The store's name of what `engine` loads a teacher as when `bits` bits are asked for.

    saved: the quantization of the checkpoint itself. dtype: what the teacher computes in.

    Raises:
        RequestError: the checkpoint is quantised already, the engine cannot do it, or a package is missing.
    """
    flag = f"--teacher-load-in-{bits}bit"
    if saved != "none":
        raise RequestError(f"{flag}: the teacher is saved as {saved} already and loads as that; leave it out")
    if engine not in _BY_ENGINE:
        raise RequestError(f"{flag}: only for --engine {' and '.join(_BY_ENGINE)}; leave it out")
    name = _BY_ENGINE[engine].get(bits)
    if name is None:
        raise RequestError(
            f"{flag}: vLLM loads 4-bit teachers only from checkpoints that are 4-bit (AWQ, GPTQ, "
            "compressed-tensors); give one of those, or use --teacher-load-in-8bit or --engine transformers"
        )
    if engine == "vllm" and dtype == "float32":
        raise RequestError(f"{flag}: vLLM's fp8 does not compute in float32; add --dtype bfloat16")
    missing = [package for package in ("bitsandbytes", "accelerate") if not find_spec(package)]
    if engine == "transformers" and missing:
        raise RequestError(f"{flag}: {' and '.join(missing)} not installed; install the extra [quantized]")
    return name


def bitsandbytes_config(name: str, compute_dtype: Any) -> Any:
    """transformers' quantisation config of one of the two bitsandbytes names."""
    from transformers import BitsAndBytesConfig

    if name == BITSANDBYTES_8BIT:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
    )
