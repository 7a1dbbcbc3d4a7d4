"""Train the gates that come with the bundled model, whose weights stay as they are: minutes on one CPU thread.

    python training/train_gates.py            # begins, or resumes
    python training/train_gates.py --only dhsa chunk-llm
    python training/train_gates.py --measure  # measures the bundled gates again, without training

Nothing is downloaded: gates learn from a part of the bundled sample that neither `tilewise compare` nor
benchmarks/selection.py reads on, SeerAttention's also from generated dictionaries (`tilewise.data.tasks`), and are
measured on the last quarter and on other dictionaries. What a layer's attention does is worked out once per text;
the training itself takes seconds to minutes. At the end of each it writes the gates into the package and a part of
`gates_results.json` beside this file.
"""

import argparse
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tilewise
from tilewise.attention import Antidiagonal, MeanPool, Own, RandomTiles, Tiles, TopK, TrueMass
from tilewise.attention.gates import (
    BlockGate,
    BlockLoss,
    BoundaryLoss,
    BoundaryPredictor,
    ChunkAdapters,
    Fit,
    Gates,
    TrueMax,
    block_lesson,
    boundary_lesson,
    chunk_lesson,
    chunk_loss,
)
from tilewise.attention.recipes.dhsa import DHSA
from tilewise.attention.recipes.sla import SLA
from tilewise.attention.recipes.spt import SPT
from tilewise.data.tasks import recall
from tilewise.models import bundled_gates, capture, gated, load_gates, load_model, save_gates

HERE = Path(__file__).parent
RESULTS = HERE / "gates_results.json"
LENGTH, TILE, WIDTH = 2048, 64, 32
START, CUT = (
    32_768,
    96_000,
)  # bytes of the sample that may be learnt from: compare reads before, measures are after
TEXTS, DICTIONARIES = 31, 16
HELD_OUT = (2, 4, 8)  # tiles per row in the measurements of SeerAttention


class Kind(NamedTuple):
    """How gates of one kind are made and trained; without steps they are solved for, text by text."""

    new: Callable[..., torch.nn.Module]
    lesson: Callable[..., Any] | None = None
    loss: Any = None
    steps: int = 0
    rate: float = 1e-2
    dictionaries: int = 0


def sample() -> bytes:
    return resources.files("tilewise.data").joinpath("sample.txt").read_bytes()


def texts(dictionaries: int) -> list[bytes]:
    """The texts of the lessons: pieces of the sample, evenly spread, then dictionaries."""
    starts = [START + number * (CUT - LENGTH - START) // (TEXTS - 1) for number in range(TEXTS)]
    made = [recall(LENGTH, 200 + number).text[:LENGTH] for number in range(dictionaries)]
    return [sample()[start : start + LENGTH] for start in starts] + made


def held_out() -> dict[str, list[bytes]]:
    """Texts that no lesson was made of."""
    starts = range(CUT, len(sample()) - LENGTH, 7000)
    return {
        "text": [sample()[start : start + LENGTH] for start in starts],
        "dictionaries": [recall(LENGTH, seed).text[:LENGTH] for seed in (7, 8)],
    }


def clauses(text: torch.Tensor) -> torch.Tensor:
    """Bytes after which a clause is over: the end of a line, and a space behind a point or a comma."""
    before = torch.cat([text[:1], text[:-1]])
    return (text == 10) | ((text == 32) & torch.isin(before, torch.tensor(list(b".,;:!?)"))))


def kinds(model: Any) -> dict[str, Kind]:
    config = model.config
    base = config.rope_parameters["rope_theta"]
    sizes = (config.head_dim, config.num_attention_heads, config.num_key_value_heads)
    block = lambda seed: BlockGate(*sizes, WIDTH, base, seed=seed)  # noqa: E731
    boundary = lambda seed: BoundaryPredictor(*sizes, rotary=base, seed=seed)  # noqa: E731
    chunk = lambda seed: ChunkAdapters(*sizes, hidden=16, rotary=base, seed=seed)  # noqa: E731
    return {
        "seer-attention": Kind(
            block,
            lambda gate, q, k, _: block_lesson(gate, q, k, tile=TILE),
            BlockLoss(),
            3000,
            1e-2,
            DICTIONARIES,
        ),
        "dhsa": Kind(boundary, lambda gate, q, k, _: boundary_lesson(gate, q, k), BoundaryLoss(), 600, 5e-3),
        "chunk-llm": Kind(
            chunk, lambda gate, q, k, text: chunk_lesson(gate, q, k, clauses(text)), chunk_loss, 600, 3e-3
        ),
        "sla": Kind(lambda seed: SLA(config.head_dim)),
        "spt": Kind(lambda seed: SPT(config.head_dim)),
    }


def new_gates(model: Any, kind: Kind) -> Gates:
    torch.manual_seed(0)
    return Gates({layer: kind.new(layer) for layer in range(model.config.num_hidden_layers)})


def train(model: Any, name: str, kind: Kind, work: Path) -> dict[str, Any]:
    """Gates of one kind into the package; what there is to tell of the training."""
    gates = new_gates(model, kind)
    if kind.lesson is None:
        solve(model, gates)
        story: dict[str, Any] = {"texts": TEXTS}
    else:
        lessons = []
        for data in texts(kind.dictionaries):
            text = torch.tensor(list(data))
            seen = capture(model, text)
            lessons.append(
                {layer: kind.lesson(gates[layer], q, k, text) for layer, (q, k, _) in seen.items()}
            )
            print(f"{name}: lesson {len(lessons)}", flush=True)
        training, state = (
            Fit(gates, lessons, kind.loss, steps=kind.steps, rate=kind.rate),
            work / f"{name}.pt",
        )
        if state.is_file():
            training.load_state_dict(torch.load(state))
        for until in range(100, kind.steps + 1, 100):
            losses = training.run(until)
            torch.save(training.state_dict(), state)
            print(f"{name}: step {len(losses)}: {sum(losses[-100:]) / 100:.4f} nats", flush=True)
        curve = [round(sum(losses[i : i + 100]) / 100, 4) for i in range(0, len(losses), 100)]
        story = {"steps": kind.steps, "texts": len(lessons), "loss": curve}
    path = bundled_gates(name)
    save_gates(gates, path)
    path.chmod(0o644)  # safetensors leaves files to their owner alone
    return story | {"bytes": path.stat().st_size, "torch": torch.__version__}


@torch.no_grad()
def solve(model: Any, gates: Gates) -> None:
    """Least squares for SLA's projections, k-means for SPT's codebooks."""
    seen = [capture(model, torch.tensor(list(data))) for data in texts(0)]
    for layer, gate in gates.items():
        calls = [one[layer] for one in seen]
        if isinstance(gate, SLA):
            gate.fit(calls, mask="causal")
        else:
            gate.fit(*(torch.cat([call[part] for call in calls]) for part in (0, 1)))


def divergence(model: Any, data: list[bytes], settings: dict[str, Any]) -> dict[str, float]:
    """How far each setting moves the model's next-byte distribution from the dense one, nats, mean over texts."""

    def logits(text: bytes, setting: Any) -> torch.Tensor:
        with tilewise.patch(model, setting, check=False):
            ids = torch.tensor(list(text)).unsqueeze(0)
            return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)

    dense, row = [logits(text, "dense") for text in data], {}
    for name, setting in settings.items():
        lost = [(x.exp() * (x - logits(text, setting))).sum(-1).mean() for x, text in zip(dense, data)]
        row[name] = round(float(torch.stack(lost).mean()), 4)
    return row


