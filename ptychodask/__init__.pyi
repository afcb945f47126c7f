"""Public names of ptychodask; `__init__.py` loads them on first use."""

from .cluster.clients import gpu_client as gpu_client, slurm_client as slurm_client
from .cluster.job import JobSpec as JobSpec
from .cluster.preflight import preflight as preflight
from .cluster.submission import batch_script as batch_script, submit as submit
from .errors import PtychodaskError as PtychodaskError
from .export import export as export
from .grouping import GroupingSpec as GroupingSpec, Groups as Groups
from .inspection import check_axes as check_axes, inspect_file as inspect_file
from .io.ingest import ingest as ingest
from .io.source import IngestSpec as IngestSpec
from .iterative import ProbeRefinement as ProbeRefinement, refine_probe as refine_probe
from .judging.compare import compare as compare
from .judging.plotting import (
    plot as plot,
    plot_comparison as plot_comparison,
    plot_complex as plot_complex,
    plot_refinement as plot_refinement,
    plot_residuals as plot_residuals,
    plot_split_half as plot_split_half,
)
from .judging.report import write_report as write_report
from .judging.residuals import outliers as outliers, residuals as residuals
from .judging.resolution import resolution as resolution
from .models.bundle import load_model as load_model
from .models.callable_model import CallableModel as CallableModel
from .models.model import Model as Model
from .models.spec import ModelSpec as ModelSpec
from .plan.plan import Plan as Plan, plan as plan
from .plan.spec import ReconstructionSpec as ReconstructionSpec
from .reconstruction import FailedScansError as FailedScansError, reconstruct as reconstruct
from .reconstruction.iterative import reconstruct_iterative as reconstruct_iterative
from .refinement.apply import apply_positions as apply_positions
from .result import open_result as open_result
from .scan import Scan as Scan
from .simulate import simulate as simulate
from .store import open_scan as open_scan
from .store.annotate import set_metadata as set_metadata
from .store.append import finish_scan as finish_scan
from .store.groups import group as group
from .study import StudySpec as StudySpec, read_study as read_study, run_study as run_study
from .training.batches import as_tf_dataset as as_tf_dataset, as_torch_dataset as as_torch_dataset
from .training.data import GroupReader as GroupReader
from .training.spec import TrainingSpec as TrainingSpec
from .training.train import train as train

__version__: str
