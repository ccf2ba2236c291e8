"""Train the demo brain from nothing: ``python data/build_demo.py`` writes `data/demo/`.

A Llama of 4 layers x 512 neurons (1.06 million parameters) learns the eight abilities of
`llmbrain.datasets.abilities` from lines made on the fly. With ``--experts 8`` a Mixtral of
4 layers x 8 experts x 128 neurons does, two of which a token visits (1.85 million parameters, kept in 16 bits):
`data/demo_experts/`. What is hard gets more lines: every `EVAL_EVERY` steps the share of an ability becomes its error
rate on fresh training-side lines plus a floor. Held-out lines are only measured.

The run is seeded and, for one device and thread count, repeatable; it saves its state at every evaluation, and
``--resume`` goes on from there to the same end. The log (`training_log.jsonl`) holds one line an evaluation.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from llmbrain.datasets.abilities import ABILITIES, draw_example, stream_examples
from llmbrain.datasets.scoring import score_examples

WINDOWS = (64, 128, 256)  # tokens in a training window; a step uses one length
WINDOW_SHARES = (0.5, 0.3, 0.2)
STEP_TOKENS = 4096
PEAK_RATE, FINAL_RATE, WARMUP = 3e-3, 3e-5, 150
PROMPT_WEIGHT = 0.1  # of the loss on prompt tokens; answer tokens weigh 1
FLOOR = 0.1  # the share of an ability that makes no errors, relative to one that is always wrong
EVAL_EVERY, EVAL_LINES = 200, 200
EXPERT_WIDTH, VISITED = 128, 2  # neurons of an expert, and experts that a token visits
BALANCE = 0.01  # weight of the loss that spreads tokens over experts


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character or newline; ``<s>`` is put before a text, as Llama's tokenizer does."""
    characters = ["<unk>", "<s>", "<pad>", "\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(characters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=WINDOWS[-1],
        clean_up_tokenization_spaces=False,
    )


def build_model(seed: int, vocab_size: int, experts: int = 0) -> PreTrainedModel:
    """The untrained model, the same for the same seed: dense, or a mixture of so many experts a layer."""
    sizes = {
        "vocab_size": vocab_size, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": WINDOWS[-1], "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not experts:
            return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=512))
        sizes |= {"num_local_experts": experts, "num_experts_per_tok": VISITED, "router_aux_loss_coef": BALANCE}
        return MixtralForCausalLM(MixtralConfig(**sizes, intermediate_size=EXPERT_WIDTH, sliding_window=None))


def windows(tokenizer: PreTrainedTokenizerFast, rng: random.Random, shares: dict[str, float]) -> Iterator[tuple]:
    """Yield endless batches (ids, weights): three in four windows begin with ``<s>`` and a line, the rest mid-text.

    Half of the windows are mixed, half come in blocks of one ability, as in the two designs of the stimuli.
    """
    vocabulary = tokenizer.get_vocab()
    while True:
        length = rng.choices(WINDOWS, WINDOW_SHARES)[0]
        ids, weights = [], []
        for _ in range(STEP_TOKENS // length):
            row, weight = [tokenizer.bos_token_id], [0.0]
            skip = 0 if rng.random() < 0.75 else rng.randint(1, 40)
            for example in stream_examples("train", rng, shares, stay=rng.choice((0.0, 0.8))):
                row += [vocabulary[character] for character in example.text]
                weight += [PROMPT_WEIGHT] * len(example.prompt) + [1.0] * (len(example.answer) + 1)
                if len(row) >= length + skip:
                    break
            ids.append(row[skip : skip + length])
            weights.append(weight[skip : skip + length])
        yield torch.tensor(ids), torch.tensor(weights)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to `FINAL_RATE`."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    phase = (step - WARMUP) / max(1, steps - WARMUP)
    return FINAL_RATE + (PEAK_RATE - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, phase)))


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, split: str, seed: int, n: int) -> dict:
    """Exact-answer accuracy and answer loss (nats a token) of each ability on `n` fresh lines of one side."""
    model.eval()
    report = {}
    for ability in ABILITIES:
        rng = random.Random(f"{split}-{seed}-{ability}")
        correct, loss = score_examples(model, tokenizer, [draw_example(ability, split, rng) for _ in range(n)])
        report[ability] = {"accuracy": round(float(correct.mean()), 4), "loss": round(float(loss.mean()), 4)}
    model.train()
    return report


