"""Training of PINN and baseline, streaming groups from a store."""

import lazy_loader

# Reading groups or a spec must not import Keras: it is loaded with the first training.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "spec": ["TrainingSpec"],
        "data": [
            "GroupBatches",
            "GroupReader",
            "amplitude_target",
            "as_tf_dataset",
            "as_torch_dataset",
            "groups_within",
            "judging_groups",
            "member_offsets",
            "patch_target",
            "seed_alone",
            "split_patterns",
        ],
        "streaming": ["GroupStream", "MixedStream"],
        "losses": ["amplitude_loss", "mae_loss", "patch_loss", "poisson_loss"],
        "fitting": ["default_model_path", "train"],
    },
)
