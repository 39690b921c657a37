"""Which of transformers' classes a checkpoint is loaded with."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """`AutoModelForCausalLM`; for a class that also sees or hears, `AutoModelForMultimodalLM`.

    The second only where config.json names that class: some families have a class for text alone too, which
    reads the same configuration, but not the same names of weights. Given text only, either is a causal LM.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    known = AutoModelForMultimodalLM._model_mapping
    if type(config) not in known or config.get_text_config() is config:
        return AutoModelForCausalLM
    named = (getattr(config, "architectures", None) or [None])[0]
    return AutoModelForMultimodalLM if known[type(config)].__name__ == named else AutoModelForCausalLM
