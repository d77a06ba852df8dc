"""ThreshNet and TripleNet: R. Ju et al., "ThreshNet: An Efficient DenseNet Using Threshold
Mechanism to Reduce Connections", IEEE Access 2022, arXiv 2201.03013, and "TripleNet" ("Efficient
Convolutional Neural Networks on Raspberry Pi for Image Classification"), JRTIP 2023, arXiv
2204.00943, with the networks that they are compared with.

Published are errors, here as accuracies, of the best epoch on the test set. Those of SVHN stand in
an older README whose header says CIFAR-10, but whose figures are SVHN's; the recipe for it is not
public, but inferred from TripleNet's logs. ThreshNet79 and HarDNet68 on SVHN have no public figure,
and ThreshNet28 is our reconstruction, since the authors never published theirs.

STeP trains MobileNetV2 and EfficientNet-B0 on CIFAR-10 too, and its networks have the short names.
"""

from __future__ import annotations

from pipeline.config import Experiment, Reference
from pipeline.recipes import JU2022, JU2022_SVHN, derive

TITLE = "Threshold networks: Ju et al., IEEE Access 2022 (ThreshNet), JRTIP 2023 (TripleNet)"

_SOURCE = "Ju et al., ThreshNet 2022 and TripleNet 2023"

_NETWORKS = {
    "threshnet28": ("ThreshNet28, our reconstruction", "threshnet28"),
    "threshnet79": ("ThreshNet79", "threshnet79"),
    "threshnet95": ("ThreshNet95", "threshnet95"),
    "triplenets": ("TripleNet-S", "triplenets"),
    "triplenetb": ("TripleNet-B", "triplenetb"),
    "hardnet68": ("HarDNet68", "hardnet68"),
    "hardnet85": ("HarDNet85", "hardnet85"),
    "squeezenet": ("SqueezeNet", "squeezenet(form=cifar)"),
    "mobilenet": ("MobileNet", "mobilenet(form=cifar)"),
    "mobilenetv2": ("MobileNetV2", "mobilenetv2(form=cifar100)"),
    "shufflenet": ("ShuffleNet", "shufflenet(form=cifar)"),
    "shufflenetv2": ("ShuffleNetV2", "shufflenetv2(form=cifar)"),
    "efficientnetb0": ("EfficientNet-B0", "efficientnetb0(form=cifar, original=true)"),
    "ghostnet": ("GhostNet", "ghostnet(form=imagenet)"),
}

#: Published top-1 errors in percent.
_CIFAR10 = {
    "threshnet28": 14.75,
    "threshnet79": 13.66,
    "threshnet95": 13.31,
    "triplenets": 13.05,
    "triplenetb": 12.97,
    "hardnet68": 14.66,
    "hardnet85": 13.89,
    "squeezenet": 14.25,
    "mobilenet": 16.12,
    "mobilenetv2": 14.06,
    "shufflenet": 13.35,
    "shufflenetv2": 18.07,
    "efficientnetb0": 13.40,
}
_SVHN = {
    "threshnet28": 6.34,
    "threshnet79": None,
    "threshnet95": 6.89,
    "triplenets": 6.18,
    "triplenetb": 5.67,
    "hardnet68": None,
    "hardnet85": 6.91,
    "mobilenet": 7.36,
    "mobilenetv2": 6.68,
    "shufflenet": 6.34,
    "efficientnetb0": 6.12,
    "ghostnet": 8.36,
}

_ALSO_OF_OTHERS = ("cifar10_mobilenetv2", "cifar10_efficientnetb0")


def _experiment(dataset: str, backbone: str, error: float | None) -> Experiment:
    network, call = _NETWORKS[backbone]
    train = JU2022 if dataset == "cifar10" else JU2022_SVHN
    if dataset == "cifar10" and backbone.startswith("triplenet"):
        train = derive(train, batch_size=64)
    name = f"{dataset}_{backbone}"
    if name in _ALSO_OF_OTHERS:
        name = f"{name}_float_ju2022"
    note = "" if dataset == "cifar10" else "; recipe inferred from TripleNet's logs"
    return Experiment(
        name=name,
        dataset=dataset,
        backbone=call,
        train=train,
        reference=Reference(
            what=f"{network}{note}",
            top1=None if error is None else round(100 - error, 2),
            best_on=None if error is None else "test",
            source=_SOURCE,
        ),
    )


EXPERIMENTS = [
    *(_experiment("cifar10", backbone, error) for backbone, error in _CIFAR10.items()),
    *(_experiment("svhn", backbone, error) for backbone, error in _SVHN.items()),
]
