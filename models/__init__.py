"""Networks, the methods that change them, and what they cost. Needs torch and torchvision only.

Names are resolved on first use, so that `import models` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.blurpool import add_blurpool
    from models.calls import ModelError
    from models.create import (
        apply_method,
        backbone_note,
        create_model,
        explain,
        list_backbones,
        list_methods,
    )
    from models.methods.binary import latent_regularization
    from models.periodic import fold_periodic
    from models.profiler import LayerProfile, Profile, profile
    from models.surgery import (
        after_step,
        compile_quantizers,
        constant_buffers,
        fold,
        quantized_layers,
    )

__all__ = [
    "LayerProfile",
    "ModelError",
    "Profile",
    "add_blurpool",
    "after_step",
    "apply_method",
    "backbone_note",
    "compile_quantizers",
    "constant_buffers",
    "create_model",
    "explain",
    "fold",
    "fold_periodic",
    "latent_regularization",
    "list_backbones",
    "list_methods",
    "profile",
    "quantized_layers",
]

_HOME = {
    "LayerProfile": "models.profiler",
    "ModelError": "models.calls",
    "Profile": "models.profiler",
    "add_blurpool": "models.blurpool",
    "after_step": "models.surgery",
    "apply_method": "models.create",
    "backbone_note": "models.create",
    "compile_quantizers": "models.surgery",
    "constant_buffers": "models.surgery",
    "create_model": "models.create",
    "explain": "models.create",
    "fold": "models.surgery",
    "fold_periodic": "models.periodic",
    "latent_regularization": "models.methods.binary",
    "list_backbones": "models.create",
    "list_methods": "models.create",
    "profile": "models.profiler",
    "quantized_layers": "models.surgery",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
