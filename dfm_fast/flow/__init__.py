"""Decomposable Flow Matching (arXiv 2506.19839): flow matching on every level of a pyramid, one
model, coarse to fine."""

from dfm_fast.flow.decompositions import Decomposition, Haar, Laplacian
from dfm_fast.flow.flows import DecomposableFlow
from dfm_fast.flow.sampler import Graphs
from dfm_fast.flow.schedules import StageSchedule

__all__ = ["DecomposableFlow", "Decomposition", "Graphs", "Haar", "Laplacian", "StageSchedule"]
