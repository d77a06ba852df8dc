"""Named recipes, each derived from another by replacing fields.

``RECIPES`` are those that an experiment's name may end with. A paper's recipe holds its
augmentation and normalization too, so it means the same on every data set. The last, incomplete
batch of an epoch is left out here, in all of them; the authors keep it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.calls import parse_calls
from pipeline.config import Recipe


def derive(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with some fields replaced, validated anew."""
    return Recipe.model_validate({**recipe.model_dump(), **changes})


#: For any network of which nothing is known: SGD with Nesterov momentum and a cosine schedule.
DEFAULT = Recipe(epochs=30, batch_size=128, lr=0.1, weight_decay=5e-4, warmup_epochs=1)

#: What keeps the class of an image, by data set. Photographs of any size: a random window, as
#: in Szegedy et al. 2015, and the central crop of 224 out of 256 pixels; small ones: the shift and
#: flip of Lee et al. 2015. House numbers are not mirrored.
_PHOTOGRAPHS: dict[str, Any] = {"crop_area": (0.08, 1.0), "flip": True, "test_crop": 224 / 256}
_AUGMENTATION: dict[str, dict[str, Any]] = {
    "imagenet": _PHOTOGRAPHS,
    "imagenet16": _PHOTOGRAPHS,
    "folder": _PHOTOGRAPHS,
    "tinyimagenet": {"shift": 8, "flip": True},
    "cifar10": {"shift": 4, "flip": True},
    "cifar100": {"shift": 4, "flip": True},
    "svhn": {"shift": 4},
}


def default_recipe(dataset: str) -> Recipe:
    """The recipe of a combination that nobody has tuned, with the data set's augmentation."""
    return derive(DEFAULT, **_AUGMENTATION.get(dataset, {}))


#: LeNet5 on MNIST in five epochs: high peak rate, cosine to zero, shifts of two pixels.
MNIST = derive(DEFAULT, epochs=5, batch_size=128, lr=0.05, warmup_epochs=0.5, shift=2)

#: LeNet5 on the 1,437 digits: many short epochs, small batches.
DIGITS = derive(MNIST, epochs=20, batch_size=64, warmup_epochs=1)

#: What most of the papers have in common: no Nesterov momentum, norms and biases decay as well.
_PAPER = Recipe(batch_size=128, lr=0.1, nesterov=False, norm_weight_decay=None)

#: STeP (Kyrkou 2024), on all its data sets. Images are resized whole, whatever their aspect ratio.
KYRKOU2024 = derive(
    _PAPER,
    epochs=200,
    schedule_unit="epoch",
    normalization="cifar10-imagewise",
    shift=4,
    flip=True,
)

#: Ternary weights (He et al. 2018) on CIFAR-10, float or ternary, from scratch.
HE2018 = derive(
    _PAPER,
    epochs=200,
    nesterov=True,
    weight_decay=3e-4,
    schedule="multistep",
    milestones=(80, 120, 160),
    gamma=(0.1, 0.1, 0.5),
    shift=4,
    flip=True,
)

#: The same on ImageNet, from float weights.
HE2018_FINETUNE = derive(
    _PAPER,
    epochs=50,
    batch_size=256,
    optimizer="adam",
    lr=1e-4,
    weight_decay=5e-6,
    schedule="multistep",
    milestones=(30, 40, 45),
    gamma=(0.2, 0.2, 0.5),
    **_PHOTOGRAPHS,
)

#: Float networks on ImageNet as torchvision's reference script trained those of its weights V1.
TORCHVISION = derive(
    _PAPER,
    epochs=90,
    batch_size=256,
    weight_decay=1e-4,
    schedule="multistep",
    milestones=(30, 60),
    **_PHOTOGRAPHS,
)

#: LeNet5 in float on MNIST (Stadtmann et al. 2020). The paper counts epochs from 1: 15 and 25.
STADTMANN2020_LENET5 = derive(
    _PAPER,
    epochs=500,
    batch_size=50,
    validation=10_000,
    lr=0.01,
    weight_decay=1e-4,
    schedule="multistep",
    milestones=(14, 24),
    loss="square-hinge",
    normalization="unit",
)

#: Binary LeNet5 on MNIST: a constant rate.
STADTMANN2020_LENET5_BINARY = derive(
    STADTMANN2020_LENET5, momentum=0.99, weight_decay=0, schedule="constant", milestones=()
)

#: VGGNet7 in float on CIFAR-10.
STADTMANN2020_VGGNET7 = derive(
    STADTMANN2020_LENET5,
    batch_size=100,
    validation=5_000,
    lr=0.1,
    milestones=(79, 119),
    normalization="signed",
    shift=4,
    padding="edge",
    flip=True,
)

#: Binary VGGNet7 on CIFAR-10.
STADTMANN2020_VGGNET7_BINARY = derive(
    STADTMANN2020_VGGNET7,
    batch_size=50,
    optimizer="adam",
    lr=1e-3,
    weight_decay=0,
    milestones=(99, 199, 299, 399),
    loss="cross-entropy",
)

