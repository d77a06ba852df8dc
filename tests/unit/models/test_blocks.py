from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models import create_model
from models.blocks import BlockNetwork, BlockOrder

NETWORKS = ["lenet5", "vggnet7(width=.25)"]


def trained_norms(backbone: str, *, negative: bool) -> BlockNetwork:
    """Build a network in eval mode whose batch norms are not the identity."""
    model = create_model(backbone, num_classes=10, image_size=32).eval()
    assert isinstance(model, BlockNetwork)
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.startswith("bn") and value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=generator)
    if negative:
        with torch.no_grad():
            model.get_parameter("bn2.weight")[0] *= -1
    return model


@pytest.mark.parametrize("backbone", NETWORKS)
@pytest.mark.parametrize("negative", [False, True])
def test_in_eval_mode_the_orders_differ_only_where_a_norm_has_a_negative_weight(
    backbone: str, negative: bool
) -> None:
    model = trained_norms(backbone, negative=negative)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        first = model(images)
        model.order = "CPBA"
        second = model(images)
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-4) != negative


@pytest.mark.parametrize(
    ("backbone", "with_the_option"),
    [
        ("lenet5", "lenet5(order=CPBA)"),
        ("vggnet7(width=.25)", "vggnet7(width=.25, order=CPBA)"),
    ],
)
def test_a_built_network_can_change_its_order(backbone: str, with_the_option: str) -> None:
    model = create_model(backbone, num_classes=10, image_size=32)
    ordered = create_model(with_the_option, num_classes=10, image_size=32)
    assert isinstance(model, BlockNetwork)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        model.order = "CPBA"
        assert torch.equal(model(images), ordered(images))
    assert not torch.allclose(model(images), before)


@pytest.mark.parametrize("order", ["CBAP", "CPBA"])
def test_a_block_runs_in_the_order_of_its_letters(order: BlockOrder) -> None:
    modules = {"B": nn.BatchNorm2d(1), "A": nn.ReLU(), "P": nn.MaxPool2d(2)}
    called = "C"

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal called
        called += next(letter for letter, known in modules.items() if known is module)

    for module in modules.values():
        module.register_forward_hook(note)
    result = BlockNetwork(order).finish_block(
        torch.rand(2, 1, 4, 4), modules["B"], modules["A"], modules["P"]
    )
    assert called == order
    assert result.shape == (2, 1, 2, 2)


@pytest.mark.parametrize(("backbone", "activations"), [("lenet5", 3), ("vggnet7", 8)])
def test_the_activation_behind_layer_k_is_a_module_of_that_name(
    backbone: str, activations: int
) -> None:
    with torch.device("meta"):
        model = create_model(backbone, num_classes=10, image_size=32)
    rectifiers = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    assert rectifiers == [f"activation{layer}" for layer in range(1, activations + 1)]
