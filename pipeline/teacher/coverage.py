"""Whether a checkpoint's files give all weights of its model, found out without reading a weight.

transformers completes what a checkpoint lacks with random numbers, and vLLM a missing LM head, both without
an error. So transformers' own loader, with all that it knows of renamed, fused and tied weights, is run on
tensors of the meta device, which have shapes and no content.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distily.checkpoint.weights import StoredTensor, explain_gaps, missing_experts, packed_weights
from distily.text import one_line
from pipeline.errors import RequestError
from pipeline.teacher.model_class import auto_class


def check_coverage(config: Any, tensors: Mapping[str, StoredTensor], trust_remote_code: bool) -> set[str]:
    """Names of the stored tensors that a causal language model of this configuration does not take.

    Raises:
        RequestError: the model has weights that the tensors do not give in its shape, or it cannot be built.
    """
    plain = copy.deepcopy(config)
    quantized = getattr(plain, "quantization_config", None) is not None
    if quantized:
        # The names of the model before it was quantised; the quantiser's package need not be installed.
        del plain.quantization_config
    try:
        info = _loading_info(plain, tensors, trust_remote_code)
    except Exception as error:  # code of a model may raise anything
        if gaps := explain_gaps(missing_experts(tensors), {}, tensors):
            raise RequestError(gaps) from None
        if quantized:
            return set()  # packed weights need not go through the conversions of plain ones
        raise RequestError(f"its weights do not load: {one_line(error)}") from error
    missing, extra = set(info["missing_keys"]), set(info["unexpected_keys"])
    mismatched = {name: (theirs, ours) for name, theirs, ours in info["mismatched_keys"]}
    if quantized:
        missing, mismatched = missing - packed_weights(missing, extra), {}
    if gaps := explain_gaps(missing, mismatched, tensors):
        raise RequestError(gaps)
    return extra


def _loading_info(
    config: Any, tensors: Mapping[str, StoredTensor], trust_remote_code: bool
) -> dict[str, Any]:
    import torch

    with _silent():
        with torch.device("meta"):
            built = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
            state = {name: torch.empty(tensor.shape) for name, tensor in tensors.items()}
        loaded = type(built).from_pretrained(
            None,
            config=config,
            state_dict=state,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    info: dict[str, Any] = loaded[1]
    return info


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' report of the load and its bar: nothing is loaded."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