#: By how much the paper's study pulls the latent weights of that network to -1 and +1.
LATENT_PULLS = ("1e-5", "1e-6", "5e-7", "1e-7", "1e-8")

#: Pre-defined sparse kernels (Kundu et al. 2020): VGG16 on CIFAR-10 with kernels of one or two
#: weights. The script steps its scheduler first, so the rate falls an epoch before 40, 80, 100 ...
#: The last two milestones are those of longer trainings.
KUNDU2020 = derive(
    _PAPER,
    epochs=120,
    batch_size=64,
    schedule="multistep",
    milestones=(39, 79, 99, 114, 129, 139),
    gamma=0.2,
    normalization="cifar10-imagewise",
    shift=4,
    flip=True,
)

#: The same with kernels of four weights.
KUNDU2020_150EP = derive(KUNDU2020, epochs=150, batch_size=128)

#: ThreshNet and all that it is compared with, on CIFAR-10 (Ju et al. 2022): no shifts, pixels in
#: [0, 1]. Epochs 75 and 150 of the paper count from 1.
JU2022 = derive(
    _PAPER,
    epochs=200,
    batch_size=100,
    optimizer="adam",
    lr=1e-3,
    weight_decay=0,
    schedule="multistep",
    milestones=(74, 149),
    gamma=0.5,
    normalization="unit",
    flip=True,
)

#: The same on SVHN, as the logs have it. Digits are not mirrored: the paper does not say.
JU2022_SVHN = derive(
    JU2022, epochs=60, batch_size=256, schedule="constant", milestones=(), flip=False
)


def _imagenet(epochs: int) -> Recipe:
    """ImageNet in few epochs: images that grow, a smoothed loss, blur, an average of the weights.

    After the recipes of FFCV (Leclerc et al. 2022, libffcv/ffcv-imagenet). Theirs have a rate that
    falls linearly instead of as a cosine, no Nesterov momentum, no average of the weights, and a
    test at 256 pixels. Images grow from 160 to 192 pixels late in training and are tested at 224,
    since a random window shows things larger than the whole image does (Touvron et al., NeurIPS
    2019).
    """
    return Recipe(
        epochs=epochs,
        batch_size=1024,
        lr=0.125,
        lr_batch_size=256,
        weight_decay=1e-4,
        warmup_epochs=2,
        label_smoothing=0.1,
        ema_decay=0.9995,
        image_size=192,
        first_image_size=160,
        growth_epochs=(round(0.7 * epochs), round(0.85 * epochs)),
        test_size=224,
        blurpool=True,
        precision="bfloat16",
        **_PHOTOGRAPHS,
    )


#: The ending of the names of recipes that begin with float weights.
FINETUNE = "-finetune"

#: Epochs of our recipes for ImageNet, which differ by network and method.
_SHORT = {"16ep": 16, "32ep": 32, "88ep": 88}

#: What a method changes of them from scratch. Blur would stand in front of what is binary or
#: frozen.
_FROM_SCRATCH: dict[str, dict[str, Any]] = {
    "step": {"blurpool": False},
    "binary": {
        "optimizer": "adam",
        "lr": 2.5e-4,
        "weight_decay": 1e-5,
        "latent_weight_decay": 0,
        "blurpool": False,
    },
}

#: What all change from float weights, which were trained without blur.
_FINETUNED: dict[str, Any] = {"lr": 0.01, "warmup_epochs": 1, "blurpool": False}

#: What a method changes beyond that. Float weights have a deviation of about 0.02, so that larger
#: steps of Adam would turn the signs of most of them at once.
_FROM_FLOAT: dict[str, dict[str, Any]] = {
    "ternary": {"optimizer": "adam", "lr": 2e-4, "lr_batch_size": None, "weight_decay": 5e-6},
    "binary": {
        "optimizer": "adam",
        "lr": 1e-4,
        "lr_batch_size": None,
        "warmup_epochs": 2,
        "weight_decay": 5e-6,
        "latent_weight_decay": 0,
    },
}


def named_recipe(name: str, backbone: str, method: str) -> Recipe:
    """The recipe of that name, in the form that it has for a network and a method.

    Only those for ImageNet in 16, 32 and 88 epochs have several forms.

    Args:
        name: in ``RECIPES``.
        backbone: its name, without arguments.
        method: call string.

    Raises:
        ModelError: the method cannot be read.
    """
    from_float = name.endswith(FINETUNE)
    epochs = _SHORT.get(name.removesuffix(FINETUNE))
    if epochs is None:
        return RECIPES[name].recipe
    families = [call.name.partition("-")[0] for call in parse_calls(method)]
    changes = dict(_FINETUNED) if from_float else {}
    if backbone == "resnet18":
        changes["weight_decay"] = 5e-5  # as FFCV has it
    for family, own in (_FROM_FLOAT if from_float else _FROM_SCRATCH).items():
        if family in families:
            changes |= own
    return derive(_imagenet(epochs), **changes)


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe that an experiment's name may end with, and what it is, in a line."""

    recipe: Recipe
    what: str


