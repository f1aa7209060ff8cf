"""Cases of every operator: what the shared suite runs. One module per family."""

from cases import group_norms, noises, pyramids, steps

FAMILIES = (pyramids, noises, steps, group_norms)
CASES = [case for family in FAMILIES for case in family.CASES]
BAD = [bad for family in FAMILIES for bad in family.BAD]
