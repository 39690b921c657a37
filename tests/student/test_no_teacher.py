"""The training process holds no teacher: one model object, only the chosen layers' tensors, no stage
1, no vLLM.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROBE = """
import json, sys
import safetensors, transformers
import student.modeling.checkpoint
from student.cli import main

models, tensors = [], []
construct = transformers.PreTrainedModel.__init__

def counting(self, *args, **kwargs):
    models.append(type(self).__name__)
    construct(self, *args, **kwargs)

class Recording:
    def __init__(self, *args, **kwargs):
        self.opened = safetensors.safe_open(*args, **kwargs)
    def __enter__(self):
        self.opened.__enter__()
        return self
    def __exit__(self, *error):
        return self.opened.__exit__(*error)
    def keys(self):
        return self.opened.keys()
    def get_slice(self, name):
        return self.opened.get_slice(name)
    def get_tensor(self, name):
        tensors.append(name)
        return self.opened.get_tensor(name)

transformers.PreTrainedModel.__init__ = counting
student.modeling.checkpoint.safe_open = Recording
sys.argv = ["distily-train", "from-cache", *sys.argv[1:]]
try:
    main()
finally:
    loaded = sorted(name for name in sys.modules if name.split(".")[0] in ("vllm", "pipeline"))
    print(json.dumps({"models": models, "tensors": tensors, "modules": loaded}), file=sys.stderr)
"""


def test_no_teacher_in_the_training_process(cache: Path, tmp_path: Path) -> None:
    flags = ["--student-model-config", '{"num_hidden_layers": 1}', "--copy-layers", "1", "--max_steps", "2"]
    flags += ["--student-model-as-bitnet", "--report-to", "none", "--eval-fraction", "0.25"]
    command = [sys.executable, "-c", PROBE, str(cache), "--output-dir", str(tmp_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stderr.splitlines()[-1])
    # transformers builds a causal model and, inside it, its decoder body: one student, no second of either.
    assert sorted(seen["models"]) == ["LlamaForCausalLM", "LlamaModel"]
    assert seen["modules"] == []
    layers = {name for name in seen["tensors"] if ".layers." in name}
    assert layers and all(".layers.1." in name for name in layers)
    assert set(seen["tensors"]) - layers == {"model.embed_tokens.weight", "model.norm.weight"}
    assert done.stdout.splitlines()[-1] == str(tmp_path / "report.html")


def test_importing_the_command_line_is_light() -> None:
    probe = (
        "import sys, student.cli; print([n for n in ('torch', 'transformers', 'vllm') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