@torch.no_grad()
def measure(model: Any, name: str, kind: Kind) -> dict[str, Any]:
    """What the trained gates are worth on text that was not learnt from, beside their controls."""
    trained, untrained = load_gates(bundled_gates(name), model=model), new_gates(model, kind)
    if name != "seer-attention":
        more = {"dhsa": {"budget": 256}, "chunk-llm": {"top_k": 6}}.get(name, {})
        settings: dict[str, Any] = {"trained": gated(trained, **more), "untrained": gated(untrained, **more)}
        if name == "dhsa":
            settings["even chunks"] = DHSA(None, **more)
        if name == "chunk-llm":  # the same chunks, chosen by weights drawn at random
            weights = {
                name: x for name, x in trained.state_dict().items() if not name.endswith((".query", ".key"))
            }
            untrained.load_state_dict(weights, strict=False)
            settings["trained ends only"] = gated(untrained, **more)
            del settings["untrained"]
        return {"settings": more, "divergence_nats": divergence(model, held_out()["text"], settings)}
    scores = {
        "random tiles": RandomTiles(),
        "pooled means": MeanPool(),
        "antidiagonals, stride 8": Antidiagonal(8),
        "antidiagonals, stride 4": Antidiagonal(4),
        "true largest weight": TrueMax(),
        "true mass": TrueMass(),
    }
    out: dict[str, Any] = {}
    for about, data in held_out().items():
        for count in HELD_OUT:
            settings = {
                name: Tiles(score, TopK(count), (TILE, TILE), always=(Own(),))
                for name, score in scores.items()
            }
            for which, made in (("untrained gates", untrained), ("trained gates", trained)):
                settings[which] = gated(made, top_k=count, tile=TILE)
            out.setdefault(about, {})[f"{count} tiles per row"] = divergence(model, data, settings)
    return {"divergence_nats": out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "gates", help="where the state is kept")
    parser.add_argument("--only", nargs="+", help="only these")
    parser.add_argument("--measure", action="store_true", help="measure the bundled gates, do not train")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = load_model()
    options.work.mkdir(parents=True, exist_ok=True)
    story = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name, kind in kinds(model).items():
        if options.only is not None and name not in options.only:
            continue
        if not options.measure:
            story[name] = train(model, name, kind, options.work)
        story[name] = story.get(name, {}) | measure(model, name, kind)
        print(name, json.dumps(story[name]), flush=True)
        RESULTS.write_text(json.dumps(story, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
