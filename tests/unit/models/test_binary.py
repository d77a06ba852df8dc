from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from models import (
    ModelError,
    after_step,
    apply_method,
    create_model,
    fold,
    latent_regularization,
    profile,
    quantized_layers,
)
from models.activations import QuantizedActivation
from models.backbones.lenet5 import LeNet5
from models.layers import CompressedConv2d, CompressedLinear
from models.surgery import Part

RESNET_ROLES: dict[str, Part] = {"conv1": "stem", "fc": "head", "layer*.downsample.0": "shortcut"}


def lenet5(method: str = "binary", backbone: str = "lenet5(bias=false)") -> LeNet5:
    model = create_model(backbone, method, num_classes=10, in_channels=1, image_size=28)
    assert isinstance(model, LeNet5)
    return model


def digits(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def resnet18(method: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet18(num_classes=5)
    return apply_method(model, method, roles=RESNET_ROLES)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def quantized_weights(model: nn.Module) -> int:
    return sum(layer.weight.numel() for _, layer in quantized_layers(model))


def binarize_as_the_authors(x: Tensor) -> Tensor:
    return ((x + 1) / 2).clamp(0, 1).round() * 2 - 1


def ternarize_as_the_authors(x: Tensor, factor: float) -> Tensor:
    threshold = x.abs().sum() / x.numel() * factor
    x = x.clone()
    x[x > threshold] = 1
    x[x < -threshold] = -1
    x[x.abs() <= threshold] = 0
    return x


# The paper's networks


@pytest.mark.parametrize(
    ("backbone", "method", "total", "quantized"),
    [
        ("lenet5(bias=false)", "binary", 877_536, 876_320),
        ("lenet5(bias=false)", "binary(ternary_weights=all)", 877_536, 876_320),
        ("lenet5", "binary", 878_154, 876_320),
        ("lenet5(bias=false, xnor=true)", "binary", 877_600, 876_320),
        ("lenet5(bias=false)", "binary(first=float, last=float)", 877_536, 870_400),
        ("lenet5(bias=false, width=2)", "binary", 1_851_328, 1_849_920),
        ("vggnet7(bias=false)", "binary", 10_359_680, 10_352_000),
        ("vggnet7", "binary", 10_363_530, 10_352_000),
        # The paper's code gives its float first and last layer a bias of 128 and 10 besides.
        ("vggnet7(bias=false)", "binary(first=float)", 10_359_808 - 128, 10_348_544),
        ("vggnet7(bias=false)", "binary(last=float)", 10_359_690 - 10, 10_341_760),
        ("vggnet7(bias=false, width=2)", "binary", 28_798_720, 28_787_456),
        ("vggnet7(bias=false, width=4)", "binary", 93_103_616, 93_085_184),
        ("vggnet7(bias=false, width=0.5)", "binary", 4_568_512, 4_562_624),
    ],
)
def test_published_parameter_counts(backbone: str, method: str, total: int, quantized: int) -> None:
    channels, size = (1, 28) if backbone.startswith("lenet5") else (3, 32)
    with torch.device("meta"):
        model = create_model(
            backbone, method, num_classes=10, in_channels=channels, image_size=size
        )
    assert parameters(model) == total
    assert quantized_weights(model) == quantized


def test_a_binary_lenet_stores_the_published_bytes() -> None:
    stored = [layer.weight_storage() for _, layer in quantized_layers(lenet5())]
    assert {(form.levels, form.scales) for form in stored} == {(2, 0)}
    assert sum(form.count for form in stored) / 8 == 109_540


@pytest.mark.parametrize(("bits", "weight_bytes"), [("none", 1_294_000), ("all", 2_588_000)])
def test_a_vggnet7_stores_the_published_bytes_and_its_norms(bits: str, weight_bytes: int) -> None:
    with torch.device("meta"):
        model = create_model(
            "vggnet7(bias=false)",
            f"binary(ternary_weights={bits})",
            num_classes=10,
            image_size=32,
        )
    result = profile(model, 32)
    norms = [layer for layer in result.layers if layer.name.startswith("bn")]
    # The authors store four floats for a channel of a norm, of which inference needs two.
    channels = 128 + 128 + 256 + 256 + 512 + 512 + 1024 + 1024 + 10
    assert sum(layer.stored_bytes for layer in norms) == 2 * 4 * channels
    assert result.stored_bytes_in("2-bit" if bits == "all" else "1-bit") == (
        weight_bytes + 2 * 4 * channels
    )


@pytest.mark.parametrize(
    ("method", "weights", "activations", "order", "optimizer"),
    [
        ("binary(original=true)", "0000", "000", "CPBA", "sgd"),
        ("binary(original=true)", "0000", "000", "CPBA", "adam"),
        (
            "binary(original=true, ternary_weights='1001', ternary_activations='101', order=CBAP)",
            "1001",
            "101",
            "CBAP",
            "sgd",
        ),
        (
            "binary(original=true, ternary_weights=all, ternary_activations=all)",
            "1111",
            "111",
            "CPBA",
            "adam",
        ),
    ],
)
def test_six_steps_of_training_equal_the_authors_procedure_bit_for_bit(
    method: str, weights: str, activations: str, order: str, optimizer: str
) -> None:
    ours, reference = lenet5(method), lenet5("float").train()
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=100, momentum=0.99)
        if optimizer == "sgd"
        else torch.optim.Adam(model.parameters(), lr=0.3)
        for model in (ours, reference)
    ]
    clip = after_step(ours)
    for step in range(6):
        images, labels = digits(6, seed=step), torch.arange(6)
        optimizers[0].zero_grad()
        functional.cross_entropy(ours(images), labels).backward()
        optimizers[0].step()
        clip()
        step_as_the_authors(reference, optimizers[1], images, labels, weights, activations, order)
    theirs = reference.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    assert ours.conv2.weight.abs().max() == 1  # the latent weights did reach the bound


