"""Writing a student so that `from_pretrained` loads it, and loading one back: its weights into a running
training, or all of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from distily.checkpoint.configs import json_object
from distily.checkpoint.weights import explain_gaps
from distily.system.files import write_whole
from distily.text import one_line
from student import bitnet
from student.bitnet import layout
from student.errors import StudentError, UserError
from student.modeling.checkpoint import CheckpointTensors
from student.modeling.tokenizer import copy_tokenizer
from student.modeling.whole import whole_files
from student.shards import load_whole

# In a checkpoint: the manifest of the cache that it was trained on, and in which order, see
# student.training.resume.
MANIFEST_FILE = "cache_manifest.json"


def save_student(
    student: Any,
    directory: Path,
    tokenizer_dir: Path,
    state: Mapping[str, Any] | None = None,
    stops: Iterable[int] = (),
) -> None:
    """Safetensors, config.json and the files of the tokenizer, mostly the teacher's. state: the whole tensors
    of a sharded student. stops: ids that end a text, besides those that these files name.

    A BitNet student is saved as its latent weights with the `quantization_config` that makes transformers
    quantise them online; it is added to the file only, since Trainer treats a model that carries it as
    already quantised. One with added norms is laid out as `bitnet.layout` says.
    """
    conversion = bitnet.conversion_of(student)
    state = student.state_dict() if state is None else state
    if conversion is None:
        student.save_pretrained(directory, state_dict=dict(state))
    else:
        own = student.config.to_dict() | {"architectures": [type(student).__name__]}
        saved = layout.to_saved(own, conversion)
        named = {layout.to_saved_name(name, saved): tensor for name, tensor in state.items()}
        student.save_pretrained(directory, state_dict=named)
        path = directory / "config.json"
        config = layout.to_saved(json.loads(path.read_text(encoding="utf-8")), conversion)
        config["quantization_config"] = bitnet.quantization_config(student)
        write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    _save_stop_tokens(student, directory, {*stop_tokens(tokenizer_dir), *stops})
    copy_tokenizer(tokenizer_dir, directory)


def stop_tokens(directory: Path) -> list[int]:
    """The ids that end a text, ascending: of config.json and generation_config.json in a directory, and of
    its tokenizer's end token.
    """
    found: list[Any] = []
    for file in ("config.json", "generation_config.json"):
        named = json_object(directory / file).get("eos_token_id")
        found += named if isinstance(named, list) else [named]
    token = json_object(directory / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    tokenizer = json_object(directory / "tokenizer.json")
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict) and isinstance(token, str):
        found.append(vocabulary.get(token))
    tokens = [one for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    found += [one.get("id") for one in tokens if one.get("content") == token]
    return sorted({one for one in found if type(one) is int and one >= 0})


def _save_stop_tokens(student: Any, directory: Path, stops: Iterable[int]) -> None:
    """Write every id at which the teacher stops into the student's generation_config.json."""
    path = directory / "generation_config.json"
    ends = sorted(one for one in stops if one < student.config.get_text_config().vocab_size)
    if ends:
        settings = json_object(path) | {"eos_token_id": ends[0] if len(ends) == 1 else ends}
        write_whole(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def load_weights(student: Any, directory: Path) -> None:
    """Load the weights that `save_student` wrote; StudentError unless they are exactly this student's.

    Tied parameters are stored once and stay tied.
    """
    saved = saved_config(str(directory))
    state = {}
    for file in CheckpointTensors(directory).files:
        tensors = load_file(directory / file)
        state.update({layout.from_saved_name(name, saved): tensor for name, tensor in tensors.items()})
    own = {name for name, _ in student.named_parameters()}
    if own - set(state):
        raise StudentError(f"{directory}: the checkpoint lacks {sorted(own - set(state))[0]} of this student")
    try:
        result = load_whole(student, state, strict=False)
    except RuntimeError as error:
        raise StudentError(f"{directory}: the checkpoint is of another student: {error}") from error
    if result.unexpected_keys:
        raise StudentError(
            f"{directory}: the checkpoint has {result.unexpected_keys[0]}, this student has not"
        )


def saved_config(source: str) -> dict[str, Any]:
    """config.json of a directory or hub name; empty where there is none."""
    from transformers import PreTrainedConfig

    try:
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(source)[0]
    except (OSError, ValueError):
        return {}
    return config


def check_latent(saved: Mapping[str, Any], what: str) -> None:
    """UserError for a checkpoint that is quantised otherwise than with latent weights."""
    entry = saved.get("quantization_config") or {}
    online = (entry.get("quant_method"), entry.get("quantization_mode")) == ("bitnet", "online")
    if entry and not online:
        raise UserError(
            f"{what}: a checkpoint quantised with {entry.get('quant_method')!r} has no latent weights to "
            "train; give the full-precision one"
        )


def check_saved(
    config: Any, conversion: str, saved: Mapping[str, Any], names: Iterable[str], what: str
) -> None:
    """UserError for a converted checkpoint whose tensors are not all of its student, which is not built.

    names: of the tensors in the files; saved: the config.json beside them.
    """
    import torch

    with torch.device("meta"):
        student = new_student(config)
    bitnet.convert_student(student, conversion)
    given = {layout.from_saved_name(name, saved) for name in names}
    missing = [name for name, _ in student.named_parameters() if name not in given]
    if gaps := explain_gaps((layout.to_saved_name(name, saved) for name in missing), {}, names):
        raise UserError(f"{what}: {gaps}")


def student_config(saved: Mapping[str, Any]) -> Any:
    """The configuration that the student's code is built from, without what it says of quantisation; KeyError
    for an architecture that transformers does not know.
    """
    from transformers import CONFIG_MAPPING

    own = layout.from_saved(saved)
    own.pop("quantization_config", None)
    return CONFIG_MAPPING[own["model_type"]].from_dict(own)


def new_student(config: Any) -> Any:
    """A model of this configuration with random weights, float32.

    Scores that the model soft-caps need the eager attention: SDPA leaves the cap out (Gemma 2).
    """
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention(config))


def attention(config: Any) -> dict[str, str]:
    """What transformers has to be told of a student's attention."""
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {} if softcap is None else {"attn_implementation": "eager"}


def restore(config: Any, conversion: str | None, directory: Path) -> Any:
    """The student that `save_student` wrote, in float32."""
    student = new_student(config)
    if conversion is not None:
        bitnet.convert_student(student, conversion)
    load_weights(student, directory)
    return student


def load_student(directory: str | Path) -> Any:
    """A trained student, for inference or export: in eval mode, latent weights in float32, BitLinear layers
    with their norms.

    Args:
        directory: what `distily-train from-cache` wrote.

    Returns:
        transformers' model, on the CPU.

    Raises:
        UserError: it is not a student of ours, or is packed.

    Example:
        model = load_student("run/student")
        model.generate(ids, max_new_tokens=32)
    """
    directory = Path(directory)
    saved = saved_config(str(directory))
    if not directory.is_dir() or not saved:
        raise UserError(f"{directory}: not a student of `distily-train`, there is no config.json")
    check_latent(saved, str(directory))
    whole_files(directory, str(directory))
    try:
        config = student_config(saved)
        return restore(config, layout.saved_conversion(saved), directory).eval()
    except UserError:
        raise
    except (StudentError, ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        reason = one_line(error, None)
        raise UserError(f"{directory}: not a student of `distily-train` ({reason})") from error
