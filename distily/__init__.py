"""distily-cache as a library: run a teacher once, keep what it computed, train students from it.

The names below are loaded on first use, so that `import distily` costs nothing and a program that only reads
a cache needs neither torch nor vLLM. They are what is kept stable between versions; everything that is
imported from deeper inside the packages may change.

    from distily import CacheReader

    reader = CacheReader.open("run/cache")
    sample = reader.read(0)
    sample.tokens, sample.features[reader.find_logits()]
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distily.errors import DistilyError as DistilyError
    from featurestore.format.schema import HiddenSpec as HiddenSpec
    from featurestore.format.schema import LogitsSpec as LogitsSpec
    from featurestore.format.schema import LseSpec as LseSpec
    from featurestore.maintenance.info import store_info as store_info
    from featurestore.maintenance.inspect import mass_by_rank as mass_by_rank
    from featurestore.maintenance.verify import verify_store as verify
    from featurestore.reader import CacheReader as CacheReader
    from featurestore.store import FeatureStore as FeatureStore
    from pipeline.engines.registry import register_engine as register_engine
    from student.api import Experiment as Experiment
    from student.api import expectations as expectations
    from student.config.training_config import DistillationConfig as DistillationConfig
    from student.data.dataset import DistillationDataset as DistillationDataset
    from student.losses.catalogue import Loss as Loss
    from student.losses.catalogue import Need as Need
    from student.losses.catalogue import Option as LossOption
    from student.losses.catalogue import register_loss as register_loss
    from student.modeling.saving import load_student as load_student
    from student.training.distillation import DistillationTrainer as DistillationTrainer

# Public name -> where it is, and its name there.
_NAMES = {
    "CacheReader": ("featurestore.reader", "CacheReader"),
    "DistillationConfig": ("student.config.training_config", "DistillationConfig"),
    "DistillationDataset": ("student.data.dataset", "DistillationDataset"),
    "DistillationTrainer": ("student.training.distillation", "DistillationTrainer"),
    "DistilyError": ("distily.errors", "DistilyError"),
    "Experiment": ("student.api", "Experiment"),
    "FeatureStore": ("featurestore.store", "FeatureStore"),
    "HiddenSpec": ("featurestore.format.schema", "HiddenSpec"),
    "LogitsSpec": ("featurestore.format.schema", "LogitsSpec"),
    "Loss": ("student.losses.catalogue", "Loss"),
    "Need": ("student.losses.catalogue", "Need"),
    "LossOption": ("student.losses.catalogue", "Option"),
    "LseSpec": ("featurestore.format.schema", "LseSpec"),
    "expectations": ("student.api", "expectations"),
    "load_student": ("student.modeling.saving", "load_student"),
    "mass_by_rank": ("featurestore.maintenance.inspect", "mass_by_rank"),
    "register_engine": ("pipeline.engines.registry", "register_engine"),
    "register_loss": ("student.losses.catalogue", "register_loss"),
    "store_info": ("featurestore.maintenance.info", "store_info"),
    "verify": ("featurestore.maintenance.verify", "verify_store"),
}
__all__ = [
    "CacheReader",
    "DistillationConfig",
    "DistillationDataset",
    "DistillationTrainer",
    "DistilyError",
    "Experiment",
    "FeatureStore",
    "HiddenSpec",
    "LogitsSpec",
    "Loss",
    "LossOption",
    "LseSpec",
    "Need",
    "__version__",
    "expectations",
    "load_student",
    "mass_by_rank",
    "register_engine",
    "register_loss",
    "store_info",
    "verify",
]

try:
    __version__ = version("distily-cache")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


def import_own(module: str) -> Any:
    """The module `module` of ours.

    `pipeline` and `student` are usual names for a file of one's own, and Python looks into the working
    directory first.

    Raises:
        ImportError: another file of that name hides our package; the message says which.
    """
    package = module.partition(".")[0]
    where = Path(__file__).parents[1] / package
    found = importlib.import_module(package)
    hidden = getattr(found, "__file__", None)
    if where.is_dir() and (hidden is None or Path(hidden).resolve().parent != where.resolve()):
        raise ImportError(
            f"{hidden or package} hides distily-cache's package {package!r}; rename it, or start Python in "
            "another directory"
        )
    return importlib.import_module(module)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'distily' has no attribute {name!r}")
    module, attribute = _NAMES[name]
    value = getattr(import_own(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
