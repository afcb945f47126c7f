"""Networks, their forward model and their bundles."""

import lazy_loader

# Planning or reading a spec must not import Keras: it is loaded with the first network.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "device": ["check_gpu", "is_out_of_memory", "use_given_gpu"],
        "bundle": ["load_model", "save_model"],
        "model": ["Model"],
        "callable_model": ["CallableModel"],
        "ptychopinn": ["PtychoPinnModel"],
        "spec": ["ModelSpec", "Optics"],
        "untrained": ["untrained_model", "untrained_ptychopinn"],
    },
)
