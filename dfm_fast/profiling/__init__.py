"""Where the time of a model goes, and how much of it must."""

from dfm_fast.profiling.profiles import Profile, Row, profile

__all__ = ["Profile", "Row", "profile"]