def step_as_the_authors(
    net: LeNet5,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    weights: str,
    activations: str,
    order: str,
) -> None:
    """Swap the weights for the used ones, forward, backward, swap back, step, clamp."""

    def quantized(x: Tensor, ternary: str) -> Tensor:
        x = functional.hardtanh(x)
        binary = ternary == "0"
        x.data = (
            binarize_as_the_authors(x.data) if binary else ternarize_as_the_authors(x.data, 0.4)
        )
        return x

    def block(x: Tensor, norm: nn.Module, ternary: str) -> Tensor:
        if order == "CPBA":
            return quantized(norm(functional.max_pool2d(x, 2)), ternary)
        return functional.max_pool2d(quantized(norm(x), ternary), 2)

    names = ("conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight")
    used = [net.get_parameter(name) for name in names]
    latent = [weight.data.clone() for weight in used]
    for weight, ternary in zip(used, weights, strict=True):
        weight.data = (
            binarize_as_the_authors(weight.data)
            if ternary == "0"
            else ternarize_as_the_authors(weight.data, 0.7)
        )
    optimizer.zero_grad()
    x = block(functional.conv2d(images, used[0], padding=2), net.bn1, activations[0])
    x = block(functional.conv2d(x, used[1]), net.bn2, activations[1])
    x = quantized(net.bn3(functional.linear(x.flatten(1), used[2])), activations[2])
    functional.cross_entropy(net.bn4(functional.linear(x, used[3])), labels).backward()
    for weight, value in zip(used, latent, strict=True):
        weight.data = value
    optimizer.step()
    for weight in used:
        weight.data.clamp_(-1, 1)


