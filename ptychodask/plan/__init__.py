"""Plan of a reconstruction: its options, chunks, tiles and memory."""

import sys
from typing import TYPE_CHECKING

import lazy_loader

import ptychodask

if TYPE_CHECKING:
    from ptychodask.plan.plan import Plan, plan, plan_for, plan_together, prediction_job

    __all__ = ["Plan", "plan", "plan_for", "plan_together", "prediction_job"]
else:
    # Reading a spec, as for --help, must not import the stages that a plan looks at.
    __getattr__, __dir__, __all__ = lazy_loader.attach(
        __name__, submod_attrs={"plan": ["Plan", "plan", "plan_for", "plan_together", "prediction_job"]}
    )

# `plan` stays the function when the module of that name is imported, as in the package itself.
sys.modules[__name__].__class__ = type(ptychodask)
