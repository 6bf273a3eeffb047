"""Techniques: one compression step each, found through the entry points `shoal.techniques`."""

from shoal_optimizer.techniques.base import Cancelled, Parameter, Technique, Work, find

__all__ = ["Cancelled", "Parameter", "Technique", "Work", "find"]
