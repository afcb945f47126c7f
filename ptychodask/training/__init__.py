"""Training of PINN and baseline, streaming groups from a store."""

import sys

import lazy_loader

import ptychodask

# Reading groups or a spec must not import Keras: it is loaded with the first training.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "spec": ["TrainingSpec"],
        "data": [
            "GroupReader",
            "amplitude_target",
            "groups_within",
            "judging_groups",
            "member_offsets",
            "patch_target",
            "seed_alone",
            "split_patterns",
        ],
        "batches": ["GroupBatches", "GroupStream", "MixedStream", "as_tf_dataset", "as_torch_dataset"],
        "losses": ["amplitude_loss", "mae_loss", "patch_loss", "poisson_loss"],
        "train": ["default_model_path", "train"],
    },
)

# `train` stays the function when the module of that name is imported, as in the package itself.
sys.modules[__name__].__class__ = type(ptychodask)