def test_latent_weights_and_biases_are_in_bounds_after_a_step_and_norms_are_left_alone() -> None:
    model = lenet5("binary(first=float)", backbone="lenet5")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
    functional.cross_entropy(model(digits(4)), torch.arange(4)).backward()
    optimizer.step()
    after_step(model)()
    for layer in (model.conv2, model.fc1, model.fc2):
        assert layer.weight.abs().max() == 1
        assert layer.bias is not None and layer.bias.abs().max() <= 1
    assert model.conv1.weight.abs().max() > 1
    assert model.bn2.bias.abs().max() > 1


def with_other_statistics(model: LeNet5) -> LeNet5:
    """Move norms away from their start, with positive weights."""
    generator = torch.Generator().manual_seed(5)
    for norm in (model.bn1, model.bn2, model.bn3):
        nn.init.uniform_(norm.weight, 0.1, 2, generator=generator)
        nn.init.normal_(norm.bias, generator=generator)
    model.train()(digits(8, seed=1))
    return model.eval()


def test_the_orders_agree_in_evaluation_where_no_norm_has_a_negative_weight() -> None:
    model = with_other_statistics(lenet5("binary(ternary_activations='010')"))
    images = digits(4)
    with torch.no_grad():
        assert model.order == "CPBA"
        before = model(images)
        model.order = "CBAP"
        assert torch.equal(model(images), before)
        model.bn1.weight[0] = -1
        pooled_last = model(images)
        model.order = "CPBA"
        assert not torch.equal(model(images), pooled_last)


@pytest.mark.parametrize("original", [False, True])
def test_what_a_network_says_of_an_image_does_not_depend_on_the_others(original: bool) -> None:
    call = f"binary(ternary_weights=all, ternary_activations=all, original={str(original).lower()})"
    model = with_other_statistics(lenet5(call))
    images = digits(8)
    images *= torch.linspace(0.1, 1, 8).view(-1, 1, 1, 1)
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in images])
        equal = torch.allclose(model(images), alone, rtol=1e-4, atol=1e-4)
    assert equal != original


def test_the_last_layer_of_the_xnor_form_reads_real_values() -> None:
    model = lenet5(backbone="lenet5(bias=false, xnor=true)")
    kinds = {name: type(module) for name, module in model.named_children()}
    assert kinds["activation1"] is kinds["activation2"] is QuantizedActivation
    assert kinds["relu1"] is kinds["relu2"] is kinds["relu3"] is nn.ReLU


def test_bit_strings_choose_the_ternary_layers_one_by_one() -> None:
    model = lenet5("binary(ternary_weights='0110', ternary_activations='010')").eval()
    levels = [layer.used_weight().unique().tolist() for _, layer in quantized_layers(model)]
    assert levels == [[-1, 1], [-1, 0, 1], [-1, 0, 1], [-1, 1]]
    seen: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedActivation):
            module.register_forward_hook(
                lambda _, __, output, name=name: seen.update({name: output.unique().tolist()})
            )
    model(digits(3))
    assert list(seen.values()) == [[-1, 1], [-1, 0, 1], [-1, 1]]


# Other networks


def test_elsewhere_each_layer_but_the_stem_quantizes_its_input_and_shortcuts_stay_real() -> None:
    model = resnet18("binary").eval()
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    read: dict[str, int] = {}
    for name, layer in quantized_layers(model):
        if layer.input_quantizer is not None:
            layer.input_quantizer.register_forward_hook(
                lambda _, __, output, name=name: read.update({name: len(output.unique())})
            )
    real: list[int] = []
    model.get_submodule("layer1.0").register_forward_hook(
        lambda _, __, output: real.append(len(output.unique()))
    )
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(6)))
    assert len(quantized_layers(model)) == 19  # stem and head are float, shortcuts are not
    assert len(read) == 19
    assert set(read.values()) == {2}
    assert real[0] > 100
    inner = model.get_submodule("layer1.0.conv1")
    assert isinstance(inner, CompressedConv2d) and inner.padding_mode == "replicate"


