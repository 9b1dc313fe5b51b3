"""HGAD: hierarchical Gaussian mixture normalizing-flow modelling for unified image anomaly detection.

Data walks one street: image -> features -> flow -> latent -> prior -> losses or scores -> maps -> metrics ->
run record -> figures. A module imports only from stages before its own.
"""

from __future__ import annotations

__version__ = "0.1.0"
