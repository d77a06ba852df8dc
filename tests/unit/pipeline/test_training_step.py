from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from pipeline.averaging import MovingAverage
from pipeline.config import Recipe
from pipeline.context import TrainContext
from pipeline.optim import build_optimizer
from pipeline.training_step import TrainingStep, distillation, square_hinge


def on_cpu(tell=lambda event: None) -> TrainContext:
    context = TrainContext(tell)
    context.device = torch.device("cpu")
    return context


def small_network() -> nn.Sequential:
    """Without batch norm, so that parts of a batch do not see each other."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    )


def without_relu(network: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(layer for layer in network if not isinstance(layer, nn.ReLU)))


def binary_network() -> nn.Module:
    return models.create_model("lenet5", "binary", num_classes=5, in_channels=3, image_size=28)


def batch(images: int = 10, size: int = 8, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(images, 3, size, size, generator=generator),
        torch.randint(classes, (images,), generator=generator),
    )


def make_step(
    model: nn.Module, *, teacher: nn.Module | None = None, classes: int = 5, **settings
) -> TrainingStep:
    recipe = Recipe(**({"momentum": 0.0, "nesterov": False, "batch_size": 10} | settings))
    optimizer = build_optimizer(model, recipe)
    return TrainingStep(recipe, model, model, optimizer, on_cpu(), classes=classes, teacher=teacher)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_a_step_is_plain_gradient_descent():
    model, twin = small_network(), small_network()
    images, labels = batch()
    loss, hits = make_step(model, label_smoothing=0.1, weight_decay=0.0)(images, labels, 0.1)
    expected = F.cross_entropy(twin(images), labels, label_smoothing=0.1)
    expected.backward()
    assert torch.allclose(loss, expected.detach())
    assert int(hits) == int((twin(images).argmax(1) == labels).sum())
    for moved, start in zip(model.parameters(), twin.parameters(), strict=True):
        assert start.grad is not None
        assert torch.allclose(moved, start - 0.1 * start.grad, atol=1e-7)


def test_the_square_hinge_is_the_sum_over_classes_written_out():
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 2])
    by_hand = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for klass, value in enumerate(row):
            target = 1 if klass == label else -1
            by_hand += max(0.0, 1 - target * value) ** 2
    assert square_hinge(logits, labels).item() == pytest.approx(by_hand / 4, rel=1e-12)
    logits.requires_grad_()
    torch.autograd.gradcheck(lambda x: square_hinge(x, labels), (logits,))


def test_the_distillation_loss_is_the_divergence_written_out():
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    temperature, by_hand = 3.0, 0.0
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        q = [math.exp(x / temperature) for x in mine]
        p = [math.exp(x / temperature) for x in theirs]
        for a, b in zip(p, q, strict=True):
            by_hand += a / sum(p) * (math.log(a / sum(p)) - math.log(b / sum(q)))
    expected = temperature**2 * by_hand / 3
    assert distillation(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_a_teacher_pulls_by_its_weight_and_learns_nothing():
    model, twin, teacher = small_network(), small_network(), small_network()
    with torch.no_grad():
        teacher.get_parameter("4.weight").mul_(-2)
    images, labels = batch()
    step = make_step(model, teacher=teacher, teacher_weight=0.75, temperature=2.0)
    step.backward(images, labels)
    logits = twin(images)
    taught = distillation(logits, teacher(images).detach(), 2.0)
    (0.25 * F.cross_entropy(logits, labels) + 0.75 * taught).backward()
    for mine, expected in zip(gradients(model), gradients(twin), strict=True):
        assert torch.allclose(mine, expected, atol=1e-7)
    assert gradients(teacher) == []


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_accumulation_gives_the_gradient_of_the_whole_batch(parts):
    whole, in_parts = small_network(), small_network()
    images, labels = batch()
    loss, hits = make_step(whole).backward(images, labels)
    loss_of_parts, hits_of_parts = make_step(in_parts, accumulation=parts).backward(images, labels)
    assert torch.allclose(loss, loss_of_parts)
    assert hits == hits_of_parts
    for mine, expected in zip(gradients(in_parts), gradients(whole), strict=True):
        assert torch.allclose(mine, expected, atol=1e-6)


def test_clipping_shortens_the_gradient_to_the_norm_and_keeps_its_direction():
    model = small_network()
    images, labels = batch()
    make_step(model).backward(100 * images, labels)
    free = torch.cat([g.flatten() for g in gradients(model)])
    assert free.norm() > 1
    model.zero_grad()
    make_step(model, clip_norm=0.25)(100 * images, labels, 1e-9)
    clipped = torch.cat([g.flatten() for g in gradients(model)])
    assert clipped.norm().item() == pytest.approx(0.25, rel=1e-4)
    assert F.cosine_similarity(free, clipped, dim=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_regularization_pulls_latent_weights_once_per_step(parts):
    """dR/dw = -2 w (Stadtmann et al. 2020), however many parts a batch has."""
    pulled, free = (binary_network().eval() for _ in range(2))
    images, labels = batch(size=28)
    make_step(pulled, latent_regularization=0.5, accumulation=parts).backward(images, labels)
    make_step(free, accumulation=parts).backward(images, labels)
    for (name, layer), (_, other) in zip(
        models.quantized_layers(pulled), models.quantized_layers(free), strict=True
    ):
        assert layer.weight.grad is not None and other.weight.grad is not None
        pull = layer.weight.grad - other.weight.grad
        assert torch.allclose(pull, -2 * 0.5 * layer.weight, atol=1e-5), name


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_float16_step_that_overflows_is_skipped_and_the_next_ones_count(optimizer):
    model = small_network()
    before = [p.detach().clone() for p in model.parameters()]
    step = make_step(model, precision="float16", optimizer=optimizer, momentum=0.9, nesterov=True)
    images, labels = batch()
    scale = step.scaler.get_scale()
    step(1e4 * images, labels, 0.01)
    assert step.scaler.get_scale() < scale, "the gradient has to overflow for this test"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for _ in range(20):
        loss, _ = step(images, labels, 0.01)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_gradients_are_near_those_of_float32(precision):
    """Without ReLU: one that rounding turns on or off would make a jump."""
    low, full = (without_relu(small_network()) for _ in range(2))
    images, labels = batch()
    step = make_step(low, precision=precision)
    step.backward(images, labels)
    make_step(full).backward(images, labels)
    scale = step.scaler.get_scale()
    for mine, expected in zip(gradients(low), gradients(full), strict=True):
        assert mine.dtype == torch.float32
        assert not torch.equal(mine / scale, expected), "it would not be low precision"
        assert (mine / scale - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_mixed_images_have_a_loss_between_those_of_their_two_labels(settings):
    """The soft targets are lambda and 1 - lambda of two labels, so the loss is linear in them."""
    model = small_network()
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images, labels = batch()
    torch.manual_seed(3)
    loss, _ = make_step(model, **settings)(images, labels, 1e-9)
    mixed = seen[0]
    assert not torch.equal(mixed, images)
    partner = images.roll(1, 0)
    # lambda of each image: from its pixels (mixup), or from the share that was not replaced.
    if "mixup" in settings:
        share = ((mixed - partner) / (images - partner)).flatten(1).median(dim=1).values
    else:
        share = (mixed == images).all(dim=1).flatten(1).double().mean(dim=1).float()
    logits = model(mixed)
    first = F.cross_entropy(logits, labels, reduction="none")
    second = F.cross_entropy(logits, labels.roll(1), reduction="none")
    assert loss.item() == pytest.approx((share * first + (1 - share) * second).mean().item(), 1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bfloat16", "optimizer": "rmsprop", "clip_norm": 1.0, "accumulation": 2},
        {"precision": "float16", "momentum": 0.9, "nesterov": True, "clip_norm": 1.0},
        {"optimizer": "lamb"},
        {"loss": "square-hinge", "latent_regularization": 1e-5},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "plain",
)
def test_no_step_waits_for_the_device(settings):
    """A scalar that Python reads, on a GPU a wait for all that is queued, is an aten event.

    Not here but on a GPU, below: torch's Adam, whose CPU kernel reads its own step counter, and
    mixing, which draws its share on the CPU.
    """
    step = make_step(binary_network(), **settings)
    images, labels = batch(size=28)
    step(images, labels, 0.01)
    with torch.profiler.profile() as profile:
        step(images, labels, 0.01)
    events = profile.events()
    assert events is not None
    assert any(event.name == "aten::convolution" for event in events), "it has seen the step"
    waits = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
    assert [_callers(event) for event in events if event.name in waits] == []


SHAPES = [(10, 3, 8, 8), (10, 3, 12, 12)]


@pytest.mark.parametrize("what", ["model", "quantizers"])
def test_what_cannot_be_compiled_trains_without_and_a_line_says_so_each_time(what, monkeypatch):
    """A backend that fails stands in for a machine without a C++ compiler."""

    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiled(*a, **{**k, "backend": broken}))
    for _ in range(2):
        events: list[dict[str, Any]] = []
        network = binary_network()
        recipe = Recipe(compile=what, batch_size=10)
        optimizer = build_optimizer(network, recipe)
        step = TrainingStep(recipe, network, network, optimizer, on_cpu(events.append), classes=5)
        step.prepare([(10, 3, 28, 28)])
        [note] = [event["text"] for event in events if event["kind"] == "note"]
        assert f"train.compile={what} does not work here" in note
        assert "no compiler here" in note
        assert "\n" not in note
        loss, _ = step(*batch(size=28), 0.01)
        assert torch.isfinite(loss)


def test_trying_the_compiler_leaves_no_trace_and_the_steps_are_the_same(monkeypatch):
    """With a backend that runs the graph as it is: the arithmetic is that of torch itself."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiled(*a, **{**k, "backend": "eager"}))
    fast, plain = (nn.Sequential(nn.BatchNorm2d(3), small_network()) for _ in range(2))
    step = make_step(fast, compile="model", accumulation=3)
    step.prepare(SHAPES)
    assert gradients(fast) == []
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, fast.state_dict()[name]), name
    images, labels = batch()
    for _ in range(2):
        step(images, labels, 0.1)
    other = make_step(plain, accumulation=3)
    for _ in range(2):
        other(images, labels, 0.1)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(tensor, fast.state_dict()[name], atol=1e-6), name


