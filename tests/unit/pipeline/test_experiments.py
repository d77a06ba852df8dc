"""The catalog against the papers: rates of every epoch, sizes of networks; its grammar."""

from __future__ import annotations

import fnmatch
import math

import pytest
import torch
import torchvision
from torch import nn

from data_prep import get_dataset
from docs.write_networks import PUBLISHED, tables
from models import create_model, profile
from pipeline.cli import main
from pipeline.config import Experiment, PipelineError, Recipe
from pipeline.experiments import catalog, chapters, check_parts, load_experiment
from pipeline.optim import learning_rate
from pipeline.recipes import FLOAT_WEIGHTS, RECIPES
from pipeline.settings import override

#: What our initial weights of VGG16 are, which no count depends on.
OF_NO_COUNT = (", init=xavier", "init=xavier, ")


def rates(experiment: Experiment) -> list[float]:
    """The learning rate in the first step of each epoch of 7 steps; it is the last one's too."""
    recipe = experiment.train
    each = [learning_rate(recipe, 7 * epoch, 7) for epoch in range(recipe.epochs)]
    assert each == [learning_rate(recipe, 7 * epoch + 6, 7) for epoch in range(recipe.epochs)]
    return each


def piecewise(*pieces: tuple[int, float]) -> list[float]:
    return [rate for epochs, rate in pieces for _ in range(epochs)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar10_resnet50_step", [0.05 * (1 + math.cos(math.pi * e / 200)) for e in range(200)]),
        ("cifar10_resnet20_ternary", piecewise((80, 0.1), (40, 0.01), (40, 1e-3), (40, 5e-4))),
        ("imagenet_resnet50_ternary", piecewise((30, 1e-4), (10, 2e-5), (5, 4e-6), (5, 2e-6))),
        ("imagenet_resnet50", piecewise((30, 0.1), (30, 0.01), (30, 1e-3))),
        (
            "mnist_lenet5_float_stadtmann2020-lenet5",
            piecewise((14, 0.01), (10, 1e-3), (476, 1e-4)),
        ),
        ("mnist_lenet5_binary", [0.01] * 500),
        ("cifar10_vggnet7", piecewise((79, 0.1), (40, 0.01), (381, 1e-3))),
        (
            "cifar10_vggnet7_binary",
            piecewise((99, 1e-3), (100, 1e-4), (100, 1e-5), (100, 1e-6), (101, 1e-7)),
        ),
        (
            "cifar10_vgg16_sparse",
            piecewise((39, 0.1), (40, 0.02), (20, 4e-3), (15, 8e-4), (6, 1.6e-4)),
        ),
        (
            "cifar10_vgg16_sparse-psd4p16",
            piecewise(
                (39, 0.1), (40, 0.02), (20, 4e-3), (15, 8e-4), (15, 1.6e-4), (10, 3.2e-5),
                (11, 6.4e-6),
            ),
        ),
        ("cifar10_threshnet95", piecewise((74, 1e-3), (75, 5e-4), (51, 2.5e-4))),
        ("svhn_threshnet95", [1e-3] * 60),
    ],
)  # fmt: skip
def test_every_epoch_has_the_rate_of_the_authors_program(name, expected):
    assert rates(catalog()[name]) == pytest.approx(expected, rel=1e-12)


def classes_of(experiment: Experiment) -> int:
    classes = get_dataset(experiment.dataset).classes
    assert classes is not None
    return classes


def image_size_of(experiment: Experiment) -> int:
    return experiment.train.image_size or get_dataset(experiment.dataset).image_size


def on_meta(experiment: Experiment, method: str | None = None) -> nn.Module:
    """The experiment's network without memory for its weights, or the same by another method."""
    with torch.device("meta"):
        return create_model(
            experiment.backbone,
            method or experiment.method,
            num_classes=classes_of(experiment),
            in_channels=get_dataset(experiment.dataset).channels,
            image_size=image_size_of(experiment),
        )


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def published_parameters() -> dict[tuple[str, str, int], str]:
    """Parameters by network, method and number of classes, as printed in docs/published.md."""
    found = {}
    for _, cells in tables(PUBLISHED.read_text()):
        if not cells or "parameters" not in cells[0]:
            continue
        for row in cells[2:]:
            values = dict(zip(cells[0], row, strict=True))
            printed = values["parameters"].partition("[")[0]
            if printed != "-":
                network, method = (values[key].strip("`") for key in ("network", "method"))
                found[network, method, int(values["classes"])] = printed
    return found


def comparable() -> dict[str, str]:
    """Curated experiments whose number of parameters is published, and that number."""
    published, found = published_parameters(), {}
    for name, experiment in catalog().items():
        backbone = experiment.backbone
        for argument in OF_NO_COUNT:
            backbone = backbone.replace(argument, "")
        classes = classes_of(experiment)
        printed = published.get((backbone, experiment.method, classes))
        if printed is not None and not name.endswith(("-l1fp", "-lnfp")):
            found[name] = printed  # float ends of the authors have a bias where they should not
    return found


