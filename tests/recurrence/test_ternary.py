"""MatMul-free models: ternary layers in two bits, the recurrence of channels, and what a small model learns with
them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.recurrence import decays
from tilewise.recurrence import (
    MLGRU,
    BitLinear,
    ModelConfig,
    PackedBitLinear,
    matmul_free,
    packed,
)
from tilewise.recurrence.ternary import to_eight_bits, to_ternary


def layer(inputs: int = 37, outputs: int = 11, seed: int = 0) -> BitLinear:
    torch.manual_seed(seed)
    made = BitLinear(inputs, outputs)
    nn.init.uniform_(made.norm.weight, 0.5, 1.5)
    return made


def additions(made: BitLinear, x: Tensor) -> Tensor:
    """The layer written out: for every output, the chosen inputs added and the others taken away."""
    levels, scale = to_eight_bits(made.norm(x))
    weights, common = to_ternary(made.weight)
    columns = [levels[..., row > 0].sum(-1) - levels[..., row < 0].sum(-1) for row in weights]
    return torch.stack(columns, -1) * (scale * common) + made.bias


class Products(TorchDispatchMode):
    """Notes the dtypes of every product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(word in name for word in ("mm", "matmul", "einsum", "linear", "mv", "dot", "conv")):
            self.seen.append((name, next(a.dtype for a in args if isinstance(a, Tensor))))
        return func(*args, **kwargs or {})


def products(model: nn.Module, *given) -> list[tuple[str, torch.dtype]]:
    with torch.no_grad(), Products() as noted:
        model(*given)
    return noted.seen


@pytest.mark.parametrize("inputs", [1, 3, 4, 37, 256])
def test_packed_layers_are_sums_of_chosen_inputs(inputs):
    made, x = layer(inputs), torch.randn(2, 5, inputs)
    small = PackedBitLinear(made)
    assert small.codes.shape == (11, -(-inputs // 4)) and small.codes.dtype == torch.uint8
    torch.testing.assert_close(small(x), additions(made, x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made(x), additions(made, x), rtol=1e-5, atol=1e-5)
    for fewer in (x[:1, :1], x[:, :0]):  # a single token, and none
        torch.testing.assert_close(small(fewer), additions(made, fewer), rtol=1e-6, atol=1e-6)
    assert set(small.weights().unique().tolist()) <= {-1, 0, 1}
    assert torch.equal(small.weights().float(), to_ternary(made.weight)[0])


def test_rounding_is_as_published():
    """Weights by their mean magnitude, each token by its largest; zeros stay zeros."""
    weights, scale = to_ternary(torch.tensor([[0.2, -0.9, 3.0, 0.0]]))
    assert weights.tolist() == [[0.0, -1.0, 1.0, 0.0]] and scale.item() == pytest.approx(1.025)
    levels, scale = to_eight_bits(torch.tensor([[1.0, -2.0, 0.004], [0.0, 0.0, 0.0]]))
    assert levels.tolist() == [[64.0, -127.0, 0.0], [0.0, 0.0, 0.0]]
    assert scale[0].item() == pytest.approx(2 / 127)


def test_gradients_pass_the_rounding():
    """They are those of a linear layer with the rounded weights and inputs."""
    made, x = layer(), torch.randn(4, 37, requires_grad=True)
    weights = torch.randn(4, 11)
    (made(x) * weights).sum().backward()
    levels, scale = to_eight_bits(made.norm(x))
    torch.testing.assert_close(made.weight.grad, weights.T @ (levels * scale))
    rounded, common = to_ternary(made.weight)
    want = torch.autograd.grad(made.norm(x), x, weights @ (rounded * common))[0]
    torch.testing.assert_close(x.grad, want)


def test_packing_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="no BitLinear in the model"):
        packed(nn.Linear(3, 3))
    assert isinstance(packed(layer()), PackedBitLinear)
    with pytest.raises(ValueError, match="linear must be one of 'dense', 'ternary', got 'four'"):
        MLGRU(8, linear="four")
    with pytest.raises(ValueError, match="linear must be one of 'dense', 'ternary', got 'four'"):
        ModelConfig(8, 8, ("mlgru",), linear="four")
    with pytest.raises(ValueError, match="cannot share the embedding's weights: give tied=False"):
        ModelConfig(8, 8, ("mlgru",), linear="ternary")
    with pytest.raises(ValueError, match="layers must be an integer >= 1, got 0"):
        matmul_free(8, 8, layers=0)


@pytest.mark.evidence
def test_the_mixer_is_its_recurrence():
    """Step by step as the paper has it, in float64; a gate that does not keep is another function."""
    torch.manual_seed(0)
    made, x = MLGRU(16, expand=2).double(), torch.randn(2, 40, 16, dtype=torch.float64)
    hidden, rows, forgetful = torch.zeros(2, 32, dtype=torch.float64), [], []
    for t in range(40):
        token = x[:, t]
        forget = made.forget(token).sigmoid()
        new = (1 - forget) * F.silu(made.candidate(token))
        hidden = forget * hidden + new
        gate = made.gate(token).sigmoid()
        rows.append(made.out(gate * hidden))
        forgetful.append(made.out(gate * new))
    torch.testing.assert_close(made(x)[0], torch.stack(rows, 1), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(made(x)[0], torch.stack(forgetful, 1), rtol=0.1)


@pytest.mark.evidence
def test_inference_without_products_of_floating_matrices():
    """The trained model in two bits: integers only, a quarter and less of the bytes of float16, the same
    predictions.

    The control counts: the same model of ordinary layers, and this one before packing, do multiply floats.
    """
    model, dense = decays.load("matmul-free"), decays.load("matmul-free-dense")
    small, tokens = packed(model), decays.text(held_out=True)[:257].unsqueeze(0)
    assert {name for name, dtype in products(small, tokens)} == {"_int_mm"}
    assert {dtype for name, dtype in products(small, tokens)} == {torch.int8}
    for control in (model, dense):
        assert torch.float32 in {dtype for name, dtype in products(control, tokens)}
    weights = sum(part.weight.numel() for part in model.modules() if isinstance(part, BitLinear))
    bits = sum(8 * part.codes.numel() for part in small.modules() if isinstance(part, PackedBitLinear))
    assert bits <= 2.01 * weights
    with torch.no_grad():
        want, got = (each(tokens)[0].log_softmax(-1) for each in (model, small))
    divergence = (want.exp() * (want - got)).sum(-1).mean().item()
    assert divergence < 1e-3, divergence


@pytest.mark.evidence
def test_a_small_ternary_model_learns_text():
    """Bits per byte of text it has not seen: near the same model of ordinary layers, far from one rounded
    afterwards.

    Both have the same recipe of training. Rounding the ordinary model's weights the same way is the control.
    """
    ternary, dense = decays.load("matmul-free"), decays.load("matmul-free-dense")
    rounded = decays.load("matmul-free-dense")
    with torch.no_grad():
        for part in rounded.modules():
            if isinstance(part, nn.Linear):
                weights, scale = to_ternary(part.weight)
                part.weight.copy_(weights * scale)
    models = {"ternary": ternary, "dense": dense, "rounded": rounded}
    found = {name: decays.bits_per_byte(model) for name, model in models.items()}
    assert found["ternary"] < found["dense"] + 0.35, found
    assert found["rounded"] > found["ternary"] + 1, found
    share = torch.bincount(decays.text(held_out=True), minlength=decays.BYTES).double()
    share = share[share > 0] / share.sum()
    alone = -(share * share.log2()).sum().item()
    assert found["ternary"] < alone - 1.0, f"{found}, bytes by themselves {alone}"
