"""Train SeerAttention's gates for the bundled model, whose weights stay as they are: minutes on one CPU thread.

    python training/train_gates.py            # begins, or resumes
    python training/train_gates.py --measure  # measures the bundled gates again, without training

Nothing is downloaded: the gates learn from the first three quarters of the bundled sample and from generated
dictionaries (`tilewise.data.tasks`), and are measured on the last quarter and on other dictionaries. What a layer's
attention does is worked out once per text and kept in the work folder; the training itself takes seconds.
At the end it writes the gates into the package and `gates_results.json` beside this file.
"""

import argparse
import json
import os
from importlib import resources
from pathlib import Path

import torch

import tilewise
from tilewise.attention import Antidiagonal, MeanPool, Own, RandomTiles, Tiles, TopK, TrueMass
from tilewise.attention.gates import BlockGate, BlockLoss, Fit, Gates, TrueMax, block_lesson
from tilewise.attention.recipes.seer_attention import SeerAttention
from tilewise.data.tasks import recall
from tilewise.models import bundled_model, capture, load_model
from tilewise.models.gates import load_gates, save_gates

HERE = Path(__file__).parent
WEIGHTS = bundled_model() / "seer.safetensors"
LENGTH, TILE, WIDTH = 2048, 64, 32
STEPS, RATE = 3000, 1e-2
CUT = 96_000  # bytes of the sample that may be learnt from
TEXTS, DICTIONARIES = 41, 16
HELD_OUT = (2, 4, 8)  # tiles per row in the measurements


def sample() -> bytes:
    return resources.files("tilewise.data").joinpath("sample.txt").read_bytes()


def text(number: int) -> bytes:
    """The text of a lesson: pieces of the sample, evenly spread, then dictionaries."""
    if number < TEXTS:
        start = number * (CUT - LENGTH) // (TEXTS - 1)
        return sample()[start : start + LENGTH]
    return recall(LENGTH, 100 + number).text[:LENGTH]


def held_out() -> dict[str, list[bytes]]:
    """Texts that no lesson was made of."""
    starts = range(CUT, len(sample()) - LENGTH, 7000)
    return {
        "text": [sample()[start : start + LENGTH] for start in starts],
        "dictionaries": [recall(LENGTH, seed).text[:LENGTH] for seed in (7, 8)],
    }


def new_gates(model) -> Gates:
    config = model.config
    base = config.rope_parameters["rope_theta"]
    sizes = (config.head_dim, config.num_attention_heads, config.num_key_value_heads, WIDTH, base)
    return Gates({layer: BlockGate(*sizes, seed=layer) for layer in range(config.num_hidden_layers)})


def make_lessons(model, gates: Gates, work: Path) -> list[dict]:
    """Lessons of all texts, from the work folder where they are there."""
    found = []
    for number in range(TEXTS + DICTIONARIES):
        path = work / f"lesson-{number}.pt"
        if not path.is_file():
            seen = capture(model, torch.tensor(list(text(number))))
            made = {
                layer: tuple(block_lesson(gates[layer], q, k, tile=TILE)) for layer, (q, k, _) in seen.items()
            }
            part = path.with_suffix(".part")
            torch.save({layer: [tuple(pooled), *rest] for layer, (pooled, *rest) in made.items()}, part)
            os.replace(part, path)
            print(f"lesson {number + 1} of {TEXTS + DICTIONARIES}", flush=True)
        found.append(_as_lessons(torch.load(path)))
    return found


def _as_lessons(stored: dict) -> dict:
    from tilewise.attention.gates.block_gate import BlockLesson, Pooled

    return {layer: BlockLesson(Pooled(*pooled), *rest) for layer, (pooled, *rest) in stored.items()}


@torch.no_grad()
def measure(model, gates: Gates) -> dict:
    """Divergence of the model's next-byte distribution from the dense one, nats, by score and tiles per row."""
    untrained = new_gates(model)

    def logits(data: bytes, setting) -> torch.Tensor:
        with tilewise.patch(model, setting, check=False):
            ids = torch.tensor(list(data)).unsqueeze(0)
            return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)

    def fixed(score, count: int) -> Tiles:
        return Tiles(score, TopK(count), (TILE, TILE), always=(Own(),))

    scores = {
        "random tiles": RandomTiles(),
        "pooled means": MeanPool(),
        "antidiagonals, stride 8": Antidiagonal(8),
        "antidiagonals, stride 4": Antidiagonal(4),
        "true largest weight": TrueMax(),
        "true mass": TrueMass(),
    }
    out: dict = {}
    for kind, texts in held_out().items():
        dense = [logits(data, "dense") for data in texts]
        for count in HELD_OUT:
            settings: dict = {name: fixed(score, count) for name, score in scores.items()}
            for name, made in (("untrained gates", untrained), ("trained gates", gates)):
                settings[name] = made.methods(SeerAttention, top_k=count, tile=TILE)
            row = {}
            for name, setting in settings.items():
                lost = [
                    (x.exp() * (x - logits(data, setting))).sum(-1).mean() for x, data in zip(dense, texts)
                ]
                row[name] = round(float(torch.stack(lost).mean()), 4)
            out.setdefault(kind, {})[f"{count} tiles per row"] = row
            print(kind, count, row, flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--work", type=Path, default=HERE / ".work" / "gates", help="where lessons and the state are kept"
    )
    parser.add_argument("--measure", action="store_true", help="measure the bundled gates, do not train")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = load_model()
    results = HERE / "gates_results.json"
    story = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    if not options.measure:
        options.work.mkdir(parents=True, exist_ok=True)
        gates = new_gates(model)
        training = Fit(gates, make_lessons(model, gates, options.work), BlockLoss(), steps=STEPS, rate=RATE)
        state = options.work / "state.pt"
        if state.is_file():
            training.load_state_dict(torch.load(state))
        for until in range(100, STEPS + 1, 100):
            losses = training.run(until)
            torch.save(training.state_dict(), state)
            print(f"step {len(losses)}: {sum(losses[-100:]) / 100:.4f} nats", flush=True)
        save_gates(gates, WEIGHTS)
        WEIGHTS.chmod(0o644)  # safetensors leaves files to their owner alone
        curve = [round(sum(losses[i : i + 100]) / 100, 4) for i in range(0, len(losses), 100)]
        story = {"steps": STEPS, "lessons": TEXTS + DICTIONARIES, "torch": torch.__version__, "loss": curve}
    story["divergence_nats"] = measure(model, load_gates(model=model))
    results.write_text(json.dumps(story, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
