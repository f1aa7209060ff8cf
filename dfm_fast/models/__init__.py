"""Reference models on the library's kernels."""

from dfm_fast.models.checkpoints import dfm_sit_state_dict, dit_state_dict, sit_state_dict
from dfm_fast.models.dfm import DFM_B, DFM_L, DFM_S, DFM_XL, DFMTransformer
from dfm_fast.models.expansions import expand_to_dfm
from dfm_fast.models.flux import FluxDFM
from dfm_fast.models.snapgen_decoder import SnapGenDecoder

__all__ = [
    "DFM_B",
    "DFM_L",
    "DFM_S",
    "DFM_XL",
    "DFMTransformer",
    "FluxDFM",
    "SnapGenDecoder",
    "dfm_sit_state_dict",
    "dit_state_dict",
    "expand_to_dfm",
    "sit_state_dict",
]
