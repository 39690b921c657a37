"""ShareGPT and Alpaca give the samples that the same conversations give as messages; reasoning is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from pipeline.data.chats import ChatFormat
from pipeline.data.documents import load_documents
from pipeline.data.tokens import tokenise_chats
from pipeline.errors import RequestError

# As Qwen 3's: what was thought is written in the turns behind the last question only.
THINKING = """{% set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last %}
{{- '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# As DeepSeek R1's: the prompt opens the thought.
OPENED = THINKING.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}")


@pytest.fixture(scope="module")
def smollm(demo: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo / "teacher")


def conversations(file: Path, **options: Any) -> list[Any]:
    from pipeline.data.chats import check_messages

    documents = load_documents(str(file), "train", **options)
    assert documents.chats
    return [check_messages(value, where, documents.column) for where, value in documents.values]


def write(file: Path, *rows: object) -> Path:
    if file.suffix == ".parquet":
        datasets.Dataset.from_list(list(rows)).to_parquet(str(file))  # type: ignore[arg-type]
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_sharegpt(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"id": "1", "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]},
        {
            "id": "2",
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "c"},
                {"from": "assistant", "value": "d"},
            ],
        },
    ]
    file = write(tmp_path / f"data.{suffix}", *rows)
    expected = [
        [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}],
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ],
    ]
    assert conversations(file) == expected
    assert conversations(file, messages_column="conversations") == expected


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_alpaca(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"instruction": "Say it.", "input": "this", "output": "It.", "system": "", "history": [["q", "a"]]},
        {"instruction": "Go.", "input": "", "output": "Gone.", "system": "Be kind.", "history": []},
    ]
    assert conversations(write(tmp_path / f"data.{suffix}", *rows)) == [
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "Say it.\n\nthis"},
            {"role": "assistant", "content": "It."},
        ],
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Go."},
            {"role": "assistant", "content": "Gone."},
        ],
    ]


def test_alpaca_of_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("instruction,input,output\nGo.,,Gone.\n")
    assert conversations(tmp_path / "data.csv") == [
        [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Gone."}]
    ]


def test_a_rendered_text_beside_alpaca_is_what_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", {"instruction": "a", "output": "b", "text": "### a\nb"})
    assert not load_documents(str(file), "train").chats
    assert conversations(file, messages_column="instruction")[0][1]["content"] == "b"


def learned(tokenizer: Any, template: str, messages: Any) -> str:
    form = ChatFormat(tokenizer, template)
    (chat,) = tokenise_chats([("row 3", messages)], tokenizer, form, "messages", False)
    return str(tokenizer.decode(chat.tokens[chat.learned], clean_up_tokenization_spaces=False))


def thought(content: str, reasoning: str | None = "think of\nit") -> list[dict[str, Any]]:
    answer = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    return [{"role": "user", "content": "a?"}, answer]


def test_reasoning_is_learned_with_all_that_the_assistant_writes(smollm: Any) -> None:
    assert learned(smollm, THINKING, thought("b")) == "<think>\nthink of\nit\n</think>\n\nb<|im_end|>"
    assert learned(smollm, OPENED, thought("b")) == "think of\nit\n</think>\n\nb<|im_end|>"
    assert learned(smollm, THINKING, thought("b", None)) == "b<|im_end|>"
    assert learned(smollm, THINKING, thought("b", "")) == "b<|im_end|>"


def test_reasoning_that_the_template_leaves_out_is_left_out(smollm: Any) -> None:
    earlier = [*thought("b"), *thought("c", "more")]
    found = learned(smollm, THINKING, earlier)
    assert found == "b<|im_end|><think>\nmore\n</think>\n\nc<|im_end|>"
    plain = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    assert learned(smollm, plain, thought("b")) == "b<|im_end|>"


def test_reasoning_where_a_prompt_is_not_known_is_refused(smollm: Any) -> None:
    no_prompt = THINKING.partition("{%- if add_generation_prompt")[0].replace("m.role + '", "m.role + ' '+ '")
    template = "{% if messages | length < 2 %}other{% endif %}" + no_prompt
    with pytest.raises(RequestError, match=r"row 3: .*reasoning"):
        learned(smollm, template, thought("b"))


def test_reasoning_that_is_no_text_is_refused(smollm: Any) -> None:
    with pytest.raises(RequestError, match="reasoning_content has to be text, it is list"):
        learned(smollm, THINKING, thought("b", ["a"]))  # type: ignore[arg-type]
