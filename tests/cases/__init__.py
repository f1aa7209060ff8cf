"""Cases of every operator: what the shared suite runs. One module per family."""

import importlib
import pkgutil

FAMILIES = [
    importlib.import_module(f"cases.{found.name}") for found in pkgutil.iter_modules(__path__)
]
CASES = [case for family in FAMILIES for case in family.CASES]
BAD = [bad for family in FAMILIES for bad in family.BAD]
