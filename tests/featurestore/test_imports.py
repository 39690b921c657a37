"""The store is light: stage 2 on a laptop and stage 1 on a cluster load it without each other's packages."""

import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import distily
import featurestore


@pytest.mark.parametrize("package", [distily, featurestore])
def test_no_submodule_loads_a_model_framework(package: ModuleType) -> None:
    names = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    assert len(names) > 10
    heavy = ("torch", "vllm", "transformers", "datasets", "obstore")
    code = f"import sys, {', '.join(names)}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