def test_all_sizes_of_a_growing_image_are_compiled_before_the_first_step(monkeypatch):
    compiled, graphs = torch.compile, []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options = {"backend": counting, "dynamic": False}
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiled(*a, **{**k, **options}))
    step = make_step(small_network(), compile="model")
    step.prepare(SHAPES)
    before = len(graphs)
    assert before >= len(SHAPES)
    for size in (8, 12, 8):
        images, labels = batch(size=size)
        step(images.contiguous(memory_format=torch.channels_last), labels, 0.01)
    assert len(graphs) == before


@pytest.mark.slow
def test_a_compiled_network_trains_as_torch_does():
    fast, plain = (nn.Sequential(nn.BatchNorm2d(3), small_network()) for _ in range(2))
    step, other = make_step(fast, compile="model"), make_step(plain)
    step.prepare([(10, 3, 8, 8)])
    images, labels = batch()
    images = images.contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        loss, _ = step(images, labels, 0.1)
        expected, _ = other(images, labels, 0.1)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "precision": "bfloat16", "mixup": 0.2, "cutmix": 1.0},
        {"precision": "float16", "momentum": 0.9, "nesterov": True, "clip_norm": 1.0},
        {"optimizer": "adam", "precision": "float16", "accumulation": 2},
        {"optimizer": "lamb", "loss": "square-hinge"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_no_step_waits_for_a_gpu(settings):
    context = TrainContext(lambda event: None)
    network = binary_network().to(context.device)
    recipe = Recipe(**({"momentum": 0.0, "nesterov": False, "batch_size": 10} | settings))
    optimizer = build_optimizer(network, recipe)
    step = TrainingStep(recipe, network, network, optimizer, context, classes=5)
    average = MovingAverage(network, decay=0.9)
    images, labels = (tensor.to(context.device) for tensor in batch(size=28))
    step(images, labels, 0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3):
            step(images, labels, 0.01)
            average.update(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _callers(event) -> list[str]:
    """Names of what the event was called by, innermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names
