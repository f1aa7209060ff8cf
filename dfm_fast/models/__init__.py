"""Reference models on the library's kernels."""

from dfm_fast.models.checkpoints import (
    dfm_sit_state_dict,
    dit_state_dict,
    sit_state_dict,
    snapgen_from_dreamlite,
)
from dfm_fast.models.dfm import DFM_B, DFM_L, DFM_S, DFM_XL, DFMTransformer
from dfm_fast.models.expansions import expand_to_dfm
from dfm_fast.models.flux import FluxDFM
from dfm_fast.models.snapgen import SnapGenUNet, snapgen_imagenet, snapgen_t2i, snapgen_tiny
from dfm_fast.models.snapgen_decoder import SnapGenDecoder
from dfm_fast.models.snapgen_pipeline import SnapGenPipeline, UNetVelocity
from dfm_fast.models.text_encoders import TextEncoder, TextEncoders
from dfm_fast.models.text_layouts import TextConditions, TextLayout, draw_kept
from dfm_fast.models.text_tables import ClassTokens, TextTable

__all__ = [
    "DFM_B",
    "DFM_L",
    "DFM_S",
    "DFM_XL",
    "ClassTokens",
    "DFMTransformer",
    "FluxDFM",
    "SnapGenDecoder",
    "SnapGenPipeline",
    "SnapGenUNet",
    "TextConditions",
    "TextEncoder",
    "TextEncoders",
    "TextLayout",
    "TextTable",
    "UNetVelocity",
    "dfm_sit_state_dict",
    "dit_state_dict",
    "draw_kept",
    "expand_to_dfm",
    "sit_state_dict",
    "snapgen_from_dreamlite",
    "snapgen_imagenet",
    "snapgen_t2i",
    "snapgen_tiny",
]
