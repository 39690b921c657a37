"""`eval --tasks`: every family of the seed's suite from local records, and what its metrics mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from student.errors import UserError
from student.evaluation.command import evaluate
from student.evaluation.harness import LoadedTasks, load_tasks, run, task_manager
from student.evaluation.models import student_side
from student.evaluation.request import EvalRequest, TaskOptions
from student.evaluation.suites import suite_members
from student.evaluation.task_data import leaves
from student.evaluation.tasks import answers, entities
from tests.student.exports import Students
from tests.student.task_records import FAMILIES, RECORDS, write_records

lm_model = pytest.importorskip("lm_eval.api.model")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No record comes from the hub, and none is left behind in the home directory."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def loaded(records: Path, trained: Path) -> LoadedTasks:
    """Every family."""
    request = EvalRequest(directory=trained, tasks=TaskOptions(FAMILIES, records, max_gen_toks=8))
    tasks = load_tasks(request, [student_side(trained)])
    assert tasks is not None
    return tasks


class Oracle(lm_model.LM):  # type: ignore[misc,name-defined]
    """Knows the answer to every record, or gives another."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        gold = [one.doc.get("answer", one.doc.get("label")) for one in requests]
        best = [(one.idx == wanted) == self.right for one, wanted in zip(requests, gold, strict=True)]
        return [(-1.0 if one else -2.0, False) for one in best]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [self._answer(one.task_name, one.doc) if self.right else "PER: nobody" for one in requests]

    def _answer(self, task: str, doc: dict[str, Any]) -> str:
        if task == "conll2003":
            return entities.target(doc)
        if task == "squad":
            return str(doc["answers"]["text"][0])
        if task == "triviaqa":
            return str(doc["answer"]["aliases"][-1])
        return f"so the answer is ({doc['answer']})" if task.startswith("mmlu_pro") else str(doc["answer"])


def test_every_family_scores_one_where_all_is_right(loaded: LoadedTasks) -> None:
    found = run(Oracle(right=True), loaded, None)
    scores = {(entry["task"], entry["metric"]): entry["value"] for entry in found}
    assert set(scores.values()) == {1.0}, scores
    glue = {"cola", "mnli", "mnli_mismatch", "mrpc", "qnli", "qqp", "rte", "sst2", "wnli"}
    assert {task for task, _ in scores} == {*FAMILIES, *glue} - {"glue"}
    counts = {entry["task"]: entry["samples"] for entry in found}
    assert (counts["mnli"], counts["conll2003"], counts["mmlu_pro_math"]) == (3, 3, 2)
    assert {entry["dataset"] for entry in found if entry["task"] == "cola"} == {"nyu-mll/glue:cola"}
    assert loaded.names["cola"] == "glue"


def test_every_family_scores_nothing_where_all_is_wrong(loaded: LoadedTasks) -> None:
    scores = {(e["task"], e["metric"]): e["value"] for e in run(Oracle(right=False), loaded, None)}
    # The wrong one of three is chosen among two; Matthews' correlation of what is always wrong is -1.
    assert scores.pop(("cola", "mcc")) == -1.0
    assert set(scores.values()) == {0.0}, scores


def test_the_suite_names_tasks_that_there_are() -> None:
    index = task_manager().task_index
    suite = [member for _, member in suite_members(("seed",), "tasks")]
    assert set(suite) <= set(index)
    assert set(FAMILIES) <= {*suite, *leaves(index, suite)}
    assert len(list(leaves(index, ["mmlu"]))) == 57
    for name in ("nothing_like_it", "squadd", "humaneval"):
        with pytest.raises(UserError, match=name):
            load_tasks(EvalRequest(directory=Path("x"), tasks=TaskOptions((name,))), [])