def test_a_binary_stem_reads_real_images_between_zeros() -> None:
    model = resnet18("binary(first=binary, last=binary)")
    assert len(quantized_layers(model)) == 21
    stem, head = model.get_submodule("conv1"), model.get_submodule("fc")
    assert isinstance(stem, CompressedConv2d) and isinstance(head, CompressedLinear)
    assert stem.input_quantizer is None and stem.padding_mode == "zeros"
    assert head.input_quantizer is not None


def test_weights_have_a_scale_but_in_the_papers_networks() -> None:
    def scales(model: nn.Module) -> int:
        return sum(layer.weight_storage().scales for _, layer in quantized_layers(model))

    assert scales(lenet5("binary")) == 0
    assert scales(lenet5("binary(scale=xnor)")) == 32 + 64 + 512 + 10
    assert scales(resnet18("binary(scale=none)")) == 0
    # Four channel counts, in four or (with a shortcut) five convolutions each.
    assert scales(resnet18("binary")) == 4 * 64 + 5 * (128 + 256 + 512)


def test_float_activations_leave_everything_but_the_weights() -> None:
    model = resnet18("binary-bwn")
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    assert len(relus) == 9
    for _, layer in quantized_layers(model):
        assert layer.input_quantizer is None
        assert isinstance(layer, nn.Linear) or layer.padding_mode == "zeros"
        # Every filter has two values: plus and minus the mean magnitude of its latent weights.
        filters = layer.used_weight().flatten(1).abs()
        expected = layer.weight.flatten(1).abs().mean(1, keepdim=True).expand_as(filters)
        torch.testing.assert_close(filters, expected)


def test_an_activation_module_used_twice_is_one_place_and_gates_stay() -> None:
    model = resnet18("binary(placement=activation, ternary_activations='000000001')")
    found = [m.quantizer for m in model.modules() if isinstance(m, QuantizedActivation)]
    assert [quantizer.ternary for quantizer in found] == [False] * 8 + [True]
    with pytest.raises(ModelError, match="9 digits"):
        resnet18("binary(placement=activation, ternary_activations='1000')")
    gated = nn.Sequential(nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 4), nn.Sigmoid())
    apply_method(gated, "binary(last=binary)")
    assert [type(gated[1]), type(gated[3])] == [nn.Identity, nn.Sigmoid]


@pytest.mark.parametrize("method", ["binary", "binary-bwn", "binary(placement=activation)"])
def test_a_float_checkpoint_loads_strictly_and_fold_keeps_the_outputs(method: str) -> None:
    model = resnet18(method).eval()
    torch.manual_seed(1)
    model.load_state_dict(torchvision.models.resnet18(num_classes=5).state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fold(model)(images), model(images))
    assert quantized_layers(fold(model)) == []


