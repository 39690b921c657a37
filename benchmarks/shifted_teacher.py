"""A second teacher for the studies of several: the demo teacher, fine-tuned on a part of the demo text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from common import RUN
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, BATCH, LENGTH, RATE = 32, 2, 128, 2e-4


def shifted_teacher() -> Path:
    """The directory of a checkpoint, which is made where there is none: STEPS steps of AdamW on labels, from
    the first half of the documents, with the demo teacher's tokenizer.
    """
    made = RUN / "shifted_teacher"
    if made.is_dir():
        return made
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(RUN / "teacher")
    lines = (RUN / "topics.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[: len(lines) // 2]]
    ids = torch.tensor([token for text in texts for token in tokenizer(text).input_ids])
    rows_ST = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    model = AutoModelForCausalLM.from_pretrained(RUN / "teacher", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for rows in torch.randperm(len(rows_ST))[: STEPS * BATCH].view(STEPS, BATCH):
        optimizer.zero_grad()
        loss = model(input_ids=rows_ST[rows], labels=rows_ST[rows]).loss
        loss.backward()
        optimizer.step()
    partial = made.with_suffix(".partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    for file in (RUN / "teacher").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, partial)
    partial.rename(made)
    return made
