"""The flags of `distily-train from-cache` that are not TrainingArguments, and their checks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from student.errors import UserError
from student.losses.catalogue import Loss, catalogue, suggest
from student.objective.files import ObjectiveRequest, TermRequest, read_objective
from student.objective.layer_maps import check_mapper, parse_layer_map, parse_layers
from student.objective.weights import Weight

if TYPE_CHECKING:
    from student.bitnet import TernaryPlan
    from student.data.measures import Curriculum

# What --objective takes the place of.
OBJECTIVE_FLAGS = (
    "logits_loss",
    "logits_weight",
    "ce_weight",
    "hidden_loss",
    "hidden_weight",
    "hidden_layers",
    "layer_map",
    "mapper",
    "projector",
)
_WARMUPS = ("bitnet_warmup_weights", "bitnet_warmup_activations", "bitnet_warmup_norms")


def _flag(default: Any, help_text: str) -> Any:
    return field(
        default=default, metadata={"help": help_text.replace("%", "%%")}
    )  # argparse fills in %(...)s


@dataclass
class StudentOptions:
    """What to train and towards what; validated once by `check`."""

    student_model_config: str | None = _flag(
        None,
        "Changes to the teacher's configuration that make the student, as JSON: "
        "'{\"num_hidden_layers\": 12}'. "
        "Without it the student has the teacher's shape.",
    )
    student: str | None = _flag(
        None, "Start from this checkpoint (directory or hub name) instead of a changed teacher configuration."
    )
    student_tokenizer: str | None = _flag(
        None,
        "Tokenizer of a new student (directory or hub name) that is not the teacher's: its vocabulary gives "
        "the number of tokens, and new embeddings start as means of the teacher's. A checkpoint of --student "
        "brings its own. Samples are cut anew as they are read, and the teacher's distributions are read "
        "where both have read the same text. Default: the teacher's tokenizer.",
    )
    token_map: Literal["first", "shared"] | None = _flag(
        None,
        "What a token of the teacher is to a student with another tokenizer. first: the student's first "
        "token of its text, also inside the teacher's tokens; for --logits-loss kl and caches with "
        "draws. shared: itself where both have it, and all others are one outcome. Default: first where "
        "it can be, else "
        "shared.",
    )
    student_model_as_bitnet: bool | None = _flag(
        None,
        "Train a BitNet b1.58 student: ternary weights and int8 activations in all linear layers of the "
        "decoder; "
        "embeddings, norms and LM head stay full precision. Default: what --student is, else False.",
    )
    bitnet_conversion: str | None = _flag(
        None,
        "Norms in front of ternary layers, calibrated so that they change little at first. none: nowhere; "
        "subln: before the attention's output and the MLP's last projection; per-projection: before all. "
        "Default: that of --student, else none.",
    )
    bitnet_warmup_weights: float = _flag(
        0.0, "Share of the steps in which weights go linearly from full precision to ternary."
    )
    bitnet_warmup_activations: float = _flag(
        0.0, "Share of the steps in which activations go from full precision to int8."
    )
    bitnet_warmup_norms: float = _flag(
        0.0, "Share of the steps in which the norms of --bitnet-conversion go from none to full."
    )
    bitnet_anneal: float = _flag(
        0.0,
        "Share of the steps in which ternary weights are soft (Hestia): a weight counts as the mean of -1, 0 "
        "and 1 under a softmax that hardens to rounding by the end of that share, so those in the dead zone "
        "have true gradients. It must be longer than --bitnet-warmup-weights; 0 rounds from the first step.",
    )
    bitnet_masters: Literal["fp32", "bf16"] = _flag(
        "fp32",
        "What latent weights are kept in. bf16 takes 4 bytes less per weight, gradients included, and comes "
        "with an AdamW that rounds its updates stochastically.",
    )
    bitnet_learning_rate: float | None = _flag(
        None,
        "Peak learning rate of the latent weights behind ternary matrices; all other weights keep "
        "--learning-rate. Ternary matrices stand larger steps, since most of a step is rounded away. "
        "Default: --learning-rate.",
    )
    bitnet_weight_decay: float | None = _flag(
        None,
        "Weight decay of the latent weights; all other weights keep --weight-decay. The scale of a ternary "
        "matrix shrinks with its latent weights, so decay moves no weight nearer to zero. Default: "
        "--weight-decay.",
    )
    bitnet_two_stage: bool = _flag(
        False,
        "In the second half of the steps, 2/3 of the learning rate that the schedule says and no weight "
        "decay.",
    )
    bitnet_backward: Literal["full", "int8"] = _flag(
        "full",
        "How gradients pass the ternary layers. full: in the precision of the training; int8: by integer "
        "products of gradients rounded to int8, wherever they point the same way (cosine 0.999, measured "
        "every 25 steps), else full.",
    )
    init: Literal["teacher", "blockwise", "random"] = _flag(
        "teacher",
        "Where a new student's weights come from. teacher: its embeddings, head, norms and the layers of "
        "--copy-layers (read from its safetensors, the model is never built). blockwise: the same, and then "
        "each block of layers is made ternary by itself, so that it gives what the cache says the teacher's "
        "gave, before all are trained together; for --student-model-as-bitnet, and a cache with --final and "
        "--hidden-layers behind every or every n-th layer. random: random numbers.",
    )
    blockwise_steps: int = _flag(200, "Steps in which --init blockwise trains each block.")
    blockwise_learning_rate: float = _flag(
        1e-2, "Peak learning rate of --init blockwise; it rises, then falls as a cosine, for each block."
    )
    blockwise_inputs: Literal["student", "teacher"] = _flag(
        "student",
        "What goes into a block of --init blockwise. student: what the ternary blocks before it give, so "
        "that it learns to correct them. teacher: the cached states, so that blocks do not depend on each "
        "other and the processes of `accelerate launch` take different ones.",
    )
    copy_layers: str = _flag(
        "auto",
        "Teacher layers to copy: uniform (spread over the depth, ends included), first, last, or a list "
        "0,4,9,... auto: uniform, unless that student is worse than a uniform guess at the start; then "
        "whichever of the three is best there.",
    )
    teacher: str | None = _flag(
        None,
        "Directory of the teacher's safetensors for --init teacher; default: the name the cache records.",
    )
    freeze_embeddings: bool = _flag(False, "Do not train the input embeddings and the LM head.")
    objective: str | None = _flag(
        None,
        "YAML file of terms, or what stands in one as a JSON object, instead of the five flags that follow "
        "and --hidden-layers, --layer-map; "
        "`distily-train objectives` lists the losses.",
    )
    logits_loss: str = _flag(
        "kl",
        "Loss on the teacher's distribution, with its default options: kl, reverse_kl, jsd, skew_kl, tvd, "
        "full_jsd, ... (`distily-train objectives` lists them), or none.",
    )
    logits_weight: float = _flag(1.0, "Weight of --logits-loss.")
    ce_weight: float = _flag(0.0, "Weight of the cross-entropy on the next token; 0 leaves it out.")
    hidden_loss: str = _flag(
        "none",
        "Loss between hidden states, without the hidden_ of its name: mse, nmse, cosine, logsum, mobilebert, "
        "similarity, ... (`distily-train objectives` lists them); needs `distily-cache generate "
        "--hidden-layers ...`.",
    )
    hidden_weight: float = _flag(1.0, "Weight of --hidden-loss, shared evenly by its layer pairs.")
    hidden_layers: str | None = _flag(
        None,
        "Cached teacher layers to use, e.g. 10,20 (numbered like transformers' output_hidden_states). "
        "Default: all that the cache holds.",
    )
    mapper: str = _flag(
        "all",
        "How --hidden-layers are paired with the student's. all: each with the one at the same relative "
        "depth; uniform: each of the student's with the nearest in relative depth; uniform+last: those, and "
        "each of the student's with the deepest; last or last-K: the deepest K with the student's last K.",
    )
    layer_map: str | None = _flag(
        None, "Explicit pairs TEACHER:STUDENT instead of --hidden-layers and --mapper, e.g. 10:4,20:8."
    )
    projector: Literal["identity", "linear", "mlp", "orthogonal"] = _flag(
        "identity",
        "What brings the student's hidden states to the teacher's width for --hidden-loss, trained with the "
        "student; one for each pair of layers.",
    )
    teacher_weights: str | None = _flag(
        None,
        "Shares of the teachers of several STOREs in the mixture that the student learns from, in "
        "their order, e.g. 0.7,0.3; divided by their sum. An objective file may give a term one of the "
        "teachers instead, or let the shares move in the course of the training (`teachers`). Default: "
        "equal shares.",
    )
    top_k: int | None = _flag(
        None,
        "Learn from at most the K best tokens of each position that the cache holds; a head that is cut has "
        "no draws. Evaluation reads all that the cache holds. Default: all of it.",
    )
    top_p: float | None = _flag(
        None, "Learn from the best tokens that hold this share of the mass, of those that the cache holds."
    )
    tail: int | None = _flag(
        None, "Learn from the first M of the cached draws from outside the head; 0 leaves them out."
    )
    select: str | None = _flag(
        None,
        "Learn only the positions at which all of these conditions hold: MEASURE<X or MEASURE>X, with "
        "commas between, e.g. 'surprise<8,entropy>0.5'. Measures are entropy, of the first STORE's teacher; "
        "surprise, -log of its probability of the actual next token; and disagreement, how far the surprises "
        "of several teachers are apart. X is in nats, or with a percent sign a quantile of the training "
        "positions, which takes a pass over the cache before training. 'random<25%' learns a random quarter, "
        "whatever the teacher says. The LM head is computed at these positions only, so a step takes less "
        "time. Held-out metrics keep all positions, so that runs compare.",
    )
    weight: str | None = _flag(
        None,
        "Let the losses of each learned position count in proportion to a measure of --select: entropy, "
        "surprise or disagreement. Weights have mean one over each optimizer step. Held-out metrics stay "
        "unweighted.",
    )
    pack_rows: bool = _flag(
        False,
        "Put several short samples of a training batch into one row, whole and without seeing each other, "
        "instead of padding each to the longest one. The loss is the same.",
    )
    manifest: str | None = _flag(
        None,
        "Read the cache as it was at this manifest (its digest, or how that begins; summary.json names it), "
        "which repeats an earlier run exactly after the cache has grown; of several STOREs one for each, "
        "with commas between. Default: all of the cache.",
    )
    train_samples: int | None = _flag(
        None, "Learn from the first N samples that are not held out; the held-out ones stay the same."
    )
    eval_fraction: float = _flag(
        0.1,
        "Share of the documents whose samples are held out for evaluation, chosen by their content; 0 holds "
        "nothing out.",
    )
    overwrite_output_dir: bool = _flag(
        False,
        "Begin anew where --output-dir holds a training already: its checkpoints, student and records are "
        "deleted once all of the request is checked; other files stay.",
    )

    def check(self) -> None:
        """UserError for the first flag that cannot be served whatever the cache holds."""
        if self.student is not None and self.student_model_config is not None:
            raise UserError(
                "--student and --student-model-config exclude each other: a checkpoint brings its own "
                "configuration"
            )
        if self.student is not None and self.student_tokenizer is not None:
            raise UserError(
                "--student and --student-tokenizer exclude each other: a checkpoint brings its own tokenizer"
            )
        self._check_numbers()
        self._check_blockwise()
        names = ("hidden_layers", "layer_map", "mapper", "projector")
        given = [name for name in names if getattr(self, name) != getattr(StudentOptions, name)]
        if self.hidden_loss == "none" and given:
            flag = f"--{given[0].replace('_', '-')}"
            raise UserError(f"{flag} has no effect without --hidden-loss; add --hidden-loss mse or cosine")
        check_mapper(self.mapper, "--mapper")
        if self.layer_map and (self.hidden_layers or self.mapper != "all"):
            flag = "--hidden-layers" if self.hidden_layers else "--mapper"
            raise UserError(f"{flag} and --layer-map exclude each other; keep one")

    def _check_numbers(self) -> None:
        """Ranges of single flags."""
        from student.bitnet import CONVERSIONS

        for flag in ("logits_weight", "ce_weight", "hidden_weight"):
            if not 0 <= getattr(self, flag) < float("inf"):
                raise UserError(f"--{flag.replace('_', '-')} must be a finite number >= 0")
        for name, least in (("top_k", 1), ("tail", 0), ("train_samples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: give {least} or more")
        self.shares()
        self.curriculum()
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g}: give a share of the mass above 0, at most 1")
        if not 0 <= self.eval_fraction < 1:
            raise UserError("--eval-fraction must be at least 0 and below 1")
        if self.bitnet_conversion not in (None, *CONVERSIONS):
            raise UserError(
                f"--bitnet-conversion {self.bitnet_conversion} is unknown; choose {', '.join(CONVERSIONS)}"
            )
        if self.bitnet_learning_rate is not None and not 0 < self.bitnet_learning_rate < float("inf"):
            raise UserError(f"--bitnet-learning-rate {self.bitnet_learning_rate:g}: give a number above 0")
        if self.bitnet_weight_decay is not None and not 0 <= self.bitnet_weight_decay < float("inf"):
            raise UserError(f"--bitnet-weight-decay {self.bitnet_weight_decay:g}: give a number >= 0")
        for flag in _WARMUPS:
            if not 0 <= getattr(self, flag) <= 1:
                raise UserError(f"--{flag.replace('_', '-')} is a share of the steps, 0 to 1")
        if not (self.bitnet_anneal == 0 or self.bitnet_warmup_weights < self.bitnet_anneal <= 1):
            raise UserError(
                f"--bitnet-anneal {self.bitnet_anneal:g}: give a share of the steps above that of "
                f"--bitnet-warmup-weights ({self.bitnet_warmup_weights:g}), at most 1, or 0"
            )

    def _check_blockwise(self) -> None:
        """Flags of --init blockwise, and with which others it goes."""
        for name in ("blockwise_steps", "blockwise_learning_rate", "blockwise_inputs"):
            if self.init != "blockwise" and getattr(self, name) != getattr(StudentOptions, name):
                raise UserError(
                    f"--{name.replace('_', '-')} has no effect without --init blockwise; add that"
                )
        if self.blockwise_steps < 1:
            raise UserError(f"--blockwise-steps {self.blockwise_steps}: give 1 or more")
        if not 0 < self.blockwise_learning_rate < float("inf"):
            raise UserError(
                f"--blockwise-learning-rate {self.blockwise_learning_rate:g}: give a number above 0"
            )
        if self.init == "blockwise" and self.student is not None:
            raise UserError(
                "--init blockwise starts from the teacher's layers, and --student from a checkpoint; keep one"
            )
        if self.init == "blockwise" and not self.student_model_as_bitnet:
            raise UserError(
                "--init blockwise makes blocks ternary, and a student in full precision has none; add "
                "--student-model-as-bitnet, or use --init teacher"
            )

    def check_ternary(self, conversion: str | None) -> None:
        """UserError for a flag that has no effect on a student of this conversion; None: full precision."""
        flags = (
            "bitnet_conversion",
            *_WARMUPS,
            "bitnet_anneal",
            "bitnet_masters",
            "bitnet_learning_rate",
            "bitnet_weight_decay",
            "bitnet_two_stage",
            "bitnet_backward",
        )
        given = [name for name in flags if getattr(self, name) != getattr(StudentOptions, name)]
        if conversion is None and given:
            raise UserError(
                f"--{given[0].replace('_', '-')} has no effect on a student in full precision; add "
                "--student-model-as-bitnet"
            )
        if conversion == "none" and self.bitnet_warmup_norms:
            raise UserError(
                "--bitnet-warmup-norms has no effect without norms; add --bitnet-conversion subln"
            )

    def separate_flag(self) -> str | None:
        """The flag that takes latent weights out of the optimizer's common groups, if one is given."""
        names = ("bitnet_learning_rate", "bitnet_weight_decay")
        given = [name for name in names if getattr(self, name) is not None]
        return f"--{given[0].replace('_', '-')}" if given else None

    def ternary(self) -> TernaryPlan:
        """How a BitNet student is trained."""
        from student.bitnet import Annealing, TernaryPlan, Warmup

        warmup = Warmup(self.bitnet_warmup_weights, self.bitnet_warmup_activations, self.bitnet_warmup_norms)
        return TernaryPlan(
            warmup,
            self.bitnet_masters,
            self.bitnet_two_stage,
            self.bitnet_backward,
            self.bitnet_learning_rate,
            self.bitnet_weight_decay,
            Annealing(self.bitnet_warmup_weights, self.bitnet_anneal),
        )

    def wanted(self) -> ObjectiveRequest:
        """The terms that --objective or the flags in its place ask for; UserError when there are none."""
        if self.objective is not None:
            return read_objective(self.objective)
        losses = catalogue()
        terms = []
        if self.logits_loss != "none" and self.logits_weight > 0:
            loss, where = self._logits_loss(), f"--logits-loss {self.logits_loss}"
            options = loss.check_options({}, where)
            terms.append(
                TermRequest(
                    loss=loss, weight=Weight.constant(self.logits_weight), where=where, options=options
                )
            )
        if self.ce_weight > 0:
            terms.append(
                TermRequest(loss=losses["ce"], weight=Weight.constant(self.ce_weight), where="--ce-weight")
            )
        if self.hidden_loss != "none" and self.hidden_weight > 0:
            given = "--layer-map" if self.layer_map else "--hidden-layers"
            terms.append(
                TermRequest(
                    loss=self._hidden_loss(),
                    weight=Weight.constant(self.hidden_weight),
                    where=given
                    if self.layer_map or self.hidden_layers
                    else f"--hidden-loss {self.hidden_loss}",
                    layers=tuple(parse_layers(self.hidden_layers)) if self.hidden_layers else None,
                    layer_map=tuple(parse_layer_map(self.layer_map)) if self.layer_map else None,
                    mapper=self.mapper,
                    projector=self.projector,
                )
            )
        if not terms:
            raise UserError(
                "nothing to learn: give --logits-loss kl, --ce-weight or --hidden-loss a weight above 0"
            )
        return ObjectiveRequest(tuple(terms))

    def shares(self) -> tuple[float, ...] | None:
        """The numbers of --teacher-weights; UserError unless all are finite and above 0."""
        if self.teacher_weights is None:
            return None
        try:
            weights = tuple(float(part) for part in self.teacher_weights.split(","))
        except ValueError:
            weights = ()
        if not weights or not all(0 < weight < float("inf") for weight in weights):
            raise UserError(
                f"--teacher-weights {self.teacher_weights}: give a number above 0 for each STORE, with "
                "commas between, e.g. 0.5,0.5; leave a STORE out that is to have no share"
            )
        return weights

    def curriculum(self) -> Curriculum:
        """What --select and --weight ask for, before the caches are looked at; UserError where one cannot be
        read.
        """
        from student.data.measures import Curriculum, parse_select, parse_weight

        return Curriculum(
            conditions=() if self.select is None else parse_select(self.select),
            weight=None if self.weight is None else parse_weight(self.weight),
        )

    def _logits_loss(self) -> Loss:
        known = catalogue().values()
        names = [loss.name for loss in known if loss.kind in ("head", "dense") and loss.name != "ce"]
        if self.logits_loss not in names:
            raise UserError(
                f"--logits-loss {self.logits_loss} is unknown{suggest(self.logits_loss, names)}; choose "
                f"none, {', '.join(names)}"
            )
        return catalogue()[self.logits_loss]

    def _hidden_loss(self) -> Loss:
        names = [name.removeprefix("hidden_") for name in catalogue() if name.startswith("hidden_")]
        if self.hidden_loss not in names:
            raise UserError(
                f"--hidden-loss {self.hidden_loss} is unknown{suggest(self.hidden_loss, names)}; choose "
                f"none, {', '.join(names)}"
            )
        return catalogue()[f"hidden_{self.hidden_loss}"]

    def config_changes(self) -> dict[str, Any]:
        """The object of --student-model-config; UserError unless it is a JSON object."""
        if self.student_model_config is None:
            return {}
        example = "write e.g. --student-model-config '{\"num_hidden_layers\": 12}'"
        try:
            changes = json.loads(self.student_model_config)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--student-model-config is not valid JSON ({error}); {example}") from None
        if not isinstance(changes, dict):
            raise UserError(f"--student-model-config must be a JSON object; {example}")
        return changes


@dataclass
class CommandOptions(StudentOptions):
    """What only the command line takes."""

    _argument_group_name: ClassVar[str] = "student and objective"

    recipe: str | None = _flag(
        None,
        "YAML file of flags of this command, perhaps of several stages that follow each other; flags on the "
        "command line win. docs/recipes.md, examples/recipes/.",
    )
    quiet: bool = _flag(False, "Print errors and nothing else; the figures are in the output directory.")
    json: bool = _flag(False, "Print the final summary as one JSON object on standard output.")

    def check(self) -> None:
        """As of StudentOptions, and UserError for a recipe within a recipe."""
        if self.recipe is not None:
            raise UserError("--recipe: is read from the command line alone; write the recipe's own flags")
        super().check()
