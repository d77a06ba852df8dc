"""Networks, the methods that change them, and what they cost. Needs torch and torchvision only.

Names are resolved on first use, so that `import models` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.blurpool import add_blurpool
    from models.calls import ModelError
    from models.costs import LayerProfile, Profile
    from models.create import (
        apply_method,
        backbone_note,
        create_model,
        explain,
        list_backbones,
        list_methods,
    )
    from models.exporting import Exported, export, open_exported
    from models.methods.binary import latent_regularization
    from models.packing.packing import PackedFile, pack, read_packed, repack
    from models.packing.unpacking import unpack
    from models.packing.weights import PackedLayer
    from models.periodic import fold_periodic
    from models.profiler import profile
    from models.surgery import (
        after_step,
        compile_quantizers,
        constant_buffers,
        fold,
        quantized_layers,
    )

__all__ = [
    "Exported",
    "LayerProfile",
    "ModelError",
    "PackedFile",
    "PackedLayer",
    "Profile",
    "add_blurpool",
    "after_step",
    "apply_method",
    "backbone_note",
    "compile_quantizers",
    "constant_buffers",
    "create_model",
    "explain",
    "export",
    "fold",
    "fold_periodic",
    "latent_regularization",
    "list_backbones",
    "list_methods",
    "open_exported",
    "pack",
    "profile",
    "quantized_layers",
    "read_packed",
    "repack",
    "unpack",
]

_HOME = {
    "Exported": "models.exporting",
    "LayerProfile": "models.costs",
    "ModelError": "models.calls",
    "PackedFile": "models.packing.packing",
    "PackedLayer": "models.packing.weights",
    "Profile": "models.costs",
    "add_blurpool": "models.blurpool",
    "after_step": "models.surgery",
    "apply_method": "models.create",
    "backbone_note": "models.create",
    "compile_quantizers": "models.surgery",
    "constant_buffers": "models.surgery",
    "create_model": "models.create",
    "explain": "models.create",
    "export": "models.exporting",
    "fold": "models.surgery",
    "fold_periodic": "models.periodic",
    "latent_regularization": "models.methods.binary",
    "list_backbones": "models.create",
    "list_methods": "models.create",
    "open_exported": "models.exporting",
    "pack": "models.packing.packing",
    "profile": "models.profiler",
    "quantized_layers": "models.surgery",
    "read_packed": "models.packing.packing",
    "repack": "models.packing.packing",
    "unpack": "models.packing.unpacking",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
