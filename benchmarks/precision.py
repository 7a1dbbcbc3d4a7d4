"""What rounding costs on the bundled model: error of attention by setting, and of the model by layers in 8 bits."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from importlib import resources

import harness
import torch

import tilewise
from tilewise import doctor
from tilewise.attention import SageAttention2, accuracy, adaptive, attend, output_quality
from tilewise.models import bundled_model, capture, load_model, logit_quality

TOKENS = 1024
OUTLIER = 15.0  # added to every 16th channel of queries and keys


def settings() -> dict[str, SageAttention2]:
    """What is compared, by the words of the table."""
    named = {"int8": SageAttention2()}
    for words, q, k in (
        ("unsmoothed", False, False),
        ("keys smoothed", False, True),
        ("queries smoothed", True, False),
    ):
        named[f"int4, {words}"] = SageAttention2("int4", smooth_q=q, smooth_k=k)
    for group in ("token", "thread", "warp", "block", "tensor"):
        named[f"int4, both smoothed, a scale a {group}"] = SageAttention2("int4", smooth_q=True, group=group)
    named["int4, E4M3 weights and values, queries and keys smoothed"] = SageAttention2(
        "int4", "fp8", smooth_q=True
    )
    named["int8, E4M3 weights and values, queries and keys smoothed"] = SageAttention2(
        "int8", "fp8", smooth_q=True
    )
    return named


def errors(method: SageAttention2, layers) -> dict[str, float]:
    """The worst cosine similarity and the mean relative L1 distance over layers."""
    measured = []
    for q, k, v in layers:
        measured.append(accuracy(attend(q, k, v, method, mask="causal"), attend(q, k, v, mask="causal")))
    return {"cosine": min(m[0] for m in measured), "l1": sum(m[1] for m in measured) / len(measured)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="128 tokens; nothing is kept")
    quick = parser.parse_args().quick
    model, tokenizer = load_model(bundled_model())
    text = resources.files("tilewise.data").joinpath("sample.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text[:6000])["input_ids"])[: 128 if quick else TOKENS]
    layers = capture(model, tokens)
    outliers = torch.zeros(layers[0][0].shape[3])
    outliers[::16] = OUTLIER
    shifted = [(q + outliers, k + outliers, v) for q, k, v in layers.values()]
    rows = []
    for name, method in settings().items():
        row = {
            "setting": name,
            **errors(method, layers.values()),
            "l1_outliers": errors(method, shifted)["l1"],
        }
        rows.append(row)
        print(f"{name:<64}{row['cosine']:.4f} {row['l1']:.4f} {row['l1_outliers']:.4f}", flush=True)

    low, high = SageAttention2("int4"), SageAttention2("int8")
    mixed = {
        "int4": low,
        "half in int8, by each layer's output (the paper)": adaptive(
            output_quality(layers, low), low=low, high=high
        ),
        "half in int8, by the model's answer": adaptive(
            logit_quality(model, tokens, low), low=low, high=high
        ),
        "int8": high,
    }
    ids, models = tokens.view(1, -1), []
    with torch.no_grad():
        exact = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        for name, setting in mixed.items():
            with tilewise.patch(model, setting):
                out = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            kl = float((exact.exp() * (exact - out)).sum(-1).mean())
            chosen = (
                "" if not isinstance(setting, dict) else str([i for i, m in setting.items() if m is high])
            )
            models.append({"setting": name, "layers": chosen, "kl": kl})
            print(f"{name:<64}{chosen:<12}{kl:.2e}", flush=True)
    if not quick:
        path = harness.RESULTS / "precision.json"
        result = {
            "benchmark": "precision",
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": doctor.facts(),
            "tokens": TOKENS,
            "rows": rows,
            "models": models,
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