def _named() -> dict[str, NamedRecipe]:
    recipes: dict[str, NamedRecipe] = {}
    for name, epochs in _SHORT.items():
        what = f"our own for ImageNet: {epochs} epochs, images that grow; SGD, with binary Adam"
        recipes[name] = NamedRecipe(named_recipe(name, "resnet50", "float"), what)
    for name, epochs in _SHORT.items():
        what = f"our own for ImageNet from float weights: {epochs} epochs; SGD, with ternary or "
        recipe = named_recipe(f"{name}{FINETUNE}", "resnet50", "float")
        recipes[f"{name}{FINETUNE}"] = NamedRecipe(recipe, f"{what}binary Adam")
    for name, (recipe, what) in _OF_OTHERS.items():
        recipes[name] = NamedRecipe(recipe, what)
    for pull in LATENT_PULLS:
        recipe = derive(STADTMANN2020_VGGNET7_BINARY, latent_regularization=float(pull))
        what = f"stadtmann2020-vggnet7-binary with latent weights pulled to -1 and +1 by {pull}"
        recipes[f"bin{pull}"] = NamedRecipe(recipe, what)
    return recipes


#: Recipes by others, and what each is for.
_OF_OTHERS: dict[str, tuple[Recipe, str]] = {
    "torchvision": (TORCHVISION, "ImageNet: 90 epochs of SGD, as of torchvision's weights V1"),
    "kyrkou2024": (KYRKOU2024, "STeP, all data sets: 200 epochs of SGD, cosine"),
    "he2018": (HE2018, "ternary weights on CIFAR-10: 200 epochs of SGD, three drops"),
    f"he2018{FINETUNE}": (
        HE2018_FINETUNE,
        "ternary weights on ImageNet: 50 epochs of Adam from float weights",
    ),
    "stadtmann2020-lenet5": (
        STADTMANN2020_LENET5,
        "LeNet5 in float on MNIST: 500 epochs of SGD, two drops, square hinge",
    ),
    "stadtmann2020-lenet5-binary": (
        STADTMANN2020_LENET5_BINARY,
        "binary LeNet5 on MNIST: 500 epochs of SGD at a constant rate, square hinge",
    ),
    "stadtmann2020-vggnet7": (
        STADTMANN2020_VGGNET7,
        "VGGNet7 in float on CIFAR-10, mirrored images: 500 epochs of SGD, square hinge",
    ),
    "stadtmann2020-vggnet7-binary": (
        STADTMANN2020_VGGNET7_BINARY,
        "binary VGGNet7 on CIFAR-10, mirrored images: 500 epochs of Adam, four drops",
    ),
    f"stadtmann2020-vggnet7-binary{FINETUNE}": (
        STADTMANN2020_VGGNET7_BINARY,
        "binary VGGNet7 on CIFAR-10 from float weights: 500 epochs of Adam, four drops",
    ),
    "kundu2020": (
        KUNDU2020,
        "sparse kernels of one or two weights on CIFAR-10: 120 epochs of SGD, batches of 64",
    ),
    "kundu2020-150ep": (
        KUNDU2020_150EP,
        "sparse kernels of four weights on CIFAR-10: 150 epochs of SGD, batches of 128",
    ),
    "ju2022": (JU2022, "ThreshNet, TripleNet on CIFAR-10: 200 epochs of Adam, mirrored images"),
    "ju2022-svhn": (
        JU2022_SVHN,
        "ThreshNet, TripleNet on SVHN: 60 epochs of Adam, constant rate",
    ),
}

#: Recipes that an experiment's name may end with; ``named_recipe`` has their other forms.
RECIPES: dict[str, NamedRecipe] = _named()

#: Torchvision's float weights for ImageNet by backbone, with whose names of parameters ours agree.
FLOAT_WEIGHTS = {
    "resnet18": "ResNet18_Weights.IMAGENET1K_V1",
    "resnet34": "ResNet34_Weights.IMAGENET1K_V1",
    "resnet50": "ResNet50_Weights.IMAGENET1K_V1",
    "resnet101": "ResNet101_Weights.IMAGENET1K_V1",
    "vgg11": "VGG11_BN_Weights.IMAGENET1K_V1",
    "vgg13": "VGG13_BN_Weights.IMAGENET1K_V1",
    "vgg16": "VGG16_BN_Weights.IMAGENET1K_V1",
    "vgg19": "VGG19_BN_Weights.IMAGENET1K_V1",
    "mobilenetv2": "MobileNet_V2_Weights.IMAGENET1K_V1",
    "efficientnetb0": "EfficientNet_B0_Weights.IMAGENET1K_V1",
    "shufflenetv2": "ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1",
    "squeezenet": "SqueezeNet1_1_Weights.IMAGENET1K_V1",
}


def float_weights(dataset: str, backbone: str) -> str:
    """Where fine-tuning begins: torchvision's weights, or those of our own float experiment."""
    if dataset == "imagenet" and backbone in FLOAT_WEIGHTS:
        return FLOAT_WEIGHTS[backbone]
    return f"models:/{dataset}_{backbone}@candidate"
