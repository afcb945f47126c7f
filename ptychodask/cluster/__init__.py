"""Dask clusters: clients, credentials, jobs and their submission."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "clients": ["client_for_run", "connected_client", "gpu_client", "local_client", "slurm_client"],
        "tls": ["credentials_in", "temporary_credentials", "write_credentials"],
    },
)
