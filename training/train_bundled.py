"""Train the bundled model: a byte-level Llama with real long-range retrieval.

    python training/train_bundled.py --minutes 100          # begins, or resumes from the last checkpoint
    python training/train_bundled.py --export               # writes the model folder from the last checkpoint

Sequences grow from 64 to 8,192 bytes; a length is left when held-out recall at it is good or its time is up.
Earlier lengths stay in the mix at a smaller rate. When the longest is done, the rest of the time goes mostly to
text. Interrupt it at any time: it saves a checkpoint and can be resumed.
"""

import argparse
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from evaluate import END, bits_per_byte, copying_score, documents, passkey_score, recall_score
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tilewise.data.tasks import copying, passkey, recall

HERE = Path(__file__).parent
VOCABULARY = 260  # 256 bytes, end, and three unused
MATCH, COPY = 1.0, 0.3  # scales of the induction circuit training starts from
SOURCE_WEIGHTS = {
    "python-docs": 0.27,
    "python-stdlib": 0.20,
    "manual-pages": 0.18,
    "austen": 0.15,
    "bible-kjv": 0.10,
    "jargon-file": 0.07,
    "devils-dictionary": 0.03,
}


@dataclass(frozen=True)
class Stage:
    """Lengths and kinds of sequences, until `enough` recall at `length` or `minutes` have passed.

    A step has one length. From 4,096 bytes on its kinds are `long_kinds`, where given: text teaches little there
    that it does not teach at 1,024 for a third of the price.
    """

    length: int
    enough: float
    minutes: float
    kinds: dict[str, float]
    lengths: dict[int, float]
    tokens: int = 16_384  # of a step; short sequences learn to retrieve sooner from more, smaller steps
    text_weight: float = 1.0  # of text, where the answers of all tasks together weigh 1
    long_kinds: dict[str, float] | None = None
    muon: bool = False  # Muon instead of AdamW for the layers' matrices


_FIRST = {"recall": 0.67, "text": 0.33}
_THEN = {"recall": 0.40, "passkey": 0.15, "copying": 0.10, "text": 0.35}
_LONG = {"recall": 0.42, "passkey": 0.35, "copying": 0.05, "text": 0.18}
_LAST = {"recall": 0.08, "passkey": 0.04, "copying": 0.03, "text": 0.85}
_LENGTHS = {8192: 0.2, 4096: 0.15, 1024: 0.45, 512: 0.2}
STAGES = (
    Stage(64, 0.95, 12, _FIRST, {64: 1.0}, 4096, 0.3),
    Stage(128, 0.95, 5, _FIRST, {128: 0.8, 64: 0.2}, 4096, 0.3),
    Stage(256, 0.95, 5, _FIRST, {256: 0.8, 128: 0.1, 64: 0.1}, 8192, 0.3),
    Stage(1024, 0.95, 12, _THEN, {1024: 0.75, 256: 0.15, 128: 0.1}, 8192, 0.5),
    Stage(4096, 0.96, 20, _THEN, {4096: 0.6, 1024: 0.3, 256: 0.1}, 8192, muon=True),
    Stage(8192, 0.95, 12, _THEN, {8192: 0.5, 4096: 0.2, 1024: 0.3}, 8192, 1.0, _LONG, muon=True),
    Stage(8192, 2.0, 1e9, _LAST, _LENGTHS, 8192, 1.0, _LONG, muon=True),  # the rest of the time
)


