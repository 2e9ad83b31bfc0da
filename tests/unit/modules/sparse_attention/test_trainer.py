"""The Trainer of transformers with alignment, and its evaluation at a budget."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tests.unit.modules.sparse_attention.models import made, prompts
from transformers import Trainer, TrainingArguments

from lineament.modules.sparse_attention import aligned, sparse_attention

BUDGET: dict[str, Any] = {"block_size": 4, "blocks": 3, "seed": 5}


class Aligned(Trainer):
    """The Trainer as its documentation says that a loss is changed."""

    coins: dict[int, bool]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        step = self.state.global_step
        with aligned(model, **BUDGET, step=step) as branch:
            out = model(**inputs)
            loss = out.loss + branch.loss
        self.coins[step] = branch.coins[0]
        return (loss, out) if return_outputs else loss


def test_the_trainer_of_transformers(tmp_path: Path):
    model, tokens = made("llama"), prompts(8, 26)
    plain = copy.deepcopy(model)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=0.01, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=1e9, report_to=[], save_strategy="steps", save_steps=4, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data: Any = [{"input_ids": x, "labels": x} for x in tokens]
    trainer = Aligned(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.coins = {}
    order = [x["input_ids"] for x in trainer.get_train_dataloader()]
    trainer.train()
    assert set(trainer.coins.values()) == {True, False}
    # The same by hand, on the batches in the order that the Trainer's seed gives.
    optimizer = torch.optim.SGD(plain.train().parameters(), 0.01)
    for step, batch in enumerate(order):
        optimizer.zero_grad()
        with aligned(plain, **BUDGET, step=step) as branch:
            (plain(batch, labels=batch).loss + branch.loss).backward()
        optimizer.step()
    for one, two in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    # Evaluation at a budget, and the checkpoint is an ordinary one.
    losses = []
    for blocks in (1, 7):
        with sparse_attention(model, block_size=4, blocks=blocks):
            losses.append(Trainer(model, arguments, eval_dataset=data).evaluate()["eval_loss"])
    with torch.no_grad():
        known = model(tokens, labels=tokens).loss.item()
    opened = type(model).from_pretrained(tmp_path / "checkpoint-4")
    assert opened.config._attn_implementation == "sdpa"
    assert abs(losses[1] - known) < 1e-3 < abs(losses[0] - known)
    torch.testing.assert_close(opened(tokens).logits, model.eval()(tokens).logits)
