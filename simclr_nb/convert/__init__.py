"""Weights in from where people have them, out to where they use them."""
from .export import export_encoder
from .imports import import_weights, inspect_weights