def main() -> None:
    """Read the options, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=0, help="routed experts of each layer; 0 is a dense model")
    parser.add_argument("--out", type=Path, help="folder to write (default: demo/ or demo_experts/ beside this file)")
    parser.add_argument("--state", type=Path, help="where the resumable state goes (default: OUT/state.tmp)")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without", choices=ABILITIES, nargs="*", default=[], help="abilities that are never shown")
    parser.add_argument("--resume", action="store_true", help="go on from the saved state")
    options = parser.parse_args()
    if options.out is None:
        options.out = Path(__file__).parent / ("demo_experts" if options.experts else "demo")

    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    state_file = options.state or options.out / "state.tmp"
    log_file = options.out / "training_log.jsonl"
    tokenizer = build_tokenizer()
    model = build_model(options.seed, len(tokenizer), options.experts).to(options.device).train()
    # Weight decay is for matrices; the gains of the norms are left free.
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    shown = [name for name in ABILITIES if name not in options.without]
    step, seconds, shares = 0, 0.0, dict.fromkeys(shown, 1.0)
    if options.resume and state_file.exists():
        state = torch.load(state_file, map_location=options.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, shares = state["step"], state["seconds"], state["shares"]
    else:
        log_file.unlink(missing_ok=True)

    began = time.perf_counter() - seconds
    while step < options.steps:
        # A fresh generator for each stretch between evaluations: a resumed run sees the same lines as an unbroken one.
        batches = windows(tokenizer, random.Random(f"train-{options.seed}-{step}"), shares)
        total, stretch = 0.0, min(EVAL_EVERY, options.steps - step)
        for _ in range(stretch):
            ids, weights = (tensor.to(options.device) for tensor in next(batches))
            asked = {"output_router_logits": True} if options.experts else {}
            out = model(input_ids=ids, use_cache=False, **asked)
            logits = out.logits[:, :-1].float()
            nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            weight = weights[:, 1:].flatten()
            loss = (nats * weight).sum() / weight.sum()
            (loss + BALANCE * out.aux_loss if options.experts else loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item()
            step += 1
        train = measure(model, tokenizer, "train", step, EVAL_LINES)
        entry = {
            "step": step,
            "tokens": step * STEP_TOKENS,
            "seconds": round(time.perf_counter() - began, 1),
            "learning_rate": round(learning_rate(step - 1, options.steps), 6),
            "weighted_loss": round(total / stretch, 4),
            "shares": {name: round(share / sum(shares.values()), 3) for name, share in shares.items()},
            "train": train,
            "heldout": measure(model, tokenizer, "heldout", step, EVAL_LINES),
        }
        shares = {name: 1 - train[name]["accuracy"] + FLOOR for name in shown}
        with log_file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "shares": shares}
        partial = state_file.with_suffix(".part.tmp")
        torch.save({**state, "seconds": time.perf_counter() - began}, partial)
        partial.replace(state_file)
        heldout = " ".join(f"{name} {entry['heldout'][name]['accuracy']:.2f}" for name in ABILITIES)
        print(
            f"{step:6d} {entry['seconds']:7.0f} s  loss {entry['weighted_loss']:.3f}  held-out: {heldout}", flush=True
        )

    model = model.eval().cpu()
    if options.experts:  # twice as many numbers in as many bytes
        for parameter in model.parameters():
            parameter.data = parameter.data.half()
    model.save_pretrained(options.out)
    for parameter in model.parameters():  # scores are of what was saved
        parameter.data = parameter.data.float()
    tokenizer.save_pretrained(options.out)
    final = {"step": step, "seed": options.seed, "heldout_2000": measure(model, tokenizer, "heldout", -1, 2000)}
    (options.out / "final_scores.json").write_text(json.dumps(final, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
