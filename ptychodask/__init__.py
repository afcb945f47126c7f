"""Chunked, Dask-distributed inference for ptychography networks."""

import sys
from types import ModuleType
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "errors": ["PtychodaskError"],
        "scan": ["Scan"],
        "grouping": ["GroupingSpec", "Groups"],
        "store": ["open_scan"],
        "store.groups": ["group"],
        "store.append": ["finish_scan"],
        "store.annotate": ["set_metadata"],
        "io": ["IngestSpec", "ingest"],
        "simulate": ["simulate"],
        "models": ["CallableModel", "Model", "ModelSpec", "load_model"],
        "result": ["open_result"],
        "refinement.apply": ["apply_positions"],
        "iterative": ["ProbeRefinement", "refine_probe"],
        "reconstruction.iterative": ["reconstruct_iterative"],
        "training": ["GroupReader", "TrainingSpec", "as_tf_dataset", "as_torch_dataset", "train"],
        "cluster.job": ["JobSpec"],
        "cluster.preflight": ["preflight"],
        "cluster.clients": ["gpu_client", "slurm_client"],
        "cluster.submission": ["batch_script", "submit"],
        "plan.spec": ["ReconstructionSpec"],
        "plan": ["Plan", "plan"],
        "reconstruction": ["FailedScansError", "reconstruct"],
        "judging.compare": ["compare"],
        "judging.resolution": ["resolution"],
        "judging.residuals": ["outliers", "residuals"],
        "study": ["StudySpec", "read_study", "run_study"],
        "judging.plotting": [
            "plot",
            "plot_comparison",
            "plot_complex",
            "plot_refinement",
            "plot_residuals",
            "plot_split_half",
        ],
        "judging.report": ["write_report"],
        "inspection": ["check_axes", "inspect_file"],
        "export": ["export"],
    },
)


class _Package(ModuleType):
    """Module type that keeps functions when submodules of equal names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in self.__all__):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
