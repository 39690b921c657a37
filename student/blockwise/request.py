"""What `--init blockwise` is asked for, checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from featurestore.format.schema import HiddenSpec
from featurestore.identity import canonical_json, digest
from featurestore.reader import CacheReader
from student.blockwise.module import check_blocks
from student.blockwise.plan import Block, plan_blocks
from student.config.flags import StudentOptions
from student.data.held_out import Split
from student.data.stores import CacheStores
from student.errors import UserError
from student.modeling.plan import StudentPlan


@dataclass(frozen=True, kw_only=True)
class BlockwiseRequest:
    """The blocks of a student, and what makes them.

    specs: what is read of the cache at each boundary. inputs: "student" or "teacher".
    """

    plan: StudentPlan
    blocks: tuple[Block, ...]
    reader: CacheReader
    split: Split
    specs: dict[int, HiddenSpec]
    inputs: str
    steps: int
    learning_rate: float

    def settings(self, args: TrainingArguments) -> dict[str, Any]:
        """What the weights of the blocks follow from, by the flags that say it."""
        config = self.plan.config.to_dict()
        assert self.plan.teacher is not None
        return {
            "--manifest": self.reader.manifest_digest,
            "--seed": args.seed,
            "--blockwise-inputs": self.inputs,
            "--blockwise-steps": self.steps,
            "--blockwise-learning-rate": self.learning_rate,
            "--per-device-train-batch-size": args.per_device_train_batch_size,
            "--bf16": bool(args.bf16),
            "--bitnet-conversion": self.plan.conversion,
            "--copy-layers": self.plan.copied,
            "--teacher": str(self.plan.teacher.directory.resolve()),
            "--student-model-config": digest(canonical_json({k: repr(v) for k, v in sorted(config.items())})),
            "--eval-fraction": f"{len(self.split.training)} training and {len(self.split.held_out)} held-out "
            "samples",
        }


def plan_blockwise(
    options: StudentOptions, plan: StudentPlan, stores: CacheStores, split: Split
) -> BlockwiseRequest | None:
    """The blocks that `--init blockwise` asks for; None where it is not given.

    Raises:
        UserError: they cannot be trained from this cache; the line names the flag and the fix.
    """
    if options.init != "blockwise":
        return None
    if len(stores) > 1:
        raise UserError("--init blockwise: blocks have one teacher; give one STORE")
    if plan.tokenizer is not None:
        raise UserError(
            "--init blockwise: states are compared token by token, and this student has another tokenizer; "
            "leave --student-tokenizer out, or use --init teacher"
        )
    if plan.teacher is None or plan.conversion is None:
        raise UserError("--init blockwise: a model was given, which has weights already; use --init teacher")
    changed = sorted(plan.narrowing.kept)
    if changed:
        raise UserError(
            "--student-model-config: --init blockwise compares blocks with the teacher's, so all sizes but "
            f"num_hidden_layers stay, and this changes the {', '.join(changed)} size; use --init teacher"
        )
    reader = stores.first
    check_blocks(plan.config)
    specs = {
        spec.layer: found
        for spec in reader.complete_groups()
        if isinstance(spec, HiddenSpec) and isinstance(found := reader.find(spec.kind), HiddenSpec)
    }
    blocks = plan_blocks(plan.layers, sorted(specs), reader.identity.num_layers)
    if options.blockwise_inputs == "teacher":
        _check_whole(blocks, specs)
    return BlockwiseRequest(
        plan=plan,
        blocks=tuple(blocks),
        reader=reader,
        split=split,
        specs=specs,
        inputs=options.blockwise_inputs,
        steps=options.blockwise_steps,
        learning_rate=options.blockwise_learning_rate,
    )


def _check_whole(blocks: Sequence[Block], specs: dict[int, HiddenSpec]) -> None:
    """UserError where a block would read states that are not there."""
    parts = [block.given for block in blocks if block.given and not specs[block.given].whole]
    if parts:
        raise UserError(
            f"--blockwise-inputs teacher: attention reads all positions, and the cache has layer {parts[0]} "
            f"at {specs[parts[0]].share:.3g} of them; use --blockwise-inputs student, or `distily-cache "
            f"generate ... --hidden-layers {','.join(map(str, parts))}` without --hidden-positions"
        )
