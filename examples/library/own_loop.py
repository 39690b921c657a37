"""A training loop of one's own over a cache: `python own_loop.py STORE`."""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from distily import DistillationDataset

data = DistillationDataset(sys.argv[1])
config = AutoConfig.from_pretrained(data.reader.teacher_dir, num_hidden_layers=2)
student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

for epoch in range(2):
    loader = DataLoader(data, batch_size=4, sampler=data.order(epoch), collate_fn=data.collate)
    for step, batch in enumerate(loader):
        logits = student(batch["input_ids"], batch["attention_mask"]).logits
        student_logprobs = logits.log_softmax(-1).gather(-1, batch["teacher_ids"])
        # Unused columns have probability zero; cross-entropy with the teacher is the KL and a constant.
        probability = batch["teacher_logprobs"].exp()
        cross_entropy = -(probability * student_logprobs).sum(-1)
        loss = cross_entropy[batch["labels"] != -100].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"epoch {epoch} step {step}: {loss.item():.3f}")
        if step == 7:
            break
