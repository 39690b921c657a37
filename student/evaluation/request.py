"""What `distily-train eval` is asked for, and what can be wrong with that whatever the models are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from student.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")
ENGINES = ("transformers", "vllm")


@dataclass(frozen=True)
class CacheOptions:
    """store: None takes the one that summary.json names. fraction: None takes the training's.
    trained_samples: measure those that the training learned from as well, apart from the held-out ones.
    """

    store: str | None = None
    manifest: str | None = None
    fraction: float | None = None
    all_samples: bool = False
    trained_samples: bool = False


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """names: files, hub data sets `name:config`, or entries of suites.yaml. split and column: of all."""

    names: Sequence[str] = ()
    split: str | None = None
    column: str | None = None
    since: str | None = None
    date_column: str = "date"
    max_seq_len: int | None = None


@dataclass(frozen=True)
class TaskOptions:
    """names: tasks, groups and tags of lm-evaluation-harness, or of student/evaluation/tasks."""

    names: Sequence[str] = ()
    data: Path | None = None
    num_fewshot: int | None = None
    max_gen_toks: int | None = None


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """file: text, a prompt on each line. chat: put prompts into the tokenizer's chat template."""

    file: Path | None = None
    max_new_tokens: int | None = None
    chat: bool = False


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """directory: a student. teacher: of texts, tasks and prompts; the cache needs none. limit: at most so
    many samples of the cache, windows of each text and records of each task. command: the words it was made
    with, for the record.
    """

    directory: Path
    cache: CacheOptions = field(default_factory=CacheOptions)
    texts: TextOptions = field(default_factory=TextOptions)
    tasks: TaskOptions = field(default_factory=TaskOptions)
    prompts: PromptOptions = field(default_factory=PromptOptions)
    suites: Sequence[str] = ()
    teacher: str | None = None
    teacher_dtype: str = "auto"
    engine: str = "transformers"
    batch_size: int = 8
    limit: int | None = None
    command: Sequence[str] = ()

    @property
    def wants_cache(self) -> bool:
        """The cache is measured where it is named, and where nothing else is asked for."""
        others = self.texts.names or self.tasks.names or self.suites or self.prompts.file
        return self.cache != CacheOptions() or not others

    def check(self) -> None:
        """UserError for the first flag that cannot be served."""
        for flag, value in (
            ("--batch-size", self.batch_size),
            ("--limit", self.limit),
            ("--max-gen-toks", self.tasks.max_gen_toks),
            ("--max-new-tokens", self.prompts.max_new_tokens),
        ):
            if value is not None and value < 1:
                raise UserError(f"{flag} must be at least 1")
        if self.tasks.num_fewshot is not None and self.tasks.num_fewshot < 0:
            raise UserError("--num-fewshot must not be negative")
        if self.texts.max_seq_len is not None and self.texts.max_seq_len < 4:
            raise UserError("--max-seq-len must be at least 4")
        if self.cache.fraction is not None and not 0 < self.cache.fraction < 1:
            raise UserError("--eval-fraction must be between 0 and 1; for every sample, --all-samples")
        if self.cache.all_samples and self.cache.fraction is not None:
            raise UserError("--all-samples and --eval-fraction exclude each other; keep one")
        if self.cache.all_samples and self.cache.trained_samples:
            raise UserError("--all-samples are those of --trained-samples, too; keep one of the flags")
        for flag, chosen, known in (
            ("--teacher-dtype", self.teacher_dtype, DTYPES),
            ("--engine", self.engine, ENGINES),
        ):
            if chosen not in known:
                raise UserError(f"{flag} {chosen}: choose one of {', '.join(known)}")
        if self.texts.since is not None:
            _check_date(self.texts.since)
        self._check_effects()

    def _check_effects(self) -> None:
        texts, tasks = bool(self.texts.names or self.suites), bool(self.tasks.names or self.suites)
        prompts = self.prompts.file is not None
        beside = texts or tasks or prompts
        for flag, given, used, fix in (
            (
                "--teacher",
                self.teacher,
                beside,
                "--text, --tasks, --suite or --prompts (the cache has its own)",
            ),
            ("--task-data", self.tasks.data, tasks, "--tasks or --suite"),
            ("--text-column", self.texts.column, texts, "--text or --suite"),
            ("--since", self.texts.since, texts, "--text or --suite"),
            ("--max-new-tokens", self.prompts.max_new_tokens, prompts, "--prompts"),
            ("--chat", self.prompts.chat or None, prompts, "--prompts"),
        ):
            if given is not None and not used:
                raise UserError(f"{flag} has no effect without {fix}")


def _check_date(since: str) -> None:
    try:
        date.fromisoformat(since)
    except ValueError:
        raise UserError(f"--since {since}: no date; write it like 2024-06-30") from None
