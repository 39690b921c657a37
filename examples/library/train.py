"""Train a student of half the teacher's depth from a cache: `python train.py STORE OUTPUT_DIR`."""

import sys

from transformers import EarlyStoppingCallback

from distily import CacheReader, DistillationConfig, DistillationTrainer

cache = CacheReader.open(sys.argv[1])
args = DistillationConfig(
    output_dir=sys.argv[2],
    student_model_config={"num_hidden_layers": cache.identity.num_layers // 2},
    logits_loss="kl",
    ce_weight=0.1,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    max_steps=16,
    load_best_model_at_end=True,
    metric_for_best_model="kl",
)
trainer = DistillationTrainer(args=args, train_dataset=cache, callbacks=[EarlyStoppingCallback(3)])
trainer.train()
trainer.save_model()
print(f"KL from the teacher: {trainer.evaluate()['eval_kl']:.3f} nats")
