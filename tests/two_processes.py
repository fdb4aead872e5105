"""One process of a distributed run; torchrun starts it from helpers_training with a method's name and its settings."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import torch

from fieldmark.cli import METHODS
from helpers_training import few

torch.set_num_threads(1)
method, settings = sys.argv[1:]
module = import_module(f"fieldmark.methods.{method}")
full = module.open_task
module.open_task = lambda config: few(full(config))
module.train(getattr(module, METHODS[method][0])(**json.loads(settings)))
