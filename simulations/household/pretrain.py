"""Pretrain the base model on general text.

    python -m fedloom.simulations.household.pretrain --out simulations/models/household --seed 0

The number of steps is fixed and every batch is drawn from the seed and the step, so a run that was interrupted goes on
from its checkpoint (`<out>/checkpoint.pt`, removed at the end) as if nothing had happened.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedloom.simulations.household.general import general_examples
from fedloom.simulations.household.grammar import Example
from fedloom.simulations.household.tokenizer import train_tokenizer

VOCAB_SIZE, TOKENIZER_EXAMPLES, MAX_LENGTH = 1536, 20_000, 256
STEPS, BATCH, WARMUP = 2400, 64, 150
BUCKET = 16  # batches drawn and sorted by length together
PEAK_RATE, FINAL_SHARE = 2e-3, 0.02
PROMPT_WEIGHT = 0.1
CHECKPOINT_EVERY = 200

Sample = tuple[list[int], list[int]]
"""Token ids of a prompt, and of its completion with the end-of-sequence token."""


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained model of two million weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> list[Sample]:
    """Tokenise prompts and completions apart, as fine-tuning does, and end the completions."""
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    completions = tokenizer([example.completion for example in examples])["input_ids"]
    return [(p, [*c, int(tokenizer.eos_token_id)]) for p, c in zip(prompts, completions, strict=True)]


def collate(samples: Sequence[Sample], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids `(B, L)` and the weight of each token's loss `(B, L)`, 0 on padding."""
    length = max(len(prompt) + len(completion) for prompt, completion in samples)
    ids_BL = torch.full((len(samples), length), pad)  # noqa: N806
    weights_BL = torch.zeros(len(samples), length)  # noqa: N806
    for row, (prompt, completion) in enumerate(samples):
        end = len(prompt) + len(completion)
        ids_BL[row, :end] = torch.tensor(prompt + completion)
        weights_BL[row, : len(prompt)] = PROMPT_WEIGHT
        weights_BL[row, len(prompt) : end] = 1.0
    return ids_BL, weights_BL


def draw_bucket(tokenizer: PreTrainedTokenizerFast, seed: int, bucket: int) -> list[list[Sample]]:
    """The batches of one bucket: fresh examples, alike in length within a batch, in shuffled order."""
    samples = encode(tokenizer, general_examples(BUCKET * BATCH, _stream(seed, bucket)))
    samples.sort(key=lambda sample: len(sample[0]) + len(sample[1]))
    batches = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
    order = torch.randperm(BUCKET, generator=torch.Generator().manual_seed(_stream(seed, bucket)))
    return [batches[place] for place in order.tolist()]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to `FINAL_SHARE` of the peak."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_RATE * (FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * done)) / 2)


def train_step(model: LlamaForCausalLM, optimizer: Optimizer, batch: Sequence[Sample], rate: float) -> float:
    """One weighted next-token step; returns the loss."""
    ids_BL, weights_BL = collate(batch, int(model.config.pad_token_id or 0))  # noqa: N806
    # Right padding needs no attention mask: a causal model's real tokens never look at it.
    logits_BLV = model(input_ids=ids_BL).logits[:, :-1]  # noqa: N806
    losses = cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="none")
    weights = weights_BL[:, 1:].flatten()
    loss = (losses * weights).sum() / weights.sum()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return loss.item()


def pretrain(out: Path, seed: int, steps: int = STEPS) -> None:
    """Write tokenizer and model to the folder `out`, going on from its checkpoint if it holds one."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    examples = general_examples(TOKENIZER_EXAMPLES, _stream(seed, -1))
    texts = (text for example in examples for text in (example.prompt, example.completion))
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB_SIZE, max_length=MAX_LENGTH)
    model = build_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns) as progress:
        bar = progress.add_task("pretrain", total=steps, completed=first, loss=math.nan)
        batches: list[list[Sample]] = []
        for step in range(first, steps):
            if not batches or step % BUCKET == 0:
                batches = draw_bucket(tokenizer, seed, step // BUCKET)
            loss = train_step(model, optimizer, batches[step % BUCKET], learning_rate(step, steps))
            progress.update(bar, advance=1, loss=loss)
            if (step + 1) % CHECKPOINT_EVERY == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    checkpoint.unlink(missing_ok=True)


def _stream(seed: int, bucket: int) -> int:
    """The seed of one bucket's text (-1: the tokenizer's); streams of different seeds do not meet."""
    return seed * 1_000_003 + bucket + 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the household base model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2, help="fewer are faster on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pretrain(options.out, options.seed, options.steps)


if __name__ == "__main__":
    main()
