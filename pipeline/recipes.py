"""Named recipes, each derived from another by replacing fields.

``RECIPES`` are those that an experiment's name may end with. A paper's recipe holds its
augmentation and normalization too, so it means the same on every data set.
"""

from __future__ import annotations

from typing import Any

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
STADTMANN2020 = derive(
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
STADTMANN2020_BINARY_LENET5 = derive(
    STADTMANN2020, momentum=0.99, weight_decay=0, schedule="constant", milestones=()
)

#: VGGNet7 in float on CIFAR-10.
STADTMANN2020_VGGNET7 = derive(
    STADTMANN2020,
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
STADTMANN2020_BINARY_VGGNET7 = derive(
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

    After the recipes of FFCV (Leclerc et al. 2022, libffcv/ffcv-imagenet), which have no average.
    Images grow from 160 to 192 pixels late in training and are tested at 224, since a random window
    shows things larger than the whole image does (Touvron et al., NeurIPS 2019).
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


def _finetuned(recipe: Recipe) -> Recipe:
    """From float weights: the optimizer of He et al. 2018, whose rate is for 256 images.

    Without blur, with which the float weights were not trained.
    """
    return derive(
        recipe,
        optimizer="adam",
        lr=1e-4,
        weight_decay=5e-6,
        warmup_epochs=0,
        blurpool=False,
    )


_SHORT = {f"{epochs}ep": _imagenet(epochs) for epochs in (16, 32, 88)}

#: The ending of the names of recipes that begin with float weights.
FINETUNE = "-finetune"

#: Recipes that an experiment's name may end with.
RECIPES: dict[str, Recipe] = {
    **_SHORT,
    **{f"{name}{FINETUNE}": _finetuned(recipe) for name, recipe in _SHORT.items()},
    "torchvision": TORCHVISION,
    "kyrkou2024": KYRKOU2024,
    "he2018": HE2018,
    f"he2018{FINETUNE}": HE2018_FINETUNE,
    "stadtmann2020": STADTMANN2020,
    "stadtmann2020-binary": STADTMANN2020_BINARY_VGGNET7,
    f"stadtmann2020{FINETUNE}": STADTMANN2020_BINARY_VGGNET7,
    **{
        f"bin{pull}": derive(STADTMANN2020_BINARY_VGGNET7, latent_regularization=float(pull))
        for pull in LATENT_PULLS
    },
    "kundu2020": KUNDU2020,
    "ju2022": JU2022,
}

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