COMPARABLE = comparable()
SAMPLE = {
    "cifar10_vgg16_step",
    "imagenet16_efficientnetb0_step",
    "cifar100_stepnet_step",
    "cifar10_resnet56_ternary",
    "imagenet_alexnet_ternary",
    "mnist_lenet5_binary",
    "cifar10_vggnet7_binary-widen2",
    "cifar10_vgg16_sparse-psd4p8",
    "tinyimagenet_mobilenetv2_float_kundu2020",
    "cifar10_mobilenetv2_float_ju2022",
    "cifar10_triplenetb",
    "cifar10_threshnet79",
}


def test_most_experiments_have_a_published_number_of_parameters():
    assert len(COMPARABLE) > 125
    assert set(COMPARABLE) >= SAMPLE


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in COMPARABLE],
)
def test_a_network_has_the_papers_number_of_parameters(name):
    experiment = catalog()[name]
    parameters = profile(on_meta(experiment), image_size_of(experiment)).parameters
    assert f"{parameters:,}" == COMPARABLE[name]


@pytest.mark.parametrize("backbone", FLOAT_WEIGHTS)
def test_float_weights_are_torchvisions_and_of_a_network_with_the_same_names(backbone):
    weights = torchvision.models.get_weight(FLOAT_WEIGHTS[backbone])
    (builder,) = [
        torchvision.models.get_model_builder(name)
        for name in torchvision.models.list_models(torchvision.models)
        if torchvision.models.get_model_weights(name) is type(weights)
    ]
    with torch.device("meta"):
        assert shapes(create_model(backbone, num_classes=1000, image_size=224)) == shapes(builder())


@pytest.mark.parametrize(
    "name",
    [
        "imagenet_resnet18_ternary-x4",
        "imagenet_resnet18_binary_16ep-finetune",
        "imagenet_resnet18_sparse_88ep-finetune",
        "imagenet_alexnet_ternary",
        "cifar10_vggnet7_binary_stadtmann2020-vggnet7-binary-finetune",
    ],
)
def test_what_begins_with_float_weights_has_a_place_for_all_of_them(name):
    experiment = catalog()[name]
    assert experiment.init_from is not None
    assert shapes(on_meta(experiment, "float")) == shapes(on_meta(experiment))


def test_alexnet_begins_with_the_weights_of_its_float_experiment():
    assert catalog()["imagenet_alexnet_ternary"].init_from == "models:/imagenet_alexnet@candidate"
    assert "imagenet_alexnet" in catalog()


def test_no_name_is_in_the_catalog_twice_and_every_one_is_in_a_chapter():
    names = [entry.name for entries in chapters().values() for entry in entries]
    assert sorted(names) == list(catalog())


def test_a_name_may_say_its_recipe():
    experiment = load_experiment("cifar100_resnet20_ternary_he2018")
    assert experiment.train == catalog()["cifar10_resnet20_ternary"].train
    assert experiment.train == RECIPES["he2018"].recipe
    assert experiment.method == "ternary"
    assert not experiment.tuned


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("imagenet_resnet34_ternary_32ep-finetune", "ResNet34_Weights.IMAGENET1K_V1"),
        ("imagenet_mobilenet_ternary_16ep-finetune", "models:/imagenet_mobilenet@candidate"),
        ("cifar10_resnet20_ternary_he2018-finetune", "models:/cifar10_resnet20@candidate"),
        ("cifar10_resnet20_ternary_he2018", None),
    ],
)
def test_a_recipe_that_fine_tunes_begins_with_float_weights(name, start):
    assert load_experiment(name).init_from == start


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("cifar10_resnet20_ternary_he2019", "did you mean he2018"),
        ("cifar10_resnet20_he2018", r"did you mean cifar10_resnet20_float_he2018\?"),
        ("cifar10_resnet20_ternary-1.5_16ep", "cannot read"),
        ("cifar10_resnet20_ternary_", "A name is DATASET_BACKBONE"),
    ],
)
def test_a_wrong_recipe_is_one_line(name, part):
    with pytest.raises(PipelineError, match=part) as caught:
        load_experiment(name)
    assert "\n" not in str(caught.value)


def test_float_alone_is_the_curated_experiment_without_it():
    short = [name for name in catalog() if name.count("_") == 1]
    assert len(short) > 50
    for name in short:
        assert load_experiment(f"{name}_float") == catalog()[name]
        assert catalog()[name].method == "float"
    assert not load_experiment("digits_resnet20_float").tuned


@pytest.mark.parametrize("method", ["float", "ternary", "binary", "sparse", "step"])
@pytest.mark.parametrize("recipe", ["16ep", "32ep-finetune"])
def test_a_recipe_of_ours_is_the_same_in_the_catalog_and_by_the_grammar(method, recipe):
    curated = catalog().get(f"imagenet_resnet50_{method}_{recipe}")
    if curated is None:
        assert (method, recipe) in [("float", "32ep-finetune"), ("step", "32ep-finetune")]
        return
    experiment = load_experiment(f"imagenet_resnet34_{method}_{recipe}")
    assert not experiment.tuned
    assert experiment.train == curated.train


