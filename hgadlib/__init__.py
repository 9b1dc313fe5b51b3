"""HGAD: hierarchical Gaussian mixture normalizing-flow modelling for unified image anomaly detection.

Data walks one street: image -> features -> flow -> latent -> prior -> losses or scores -> maps -> metrics ->
run record -> figures. A module imports only from stages before its own.

The names of ``__init__.pyi`` are imported when they are first used, so that what needs no torch loads none::

    from hgadlib import RunDirectory, finish_run, load_config, prepare, train_model

    config = load_config(dataset="folder", data_root="PATH")
    run, inputs = RunDirectory.open(config), prepare(config)
    result = finish_run(config, inputs, train_model(config, inputs, run), run)
    print(result.metrics["mean"])
"""

from __future__ import annotations

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
