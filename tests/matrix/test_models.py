"""Every backbone with every method, found through the registries: nothing to add for a new one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from models import create_model, fold, list_backbones, list_methods, profile, quantized_layers
from models.methods import METHODS

CLASSES = 10
IMAGE_SIZE = 32
METHOD_CALLS = [
    call
    for name in list_methods()
    for call in (name, *(f"{name}-{short}" for short in METHODS.get(name).short_forms))
]

pytestmark = [
    pytest.mark.parametrize("method", METHOD_CALLS),
    pytest.mark.parametrize("backbone", list_backbones()),
]


def build(backbone: str, method: str, seed: int = 0) -> nn.Module:
    return create_model(backbone, method, num_classes=CLASSES, image_size=IMAGE_SIZE, seed=seed)


def batch(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def test_every_parameter_takes_part_in_the_output(backbone: str, method: str) -> None:
    # In eval mode: batch norm with batch statistics would cancel the biases in front of it.
    model = build(backbone, method).eval()
    logits = model(batch(2))
    assert logits.shape == (2, CLASSES)
    (logits * torch.linspace(-1, 1, CLASSES)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


def test_one_step_of_training_lowers_the_loss_on_its_batch(backbone: str, method: str) -> None:
    model = build(backbone, method)
    images, labels = batch(8), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_a_state_dict_goes_round_and_a_float_checkpoint_loads_strictly(
    backbone: str, method: str
) -> None:
    model, other = build(backbone, method, seed=0), build(backbone, method, seed=1)
    other.load_state_dict(model.state_dict(), strict=True)
    images = batch(2)
    with torch.no_grad():
        assert torch.equal(other.eval()(images), model.eval()(images))
    other.load_state_dict(build(backbone, "float").state_dict(), strict=True)


def test_pickle_deepcopy_and_fold_keep_the_outputs(backbone: str, method: str) -> None:
    model = build(backbone, method)
    model(batch(4))  # moves the running statistics away from their start
    model.eval()
    folded = fold(model)
    assert quantized_layers(folded) == []
    images = batch(3)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)
        assert torch.equal(copy.deepcopy(model)(images), expected)
        assert torch.equal(folded(images), expected)


def test_compiles_without_a_graph_break_forward_and_backward(backbone: str, method: str) -> None:
    torch.compiler.reset()
    eager, other = build(backbone, method), build(backbone, method)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    images, labels = batch(4), torch.arange(4)
    output, expected = compiled(images), eager(images)
    torch.testing.assert_close(output, expected)
    nn.functional.cross_entropy(output, labels).backward()
    nn.functional.cross_entropy(expected, labels).backward()
    for ours, theirs in zip(other.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_bfloat16_autocast_trains_without_nan(backbone: str, method: str) -> None:
    model = build(backbone, method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(batch(4)), torch.arange(4))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == torch.float32, name


def test_channels_last_gives_the_same_logits(backbone: str, method: str) -> None:
    model = build(backbone, method).eval()
    images = batch(3)
    with torch.no_grad():
        expected = model(images)
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        result = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


def test_an_export_from_two_images_takes_any_batch(backbone: str, method: str) -> None:
    model = build(backbone, method).eval()
    batch_size = torch.export.Dim("batch_size")
    program = torch.export.export(model, (batch(2),), dynamic_shapes=({0: batch_size},))
    exported = program.module()
    with torch.no_grad():
        for size in (1, 2, 7):
            torch.testing.assert_close(exported(batch(size)), model(batch(size)))


def test_the_profile_accounts_for_every_parameter(backbone: str, method: str) -> None:
    model = build(backbone, method)
    result = profile(model, IMAGE_SIZE)
    assert result.parameters == sum(p.numel() for p in model.parameters())
    weights = [layer.weight.numel() for _, layer in quantized_layers(model)]
    assert result.quantized_weights == sum(weights)
    assert (result.stored_bytes < result.float32_bytes) == bool(weights)
