"""A pretrained model with its attention swapped, its quality on a text, and the model exactly as before."""

import math
from importlib import resources

import torch

import tilewise
from tilewise.attention import MoBA
from tilewise.models import Event, load_model

model, tokenizer = load_model()  # the small bundled model; any directory or hub id works
text = resources.files("tilewise.data").joinpath("sample.txt").read_text(encoding="utf-8")
tokens = tokenizer(text[:2048], return_tensors="pt")["input_ids"]


@torch.no_grad()
def bits_per_token() -> float:
    return model(tokens, labels=tokens).loss.item() / math.log(2)


densities: list[float] = []


def watch(event: Event) -> None:
    densities.append(event.plan.density)


before = bits_per_token()
print(f"{'dense':<24} {before:.4f} bits per token")
for method in ("sink-window", MoBA(block=64, top_k=4), "xattention"):
    densities.clear()
    with tilewise.patch(model, method, observer=watch):
        inside = bits_per_token()
    density = sum(densities) / len(densities)
    print(f"{method!s:<24} {inside:.4f} bits per token at {density:.0%} of the tiles")

# Prompts and single tokens are different work: their methods are chosen apart, and so are layers.
with tilewise.patch(model, {4: "xattention", 5: "xattention"}, decode="dense"):
    continued = model.generate(tokens[:, :512], max_new_tokens=24, do_sample=False)
print(f"it goes on: {tokenizer.decode(continued[0, 512:])!r}")

print("bit for bit as before:", bits_per_token() == before)
