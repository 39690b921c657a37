"""The BitNet b1.58 student: quantisers, the linear layer, conversion, and what training needs of them."""

from student.bitnet.annealing import Annealing, soften_weight
from student.bitnet.calibration import (
    Drift,
    convert_calibrated,
    convert_layers,
    convert_trained,
    curvatures,
    relative_temperatures,
    set_relative_temperatures,
)
from student.bitnet.convert import (
    CONVERSIONS,
    conversion_of,
    convert,
    convert_student,
    norm_epsilon,
    normed,
    quantization_config,
)
from student.bitnet.int_mm import int_mm
from student.bitnet.linear import (
    FULL,
    BitLinear,
    RMSNorm,
    Strengths,
    bit_linears,
    quantize_always,
    quantize_in_passes,
    quantize_once,
    set_strengths,
    set_temperature,
)
from student.bitnet.master_weights import MASTERS, RoundingAdamW, halve_masters
from student.bitnet.meter import FlipMeter
from student.bitnet.quantizers import EPSILON, LEVELS, quantize_activation, quantize_weight, to_int8
from student.bitnet.training import TernaryCallback, TernaryPlan, separate_rates, staged
from student.bitnet.warmup import Warmup

__all__ = [
    "CONVERSIONS",
    "EPSILON",
    "FULL",
    "LEVELS",
    "MASTERS",
    "Annealing",
    "BitLinear",
    "Drift",
    "FlipMeter",
    "RMSNorm",
    "RoundingAdamW",
    "Strengths",
    "TernaryCallback",
    "TernaryPlan",
    "Warmup",
    "bit_linears",
    "conversion_of",
    "convert",
    "convert_calibrated",
    "convert_layers",
    "convert_student",
    "convert_trained",
    "curvatures",
    "halve_masters",
    "int_mm",
    "norm_epsilon",
    "normed",
    "quantization_config",
    "quantize_activation",
    "quantize_always",
    "quantize_in_passes",
    "quantize_once",
    "quantize_weight",
    "relative_temperatures",
    "separate_rates",
    "set_relative_temperatures",
    "set_strengths",
    "set_temperature",
    "soften_weight",
    "staged",
    "to_int8",
]