def test_the_penalty_on_latent_weights_and_its_two_gradients() -> None:
    model = lenet5("binary(ternary_weights='0100', last=float)", backbone="lenet5")
    layers = [layer for _, layer in quantized_layers(model)]
    assert len(layers) == 3
    latent = torch.cat([p.detach().flatten() for layer in layers for p in layer.parameters()])
    value = (1 - latent.double().square()).sum()
    for original in (False, True):
        model.zero_grad()
        penalty = latent_regularization(model, original=original)
        torch.testing.assert_close(penalty.double(), value, rtol=1e-5, atol=0)
        penalty.backward()
        for layer in layers:
            bias = layer.get_parameter("bias")
            at = layer.used_weight() if original else layer.weight
            torch.testing.assert_close(layer.weight.grad, -2 * at)
            torch.testing.assert_close(bias.grad, -2 * bias)
        assert model.fc2.weight.grad is None and model.bn1.weight.grad is None
    with pytest.raises(ModelError, match="no latent weights"):
        latent_regularization(lenet5("ternary"))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("binary(ternary_weights='100')", "ternary_weights='100' .* or 4 digits"),
        ("binary(ternary_activations='1002')", "ternary_activations='1002' .* or 3 digits"),
        ("binary(beta=3)", "beta has no effect with estimator=bnn"),
        ("binary(estimator=swish, beta=0)", "beta must be above 0"),
        ("binary(activations=float, estimator=swish)", "estimator has no effect"),
        ("binary(scale=xnor, ternary_weights=all)", "scale=xnor has no effect"),
        ("binary(scale=xnor, ternary_weights='1111')", "scale=xnor has no effect"),
        (
            "binary(scale=xnor, first=float, ternary_weights='0111')",
            "scale=xnor has no effect where all weights are ternary",
        ),
        (
            "binary(first=float, ternary_weights='1000')",
            "ternary_weights='1000' has no effect on conv1, which stays float",
        ),
        (
            "binary(last=float, placement=input, ternary_activations='001')",
            "ternary_activations='001' has no effect on fc2, which stays float",
        ),
        ("binary(padding=zeros)", "padding=zeros has no effect: no convolution of LeNet5"),
    ],
)
def test_options_that_cannot_be_are_refused(method: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        lenet5(method)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("binary(order=CPBA)", "blocks have an order.*Sequential has none"),
        ("binary(placement=activation)", "no activations to quantize with placement=activation"),
    ],
)
def test_a_network_that_lacks_what_an_option_needs_says_so(method: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        apply_method(nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), method)


def test_where_a_network_declares_no_parts_the_first_and_the_last_layer_stay_float() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))

    for method, names in (
        ("binary", ["2"]),
        ("binary(first=binary)", ["0", "2"]),
        ("binary-bwn(last=binary)", ["2", "3"]),
        ("binary(first=binary, last=float)", ["0", "2"]),
    ):
        assert [name for name, _ in quantized_layers(apply_method(network(), method))] == names


@pytest.mark.parametrize(
    ("method", "roles"),
    [("binary", {"0": "stem", "2": "head"}), ("binary(ternary_activations='01')", {})],
)
def test_a_refused_network_keeps_its_activations(method: str, roles: dict[str, Part]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(ModelError):
        apply_method(model, method, roles=roles)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_an_order_that_was_chosen_for_the_network_stays() -> None:
    chosen = "lenet5(order=CBAP)"
    assert lenet5("binary").order == "CPBA"
    assert lenet5("binary", backbone=chosen).order == "CBAP"
    assert lenet5("binary(order=CPBA)", backbone=chosen).order == "CPBA"
    assert lenet5("binary-bwn").order is None


def test_what_the_xnor_form_keeps_real_is_not_quantized_at_the_inputs() -> None:
    with pytest.raises(ModelError, match="would quantize what relu1, relu2, relu3 of XnorLeNet5"):
        lenet5("binary(placement=input)", backbone="lenet5(xnor=true)")


def test_a_restored_network_takes_the_same_next_step() -> None:
    def trainer(model: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), after_step(model)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, clip: Callable[[], None]) -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(digits(4)), torch.arange(4)).backward()
        optimizer.step()
        clip()

    model, restored = (
        lenet5(),
        create_model(
            "lenet5(bias=false)", "binary", num_classes=10, in_channels=1, image_size=28, seed=1
        ),
    )
    optimizer, clip = trainer(model)
    step(model, optimizer, clip)
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    weights, momentum = torch.load(saved, weights_only=True)
    restored.load_state_dict(weights)
    other, other_clip = trainer(restored)
    other.load_state_dict(momentum)
    step(model, optimizer, clip)
    step(restored, other, other_clip)
    for name, value in restored.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_clipping_reaches_parameters_that_were_assigned_later() -> None:
    model = lenet5()
    clip = after_step(model)
    far = {name: 5 * torch.ones_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(far, assign=True)
    clip()
    assert model.conv1.weight.eq(1).all() and model.bn1.weight.eq(5).all()
