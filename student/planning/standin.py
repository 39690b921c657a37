"""One training step on a stand-in of the student: the real code on tensors that have shapes and no memory.

The stand-in has few decoder layers; what more of them add is found from two stand-ins, see
`student.planning.memory`. It always is on the CPU, whose code differs little from a GPU's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from featurestore.format import sidecar
from student import bitnet
from student.bitnet.backward import Gate, Gates
from student.bitnet.quantizers import quantize_weight
from student.bitnet.training import set_gates
from student.data.teacher_weights import TeacherParts, load_bases
from student.losses.blocks import TeacherBlock
from student.losses.full_pass import TeacherHead
from student.losses.lm_head import HeadTransform
from student.modeling.plan import StudentPlan
from student.modeling.saving import new_student
from student.objective.terms import Objective, Term
from student.planning.tracking import FakeTracker, Moment
from student.training.model import DistillationModel
from student.training.run import PreparedTraining

# Parts of a step. What is the most in one of them is linear in the number of layers.
FORWARD, LOSSES, TOP, REST = "forward", "losses", "top of backward", "rest of backward"
# Labels.
ACTIVATIONS, HEAD, OTHERS, BACKWARD, GRADIENTS = "activations", "head", "losses", "backward", "gradients"
TERNARY, AROUND = "ternary weights", "gradients around the layers"
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Trace:
    """The fullest moments of the parts of a step, and the FLOPs of one pass."""

    moments: Mapping[str, Moment]
    flops: int


def meta_model(plan: StudentPlan, objective: Objective, depth: int | None = None) -> DistillationModel:
    """What a training builds, on torch's meta device; with `depth` layers of the decoder only."""
    full = plan.config.get_text_config().num_hidden_layers
    config = plan.config if depth is None else with_depth(plan.config, depth)
    if depth is not None:
        objective = replace(objective, terms=tuple(_moved(one, full, depth) for one in objective.terms))
    with torch.device("meta"):
        student = new_student(config)
        if plan.conversion is not None:
            bitnet.convert_student(student, plan.conversion)
        if plan.masters == "bf16":
            bitnet.halve_masters(student)
        model = DistillationModel(student, objective)
    if plan.freeze_embeddings:
        for module in (student.get_input_embeddings(), student.get_output_embeddings()):
            module.requires_grad_(False)
    return model


def alike(model: DistillationModel) -> bool:
    """Whether all decoder layers are of one kind, so that a few of them stand for any number."""
    decoder = model.student.get_decoder()
    kinds = getattr(model.student.config.get_text_config(), "layer_types", None) or ["one"]
    shapes = {
        tuple((name, tensor.shape) for name, tensor in layer.named_parameters()) for layer in decoder.layers
    }
    return len(shapes) == len(set(kinds)) == 1


def with_depth(config: Any, depth: int) -> Any:
    """The same configuration with the first `depth` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    full = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == full and name.startswith("layer"):
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return config


def _moved(term: Term, full: int, depth: int) -> Term:
    """A term on a student with fewer layers."""

    def moved(pair: tuple[int, int] | None) -> tuple[int, int] | None:
        if pair is None:
            return None
        theirs, own = pair
        return theirs, depth if own == full else min(own, depth - 1)

    return replace(term, pair=moved(term.pair), following=moved(term.following))


def meta_teachers(prepared: PreparedTraining) -> tuple[TeacherParts, ...]:
    """What the objective needs of the weights of each cache's teacher, on the meta device."""
    return tuple(_meta_teacher(prepared, store) for store in range(len(prepared.stores)))


def _meta_teacher(prepared: PreparedTraining, store: int) -> TeacherParts:
    objective, reader = prepared.objective, prepared.stores.readers[store]
    stored, parts = reader.sidecar(), TeacherParts(bases=load_bases(reader))
    if objective.needs_head(store):
        found = stored.head()
        weights = {name: _meta(tensor) for name, tensor in found.tensors.items()}
        transform = HeadTransform(found.spec.logit_scale, found.spec.logit_softcap)
        parts.head = TeacherHead(weights["weight"], weights.get("bias"), transform)
    for layer in sorted({theirs for theirs, _ in objective.relations(store)}):
        block = stored.block(layer)
        weights = {name: _meta(tensor) for name, tensor in block.tensors.items()}
        parts.blocks[layer] = TeacherBlock(block.spec, weights, reader.identity.max_position)
    return parts


def _meta(tensor: sidecar.Tensor) -> Tensor:
    return torch.empty(tensor.values.shape, dtype=_DTYPES[tensor.dtype], device="meta")


def teacher_tensors(teachers: Iterable[TeacherParts]) -> list[Tensor]:
    """The teachers' weights that a training holds."""
    held: list[Tensor | None] = []
    for parts in teachers:
        held += [] if parts.head is None else [parts.head.weight_VD, parts.head.bias_V]
        held += [tensor for basis in parts.bases.values() for tensor in basis.tensors]
        held += [buffer for block in parts.blocks.values() for buffer in block.buffers()]
    return [one for one in held if one is not None]


