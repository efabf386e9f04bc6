"""The transformer beyond parity: gradients, sizes, types, memory and the training loss."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import blocks
from model import loss as loss_module
from model.errors import ModelError
from model.loss import masked_token_loss
from model.order import halton_ranks
from model.positions import rotary_tables, rotate_complex, rotate_real
from model.schedule import STEP_INDEX, sample_mask
from model.transformer import MaskedImageTransformer, TransformerConfig

MakeTransformer = Callable[..., MaskedImageTransformer]


def some_inputs(
    height: int = 4, width: int = 6, batch: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask, ratio = sample_mask(batch, height, width, generator=generator)
    return {
        "tokens_BHW": torch.randint(0, 32, (batch, height, width), generator=generator),
        "mask_BHW": mask,
        "text_states_BTD": torch.randn(batch, 5, 12, generator=generator).to(dtype),
        "pooled_BP": torch.randn(batch, 10, generator=generator).to(dtype),
        "micro_conditions_B5": 100 * torch.rand(batch, 5, generator=generator),
        "mask_ratio_B": ratio,
    }


def forward(transformer: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Tensor:
    logits = transformer(
        inputs["tokens_BHW"],
        inputs["text_states_BTD"],
        inputs["pooled_BP"],
        inputs["micro_conditions_B5"],
        inputs["mask_ratio_B"],
    )
    return logits.detach()


@pytest.mark.parametrize("compresses", [False, True])
def test_gradients_match_finite_differences(
    make_transformer: MakeTransformer, compresses: bool
) -> None:
    transformer = make_transformer(downsample=compresses, upsample=compresses).double()
    inputs = some_inputs(dtype=torch.float64)
    torch.autograd.backward(masked_token_loss(transformer, **inputs))
    parameters = list(transformer.parameters())
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters)
    step = 1e-5
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = [torch.randn(p.shape, generator=generator).double() for p in parameters]
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                for parameter, change in zip(parameters, direction, strict=True):
                    parameter.add_(change, alpha=sign * step)
                values.append(float(masked_token_loss(transformer, **inputs)))
        numeric = (values[0] - values[1]) / (2 * step)
        analytic = sum(
            float((p.grad * d).sum())
            for p, d in zip(parameters, direction, strict=True)
            if p.grad is not None
        )
        assert math.isclose(numeric, analytic, rel_tol=1e-5, abs_tol=1e-7)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 8), (6, 4), (4, 6)])
@pytest.mark.parametrize("compresses", [False, True])
def test_any_grid(
    make_transformer: MakeTransformer, compresses: bool, height: int, width: int
) -> None:
    transformer = make_transformer(downsample=compresses, upsample=compresses)
    assert forward(transformer, some_inputs(height, width)).shape == (2, 32, height, width)


def test_one_token_grid(make_transformer: MakeTransformer) -> None:
    assert forward(make_transformer(), some_inputs(1, 1)).shape == (2, 32, 1, 1)


def test_rows_and_columns_have_their_own_positions(make_transformer: MakeTransformer) -> None:
    transformer, inputs = make_transformer(), some_inputs(4, 6)
    turned = dict(inputs, tokens_BHW=inputs["tokens_BHW"].transpose(1, 2).contiguous())
    difference = forward(transformer, inputs) - forward(transformer, turned).transpose(2, 3)
    assert float(difference.abs().max()) > 1e-3


def test_odd_grid_needs_no_compression(make_transformer: MakeTransformer) -> None:
    assert forward(make_transformer(), some_inputs(3, 5)).shape == (2, 32, 3, 5)
    with pytest.raises(ModelError, match=r"token grid is 3 x 5: .* multiples of 2"):
        forward(make_transformer(downsample=True, upsample=True), some_inputs(3, 5))


def test_flat_tokens_are_refused(make_transformer: MakeTransformer) -> None:
    inputs = some_inputs()
    with pytest.raises(ModelError, match="expected \\(batch, rows, columns\\)"):
        forward(make_transformer(), dict(inputs, tokens_BHW=inputs["tokens_BHW"].flatten(1)))


def test_one_timestep_serves_all(make_transformer: MakeTransformer) -> None:
    transformer, inputs = make_transformer(), some_inputs()
    one = forward(transformer, dict(inputs, mask_ratio_B=torch.tensor([0.5])))
    each = forward(transformer, dict(inputs, mask_ratio_B=torch.tensor([0.5, 0.5])))
    assert torch.allclose(one, each, atol=1e-6)


def test_samples_of_a_batch_do_not_meet(make_transformer: MakeTransformer) -> None:
    transformer, inputs = make_transformer(), some_inputs(batch=3)
    alone = forward(transformer, {key: value[1:2] for key, value in inputs.items()})
    assert torch.allclose(forward(transformer, inputs)[1:2], alone, atol=1e-5)


def test_masked_logits_are_those_of_the_whole(make_transformer: MakeTransformer) -> None:
    transformer, inputs = make_transformer(), some_inputs()
    whole = forward(transformer, inputs).permute(0, 2, 3, 1)[inputs["mask_BHW"]]
    some = transformer.forward_masked(
        inputs["tokens_BHW"],
        inputs["text_states_BTD"],
        inputs["pooled_BP"],
        inputs["micro_conditions_B5"],
        inputs["mask_ratio_B"],
        inputs["mask_BHW"],
    )
    assert torch.allclose(some, whole, atol=1e-6)


def test_loss_is_cross_entropy_of_masked_tokens_alone(make_transformer: MakeTransformer) -> None:
    transformer, inputs = make_transformer(), some_inputs()
    mask, tokens = inputs["mask_BHW"], inputs["tokens_BHW"]
    seen = torch.where(mask, transformer.config.mask_token_id, tokens)
    log_probs = forward(transformer, dict(inputs, tokens_BHW=seen)).log_softmax(dim=1)
    picked = log_probs.gather(1, tokens[:, None])[:, 0]
    expected = -picked[mask].mean()
    assert torch.allclose(masked_token_loss(transformer, **inputs), expected, atol=1e-5)


def test_the_head_runs_on_masked_tokens_alone(make_transformer: MakeTransformer) -> None:
    transformer, inputs = make_transformer(), some_inputs()
    rows = []
    transformer.mlm_layer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    loss = masked_token_loss(transformer, **inputs)
    places = inputs["mask_BHW"].flatten().nonzero()[:, 0]
    assert torch.equal(masked_token_loss(transformer, **inputs, masked_N=places), loss)
    assert rows == [len(places)] * 2
    assert 0 < len(places) < inputs["mask_BHW"].numel()


def test_loss_in_chunks_is_the_same(
    make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer, inputs = make_transformer(), some_inputs()
    whole = masked_token_loss(transformer, **inputs)
    torch.autograd.backward(whole)
    gradients = [p.grad.clone() for p in transformer.parameters() if p.grad is not None]
    transformer.zero_grad()
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 7 * 4 * 32)
    chunked = masked_token_loss(transformer, **inputs)
    torch.autograd.backward(chunked)
    assert torch.allclose(whole, chunked, atol=1e-6)
    again = [p.grad for p in transformer.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, again, strict=True))


class LargestTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Notes the bytes of the largest float32 tensor that any operation makes."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, Tensor) and part.dtype == torch.float32:
                self.num_bytes = max(self.num_bytes, part.numel() * part.element_size())
        return result


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_float32_logits_of_a_whole_image_never_exist(
    make_transformer: MakeTransformer, weights: torch.dtype
) -> None:
    """4096 masked tokens and 8192 codes are 128 MB in float32; half of that is the bound."""
    transformer = make_transformer(
        downsample=True, upsample=True, vocab_size=8256, codebook_size=8192
    ).to(weights)
    inputs = some_inputs(64, 64, batch=1, dtype=weights)
    everything = dict(inputs, mask_BHW=torch.ones_like(inputs["mask_BHW"]))
    with LargestTensors() as largest:  # type: ignore[no-untyped-call]  # torch has no types here
        torch.autograd.backward(masked_token_loss(transformer, **everything))
    assert 32 << 20 <= largest.num_bytes <= 64 << 20
    head = transformer.mlm_layer.conv2.weight.grad
    assert head is not None
    assert bool(head.abs().sum() > 0)


def test_loss_without_masked_tokens_is_zero(make_transformer: MakeTransformer) -> None:
    inputs = some_inputs()
    nothing = dict(inputs, mask_BHW=torch.zeros_like(inputs["mask_BHW"]))
    loss = masked_token_loss(make_transformer(), **nothing)
    torch.autograd.backward(loss)
    assert float(loss.detach()) == 0.0


def test_step_index_convention_reaches_the_loss(make_transformer: MakeTransformer) -> None:
    inputs = some_inputs()
    losses = [
        masked_token_loss(make_transformer(timestep_convention=convention), **inputs).item()
        for convention in ("mask_ratio", STEP_INDEX)
    ]
    assert losses[0] != losses[1]


def test_bf16_autocast_stays_near_float32(make_transformer: MakeTransformer) -> None:
    transformer, inputs = make_transformer(), some_inputs()
    exact = masked_token_loss(transformer, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = masked_token_loss(transformer, **inputs)
    assert rough.dtype == torch.float32
    assert abs(float(rough.detach()) - float(exact.detach())) < 0.05 * float(exact.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_stay_near_float32(
    make_transformer: MakeTransformer, dtype: torch.dtype
) -> None:
    inputs = some_inputs()
    exact = forward(make_transformer(), inputs)
    half = forward(make_transformer().to(dtype), some_inputs(dtype=dtype))
    assert half.dtype == dtype
    assert float((half.float() - exact).abs().mean()) < 0.05 * float(exact.abs().mean())


@pytest.mark.parametrize("index", [0.0, 66.0, 99.0])
def test_float16_takes_every_published_step(
    make_transformer: MakeTransformer, index: float
) -> None:
    """The published code multiplies by 1000 before it widens: from 66 on that is no float16."""
    timestep = {"mask_ratio_B": torch.full((2,), index)}
    exact = forward(make_transformer(), some_inputs() | timestep)
    half = forward(make_transformer().half(), some_inputs(dtype=torch.float16) | timestep)
    assert half.isfinite().all()
    assert float((half.float() - exact).abs().mean()) < 0.05 * float(exact.abs().mean())


def test_gradient_checkpointing_changes_no_gradient(make_transformer: MakeTransformer) -> None:
    results = []
    for checkpoints in (False, True):
        transformer = make_transformer().train()
        transformer.gradient_checkpointing = checkpoints
        torch.autograd.backward(masked_token_loss(transformer, **some_inputs()))
        results.append([p.grad for p in transformer.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def test_fresh_network_knows_nothing_and_learns() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 2, 2),
        vocab_size=40,
        codebook_size=32,
        timestep_convention="mask_ratio",
    )
    transformer, inputs = MaskedImageTransformer(config), some_inputs()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
    losses = []
    for _ in range(50):
        loss = masked_token_loss(transformer, **inputs)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert math.log(32) - 0.3 < losses[0] < math.log(32) + 1.5
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
def test_whole_network_is_one_graph(make_transformer: MakeTransformer) -> None:
    transformer, inputs = make_transformer(downsample=True, upsample=True), some_inputs()
    compiled = torch.compile(transformer, fullgraph=True, backend="eager")
    assert torch.allclose(forward(compiled, inputs), forward(transformer, inputs), atol=1e-6)


def test_position_tables_are_made_once(make_transformer: MakeTransformer) -> None:
    transformer = make_transformer()
    first = transformer._rotary_tables(5, 4, 6, torch.device("cpu"))
    assert transformer._rotary_tables(5, 4, 6, torch.device("cpu")) is first
    assert transformer._rotary_tables(5, 6, 4, torch.device("cpu")) is not first


def test_tables_of_an_inference_serve_training(
    make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "rotate", rotate_real)  # as on a GPU, where the tables are kept
    transformer, inputs = make_transformer(downsample=True, upsample=True), some_inputs()
    with torch.inference_mode():
        forward(transformer, inputs)
        ranks_HW = halton_ranks(5, 7)
    torch.autograd.backward(masked_token_loss(transformer, **inputs))
    kept = [table for tables in transformer._rotary.values() for table in tables]
    assert len(kept) == 2
    assert not any(table.is_inference() for table in (*kept, ranks_HW))


def test_both_ways_of_turning_agree() -> None:
    cos_SF, sin_SF = rotary_tables(3, 2, 4, (4, 6, 6), torch.device("cpu"))
    x_BKSA = torch.randn(2, 11, 3, 16).transpose(1, 2)
    real, complex_ = (turn(x_BKSA, cos_SF, sin_SF) for turn in (rotate_real, rotate_complex))
    assert torch.allclose(real, complex_, atol=1e-6)
    assert torch.allclose(real.norm(dim=-1), x_BKSA.norm(dim=-1), atol=1e-5)
    assert torch.equal(real[:, :, :3], x_BKSA[:, :, :3])  # text sits at the origin


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_embeds": True}, "guidance_embeds is true"),
        ({"downsample": True}, "downsample and upsample differ"),
        ({"axes_dims_rope": (4, 4)}, "expected three even numbers"),
        ({"axes_dims_rope": (4, 4, 4)}, "sums to 12: expected attention_head_dim, 8"),
        ({"vocab_size": 32}, "expected more than codebook_size"),
        ({"timestep_convention": "ratio"}, "timestep_convention is 'ratio'"),
    ],
)
def test_config_that_cannot_work_is_refused(
    make_transformer: MakeTransformer, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        make_transformer(**changes)
