"""Measure the bundled model: bits per byte on held-out text, dictionary recall, pass keys, copying.

    python training/evaluate.py [--model src/tilewise/models/bundled] [--device cpu] [--quick]

Writes training/results.json and the tables of training/README.md.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from tilewise.data.tasks import Example, copying, far, passkey, recall

HERE = Path(__file__).parent
END = 256  # the token after a document
HELD_OUT_SEED = 1_000_000_000  # training uses smaller seeds
MARKS = ("<!-- results: written by evaluate.py -->", "<!-- end of results -->")


def documents(work: Path, source: str | None = None) -> list[bytes]:
    """The held-out documents, of one source or of all, in a fixed order."""
    return [path.read_bytes() for path in sorted((work / "held_out").glob(f"{source or '*'}/*"))]


@torch.inference_mode()
def is_right(model, examples: Sequence[Example]) -> list[list[bool]]:
    """For each example (all of one length) and each of its spans: was every byte of it predicted?"""
    device = next(model.parameters()).device
    tokens = torch.tensor([list(example.text) for example in examples], device=device)
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    hits = model.lm_head(hidden)[:, :-1].argmax(-1) == tokens[:, 1:]  # hits[i, t]: byte t + 1 was predicted
    hits = hits.cpu()
    return [
        [bool(hits[row, start - 1 : end - 1].all()) for start, end in example.spans]
        for row, example in enumerate(examples)
    ]


def _batches(items: Iterable, size: int) -> Iterable[list]:
    batch: list = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def score(model, examples: Sequence[Example], spans: Sequence[Sequence[tuple[int, int]]]) -> tuple[int, int]:
    """How many of the chosen spans are right, and how many there are."""
    right = total = 0
    size = max(1, 32_768 // len(examples[0].text))
    for batch, chosen in zip(_batches(examples, size), _batches(spans, size), strict=True):
        for example, hits, wanted in zip(batch, is_right(model, batch), chosen, strict=True):
            found = dict(zip(example.spans, hits, strict=True))
            right += sum(found[span] for span in wanted)
            total += len(wanted)
    return right, total


def recall_score(model, length: int, sequences: int, fraction: float = 0.25) -> tuple[int, int]:
    """Dictionary recall, counting only answers told at least `fraction` of the length before."""
    examples = [recall(length, HELD_OUT_SEED + number) for number in range(sequences)]
    return score(model, examples, [far(example, fraction) for example in examples])


def passkey_score(model, length: int, depth: float | None, sequences: int, filler: bytes) -> tuple[int, int]:
    seed = HELD_OUT_SEED + round(1000 * (depth or 0))
    examples = [passkey(length, seed + 5000 * number, depth, filler=filler) for number in range(sequences)]
    return score(model, examples, [example.spans for example in examples])


def copying_score(model, length: int, sequences: int) -> tuple[int, int]:
    examples = [copying(length, HELD_OUT_SEED + number) for number in range(sequences)]
    return score(model, examples, [example.spans for example in examples])


@torch.inference_mode()
def bits_per_byte(model, text: bytes, context: int) -> float:
    """Mean bits per byte over consecutive windows; each but its first byte is predicted from its window alone."""
    device = next(model.parameters()).device
    count = len(text) // context
    if not count:
        raise ValueError(f"text has {len(text)} bytes; a window needs {context}")
    windows = torch.tensor(list(text[: count * context])).view(count, context)
    nats = 0.0
    for batch in windows.split(max(1, 32_768 // context)):
        tokens = batch.to(device)
        logits = model.lm_head(model.model(input_ids=tokens, use_cache=False).last_hidden_state)[
            :, :-1
        ].float()
        nats += F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
    return nats / (count * (context - 1)) / math.log(2)


def interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.96
    share, square = right / total, z * z / total
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def _share(counts: tuple[int, int]) -> dict:
    right, total = counts
    low, high = interval(right, total)
    return {"accuracy": right / total, "low": low, "high": high, "right": right, "n": total}


def measure(model, work: Path, quick: bool = False) -> dict:
    """Everything training/README.md tells about the model."""
    filler = b"\n".join(documents(work))
    many = 1 if quick else 4
    most = 32_768 if quick else 131_072  # bytes of text of each source
    results: dict = {"recall": {}, "passkey": {}, "copying": {}, "bits_per_byte": {}}
    for length in (256, 1024, 2048, 4096, 8192):
        results["recall"][str(length)] = _share(recall_score(model, length, max(2, many * 8192 // length)))
        print("recall", length, results["recall"][str(length)], flush=True)
    for length in (1024, 2048, 4096, 8192):
        by_depth = {}
        passkeys = 2 if quick else 5 if length > 4096 else 10
        for step in range(0, 11, 5 if quick else 1):
            depth = step / 10
            by_depth[str(depth)] = _share(passkey_score(model, length, depth, passkeys, filler))
        counts = [sum(entry[key] for entry in by_depth.values()) for key in ("right", "n")]
        results["passkey"][str(length)] = {"all": _share((counts[0], counts[1])), "depth": by_depth}
        print("passkey", length, results["passkey"][str(length)]["all"], flush=True)
        results["copying"][str(length)] = _share(copying_score(model, length, 2 * passkeys))
        print("copying", length, results["copying"][str(length)], flush=True)
    for path in sorted((work / "held_out").iterdir()):
        text = b"\n".join(documents(work, path.name))[:most]
        entry = {str(context): bits_per_byte(model, text, context) for context in (1024, 8192)}
        results["bits_per_byte"][path.name] = {"bytes": len(text), **entry}
        print("bits per byte", path.name, entry, flush=True)
    sources = results["bits_per_byte"].values()
    every = sum(entry["bytes"] for entry in sources)
    results["bits_per_byte"]["all"] = {"bytes": every} | {
        context: sum(entry["bytes"] * entry[context] for entry in sources) / every
        for context in ("1024", "8192")
    }
    return results


def tables(results: dict) -> str:
    """The figures of training/README.md, as Markdown."""
    corpus, training = results["corpus"], results["training"]
    recalls, copies, keys = results["recall"], results["copying"], results["passkey"]

    def percent(entry: dict) -> str:
        return f"{100 * entry['accuracy']:.1f}"

    def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
        line = ["---" if name in ("source", "licence") else "---:" for name in head]
        return ["", *(f"| {' | '.join(row)} |" for row in (head, line, *rows)), ""]

    lines = [
        f"{results['parameters']:,} parameters, trained for {training['steps']:,} steps: "
        f"{training['bytes'] / 1e6:.1f} million bytes,",
        f"{training['minutes']:.0f} minutes on {training['device']}. Measured in float32 "
        "on the weights as bundled.",
        "",
        "### Text",
    ]
    bits = results["bits_per_byte"]
    lines += table(
        ("source", "licence", "training bytes", "held-out bytes", "bits per byte at 1,024", "at 8,192"),
        [
            (
                entry["title"],
                entry["licence"],
                f"{entry['train_bytes']:,}",
                f"{entry['held_out_bytes']:,}",
                f"{bits[name]['1024']:.3f}",
                f"{bits[name]['8192']:.3f}",
            )
            for name, entry in corpus.items()
        ]
        + [
            (
                "all",
                "",
                f"{sum(entry['train_bytes'] for entry in corpus.values()):,}",
                f"{sum(entry['held_out_bytes'] for entry in corpus.values()):,}",
                f"{bits['all']['1024']:.3f}",
                f"{bits['all']['8192']:.3f}",
            )
        ],
    )
    lines += ["### Dictionary recall, % right, and copying"]
    lines += table(
        ("length", "recall, far answers", "95 % interval", "answers", "blocks copied"),
        [
            (
                f"{int(length):,}",
                percent(entry),
                f"{100 * entry['low']:.1f} to {100 * entry['high']:.1f}",
                f"{entry['n']:,}",
                f"{copies[length]['right']} of {copies[length]['n']}" if length in copies else "",
            )
            for length, entry in recalls.items()
        ],
    )
    lines += ["### Pass keys, % right by depth"]
    depths = list(next(iter(keys.values()))["depth"])
    lines += table(
        ("length", *(f"{float(depth):.1f}" for depth in depths), "all", "95 % interval", "n"),
        [
            (
                f"{int(length):,}",
                *(f"{100 * entry['depth'][depth]['accuracy']:.0f}" for depth in depths),
                percent(entry["all"]),
                f"{100 * entry['all']['low']:.1f} to {100 * entry['all']['high']:.1f}",
                f"{entry['all']['n']}",
            )
            for length, entry in keys.items()
        ],
    )
    return "\n".join(lines).strip() + "\n"


def write_tables(results: dict, readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    readme.write_text(f"{before}{MARKS[0]}\n\n{tables(results)}\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE.parent / "src/tilewise/models/bundled")
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer examples, and nothing is written")
    parser.add_argument("--tables", action="store_true", help="only write README.md anew from results.json")
    options = parser.parse_args()
    stored, readme = HERE / "results.json", HERE / "README.md"
    if options.tables:
        write_tables(json.loads(stored.read_text()), readme)
        return

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(options.device).eval()
    begun = time.time()
    results = measure(model, options.work, options.quick)
    if options.quick:
        return
    results["seconds"] = round(time.time() - begun, 1)
    results["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    results["compute"] = {"dtype": "float32", "device": options.device, "torch": torch.__version__}
    results["corpus"] = json.loads((options.work / "corpus.json").read_text())
    results["training"] = json.loads((options.model / "training.json").read_text())
    stored.write_text(json.dumps(results, indent=2) + "\n")
    write_tables(results, readme)


if __name__ == "__main__":
    main()