def trace(
    prepared: PreparedTraining,
    batch: Mapping[str, Any],
    depth: int,
    *,
    checkpointing: bool,
    held: bool,
    on_gpu: bool = False,
) -> Trace:
    """One pass forward and backward over a batch, of a student with `depth` layers. held: gradients and
    ternary weights are there before it.
    """
    args, fake = prepared.request.training, FakeTensorMode()
    model, teachers = meta_model(prepared.plan, prepared.objective, depth), meta_teachers(prepared)
    with fake:
        model.teachers = tuple(map(_faked_teacher, teachers))
        model.tokens = prepared.token_tables
        _fake_module(model)
        if held:
            for parameter in _trained(model):
                parameter.grad = torch.empty_like(parameter)
        inputs = _faked_batch(batch, fake)
    model.train()
    model.weights = [1.0] * len(model.objective.terms)
    model.shares = [1 / len(teachers)] * len(teachers)  # none is 0, as one that moves may be at the start
    tracker = FakeTracker(OTHERS, FORWARD, on_gpu, fake)
    _prepare_ternary(model, prepared, tracker)
    if held:
        with fake:
            kept = [tensor for _, layer in bitnet.bit_linears(model) for tensor in layer.quantized()]
        tracker.leave_out(kept)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
    tracker.leave_out(_there_before(model, inputs))
    with _watched(model, tracker, depth), tracker:
        with _autocast(args):
            loss = model(**inputs)["loss"]
        tracker.label, tracker.segment = BACKWARD, TOP
        weight = model.student.get_input_embeddings().weight
        tracker.summed = weight.shape if weight is model.student.get_output_embeddings().weight else None
        loss.backward()
    return Trace(tracker.moments, tracker.flops)


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def _there_before(model: DistillationModel, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors that a step does not make."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    teacher = teacher_tensors(model.teachers)
    batch = [tensor for tensor in tree_leaves(inputs) if isinstance(tensor, Tensor)]
    return [*model.parameters(), *model.buffers(), *grads, *teacher, *batch]


def _fake_module(model: nn.Module) -> None:
    """Put fake tensors in the place of those on the meta device; shared ones stay shared."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trained = tensor.requires_grad
                    made[id(tensor)] = (
                        nn.Parameter(empty, trained) if isinstance(tensor, nn.Parameter) else empty
                    )
                place[name] = made[id(tensor)]


def _faked_teacher(parts: TeacherParts) -> TeacherParts:
    if parts.head is not None:
        weight_VD, bias_V = parts.head.weight_VD, parts.head.bias_V
        parts.head = replace(
            parts.head,
            weight_VD=torch.empty(weight_VD.shape, dtype=weight_VD.dtype),
            bias_V=None if bias_V is None else torch.empty(bias_V.shape, dtype=bias_V.dtype),
        )
    parts.bases = {
        digest: basis.mapped(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        for digest, basis in parts.bases.items()
    }
    for block in parts.blocks.values():
        _fake_module(block)
    return parts


def _faked_batch(batch: Mapping[str, Any], fake: FakeTensorMode) -> dict[str, Any]:
    """Its hidden states, which are large, without numbers; and so its tokens, which meet the embeddings."""
    inputs = dict(batch) | {"input_ids": fake.from_tensor(batch["input_ids"])}
    return inputs | _faked_hidden(batch, fake)


def _faked_hidden(batch: Mapping[str, Any], fake: FakeTensorMode) -> dict[str, Any]:
    """The hidden states in a batch, of the first cache and of the others."""
    made: dict[str, Any] = {}
    if "coded_hidden" in batch:
        made["coded_hidden"] = {
            layer: {name: fake.from_tensor(tensor) for name, tensor in coded.items()}
            for layer, coded in batch["coded_hidden"].items()
        }
    if "further" in batch:
        made["further"] = {
            store: dict(parts) | _faked_hidden(parts, fake) for store, parts in batch["further"].items()
        }
    return made


def _prepare_ternary(model: DistillationModel, prepared: PreparedTraining, tracker: FakeTracker) -> None:
    """Gates that have compared already, and a warm-up in its middle, where it takes most. Weights are
    quantised when they are multiplied first, as in each step.
    """
    plan = prepared.request.options.ternary()
    if plan.backward == "int8":
        set_gates(model, lambda: Gates(Gate(False, 1.0), Gate(False, 1.0)))
    bitnet.set_strengths(model, plan.warmup.at(1, 2**20))
    bitnet.set_temperature(model, plan.annealing.at(1, 2**20))
    for _, layer in bitnet.bit_linears(model):
        layer.quantized = _quantised_once(layer, tracker)  # type: ignore[method-assign]


def _quantised_once(layer: bitnet.BitLinear, tracker: FakeTracker) -> Callable[[], tuple[Tensor, Tensor]]:
    """`BitLinear.quantized` keeps what it made by the address of the weight, which fake ones lack."""

    @cache
    def quantized() -> tuple[Tensor, Tensor]:
        made = quantize_weight(layer.weight.detach())
        for tensor in made:  # and not what came and went while they were made
            tracker.relabel(tensor, TERNARY)
        return made

    return quantized


def _autocast(args: Any) -> Any:
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


@contextmanager
def _watched(model: DistillationModel, tracker: FakeTracker, depth: int) -> Iterator[None]:
    """Tell the tracker which part of the step runs."""
    decoder = model.student.get_decoder()
    waiting = {id(one) for one in _trained(decoder.layers[depth - 1])}
    in_layers = {id(one) for one in _trained(decoder.layers)}

    def into(*_: Any) -> None:
        tracker.label = ACTIVATIONS

    def out(*_: Any) -> None:
        tracker.label, tracker.segment = OTHERS, LOSSES

    def accumulated(parameter: Tensor) -> None:
        assert parameter.grad is not None
        tracker.relabel(parameter.grad, GRADIENTS if id(parameter) in in_layers else AROUND)
        waiting.discard(id(parameter))
        if not waiting:
            tracker.segment = REST

    for name in ("_head", "_dense"):
        method = getattr(model, name)

        def labelled(*given: Any, method: Any = method) -> Any:
            with tracker.under(HEAD):
                return method(*given)

        setattr(model, name, labelled)
    decoder.register_forward_pre_hook(into)
    decoder.register_forward_hook(out)
    for parameter in _trained(model):
        parameter.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]
    yield