def steps(recipe: Recipe) -> list[float]:
    """The learning rate of each step of epochs of 5 steps."""
    return [learning_rate(recipe, step, 5) for step in range(5 * recipe.epochs)]


@pytest.mark.parametrize(
    ("method", "optimizer", "least", "most", "warmup"),
    [
        ("ternary", "adam", 1e-4, 2e-4, 1),
        ("sparse+ternary", "adam", 1e-4, 2e-4, 1),
        ("binary", "adam", 5e-5, 1e-4, 2),
        ("sparse", "sgd", 0.03, 0.05, 1),
    ],
)
def test_fine_tuning_begins_slowly_with_the_optimizer_of_its_method(
    method, optimizer, least, most, warmup
):
    """At 1,024 images a step. Adam moves a weight by its rate; float ones deviate by 0.02."""
    recipe = load_experiment(f"imagenet_resnet34_{method}_16ep-finetune").train
    assert (recipe.optimizer, recipe.batch_size) == (optimizer, 1024)
    rates = steps(recipe)
    assert least <= max(rates) <= most
    assert rates[0] == pytest.approx(max(rates) / (5 * warmup))
    assert rates.index(max(rates)) == 5 * warmup - 1
    assert not recipe.blurpool
    if method == "binary":
        assert recipe.latent_weight_decay == 0


def test_resnet18_decays_half_as_much_as_in_ffcvs_recipe():
    for recipe in ("16ep", "32ep", "88ep"):
        for backbone, decay in (("resnet18", 5e-5), ("resnet50", 1e-4)):
            for method in ("float", "sparse", "ternary", "step"):
                entry = catalog()[f"imagenet_{backbone}_{method}_{recipe}"]
                assert entry.train.weight_decay == decay
            entry = catalog()[f"imagenet_{backbone}_sparse_{recipe}-finetune"]
            assert (entry.train.weight_decay, entry.train.nesterov) == (decay, True)


def reference_texts(pattern: str) -> list[str]:
    found = [catalog()[name].reference for name in fnmatch.filter(catalog(), pattern)]
    return [reference.text for reference in found if reference is not None]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("cifar10_resnet18*", 13),
        ("tinyimagenet_resnet18*", 13),
        ("tinyimagenet_vgg16_sparse*", 12),
        ("tinyimagenet_*_kundu2020", 3),
        ("cifar10_shufflenetv2_float_kundu2020", 1),
    ],
)
def test_a_row_whose_recipe_is_not_public_says_so(pattern, count):
    texts = reference_texts(pattern)
    assert len(texts) == count
    assert all("recipe not public" in text for text in texts)


def test_rows_of_svhn_say_that_their_recipe_is_inferred():
    assert all("recipe inferred from TripleNet's logs" in text for text in reference_texts("svhn*"))


def test_sparse_rows_say_which_kernels_they_have():
    for entry in catalog().values():
        if entry.method.startswith("sparse"):
            kernels = entry.method.partition("-")[2] or "psd4p8"
            assert entry.reference is not None
            assert kernels in entry.reference.what.lower().replace("_", ""), entry.name


@pytest.mark.parametrize("kernels", ["psc1", "psc2", "psc4"])
def test_mobilenetv2_has_the_random_kernels_of_the_authors_script(kernels):
    entry = catalog()[f"cifar10_mobilenetv2_sparse-{kernels}"]
    recipe = entry.train
    assert (recipe.batch_size, recipe.epochs, recipe.lr, recipe.weight_decay) == (64, 120, 0.1, 0)
    dense, sparse = (profile(on_meta(entry, method), 32) for method in ("float", entry.method))
    # 57 convolutions; only the 17 depthwise ones are larger than 1x1, beside the stem.
    assert dense.parameters == 2_296_922
    assert sparse.parameters == 2_296_922 - 64_224 // 9 * (9 - int(kernels[-1]))


def test_a_network_of_one_image_size_is_not_tested_at_another():
    experiment = override(catalog()["imagenet_alexnet"], ["train.test_size=288"])
    with pytest.raises(PipelineError, match=r"alexnet takes .* train\.test_size=288"):
        check_parts(experiment)


def test_the_list_has_a_heading_for_each_paper_and_a_pattern_leaves_others_out(capsys):
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    for title, entries in chapters().items():
        heading = shown.index(title)
        assert heading < shown.index(f" {entries[0].name} ") < shown.index(f" {entries[-1].name} ")
    assert main(["--list", "*threshnet95"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "threshnet95 " in line] == [
        "cifar10_threshnet95",
        "svhn_threshnet95",
        "threshnet95",
    ]
    assert sum(title in lines for title in chapters()) == 1