def build(heads: int, key_value_heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=256 // heads,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM) -> None:
    """Start the first two layers as a rough induction circuit, which otherwise takes long to form.

    Retrieval needs to find where the last few bytes stood before, and to take what followed them.
    First layer: all embeddings get one common direction (all logits move alike, so nothing else changes);
    queries and keys made of it are turned against each other by rotary phases such that head h looks h + 1 bytes
    back, and writes a code of the byte found there into its own slot of the residual.
    Second layer: queries made of slots 0, 1, 2 meet keys made of slots 1, 2, 3, that is, a place one byte after
    the same three bytes; only slowly turning rotary dimensions are used. Its value is the byte there.
    Everything is trained from there on, and training is free to undo it.
    """
    config = model.config
    width, size = config.hidden_size, config.head_dim
    half, heads, shared = size // 2, config.num_attention_heads, config.num_key_value_heads
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    sharp = (angles > 0.02).float() * 0.6  # slower ones hardly tell neighbours apart
    slow = (angles < 0.005).float().repeat(2)[:, None]
    embeddings = model.model.embed_tokens.weight
    embeddings *= 1.5
    embeddings[:, 0] = 0.3

    def part(index: int) -> slice:
        return slice(index * size, (index + 1) * size)

    first, second = (layer.self_attn for layer in model.model.layers[:2])
    code = torch.nn.init.orthogonal_(torch.empty(size, width))
    code[:, 0] = 0
    first.o_proj.weight.zero_()
    for head in range(heads):
        turn = angles * (1 + head)  # a query at t turned back by so much meets the key at t - 1 - head
        first.q_proj.weight[part(head), 0] = torch.cat((sharp * turn.cos(), -sharp * turn.sin()))
        first.o_proj.weight[part(head), part(head)] = 0.06 * torch.eye(size)
    first.o_proj.weight[0] = 0
    for head in range(shared):
        first.k_proj.weight[part(head), 0] = torch.cat((sharp, torch.zeros(half)))
        first.v_proj.weight[part(head)] = code
    for head in range(shared):
        mixes = [slow * torch.randn(size, size) / slow.sum().sqrt() for _ in range(3)]
        query, key = torch.zeros(size, width), torch.zeros(size, width)
        for slot, mix in enumerate(mixes):
            query[:, part(slot)] += MATCH * mix
            key[:, part(slot + 1)] += MATCH * mix
        query[:, 0] = key[:, 0] = 0
        copied = torch.nn.init.orthogonal_(torch.empty(size, width))
        copied[:, 0] = 0
        second.k_proj.weight[part(head)] = key
        second.v_proj.weight[part(head)] = copied
        for asking in range(head * heads // shared, (head + 1) * heads // shared):
            second.q_proj.weight[part(asking)] = query
            second.o_proj.weight[:, part(asking)] = COPY * copied.T


class Corpus:
    """Training text, as token ids: the zero byte between documents becomes the end token."""

    def __init__(self, work: Path):
        self.texts = {name: (work / "train" / f"{name}.bin").read_bytes() for name in SOURCE_WEIGHTS}
        self.names, self.weights = list(SOURCE_WEIGHTS), list(SOURCE_WEIGHTS.values())

    def crop(self, rng: random.Random, length: int) -> bytes:
        text = self.texts[rng.choices(self.names, self.weights)[0]]
        start = rng.randrange(len(text) - length)
        return text[start : start + length]


def batch(stage: Stage, corpus: Corpus, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and loss weights, both [rows, length].

    The weights of text sum to the stage's `text_weight`, and those of all answers to 1, each kind of task that
    occurs having an equal part, so that five digits weigh as much as thousands of bytes around them.
    """
    rng = random.Random(f"batch {seed}")
    length = rng.choices(list(stage.lengths), list(stage.lengths.values()))[0]
    rows = stage.tokens // length
    shares = stage.long_kinds if stage.long_kinds and length >= 4096 else stage.kinds
    kinds = rng.choices(list(shares), list(shares.values()), k=rows)
    tokens = np.zeros((rows, length), dtype=np.int64)
    of_text = np.zeros((rows, length), dtype=np.float32)
    of_answers = {kind: np.zeros((rows, length), dtype=np.float32) for kind in set(kinds) - {"text"}}
    for row, kind in enumerate(kinds):
        draw = rng.randrange(1_000_000_000)
        example = None
        if kind == "recall":
            most = max(2, length // 24)
            example = recall(length, draw, rng.choice((most, rng.randint(2, most))))
        elif kind == "copying":
            example = copying(length, draw)
        elif kind == "passkey":
            example = passkey(length, draw, filler=corpus.crop(rng, length))
        text = corpus.crop(rng, length) if example is None else example.text
        tokens[row] = np.frombuffer(text, dtype=np.uint8)
        if kind in ("text", "passkey"):
            tokens[row][tokens[row] == 0] = END
            of_text[row] = 1
        for start, end in example.spans if example else ():
            of_text[row, start:end] = 0
            of_answers[kind][row, start:end] = 1
    of_text[:, 0] = 0
    weights = stage.text_weight * of_text / max(1.0, of_text.sum())
    for mask in of_answers.values():
        weights += mask / mask.sum() / len(of_answers)
    return torch.from_numpy(tokens), torch.from_numpy(weights)


def loss_of(model, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum()


def optimizers_of(model, rate: float, muon: bool) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [{"params": others, "weight_decay": 0.0}]
    if not muon:
        groups.insert(0, {"params": matrices, "weight_decay": 0.1})
    adam = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    if not muon:
        return [adam]
    return [adam, torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]


def rate_at(state: dict, options: argparse.Namespace) -> float:
    """Warm-up by steps, then constant, then a cosine over the last part of the time."""
    warm = min(1.0, (state["step"] - state["warm_from"] + 1) / (20 if state["warm_from"] else 100))
    left = 1 - state["seconds"] / (60 * options.minutes)
    part = min(1.0, max(0.0, left / options.decay))
    return options.rate * warm * (0.02 + 0.98 * (0.5 - 0.5 * float(np.cos(np.pi * part))))


def progress(model, work: Path, lengths: list[int]) -> dict[str, float]:
    """A quick look, a few seconds: shares of right answers and held-out bits per byte."""
    model.eval()
    text = b"".join(text[:4096] for text in documents(work) if len(text) >= 4096)
    filler = b"\n".join(documents(work))
    found: dict[str, float] = {}
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
        for length in lengths:
            right, total = recall_score(model, length, max(2, 8192 // length))
            found[f"recall {length}"] = right / total
        for length in [length for length in lengths if length >= 1024]:
            right, total = passkey_score(model, length, None, 6, filler)
            found[f"passkey {length}"] = right / total
        if 1024 in lengths:
            right, total = copying_score(model, 1024, 16)
            found["copying 1024"] = right / total
        found["bits per byte"] = bits_per_byte(model, text, 1024)
    model.train()
    return found


def merit(found: dict[str, float]) -> float:
    """One number by which an export replaces an earlier one."""
    return sum(value for name, value in found.items() if name != "bits per byte") - (
        found["bits per byte"] / 4
    )


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    part.chmod(0o644)  # safetensors leaves files to their owner alone
    os.replace(part, path)


def tokenizer_json() -> dict:
    """Byte-level BPE without merges: byte b is token b, 256 the end."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = bytes_to_unicode()
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": END, "content": "<|end|>", **special}],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {names[byte]: byte for byte in range(256)} | {"<|end|>": END},
            "merges": [],
        },
    }


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{len(names)} cores of {names[0]}"


def export(model: LlamaForCausalLM, folder: Path, state: dict) -> None:
    """Write a folder `from_pretrained` reads, weights in bfloat16; each file is replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.state_dict().items()}
    weights.pop("lm_head.weight", None)  # tied to the embedding
    write_atomically(folder / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
    config = model.config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    config |= {"max_position_embeddings": model.config.max_position_embeddings, "hidden_act": "silu"}
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where transformers 4 looks for it
    story = {
        "steps": state["step"],
        "bytes": state["bytes"],
        "minutes": round(state["seconds"] / 60, 1),
        "device": machine(model.device),
        "stages_left": state["left"],
        "looks": state["log"],
    }
    files = {
        "training.json": story,
        "config.json": config,
        "generation_config.json": {"do_sample": False, "eos_token_id": END, "pad_token_id": END},
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|end|>",
            "pad_token": "<|end|>",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        text = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=name == "config.json") + "\n"
        write_atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    model = build(options.heads, options.key_value_heads).to(options.device)
    optimizers = optimizers_of(model, options.rate, STAGES[0].muon)
    state = {
        "step": 0,
        "warm_from": 0,
        "stage": 0,
        "stage_seconds": 0.0,
        "seconds": 0.0,
        "bytes": 0,
        "best": -1e9,
    }
    state |= {"left": [], "log": []}  # when each stage was left, and what each look found
    checkpoint = options.work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=options.device, weights_only=True)
        model.load_state_dict(saved["model"])
        state = saved["state"]
        optimizers = optimizers_of(model, options.rate, STAGES[state["stage"]].muon)
        for optimizer, parts in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(parts)
        print("resumed at step", state["step"], flush=True)
    corpus = Corpus(options.work)
    stopping: list[int] = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, _: stopping.append(number))

    def save() -> None:
        parts = {
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "state": state,
        }
        write_atomically(checkpoint, lambda path: torch.save(parts, path))

    def look() -> None:
        lengths = sorted({stage.length for stage in STAGES[: state["stage"] + 2]})
        found = progress(model, options.work, lengths)
        entry = {key: state[key] for key in ("step", "stage")} | {"minutes": state["seconds"] / 60, **found}
        state["log"].append(entry)
        print({key: round(value, 3) for key, value in entry.items()}, flush=True)
        good = found.get("recall 1024", 0.0) >= 0.9 and merit(found) > state["best"]
        if good:
            state["best"] = merit(found)
            export(model, options.export_to, state)
            print("exported", flush=True)
        save()

    clock = looked = checked = time.time()
    running = {"loss": 0.0, "steps": 0}
    while state["seconds"] < 60 * options.minutes and not stopping:
        stage = STAGES[state["stage"]]
        rate = rate_at(state, options)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = rate
        tokens, weights = batch(stage, corpus, options.seed * 10_000_000 + state["step"])
        loss = loss_of(model, tokens.to(options.device), weights.to(options.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        running["loss"] += loss.item()
        running["steps"] += 1
        state["step"] += 1
        state["bytes"] += tokens.numel()
        now = time.time()
        state["seconds"] += now - clock
        state["stage_seconds"] += now - clock
        clock = now
        if now - checked > 60:
            model.eval()
            right, total = recall_score(model, stage.length, max(2, 4096 // stage.length))
            model.train()
            mean = running["loss"] / running["steps"]
            pace = running["steps"] / (now - checked)
            print(
                f"step {state['step']} {state['seconds'] / 60:.1f} min, {pace:.2f} steps/s, rate {rate:.5f}, "
                f"loss {mean:.3f}, recall {stage.length}: {right / total:.3f}",
                flush=True,
            )
            running = {"loss": 0.0, "steps": 0}
            if right / total >= stage.enough or state["stage_seconds"] > 60 * stage.minutes:
                reached = {"length": stage.length, "step": state["step"], "minutes": state["seconds"] / 60}
                state["left"].append(reached | {"recall": right / total})
                state["stage"] += 1
                state["stage_seconds"] = 0.0
                if STAGES[state["stage"]].muon != stage.muon:
                    optimizers = optimizers_of(model, options.rate, STAGES[state["stage"]].muon)
                    state["warm_from"] = state["step"]
                print("stage", state["stage"], STAGES[state["stage"]].length, flush=True)
            checked = time.time()
        if now - looked > 60 * options.look:
            look()
            looked = checked = time.time()
    if stopping:
        save()
    else:
        look()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=100, help="training time over all runs")
    parser.add_argument("--decay", type=float, default=0.35, help="share of the time in which the rate falls")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--key-value-heads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--look", type=float, default=4, help="minutes between looks at all lengths")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--export-to", type=Path, default=HERE.parent / "src/tilewise/models/bundled")
    parser.add_argument(
        "--export", action="store_true", help="only write the model folder from the checkpoint"
    )
    options = parser.parse_args()
    if options.export:
        saved = torch.load(options.work / "checkpoint.pt", map_location="cpu", weights_only=True)
        model = build(options.heads, options.key_value_heads)
        model.load_state_dict(saved["model"])
        export(model, options.export_to, saved["state"])
    else:
        train(options)


if __name__ == "__main__":
    main()
