"""The store is light: stage 2 on a laptop and stage 1 on a cluster load it without each other's packages."""

import pkgutil
import subprocess
import sys

import featurestore


def test_no_submodule_loads_a_model_framework() -> None:
    names = [f"featurestore.{module.name}" for module in pkgutil.iter_modules(featurestore.__path__)]
    assert len(names) > 10
    heavy = ("torch", "vllm", "transformers", "datasets", "obstore")
    code = f"import sys, {', '.join(names)}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