@torch.no_grad()
def test_a_student_and_its_teacher_choose_what_is_likelier(
    trained: Path, teacher: Path, records: Path, tmp_path: Path
) -> None:
    student = Path(shutil.copytree(trained, tmp_path / "student"))
    tasks = TaskOptions(("sst2", "squad"), records, max_gen_toks=4)
    record = evaluate(EvalRequest(directory=student, tasks=tasks, teacher=str(teacher), command=("x",)))
    assert record == json.loads((student / "eval.json").read_text())
    found = {(entry["task"], entry["metric"]): entry for entry in record["tasks"]}
    rows = RECORDS["nyu-mll/glue/sst2/validation"]
    for side, source in (("student", student), ("teacher", teacher)):
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(source).eval(),
            AutoTokenizer.from_pretrained(source),
        )
        right = 0
        for row in rows:
            prompt = f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:"
            scores = []
            for choice in (" negative", " positive"):
                start, ids = len(tokenizer(prompt).input_ids), tokenizer(prompt + choice).input_ids
                logprob = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
                scores.append(sum(float(logprob[t - 1, ids[t]]) for t in range(start, len(ids))))
            right += int(scores[1] > scores[0]) == row["label"]
        assert found["sst2", "acc"][side] == pytest.approx(right / len(rows))
    assert found["squad", "f1"]["student"] == 0.0
    assert (found["squad", "exact"]["samples"], found["squad", "exact"]["suite"]) == (2, None)


def test_ternary_students_run_too(students: Students, records: Path, tmp_path: Path) -> None:
    student = Path(shutil.copytree(students("llama"), tmp_path / "ternary"))
    request = EvalRequest(
        directory=student, tasks=TaskOptions(("conll2003",), records, max_gen_toks=4), limit=1
    )
    (entry,) = evaluate(request)["tasks"]
    assert (entry["metric"], entry["samples"], entry["teacher"]) == ("entity_f1", 1, None)


def test_bad_requests(
    refused: Callable[..., str],
    trained: Path,
    records: Path,
    students: Students,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = ("--task-data", records)
    assert "algebra" not in (line := refused("eval", trained, "--tasks", "mmlu_virology", *data)), line
    assert "cais/mmlu/virology/test.jsonl" in line
    assert "sst2/train.jsonl" in refused("eval", trained, "--tasks", "sst2", "--num-fewshot", 1, *data)
    assert "--max-gen-toks" in refused("eval", trained, "--tasks", "mmlu_pro_math", *data)
    assert "--engine vllm" in refused(
        "eval", students("llama"), "--tasks", "squad", "--engine", "vllm", *data
    )
    monkeypatch.setattr("student.evaluation.harness.find_spec", lambda name: None)
    assert "[eval]" in refused("eval", trained, "--tasks", "squad", *data)


def test_short_answers_by_hand() -> None:
    assert answers.words("The  Big, red Dog's an apple.") == ["big", "red", "dogs", "apple"]
    assert answers.exact("the Lima!", ["lima", "x"]) == 1.0
    assert answers.exact("Lima Peru", ["Lima"]) == 0.0
    assert answers.overlap("red big dog", ["big dog", "cat"]) == pytest.approx(0.8)  # 2 of 3, and 2 of 2
    assert answers.overlap("the", ["an"]) == 1.0
    assert answers.overlap("", ["dog"]) == 0.0


def test_entities_by_hand() -> None:
    tokens, tags = ["A", "B", "C", "D", "E"], [1, 2, 1, 4, 0]  # a B- begins anew; an I- of another type too
    assert entities.tagged(tokens, tags) == [("PER", "A B"), ("PER", "C"), ("ORG", "D")]
    assert entities.written(" PER: Ada  Brook; loc: Bern; nothing\nLOC: Rome") == [
        ("PER", "Ada Brook"),
        ("LOC", "Bern"),
    ]
    assert entities.written("none") == entities.written("") == []
    doc = {"tokens": tokens, "ner_tags": tags}
    assert entities.results(doc, ["PER: C; PER: C; ORG: D"]) == {"entity_f1": (2, 3, 3)}
    assert entities.micro_f1([(2, 3, 3), (0, 1, 0)]) == pytest.approx(4 / 7)
    assert entities.micro_f1([(0, 0, 0)]) == 0.0
