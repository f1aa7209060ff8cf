"""Cases of every operator: what the shared suite runs. One module per family."""

from cases import (
    activations,
    attentions,
    convolutions,
    group_norms,
    noises,
    norms,
    pyramids,
    rotaries,
    separables,
    steps,
    upsamples,
)

FAMILIES = (
    activations,
    attentions,
    convolutions,
    group_norms,
    noises,
    norms,
    pyramids,
    rotaries,
    separables,
    steps,
    upsamples,
)
CASES = [case for family in FAMILIES for case in family.CASES]
BAD = [bad for family in FAMILIES for bad in family.BAD]
